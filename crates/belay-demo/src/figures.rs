//! What the guest measured, summed up over a stretch of time.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use crate::console::Line;

/// The guest's I/O between the first and the last of these lines.
///
/// Percentiles are those of all operations of the stretch: the guest reports a histogram for each interval, and these
/// are added up. Its buckets are 12.5 % wide; a percentile is the upper end of its bucket. `longest_ms` is exact, and
/// knows of requests that had not ended when they were reported.
pub(crate) fn guest_io(lines: &[Line]) -> Value {
    let reports: Vec<&Value> =
        lines.iter().map(|line| &line.value).filter(|value| value["ops"].is_u64()).collect();
    let (Some(first), Some(last)) = (reports.first(), reports.last()) else {
        return json!({ "operations": 0, "errors": 0, "mismatches": 0, "p50_us": null, "p99_us": null, "longest_ms": null });
    };
    let number = |value: &Value, key: &str| value[key].as_u64().unwrap_or(0);
    let grown = |key: &str| number(last, key).saturating_sub(number(first, key));
    let mut histogram = BTreeMap::<u64, u64>::new();
    let mut longest_us = 0;
    for report in &reports[1..] {
        let latency = &report["lat_us"];
        for bucket in latency["hist"].as_array().into_iter().flatten() {
            let (us, count) = (bucket[0].as_u64().unwrap_or(0), bucket[1].as_u64().unwrap_or(0));
            *histogram.entry(us).or_default() += count;
        }
        longest_us = longest_us.max(number(latency, "max")).max(number(report, "oldest_us"));
    }
    json!({
        "operations": grown("ops"),
        "errors": grown("errors"),
        "mismatches": grown("mismatches"),
        "p50_us": quantile(&histogram, 50),
        "p99_us": quantile(&histogram, 99),
        "longest_ms": longest_us as f64 / 1e3,
    })
}

/// The latency that so many percent of the operations did not exceed.
fn quantile(histogram: &BTreeMap<u64, u64>, percent: u64) -> Option<u64> {
    let total: u64 = histogram.values().sum();
    let wanted = (total * percent).div_ceil(100);
    let mut seen = 0;
    histogram
        .iter()
        .find(|(_, count)| {
            seen += **count;
            seen >= wanted
        })
        .map(|(us, _)| *us)
}

/// The counters of the guest's last report.
pub(crate) fn last_report(lines: &[Line], key: &str) -> u64 {
    lines.iter().rev().find_map(|line| line.value[key].as_u64()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    fn line(ops: u64, max: u64, hist: &[(u64, u64)]) -> Line {
        let value = json!({ "ops": ops, "errors": 0, "mismatches": 0, "oldest_us": 0, "lat_us": { "max": max, "hist": hist } });
        Line { at: Instant::now(), value }
    }

    #[test]
    fn percentiles_are_those_of_all_operations_not_of_intervals() {
        // A quiet interval with one slow operation weighs one operation.
        let lines =
            [line(10, 0, &[(1, 10)]), line(110, 200, &[(100, 99), (200, 1)]), line(111, 9000, &[(9000, 1)])];
        let io = guest_io(&lines);
        assert_eq!(io["operations"], 101);
        assert_eq!(io["p50_us"], 100);
        assert_eq!(io["p99_us"], 200);
        assert_eq!(io["longest_ms"], 9.0);
    }

    #[test]
    fn guest_that_said_nothing_has_no_percentiles() {
        let io = guest_io(&[]);
        assert_eq!(io["operations"], 0);
        assert!(io["p50_us"].is_null());
    }
}
