//! Guests: the one that fits into a sector, and Linux.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result, bail, ensure};
use belay_probe::boot::{self, OP_DONE, OP_ERROR, OP_MISMATCH, OP_WRITTEN};
use serde_json::Value;

use crate::{Host, linux_guest, until};

/// Size of the boot-sector guest's disk, bytes.
const BOOT_DISK_BYTES: u64 = 4 << 20;
/// So much at its end is content that the guest does not touch: something to copy.
const BOOT_DISK_CONTENT: usize = 2 << 20;

/// Arguments that every VM of a test has: a monitor for the test, and a file with its pid.
fn test_arguments(vm: &str) -> String {
    format!(
        "\"-qmp\", \"unix:{{runtime_dir}}/{vm}.test-qmp,server=on,wait=off\", \"-pidfile\", \"{{runtime_dir}}/{vm}.pid\""
    )
}

fn boot_specification(vm: &str, lines: &str, disks: &str) -> String {
    format!(
        "name = {vm:?}\nmemory_mib = 32\n{lines}\ndisks = [{disks}]\n\
         args = [\"-serial\", \"file:{{runtime_dir}}/{vm}.serial\", {}]\n",
        test_arguments(vm)
    )
}

/// What a guest has reported.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Blocks written.
    pub written: usize,
    /// Blocks read and found right.
    pub read: usize,
    /// Operations that failed.
    pub errors: usize,
    /// Blocks read and found wrong.
    pub mismatches: usize,
}

/// The guest in one sector: one request at a time, each checked. Boots in 0.2 s.
pub struct BootGuest {
    /// The VM's name.
    pub vm: String,
    /// Its disk's name.
    pub disk: String,
}

impl Host {
    /// Makes a disk with the guest in one sector, whose requests take at least `delay` (such as `200ms`), and runs it.
    ///
    /// # Errors
    /// Something of that does not work.
    pub fn run_boot_guest(&self, vm: &str, delay: &str) -> Result<BootGuest> {
        self.run_boot_guest_with(vm, delay, "accel = \"tcg\"")
    }

    /// As [`Host::run_boot_guest`], with a second disk of this name: half of the blocks are on it.
    ///
    /// # Errors
    /// As [`Host::run_boot_guest`].
    pub fn run_boot_guest_with_two_disks(&self, vm: &str, delay: &str, second: &str) -> Result<BootGuest> {
        let guest = self.add_boot_disk(vm, delay)?;
        let path = self.images.join(format!("{second}-original.img"));
        std::fs::File::create(&path)?.set_len(BOOT_DISK_BYTES)?;
        self.belay(&["device", "add", second, "--path", &path.display().to_string(), "--delay", delay])?;
        let disks = format!("{{ device = {:?}, boot_index = 0 }}, {{ device = {second:?} }}", guest.disk);
        self.run_vm(vm, &boot_specification(vm, "accel = \"tcg\"", &disks))?;
        Ok(guest)
    }

    /// As [`Host::run_boot_guest`], with these lines in the VM's specification.
    ///
    /// # Errors
    /// As [`Host::run_boot_guest`].
    pub fn run_boot_guest_with(&self, vm: &str, delay: &str, lines: &str) -> Result<BootGuest> {
        let guest = self.add_boot_disk(vm, delay)?;
        let disks = format!("{{ device = {:?}, boot_index = 0 }}", guest.disk);
        self.run_vm(vm, &boot_specification(vm, lines, &disks))?;
        Ok(guest)
    }

    /// Makes the disk of such a guest only.
    ///
    /// # Errors
    /// Something of that does not work.
    pub fn add_boot_disk(&self, vm: &str, delay: &str) -> Result<BootGuest> {
        let disk = format!("{vm}-disk");
        let path = self.images.join(format!("{disk}-original.img"));
        let file = std::fs::File::create(&path)?;
        file.set_len(BOOT_DISK_BYTES)?;
        file.write_all_at(&boot::boot_sector(), 0)?;
        let content: Vec<u8> = (0..BOOT_DISK_CONTENT).map(|at| (at / 4096 + at) as u8).collect();
        file.write_all_at(&content, BOOT_DISK_BYTES - content.len() as u64)?;
        self.belay(&["device", "add", &disk, "--path", &path.display().to_string(), "--delay", delay])?;
        Ok(BootGuest { vm: vm.to_owned(), disk })
    }
}

