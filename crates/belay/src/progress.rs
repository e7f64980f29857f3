//! Progress bars. They are drawn on standard error, and only if that is a terminal; otherwise the phases are told as
//! lines.

use std::collections::BTreeMap;
use std::io::IsTerminal;

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use crate::model::{Exchange, Operation};
use crate::output::plain;

const BAR: &str = "{prefix:<16} [{bar:30}] {percent:>3} %  {binary_bytes}/{binary_total_bytes}  \
                   {binary_bytes_per_sec}  {eta} left  {msg}";

/// The bars of what is followed.
#[derive(Debug)]
pub(crate) struct Progress {
    bars: MultiProgress,
    by_name: BTreeMap<String, ProgressBar>,
    phase: Option<String>,
    terminal: bool,
    quiet: bool,
}

impl Progress {
    /// `quiet`: show nothing at all.
    pub(crate) fn new(quiet: bool) -> Self {
        Self {
            bars: MultiProgress::new(),
            by_name: BTreeMap::new(),
            phase: None,
            terminal: std::io::stderr().is_terminal(),
            quiet,
        }
    }

    /// Shows how far a device's exchange is.
    pub(crate) fn exchange(&mut self, device: &str, exchange: &Exchange) {
        let message = if exchange.echoed_bytes > 0 {
            format!("{} echoed", crate::units::size(exchange.echoed_bytes))
        } else {
            String::new()
        };
        self.set(device, exchange.local_bytes, exchange.total_bytes, message);
    }

    /// Shows how far an operation is: its phase, memory and devices.
    pub(crate) fn operation(&mut self, operation: &Operation) {
        if operation.phase != self.phase {
            self.phase.clone_from(&operation.phase);
            if let Some(phase) = &self.phase {
                self.say(&plain(phase));
            }
        }
        if let Some(ram) = &operation.ram {
            // What is dirtied again is sent again, so what counts is what is left.
            let sent = ram.total.saturating_sub(ram.remaining);
            let message = format!("{} sent", crate::units::size(ram.transferred));
            self.set("memory", sent, ram.total, message);
        }
        for device in &operation.devices {
            if let Some(exchange) = &device.exchange {
                self.exchange(&device.name, exchange);
            }
        }
    }

    /// Tells something between the bars.
    pub(crate) fn say(&self, line: &str) {
        if self.quiet {
            return;
        }
        // If standard error is gone there is nobody to tell.
        let _ = self.bars.println(line);
        if !self.terminal {
            eprintln!("{line}");
        }
    }

    /// Leaves the bars as they are and goes on below them.
    pub(crate) fn finish(&self) {
        for bar in self.by_name.values() {
            bar.abandon();
        }
    }

    fn set(&mut self, name: &str, position: u64, length: u64, message: String) {
        if self.quiet {
            return;
        }
        let bars = &self.bars;
        let bar = self.by_name.entry(name.to_owned()).or_insert_with(|| {
            let bar = bars.add(ProgressBar::new(length));
            if let Ok(style) = ProgressStyle::with_template(BAR) {
                bar.set_style(style.progress_chars("=> "));
            }
            // What was there before this command looked is not its rate.
            bar.with_prefix(plain(name)).with_position(position)
        });
        bar.set_length(length);
        bar.set_position(position);
        bar.set_message(message);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_template_of_the_bars_is_valid() {
        ProgressStyle::with_template(BAR).unwrap();
    }

    #[test]
    fn each_device_and_the_memory_have_a_bar_that_moves() {
        let operation = |local: u64, remaining: u64| {
            serde_json::from_value::<Operation>(serde_json::json!({
                "id": "1", "state": "running", "phase": "copy",
                "ram": {"total": 100, "transferred": 70, "remaining": remaining},
                "devices": [{"name": "data", "state": "remote",
                    "exchange": {"total_bytes": 1000, "local_bytes": local}}],
            }))
            .unwrap()
        };
        let mut progress = Progress::new(false);
        progress.operation(&operation(100, 60));
        progress.operation(&operation(400, 10));
        assert_eq!(progress.by_name.len(), 2);
        assert_eq!(progress.by_name["data"].position(), 400);
        assert_eq!(progress.by_name["data"].length(), Some(1000));
        assert_eq!(progress.by_name["memory"].position(), 90);
    }
}
