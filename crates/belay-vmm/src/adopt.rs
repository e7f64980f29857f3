//! A QEMU that somebody else started: how to start it at another host. No I/O.
//!
//! Its own arguments are the best description there is, so they are kept, in their order (QEMU gives PCI addresses
//! in that order), and only what belongs to this host is replaced: the sockets of Belay's devices, other sockets,
//! logs, the machine's alias, the accelerator's choice. What cannot be at another host is refused: see [`Refusal`].

pub(crate) mod options;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use self::options::{KeyValues, pairs};
use crate::command::DiskPlug;
use crate::policy::is_own_output;
use crate::spec::{AccelChoice, DiskSpec, VmSpec};

/// Arguments of a QEMU that was adopted, ready for another host.
///
/// `{socket:DEVICE}` stands for a device's socket and the way to reconnect to it, `{runtime_dir}` for the folder of
/// whichever host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Adopted {
    /// The arguments, without the program, its monitor of Belay, its user and `-incoming`.
    pub arguments: Vec<String>,
    /// Files that must be at the same place on every host.
    pub needs: Vec<PathBuf>,
}

/// Where files are, relative to `{runtime_dir}`, that an adopted QEMU made somewhere else. The folder must be there.
#[must_use]
pub fn files_folder(vm: &str) -> PathBuf {
    PathBuf::from("vms").join(format!("{vm}.d"))
}

/// What is known about the QEMU that runs.
pub struct Running<'a> {
    /// What the VM shall be called.
    pub name: &'a str,
    /// Its arguments, without the program.
    pub arguments: &'a [String],
    /// Its machine type, versioned (QMP knows it).
    pub machine: &'a str,
    /// Whether it runs with KVM (QMP knows it).
    pub kvm: bool,
    /// Guest memory, MiB.
    pub memory_mib: u64,
    /// CPUs.
    pub cpus: u16,
    /// Ids of the devices that it has now, in no order (QMP knows them).
    pub plugged: &'a BTreeSet<String>,
    /// Its QMP socket that Belay uses.
    pub qmp: &'a Path,
    /// This agent's folder of sockets.
    pub runtime_dir: &'a Path,
    /// This agent's devices.
    pub sockets: &'a [DiskPlug],
    /// Devices that are recognised by their socket's file name alone: QEMU may see it at another path.
    pub by_name: &'a [String],
    /// A path of QEMU's made absolute and free of links.
    pub resolve: &'a dyn Fn(&Path) -> PathBuf,
}

/// Why a running VM cannot be taken.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// No device of this agent.
    #[error(
        "none of its vhost-user sockets is a device of this agent; `belay device show NAME` shows a device's socket"
    )]
    NoDevice,
    /// A vhost-user socket of something else.
    #[error("{device} uses the vhost-user socket {path}, which is no device of this agent")]
    OtherBackend {
        /// QEMU's device or netdev.
        device: String,
        /// The socket.
        path: String,
    },
    /// Memory that only QEMU can see.
    #[error(
        "its memory is not shared, so no vhost-user device can reach it: start QEMU with -object memory-backend-memfd,id=mem0,share=on,size=… and -machine …,memory-backend=mem0"
    )]
    MemoryNotShared,
    /// A disk that is only here.
    #[error(
        "{option} has a writable file of this host ({file}), which would not move with the VM: make it a device of Belay, or read-only"
    )]
    LocalDisk {
        /// The option.
        option: String,
        /// The file.
        file: String,
    },
    /// A device of this host.
    #[error("{option} gives the VM hardware of this host ({what}), which cannot move with it")]
    HostDevice {
        /// The option.
        option: String,
        /// What.
        what: String,
    },
    /// A file descriptor that QEMU inherited.
    #[error(
        "{option} uses a file descriptor that QEMU inherited from who started it (libvirt does that); how to make it at another host is not known"
    )]
    Inherited {
        /// The option.
        option: String,
    },
    /// Options that are not on the command line.
    #[error("{0} takes options from a file, which is not looked into; put them on QEMU's command line")]
    OptionsElsewhere(String),
    /// Plugged in since.
    #[error("device {0} was plugged in after QEMU had been started; unplug it, or start QEMU with it")]
    PluggedLater(String),
    /// Unplugged since.
    #[error("device {0} of QEMU's command line has been unplugged; the other host's QEMU would have it")]
    Unplugged(String),
    /// The result is no specification.
    #[error("{0}")]
    Spec(String),
}

