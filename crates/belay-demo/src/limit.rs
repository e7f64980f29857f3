//! When a demonstration ends early: at Ctrl-C, or when it takes too long.

use std::process::{Command, Output, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::RecvTimeoutError;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// What a demonstration may take. It ends in under 5 minutes, with [`CLEAN_UP`] for two VMs and two agents.
const WHOLE: Duration = Duration::from_secs(260);
/// What each step of cleaning up may take, whatever is left.
pub(crate) const CLEAN_UP: Duration = Duration::from_secs(10);

static STOP: AtomicBool = AtomicBool::new(false);
static END: OnceLock<Instant> = OnceLock::new();

/// The demonstration begins. What never calls this may take as long as it likes.
pub(crate) fn begin() {
    let _ = END.set(Instant::now() + WHOLE);
}

/// Ctrl-C.
pub(crate) fn interrupt() {
    STOP.store(true, Ordering::SeqCst);
}

/// Fails if it is time to end; `waits_for` is what has not happened yet.
pub(crate) fn go_on(waits_for: &str) -> Result<()> {
    verdict(STOP.load(Ordering::SeqCst), END.get().copied(), Instant::now(), waits_for)
}

fn verdict(interrupted: bool, end: Option<Instant>, now: Instant, waits_for: &str) -> Result<()> {
    if interrupted {
        bail!("interrupted; everything is taken away");
    }
    match end {
        Some(end) if now >= end => bail!(
            "not done after {} s: it still waited for {waits_for}; everything is taken away",
            WHOLE.as_secs()
        ),
        _ => Ok(()),
    }
}

/// Time left, if it is limited.
pub(crate) fn left() -> Option<Duration> {
    END.get().map(|end| end.saturating_duration_since(Instant::now()))
}

/// Runs a command to its end, and takes what it prints. One that is not done in time is killed.
///
/// # Errors
/// It cannot be run, or was killed.
pub(crate) fn output_within(command: &mut Command, within: Option<Duration>) -> Result<Output> {
    let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let pid = rustix::process::Pid::from_child(&child);
    let (sender, ended) = std::sync::mpsc::channel();
    std::thread::spawn(move || sender.send(child.wait_with_output()));
    let Some(within) = within else { return Ok(ended.recv().context("its thread has ended")??) };
    match ended.recv_timeout(within) {
        Ok(output) => Ok(output?),
        Err(RecvTimeoutError::Disconnected) => bail!("its thread has ended"),
        Err(RecvTimeoutError::Timeout) => {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
            bail!("it did not end, and was killed after {} s", within.as_secs())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn end_comes_with_an_interrupt_or_the_time_and_says_what_was_waited_for() {
        let now = Instant::now();
        let later = now + WHOLE;
        assert!(verdict(false, None, later, "x").is_ok());
        assert!(verdict(false, Some(later), now, "x").is_ok());
        let late = verdict(false, Some(later), later, "the exchange").unwrap_err().to_string();
        assert!(late.contains("not done after 260 s") && late.contains("the exchange"), "{late}");
        assert!(verdict(true, None, now, "x").unwrap_err().to_string().contains("interrupted"));
    }

    #[test]
    fn command_that_does_not_end_is_killed_and_one_that_does_is_heard() {
        let said = output_within(Command::new("echo").arg("yes"), Some(Duration::from_secs(30))).unwrap();
        assert_eq!(said.stdout, b"yes\n");
        let forever = output_within(Command::new("sleep").arg("1000"), Some(Duration::ZERO));
        assert!(forever.unwrap_err().to_string().contains("was killed"));
        assert!(output_within(&mut Command::new("/nowhere"), None).is_err());
    }
}