impl BootGuest {
    /// What it has reported on this host; all of it must be good.
    ///
    /// # Errors
    /// It saw an error, or a wrong block.
    pub fn counts(&self, host: &Host) -> Result<Counts> {
        let text = std::fs::read(host.folder.join(format!("{}.serial", self.vm))).unwrap_or_default();
        let count = |what| text.iter().filter(|byte| **byte == what).count();
        let counts = Counts {
            written: count(OP_WRITTEN),
            read: count(OP_DONE),
            errors: count(OP_ERROR),
            mismatches: count(OP_MISMATCH),
        };
        ensure!(counts.errors == 0 && counts.mismatches == 0, "the guest on {} saw {counts:?}", host.name);
        Ok(counts)
    }

    /// Waits until it has done so many more operations on this host.
    ///
    /// # Errors
    /// It has not, or saw something wrong.
    pub fn goes_on(&self, host: &Host, operations: usize) -> Result<Counts> {
        let total = |counts: Counts| counts.written + counts.read;
        let before = total(self.counts(host)?);
        until(&format!("{operations} more operations of the guest on {}", host.name), || {
            let counts = self.counts(host)?;
            Ok((total(counts) >= before + operations).then_some(counts))
        })
    }
}

/// How a Linux guest is run.
#[derive(Clone, Debug)]
pub struct LinuxOptions {
    /// What its probe does: options of `belay-probe disk /dev/vda`, or `files /mnt …`.
    pub load: String,
    /// More for the guest's kernel command line.
    pub append: String,
    /// CPUs, and queues of its disk.
    pub cpus: u16,
    /// Time that each request takes at least.
    pub delay: String,
    /// Put an ext4 file system onto the disk.
    pub ext4: bool,
    /// Size of the disk, MiB.
    pub disk_mib: u64,
}

impl Default for LinuxOptions {
    fn default() -> Self {
        Self {
            load: "--region-mib 8 --threads 16".into(),
            append: String::new(),
            cpus: 1,
            delay: "2ms".into(),
            ext4: false,
            disk_mib: 64,
        }
    }
}

/// A Linux guest with the probe: many requests at a time, each checked. Boots in 5 s.
pub struct LinuxGuest {
    /// The VM's name.
    pub vm: String,
    /// Its disk's name.
    pub disk: String,
    lines: Arc<Mutex<Vec<Value>>>,
    console: Mutex<UnixStream>,
}

impl Host {
    /// Makes a disk and runs a Linux guest whose probe works on it.
    ///
    /// # Errors
    /// There is no guest image, or something does not work.
    pub fn run_linux_guest(&self, vm: &str, options: &LinuxOptions) -> Result<LinuxGuest> {
        let guest = linux_guest()?;
        let disk = format!("{vm}-disk");
        let path = self.images.join(format!("{disk}-original.img"));
        std::fs::File::create(&path)?.set_len(options.disk_mib << 20)?;
        if options.ext4 {
            make_ext4(&path)?;
        }
        let queues = options.cpus.to_string();
        let path = path.display().to_string();
        self.belay(&[
            "device",
            "add",
            &disk,
            "--path",
            &path,
            "--delay",
            &options.delay,
            "--queues",
            &queues,
        ])?;
        let file = |name: &str| guest.join(name).display().to_string();
        let append =
            format!("console=ttyS0 quiet panic=-1 {} belay.probe=\\\"{}\\\"", options.append, options.load);
        let specification = format!(
            "name = {vm:?}\nmemory_mib = 192\ncpus = {}\naccel = \"tcg\"\nkernel = {:?}\ninitrd = {:?}\n\
             append = \"{append}\"\ndisks = [{{ device = {disk:?} }}]\n\
             args = [\"-chardev\", \"socket,id=console,path={{runtime_dir}}/{vm}.console,server=on,wait=off\", \"-serial\", \"chardev:console\", {}]\n",
            options.cpus,
            file("vmlinuz"),
            file("initrd.img"),
            test_arguments(vm)
        );
        self.run_vm(vm, &specification)?;
        let lines = Arc::default();
        let console = Mutex::new(listen(self, vm, &lines, &Arc::default())?);
        Ok(LinuxGuest { vm: vm.to_owned(), disk, lines, console })
    }
}

