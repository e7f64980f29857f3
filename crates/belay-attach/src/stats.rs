//! What a device's thread counts, and how others see it.

use std::time::{Duration, Instant};

use hdrhistogram::Histogram;

/// Longest latency told apart, in microseconds (100 s).
const HIGHEST_US: u64 = 100_000_000;

/// Upper ends of the latency histogram's buckets, in microseconds; one more bucket holds what took longer.
pub const LATENCY_BOUNDS_US: [u64; 14] =
    [50, 100, 250, 500, 1_000, 2_500, 5_000, 10_000, 25_000, 50_000, 100_000, 250_000, 1_000_000, 10_000_000];

/// How long guest requests took since the thread started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LatencyHistogram {
    /// Requests in each bucket.
    pub counts: [u64; LATENCY_BOUNDS_US.len() + 1],
    /// All of their latencies together, in microseconds.
    pub sum_us: u64,
}

impl LatencyHistogram {
    fn record(&mut self, took_us: u64) {
        let bucket = LATENCY_BOUNDS_US.partition_point(|bound| *bound < took_us);
        self.counts[bucket] += 1;
        self.sum_us = self.sum_us.saturating_add(took_us);
    }
}

/// Latency of guest requests within a stretch of time, in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Latency {
    /// Median.
    pub p50_us: u64,
    /// 99th percentile.
    pub p99_us: u64,
    /// The longest.
    pub max_us: u64,
}

/// The progress of an exchange.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ExchangeProgress {
    /// Bytes of the device.
    pub total_bytes: u64,
    /// Bytes whose current content is here.
    pub local_bytes: u64,
    /// Bytes fetched from the old backing.
    pub copied_bytes: u64,
    /// Bytes of guest writes that went to both sides.
    pub echoed_bytes: u64,
    /// Bytes that were not sent, being holes or zeroes.
    pub skipped_bytes: u64,
}

/// A device as its thread last described it.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    /// In which state its machine is, in words: `local`, `offered`, `parked`, `granting`, `lent`, `coming`, `returning`, `prepared`,
    /// `claiming`, `failed`, `remote`, `revoking`, `gone`, `copying`, `cutting`, `retired`.
    pub state: &'static str,
    /// Its epoch.
    pub epoch: u64,
    /// Whether a VMM is connected.
    pub vmm_connected: bool,
    /// It is, and has not said anything yet.
    pub vmm_silent: bool,
    /// Pieces of the guest's memory that the VMM has told of.
    pub memory_pieces: u64,
    /// Rings that run.
    pub rings_running: u32,
    /// Guest requests in flight here.
    pub in_flight: u64,
    /// Guest requests completed, and those with an error.
    pub requests: u64,
    /// Guest requests that ended with an error status.
    pub errors: u64,
    /// Malformed requests of the guest.
    pub bad_requests: u64,
    /// Bytes read by the guest.
    pub read_bytes: u64,
    /// Bytes written by the guest.
    pub written_bytes: u64,
    /// Latency since the thread started.
    pub latency: Latency,
    /// The same, to be added up over time and devices.
    pub latency_histogram: LatencyHistogram,
    /// When the guest was last given a completion: nanoseconds of the host's monotonic clock; 0: never.
    pub last_completion_ns: u64,
    /// When the first completion after the last start of the rings was given, same clock; 0: none yet.
    pub first_completion_ns: u64,
    /// When the rings last stopped, same clock; 0: never.
    pub rings_stopped_ns: u64,
    /// Whether the data connection to the backing is up.
    pub link_up: bool,
    /// Whether the host that the device is offered to is connected.
    pub successor_ready: bool,
    /// Bytes of payload received from peers.
    pub link_in_bytes: u64,
    /// Bytes of payload sent to peers.
    pub link_out_bytes: u64,
    /// Requests executed for a peer's guest.
    pub served: u64,
    /// Connections and requests of a peer refused because their epoch is over.
    pub fenced: u64,
    /// The running exchange.
    pub exchange: Option<ExchangeProgress>,
    /// The last one that was cut over here.
    pub last_exchange: Option<ExchangeProgress>,
}

/// Counters that only the thread touches.
pub(crate) struct Counters {
    histogram: Histogram<u64>,
    pub(crate) buckets: LatencyHistogram,
    pub(crate) fenced: u64,
    pub(crate) requests: u64,
    pub(crate) errors: u64,
    pub(crate) bad_requests: u64,
    pub(crate) read_bytes: u64,
    pub(crate) written_bytes: u64,
    pub(crate) served: u64,
    pub(crate) link_in_bytes: u64,
    pub(crate) link_out_bytes: u64,
    pub(crate) last_completion_ns: u64,
    pub(crate) first_completion_ns: u64,
    pub(crate) rings_stopped_ns: u64,
}

impl Counters {
    pub(crate) fn new() -> Self {
        let histogram = Histogram::new_with_bounds(1, HIGHEST_US, 2).expect("constant bounds are valid");
        Self {
            histogram,
            buckets: LatencyHistogram::default(),
            fenced: 0,
            requests: 0,
            errors: 0,
            bad_requests: 0,
            read_bytes: 0,
            written_bytes: 0,
            served: 0,
            link_in_bytes: 0,
            link_out_bytes: 0,
            last_completion_ns: 0,
            first_completion_ns: 0,
            rings_stopped_ns: 0,
        }
    }

    pub(crate) fn completed(&mut self, took: Duration, ok: bool) {
        self.requests += 1;
        if !ok {
            self.errors += 1;
        }
        let took_us = u64::try_from(took.as_micros()).unwrap_or(HIGHEST_US);
        self.histogram.saturating_record(took_us.max(1));
        self.buckets.record(took_us);
    }

    pub(crate) fn latency(&self) -> Latency {
        Latency {
            p50_us: self.histogram.value_at_quantile(0.5),
            p99_us: self.histogram.value_at_quantile(0.99),
            max_us: self.histogram.max(),
        }
    }
}

/// The host's monotonic clock, in nanoseconds: the same for every process of the host.
pub(crate) fn monotonic_ns() -> u64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    (time.tv_sec as u64) * 1_000_000_000 + time.tv_nsec as u64
}

/// The time since `earlier`, 0 if it lies in the future.
pub(crate) fn since(now: Instant, earlier: Instant) -> Duration {
    now.saturating_duration_since(earlier)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn latency_is_counted_in_the_bucket_whose_end_it_does_not_exceed() {
        let mut histogram = LatencyHistogram::default();
        for took_us in [0, 50, 51, 10_000_000, 10_000_001] {
            histogram.record(took_us);
        }
        assert_eq!((histogram.counts[0], histogram.counts[1]), (2, 1));
        assert_eq!((histogram.counts[13], histogram.counts[14]), (1, 1));
        assert_eq!(histogram.sum_us, 20_000_102);
    }
}