/// The specification with which this VM can be started at any host with these devices.
///
/// # Errors
///
/// [`Refusal`] says what is in the way, and what to do.
pub fn specification(running: &Running<'_>) -> Result<VmSpec, Refusal> {
    let pairs = pairs(running.arguments);
    let backends = Backends::find(running, &pairs);
    let mut taker = Taker::new(running, &backends);
    for (option, value) in &pairs {
        taker.take(option, value.as_deref())?;
    }
    taker.check_backends(&backends)?;
    taker.check_memory()?;
    taker.check_plugged()?;
    let disks = backends.disks();
    if disks.is_empty() {
        return Err(Refusal::NoDevice);
    }
    let accel = if running.kvm { AccelChoice::Kvm } else { AccelChoice::Tcg };
    let spec = VmSpec {
        name: running.name.to_owned(),
        memory_mib: running.memory_mib,
        cpus: running.cpus,
        machine: running.machine.to_owned(),
        accel,
        disks,
        qemu: None,
        args: Vec::new(),
        kernel: None,
        initrd: None,
        append: None,
        adopted: Some(taker.finish()),
    };
    spec.check().map_err(|error| Refusal::Spec(error.to_string()))?;
    Ok(spec)
}

/// The devices to which this QEMU would not come back if the agent were restarted: it was not told to reconnect.
#[must_use]
pub fn not_reconnecting(running: &Running<'_>) -> Vec<String> {
    let backends = Backends::find(running, &pairs(running.arguments)).0;
    backends.into_iter().filter(|backend| !backend.reconnects).filter_map(|backend| backend.device).collect()
}

/// A chardev that connects to a Unix socket.
struct Backend {
    chardev: String,
    path: String,
    device: Option<String>,
    reconnects: bool,
}

/// All of these.
struct Backends(Vec<Backend>);

impl Backends {
    fn find(running: &Running<'_>, pairs: &[(String, Option<String>)]) -> Self {
        let chardevs = pairs.iter().filter(|(option, _)| option == "-chardev");
        let clients = chardevs.filter_map(|(_, value)| {
            let value = KeyValues::parse(value.as_deref()?);
            let path = value.get("path")?.to_owned();
            let client = value.kind("backend") == "socket" && !value.is_on("server", false);
            let device = device_of(running, Path::new(&path));
            let reconnects = ["reconnect", "reconnect-ms"]
                .iter()
                .any(|key| value.get(key).is_some_and(|time| time != "0"));
            let chardev = value.get("id").unwrap_or_default().to_owned();
            client.then_some(Backend { chardev, path, device, reconnects })
        });
        Self(clients.collect())
    }

    fn get(&self, chardev: &str) -> Option<&Backend> {
        self.0.iter().find(|backend| backend.chardev == chardev)
    }

    fn disks(&self) -> Vec<DiskSpec> {
        let devices = self.0.iter().filter_map(|backend| backend.device.clone());
        devices.map(|device| DiskSpec { device, pci_addr: None, queues: None, boot_index: None }).collect()
    }
}

fn device_of(running: &Running<'_>, path: &Path) -> Option<String> {
    let real = (running.resolve)(path);
    let by_path = running.sockets.iter().find(|plug| (running.resolve)(&plug.socket) == real);
    let file = path.file_name()?.to_str()?.strip_suffix(".sock")?;
    by_path
        .map(|plug| plug.device.clone())
        .or_else(|| running.by_name.iter().find(|device| *device == file).cloned())
}

/// Goes through the options, and collects the new ones.
struct Taker<'a> {
    running: &'a Running<'a>,
    backends: &'a Backends,
    arguments: Vec<String>,
    needs: BTreeSet<PathBuf>,
    taken_names: BTreeSet<String>,
    /// Options of the machine, without its type and accelerator.
    machine: Vec<KeyValues>,
    accel: Option<String>,
    display: bool,
    memory_users: BTreeSet<String>,
    memory_shared: BTreeSet<String>,
    ids: BTreeSet<String>,
    /// Chardevs of vhost-user devices, and who uses them.
    vhost_user: Vec<(String, String)>,
}

impl<'a> Taker<'a> {
    fn new(running: &'a Running<'a>, backends: &'a Backends) -> Self {
        Self {
            running,
            backends,
            arguments: Vec::new(),
            needs: BTreeSet::new(),
            taken_names: BTreeSet::new(),
            machine: Vec::new(),
            accel: None,
            display: false,
            memory_users: BTreeSet::new(),
            memory_shared: BTreeSet::new(),
            ids: BTreeSet::new(),
            vhost_user: Vec::new(),
        }
    }

    fn push(&mut self, option: &str, value: Option<String>) {
        self.arguments.push(option.to_owned());
        self.arguments.extend(value);
    }

