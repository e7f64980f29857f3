//! The serial console: lines of JSON out, one-word commands in, and the kernel's log beside it.

use crate::pattern::Mismatch;
use crate::stats::{OpKind, Snapshot, Stats, monotonic_ns};
use std::fs::File;
use std::io::{self, BufRead, Read, Seek, SeekFrom, Write};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::{Duration, Instant};

/// Errors and mismatches beyond these are counted, but not told one by one: a dead disk has very many.
const MAX_DETAILS: u32 = 50;

/// What the host may ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Hold the load, read and check every block, go on.
    Verify,
    /// Hold the load.
    Stop,
    /// Let it go on.
    Start,
    /// Hold the load, flush, go on.
    Sync,
    /// No more interval reports.
    Quiet,
    /// Interval reports again.
    Report,
    /// Begin a write of the disk's last block, and do not wait for it.
    Older,
    /// Write that block again, wait for both, and tell which of them is there.
    Newer,
    /// Reset the machine at once, whatever is in flight.
    Reboot,
    /// Hold the load, flush, and end.
    PowerOff,
}

impl Command {
    /// Reads a command; case and surrounding space do not matter.
    #[must_use]
    pub fn parse(line: &str) -> Option<Self> {
        Some(match line.trim().to_ascii_lowercase().as_str() {
            "verify" => Self::Verify,
            "stop" => Self::Stop,
            "start" => Self::Start,
            "sync" => Self::Sync,
            "quiet" => Self::Quiet,
            "report" => Self::Report,
            "older" => Self::Older,
            "newer" => Self::Newer,
            "reboot" => Self::Reboot,
            "poweroff" => Self::PowerOff,
            _ => return None,
        })
    }
}

/// Where reports go.
pub struct Console {
    out: Mutex<Box<dyn Write + Send>>,
    reports: AtomicBool,
    details: AtomicU32,
}

impl Console {
    /// Reports go to `out`.
    #[must_use]
    pub fn new(out: Box<dyn Write + Send>) -> Self {
        Self { out: Mutex::new(out), reports: AtomicBool::new(true), details: AtomicU32::new(0) }
    }

    /// Writes a line at once, whole. A console that fails is nothing that could be reported.
    pub fn line(&self, line: &str) {
        let mut out = self.out.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = out.write_all(format!("{line}\n").as_bytes()).and_then(|()| out.flush());
    }

    /// Whether interval reports are written.
    pub fn set_reports(&self, on: bool) {
        self.reports.store(on, Ordering::SeqCst);
    }

    /// Tells of an operation that failed.
    pub fn error(&self, kind: OpKind, at: u64, error: &io::Error) {
        if self.details.fetch_add(1, Ordering::Relaxed) < MAX_DETAILS {
            self.line(&format!(
                r#"{{"error":{{"t_ns":{},"op":"{}","at":{at},"what":{}}}}}"#,
                monotonic_ns(),
                kind.name(),
                quoted(&error.to_string())
            ));
        }
    }

    /// Tells of a block that is wrong.
    pub fn mismatch(&self, at: u64, oldest: u32, newest: u32, found: Mismatch) {
        if self.details.fetch_add(1, Ordering::Relaxed) < MAX_DETAILS {
            let version = found.version.map_or_else(|| "null".to_owned(), |version| version.to_string());
            self.line(&format!(
                r#"{{"mismatch":{{"t_ns":{},"at":{at},"sector":{},"oldest":{oldest},"newest":{newest},"found":{version}}}}}"#,
                monotonic_ns(),
                found.sector
            ));
        }
    }

    /// Writes interval reports until `ended`.
    pub(crate) fn report_until(&self, ended: &AtomicBool, every: Duration, stats: &Stats) {
        let mut next = Instant::now() + every;
        while !ended.load(Ordering::SeqCst) {
            std::thread::sleep(next.saturating_duration_since(Instant::now()));
            // After a standstill of the VM: one report, not one for each interval that was missed.
            next = (next + every).max(Instant::now());
            if self.reports.load(Ordering::SeqCst) && !ended.load(Ordering::SeqCst) {
                self.line(&report(&stats.snapshot()));
            }
        }
    }
}

/// A snapshot as JSON.
#[must_use]
pub fn report(snapshot: &Snapshot) -> String {
    let Snapshot { ops, reads, writes, flushes, bytes, errors, mismatches, guest_resets, .. } = snapshot;
    let Snapshot { inflight, oldest_us, p50_us, p99_us, max_us, histogram, .. } = snapshot;
    let buckets: Vec<String> = histogram.iter().map(|(us, count)| format!("[{us},{count}]")).collect();
    format!(
        concat!(
            r#"{{"t_ns":{},"ops":{},"reads":{},"writes":{},"flushes":{},"bytes":{},"errors":{},"mismatches":{},"#,
            r#""guest_resets":{},"inflight":{},"oldest_us":{},"lat_us":{{"p50":{},"p99":{},"max":{},"hist":[{}]}}}}"#
        ),
        monotonic_ns(),
        ops,
        reads,
        writes,
        flushes,
        bytes,
        errors,
        mismatches,
        guest_resets,
        inflight,
        oldest_us,
        p50_us,
        p99_us,
        max_us,
        buckets.join(",")
    )
}

