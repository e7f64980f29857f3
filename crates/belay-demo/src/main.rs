//! `make demo`: two hosts with an agent each, a real guest that keeps its disk busy, live-migrated there and back.
//!
//! Arguments: the `belay` binary, the `belay-probe` binary, the guest's folder (vmlinuz, initrd.img), the output folder;
//! with `evacuate ROUNDS` before them it is `make bench-evacuate`.

mod console;
mod evacuation;
mod figures;
mod hosts;
mod limit;
mod network;
mod page;

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use crate::console::Console;
use crate::hosts::{Host, Hosts};
use crate::limit::go_on;
use crate::network::Network;
use crate::page::Phase;

/// The VM's name.
const VM: &str = "demo";
const DISK: &str = "disk0";
const DISK_BYTES: u64 = 1 << 30;
/// The part of the disk that the guest's probe works on.
const REGION_MIB: u64 = 64;
/// Other content, at the disk's end, which only has to arrive.
const CONTENT_BYTES: u64 = 96 << 20;
/// What the copier may take of the link, in bytes per second: slow enough to be watched.
const COPY_BYTES_PER_S: u64 = 48 << 20;
/// How long the guest's I/O is watched before and after each migration.
const WATCH: Duration = Duration::from_secs(4);
/// The guest holds its load when so much is left to copy, so that both images can be compared at the end: a third of a
/// second at the copier's limit.
const HOLD_BYTES: u64 = 16 << 20;

