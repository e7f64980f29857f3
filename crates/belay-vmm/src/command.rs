//! QEMU's arguments for a VM: its specification, plus where its sockets are on this host. No I/O.
//!
//! Both ends of a migration must be built alike: same machine version, memory backend id, device ids, PCI
//! addresses and queue counts. All of these come from the specification alone; what differs between hosts (paths,
//! user, accelerator, `-incoming`) is not part of the migrated state.

use crate::adopt::Adopted;
use crate::detect::{Accel, QemuVersion};
use crate::spec::{SpecError, VmSpec};
use std::path::{Path, PathBuf};

/// Where a disk's vhost-user socket is on this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskPlug {
    /// The device's name, as in the specification.
    pub device: String,
    /// The socket that the agent listens on for this device.
    pub socket: PathBuf,
}

/// Why there is no command line.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// The specification cannot be.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// A disk of the specification has no socket here.
    #[error("disk {device} of VM {vm} has no socket here; add the device to this agent first")]
    NoSocket {
        /// The VM.
        vm: String,
        /// The device.
        device: String,
    },
    /// QEMU takes paths as UTF-8 text only.
    #[error("path {0:?} is not UTF-8; QEMU options cannot name it")]
    PathNotText(PathBuf),
    /// The machine is still an alias, which two QEMUs would read differently.
    #[error("machine type {0} is an alias; resolve it against this QEMU's machines first")]
    MachineNotResolved(String),
}

/// Everything that QEMU's argument list depends on.
#[derive(Clone, Debug)]
pub struct QemuCommand<'a> {
    /// The VM.
    pub spec: &'a VmSpec,
    /// The QEMU that will read the arguments.
    pub version: QemuVersion,
    /// The accelerator to use here.
    pub accel: Accel,
    /// One socket per disk of the specification; the order does not matter.
    pub disks: &'a [DiskPlug],
    /// Where QEMU shall serve QMP.
    pub qmp_socket: &'a Path,
    /// Wait for a migration instead of booting.
    pub incoming: bool,
    /// User that QEMU becomes after it has opened its files; `None` keeps the agent's.
    pub user: Option<&'a str>,
}

/// Time between attempts to reach a device agent that is gone, ms.
const RECONNECT_MS: u32 = 100;

/// What a TCG guest has more of memory, KiB: QEMU rounds the size up to this.
const TCG_EXTRA_KIB: u64 = 8;

