//! The command as people run it, and a small server in the agent's place.

use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};

use axum::Router;
use serde_json::Value;
use tempfile::TempDir;
use tokio::net::UnixListener;
use tokio::process::{Child, Command};

/// Answers on a Unix socket as long as it lives.
pub(crate) struct Server {
    directory: TempDir,
    task: tokio::task::JoinHandle<()>,
}

impl Server {
    pub(crate) fn start(routes: Router) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(directory.path().join("agent.sock")).unwrap();
        let task = tokio::spawn(async move { axum::serve(listener, routes).await.unwrap() });
        Self { directory, task }
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.directory.path().join("agent.sock")
    }

    pub(crate) async fn belay(&self, line: &str) -> Output {
        belay(&self.socket(), line).await
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Runs `belay` with arguments that have no spaces in them.
pub(crate) async fn belay(socket: &Path, line: &str) -> Output {
    spawn(socket, line).wait_with_output().await.unwrap()
}

/// Starts it.
pub(crate) fn spawn(socket: &Path, line: &str) -> Child {
    Command::new(env!("CARGO_BIN_EXE_belay"))
        .args(line.split_whitespace())
        .env("BELAY_SOCKET", socket)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap()
}

pub(crate) fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

pub(crate) fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

pub(crate) fn json(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap()
}
