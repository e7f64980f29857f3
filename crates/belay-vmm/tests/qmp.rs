//! QMP peers that misbehave, each a small fake: the client tells what is wrong, and never hangs or panics.

use belay_vmm::{Qmp, QmpError};
use serde_json::json;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};

const LIMIT: Duration = Duration::from_secs(30);
const SHORT: Duration = Duration::from_millis(100);
const GREETING: &str = r#"{"QMP": {"version": {"qemu": {"micro": 2, "minor": 0, "major": 10}, "package": ""}, "capabilities": ["oob"]}}"#;

/// A fake VMM: it accepts one connection and then does what the test says.
fn fake<F: Future<Output = ()> + Send>(serve: impl FnOnce(Peer) -> F + Send + 'static) -> (TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("qmp");
    let listener = UnixListener::bind(&path).unwrap();
    tokio::spawn(async move {
        let (stream, _) = listener.accept().await.unwrap();
        serve(Peer(BufReader::new(stream))).await;
    });
    (dir, path)
}

struct Peer(BufReader<UnixStream>);

impl Peer {
    async fn send(&mut self, line: &str) {
        // The client may have left by now.
        let _ = self.0.write_all(format!("{line}\r\n").as_bytes()).await;
    }

    /// The next command's id, once the client has sent it.
    async fn next_id(&mut self) -> u64 {
        let mut line = String::new();
        self.0.read_line(&mut line).await.unwrap();
        serde_json::from_str::<serde_json::Value>(&line).unwrap()["id"].as_u64().unwrap()
    }

    async fn greet(&mut self) {
        self.send(GREETING).await;
        let id = self.next_id().await;
        self.send(&format!(r#"{{"return": {{}}, "id": {id}}}"#)).await;
    }

    /// Keeps the connection open until the client closes it.
    async fn linger(mut self) {
        let mut line = String::new();
        while self.0.read_line(&mut line).await.is_ok_and(|len| len > 0) {}
    }
}

#[tokio::test]
async fn nobody_there_is_told_with_the_path() {
    let error = Qmp::connect(Path::new("/nonexistent/qmp"), SHORT).await.unwrap_err();
    assert!(matches!(&error, QmpError::Connect { .. }) && error.to_string().contains("/nonexistent/qmp"));
}

#[tokio::test]
async fn silent_peer_is_given_up() {
    let (_dir, path) = fake(Peer::linger);
    assert!(matches!(Qmp::connect(&path, SHORT).await, Err(QmpError::NoGreeting { .. })));
}

#[tokio::test]
async fn other_protocol_is_refused() {
    for greeting in ["SSH-2.0-OpenSSH_9.2", r#"{"hello": 1}"#, "\u{1}\u{2}"] {
        let (_dir, path) = fake(async move |mut peer: Peer| {
            peer.send(greeting).await;
            peer.linger().await;
        });
        assert!(matches!(Qmp::connect(&path, LIMIT).await, Err(QmpError::Protocol(_))), "{greeting}");
    }
}

#[tokio::test]
async fn late_reply_reaches_nobody_else() {
    let (_dir, path) = fake(async |mut peer: Peer| {
        peer.greet().await;
        let first = peer.next_id().await;
        let second = peer.next_id().await;
        peer.send(&format!(r#"{{"return": "late", "id": {first}}}"#)).await;
        peer.send(r#"{"event": "STOP", "timestamp": {"seconds": 3, "microseconds": 5}}"#).await;
        peer.send(&format!(r#"{{"return": "mine", "id": {second}}}"#)).await;
        peer.linger().await;
    });
    let qmp = Qmp::connect(&path, LIMIT).await.unwrap();
    assert_eq!(qmp.version().to_string(), "10.0.2");
    let mut events = qmp.events();
    let error = qmp.execute_within("slow", json!({}), SHORT).await.unwrap_err();
    assert!(matches!(error, QmpError::Timeout { .. }));
    assert_eq!(qmp.execute("quick", json!({})).await.unwrap(), "mine");
    let event = events.recv().await.unwrap();
    assert_eq!((event.name.as_str(), event.timestamp_us), ("STOP", 3_000_005));
}

#[tokio::test]
async fn end_of_the_vmm_ends_what_waits() {
    let (_dir, path) = fake(async |mut peer: Peer| {
        peer.greet().await;
        peer.next_id().await;
    });
    let qmp = Qmp::connect(&path, LIMIT).await.unwrap();
    let mut events = qmp.events();
    assert!(matches!(qmp.execute("query-status", json!({})).await, Err(QmpError::Closed(_))));
    qmp.closed().await;
    assert!(qmp.is_closed());
    assert!(events.recv().await.is_err());
    assert!(qmp.events().recv().await.is_err(), "a new subscriber is not left waiting");
    assert!(matches!(qmp.execute("query-status", json!({})).await, Err(QmpError::Closed(_))));
}

#[tokio::test]
async fn garbage_in_between_ends_the_connection() {
    let (_dir, path) = fake(async |mut peer: Peer| {
        peer.greet().await;
        peer.send(r#"{"return": 1}"#).await;
        peer.send(r#"{"return": 1, "id": "not ours"}"#).await;
        peer.send("[").await;
        peer.linger().await;
    });
    let qmp = Qmp::connect(&path, LIMIT).await.unwrap();
    qmp.closed().await;
    let error = qmp.execute("query-status", json!({})).await.unwrap_err();
    assert!(error.to_string().contains("not QMP"), "{error}");
}

#[tokio::test]
async fn unexpected_reply_is_told_with_the_command() {
    let (_dir, path) = fake(async |mut peer: Peer| {
        peer.greet().await;
        let id = peer.next_id().await;
        peer.send(&format!(r#"{{"return": [1], "id": {id}}}"#)).await;
        peer.linger().await;
    });
    let qmp = Qmp::connect(&path, LIMIT).await.unwrap();
    let error = qmp.query_status().await.unwrap_err();
    assert!(matches!(&error, QmpError::Reply { command, .. } if command == "query-status"), "{error}");
}