impl QemuCommand<'_> {
    /// The arguments, without the program's name.
    ///
    /// # Errors
    ///
    /// [`CommandError`] if the specification does not fit together with what is here.
    pub fn arguments(&self) -> Result<Vec<String>, CommandError> {
        let spec = self.spec;
        spec.check()?;
        if matches!(spec.machine.as_str(), "q35" | "pc" | "microvm") {
            return Err(CommandError::MachineNotResolved(spec.machine.clone()));
        }
        if let Some(adopted) = &spec.adopted {
            return self.adopted_arguments(adopted);
        }
        let mut args: Vec<String> = Vec::new();
        let mut push = |name: &str, value: String| args.extend([name.to_owned(), value]);
        push("-name", format!("guest={0},process=belay-{0}", spec.name));
        push("-machine", format!("{},memory-backend=mem0", spec.machine));
        push("-accel", self.accel.name().to_owned());
        push("-m", self.memory());
        push("-smp", spec.cpus.to_string());
        push("-object", format!("memory-backend-memfd,id=mem0,share=on,size={}", self.memory()));
        args.extend(["-nodefaults", "-no-user-config"].map(str::to_owned));
        let mut push = |name: &str, value: String| args.extend([name.to_owned(), value]);
        push("-display", "none".into());
        push("-qmp", format!("unix:{},server=on,wait=off", option_path(self.qmp_socket)?));
        self.disk_arguments(&mut push)?;
        let files = [("-kernel", &spec.kernel), ("-initrd", &spec.initrd)];
        for (name, file) in files {
            if let Some(file) = file {
                push(name, text(file)?.to_owned());
            }
        }
        if let Some(append) = &spec.append {
            push("-append", append.clone());
        }
        self.user_and_incoming(&mut args);
        args.extend(spec.args.iter().cloned());
        Ok(args)
    }

    /// The guest's memory as QEMU reads sizes.
    ///
    /// With TCG it is two pages larger than asked for. QEMU before 9.0 loses writes of a TCG guest to its memory between
    /// two passes of a migration if the block of memory is a multiple of 64 pages (mended in its commit 03bfc2188f);
    /// others it goes through page by page, and loses none. The size depends on nothing but the specification: both
    /// ends of a migration must have the same, whatever their versions.
    fn memory(&self) -> String {
        let mib = self.spec.memory_mib;
        match self.accel {
            Accel::Tcg => format!("{}k", mib * 1024 + TCG_EXTRA_KIB),
            Accel::Kvm => format!("{mib}M"),
        }
    }

    fn user_and_incoming(&self, args: &mut Vec<String>) {
        let mut push = |name: &str, value: String| args.extend([name.to_owned(), value]);
        if let Some(user) = self.user {
            if (self.version.major, self.version.minor) >= (9, 1) {
                push("-run-with", format!("user={}", escaped(user)));
            } else {
                push("-runas", user.to_owned());
            }
        }
        if self.incoming {
            push("-incoming", "defer".into());
        }
    }

    /// The arguments of an adopted VM, with this host's sockets.
    fn adopted_arguments(&self, adopted: &Adopted) -> Result<Vec<String>, CommandError> {
        let mut args = Vec::new();
        for argument in &adopted.arguments {
            let mut argument = argument.clone();
            for disk in &self.spec.disks {
                let placeholder = format!("{{socket:{}}}", disk.device);
                if argument.contains(&placeholder) {
                    argument = argument.replace(&placeholder, &self.socket_options(&disk.device)?);
                }
            }
            args.push(argument);
        }
        args.extend(["-qmp".into(), format!("unix:{},server=on,wait=off", option_path(self.qmp_socket)?)]);
        self.user_and_incoming(&mut args);
        Ok(args)
    }

    /// A chardev's options to reach a device's socket, and to reach it again.
    fn socket_options(&self, name: &str) -> Result<String, CommandError> {
        let plug = self
            .disks
            .iter()
            .find(|plug| plug.device == name)
            .ok_or_else(|| CommandError::NoSocket { vm: self.spec.name.clone(), device: name.to_owned() })?;
        // Reconnecting keeps the disk alive when the agent restarts: QEMU then hands back the in-flight region.
        // It also lets QEMU start before its backend; it then waits. But QEMU 7.2 does not greet a new backend
        // if the old one went away while the guest was paused (seen with 7.2.22; 10.0 does): the guest must run, or be
        // reset, for an agent to come back to it.
        let reconnect = if (self.version.major, self.version.minor) >= (9, 2) {
            format!("reconnect-ms={RECONNECT_MS}")
        } else {
            "reconnect=1".to_owned()
        };
        Ok(format!("path={},{reconnect}", option_path(&plug.socket)?))
    }

    fn disk_arguments(&self, push: &mut impl FnMut(&str, String)) -> Result<(), CommandError> {
        let spec = self.spec;
        for (disk, addr) in spec.disks.iter().zip(spec.disk_addresses()?) {
            let name = &disk.device;
            push("-chardev", format!("socket,id=chr-{name},{}", self.socket_options(name)?));
            let boot = disk.boot_index.map_or_else(String::new, |index| format!(",bootindex={index}"));
            let queues = spec.queues_of(disk);
            push(
                "-device",
                format!(
                    "vhost-user-blk-pci,id={name},chardev=chr-{name},num-queues={queues},addr={addr}{boot}"
                ),
            );
        }
        Ok(())
    }
}