fn make_ext4(path: &Path) -> Result<()> {
    let program =
        ["/usr/sbin/mkfs.ext4", "/sbin/mkfs.ext4"].into_iter().find(|path| Path::new(path).exists());
    let output = std::process::Command::new(program.unwrap_or("mkfs.ext4"))
        .args(["-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0"])
        .arg(path)
        .output()
        .context("cannot run mkfs.ext4; scripts/setup installs it")?;
    ensure!(output.status.success(), "mkfs.ext4: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

/// Collects what the guest says on this host's console.
fn listen(
    host: &Host,
    vm: &str,
    lines: &Arc<Mutex<Vec<Value>>>,
    heard: &Arc<AtomicBool>,
) -> Result<UnixStream> {
    let socket = host.folder.join(format!("{vm}.console"));
    let stream = until("the guest's console", || Ok(UnixStream::connect(&socket).ok()))?;
    let (reader, lines) = (BufReader::new(stream.try_clone()?), Arc::clone(lines));
    let heard = Arc::clone(heard);
    std::thread::spawn(move || {
        for line in reader.split(b'\n').map_while(Result::ok) {
            let line = String::from_utf8_lossy(&line);
            // Firmware and kernel have lines of their own, and one may have been cut at the switchover.
            if let Some(value) = line.find('{').and_then(|at| serde_json::from_str(line[at..].trim()).ok()) {
                lines.lock().unwrap_or_else(PoisonError::into_inner).push(value);
                heard.store(true, Ordering::SeqCst);
            }
        }
    });
    Ok(stream)
}

impl LinuxGuest {
    /// From now on its console is on this host. Waits until it says something there: what is sent to a VM that waits
    /// for its memory is lost.
    ///
    /// # Errors
    /// There is none, or it says nothing.
    pub fn moved_to(&self, host: &Host) -> Result<()> {
        let heard = Arc::default();
        let stream = listen(host, &self.vm, &self.lines, &heard)?;
        until("the guest's first word on its new host", || Ok(heard.load(Ordering::SeqCst).then_some(())))?;
        *self.console.lock().unwrap_or_else(PoisonError::into_inner) = stream;
        Ok(())
    }

    fn lines(&self) -> std::sync::MutexGuard<'_, Vec<Value>> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives it a command.
    ///
    /// # Errors
    /// Its console is gone.
    pub fn send(&self, command: &str) -> Result<()> {
        let mut console = self.console.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(console.write_all(format!("{command}\n").as_bytes())?)
    }

    /// How many lines it has said: [`LinuxGuest::wait_from`] looks behind them.
    #[must_use]
    pub fn mark(&self) -> usize {
        self.lines().len()
    }

    /// Waits for a line behind `mark` that has this key, and returns its value. No line may tell of trouble.
    ///
    /// # Errors
    /// There is none, or the guest saw something wrong.
    pub fn wait_from(&self, mark: usize, key: &str) -> Result<Value> {
        self.wait_where(mark, &format!("{key:?}"), |line| line.get(key).cloned())
    }

    fn wait_where<T>(&self, mark: usize, what: &str, wanted: impl Fn(&Value) -> Option<T>) -> Result<T> {
        let mut next = mark;
        let found = until(&format!("the guest saying {what}"), || {
            let lines = self.lines();
            for line in &lines[next..] {
                next += 1;
                check_line(line)?;
                if let Some(found) = wanted(line) {
                    return Ok(Some(found));
                }
            }
            Ok(None)
        });
        found.with_context(|| {
            let lines = self.lines();
            let from = lines.len().saturating_sub(3);
            format!("its last lines: {:?}", &lines[from..])
        })
    }

    /// Waits until it has done so many more operations, all of them right.
    ///
    /// # Errors
    /// It has not.
    pub fn goes_on(&self, operations: u64) -> Result<()> {
        let mark = self.mark();
        let ops = |line: &Value| line["ops"].as_u64();
        let before = self.wait_where(mark, "how many operations it has done", ops)?;
        self.wait_where(mark, "that it goes on", |line| ops(line).filter(|now| *now >= before + operations))
            .map(drop)
    }

    /// Gives a command that is answered with a line that has `key`.
    ///
    /// # Errors
    /// It is not.
    pub fn ask(&self, command: &str, key: &str) -> Result<Value> {
        let mark = self.mark();
        self.send(command)?;
        self.wait_from(mark, key)
    }

    /// Lets it read and check every block.
    ///
    /// # Errors
    /// A block is wrong, or cannot be read.
    pub fn verify(&self) -> Result<()> {
        let verified = self.ask("verify", "verified")?;
        let good = verified["errors"] == 0 && verified["mismatches"] == 0;
        ensure!(good, "the guest found {verified}");
        Ok(())
    }
}

fn check_line(line: &Value) -> Result<()> {
    for trouble in ["fatal", "error", "mismatch", "module_not_loaded", "unknown_command"] {
        if line.get(trouble).is_some() {
            bail!("the guest says {line}");
        }
    }
    for count in ["errors", "mismatches", "guest_resets"] {
        if line[count].as_u64().unwrap_or(0) > 0 {
            bail!("the guest says {line}");
        }
    }
    Ok(())
}
