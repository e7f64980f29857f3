//! Prometheus metrics, made from what the devices' threads say. Base units: seconds, bytes.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};

use belay_attach::{ExchangeProgress, LATENCY_BOUNDS_US, Snapshot};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{DescriptorEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::{Registry, Unit};

use crate::agent::Agent;
use crate::device::Managed;
use crate::ledger::RoleRecord;

/// What the agent counts itself, since it started.
#[derive(Debug, Default)]
pub struct Counts {
    /// Devices that came here with their VM.
    pub handovers_in: AtomicU64,
    /// Devices that left with their VM.
    pub handovers_out: AtomicU64,
    /// Exchanges that were cut over here.
    pub exchanges: AtomicU64,
}

impl Counts {
    pub(crate) fn add(count: &AtomicU64) {
        count.fetch_add(1, Ordering::Relaxed);
    }
}

/// All that is measured at one moment.
#[derive(Debug)]
struct Moment {
    version: &'static str,
    devices: Vec<Seen>,
    vms: u64,
    /// Direction and number.
    handovers: [(&'static str, u64); 2],
    exchanges: u64,
    /// State and number.
    migrations: Vec<(String, u64)>,
}

/// The metrics, as text.
#[must_use]
pub fn render(agent: &Agent) -> String {
    let mut migrations: Vec<(String, u64)> =
        ["running", "done", "failed", "cancelled"].map(|state| (state.to_owned(), 0)).into();
    for operation in agent.operations.all() {
        let view = operation.view();
        let known = migrations.iter_mut().find(|(state, _)| view.kind == "migrate" && *state == view.state);
        if let Some((_, count)) = known {
            *count += 1;
        }
    }
    let load = |count: &AtomicU64| count.load(Ordering::Relaxed);
    text(Moment {
        version: env!("CARGO_PKG_VERSION"),
        devices: agent.devices().iter().map(|device| Seen::of(device)).collect(),
        vms: agent.vms.all().len() as u64,
        handovers: [("in", load(&agent.counts.handovers_in)), ("out", load(&agent.counts.handovers_out))],
        exchanges: load(&agent.counts.exchanges),
        migrations,
    })
}

fn text(moment: Moment) -> String {
    let mut registry = Registry::with_prefix("belay");
    registry.register_collector(Box::new(moment));
    let mut text = String::new();
    // Writing to a string does not fail.
    let _ = encode(&mut text, &registry);
    text
}

type Reading = fn(&Snapshot) -> u64;

/// Name, help and reading of what only grows while the device is here.
const COUNTERS: [(&str, &str, Option<Unit>, Reading); 9] = [
    ("requests", "Guest requests completed", None, |s| s.requests),
    ("request_errors", "Guest requests that ended with an error", None, |s| s.errors),
    ("bad_requests", "Malformed requests of the guest", None, |s| s.bad_requests),
    ("read", "Data read by the guest", Some(Unit::Bytes), |s| s.read_bytes),
    ("written", "Data written by the guest", Some(Unit::Bytes), |s| s.written_bytes),
    ("served_requests", "Requests executed for another host's guest", None, |s| s.served),
    ("fenced_requests", "Requests and connections of an epoch that is over, refused", None, |s| s.fenced),
    ("link_received", "Data received from other hosts", Some(Unit::Bytes), |s| s.link_in_bytes),
    ("link_sent", "Data sent to other hosts", Some(Unit::Bytes), |s| s.link_out_bytes),
];

const GAUGES: [(&str, &str, Reading); 4] = [
    ("requests_in_flight", "Guest requests in flight", |s| s.in_flight),
    ("epoch", "How often the device's attachment has moved", |s| s.epoch),
    ("vmm_connected", "Whether a VMM is connected", |s| s.vmm_connected as u64),
    ("rings_running", "Rings of the guest that run", |s| s.rings_running as u64),
];

/// A device, as it is at this moment.
#[derive(Debug)]
struct Seen {
    device: String,
    snapshot: Snapshot,
    /// Its backing is at another host.
    remote: bool,
    /// It cannot be served.
    failed: bool,
    /// Its copy to this host cannot begin, or has stopped before its end.
    waiting: bool,
}

impl Seen {
    fn of(device: &Managed) -> Self {
        use RoleRecord::{Cutting, Exchanging, Prepared, Remote};
        let remote =
            matches!(device.role(), Remote { .. } | Exchanging { .. } | Cutting { .. } | Prepared { .. });
        let failed = device.trouble().is_some();
        let waiting = device.exchange_waits().is_some() || device.copy_stopped().is_some();
        Self { device: device.name(), snapshot: device.snapshot(), remote, failed, waiting }
    }
}

type Progress = fn(&ExchangeProgress) -> u64;

/// Of exchanges that run: a device that is not copied has none of these.
const EXCHANGE: [(&str, &str, Progress); 5] = [
    ("exchange_size", "Size of a device that is copied here", |e| e.total_bytes),
    ("exchange_local", "Data of it that is here", |e| e.local_bytes),
    ("exchange_copied", "Data of it that was fetched", |e| e.copied_bytes),
    ("exchange_echoed", "Guest writes that went to both hosts", |e| e.echoed_bytes),
    ("exchange_skipped", "Holes and zeroes that were not sent", |e| e.skipped_bytes),
];

impl Collector for Moment {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let info = "Version of this agent";
        encoder
            .encode_descriptor("agent", info, None, MetricType::Info)?
            .encode_info(&[("version", self.version)])?;
        let mut vms = encoder.encode_descriptor("vms", "VMs of this host", None, MetricType::Gauge)?;
        vms.encode_gauge(&signed(self.vms))?;
        let text = "Exchanges that were cut over here";
        let mut exchanges = encoder.encode_descriptor("exchanges", text, None, MetricType::Counter)?;
        exchanges.encode_counter::<NoLabelSet, u64, f64>(&self.exchanges, None)?;
        let text = "Devices that came (in) or left (out) with their VM";
        let mut handovers = encoder.encode_descriptor("handovers", text, None, MetricType::Counter)?;
        for (direction, count) in &self.handovers {
            let labels = [("direction", *direction)];
            handovers.encode_family(&labels)?.encode_counter::<NoLabelSet, u64, f64>(count, None)?;
        }
        let text = "Migrations since the agent started";
        let mut migrations = encoder.encode_descriptor("migrations", text, None, MetricType::Gauge)?;
        for (state, count) in &self.migrations {
            migrations.encode_family(&[("state", state.as_str())])?.encode_gauge(&signed(*count))?;
        }
        self.encode_devices(encoder)
    }
}

impl Moment {
    fn encode_devices(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        for (name, help, unit, reading) in &COUNTERS {
            let mut metric = encoder.encode_descriptor(name, help, unit.as_ref(), MetricType::Counter)?;
            for Seen { device, snapshot, .. } in &self.devices {
                let labels = [("device", device.as_str())];
                metric
                    .encode_family(&labels)?
                    .encode_counter::<NoLabelSet, u64, f64>(&reading(snapshot), None)?;
            }
        }
        for (name, help, reading) in GAUGES {
            let mut metric = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
            for Seen { device, snapshot, .. } in &self.devices {
                let labels = [("device", device.as_str())];
                metric.encode_family(&labels)?.encode_gauge(&signed(reading(snapshot)))?;
            }
        }
        let help = "Whether the device cannot be served";
        let mut failed = encoder.encode_descriptor("failed", help, None, MetricType::Gauge)?;
        for seen in &self.devices {
            failed
                .encode_family(&[("device", seen.device.as_str())])?
                .encode_gauge(&i64::from(seen.failed))?;
        }
        let help =
            "Whether the connection to the backing's host is up, of devices that are backed by another host";
        let mut link = encoder.encode_descriptor("link_up", help, None, MetricType::Gauge)?;
        for seen in self.devices.iter().filter(|seen| seen.remote) {
            let up = i64::from(seen.snapshot.link_up);
            link.encode_family(&[("device", seen.device.as_str())])?.encode_gauge(&up)?;
        }
        let help = "Whether the copy of the device to this host waits, or has stopped before its end";
        let mut waiting = encoder.encode_descriptor("exchange_waiting", help, None, MetricType::Gauge)?;
        for seen in self.devices.iter().filter(|seen| seen.remote) {
            waiting
                .encode_family(&[("device", seen.device.as_str())])?
                .encode_gauge(&i64::from(seen.waiting))?;
        }
        for (name, help, reading) in EXCHANGE {
            let mut metric = encoder.encode_descriptor(name, help, Some(&Unit::Bytes), MetricType::Gauge)?;
            for Seen { device, snapshot, .. } in &self.devices {
                let Some(exchange) = &snapshot.exchange else { continue };
                let labels = [("device", device.as_str())];
                metric.encode_family(&labels)?.encode_gauge(&signed(reading(exchange)))?;
            }
        }
        self.encode_latency(encoder)
    }

    fn encode_latency(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let help = "How long guest requests took";
        let kind = MetricType::Histogram;
        let mut metric = encoder.encode_descriptor("request_duration", help, Some(&Unit::Seconds), kind)?;
        for Seen { device, snapshot, .. } in &self.devices {
            let histogram = &snapshot.latency_histogram;
            let bounds = LATENCY_BOUNDS_US.iter().map(|us| *us as f64 / 1e6).chain([f64::INFINITY]);
            let buckets: Vec<(f64, u64)> = bounds.zip(histogram.counts).collect();
            let (sum, count) = (histogram.sum_us as f64 / 1e6, histogram.counts.iter().sum());
            let labels = [("device", device.as_str())];
            metric.encode_family(&labels)?.encode_histogram::<NoLabelSet>(sum, count, &buckets, None)?;
        }
        Ok(())
    }
}

fn signed(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use belay_attach::LatencyHistogram;

    use super::*;

    fn moment() -> Moment {
        let mut latency_histogram = LatencyHistogram::default();
        latency_histogram.counts[0] = 3;
        latency_histogram.counts[LATENCY_BOUNDS_US.len()] = 1;
        latency_histogram.sum_us = 11_000_000;
        let exchange = ExchangeProgress { total_bytes: 100, local_bytes: 40, ..ExchangeProgress::default() };
        let busy = Snapshot {
            requests: 4,
            read_bytes: 4096,
            fenced: 2,
            link_up: true,
            latency_histogram,
            exchange: Some(exchange),
            ..Snapshot::default()
        };
        Moment {
            version: "1.2.3",
            devices: vec![
                Seen { device: "a\"b".into(), snapshot: busy, remote: true, failed: false, waiting: true },
                Seen {
                    device: "idle".into(),
                    snapshot: Snapshot::default(),
                    remote: false,
                    failed: true,
                    waiting: false,
                },
            ],
            vms: 1,
            handovers: [("in", 5), ("out", 6)],
            exchanges: 7,
            migrations: vec![("done".into(), 8)],
        }
    }

    /// The samples of a text, as a scraper reads them: name and labels, value. Panics at what is none.
    fn samples(text: &str) -> BTreeMap<String, f64> {
        let mut families = BTreeSet::new();
        let mut samples = BTreeMap::new();
        assert!(text.ends_with("# EOF\n"));
        for line in text.lines() {
            if let Some(comment) = line.strip_prefix("# ") {
                let words: Vec<&str> = comment.splitn(3, ' ').collect();
                assert!(words == ["EOF"] || ["HELP", "TYPE", "UNIT"].contains(&words[0]), "{line}");
                families.extend((words[0] == "TYPE").then(|| words[1].to_owned()));
                continue;
            }
            let (name, value) = line.rsplit_once(' ').unwrap();
            let family = name.split('{').next().unwrap();
            assert!(family.starts_with("belay_"), "{line}");
            assert!(families.iter().any(|known| family.starts_with(known.as_str())), "{line} has no type");
            assert!(name.matches('{').count() == name.matches('}').count(), "{line}");
            let value = value.parse().unwrap_or_else(|_| panic!("{line}"));
            assert!(samples.insert(name.to_owned(), value).is_none(), "{line} is there twice");
        }
        samples
    }

    #[test]
    fn text_is_what_scrapers_read_and_has_base_units() {
        let samples = samples(&text(moment()));
        for (name, value) in [
            ("belay_agent_info{version=\"1.2.3\"}", 1.0),
            ("belay_vms", 1.0),
            ("belay_exchanges_total", 7.0),
            ("belay_handovers_total{direction=\"out\"}", 6.0),
            ("belay_migrations{state=\"done\"}", 8.0),
            ("belay_requests_total{device=\"a\\\"b\"}", 4.0),
            ("belay_read_bytes_total{device=\"a\\\"b\"}", 4096.0),
            ("belay_fenced_requests_total{device=\"a\\\"b\"}", 2.0),
            ("belay_link_up{device=\"a\\\"b\"}", 1.0),
            ("belay_exchange_waiting{device=\"a\\\"b\"}", 1.0),
            ("belay_failed{device=\"a\\\"b\"}", 0.0),
            ("belay_failed{device=\"idle\"}", 1.0),
            ("belay_exchange_local_bytes{device=\"a\\\"b\"}", 40.0),
            ("belay_request_duration_seconds_sum{device=\"a\\\"b\"}", 11.0),
            ("belay_request_duration_seconds_count{device=\"a\\\"b\"}", 4.0),
        ] {
            assert_eq!(samples.get(name), Some(&value), "{name} in {samples:#?}");
        }
        assert!(!samples.contains_key("belay_exchange_local_bytes{device=\"idle\"}"));
        // It has no link that could be down.
        assert!(!samples.contains_key("belay_link_up{device=\"idle\"}"));
    }

    #[test]
    fn buckets_of_the_latency_are_cumulative() {
        let samples = samples(&text(moment()));
        let bucket = |le: &str| {
            samples[&format!("belay_request_duration_seconds_bucket{{le=\"{le}\",device=\"a\\\"b\"}}")]
        };
        assert_eq!((bucket("0.00005"), bucket("10.0"), bucket("+Inf")), (3.0, 3.0, 4.0));
    }
}
