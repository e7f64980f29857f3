//! Processes that end with the test.

use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Output, Stdio};

use anyhow::{Context, Result};
use rustix::process::{Pid, Signal};

use crate::until;

/// A command that runs beside the test; killed when dropped.
pub struct Background(Option<Child>);

impl Background {
    pub(crate) fn new(child: Child) -> Self {
        Self(Some(child))
    }

    /// Sends a signal to it.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let child = self.0.as_ref().context("it has ended")?;
        Ok(rustix::process::kill_process(Pid::from_child(child), signal)?)
    }

    /// Whether it still runs.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>> {
        Ok(self.0.as_mut().context("it has ended")?.try_wait()?)
    }

    /// Waits for its end and returns what it printed.
    ///
    /// # Errors
    /// It does not end in time.
    pub fn wait(mut self) -> Result<Output> {
        until("the end of a command", || Ok(self.ended()?.map(drop)))?;
        Ok(self.0.take().context("it has ended")?.wait_with_output()?)
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        if let Some(child) = &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Ends what a test has left, however the test ends: also when it is killed, and cannot clean up.
pub(crate) struct Reaper {
    child: Child,
}

impl Reaper {
    /// Looks after the processes whose pid files are in folders of `folder`.
    pub(crate) fn start(folder: &Path) -> Result<Self> {
        // Its input ends when the test does. Every process of ours names the folder on its command line.
        let script = "cat >/dev/null; for file in \"$0\"/*/*.pid; do pid=$(cat \"$file\" 2>/dev/null) || continue; \
                      if grep -q -F \"$0\" \"/proc/$pid/cmdline\" 2>/dev/null; then kill -9 \"$pid\"; fi; done; \
                      rm -rf \"$0\"";
        let mut command = Command::new("sh");
        command.args(["-c", script]).arg(folder).stdin(Stdio::piped());
        // A Ctrl-C at the terminal is for the test, not for it.
        Ok(Self { child: command.process_group(0).spawn().context("cannot run sh")? })
    }
}

impl Drop for Reaper {
    fn drop(&mut self) {
        drop(self.child.stdin.take());
        let _ = self.child.wait();
    }
}

/// Whether this process runs, and one of its arguments names a path in `folder`: then it is one of ours.
pub(crate) fn is_ours(pid: u32, folder: &Path) -> bool {
    let alive = std::fs::read_to_string(format!("/proc/{pid}/stat"))
        .is_ok_and(|stat| !stat.rsplit_once(')').is_some_and(|(_, rest)| rest.starts_with(" Z")));
    let folder = folder.as_os_str().as_encoded_bytes();
    alive
        && std::fs::read(format!("/proc/{pid}/cmdline"))
            .is_ok_and(|line| line.windows(folder.len()).any(|part| part == folder))
}

/// Kills a process of ours by its pid, and waits until it is gone.
pub(crate) fn kill_ours(pid: u32, folder: &Path) -> Result<()> {
    if !is_ours(pid, folder) {
        return Ok(());
    }
    let pid_number = i32::try_from(pid).ok().and_then(Pid::from_raw).context("not a pid")?;
    rustix::process::kill_process(pid_number, Signal::KILL)?;
    until("the end of a killed process", || Ok((!is_ours(pid, folder)).then_some(())))
}