/// A JSON string.
#[must_use]
pub fn quoted(text: &str) -> String {
    let mut quoted = String::from('"');
    for c in text.chars() {
        match c {
            '"' | '\\' => quoted.extend(['\\', c]),
            c if c.is_control() => quoted.push_str(&format!("\\u{:04x}", c as u32)),
            c => quoted.push(c),
        }
    }
    quoted.push('"');
    quoted
}

/// Reads commands from standard input. An end of the input is no command: the load goes on.
pub fn read_commands(console: Arc<Console>) -> mpsc::Receiver<Command> {
    let (commands, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        for line in io::stdin().lock().lines().map_while(Result::ok) {
            match Command::parse(&line) {
                Some(command) => {
                    if commands.send(command).is_err() {
                        return;
                    }
                }
                None if line.trim().is_empty() => {}
                None => console.line(&format!(r#"{{"unknown_command":{}}}"#, quoted(line.trim()))),
            }
        }
    });
    receiver
}

/// Makes a terminal on standard input pass bytes unchanged and echo nothing: echoes would fall into reports.
pub fn set_raw_terminal() {
    let stdin = io::stdin();
    if let Ok(mut settings) = rustix::termios::tcgetattr(&stdin) {
        settings.make_raw();
        // Without it the console still works, only less tidily.
        let _ = rustix::termios::tcsetattr(&stdin, rustix::termios::OptionalActions::Now, &settings);
    }
}

/// Lets the kernel reset the machine at once: nothing is flushed, nothing is waited for. Returns only if it cannot.
pub(crate) fn reset_machine() -> io::Error {
    match std::fs::write("/proc/sysrq-trigger", "b") {
        Ok(()) => io::Error::other("the kernel goes on"),
        Err(error) => error,
    }
}

/// Counts what the kernel says about disks from now on. Does nothing without `/dev/kmsg`.
pub fn watch_kernel_log(stats: Arc<Stats>) {
    let Ok(mut log) = File::open("/dev/kmsg") else { return };
    if log.seek(SeekFrom::End(0)).is_err() {
        return;
    }
    std::thread::spawn(move || {
        let mut record = [0; 8192];
        loop {
            match log.read(&mut record) {
                Ok(0) => return,
                Ok(len) => {
                    if tells_of_trouble(&String::from_utf8_lossy(&record[..len])) {
                        stats.guest_resets.fetch_add(1, Ordering::Relaxed);
                    }
                }
                // EPIPE: records were overwritten before they were read; what follows can be read.
                Err(error) if error.raw_os_error() == Some(rustix::io::Errno::PIPE.raw_os_error()) => {}
                Err(_) => return,
            }
        }
    });
}

/// Whether a line of the kernel's log tells that a disk failed, was reset, or made a task wait for minutes.
fn tells_of_trouble(line: &str) -> bool {
    let line = line.to_ascii_lowercase();
    let disk = ["vd", "virtio", "sd", "scsi", "usb", "ata", "blk"].iter().any(|word| line.contains(word));
    line.contains("i/o error")
        || line.contains("blocked for more than")
        || line.contains("remounting filesystem read-only")
        || line.contains("ext4-fs error")
        || (disk && ["reset", "timeout", "timed out", "abort"].iter().any(|word| line.contains(word)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_read_and_others_refused() {
        assert_eq!(Command::parse(" Verify\r"), Some(Command::Verify));
        assert_eq!(Command::parse("poweroff"), Some(Command::PowerOff));
        assert_eq!(Command::parse("rm"), None);
    }

    #[test]
    fn report_is_one_json_object() {
        let report: serde_json::Value =
            serde_json::from_str(&report(&Snapshot { ops: 7, p99_us: 12, ..Snapshot::default() })).unwrap();
        assert_eq!((report["ops"].as_u64(), report["lat_us"]["p99"].as_u64()), (Some(7), Some(12)));
        let text = "a\"b\\c\n\u{1}é";
        assert_eq!(serde_json::from_str::<String>(&quoted(text)).unwrap(), text);
    }

    #[test]
    fn trouble_of_disks_is_noticed_in_the_kernel_log() {
        assert!(tells_of_trouble("3,400,99,-;I/O error, dev vda, sector 8 op 0x1:(WRITE)"));
        assert!(tells_of_trouble("6,1,2,-;usb 1-1: reset high-speed USB device"));
        assert!(tells_of_trouble("3,1,2,-;INFO: task probe blocked for more than 120 seconds."));
        assert!(!tells_of_trouble("6,1,2,-;virtio_blk virtio0: [vda] 131072 512-byte logical blocks"));
    }
}
