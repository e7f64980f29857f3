//! What is measured: names, loads, units and goals.

use std::time::Duration;

/// Order of a load's offsets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Order {
    Random,
    Sequential,
}

/// A load.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Job {
    pub(crate) order: Order,
    pub(crate) write: bool,
    /// Bytes of a request.
    pub(crate) bytes: usize,
    /// Requests in flight, over all queues.
    pub(crate) depth: usize,
    pub(crate) queues: usize,
}

/// What a load is judged by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unit {
    Iops,
    P50Us,
    MbPerS,
}

impl Unit {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Iops => "iops",
            Self::P50Us => "p50_us",
            Self::MbPerS => "MB/s",
        }
    }
}

/// Where the disk is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// The same host, a file in tmpfs.
    Local,
    /// The same host, a file on disk.
    LocalDisk,
    /// Another host over mutual TLS, a file in tmpfs.
    Remote,
}

impl Place {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Local => "local",
            Self::LocalDisk => "local-disk",
            Self::Remote => "remote",
        }
    }
}

/// A load's outcome.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Outcome {
    pub(crate) requests: u64,
    pub(crate) bytes: u64,
    pub(crate) took: Duration,
    pub(crate) p50: Duration,
}

impl Job {
    /// Every load, in the order in which they run. Reads come first: they begin with the disk as it was made.
    pub(crate) fn all() -> Vec<Self> {
        let mut jobs = Vec::new();
        for write in [false, true] {
            for (depth, queues) in [(1, 1), (32, 1), (32, 4)] {
                jobs.push(Self { order: Order::Random, write, bytes: 4 << 10, depth, queues });
            }
            for queues in [1, 4] {
                jobs.push(Self { order: Order::Sequential, write, bytes: 128 << 10, depth: 16, queues });
            }
        }
        jobs
    }

    /// `randread/4k/qd32/q1`.
    pub(crate) fn name(&self) -> String {
        let order = if self.order == Order::Random { "rand" } else { "" };
        let what = if self.write { "write" } else { "read" };
        format!("{order}{what}/{}k/qd{}/q{}", self.bytes >> 10, self.depth, self.queues)
    }

    pub(crate) fn unit(&self) -> Unit {
        match (self.order, self.depth) {
            (Order::Sequential, _) => Unit::MbPerS,
            (Order::Random, 1) => Unit::P50Us,
            (Order::Random, _) => Unit::Iops,
        }
    }

    /// The ratio of Belay to its peer that is wanted: at least, or for a latency at most.
    pub(crate) fn goal(&self, place: Place) -> Option<f64> {
        match (place, self.unit()) {
            (Place::Remote, Unit::Iops) => Some(2.0),
            (Place::Remote, Unit::MbPerS) => Some(1.5),
            (Place::Remote, Unit::P50Us) => None,
            (_, Unit::Iops | Unit::P50Us) => Some(1.0),
            (_, Unit::MbPerS) => None,
        }
    }

    /// Whether a ratio reaches a goal.
    pub(crate) fn reaches(&self, ratio: f64, goal: f64) -> bool {
        if self.unit() == Unit::P50Us { ratio <= goal } else { ratio >= goal }
    }

    /// The figure that an outcome gives, in the load's unit.
    pub(crate) fn figure(&self, outcome: &Outcome) -> f64 {
        let seconds = outcome.took.as_secs_f64();
        match self.unit() {
            Unit::Iops => outcome.requests as f64 / seconds,
            Unit::MbPerS => outcome.bytes as f64 / seconds / 1e6,
            Unit::P50Us => outcome.p50.as_secs_f64() * 1e6,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_as_documented() {
        let mut names: Vec<String> = Job::all().iter().map(Job::name).collect();
        assert!(names.contains(&"randread/4k/qd32/q1".to_owned()));
        assert!(names.contains(&"read/128k/qd16/q4".to_owned()));
        let count = names.len();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), count);
    }

    #[test]
    fn latency_must_be_below_its_goal_and_rates_above() {
        let jobs = Job::all();
        let latency = jobs.iter().find(|job| job.unit() == Unit::P50Us).unwrap();
        assert!(latency.reaches(0.9, 1.0) && !latency.reaches(1.1, 1.0));
        let rate = jobs.iter().find(|job| job.unit() == Unit::Iops).unwrap();
        assert!(rate.reaches(1.1, 1.0) && !rate.reaches(0.9, 1.0));
    }
}