    fn take(&mut self, option: &str, text: Option<&str>) -> Result<(), Refusal> {
        let text = text.unwrap_or_default();
        match option {
            // The other host's agent says these itself.
            "-daemonize" | "-S" | "-enable-kvm" | "-incoming" | "-runas" | "-run-with" | "-chroot" => {}
            // Where that host's QEMU has its firmware, it knows itself; what the guest has of it comes with its memory.
            "-L" => {}
            "-machine" | "-M" => self.machine(text),
            "-accel" => self.accelerator(text),
            "-chardev" => self.chardev(text)?,
            "-qmp" | "-qmp-pretty" | "-monitor" | "-serial" | "-parallel" | "-debugcon" | "-gdb" => {
                self.old_chardev(option, text);
            }
            "-mon" => self.monitor(text),
            "-pidfile" | "-D" => {
                let path = self.output(text);
                self.push(option, Some(path));
            }
            "-kernel" | "-initrd" | "-dtb" | "-cdrom" => self.input(option, text),
            "-bios" if text.contains('/') => self.input(option, text),
            "-fw_cfg" | "-smbios" | "-acpitable" => self.input_in(option, text, "file"),
            "" | "-hda" | "-hdb" | "-hdc" | "-hdd" | "-pflash" | "-sd" | "-mtdblock" | "-fda" | "-fdb" => {
                return Err(Refusal::LocalDisk { option: option.trim().to_owned(), file: text.to_owned() });
            }
            "-drive" | "-blockdev" => self.disk(option, text)?,
            "-device" => self.device(text)?,
            "-netdev" | "-net" | "-nic" => self.network(option, text)?,
            "-object" => self.object(text)?,
            "-numa" => {
                self.memory_users.extend(KeyValues::parse(text).get("memdev").map(str::to_owned));
                self.push(option, Some(text.to_owned()));
            }
            "-mem-path" => return Err(Refusal::MemoryNotShared),
            "-virtfs" | "-fsdev" => {
                return Err(Refusal::HostDevice { option: option.to_owned(), what: text.to_owned() });
            }
            "-readconfig" => return Err(Refusal::OptionsElsewhere(option.to_owned())),
            "-add-fd" => return Err(Refusal::Inherited { option: option.to_owned() }),
            "-display" | "-vnc" | "-spice" | "-nographic" | "-curses" | "-sdl" => self.display(option, text),
            _ => self.push(option, (!text.is_empty()).then(|| text.to_owned())),
        }
        Ok(())
    }

    fn machine(&mut self, text: &str) {
        let mut value = KeyValues::parse(text);
        value.first = None;
        value.remove("type");
        value.remove("accel");
        self.memory_users.extend(value.get("memory-backend").map(str::to_owned));
        self.machine.push(value);
    }

    /// Of several accelerators QEMU uses the first that works: the other host's must use the same one.
    fn accelerator(&mut self, text: &str) {
        let mut value = KeyValues::parse(text);
        let used = if self.running.kvm { "kvm" } else { "tcg" };
        if value.kind("accel") == used {
            value.first = Some(used.to_owned());
            value.remove("accel");
            self.accel = Some(value.to_string());
        }
    }

    fn chardev(&mut self, text: &str) -> Result<(), Refusal> {
        let mut value = KeyValues::parse(text);
        refuse_inherited("-chardev", &value)?;
        let id = value.get("id").unwrap_or_default().to_owned();
        if let Some(device) = self.backends.get(&id).and_then(|backend| backend.device.clone()) {
            self.push("-chardev", Some(format!("socket,id={id},{{socket:{device}}}")));
            return Ok(());
        }
        let kind = value.kind("backend").to_owned();
        if let Some(path) = value.get("path").map(str::to_owned) {
            if self.is_our_monitor(&path) {
                return Ok(());
            }
            // A socket that QEMU listens on, or a file that it writes; what it connects to is somebody else's.
            if (kind == "socket" && value.is_on("server", false)) || matches!(kind.as_str(), "file" | "pipe")
            {
                value.set("path", &self.output(&path));
            }
        }
        if let Some(log) = value.get("logfile").map(str::to_owned) {
            value.set("logfile", &self.output(&log));
        }
        self.push("-chardev", Some(value.to_string()));
        Ok(())
    }

    fn is_our_monitor(&self, path: &str) -> bool {
        (self.running.resolve)(Path::new(path)) == (self.running.resolve)(self.running.qmp)
    }

