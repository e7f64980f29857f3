//! The guest's console: what its probe reports, stamped with the host's clock.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use serde_json::Value;

/// One line of the probe.
#[derive(Clone, Debug)]
pub(crate) struct Line {
    pub(crate) at: Instant,
    pub(crate) value: Value,
}

/// All that the guest has said, on whichever host.
#[derive(Clone, Default)]
pub(crate) struct Console {
    lines: Arc<Mutex<Vec<Line>>>,
    writer: Arc<Mutex<Option<UnixStream>>>,
}

impl Console {
    /// Listens to the console at this socket as well; commands go there from now on.
    pub(crate) fn attach(&self, socket: &Path, within: Duration) -> Result<()> {
        let deadline = Instant::now() + within;
        let stream = loop {
            match UnixStream::connect(socket) {
                Ok(stream) => break stream,
                Err(error) if Instant::now() > deadline => {
                    bail!("no console at {}: {error}", socket.display())
                }
                Err(_) => std::thread::yield_now(),
            }
        };
        *self.writer.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(stream.try_clone()?);
        let lines = Arc::clone(&self.lines);
        std::thread::spawn(move || {
            for line in BufReader::new(stream).lines().map_while(Result::ok) {
                // The kernel's own lines are not ours, nor is one cut at the switchover.
                if let Some(value) = line.find('{').and_then(|at| serde_json::from_str(&line[at..]).ok()) {
                    let line = Line { at: Instant::now(), value };
                    lines.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push(line);
                }
            }
        });
        Ok(())
    }

    /// Tells the probe.
    pub(crate) fn send(&self, command: &str) -> Result<()> {
        let mut writer = self.writer.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let Some(writer) = writer.as_mut() else { bail!("the guest has no console") };
        Ok(writer.write_all(format!("{command}\n").as_bytes())?)
    }

    /// How many lines there are.
    pub(crate) fn len(&self) -> usize {
        self.lines.lock().unwrap_or_else(std::sync::PoisonError::into_inner).len()
    }

    /// Lines from `from` on.
    pub(crate) fn since(&self, from: usize) -> Vec<Line> {
        self.lines.lock().unwrap_or_else(std::sync::PoisonError::into_inner)[from..].to_vec()
    }

    /// Waits for a line after `from` of which `wanted` is true.
    pub(crate) fn wait(
        &self,
        from: usize,
        within: Duration,
        what: &str,
        wanted: impl Fn(&Value) -> bool,
    ) -> Result<Line> {
        let deadline = Instant::now() + within;
        let mut at = from;
        loop {
            for line in self.since(at) {
                at += 1;
                if wanted(&line.value) {
                    return Ok(line);
                }
            }
            if Instant::now() > deadline {
                let last = self.since(from.min(self.len())).pop().map(|line| line.value);
                bail!("the guest did not say {what} in {} s; its last line: {last:?}", within.as_secs());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}
