//! Which QEMU is on this host, what it can do, and whether KVM works here.
//!
//! `/dev/kvm` may exist and still not run a guest (nested virtualisation, containers). So KVM is chosen only after
//! a trial: a boot-sector guest must do verified disk I/O, and a Linux kernel, if one is at hand, must come up.

use crate::migrate::MachineInfo;
use crate::spec::AccelChoice;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::fmt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::process::Command;

/// Environment variable that names the QEMU to use.
pub const QEMU_VARIABLE: &str = "BELAY_QEMU";

/// The QEMU that is looked for in `PATH`.
pub const QEMU_NAME: &str = "qemu-system-x86_64";

/// The oldest QEMU that Belay was proven with.
pub const OLDEST_QEMU: QemuVersion = QemuVersion { major: 7, minor: 2, micro: 0 };

/// How long `qemu -version` may take (the first start reads a cold disk).
const HELP_LIMIT: Duration = Duration::from_secs(20);

/// How long a boot-sector guest may take to do its I/O. TCG needs 0.2 s.
const BOOT_SECTOR_LIMIT: Duration = Duration::from_secs(5);

/// How long a kernel may take to boot. TCG needs 4 s.
const KERNEL_LIMIT: Duration = Duration::from_secs(10);

/// Verified operations that a trial guest must do.
const TRIAL_OPERATIONS: usize = 32;

/// Size of the trial guest's disk, bytes: more than the boot-sector guest's region.
const TRIAL_DISK_BYTES: u64 = 4 << 20;

/// What is wrong with the QEMU of this host.
#[derive(Debug, thiserror::Error)]
pub enum DetectError {
    /// No QEMU.
    #[error(
        "{0} is not here; install it (Debian, Ubuntu: apt-get install qemu-system-x86), or set `qemu` or BELAY_QEMU"
    )]
    NotFound(PathBuf),
    /// It does not start.
    #[error("cannot run {path}: {source}")]
    Run {
        /// The program.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// It did not answer as QEMU does.
    #[error("{path} is not a usable QEMU: {output}")]
    NotQemu {
        /// The program.
        path: PathBuf,
        /// What it said.
        output: String,
    },
    /// Older than Belay supports.
    #[error("{path} is QEMU {found}; Belay needs {OLDEST_QEMU} or later")]
    TooOld {
        /// The program.
        path: PathBuf,
        /// Its version.
        found: QemuVersion,
    },
    /// `accel = "kvm"`, and it does not work.
    #[error("KVM does not work here: {0}; use accel = \"tcg\", or \"auto\" to choose")]
    NoKvm(String),
}

/// A QEMU version.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct QemuVersion {
    /// First number.
    pub major: u32,
    /// Second number.
    pub minor: u32,
    /// Third number.
    pub micro: u32,
}

impl QemuVersion {
    /// From QMP's `{"major":…,"minor":…,"micro":…}`.
    #[must_use]
    pub fn from_qmp(value: &Value) -> Option<Self> {
        serde_json::from_value(value.clone()).ok()
    }

    /// From the output of `qemu -version`.
    #[must_use]
    pub fn from_banner(text: &str) -> Option<Self> {
        let number = text.strip_prefix("QEMU emulator version ")?;
        let number = number.split(|c: char| !c.is_ascii_digit() && c != '.').next()?;
        let mut parts = number.split('.').map(str::parse);
        let mut part = || parts.next()?.ok();
        Some(Self { major: part()?, minor: part()?, micro: part().unwrap_or(0) })
    }
}

impl fmt::Display for QemuVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.micro)
    }
}

/// An accelerator that a VM runs with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Accel {
    /// The processor's own virtualisation.
    Kvm,
    /// QEMU's translator.
    Tcg,
}

impl Accel {
    /// QEMU's name of it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        }
    }

    /// The accelerator to use, when a trial ([`Qemu::try_kvm`]) came out as `kvm`.
    ///
    /// # Errors
    ///
    /// [`DetectError::NoKvm`] if KVM was demanded and does not work.
    pub fn choose(choice: AccelChoice, kvm: Result<(), String>) -> Result<Self, DetectError> {
        match (choice, kvm) {
            (AccelChoice::Tcg, _) => Ok(Self::Tcg),
            (_, Ok(())) => Ok(Self::Kvm),
            (AccelChoice::Kvm, Err(why)) => Err(DetectError::NoKvm(why)),
            (AccelChoice::Auto, Err(_)) => Ok(Self::Tcg),
        }
    }
}

/// A QEMU of this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Qemu {
    /// The program.
    pub path: PathBuf,
    /// Its version.
    pub version: QemuVersion,
}

