//! Two hosts on one machine, with a real `belay agent` each and real QEMU VMs: what end-to-end tests stand on.
//!
//! Needs no root: the hosts are 127.0.0.1 and 127.0.0.2, everything of theirs is in a temporary directory. All
//! processes end with the [`Bed`], also when a test fails.
//!
//! A [`Bed`] is made with [`Bed::start`], a VM with [`Host::run_boot_guest`] or [`Host::run_linux_guest`]. Tests wait
//! for states with [`until`], never for times.

mod bed;
mod guest;
mod host;
mod peer;
mod process;
mod qmp;

pub use bed::Bed;
pub use guest::{BootGuest, Counts, LinuxGuest, LinuxOptions};
pub use host::Host;
pub use peer::{Line, Peer};
pub use process::Background;
pub use qmp::Qmp;

use std::fmt::Display;
use std::io::Write as _;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// How long anything may take before a test gives it up: far longer than it takes on a busy machine.
pub const LIMIT: Duration = Duration::from_secs(90);
/// Time between two looks at a state.
const LOOK_EVERY: Duration = Duration::from_millis(5);

/// Looks until there is something to see.
///
/// # Errors
/// There is nothing within [`LIMIT`]; or `look` fails.
pub fn until<T>(what: &str, mut look: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let deadline = Instant::now() + LIMIT;
    loop {
        if let Some(seen) = look()? {
            return Ok(seen);
        }
        if Instant::now() > deadline {
            bail!("waited {} s in vain: {what}", LIMIT.as_secs());
        }
        std::thread::sleep(LOOK_EVERY);
    }
}

/// Says that the test that runs is skipped, by its name, and why.
pub fn skip(reason: impl Display) {
    let thread = std::thread::current();
    // The harness names its threads after the tests, and hides what a test that passes has printed: not this.
    let _ = writeln!(std::io::stderr(), "skipped {}: {reason}", thread.name().unwrap_or("a test"));
}

/// Why there can be no VM here, if there can be none.
#[must_use]
pub fn no_qemu() -> Option<String> {
    let named = std::env::var("BELAY_QEMU").ok().filter(|name| !name.is_empty());
    let qemu = named.unwrap_or_else(|| "qemu-system-x86_64".to_owned());
    let ran = std::process::Command::new(&qemu).arg("-version").output();
    match ran {
        Ok(output) if output.status.success() => None,
        Ok(output) => Some(format!("{qemu}: {}", String::from_utf8_lossy(&output.stderr).trim())),
        Err(error) => Some(format!("{qemu}: {error}; scripts/setup installs it")),
    }
}

/// Where the Linux guest is, or why it is not here.
///
/// # Errors
/// It has not been made.
pub fn linux_guest() -> Result<PathBuf> {
    let folder = std::env::var_os("BELAY_GUEST")
        .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../.cache/guest"), PathBuf::from);
    if folder.join("initrd.img").is_file() {
        Ok(folder.canonicalize()?)
    } else {
        bail!("there is no guest in {}; scripts/guest-image makes it", folder.display())
    }
}