    /// `unix:PATH,server=on`, `file:PATH`, with `mon:` before it or not.
    fn old_chardev(&mut self, option: &str, text: &str) {
        let (mux, rest) = text.strip_prefix("mon:").map_or(("", text), |rest| ("mon:", rest));
        for kind in ["unix:", "file:", "pipe:"] {
            let Some(rest) = rest.strip_prefix(kind) else { continue };
            let mut value = KeyValues::parse(rest);
            let Some(path) = value.first.clone() else { break };
            if kind == "unix:" && self.is_our_monitor(&path) {
                return;
            }
            if kind != "unix:" || value.is_on("server", false) {
                value.first = Some(self.output(&path));
            }
            self.push(option, Some(format!("{mux}{kind}{value}")));
            return;
        }
        self.push(option, Some(text.to_owned()));
    }

    /// The monitor on Belay's QMP socket goes: the other host's agent makes its own.
    fn monitor(&mut self, text: &str) {
        let value = KeyValues::parse(text);
        let chardev = value.kind("chardev");
        let gone = pairs(self.running.arguments).iter().any(|(option, text)| {
            let value = KeyValues::parse(text.as_deref().unwrap_or_default());
            option == "-chardev"
                && value.get("id") == Some(chardev)
                && value.get("path").is_some_and(|path| self.is_our_monitor(path))
        });
        if !gone {
            self.push("-mon", Some(text.to_owned()));
        }
    }

    fn display(&mut self, option: &str, text: &str) {
        self.display = true;
        let own_window = matches!(option, "-curses" | "-sdl")
            || matches!(KeyValues::parse(text).kind("type"), "gtk" | "sdl" | "curses" | "spice-app");
        match option {
            "-display" | "-curses" | "-sdl" if own_window => self.push("-display", Some("none".to_owned())),
            "-vnc" => self.old_chardev(option, text),
            _ => self.push(option, (!text.is_empty()).then(|| text.to_owned())),
        }
    }

    /// Where a file that QEMU makes is at the other host.
    fn output(&mut self, path: &str) -> String {
        let real = (self.running.resolve)(Path::new(path));
        let base = (self.running.resolve)(self.running.runtime_dir);
        if let Ok(inside) = real.strip_prefix(&base) {
            let inside = format!("{{runtime_dir}}/{}", inside.display());
            if is_own_output(self.running.name, &inside) {
                return inside;
            }
        }
        if real.starts_with("/dev") {
            return path.to_owned();
        }
        let mut file = real.file_name().unwrap_or_default().to_string_lossy().into_owned();
        while !self.taken_names.insert(file.clone()) {
            file.push('_');
        }
        format!("{{runtime_dir}}/{}/{file}", files_folder(self.running.name).display())
    }

    /// A file that QEMU reads: it must be at the same place there.
    fn input(&mut self, option: &str, path: &str) {
        let path = (self.running.resolve)(Path::new(path));
        self.push(option, Some(path.display().to_string()));
        self.needs.insert(path);
    }

    fn input_in(&mut self, option: &str, text: &str, key: &str) {
        let mut value = KeyValues::parse(text);
        if let Some(path) = value.get(key) {
            let path = (self.running.resolve)(Path::new(path));
            value.set(key, &path.display().to_string());
            self.needs.insert(path);
            self.push(option, Some(value.to_string()));
        } else {
            self.push(option, Some(text.to_owned()));
        }
    }

    fn disk(&mut self, option: &str, text: &str) -> Result<(), Refusal> {
        let value = KeyValues::parse(text);
        refuse_inherited(option, &value)?;
        let read_only = ["readonly", "read-only"].iter().any(|key| value.is_on(key, false))
            || value.get("media") == Some("cdrom");
        if let Some(file) = local_file(option, &value) {
            if !read_only {
                return Err(Refusal::LocalDisk { option: option.to_owned(), file });
            }
            // Relative paths stay as they are named only if they are absolute already.
            self.needs.insert((self.running.resolve)(Path::new(&file)));
        }
        self.push(option, Some(text.to_owned()));
        Ok(())
    }

    fn device(&mut self, text: &str) -> Result<(), Refusal> {
        let value = KeyValues::parse(text);
        refuse_inherited("-device", &value)?;
        let driver = value.kind("driver");
        if driver.starts_with("vfio") || driver == "usb-host" || driver == "scsi-block" {
            let what = value.get("host").or_else(|| value.get("sysfsdev")).unwrap_or(driver);
            return Err(Refusal::HostDevice { option: format!("-device {driver}"), what: what.to_owned() });
        }
        if let (true, Some(chardev)) = (driver.starts_with("vhost-user"), value.get("chardev")) {
            let who = value.get("id").map_or_else(|| driver.to_owned(), |id| format!("device {id}"));
            self.vhost_user.push((chardev.to_owned(), who));
        }
        self.ids.extend(value.get("id").map(str::to_owned));
        self.push("-device", Some(text.to_owned()));
        Ok(())
    }

