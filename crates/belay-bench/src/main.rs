//! `make bench`: Belay's data paths against real peers, in one run, alternating, by the same driver.
//!
//! `docs/benchmarks.md` says what is measured and how to read it.

mod driver;
mod job;
mod pattern;
mod peer;
mod report;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use belay_e2e::{Bed, until};
use clap::Parser;
use tempfile::TempDir;

use crate::job::{Job, Place};
use crate::pattern::Content;
use crate::peer::{Peer, Programs};
use crate::report::Line;

/// Measures Belay's data paths against qemu-storage-daemon and qemu-nbd.
#[derive(Parser)]
#[command(
    name = "belay-bench",
    after_help = "\
Examples:
  make bench
  make bench ARGS=--quick
  make bench ARGS='--only remote/randread --rounds 9'"
)]
struct Options {
    /// The `belay` binary whose agents are measured
    #[arg(long, default_value = "target/release/belay")]
    belay: PathBuf,
    /// Where the report goes, and the disks of the places `local-disk/…`
    #[arg(long, default_value = "target/bench")]
    out: PathBuf,
    /// Where the disks of the other places go: a tmpfs
    #[arg(long, default_value = "/dev/shm")]
    tmpfs: PathBuf,
    /// A tree with the peers' programs (scripts/fetch-qemu10 makes one); if it is not there, the installed ones
    #[arg(long, default_value = ".cache/qemu10/root")]
    peers: PathBuf,
    /// Rounds; in each, both sides run every load once, in an order that alternates
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// How long a load is measured, in milliseconds
    #[arg(long, default_value_t = 800)]
    length_ms: u64,
    /// The disks' size, in MiB
    #[arg(long, default_value_t = 512)]
    disk_mib: u64,
    /// Only loads whose name contains this
    #[arg(long, default_value = "")]
    only: String,
    /// The agents' `data_plane.spin_us`, instead of the default
    #[arg(long)]
    spin_us: Option<u64>,
    /// Few and short rounds on small disks: for a look, not for a claim
    #[arg(long)]
    quick: bool,
}

/// How long a load runs before it is measured.
const WARM_UP: Duration = Duration::from_millis(200);

static STOP: AtomicBool = AtomicBool::new(false);

/// Fails when the run was interrupted.
fn go_on() -> Result<()> {
    if STOP.load(Ordering::Relaxed) { bail!("interrupted") } else { Ok(()) }
}

/// Ctrl-C ends the run in order: what was started and made is taken away.
fn watch_signals() {
    let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_all().build() else { return };
    runtime.block_on(async {
        let _ = tokio::signal::ctrl_c().await;
        STOP.store(true, Ordering::Relaxed);
    });
}

