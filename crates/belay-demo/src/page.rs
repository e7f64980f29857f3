//! The report's page: one file, no network.

use std::fmt::Write;
use std::time::Instant;

use serde_json::Value;

use crate::console::Line;

/// A phase of the demonstration.
pub(crate) struct Phase {
    pub(crate) name: String,
    pub(crate) from: Instant,
    pub(crate) to: Instant,
}

const WIDTH: f64 = 1100.0;
const HEIGHT: f64 = 260.0;

/// The page.
pub(crate) fn html(report: &Value, lines: &[Line], phases: &[Phase], began: Instant) -> String {
    let reports: Vec<&Line> = lines.iter().filter(|line| line.value["ops"].is_u64()).collect();
    let end = reports.last().map_or(began, |line| line.at);
    let seconds = end.duration_since(began).as_secs_f64().max(1.0);
    let x = |at: Instant| at.saturating_duration_since(began).as_secs_f64() / seconds * WIDTH;
    let number = |line: &Line, key: &str| line.value[key].as_f64().unwrap_or(0.0);
    let latency = |line: &Line, key: &str| line.value["lat_us"][key].as_f64().unwrap_or(0.0) / 1e3;
    let mut rates = Vec::new();
    for pair in reports.windows(2) {
        let time = pair[1].at.duration_since(pair[0].at).as_secs_f64();
        if time > 0.0 {
            rates.push((x(pair[1].at), (number(pair[1], "ops") - number(pair[0], "ops")) / time));
        }
    }
    let medians: Vec<(f64, f64)> = reports.iter().map(|line| (x(line.at), latency(line, "p50"))).collect();
    let longest: Vec<(f64, f64)> = reports.iter().map(|line| (x(line.at), latency(line, "max"))).collect();
    let mut page = String::from(
        "<!doctype html><meta charset=utf-8><title>Belay: demonstration</title><style>body{font:15px system-ui;margin:2em;max-width:1140px}svg{background:#fafafa;border:1px solid #ddd;width:100%}pre{background:#f4f4f4;padding:1em;overflow:auto}.p{fill:#2b6cb0;fill-opacity:.09}text{font:12px system-ui;fill:#444}</style><h1>A guest moves, its disk never stops</h1><p>I/O as the guest itself measured it, every 100 ms. Shaded: from the command <code>belay migrate</code> to the end of each phase.</p>",
    );
    page.push_str("<h2>Latency (ms): median blue, longest red</h2>");
    chart(&mut page, &[(&longest, "#c53030"), (&medians, "#2b6cb0")], phases, &x);
    page.push_str("<h2>Operations per second</h2>");
    chart(&mut page, &[(&rates, "#2f855a")], phases, &x);
    let text =
        serde_json::to_string_pretty(report).unwrap_or_default().replace('&', "&amp;").replace('<', "&lt;");
    let _ = write!(page, "<h2>Figures</h2><pre>{text}</pre>");
    page
}

fn chart(
    page: &mut String,
    series: &[(&Vec<(f64, f64)>, &str)],
    phases: &[Phase],
    x: &dyn Fn(Instant) -> f64,
) {
    let top =
        series.iter().flat_map(|(points, _)| points.iter().map(|point| point.1)).fold(1.0, f64::max) * 1.1;
    let _ = write!(page, "<svg viewBox='0 0 {WIDTH} {HEIGHT}'>");
    for (index, phase) in phases.iter().enumerate() {
        let (from, to) = (x(phase.from), x(phase.to));
        let _ = write!(
            page,
            "<rect class=p x={from:.1} y=0 width={:.1} height={HEIGHT}></rect><text x={:.1} y={}>{}</text>",
            (to - from).max(1.0),
            from + 3.0,
            14 + 14 * (index % 4),
            phase.name
        );
    }
    for (points, colour) in series {
        let path: Vec<String> =
            points.iter().map(|(x, y)| format!("{x:.1},{:.1}", HEIGHT - y / top * (HEIGHT - 10.0))).collect();
        let _ = write!(page, "<polyline fill=none stroke='{colour}' points='{}'></polyline>", path.join(" "));
    }
    let _ = write!(page, "<text x=4 y={:.0}>0 … {top:.1}</text></svg>", HEIGHT - 6.0);
}
