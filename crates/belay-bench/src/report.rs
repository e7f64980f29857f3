//! Medians, the table, and `report.json`.

use std::path::Path;

use anyhow::Result;
use serde::Serialize;

use crate::job::{Job, Place};

/// One line of `report.json`.
#[derive(Debug, Serialize)]
pub(crate) struct Line {
    name: String,
    unit: &'static str,
    belay: f64,
    peer: f64,
    peer_name: &'static str,
    /// `belay / peer`: for `p50_us` less is better.
    ratio: f64,
    #[serde(skip)]
    goal: Option<(f64, bool)>,
    /// Smallest and largest ratio of one round.
    #[serde(skip)]
    spread: (f64, f64),
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    if sorted.len() % 2 == 1 { sorted[middle] } else { f64::midpoint(sorted[middle - 1], sorted[middle]) }
}

fn rounded(value: f64, digits: i32) -> f64 {
    let scale = 10f64.powi(digits);
    (value * scale).round() / scale
}

impl Line {
    /// What the rounds of one job gave: pairs of Belay's figure and the peer's.
    pub(crate) fn of(place: Place, job: &Job, peer_name: &'static str, rounds: &[(f64, f64)]) -> Self {
        let belay = median(&rounds.iter().map(|(belay, _)| *belay).collect::<Vec<_>>());
        let peer = median(&rounds.iter().map(|(_, peer)| *peer).collect::<Vec<_>>());
        let ratio = rounded(belay / peer, 3);
        let ratios = rounds.iter().map(|(belay, peer)| belay / peer);
        Self {
            name: format!("{}/{}", place.name(), job.name()),
            unit: job.unit().name(),
            belay: rounded(belay, 1),
            peer: rounded(peer, 1),
            peer_name,
            ratio,
            goal: job.goal(place).map(|goal| (goal, job.reaches(ratio, goal))),
            spread: ratios.fold((f64::INFINITY, 0.0), |(low, high), ratio| (low.min(ratio), high.max(ratio))),
        }
    }

    /// The line as the table shows it.
    pub(crate) fn text(&self) -> String {
        let goal = match self.goal {
            None => String::new(),
            Some((goal, reached)) => {
                let sign = if self.unit == "p50_us" { "≤" } else { "≥" };
                format!("{sign} {goal:.1} {}", if reached { "reached" } else { "MISSED" })
            }
        };
        format!(
            "{:<34} {:>7} {:>10.1} {:>10.1} {:>7.2}  {:>5.2} – {:<5.2}  {goal}",
            self.name, self.unit, self.belay, self.peer, self.ratio, self.spread.0, self.spread.1
        )
    }
}

/// The table's head.
pub(crate) fn head() -> String {
    format!(
        "{:<34} {:>7} {:>10} {:>10} {:>7}  {:<13}  goal",
        "name", "unit", "belay", "peer", "ratio", "of one round"
    )
}

/// Writes `report.json`.
pub(crate) fn write(path: &Path, lines: &[Line]) -> Result<()> {
    Ok(std::fs::write(path, serde_json::to_string_pretty(lines)? + "\n")?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn line_has_medians_their_ratio_and_exactly_the_documented_fields() {
        let job = Job::all().into_iter().find(|job| job.name() == "randread/4k/qd32/q1").unwrap();
        let rounds = [(10.0, 5.0), (30.0, 10.0), (20.0, 400.0)];
        let line = serde_json::to_value(Line::of(Place::Remote, &job, "nbd", &rounds)).unwrap();
        let expected = serde_json::json!({
            "name": "remote/randread/4k/qd32/q1", "unit": "iops",
            "belay": 20.0, "peer": 10.0, "peer_name": "nbd", "ratio": 2.0,
        });
        assert_eq!(line, expected);
    }
}