impl Qemu {
    /// Finds QEMU (`configured`, else `BELAY_QEMU`, else in `PATH`) and asks for its version.
    ///
    /// # Errors
    ///
    /// [`DetectError`] if it is missing, does not start, or is too old.
    pub async fn find(configured: Option<&Path>) -> Result<Self, DetectError> {
        let named = configured
            .map(Path::to_owned)
            .or_else(|| std::env::var_os(QEMU_VARIABLE).filter(|value| !value.is_empty()).map(PathBuf::from));
        let path = match named {
            Some(path) => resolve(&path).ok_or(DetectError::NotFound(path))?,
            None => resolve(Path::new(QEMU_NAME)).ok_or_else(|| DetectError::NotFound(QEMU_NAME.into()))?,
        };
        let output = help(&path, &["-version"]).await?;
        let Some(version) = QemuVersion::from_banner(&output) else {
            return Err(DetectError::NotQemu { path, output: first_line(&output) });
        };
        if version < OLDEST_QEMU {
            return Err(DetectError::TooOld { path, found: version });
        }
        Ok(Self { path, version })
    }

    /// Its machine types, without starting a VM.
    ///
    /// # Errors
    ///
    /// [`DetectError`] if it does not start.
    pub async fn machines(&self) -> Result<Vec<MachineInfo>, DetectError> {
        let output = help(&self.path, &["-machine", "help"]).await?;
        Ok(output.lines().filter_map(machine_of_line).collect())
    }

    /// Whether KVM works: a trial boot of the boot-sector guest, and of `kernel` (without it, of a kernel in `/boot`,
    /// if there is one). Takes up to 15 s
    /// where KVM is broken: keep the result.
    ///
    /// # Errors
    ///
    /// What did not work.
    pub async fn try_kvm(&self, kernel: Option<&Path>) -> Result<(), String> {
        std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/kvm")
            .map_err(|error| format!("/dev/kvm: {error}"))?;
        self.try_boot_sector(Accel::Kvm).await?;
        match kernel.map(Path::to_owned).or_else(kernel_in_boot) {
            Some(kernel) => self.try_kernel(Accel::Kvm, &kernel).await,
            None => Ok(()),
        }
    }

    /// Boots the boot-sector guest and waits for its verified disk operations.
    ///
    /// # Errors
    ///
    /// What did not work.
    pub async fn try_boot_sector(&self, accel: Accel) -> Result<(), String> {
        let disk = TrialDisk::create().map_err(|error| format!("trial disk: {error}"))?;
        let drive = format!("if=ide,format=raw,file={}", disk.0.display().to_string().replace(',', ",,"));
        let done = |output: &str| {
            let operations = output.matches(belay_probe::boot::OP_DONE as char).count();
            let failed = output.contains(belay_probe::boot::OP_ERROR as char)
                || output.contains(belay_probe::boot::OP_MISMATCH as char);
            if failed {
                Some(Err("a trial guest's disk I/O failed".into()))
            } else {
                (operations >= TRIAL_OPERATIONS).then_some(Ok(()))
            }
        };
        self.trial(accel, "pc", &["-m", "32", "-drive", &drive], BOOT_SECTOR_LIMIT, done).await
    }

    /// Boots `kernel` without an initrd until it looks for its root file system.
    ///
    /// # Errors
    ///
    /// What did not work.
    pub async fn try_kernel(&self, accel: Accel, kernel: &Path) -> Result<(), String> {
        let kernel = kernel.to_str().ok_or("the kernel's path is not UTF-8")?;
        let arguments = ["-m", "256", "-kernel", kernel, "-append", "console=ttyS0 panic=-1 root=/dev/none"];
        let done = |output: &str| {
            (output.contains("VFS: Cannot open root device") || output.contains("Kernel panic"))
                .then_some(Ok(()))
        };
        self.trial(accel, "q35", &arguments, KERNEL_LIMIT, done).await
    }

    async fn trial(
        &self,
        accel: Accel,
        machine: &str,
        arguments: &[&str],
        limit: Duration,
        done: impl Fn(&str) -> Option<Result<(), String>>,
    ) -> Result<(), String> {
        let mut child = Command::new(&self.path)
            .args(["-accel", accel.name(), "-machine", machine])
            .args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-serial", "stdio"])
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .map_err(|error| format!("cannot run {}: {error}", self.path.display()))?;
        let (Some(mut stdout), Some(mut stderr)) = (child.stdout.take(), child.stderr.take()) else {
            return Err("no output".into());
        };
        let watched = tokio::time::timeout(limit, watch(&mut stdout, done)).await;
        // Only after that: a VMM that still runs would never end its stderr.
        let _ = child.kill().await;
        match watched {
            Ok(Some(result)) => result,
            Ok(None) => {
                let mut said = String::new();
                let _ = stderr.read_to_string(&mut said).await;
                Err(format!("a trial guest ended early: {}", first_line(&said)))
            }
            Err(_) => Err(format!("a trial guest did not come up within {limit:?}")),
        }
    }
}

