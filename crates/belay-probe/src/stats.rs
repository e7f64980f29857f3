//! Counters and latencies, updated by all workers without locks.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

/// Sub-buckets per power of two: latencies are told within 12.5 %.
const SUB_BUCKETS: u64 = 8;
/// Up to 2^40 µs.
const BUCKETS: usize = 41 * SUB_BUCKETS as usize;

/// Nanoseconds of CLOCK_MONOTONIC.
#[must_use]
pub fn monotonic_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

/// What an operation was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OpKind {
    /// A read that is checked.
    Read,
    /// A write of a new version.
    Write,
    /// A flush.
    Flush,
}

impl OpKind {
    /// Its name in reports.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Flush => "flush",
        }
    }
}

/// Everything that is counted.
#[derive(Debug)]
pub struct Stats {
    reads: AtomicU64,
    writes: AtomicU64,
    flushes: AtomicU64,
    bytes: AtomicU64,
    /// Operations that failed.
    pub errors: AtomicU64,
    /// Blocks that were read and were wrong.
    pub mismatches: AtomicU64,
    /// Lines in the kernel's log that tell of a disk's reset or error.
    pub guest_resets: AtomicU64,
    latencies: Vec<AtomicU32>,
    longest_us: AtomicU64,
    /// Per worker: when its operation in flight began, or 0.
    begun_ns: Vec<AtomicU64>,
}

/// The counters at one moment, and the latencies since the last one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// Reads, writes and flushes that succeeded.
    pub ops: u64,
    /// Reads that succeeded.
    pub reads: u64,
    /// Writes that succeeded.
    pub writes: u64,
    /// Flushes that succeeded.
    pub flushes: u64,
    /// Bytes read and written.
    pub bytes: u64,
    /// Operations that failed.
    pub errors: u64,
    /// Blocks that were wrong.
    pub mismatches: u64,
    /// Disk resets and errors in the kernel's log.
    pub guest_resets: u64,
    /// Operations in flight.
    pub inflight: u64,
    /// Age of the oldest of them, µs.
    pub oldest_us: u64,
    /// Median latency since the last snapshot, µs; 0 if nothing completed.
    pub p50_us: u64,
    /// 99th percentile, µs.
    pub p99_us: u64,
    /// Longest, µs.
    pub max_us: u64,
    /// How many operations took how long since the last snapshot: pairs of a bucket's largest latency in µs and its
    /// count, ascending, without empty buckets. What reads them can add up intervals without loss.
    pub histogram: Vec<(u64, u64)>,
}

impl Stats {
    /// Zeros, for so many workers.
    #[must_use]
    pub fn new(workers: usize) -> Self {
        let zero = || AtomicU64::new(0);
        Self {
            reads: zero(),
            writes: zero(),
            flushes: zero(),
            bytes: zero(),
            errors: zero(),
            mismatches: zero(),
            guest_resets: zero(),
            latencies: (0..BUCKETS).map(|_| AtomicU32::new(0)).collect(),
            longest_us: zero(),
            begun_ns: (0..workers).map(|_| zero()).collect(),
        }
    }

    /// A worker begins an operation.
    pub fn begin(&self, worker: usize) {
        self.begun_ns[worker].store(monotonic_ns(), Ordering::Relaxed);
    }

    /// It succeeded.
    pub fn succeeded(&self, worker: usize, kind: OpKind, bytes: usize) {
        let latency = self.end(worker);
        let counter = match kind {
            OpKind::Read => &self.reads,
            OpKind::Write => &self.writes,
            OpKind::Flush => &self.flushes,
        };
        counter.fetch_add(1, Ordering::Relaxed);
        self.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        let us = latency.as_micros() as u64;
        self.latencies[bucket_of(us)].fetch_add(1, Ordering::Relaxed);
        self.longest_us.fetch_max(us, Ordering::Relaxed);
    }

    /// It failed.
    pub fn failed(&self, worker: usize) {
        self.end(worker);
        self.errors.fetch_add(1, Ordering::Relaxed);
    }

    fn end(&self, worker: usize) -> Duration {
        let begun = self.begun_ns[worker].swap(0, Ordering::Relaxed);
        Duration::from_nanos(monotonic_ns().saturating_sub(begun))
    }