fn main() -> ExitCode {
    let mut options = Options::parse();
    if options.quick {
        options.rounds = options.rounds.min(3);
        options.length_ms = options.length_ms.min(300);
        options.disk_mib = options.disk_mib.min(128);
    }
    std::thread::spawn(watch_signals);
    match Bench::run(&options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// The disk of a place, which both sides serve in turn.
struct Disk {
    /// Its file.
    file: PathBuf,
    /// Where the agent serves it.
    socket: PathBuf,
    /// What should be in it.
    content: Content,
}

struct Bench<'a> {
    options: &'a Options,
    bed: Bed,
    programs: Programs,
    lines: Vec<Line>,
}

impl<'a> Bench<'a> {
    fn run(options: &'a Options) -> Result<()> {
        std::fs::create_dir_all(&options.out)?;
        let belay = options
            .belay
            .canonicalize()
            .with_context(|| format!("there is no {}; make build makes it", options.belay.display()))?;
        let programs = Programs::find(&options.peers);
        for name in ["qemu-storage-daemon", "qemu-nbd"] {
            println!("bench: peer: {}", programs.version(name)?);
        }
        let mut bed = Bed::start(&belay)?;
        // The driver insists on memory slots.
        let mut data_plane = "[data_plane]\nmemory_slots = true\n".to_owned();
        if let Some(spin_us) = options.spin_us {
            data_plane += &format!("spin_us = {spin_us}\n");
        }
        for host in [&mut bed.a, &mut bed.b] {
            host.configure(&data_plane)?;
            host.terminate_agent()?;
            host.start_agent()?;
        }
        let mut bench = Self { options, bed, programs, lines: Vec::new() };
        println!("{}", report::head());
        let outcome = bench.memory().and_then(|()| bench.disk());
        if outcome.is_err() {
            let log = options.out.join("agents.log");
            if std::fs::write(&log, bench.bed.logs()).is_ok() {
                eprintln!("bench: the agents' log is in {}", log.display());
            }
        }
        outcome?;
        let path = options.out.join("report.json");
        report::write(&path, &bench.lines)?;
        println!("bench: everything read was what had been written; {}", path.display());
        Ok(())
    }

    fn jobs(&self, place: Place) -> Vec<Job> {
        let wanted = |job: &Job| format!("{}/{}", place.name(), job.name()).contains(&self.options.only);
        Job::all().into_iter().filter(wanted).collect()
    }

    /// A file in tmpfs: first used on its own host, then from the other.
    fn memory(&mut self) -> Result<()> {
        if self.jobs(Place::Local).is_empty() && self.jobs(Place::Remote).is_empty() {
            return Ok(());
        }
        let folder = tempfile::Builder::new().prefix("belay-bench-").tempdir_in(&self.options.tmpfs)?;
        let mut disk = self.make_disk("memory", &folder)?;
        let peer = Peer::local(&self.programs, &self.peer_folder()?, &disk.file)?;
        self.place(Place::Local, "qemu-storage-daemon", &mut disk, &peer)?;
        drop(peer);
        if self.jobs(Place::Remote).is_empty() {
            return Ok(());
        }
        let peer = Peer::remote(&self.programs, &self.peer_folder()?, &disk.file)?;
        disk.socket = self.move_to_other_host("memory")?;
        self.place(Place::Remote, "qemu-storage-daemon+qemu-nbd", &mut disk, &peer)
    }

    fn disk(&mut self) -> Result<()> {
        if self.jobs(Place::LocalDisk).is_empty() {
            return Ok(());
        }
        let folder = tempfile::Builder::new().prefix("disks-").tempdir_in(&self.options.out)?;
        let mut disk = self.make_disk("disk", &folder)?;
        let peer = Peer::local(&self.programs, &self.peer_folder()?, &disk.file)?;
        self.place(Place::LocalDisk, "qemu-storage-daemon", &mut disk, &peer)
    }

    /// Where the peer's sockets and certificates are: in the second host's folder, whose processes are looked after.
    fn peer_folder(&self) -> Result<PathBuf> {
        let folder = self.bed.b.folder.join("peer");
        std::fs::create_dir_all(&folder)?;
        Ok(folder)
    }

    fn disk_bytes(&self) -> u64 {
        self.options.disk_mib << 20
    }

    /// Makes a disk and gives it to the agent. The peer gets the same file, not one that is equal: where two files are on
    /// the medium made a difference of a third in writes.
    fn make_disk(&self, name: &str, folder: &TempDir) -> Result<Disk> {
        let file = folder.path().canonicalize()?.join(format!("{name}.img"));
        let content = Content::create(&File::create(&file)?, self.disk_bytes())
            .with_context(|| format!("cannot make a disk in {}", file.display()))?;
        let queues = peer::QUEUES.to_string();
        let path = file.to_str().context("a disk's path must be text")?;
        let added = self.bed.a.json(&["device", "add", name, "--path", path, "--queues", &queues])?;
        let socket = added["socket"].as_str().context("no socket of the device")?.into();
        Ok(Disk { file, socket, content })
    }

    /// The attachment moves to host B as soon as a driver connects there; the backing stays at A. A device can be
    /// taken over from a host whose guest has been there and has stopped: here the driver of the checks.
    fn move_to_other_host(&self, name: &str) -> Result<PathBuf> {
        until("the end of the driver's connection", || {
            Ok((self.bed.a.device(name)?["vmm_connected"] == false).then_some(()))
        })?;
        let offered = self.bed.a.json(&["device", "offer", name, self.bed.b.name, "--mode", "stay"])?;
        Ok(offered["socket"].as_str().context("no socket of the offered device")?.into())
    }

    fn place(&mut self, place: Place, name: &'static str, disk: &mut Disk, peer: &Peer) -> Result<()> {
        let length = Duration::from_millis(self.options.length_ms);
        for job in self.jobs(place) {
            let mut rounds = Vec::new();
            for round in 0..self.options.rounds {
                let (bytes, content) = (self.disk_bytes(), &mut disk.content);
                let mut measure = |socket: &Path| {
                    let outcome = driver::measure(socket, job, bytes, content, WARM_UP, length)?;
                    anyhow::Ok(job.figure(&outcome))
                };
                // Who is first alternates, so that neither always profits from what the other leaves behind.
                let pair = if round % 2 == 0 {
                    let ours = measure(&disk.socket).context("belay")?;
                    (ours, measure(&peer.socket).context(name)?)
                } else {
                    let theirs = measure(&peer.socket).context(name)?;
                    (measure(&disk.socket).context("belay")?, theirs)
                };
                rounds.push(pair);
            }
            let line = Line::of(place, &job, name, &rounds);
            println!("{}", line.text());
            self.lines.push(line);
        }
        for (socket, name) in [(&disk.socket, "belay"), (&peer.socket, name)] {
            driver::verify(socket, self.disk_bytes(), &mut disk.content)
                .with_context(|| format!("{name}, {}", place.name()))?;
        }
        Ok(())
    }
}