fn main() -> ExitCode {
    // Configurations and specifications, which name the guest's files, are in other folders.
    let absolute = |guest: &Path| std::path::absolute(guest).unwrap_or_else(|_| guest.to_owned());
    let arguments: Vec<PathBuf> = std::env::args_os().skip(1).map(PathBuf::from).collect();
    std::thread::spawn(watch_signals);
    let outcome = match &arguments[..] {
        [belay, probe, guest, out] => demonstrate(belay, probe, &absolute(guest), out),
        [evacuate, rounds, belay, probe, guest, out] if evacuate.as_os_str() == "evacuate" => {
            let rounds = rounds.to_str().and_then(|rounds| rounds.parse().ok()).unwrap_or(1);
            evacuation::compare(belay, probe, &absolute(guest), out, rounds)
        }
        _ => {
            eprintln!("usage: belay-demo [evacuate ROUNDS] BELAY BELAY-PROBE GUEST-FOLDER OUTPUT-FOLDER");
            return ExitCode::from(2);
        }
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("demo: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Ctrl-C ends the demonstration in order: everything that was made is taken away.
fn watch_signals() {
    let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_all().build() else { return };
    runtime.block_on(async {
        let mut terminate = match tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate()) {
            Ok(terminate) => terminate,
            Err(_) => return,
        };
        tokio::select! {
            _ = tokio::signal::ctrl_c() => {}
            _ = terminate.recv() => {}
        }
        limit::interrupt();
    });
}

/// Lets the guest work for a while.
fn watch(how_long: Duration) -> Result<()> {
    let until = Instant::now() + how_long;
    while Instant::now() < until {
        go_on("the guest's work")?;
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

fn say(text: &str) {
    println!("demo: {text}");
}

fn demonstrate(belay: &Path, probe: &Path, guest: &Path, out: &Path) -> Result<()> {
    limit::begin();
    std::fs::create_dir_all(out)?;
    // Sockets want short paths; what a killed demonstration left is not in the way.
    let sockets = tempfile::Builder::new().prefix("belay-").tempdir()?;
    let images = tempfile::Builder::new().prefix("images-").tempdir_in(out)?;
    let outcome = run(belay, probe, guest, out, sockets.path(), images.path());
    if outcome.is_err() {
        keep_logs(sockets.path(), out);
    }
    outcome
}

/// After a failure: what the agents, QEMU and the guest said.
fn keep_logs(sockets: &Path, out: &Path) {
    for host in ["host-a", "host-b"] {
        let folder = sockets.join(host);
        let Ok(mut log) = std::fs::read_to_string(folder.join("agent.log")) else { continue };
        for vm in [VM, evacuation::VM] {
            for said in [folder.join("vms").join(format!("{vm}.log")), folder.join(format!("{vm}.console"))] {
                log += &String::from_utf8_lossy(&std::fs::read(said).unwrap_or_default());
            }
        }
        let path = out.join(format!("{host}.log"));
        if std::fs::write(&path, log).is_ok() {
            eprintln!("demo: the log of {host} is in {}", path.display());
        }
    }
}

/// Writes bytes that do not compress.
fn write_content(file: &std::fs::File, at: u64, len: u64) -> Result<()> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut chunk = vec![0u8; 1 << 20];
    for mib in 0..len >> 20 {
        for word in chunk.chunks_exact_mut(8) {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            word.copy_from_slice(&(state >> 7).to_le_bytes());
        }
        file.write_all_at(&chunk, at + (mib << 20))?;
    }
    Ok(())
}

fn make_disk(probe: &Path, path: &Path) -> Result<()> {
    let file = std::fs::File::create(path)?;
    file.set_len(DISK_BYTES)?;
    write_content(&file, DISK_BYTES - CONTENT_BYTES, CONTENT_BYTES)?;
    file.sync_all()?;
    let status = Command::new(probe)
        .arg("prepare")
        .arg(path)
        .args(["--region-mib", &REGION_MIB.to_string()])
        .status()?;
    ensure!(status.success(), "the probe could not prepare {}", path.display());
    Ok(())
}

fn specification(guest: &Path) -> String {
    let path = |name: &str| guest.join(name).display().to_string();
    format!(
        "name = {VM:?}\nmemory_mib = 256\ncpus = 1\nkernel = {:?}\ninitrd = {:?}\n\
         append = \"console=ttyS0 quiet panic=-1 belay.probe=\\\"--region-mib {REGION_MIB} --threads 16 --prepared\\\"\"\n\
         disks = [{{ device = {DISK:?} }}]\n\
         args = [\"-chardev\", \"socket,id=console,path={{runtime_dir}}/{VM}.console,server=on,wait=off\", \"-serial\", \"chardev:console\", \"-no-reboot\"]\n",
        path("vmlinuz"),
        path("initrd.img"),
    )
}

fn run(belay: &Path, probe: &Path, guest: &Path, out: &Path, sockets: &Path, images: &Path) -> Result<()> {
    let began = Instant::now();
    say("two hosts, an agent on each, enrolled with each other by a one-time token");
    let hosts = Hosts::start(belay, sockets, images, Network::separate()?, COPY_BYTES_PER_S, VM, guest)?;
    let [a, b] = &hosts.all;
    let disk = images.join("disk0-original.img");
    make_disk(probe, &disk)?;
    let disk_path = disk.display().to_string();
    a.local(&["device", "add", DISK, "--path", &disk_path, "--queues", "1", "--delay", "2ms", "--vm", VM])?;
    say(
        "the disk has 1 GiB, 160 MiB of it in use; it stands behind a delay of 2 ms per request, like a cloud disk",
    );
    let spec = sockets.join("vm.toml");
    std::fs::write(&spec, specification(guest))?;
    a.local(&["vm", "run", &spec.display().to_string()])?;
    let status = a.json(&["vm", "list"])?;
    let console = Console::default();
    console.attach(&a.console(), Duration::from_secs(20))?;
    say("booting a Linux guest; its probe keeps 16 requests in flight, and checks every block it reads");
    console.wait(0, Duration::from_secs(90), "that it does I/O", |line| {
        line["ops"].as_u64().is_some_and(|ops| ops > 0)
    })?;
    let mut phases = Vec::new();
    let mut legs = Vec::new();
    let mut paths = (disk, PathBuf::new());
    for (from, to) in [(a, b), (b, a)] {
        let image = to.images.join(format!("{DISK}.img"));
        paths.1 = image.clone();
        let leg = migrate(from, to, &console, &mut phases, (&paths.0, &paths.1))?;
        legs.push(leg);
        paths.0 = image;
    }
    let report = json!({
        "schema": 1,
        "vmm": qemu_version(),
        "accel": accelerator(a, b),
        "vms": status,
        "seconds": began.elapsed().as_secs_f64(),
        "legs": legs,
    });
    std::fs::write(out.join("report.json"), serde_json::to_string_pretty(&report)?)?;
    std::fs::write(out.join("report.html"), page::html(&report, &console.since(0), &phases))?;
    print_summary(&report, out);
    check(&report)
}

fn qemu_version() -> String {
    let qemu = std::env::var("BELAY_QEMU").ok().filter(|value| !value.is_empty());
    let output = Command::new(qemu.as_deref().unwrap_or("qemu-system-x86_64")).arg("--version").output();
    let text = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
    text.lines().next().unwrap_or("unknown").to_owned()
}

/// What the agents said when they started the VM.
fn accelerator(a: &Host, b: &Host) -> Value {
    for host in [a, b] {
        let log = std::fs::read_to_string(host.folder.join("agent.log")).unwrap_or_default();
        for name in ["kvm", "tcg"] {
            if log.contains(&format!("started, {name},")) {
                return json!(name);
            }
        }
    }
    Value::Null
}

/// One leg: watch, migrate, follow the exchange, verify.
fn migrate(
    from: &Host,
    to: &Host,
    console: &Console,
    phases: &mut Vec<Phase>,
    images: (&Path, &Path),
) -> Result<Value> {
    use std::os::unix::fs::MetadataExt;
    let before_from = console.len();
    watch(WATCH)?;
    let before = figures::guest_io(&console.since(before_from));
    let allocated = std::fs::metadata(images.0)?.blocks() * 512;
    say(&format!("migrating the guest from {} to {}, its I/O goes on", from.name, to.name));
    let during_from = console.len();
    let command = Instant::now();
    let operation = from.json(&["migrate", VM, to.name, "--no-wait"])?;
    let id = operation["id"].as_str().context("an operation has an id")?.to_owned();
    console.attach(&to.console(), Duration::from_secs(30))?;
    let mut phase = String::new();
    let operation = loop {
        go_on(&format!("the migration to {}, which is at {phase:?}", to.name))?;
        let view = from.json(&["operation", &id])?;
        match view["state"].as_str() {
            Some("running") => {
                if view["phase"] != phase.as_str() {
                    phase = view["phase"].as_str().unwrap_or_default().to_owned();
                    say(&format!("  {:>5} ms  {phase}", command.elapsed().as_millis()));
                }
                std::thread::sleep(Duration::from_millis(20));
            }
            Some("done") => break view,
            _ => bail!("the migration failed: {}", view["error"]),
        }
    };
    let running = Instant::now();
    phases.push(Phase { name: format!("migration to {}", to.name), from: command, to: running });
    say(&format!("the guest runs on {}; its disk is still on {}, and follows", to.name, from.name));
    let (exchange, held) = follow(to, console)?;
    let done = Instant::now();
    phases.push(Phase { name: "exchange".to_owned(), from: running, to: done });
    let images_equal = same(images.0, images.1)?;
    let during = figures::guest_io(&console.since(during_from));
    let verify_from = console.len();
    console.send("verify")?;
    let verified = console.wait(verify_from, Duration::from_secs(120), "that it has verified", |line| {
        line["verified"].is_object()
    })?;
    console.send("start")?;
    let held_until = Instant::now();
    phases.push(Phase {
        name: "load held: images compared, blocks verified".to_owned(),
        from: held,
        to: held_until,
    });
    let after_from = console.len();
    watch(WATCH)?;
    let lines = console.since(after_from);
    let after = figures::guest_io(&lines);
    let verified = &verified.value["verified"];
    ensure!(
        verified["mismatches"] == 0 && verified["errors"] == 0,
        "the guest found wrong blocks: {verified}"
    );
    Ok(json!({
        "mode": "follow",
        "from": from.name,
        "to": to.name,
        "disk_bytes": DISK_BYTES,
        "allocated_bytes": allocated,
        "migration": operation["report"]["migration"],
        "handover": operation["report"]["handover"],
        "guest_io": { "before": before, "during": during, "after": after },
        "exchange": {
            "bytes_copied": exchange["copied_bytes"],
            "bytes_echoed": exchange["echoed_bytes"],
            "bytes_skipped": exchange["skipped_bytes"],
            "seconds": done.duration_since(running).as_secs_f64(),
        },
        "verified": {
            "guest_blocks": verified["blocks"],
            "images_equal": images_equal,
            "guest_resets": figures::last_report(&console.since(0), "guest_resets"),
        },
    }))
}

/// Follows the exchange to its end. Shortly before it the guest holds its load, so that both images can be compared;
/// since when is the second result.
fn follow(to: &Host, console: &Console) -> Result<(Value, Instant)> {
    let mut held = None;
    let mut told = Instant::now();
    loop {
        go_on(&format!("the disk, which follows to {}", to.name))?;
        let device = to.json(&["device", "show", DISK])?;
        let exchange = &device["exchange"];
        let number = |key: &str| exchange[key].as_u64().unwrap_or(0);
        if exchange.is_object() {
            let left = number("total_bytes") - number("local_bytes");
            if left < HOLD_BYTES && held.is_none() {
                console.send("stop")?;
                held = Some(Instant::now());
            }
            if told.elapsed() > Duration::from_secs(1) {
                told = Instant::now();
                say(&format!(
                    "  {} % here, {} MiB left",
                    number("local_bytes") * 100 / number("total_bytes").max(1),
                    left >> 20
                ));
            }
        } else if device["state"] == "local" {
            let held = held.context("the exchange was over before the guest could be held")?;
            return Ok((device["last_exchange"].clone(), held));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Whether two files have the same content.
fn same(a: &Path, b: &Path) -> Result<bool> {
    let status = Command::new("cmp").args(["-s"]).arg(a).arg(b).status().context("cannot run cmp")?;
    Ok(status.success())
}

fn print_summary(report: &Value, out: &Path) {
    println!();
    for leg in report["legs"].as_array().into_iter().flatten() {
        println!("{} → {}", leg["from"].as_str().unwrap_or(""), leg["to"].as_str().unwrap_or(""));
        println!(
            "  runs at the destination after   {:>8.0} ms",
            leg["migration"]["running_at_destination_ms"].as_f64().unwrap_or(f64::NAN)
        );
        println!("  downtime of the VM              {:>8} ms", leg["migration"]["downtime_ms"]);
        println!("  requests in flight handed over  {:>8}", leg["handover"]["requests_in_flight"]);
        println!(
            "  grant                           {:>8.1} ms",
            leg["handover"]["grant_ms"].as_f64().unwrap_or(f64::NAN)
        );
        println!(
            "  gap in the guest's completions  {:>8.1} ms",
            leg["handover"]["gap_ms"].as_f64().unwrap_or(f64::NAN)
        );
        for part in ["before", "during", "after"] {
            let io = &leg["guest_io"][part];
            println!(
                "  guest I/O {part:<8} {:>7} operations, {} errors, {} mismatches, p50 {} µs, p99 {} µs, longest {} ms",
                io["operations"],
                io["errors"],
                io["mismatches"],
                io["p50_us"],
                io["p99_us"],
                io["longest_ms"]
            );
        }
        let mib = |key: &str| leg["exchange"][key].as_u64().unwrap_or(0) >> 20;
        println!(
            "  exchange: {} MiB copied, {} MiB echoed, {} MiB skipped, {:.1} s",
            mib("bytes_copied"),
            mib("bytes_echoed"),
            mib("bytes_skipped"),
            leg["exchange"]["seconds"].as_f64().unwrap_or(f64::NAN)
        );
        println!(
            "  verified: {} blocks in the guest, images equal: {}, resets seen by the guest: {}\n",
            leg["verified"]["guest_blocks"], leg["verified"]["images_equal"], leg["verified"]["guest_resets"]
        );
    }
    println!("report: {} and report.html", out.join("report.json").display());
}

/// A demonstration that shows a defect fails.
fn check(report: &Value) -> Result<()> {
    for leg in report["legs"].as_array().into_iter().flatten() {
        ensure!(leg["verified"]["images_equal"] == true, "the images differ after the exchange");
        ensure!(leg["verified"]["guest_resets"] == 0, "the guest saw its disk fail");
        for part in ["before", "during", "after"] {
            let io = &leg["guest_io"][part];
            ensure!(io["errors"] == 0 && io["mismatches"] == 0, "the guest saw errors {part} the migration");
        }
    }
    Ok(())
}