    /// The counters now. Latencies start anew: only one caller may ask for them.
    pub fn snapshot(&self) -> Snapshot {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let counts: Vec<u64> =
            self.latencies.iter().map(|count| u64::from(count.swap(0, Ordering::Relaxed))).collect();
        let max_us = self.longest_us.swap(0, Ordering::Relaxed);
        let now = monotonic_ns();
        let begun = self.begun_ns.iter().map(get).filter(|begun| *begun != 0);
        let (inflight, oldest_ns) =
            begun.fold((0, 0), |(count, oldest), begun| (count + 1, now.saturating_sub(begun).max(oldest)));
        let (reads, writes, flushes) = (get(&self.reads), get(&self.writes), get(&self.flushes));
        Snapshot {
            ops: reads + writes + flushes,
            reads,
            writes,
            flushes,
            bytes: get(&self.bytes),
            errors: get(&self.errors),
            mismatches: get(&self.mismatches),
            guest_resets: get(&self.guest_resets),
            inflight,
            oldest_us: oldest_ns / 1000,
            p50_us: quantile(&counts, 50).min(max_us),
            p99_us: quantile(&counts, 99).min(max_us),
            max_us,
            histogram: counts
                .iter()
                .enumerate()
                .filter(|(_, count)| **count > 0)
                .map(|(bucket, count)| (upper_end(bucket).min(max_us), *count))
                .collect(),
        }
    }
}

fn bucket_of(us: u64) -> usize {
    let us = us.min((1 << 40) - 1);
    if us < SUB_BUCKETS {
        return us as usize;
    }
    let power = us.ilog2() as u64;
    let sub = (us >> (power - 3)) & (SUB_BUCKETS - 1);
    ((power - 2) * SUB_BUCKETS + sub) as usize
}

/// The largest latency that falls into a bucket.
fn upper_end(bucket: usize) -> u64 {
    let bucket = bucket as u64;
    if bucket < SUB_BUCKETS {
        return bucket;
    }
    let (power, sub) = (bucket / SUB_BUCKETS + 2, bucket % SUB_BUCKETS);
    (1 << power) + ((sub + 1) << (power - 3)) - 1
}

fn quantile(counts: &[u64], percent: u64) -> u64 {
    let total: u64 = counts.iter().sum();
    let wanted = (total * percent).div_ceil(100);
    let mut seen = 0;
    for (bucket, count) in counts.iter().enumerate() {
        seen += count;
        if seen >= wanted && wanted > 0 {
            return upper_end(bucket);
        }
    }
    0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_latency_lies_in_its_bucket() {
        for us in (0..5000).chain([65_535, 65_536, 1 << 30, (1 << 40) - 1]) {
            let bucket = bucket_of(us);
            assert!(bucket < BUCKETS && us <= upper_end(bucket), "{us}");
            assert!(bucket == 0 || us > upper_end(bucket - 1), "{us}");
        }
        assert_eq!(bucket_of(u64::MAX), bucket_of((1 << 40) - 1));
    }

    #[test]
    fn snapshot_counts_and_starts_latencies_anew() {
        let stats = Stats::new(2);
        stats.begin(0);
        stats.begin(1);
        assert_eq!(stats.snapshot().inflight, 2);
        stats.succeeded(0, OpKind::Read, 4096);
        stats.failed(1);
        let snapshot = stats.snapshot();
        assert_eq!((snapshot.ops, snapshot.bytes, snapshot.errors, snapshot.inflight), (1, 4096, 1, 0));
        assert_eq!(snapshot.histogram.iter().map(|(_, count)| count).sum::<u64>(), 1);
        assert_eq!((stats.snapshot().ops, stats.snapshot().max_us), (1, 0));
        assert!(stats.snapshot().histogram.is_empty());
    }

    #[test]
    fn quantiles_are_where_the_counts_are() {
        let mut counts = vec![0; BUCKETS];
        counts[bucket_of(100)] = 98;
        counts[bucket_of(9000)] = 2;
        assert!((100..113).contains(&quantile(&counts, 50)));
        assert!((9000..10_200).contains(&quantile(&counts, 99)));
        assert_eq!(quantile(&vec![0; BUCKETS], 50), 0);
    }
}
