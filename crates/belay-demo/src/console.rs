//! The guest's console: what its probe reports, stamped with the host's clock.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use serde_json::Value;

use crate::limit::go_on;

/// One line of the probe.
#[derive(Clone, Debug)]
pub(crate) struct Line {
    pub(crate) at: Instant,
    pub(crate) value: Value,
}

/// All that the guest has said, on whichever host.
#[derive(Clone, Default)]
pub(crate) struct Console {
    heard: Arc<Mutex<Heard>>,
    writer: Arc<Mutex<Option<UnixStream>>>,
}

/// A line that the switchover cut in two: its beginning was printed at the old host, its end at the new one.
#[derive(Default)]
struct Heard {
    lines: Vec<Line>,
    beginning: Option<String>,
    end: Option<(Instant, String)>,
}

impl Heard {
    /// A piece of text; false if it is no line of the probe (the kernel's own are not ours).
    fn take(&mut self, at: Instant, text: &str) -> bool {
        let value = text.find('{').and_then(|from| serde_json::from_str(&text[from..]).ok());
        let Some(value) = value else { return false };
        let behind = self.lines.partition_point(|line| line.at <= at);
        self.lines.insert(behind, Line { at, value });
        true
    }

    /// Joins the two pieces of a line, once both are there.
    fn join(&mut self) {
        if let (Some(beginning), Some((at, end))) = (&self.beginning, &self.end) {
            let (at, whole) = (*at, format!("{beginning}{end}"));
            self.beginning = None;
            self.end = None;
            self.take(at, &whole);
        }
    }
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
                Err(_) => go_on("the guest's console")?,
            }
            std::thread::yield_now();
        };
        *self.writer.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(stream.try_clone()?);
        let heard = Arc::clone(&self.heard);
        std::thread::spawn(move || listen(BufReader::new(stream), &heard));
        Ok(())
    }

    /// Tells the probe.
    pub(crate) fn send(&self, command: &str) -> Result<()> {
        let mut writer = self.writer.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let Some(writer) = writer.as_mut() else { bail!("the guest has no console") };
        Ok(writer.write_all(format!("{command}\n").as_bytes())?)
    }

    fn heard(&self) -> std::sync::MutexGuard<'_, Heard> {
        self.heard.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// How many lines there are.
    pub(crate) fn len(&self) -> usize {
        self.heard().lines.len()
    }

    /// Lines from `from` on.
    pub(crate) fn since(&self, from: usize) -> Vec<Line> {
        self.heard().lines[from..].to_vec()
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
            go_on(&format!("the guest saying {what}"))?;
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

/// Takes what a host's console says, until it ends.
fn listen(mut stream: impl BufRead, heard: &Mutex<Heard>) {
    let mut first = true;
    loop {
        let mut text = String::new();
        let ended = !matches!(stream.read_line(&mut text), Ok(count) if count > 0);
        let at = Instant::now();
        let mut heard = heard.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if ended {
            return;
        }
        let whole = text.ends_with('\n');
        if !heard.take(at, text.trim_end()) {
            if !whole {
                heard.beginning = Some(text);
            } else if first {
                heard.end = Some((at, text.trim_end().to_owned()));
            }
            heard.join();
        }
        first = false;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(heard: &Mutex<Heard>) -> Vec<Value> {
        heard.lock().unwrap().lines.iter().map(|line| line.value.clone()).collect()
    }

    #[test]
    fn line_cut_by_the_switchover_is_whole_again() {
        for old_host_first in [true, false] {
            let heard = Mutex::<Heard>::default();
            let old = || listen(&b"{\"n\":1}\nnoise\n{\"n\""[..], &heard);
            let new = || listen(&b":2}\n{\"n\":3}\n"[..], &heard);
            if old_host_first {
                old();
                new();
            } else {
                new();
                old();
            }
            let mut all: Vec<u64> = values(&heard).iter().filter_map(|value| value["n"].as_u64()).collect();
            all.sort_unstable();
            assert_eq!(all, [1, 2, 3]);
        }
    }

    #[test]
    fn noise_is_passed_over() {
        let heard = Mutex::<Heard>::default();
        listen(&b"SeaBIOS\n[ 0.1] kernel\n{\"n\":1}\n"[..], &heard);
        assert_eq!(values(&heard).len(), 1);
    }
}
