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

/// Size of a chart's plot, and of the margins for its axes, in SVG units.
const WIDTH: f64 = 1040.0;
const HEIGHT: f64 = 240.0;
const LEFT: f64 = 60.0;
const TOP: f64 = 50.0;
const BOTTOM: f64 = 28.0;
/// Colours of phases, in turn: moving, copying, held.
const SHADES: [&str; 3] = ["#2b6cb0", "#b7791f", "#718096"];

const HEAD: &str = "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>\
<title>Belay: a guest moves, its disk never stops</title><style>\
body{font:15px/1.5 system-ui,sans-serif;margin:2em auto;max-width:1140px;padding:0 1em;color:#1a202c;background:#fff}\
h1{margin-bottom:.2em}svg{width:100%;height:auto;display:block}text{font:12px system-ui,sans-serif;fill:#4a5568}\
table{border-collapse:collapse;margin:1em 0}th,td{padding:.25em .9em;text-align:right;border-bottom:1px solid #e2e8f0}\
th:first-child,td:first-child{text-align:left}pre{background:#f7fafc;padding:1em;overflow:auto;font-size:13px}\
.grid{stroke:#e2e8f0}.key{display:inline-block;width:1em;height:.25em;vertical-align:middle;margin:0 .4em 0 1.2em}\
</style>";

/// A line of a chart.
struct Series<'a> {
    name: &'a str,
    colour: &'a str,
    points: Vec<(f64, f64)>,
}

/// Seconds on the x axis.
struct Axis {
    began: Instant,
    seconds: f64,
}

impl Axis {
    fn second(&self, at: Instant) -> f64 {
        at.saturating_duration_since(self.began).as_secs_f64()
    }

    fn x(&self, second: f64) -> f64 {
        LEFT + (second / self.seconds).clamp(0.0, 1.0) * WIDTH
    }
}

/// The page. Time begins with the guest's first report.
pub(crate) fn html(report: &Value, lines: &[Line], phases: &[Phase]) -> String {
    let reports: Vec<&Line> = lines.iter().filter(|line| line.value["ops"].is_u64()).collect();
    let (Some(first), Some(last)) = (reports.first(), reports.last()) else {
        return format!("{HEAD}<p>The guest reported nothing.</p>");
    };
    let axis = Axis { began: first.at, seconds: last.at.duration_since(first.at).as_secs_f64().max(1.0) };
    let mut page = String::from(HEAD);
    page.push_str(
        "<h1>A guest moves, its disk never stops</h1><p>I/O as the guest itself measured it, every 100 ms. Shaded: the live \
         migration, from the command to the guest running at the destination; the exchange, in which its disk follows; and the \
         time in which the guest holds its load, so that nothing changes while every block is checked. The guest's clock \
         stands still while the VM does: the gap in completions is the hosts'.</p>",
    );
    summary(&mut page, report);
    page.push_str("<h2>Latency (ms)</h2>");
    let latency = |name, colour, key: &str| Series {
        name,
        colour,
        points: reports
            .iter()
            .map(|line| (axis.second(line.at), line.value["lat_us"][key].as_f64().unwrap_or(0.0) / 1e3))
            .collect(),
    };
    let series = [latency("longest", "#c53030", "max"), latency("median", "#2b6cb0", "p50")];
    chart(&mut page, &series, phases, &axis);
    page.push_str("<h2>Operations per second</h2>");
    chart(
        &mut page,
        &[Series { name: "completed", colour: "#2f855a", points: rates(&reports, &axis) }],
        phases,
        &axis,
    );
    let text = serde_json::to_string_pretty(report).unwrap_or_default();
    let _ = write!(page, "<h2>Figures</h2><pre>{}</pre></html>", escaped(&text));
    page
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;")
}

fn rates(reports: &[&Line], axis: &Axis) -> Vec<(f64, f64)> {
    let operations = |line: &Line| line.value["ops"].as_f64().unwrap_or(0.0);
    reports
        .windows(2)
        .filter_map(|pair| {
            let time = pair[1].at.duration_since(pair[0].at).as_secs_f64();
            (time > 0.0).then(|| {
                (axis.second(pair[1].at), (operations(pair[1]) - operations(pair[0])).max(0.0) / time)
            })
        })
        .collect()
}

