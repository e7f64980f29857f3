//! `belay-probe`: the load, run in a guest (or on any file, to try it).

use belay_probe::console::{self, Console};
use belay_probe::disk::{self, DiskLoad, Mix};
use belay_probe::files::FilesLoad;
use belay_probe::load::{self, Load, Options};
use belay_probe::stats::Stats;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

const USAGE: &str = "\
belay-probe: I/O load that checks every byte it reads

  belay-probe disk DEVICE [options]     load on a disk or file; overwrites its region
    --region-mib N    size of the region (64)        --offset-mib N     where it starts (0)
    --read-percent N  reads among operations (50)    --large-percent N  64 KiB operations (10)
    --flush-every N   operations between a worker's flushes, 0 for none (200)
  belay-probe files DIR [options]       load on files in a file system
    --files N         how many, of 256 KiB each (64)
  belay-probe prepare FILE [--region-mib N] [--offset-mib N]   write version 1 of every block
  belay-probe check FILE [--region-mib N] [--offset-mib N]     read an image without a guest
  belay-probe boot-sector FILE          write the guest that fits into a sector

options of both loads:
    --threads N       operations in flight (16)      --seed N           of all choices (1)
    --prepared        version 1 is there already     --seconds N        end by itself
    --report-ms N     time between reports (100)

Reports are lines of JSON on standard output; commands are lines on standard input:
verify, stop, start, sync, quiet, report, older, newer (two writes of one block), reboot, poweroff.
Exit code: 0 all was right, 1 errors or wrong blocks, 2 usage.
";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments.iter().any(|argument| matches!(argument.as_str(), "-h" | "--help")) {
        print!("{USAGE}");
        return ExitCode::SUCCESS;
    }
    match Arguments::parse(&arguments).and_then(|arguments| arguments.run()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(Failure::Usage(why)) => {
            eprintln!("belay-probe: {why}; --help tells the options");
            ExitCode::from(2)
        }
        Err(Failure::Io(why)) => {
            println!(r#"{{"fatal":{}}}"#, console::quoted(&why));
            ExitCode::from(1)
        }
    }
}

enum Failure {
    Usage(String),
    Io(String),
}

/// The command line.
struct Arguments<'a> {
    action: &'a str,
    target: &'a Path,
    mix: Mix,
    options: Options,
    files: usize,
}

impl<'a> Arguments<'a> {
    fn parse(arguments: &'a [String]) -> Result<Self, Failure> {
        let [action, target, rest @ ..] = arguments else {
            return Err(Failure::Usage("an action and its target are needed".into()));
        };
        let mut parsed = Self {
            action,
            target: Path::new(target),
            mix: Mix::default(),
            options: Options {
                threads: 16,
                seed: 1,
                prepared: false,
                limit: None,
                report_every: Duration::from_millis(100),
            },
            files: 64,
        };
        let mut rest = rest.iter();
        while let Some(option) = rest.next() {
            if option == "--prepared" {
                parsed.options.prepared = true;
                continue;
            }
            let value = rest.next().and_then(|value| value.parse::<u64>().ok());
            let Some(value) = value else { return Err(Failure::Usage(format!("{option} needs a number"))) };
            parsed.set(option, value)?;
        }
        Ok(parsed)
    }

    fn set(&mut self, option: &str, value: u64) -> Result<(), Failure> {
        let count = value as usize;
        match option {
            "--region-mib" => self.mix.region_bytes = value << 20,
            "--offset-mib" => self.mix.offset_bytes = value << 20,
            "--read-percent" => self.mix.read_percent = count,
            "--large-percent" => self.mix.large_percent = count,
            "--flush-every" => self.mix.flush_every = value,
            "--files" => self.files = count,
            "--threads" => self.options.threads = count.clamp(1, 256),
            "--seed" => self.options.seed = value,
            "--seconds" => self.options.limit = Some(Duration::from_secs(value)),
            "--report-ms" => self.options.report_every = Duration::from_millis(value.max(1)),
            _ => return Err(Failure::Usage(format!("unknown option {option}"))),
        }
        Ok(())
    }

    /// Does it; false if something was wrong with the target.
    fn run(&self) -> Result<bool, Failure> {
        let io = |error: std::io::Error| Failure::Io(format!("{}: {error}", self.target.display()));
        let Mix { offset_bytes, region_bytes, .. } = self.mix;
        match self.action {
            "disk" => {
                let load = DiskLoad::open(self.target, self.mix, self.options.prepared).map_err(io)?;
                Ok(self.load(&load))
            }
            "files" => {
                let threads = self.options.threads;
                let load = FilesLoad::open(self.target, self.files, threads, self.options.prepared);
                Ok(self.load(&load.map_err(io)?))
            }
            "prepare" => {
                disk::prepare_image(self.target, offset_bytes, region_bytes).map(|()| true).map_err(io)
            }
            "check" => {
                let (blocks, wrong) =
                    disk::check_image(self.target, offset_bytes, region_bytes).map_err(io)?;
                println!(r#"{{"checked":{{"blocks":{blocks},"mismatches":{wrong}}}}}"#);
                Ok(wrong == 0)
            }
            "boot-sector" => {
                std::fs::write(self.target, belay_probe::boot_sector()).map(|()| true).map_err(io)
            }
            other => Err(Failure::Usage(format!("unknown action {other}"))),
        }
    }

    fn load(&self, load: &dyn Load) -> bool {
        console::set_raw_terminal();
        let console = Arc::new(Console::new(Box::new(std::io::stdout())));
        let stats = Arc::new(Stats::new(self.options.threads));
        console::watch_kernel_log(Arc::clone(&stats));
        let commands = console::read_commands(Arc::clone(&console));
        let outcome = load::run(load, &self.options, &stats, &console, &commands);
        outcome.errors == 0 && outcome.mismatches == 0
    }
}
