//! QEMU as a process that outlives the agent.
//!
//! A VMM is started in a session of its own, with its output in a log file, and is never tied to the agent: when
//! the agent ends or is killed, the VM runs on. (Under systemd the agent's unit needs `KillMode=process`.) After a
//! restart the agent finds it again by [`ProcessId`]: a pid alone may belong to somebody else by then, a pid with
//! its start time cannot. Signals go through a pidfd that was opened before the identity was checked, so they can
//! never hit another process.
#![allow(unsafe_code, reason = "setsid between fork and exec, and a pidfd given to tokio")]

use rustix::fd::{AsFd, OwnedFd};
use rustix::process::{Pid, PidfdFlags, Signal};
use serde::{Deserialize, Serialize};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Longest part of a log that is quoted in an error, bytes.
const LOG_TAIL_BYTES: u64 = 2048;

/// What can go wrong with a VMM's process.
#[derive(Debug, thiserror::Error)]
pub enum ProcessError {
    /// Its log file cannot be written.
    #[error("cannot open the VM's log {path}: {source}")]
    Log {
        /// The log.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It does not start.
    #[error("cannot start {program}: {source}")]
    Start {
        /// The program.
        program: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The process with this identity has ended; its pid may be another's now.
    #[error("process {0} has ended")]
    Gone(ProcessId),
    /// The kernel refused something.
    #[error("process {id}: {what}: {source}")]
    Kernel {
        /// The process.
        id: ProcessId,
        /// What was tried.
        what: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// A process, as long as the machine is not rebooted: its pid and when it started.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ProcessId {
    /// Process id.
    pub pid: u32,
    /// Clock ticks between boot and its start, field 22 of `/proc/PID/stat`.
    pub start_ticks: u64,
}

impl std::fmt::Display for ProcessId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.pid)
    }
}

impl ProcessId {
    /// The identity of the process that has this pid now; `None` if there is none, or only a zombie.
    #[must_use]
    pub fn of_pid(pid: u32) -> Option<Self> {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name, in parentheses, may hold anything; the state is the first field behind it.
        let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace();
        let state = fields.next()?;
        // State is field 3, start time field 22.
        let start_ticks = fields.nth(18)?.parse().ok()?;
        (!matches!(state, "Z" | "X")).then_some(Self { pid, start_ticks })
    }

    /// Whether this very process still runs.
    #[must_use]
    pub fn is_alive(self) -> bool {
        Self::of_pid(self.pid) == Some(self)
    }
}

/// A running VMM. Dropping it leaves the VMM alone.
#[derive(Debug)]
pub struct VmmProcess {
    id: ProcessId,
    pidfd: AsyncFd<OwnedFd>,
}

impl VmmProcess {
    /// Starts `program` in its own session, its output appended to `log`. Needs a tokio runtime.
    ///
    /// # Errors
    ///
    /// [`ProcessError`] if the log or the program cannot be opened. A program that starts and then fails (QEMU
    /// with a wrong argument) is seen by [`exited`](Self::exited); [`log_tail`] tells why.
    pub fn start(program: &Path, arguments: &[String], log: &Path) -> Result<Self, ProcessError> {
        let open_log = || -> io::Result<(File, File)> {
            let file = OpenOptions::new().create(true).append(true).mode(0o640).open(log)?;
            Ok((file.try_clone()?, file))
        };
        let (out, err) = open_log().map_err(|source| ProcessError::Log { path: log.to_owned(), source })?;
        let mut command = Command::new(program);
        command.args(arguments).stdin(Stdio::null()).stdout(out).stderr(err);
        // SAFETY: setsid is a plain system call, which is allowed between fork and exec.
        unsafe { command.pre_exec(|| rustix::process::setsid().map(drop).map_err(io::Error::from)) };
        let start_error = |source| ProcessError::Start { program: program.to_owned(), source };
        let child = command.spawn().map_err(start_error)?;
        let pid = child.id();
        // The child is not reaped yet, so the pid is its own, even if it has ended already.
        let opened = open_pidfd(pid).and_then(|pidfd| Ok((watch(pidfd)?, stat_of_child(pid)?)));
        reap(child);
        let (pidfd, id) = opened.map_err(start_error)?;
        Ok(Self { id, pidfd })
    }