fn text(path: &Path) -> Result<&str, CommandError> {
    path.to_str().ok_or_else(|| CommandError::PathNotText(path.to_owned()))
}

fn option_path(path: &Path) -> Result<String, CommandError> {
    text(path).map(escaped)
}

/// A comma ends a QEMU option unless it is doubled.
fn escaped(value: &str) -> String {
    value.replace(',', ",,")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec() -> VmSpec {
        let mut spec = VmSpec::from_toml(
            "name='web'\ncpus=2\ndisks=[{device='disk0',boot_index=0},{device='d1',pci_addr='0x08.1',queues=1}]\nargs=['-serial','null']",
        )
        .unwrap();
        spec.machine = "pc-q35-7.2".into();
        spec
    }

    fn plugs() -> [DiskPlug; 2] {
        ["d1", "disk0"]
            .map(|device| DiskPlug { device: device.into(), socket: format!("/run/a,b/{device}").into() })
    }

    fn line(spec: &VmSpec, version: (u32, u32), incoming: bool) -> String {
        let plugs = plugs();
        let command = QemuCommand {
            spec,
            version: QemuVersion { major: version.0, minor: version.1, micro: 0 },
            accel: Accel::Tcg,
            disks: &plugs,
            qmp_socket: Path::new("/run/q"),
            incoming,
            user: Some("nobody"),
        };
        command.arguments().unwrap().join(" ")
    }

    #[test]
    fn older_qemu_gets_its_own_spelling() {
        let line = line(&spec(), (7, 2), false);
        assert!(line.contains("-chardev socket,id=chr-disk0,path=/run/a,,b/disk0,reconnect=1 "), "{line}");
        assert!(line.contains(
            "-device vhost-user-blk-pci,id=disk0,chardev=chr-disk0,num-queues=2,addr=0x10.0,bootindex=0 "
        ));
        assert!(line.contains("id=d1,chardev=chr-d1,num-queues=1,addr=0x08.1 "), "{line}");
        assert!(line.contains("-machine pc-q35-7.2,memory-backend=mem0 "));
        assert!(line.contains("-runas nobody"));
        assert!(line.ends_with("-serial null") && !line.contains("-incoming"));
    }

    #[test]
    fn memory_of_a_tcg_guest_is_no_multiple_of_64_pages_whatever_the_version() {
        for version in [(7, 2), (10, 0)] {
            let line = line(&spec(), version, false);
            assert!(line.contains("-m 524296k ") && line.contains("share=on,size=524296k "), "{line}");
        }
    }

    #[test]
    fn newer_qemu_gets_milliseconds_and_run_with() {
        let line = line(&spec(), (10, 0), true);
        assert!(line.contains(",reconnect-ms=100 ") && line.contains("-run-with user=nobody "));
        assert!(line.contains("-incoming defer"));
    }

    #[test]
    fn disk_without_socket_is_refused() {
        let spec = spec();
        let command = QemuCommand {
            spec: &spec,
            version: QemuVersion { major: 7, minor: 2, micro: 0 },
            accel: Accel::Kvm,
            disks: &plugs()[..1],
            qmp_socket: Path::new("/run/q"),
            incoming: false,
            user: None,
        };
        assert!(
            matches!(command.arguments(), Err(CommandError::NoSocket { device, .. }) if device == "disk0")
        );
    }

    #[test]
    fn alias_of_a_machine_is_refused() {
        let mut spec = spec();
        spec.machine = "q35".into();
        let command = QemuCommand {
            spec: &spec,
            version: QemuVersion { major: 7, minor: 2, micro: 0 },
            accel: Accel::Kvm,
            disks: &plugs(),
            qmp_socket: Path::new("/run/q"),
            incoming: false,
            user: None,
        };
        assert!(matches!(command.arguments(), Err(CommandError::MachineNotResolved(_))));
    }
}