    fn network(&mut self, option: &str, text: &str) -> Result<(), Refusal> {
        let value = KeyValues::parse(text);
        refuse_inherited(option, &value)?;
        if value.kind("type") == "vhost-user" {
            let who = format!("netdev {}", value.get("id").unwrap_or_default());
            self.vhost_user.push((value.get("chardev").unwrap_or_default().to_owned(), who));
        }
        self.push(option, Some(text.to_owned()));
        Ok(())
    }

    fn object(&mut self, text: &str) -> Result<(), Refusal> {
        let value = KeyValues::parse(text);
        refuse_inherited("-object", &value)?;
        let kind = value.kind("qom-type");
        // A memfd is shared unless it is said otherwise.
        if kind.starts_with("memory-backend") && value.is_on("share", kind.ends_with("-memfd")) {
            self.memory_shared.extend(value.get("id").map(str::to_owned));
        }
        self.push("-object", Some(text.to_owned()));
        Ok(())
    }

    fn check_backends(&self, backends: &Backends) -> Result<(), Refusal> {
        for (chardev, device) in &self.vhost_user {
            let backend = backends.get(chardev);
            if backend.is_none_or(|backend| backend.device.is_none()) {
                let path = backend.map_or_else(|| format!("of chardev {chardev}"), |b| b.path.clone());
                return Err(Refusal::OtherBackend { device: device.clone(), path });
            }
        }
        Ok(())
    }

    fn check_memory(&self) -> Result<(), Refusal> {
        let all_shared = self.memory_users.iter().all(|id| self.memory_shared.contains(id));
        if self.memory_users.is_empty() || !all_shared { Err(Refusal::MemoryNotShared) } else { Ok(()) }
    }

    fn check_plugged(&self) -> Result<(), Refusal> {
        if let Some(id) = self.running.plugged.difference(&self.ids).next() {
            return Err(Refusal::PluggedLater(id.clone()));
        }
        match self.ids.difference(self.running.plugged).next() {
            Some(id) => Err(Refusal::Unplugged(id.clone())),
            None => Ok(()),
        }
    }

    fn finish(self) -> Adopted {
        let options = self.machine.iter().flat_map(KeyValues::iter);
        let machine = options.fold(self.running.machine.to_owned(), |text, (key, value)| {
            format!("{text},{key}={}", value.replace(',', ",,"))
        });
        let used = if self.running.kvm { "kvm" } else { "tcg" };
        let accel = self.accel.unwrap_or_else(|| used.to_owned());
        let mut arguments: Vec<String> = ["-machine", &machine, "-accel", &accel].map(str::to_owned).into();
        if !self.display {
            // Without a word about it QEMU would open a window, or a VNC port.
            arguments.extend(["-display", "none"].map(str::to_owned));
        }
        arguments.extend(self.arguments);
        Adopted { arguments, needs: self.needs.into_iter().collect() }
    }
}

fn refuse_inherited(option: &str, value: &KeyValues) -> Result<(), Refusal> {
    let inherited = value.iter().any(|(key, value)| {
        matches!(key, "fd" | "fds" | "vhostfd" | "vhostfds" | "fdset") || value.starts_with("/dev/fdset/")
    });
    if inherited { Err(Refusal::Inherited { option: option.to_owned() }) } else { Ok(()) }
}

/// The file of this host behind a drive or block node, if it has one.
fn local_file(option: &str, value: &KeyValues) -> Option<String> {
    let node = value.get("file").filter(|file| file.starts_with('{')).map(KeyValues::parse);
    if let Some(node) = node {
        return local_file("-blockdev", &node);
    }
    let driver = value.get("file.driver").or_else(|| value.get("driver")).unwrap_or_default();
    if option == "-blockdev" {
        let local = matches!(driver, "file" | "host_device" | "host_cdrom");
        let file = value.get("file.filename").or_else(|| value.get("filename")).unwrap_or_default();
        return local.then(|| file.to_owned());
    }
    let file = value.get("file").or_else(|| value.get("file.filename"))?;
    // `nbd://…`, `rbd:…`: at other hosts, too.
    let protocol = file.split_once(':').is_some_and(|(protocol, _)| !protocol.contains('/'));
    (!protocol || file.starts_with("file:")).then(|| file.strip_prefix("file:").unwrap_or(file).to_owned())
}

#[cfg(test)]
#[path = "adopt/tests.rs"]
mod tests;