    /// Finds a VMM again that was started earlier, perhaps by an agent that is gone. Needs a tokio runtime.
    ///
    /// # Errors
    ///
    /// [`ProcessError::Gone`] if it has ended.
    pub fn find(id: ProcessId) -> Result<Self, ProcessError> {
        let pidfd = open_pidfd(id.pid).map_err(|_| ProcessError::Gone(id))?;
        // Checked after the pidfd is open: from here on it names this process and no other.
        if !id.is_alive() {
            return Err(ProcessError::Gone(id));
        }
        let pidfd = watch(pidfd).map_err(|source| ProcessError::Kernel { id, what: "watch", source })?;
        Ok(Self { id, pidfd })
    }

    /// Its identity, to be kept for [`find`](Self::find).
    #[must_use]
    pub fn id(&self) -> ProcessId {
        self.id
    }

    /// Whether it still runs.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        self.id.is_alive()
    }

    /// Waits until it has ended, whoever its parent is.
    ///
    /// # Errors
    ///
    /// [`ProcessError::Kernel`] if it cannot be watched.
    pub async fn exited(&self) -> Result<(), ProcessError> {
        // A pidfd becomes readable when the process ends, and stays so.
        match self.pidfd.readable().await {
            Ok(mut guard) => {
                guard.retain_ready();
                Ok(())
            }
            Err(source) => Err(ProcessError::Kernel { id: self.id, what: "wait", source }),
        }
    }

    /// Asks it to end (SIGTERM), and makes it (SIGKILL) if it has not within `grace`. Returns when it has ended.
    ///
    /// # Errors
    ///
    /// [`ProcessError::Kernel`] if the kernel refuses. A process that has ended already is no error.
    pub async fn terminate(&self, grace: Duration) -> Result<(), ProcessError> {
        self.signal(Signal::TERM)?;
        if tokio::time::timeout(grace, self.exited()).await.is_err() {
            self.kill()?;
            self.exited().await?;
        }
        Ok(())
    }

    /// Kills it (SIGKILL) without waiting.
    ///
    /// # Errors
    ///
    /// As [`terminate`](Self::terminate).
    pub fn kill(&self) -> Result<(), ProcessError> {
        self.signal(Signal::KILL)
    }

    fn signal(&self, signal: Signal) -> Result<(), ProcessError> {
        match rustix::process::pidfd_send_signal(self.pidfd.get_ref().as_fd(), signal) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
            Err(error) => Err(ProcessError::Kernel { id: self.id, what: "signal", source: error.into() }),
        }
    }
}

/// The end of a VM's log, to say why it did not start. Empty if there is none.
#[must_use]
pub fn log_tail(log: &Path) -> String {
    use std::io::{Read, Seek, SeekFrom};
    let read = || -> io::Result<Vec<u8>> {
        let mut file = File::open(log)?;
        let len = file.metadata()?.len();
        file.seek(SeekFrom::Start(len.saturating_sub(LOG_TAIL_BYTES)))?;
        let mut tail = Vec::new();
        file.take(LOG_TAIL_BYTES).read_to_end(&mut tail)?;
        Ok(tail)
    };
    read().map_or_else(|_| String::new(), |tail| String::from_utf8_lossy(&tail).trim().to_owned())
}

fn open_pidfd(pid: u32) -> io::Result<OwnedFd> {
    let raw = i32::try_from(pid).ok().and_then(Pid::from_raw);
    let pid = raw.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "not a process id"))?;
    Ok(rustix::process::pidfd_open(pid, PidfdFlags::empty())?)
}

/// Registers a pidfd with tokio, to be readable when the process has ended.
fn watch(pidfd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` names the same open descriptor until the `AsyncFd` that owns it drops it.
    Ok(unsafe { AsyncFd::register_with_interest(pidfd, Interest::READABLE) }?)
}

/// The identity of our own child, zombie or not.
fn stat_of_child(pid: u32) -> io::Result<ProcessId> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let start =
        stat.rsplit_once(')').and_then(|(_, rest)| rest.split_ascii_whitespace().nth(19)?.parse().ok());
    let start_ticks =
        start.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "unreadable /proc stat"))?;
    Ok(ProcessId { pid, start_ticks })
}

/// Collects the exit status when the child ends, so that it does not stay a zombie while the agent lives.
fn reap(mut child: Child) {
    let pid = child.id();
    let waiter = move || {
        if let Ok(status) = child.wait() {
            tracing::info!(pid, %status, "VMM ended");
        }
    };
    if let Err(error) = std::thread::Builder::new().name(format!("reap-{pid}")).spawn(waiter) {
        tracing::warn!(pid, %error, "cannot watch the VMM; it stays a zombie once it has ended");
    }
}
