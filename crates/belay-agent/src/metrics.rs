//! Prometheus metrics, made from what the devices' threads say.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use crate::view::DeviceView;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Labels {
    device: String,
}

type Reading = fn(&DeviceView) -> u64;

/// The metrics of these devices, as text.
#[must_use]
pub fn render(devices: &[DeviceView]) -> String {
    let mut registry = Registry::with_prefix("belay");
    let counters: [(&str, &str, Reading); 6] = [
        ("requests", "Guest requests completed", |view| view.requests),
        ("request_errors", "Guest requests that ended with an error", |view| view.errors),
        ("read_bytes", "Bytes read by the guest", |view| view.read_bytes),
        ("written_bytes", "Bytes written by the guest", |view| view.written_bytes),
        ("served_requests", "Requests executed for another host's guest", |view| view.served),
        ("exchange_copied_bytes", "Bytes fetched by the exchange", |view| {
            view.exchange.map_or(0, |e| e.copied_bytes)
        }),
    ];
    for (name, help, reading) in counters {
        let family = Family::<Labels, Counter>::default();
        for view in devices {
            family.get_or_create(&Labels { device: view.name.clone() }).inc_by(reading(view));
        }
        registry.register(name, help, family);
    }
    let gauges: [(&str, &str, Reading); 4] = [
        ("in_flight_requests", "Guest requests in flight", |view| view.in_flight),
        ("epoch", "The device's epoch", |view| view.epoch),
        ("link_up", "Whether the connection to the backing is up", |view| u64::from(view.link_up)),
        ("vmm_connected", "Whether a VMM is connected", |view| u64::from(view.vmm_connected)),
    ];
    for (name, help, reading) in gauges {
        let family = Family::<Labels, Gauge>::default();
        for view in devices {
            let value = i64::try_from(reading(view)).unwrap_or(i64::MAX);
            family.get_or_create(&Labels { device: view.name.clone() }).set(value);
        }
        registry.register(name, help, family);
    }
    let mut text = String::new();
    let _ = encode(&mut text, &registry);
    text
}