/// Reads until `done` says so; `None` if the output ends first.
async fn watch<T>(output: &mut (impl AsyncRead + Unpin), done: impl Fn(&str) -> Option<T>) -> Option<T> {
    let mut seen = Vec::new();
    loop {
        if let Some(result) = done(&String::from_utf8_lossy(&seen)) {
            return Some(result);
        }
        match output.read_buf(&mut seen).await {
            Ok(0) | Err(_) => return None,
            Ok(_) => {}
        }
    }
}

/// A disk image in the temporary directory that boots the boot-sector guest; removed when dropped.
struct TrialDisk(PathBuf);

impl TrialDisk {
    fn create() -> std::io::Result<Self> {
        use std::io::Write;
        use std::sync::atomic::{AtomicU32, Ordering};
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("belay-trial-{}-{count}.img", std::process::id()));
        let mut file = std::fs::OpenOptions::new().write(true).create_new(true).open(&path)?;
        let disk = Self(path);
        file.write_all(&belay_probe::boot_sector())?;
        file.set_len(TRIAL_DISK_BYTES)?;
        Ok(disk)
    }
}

impl Drop for TrialDisk {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// A kernel of the host that is readable.
fn kernel_in_boot() -> Option<PathBuf> {
    let mut kernels: Vec<PathBuf> = std::fs::read_dir("/boot")
        .ok()?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("vmlinuz-")))
        .filter(|path| std::fs::File::open(path).is_ok())
        .collect();
    kernels.sort();
    kernels.pop()
}

/// A program by path, or by name in `PATH`.
fn resolve(program: &Path) -> Option<PathBuf> {
    if program.components().count() > 1 {
        return program.is_file().then(|| std::path::absolute(program).ok()).flatten();
    }
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|dir| dir.join(program)).find(|file| file.is_file())
}

async fn help(path: &Path, arguments: &[&str]) -> Result<String, DetectError> {
    let run = Command::new(path).args(arguments).stdin(Stdio::null()).kill_on_drop(true).output();
    let output = match tokio::time::timeout(HELP_LIMIT, run).await {
        Ok(Ok(output)) => output,
        Ok(Err(source)) => return Err(DetectError::Run { path: path.to_owned(), source }),
        Err(_) => {
            return Err(DetectError::NotQemu { path: path.to_owned(), output: "it does not answer".into() });
        }
    };
    if !output.status.success() {
        let said = first_line(&String::from_utf8_lossy(&output.stderr));
        return Err(DetectError::NotQemu {
            path: path.to_owned(),
            output: format!("{} {said}", output.status),
        });
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// `q35    Standard PC (Q35 + ICH9, 2009) (alias of pc-q35-7.2)` → that name and alias.
fn machine_of_line(line: &str) -> Option<MachineInfo> {
    let (name, description) = line.split_once(char::is_whitespace)?;
    if name == "Supported" {
        return None;
    }
    Some(match description.split_once("(alias of ") {
        Some((_, rest)) => MachineInfo {
            name: rest.trim_end().trim_end_matches(')').to_owned(),
            alias: Some(name.to_owned()),
        },
        None => MachineInfo { name: name.to_owned(), alias: None },
    })
}

fn first_line(text: &str) -> String {
    text.lines().next().unwrap_or("it said nothing").chars().take(200).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn banners_of_distributions_are_read() {
        let version = |text| QemuVersion::from_banner(text).map(|version| version.to_string());
        let debian = "QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)\nCopyright";
        assert_eq!(version(debian).as_deref(), Some("7.2.22"));
        assert_eq!(version("QEMU emulator version 10.0.2").as_deref(), Some("10.0.2"));
        assert_eq!(version("QEMU emulator version 9.2.50-dirty").as_deref(), Some("9.2.50"));
        assert_eq!(version("busybox"), None);
    }

    #[test]
    fn alias_line_gives_the_versioned_name() {
        let line = "q35                  Standard PC (Q35 + ICH9, 2009) (alias of pc-q35-7.2)";
        let machine = machine_of_line(line).unwrap();
        assert_eq!((machine.name.as_str(), machine.alias.as_deref()), ("pc-q35-7.2", Some("q35")));
        assert!(machine_of_line("Supported machines are:").is_none());
        assert_eq!(machine_of_line("none                 empty machine").unwrap().name, "none");
    }

    #[tokio::test]
    async fn missing_qemu_is_named() {
        let error = Qemu::find(Some(Path::new("/nonexistent/qemu"))).await.unwrap_err();
        assert!(error.to_string().contains("/nonexistent/qemu is not here"), "{error}");
    }

    #[tokio::test]
    async fn program_that_is_no_qemu_is_refused() {
        let error = Qemu::find(Some(Path::new("/bin/echo"))).await.unwrap_err();
        assert!(matches!(error, DetectError::NotQemu { .. }), "{error}");
    }
}