/// One row for each leg.
fn summary(page: &mut String, report: &Value) {
    page.push_str(
        "<table><tr><th>leg<th>guest runs there after<th>downtime<th>requests in flight<th>gap in completions\
         <th>exchange<th>copied<th>not sent<th>errors, mismatches<th>images equal</tr>",
    );
    let figure =
        |value: &Value, digits: usize| value.as_f64().map_or("–".to_owned(), |v| format!("{v:.digits$}"));
    for leg in report["legs"].as_array().into_iter().flatten() {
        let total = |key: &str| -> u64 {
            ["before", "during", "after"].iter().filter_map(|part| leg["guest_io"][*part][key].as_u64()).sum()
        };
        let mib = |key: &str| leg["exchange"][key].as_u64().unwrap_or(0) >> 20;
        let _ = write!(
            page,
            "<tr><td>{} → {}<td>{} ms<td>{} ms<td>{}<td>{} ms<td>{} s<td>{} MiB<td>{} MiB<td>{}, {}<td>{}</tr>",
            escaped(leg["from"].as_str().unwrap_or("")),
            escaped(leg["to"].as_str().unwrap_or("")),
            figure(&leg["migration"]["running_at_destination_ms"], 0),
            figure(&leg["migration"]["downtime_ms"], 0),
            figure(&leg["handover"]["requests_in_flight"], 0),
            figure(&leg["handover"]["gap_ms"], 1),
            figure(&leg["exchange"]["seconds"], 1),
            mib("bytes_copied"),
            mib("bytes_skipped"),
            total("errors"),
            total("mismatches"),
            leg["verified"]["images_equal"],
        );
    }
    page.push_str("</table>");
}

fn chart(page: &mut String, series: &[Series<'_>], phases: &[Phase], axis: &Axis) {
    let highest = series.iter().flat_map(|one| one.points.iter().map(|point| point.1)).fold(0.0, f64::max);
    let step = tick(highest);
    let top = (highest / step).ceil().max(1.0) * step;
    let y = |value: f64| TOP + HEIGHT - value / top * HEIGHT;
    page.push_str("<p>");
    for one in series {
        let _ = write!(page, "<span class=key style='background:{}'></span>{}", one.colour, one.name);
    }
    let _ = write!(page, "</p><svg viewBox='0 0 {} {}'>", LEFT + WIDTH + 10.0, TOP + HEIGHT + BOTTOM);
    shades(page, phases, axis);
    let mut value = 0.0;
    while value <= top + step / 2.0 {
        let _ = write!(
            page,
            "<line class=grid x1={LEFT} x2={} y1={at:.1} y2={at:.1} /><text x={} y={:.1} text-anchor=end>{value}</text>",
            LEFT + WIDTH,
            LEFT - 8.0,
            y(value) + 4.0,
            at = y(value),
        );
        value += step;
    }
    let step = tick(axis.seconds);
    for second in (0..).map(|i| f64::from(i) * step).take_while(|second| *second <= axis.seconds) {
        let _ = write!(
            page,
            "<text x={:.1} y={} text-anchor=middle>{second} s</text>",
            axis.x(second),
            TOP + HEIGHT + 18.0
        );
    }
    for one in series {
        let path: Vec<String> = one
            .points
            .iter()
            .map(|(second, value)| format!("{:.1},{:.1}", axis.x(*second), y(*value)))
            .collect();
        let _ = write!(
            page,
            "<polyline fill=none stroke-width=1.3 stroke-linejoin=round stroke='{}' points='{}' />",
            one.colour,
            path.join(" ")
        );
    }
    page.push_str("</svg>");
}

fn shades(page: &mut String, phases: &[Phase], axis: &Axis) {
    for (index, phase) in phases.iter().enumerate() {
        let (from, to) = (axis.x(axis.second(phase.from)), axis.x(axis.second(phase.to)));
        let _ = write!(
            page,
            "<rect fill='{}' fill-opacity=.1 x={from:.1} y={TOP} width={:.1} height={HEIGHT}><title>{name}</title></rect>\
             <text x={from:.1} y={}>{name}</text>",
            SHADES[index % SHADES.len()],
            (to - from).max(1.0),
            12 + 15 * (index % SHADES.len()),
            name = escaped(&phase.name),
        );
    }
}

/// A round distance between an axis' ticks: about five of them.
fn tick(highest: f64) -> f64 {
    let rough = highest.max(1e-6) / 5.0;
    let power = 10f64.powf(rough.log10().floor());
    [1.0, 2.0, 5.0].iter().map(|factor| factor * power).find(|step| *step >= rough).unwrap_or(10.0 * power)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use serde_json::json;

    use super::*;

    #[test]
    fn page_shows_every_phase_and_needs_no_network() {
        let began = Instant::now();
        let lines: Vec<Line> = (0..50)
            .map(|i| Line {
                at: began + Duration::from_millis(100 * i),
                value: json!({ "ops": i * 10, "lat_us": { "p50": 2000, "max": 9000 } }),
            })
            .collect();
        let phases = [Phase {
            name: "migration to <b>".to_owned(),
            from: began + Duration::from_secs(1),
            to: began + Duration::from_secs(2),
        }];
        let page = html(&json!({ "legs": [{ "from": "a", "to": "b" }] }), &lines, &phases);
        assert_eq!(page.matches("migration to &lt;b>").count(), 4);
        assert!(!page.contains("http"), "nothing is fetched");
        assert!(page.contains("<polyline"));
    }

    #[test]
    fn ticks_are_round() {
        assert_eq!(tick(10.0), 2.0);
        assert_eq!(tick(11.0), 5.0);
        assert_eq!(tick(6000.0), 2000.0);
        assert_eq!(tick(0.04), 0.01);
    }

    #[test]
    fn guest_that_said_nothing_still_makes_a_page() {
        assert!(html(&json!({}), &[], &[]).contains("nothing"));
    }
}
