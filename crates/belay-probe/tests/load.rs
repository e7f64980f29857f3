//! The loads on files of this host: they are content with a good disk, and notice a bad one.

use belay_probe::console::{Command, Console};
use belay_probe::disk::{self, DiskLoad, Mix};
use belay_probe::files::FilesLoad;
use belay_probe::load::{self, Load, Options, Outcome};
use belay_probe::stats::Stats;
use serde_json::Value;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Mutex};
use std::time::Duration;

const REGION: u64 = 1 << 20;

/// A console whose lines the test reads, and which can answer a line with commands.
#[derive(Clone)]
struct Screen(Arc<Mutex<Vec<u8>>>, Option<(&'static str, Sender<Command>, Vec<Command>)>);

impl Write for Screen {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        let line = String::from_utf8_lossy(bytes).into_owned();
        if let Some((trigger, sender, commands)) = &mut self.1
            && line.contains(*trigger)
        {
            for command in commands.drain(..) {
                let _ = sender.send(command);
            }
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Runs a load, giving it `commands` when it first reports some operations, and returns the lines it wrote.
fn run(load: &dyn Load, prepared: bool, commands: &[Command]) -> (Outcome, Vec<Value>) {
    let text = Arc::new(Mutex::new(Vec::new()));
    let (sender, receiver) = mpsc::channel();
    let screen = Screen(Arc::clone(&text), Some(("\"t_ns\"", sender, commands.to_vec())));
    let console = Console::new(Box::new(screen));
    let options =
        Options { threads: 4, seed: 7, prepared, limit: None, report_every: Duration::from_millis(20) };
    let stats = Arc::new(Stats::new(options.threads));
    let outcome = load::run(load, &options, &stats, &console, &receiver);
    let text = String::from_utf8(text.lock().unwrap().clone()).unwrap();
    (outcome, text.lines().map(|line| serde_json::from_str(line).expect(line)).collect())
}

fn image(dir: &Path) -> PathBuf {
    let path = dir.join("disk");
    std::fs::File::create(&path).unwrap().set_len(4 * REGION).unwrap();
    path
}

fn mix() -> Mix {
    Mix { offset_bytes: 64 << 10, region_bytes: REGION, ..Mix::default() }
}

fn named<'a>(lines: &'a [Value], key: &str) -> Vec<&'a Value> {
    lines.iter().filter_map(|line| line.get(key)).collect()
}

#[test]
fn good_disk_verifies_and_its_image_checks() {
    let dir = tempfile::tempdir().unwrap();
    let path = image(dir.path());
    let load = DiskLoad::open(&path, mix(), false).unwrap();
    let commands =
        [Command::Verify, Command::Stop, Command::Verify, Command::Start, Command::Sync, Command::PowerOff];
    let (outcome, lines) = run(&load, false, &commands);
    assert_eq!(outcome, Outcome::default(), "{lines:?}");
    assert_eq!(named(&lines, "prepared")[0]["blocks"], 256);
    let verified = named(&lines, "verified");
    assert_eq!(verified.len(), 2);
    assert!(
        verified.iter().all(|line| line["blocks"] == 256 && line["mismatches"] == 0 && line["errors"] == 0)
    );
    assert_eq!((named(&lines, "stopped").len(), named(&lines, "synced").len()), (1, 2));
    let end = named(&lines, "end")[0];
    assert!(end["ops"].as_u64().unwrap() >= 32 && end["inflight"] == 0, "{end}");
    assert_eq!(disk::check_image(&path, 64 << 10, REGION).unwrap(), (256, 0));
}

#[test]
fn prepared_image_is_checked_from_the_first_read() {
    let dir = tempfile::tempdir().unwrap();
    let path = image(dir.path());
    disk::prepare_image(&path, 64 << 10, REGION).unwrap();
    let load = DiskLoad::open(&path, mix(), true).unwrap();
    let (outcome, lines) = run(&load, true, &[Command::Verify, Command::PowerOff]);
    assert_eq!(outcome, Outcome::default());
    assert!(named(&lines, "prepared").is_empty());
}

#[test]
fn lost_write_and_foreign_block_are_noticed() {
    let dir = tempfile::tempdir().unwrap();
    let path = image(dir.path());
    disk::prepare_image(&path, 64 << 10, REGION).unwrap();
    let file = std::fs::OpenOptions::new().read(true).write(true).open(&path).unwrap();
    // Block 3 holds block 4's content, block 9 zeroes.
    let mut block = vec![0; 4096];
    file.write_all_at(&block, (64 << 10) + 9 * 4096).unwrap();
    file.read_exact_at(&mut block, (64 << 10) + 4 * 4096).unwrap();
    file.write_all_at(&block, (64 << 10) + 3 * 4096).unwrap();
    assert_eq!(disk::check_image(&path, 64 << 10, REGION).unwrap(), (256, 2));
    // A load of reads only finds just these two in its verification.
    let load = DiskLoad::open(&path, Mix { read_percent: 100, ..mix() }, true).unwrap();
    let (outcome, lines) = run(&load, true, &[Command::Stop, Command::Verify, Command::PowerOff]);
    assert!(outcome.mismatches >= 2 && outcome.errors == 0);
    assert_eq!(named(&lines, "verified")[0]["mismatches"], 2);
    assert!(named(&lines, "mismatch").iter().all(|line| line["at"] == 3 || line["at"] == 9));
}

#[test]
fn failing_disk_is_counted_and_told() {
    let dir = tempfile::tempdir().unwrap();
    let path = image(dir.path());
    let load = DiskLoad::open(&path, Mix { read_percent: 100, ..mix() }, true).unwrap();
    std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(64 << 10).unwrap();
    assert!(DiskLoad::open(&path, mix(), true).is_err(), "a region beyond the disk is refused");
    let (outcome, lines) = run(&load, true, &[Command::Stop, Command::Verify, Command::PowerOff]);
    assert!(outcome.errors >= 16 && outcome.mismatches == 0);
    assert_eq!(named(&lines, "verified")[0]["errors"], 16);
    assert_eq!(named(&lines, "error")[0]["op"], "read");
}

#[test]
fn files_are_rewritten_replaced_and_verified() {
    let dir = tempfile::tempdir().unwrap();
    let load = FilesLoad::open(dir.path(), 6, 4, false).unwrap();
    let (outcome, lines) = run(&load, false, &[Command::Verify, Command::PowerOff]);
    assert_eq!(outcome, Outcome::default(), "{lines:?}");
    assert_eq!(named(&lines, "verified")[0]["blocks"], 6 * 64);
}

#[test]
fn changed_file_is_noticed() {
    let dir = tempfile::tempdir().unwrap();
    let load = FilesLoad::open(dir.path(), 4, 4, false).unwrap();
    run(&load, false, &[Command::PowerOff]);
    let file = std::fs::OpenOptions::new().write(true).open(dir.path().join("f00002")).unwrap();
    file.write_all_at(&[0xff], 5000).unwrap();
    let options =
        Options { threads: 1, seed: 1, prepared: true, limit: None, report_every: Duration::from_secs(9) };
    let stats = Arc::new(Stats::new(4));
    let console = Console::new(Box::new(Screen(Arc::default(), None)));
    let mut worker = load::Worker::new(0, options.seed, &stats, &console);
    for file in 0..4 {
        load.verify(file, &mut worker);
    }
    assert_eq!(stats.snapshot().mismatches, 1);
}

#[test]
fn load_without_commands_ends_when_its_time_is_over() {
    let dir = tempfile::tempdir().unwrap();
    let path = image(dir.path());
    let limited = std::process::Command::new(env!("CARGO_BIN_EXE_belay-probe"))
        .args(["disk", path.to_str().unwrap(), "--region-mib", "1", "--seconds", "1"])
        .stdin(std::process::Stdio::null())
        .output()
        .unwrap();
    assert!(limited.status.success());
    let text = String::from_utf8(limited.stdout).unwrap();
    assert!(text.lines().last().unwrap().starts_with(r#"{"end":"#), "{text}");
}
