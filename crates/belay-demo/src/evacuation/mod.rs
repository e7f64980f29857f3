//! `make bench-evacuate`: how long until a VM with a local disk has left its host, and until the host is empty?
//!
//! The same guest with the same disk and the same load, moved twice: by Belay, which lets the VM go first and its disk
//! follow, and as QEMU's users do it today, which copies the disk first and lets the VM go when the copy is complete
//! (the steps of `virsh migrate --copy-storage-all`). Both copy with the same limit, that of a 1 Gbit/s network.

mod by_belay;
mod mirror;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::console::Console;
use crate::limit::go_on;
use crate::{figures, watch};

/// The VM's name.
pub(crate) const VM: &str = "leaver";
/// The disk, and how much of it holds data.
pub(crate) const DISK_BYTES: u64 = 4 << 30;
const CONTENT_BYTES: u64 = 1 << 30;
/// The part that the guest works on.
const REGION_MIB: u64 = 64;
/// What both may copy per second: 1 Gbit/s, less its headers.
pub(crate) const COPY_BYTES_PER_S: u64 = 117 << 20;
/// How long a copy may take before it counts as failed.
pub(crate) const PATIENCE: Duration = Duration::from_secs(180);
/// How long the guest is watched before it moves.
const WATCH: Duration = Duration::from_secs(3);

/// What a scenario is made of.
pub(crate) struct Scene {
    pub(crate) belay: PathBuf,
    pub(crate) guest: PathBuf,
    /// For sockets: a short path.
    pub(crate) sockets: PathBuf,
    /// For images.
    pub(crate) images: PathBuf,
    /// The disk at the source.
    pub(crate) disk: PathBuf,
}

impl Scene {
    /// The kernel's command line: the load is one that a copy can catch up with.
    pub(crate) fn append(&self) -> String {
        format!(
            "console=ttyS0 quiet panic=-1 belay.probe=\"--region-mib {REGION_MIB} --threads 4 --read-percent 80 --prepared\""
        )
    }
}

/// What a move measured.
pub(crate) struct Moved {
    /// From the command to the guest running at the destination.
    pub(crate) vm_left: Duration,
    /// From the command until nothing of the VM needs the old host.
    pub(crate) host_empty: Duration,
    /// The guest's standstill, as QEMU's source tells it.
    pub(crate) downtime_ms: u64,
}

/// Runs both, alternating, and writes `evacuate.json`.
pub(crate) fn compare(belay: &Path, probe: &Path, guest: &Path, out: &Path, rounds: usize) -> Result<()> {
    std::fs::create_dir_all(out)?;
    let mut measured = Vec::new();
    for round in 0..rounds {
        for who in ["belay", "mirror"] {
            println!(
                "evacuate: round {}, {who}: copying a disk with {} MiB of data",
                round + 1,
                CONTENT_BYTES >> 20
            );
            let mut figures = one(who, belay, probe, guest, out)?;
            figures["who"] = json!(who);
            println!(
                "evacuate:   the VM had left after {} s, the host was empty after {} s, downtime {} ms",
                figures["vm_left_s"], figures["host_empty_s"], figures["downtime_ms"]
            );
            measured.push(figures);
        }
    }
    let report = summarise(&measured);
    std::fs::write(out.join("evacuate.json"), serde_json::to_string_pretty(&report)?)?;
    print_table(&report);
    println!("evacuate: {}", out.join("evacuate.json").display());
    Ok(())
}

fn one(who: &str, belay: &Path, probe: &Path, guest: &Path, out: &Path) -> Result<Value> {
    let sockets = tempfile::Builder::new().prefix("belay-").tempdir()?;
    let images = tempfile::Builder::new().prefix("evacuate-").tempdir_in(out)?;
    let scene = Scene {
        belay: belay.to_owned(),
        guest: guest.to_owned(),
        sockets: sockets.path().to_owned(),
        disk: images.path().join("source.img"),
        images: images.path().to_owned(),
    };
    make_disk(probe, &scene.disk)?;
    let console = Console::default();
    let outcome = match who {
        "mirror" => mirror::evacuate(&scene, &console),
        _ => by_belay::evacuate(&scene, &console),
    };
    if outcome.is_err() {
        crate::keep_logs(&scene.sockets, out);
    }
    outcome
}

