//! What the guest measured, summed up over a stretch of time.

use serde_json::{Value, json};

use crate::console::Line;

/// The guest's I/O between the first and the last of these lines.
///
/// `p50_us` is the operation-weighted median of the intervals' medians, `p99_us` that of their 99th percentiles at the
/// 99th percentile: intervals are what the guest reports. `longest_ms` is exact.
pub(crate) fn guest_io(lines: &[Line]) -> Value {
    let reports: Vec<&Value> =
        lines.iter().map(|line| &line.value).filter(|value| value["ops"].is_u64()).collect();
    let number = |value: &Value, key: &str| value[key].as_u64().unwrap_or(0);
    let (Some(first), Some(last)) = (reports.first(), reports.last()) else {
        return json!({ "operations": 0, "errors": 0, "mismatches": 0, "p50_us": null, "p99_us": null, "longest_ms": null });
    };
    let mut medians = Vec::new();
    let mut tails = Vec::new();
    let mut longest_us = 0;
    for pair in reports.windows(2) {
        let operations = number(pair[1], "ops") - number(pair[0], "ops").min(number(pair[1], "ops"));
        let latency = &pair[1]["lat_us"];
        if operations > 0 {
            medians.push((number(latency, "p50"), operations));
            tails.push((number(latency, "p99"), operations));
        }
        longest_us = longest_us.max(number(latency, "max")).max(number(pair[1], "oldest_us"));
    }
    json!({
        "operations": number(last, "ops") - number(first, "ops").min(number(last, "ops")),
        "errors": number(last, "errors") - number(first, "errors").min(number(last, "errors")),
        "mismatches": number(last, "mismatches") - number(first, "mismatches").min(number(last, "mismatches")),
        "p50_us": weighted(&mut medians, 0.5),
        "p99_us": weighted(&mut tails, 0.99),
        "longest_ms": longest_us as f64 / 1e3,
    })
}

fn weighted(values: &mut [(u64, u64)], quantile: f64) -> Option<u64> {
    values.sort_unstable();
    let total: u64 = values.iter().map(|(_, weight)| weight).sum();
    let mut seen = 0;
    values
        .iter()
        .find(|(_, weight)| {
            seen += weight;
            seen as f64 >= total as f64 * quantile
        })
        .map(|(value, _)| *value)
}

/// The counters of the guest's last report.
pub(crate) fn last_report(lines: &[Line], key: &str) -> u64 {
    lines.iter().rev().find_map(|line| line.value[key].as_u64()).unwrap_or(0)
}