/// A guest that does I/O: the figures before, while `go` moves it, and after; and that every block is right.
pub(crate) fn observed(console: &Console, go: impl FnOnce() -> Result<Moved>) -> Result<Value> {
    console.wait(0, Duration::from_secs(90), "that it does I/O", |line| {
        line["ops"].as_u64().is_some_and(|ops| ops > 0)
    })?;
    let from = console.len();
    let began = Instant::now();
    watch(WATCH)?;
    let rate =
        |io: &Value, since: Instant| io["operations"].as_f64().unwrap_or(0.0) / since.elapsed().as_secs_f64();
    let mut before = figures::guest_io(&console.since(from));
    before["iops"] = json!(rate(&before, began).round());
    go_on("the guest")?;
    let (from, began) = (console.len(), Instant::now());
    let moved = go()?;
    let mut during = figures::guest_io(&console.since(from));
    during["iops"] = json!(rate(&during, began).round());
    let from = console.len();
    console.send("verify")?;
    let verified = console
        .wait(from, Duration::from_secs(60), "that it has verified", |line| line["verified"].is_object())?;
    let verified = &verified.value["verified"];
    ensure!(
        verified["mismatches"] == 0 && verified["errors"] == 0,
        "the guest found wrong blocks: {verified}"
    );
    let seconds = |time: Duration| (time.as_secs_f64() * 100.0).round() / 100.0;
    Ok(json!({
        "vm_left_s": seconds(moved.vm_left),
        "host_empty_s": seconds(moved.host_empty),
        "downtime_ms": moved.downtime_ms,
        "guest_io": { "before": before, "during": during },
    }))
}

fn make_disk(probe: &Path, path: &Path) -> Result<()> {
    let file = std::fs::File::create(path)?;
    file.set_len(DISK_BYTES)?;
    crate::write_content(&file, DISK_BYTES - CONTENT_BYTES, CONTENT_BYTES)?;
    file.sync_all()?;
    let status = Command::new(probe)
        .arg("prepare")
        .arg(path)
        .args(["--region-mib", &REGION_MIB.to_string()])
        .status()
        .context("cannot run the probe")?;
    ensure!(status.success(), "the probe could not prepare {}", path.display());
    Ok(())
}

/// Medians of the rounds, and their ratios.
fn summarise(measured: &[Value]) -> Value {
    let median = |who: &str, pointer: &str| {
        let mut values: Vec<f64> = measured
            .iter()
            .filter(|one| one["who"] == who)
            .filter_map(|one| one.pointer(pointer).and_then(Value::as_f64))
            .collect();
        values.sort_unstable_by(f64::total_cmp);
        values.get(values.len() / 2).copied()
    };
    let rows = [
        ("evacuate/vm-left", "s", "/vm_left_s"),
        ("evacuate/host-empty", "s", "/host_empty_s"),
        ("evacuate/downtime", "ms", "/downtime_ms"),
        ("evacuate/guest-longest", "ms", "/guest_io/during/longest_ms"),
        ("evacuate/guest-iops-during", "iops", "/guest_io/during/iops"),
    ];
    let rows: Vec<Value> = rows
        .iter()
        .map(|(name, unit, pointer)| {
            let (belay, peer) = (median("belay", pointer), median("mirror", pointer));
            let ratio = belay.zip(peer).filter(|(_, peer)| *peer > 0.0).map(|(belay, peer)| belay / peer);
            json!({ "name": name, "unit": unit, "belay": belay, "peer": peer, "peer_name": "blockdev-mirror, then migrate", "ratio": ratio })
        })
        .collect();
    json!({ "schema": 1, "copy_limit_bytes_per_s": COPY_BYTES_PER_S, "disk_bytes": DISK_BYTES, "data_bytes": CONTENT_BYTES, "rows": rows, "rounds": measured })
}

fn print_table(report: &Value) {
    println!("\n{:<28} {:>10} {:>10} {:>7}", "", "belay", "mirror", "ratio");
    for row in report["rows"].as_array().into_iter().flatten() {
        let number = |key: &str, digits: usize| {
            row[key].as_f64().map_or("–".to_owned(), |v| format!("{v:.digits$}"))
        };
        println!(
            "{:<28} {:>10} {:>10} {:>7}",
            format!("{} ({})", row["name"].as_str().unwrap_or(""), row["unit"].as_str().unwrap_or("")),
            number("belay", 1),
            number("peer", 1),
            number("ratio", 2)
        );
    }
    println!();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn summary_takes_medians_and_ratios() {
        let one =
            |who: &str, left: f64| json!({ "who": who, "vm_left_s": left, "guest_io": { "during": {} } });
        let all = [
            one("mirror", 10.0),
            one("belay", 1.0),
            one("mirror", 12.0),
            one("belay", 3.0),
            one("mirror", 11.0),
            one("belay", 2.0),
        ];
        let report = summarise(&all);
        assert_eq!(report["rows"][0]["belay"], 2.0);
        assert_eq!(report["rows"][0]["peer"], 11.0);
        assert!(report["rows"][1]["ratio"].is_null());
    }
}
