//! What is harmless, option by option.

use std::path::{Path, PathBuf};

use crate::adopt::files_folder;
use crate::adopt::options::KeyValues;
use crate::spec::DiskSpec;

/// Options of which the kind, what stands first in their value, tells what they do.
pub(super) const KINDS: [&str; 9] =
    ["-device", "-netdev", "-nic", "-net", "-chardev", "-object", "-drive", "-blockdev", "-audiodev"];

/// Keys of `-netdev user` that give the guest a network and nothing else. Not here: `tftp` and `smb`, which serve
/// folders of this host, and `guestfwd`, which runs programs.
const USER_NETWORK: [&str; 21] = [
    "id",
    "type",
    "net",
    "host",
    "restrict",
    "hostname",
    "dhcpstart",
    "dns",
    "dnssearch",
    "domainname",
    "ipv4",
    "ipv6",
    "ipv6-net",
    "ipv6-prefix",
    "ipv6-prefixlen",
    "ipv6-host",
    "ipv6-dns",
    "hostfwd",
    "model",
    "mac",
    "macaddr",
];
/// Keys of a drive that says nothing but which file it is.
const DRIVE: [&str; 15] = [
    "if",
    "file",
    "format",
    "readonly",
    "read-only",
    "media",
    "id",
    "index",
    "unit",
    "bus",
    "cache",
    "aio",
    "werror",
    "rerror",
    "discard",
];
/// Keys of a block node, likewise.
const NODE: [&str; 9] = [
    "driver",
    "node-name",
    "read-only",
    "filename",
    "file",
    "cache.direct",
    "cache.no-flush",
    "discard",
    "aio",
];
/// Keys of a character device that QEMU makes itself.
const CHARDEV: [&str; 10] =
    ["backend", "id", "path", "server", "wait", "mux", "logfile", "logappend", "append", "size"];
/// Sources of random numbers.
const RANDOM: [&str; 3] = ["/dev/urandom", "/dev/random", "/dev/hwrng"];

/// Devices that are emulated, and use nothing of this host but what other arguments give them. A `*` at the end stands
/// for the rest of the name.
const DEVICES: [&str; 85] = [
    // Buses.
    "pcie-root-port",
    "pcie-pci-bridge",
    "pci-bridge",
    "pxb",
    "pxb-pcie",
    "ioh3420",
    "i82801b11-bridge",
    "x3130-upstream",
    "xio3130-downstream",
    "usb-hub",
    "nec-usb-xhci",
    "qemu-xhci",
    "usb-ehci",
    "ich9-usb-*",
    "piix3-usb-uhci",
    "piix4-usb-uhci",
    "pci-ohci",
    // Storage, on drives that are checked.
    "virtio-blk-pci",
    "virtio-blk-pci-transitional",
    "virtio-blk-pci-non-transitional",
    "virtio-scsi-pci",
    "virtio-scsi-pci-transitional",
    "virtio-scsi-pci-non-transitional",
    "scsi-hd",
    "scsi-cd",
    "ide-hd",
    "ide-cd",
    "ich9-ahci",
    "ahci",
    "lsi53c895a",
    "lsi53c810",
    "megasas",
    "megasas-gen2",
    "mptsas1068",
    "pvscsi",
    "nvme",
    "nvme-ns",
    "usb-storage",
    "sdhci-pci",
    "sd-card",
    // Network.
    "virtio-net-pci",
    "virtio-net-pci-transitional",
    "virtio-net-pci-non-transitional",
    "e1000*",
    "rtl8139",
    "vmxnet3",
    "pcnet",
    "ne2k_pci",
    "i8255*",
    "usb-net",
    // Consoles and input.
    "virtio-serial-pci",
    "virtio-serial-pci-transitional",
    "virtio-serial-pci-non-transitional",
    "virtserialport",
    "virtconsole",
    "isa-serial",
    "pci-serial*",
    "isa-debugcon",
    "usb-serial",
    "usb-kbd",
    "usb-mouse",
    "usb-tablet",
    "virtio-keyboard-pci",
    "virtio-mouse-pci",
    "virtio-tablet-pci",
    // Display and sound.
    "VGA",
    "secondary-vga",
    "bochs-display",
    "virtio-gpu-pci",
    "virtio-vga",
    "qxl*",
    "cirrus-vga",
    "ramfb",
    "intel-hda",
    "ich9-intel-hda",
    "hda-*",
    "AC97",
    // Others.
    "virtio-rng-pci*",
    "virtio-balloon-pci*",
    "virtio-mem-pci",
    "virtio-iommu-pci",
    "pvpanic*",
    "vmcoreinfo",
    "vmgenid",
    "*iommu",
];

/// What of this host a VM of another host may name.
pub(super) struct Source<'a> {
    pub(super) vm: &'a str,
    pub(super) disks: &'a [DiskSpec],
    pub(super) may_read: &'a dyn Fn(&Path) -> bool,
}

/// How an option's value is checked.
#[derive(Clone, Copy)]
pub(super) enum Rule {
    /// It has none.
    Flag,
    /// It cannot do harm.
    Anything,
    /// It cannot do harm unless it names a file.
    NoFile,
    /// A file that QEMU reads.
    Input,
    /// `key=value` pairs, of which these keys name files that QEMU reads.
    InputIn(&'static [&'static str]),
    /// A file or socket that QEMU makes.
    Output,
    /// A character device in the short form, such as `file:PATH`.
    Console,
    /// Nothing but `none`.
    None,
    /// By what it is for.
    Chardev,
    Device,
    Network,
    Object,
    Drive,
    Node,
    Machine,
    Global,
    Audio,
}

/// Why not: a file that may not be read, or everything else.
type Outcome = Result<(), Option<PathBuf>>;

fn require(holds: bool) -> Outcome {
    if holds { Ok(()) } else { Err(None) }
}

impl Rule {
    /// The rule of an option; none: it is refused, whatever its value.
    pub(super) fn of(option: &str) -> Option<Self> {
        Some(match option {
            "-nodefaults" | "-no-user-config" | "-no-reboot" | "-no-shutdown" | "-no-acpi" | "-no-hpet"
            | "-no-fd-bootchk" | "-enable-kvm" | "-only-migratable" | "-mem-prealloc" | "-usb"
            | "-nographic" | "-S" | "-win2k-hack" => Self::Flag,
            "-append" => Self::Anything,
            "-name" | "-uuid" | "-m" | "-smp" | "-cpu" | "-numa" | "-rtc" | "-vga" | "-k" | "-accel"
            | "-action" | "-watchdog-action" | "-overcommit" | "-msg" | "-sandbox" | "-compat" => {
                Self::NoFile
            }
            "-boot" => Self::InputIn(&["splash"]),
            "-smbios" => Self::InputIn(&["file", "path"]),
            "-fw_cfg" => Self::InputIn(&["file"]),
            "-kernel" | "-initrd" | "-dtb" | "-bios" | "-cdrom" | "-option-rom" => Self::Input,
            "-pidfile" | "-D" => Self::Output,
            "-serial" | "-parallel" | "-debugcon" | "-monitor" | "-qmp" | "-qmp-pretty" => Self::Console,
            "-display" | "-vnc" | "-gdb" | "-spice" => Self::None,
            "-mon" => Self::NoFile,
            "-chardev" => Self::Chardev,
            "-device" => Self::Device,
            "-netdev" | "-nic" | "-net" => Self::Network,
            "-object" => Self::Object,
            "-drive" => Self::Drive,
            "-blockdev" => Self::Node,
            "-machine" | "-M" => Self::Machine,
            "-global" => Self::Global,
            "-audiodev" => Self::Audio,
            _ => return None,
        })
    }

    /// Whether this value is harmless.
    pub(super) fn check(self, source: &Source<'_>, text: &str) -> Outcome {
        match self {
            Self::Flag | Self::Anything => Ok(()),
            Self::NoFile => require(!text.contains('/')),
            Self::Input => source.input(text),
            Self::Output => source.output(text),
            Self::Console => source.console(text),
            Self::None => require(text == "none"),
            _ => {
                let value = parse(text).ok_or(None)?;
                match self {
                    Self::InputIn(keys) => source.input_in(&value, keys),
                    Self::Chardev => source.chardev(text, &value),
                    Self::Device => source.device(&value),
                    Self::Network => source.network(&value),
                    Self::Object => source.object(&value),
                    Self::Drive => source.drive(&value),
                    Self::Node => source.node(&value),
                    Self::Machine => source.machine(&value),
                    Self::Global => source.properties(&value),
                    Self::Audio => require(value.kind("driver") == "none" && no_files(&value)),
                    _ => Err(None),
                }
            }
        }
    }
}

/// A value as QEMU would read it. What begins like JSON, but is none, could be read differently there.
fn parse(text: &str) -> Option<KeyValues> {
    let json = !text.starts_with('{') || serde_json::from_str::<serde_json::Map<_, _>>(text).is_ok();
    json.then(|| KeyValues::parse(text))
}

fn only(value: &KeyValues, keys: &[&str]) -> Outcome {
    require(value.iter().all(|(key, _)| keys.contains(&key)))
}

fn no_files(value: &KeyValues) -> bool {
    value.iter().all(|(key, value)| !value.contains('/') && !key.contains('/'))
}

/// All that a value says under a key: QEMU counts one of them, or all.
fn all<'a>(value: &'a KeyValues, key: &'a str) -> impl Iterator<Item = &'a str> {
    value.iter().filter(move |(known, _)| *known == key).map(|(_, value)| value)
}

impl Source<'_> {
    /// A file that QEMU reads. Its whole path, so that QEMU looks nowhere else.
    fn input(&self, path: &str) -> Outcome {
        let file = PathBuf::from(path);
        if !file.is_absolute() {
            return Err(None);
        }
        if (self.may_read)(&file) { Ok(()) } else { Err(Some(file)) }
    }

    fn input_in(&self, value: &KeyValues, keys: &[&str]) -> Outcome {
        value.iter().filter(|(key, _)| keys.contains(key)).try_for_each(|(_, path)| self.input(path))?;
        // A list of files, or a reference to something else.
        require(!value.iter().any(|(key, _)| key.starts_with("gen_") || key == "data"))
    }

    fn output(&self, path: &str) -> Outcome {
        require(is_own_output(self.vm, path))
    }

    /// `file:PATH`, `unix:PATH,server=on`, `chardev:ID`, `mon:…`.
    fn console(&self, text: &str) -> Outcome {
        let text = text.strip_prefix("mon:").unwrap_or(text);
        if let Some(path) = text.strip_prefix("file:") {
            return self.output(path);
        }
        if let Some(rest) = text.strip_prefix("unix:") {
            let value = KeyValues::parse(rest);
            only(&value, &["server", "wait"])?;
            require(all(&value, "server").all(is_on) && all(&value, "server").next().is_some())?;
            return self.output(value.first.as_deref().unwrap_or_default());
        }
        let id = text.strip_prefix("chardev:").unwrap_or_default();
        let given = ["none", "null", "stdio", "vc", "pty"].contains(&text);
        require(given || (!id.is_empty() && !id.contains(['/', ',', ':'])))
    }

    /// Nothing that connects to somewhere, or reads: a console that talks to a monitor would give the guest what the
    /// monitor's user has.
    fn chardev(&self, text: &str, value: &KeyValues) -> Outcome {
        if let Some((_, device)) = text.split_once(",{socket:") {
            // Of a VM that was adopted: the agent puts the socket of one of the VM's own devices here.
            let id = value.get("id").unwrap_or_default();
            let whole = |disk: &&DiskSpec| text == format!("socket,id={id},{{socket:{}}}", disk.device);
            return require(!device.is_empty() && self.disks.iter().any(|disk| whole(&disk)));
        }
        only(value, &CHARDEV)?;
        for path in all(value, "path").chain(all(value, "logfile")) {
            self.output(path)?;
        }
        let made = all(value, "path").next().is_some();
        let server = all(value, "server").next().is_some() && all(value, "server").all(is_on);
        let kinds: Vec<&str> = value.first.as_deref().into_iter().chain(all(value, "backend")).collect();
        let harmless = |kind: &&str| match *kind {
            "null" | "ringbuf" | "stdio" | "vc" | "pty" => true,
            "file" => made,
            "socket" => made && server,
            _ => false,
        };
        require(!kinds.is_empty() && kinds.iter().all(harmless))
    }

    fn device(&self, value: &KeyValues) -> Outcome {
        let kinds: Vec<&str> = value.first.as_deref().into_iter().chain(all(value, "driver")).collect();
        let known = |kind: &&str| {
            DEVICES.iter().any(|known| match (known.strip_prefix('*'), known.strip_suffix('*')) {
                (Some(end), _) => kind.ends_with(end),
                (_, Some(beginning)) => kind.starts_with(beginning),
                _ => kind == known,
            })
        };
        // Of a VM that was adopted, on a socket that is checked as its chardev is.
        let disk = |kind: &&str| kind.starts_with("vhost-user-blk-pci") && !self.disks.is_empty();
        require(!kinds.is_empty() && kinds.iter().all(|kind| known(kind) || disk(kind)))?;
        self.properties(value)
    }

    /// No property names a file but the ROM's.
    fn properties(&self, value: &KeyValues) -> Outcome {
        for (key, text) in value.iter() {
            let rom =
                key == "romfile" || key.ends_with(".romfile") || (key == "property" && text == "romfile");
            let file = if key == "property" { value.get("value").unwrap_or_default() } else { text };
            if rom && !file.is_empty() {
                self.input(file)?;
            } else if !rom && text.contains('/') {
                // The value of `romfile` in the long form, which has been looked at.
                let of_rom = key == "value" && all(value, "property").all(|property| property == "romfile");
                require(of_rom && (self.may_read)(Path::new(text)))?;
            }
        }
        require(value.first.as_deref().is_none_or(|first| !first.contains('/')))
    }

    fn network(&self, value: &KeyValues) -> Outcome {
        let kinds: Vec<&str> = value.first.as_deref().into_iter().chain(all(value, "type")).collect();
        let harmless = |kind: &&str| matches!(*kind, "user" | "none" | "nic");
        require(!kinds.is_empty() && kinds.iter().all(harmless))?;
        only(value, &USER_NETWORK)?;
        // Addresses with a prefix length have a slash, files do not stand under these keys.
        require(
            all(value, "hostfwd")
                .all(|rule| rule.starts_with("tcp:") || rule.starts_with("udp:") || rule.starts_with(':')),
        )
    }

    fn object(&self, value: &KeyValues) -> Outcome {
        let kinds: Vec<&str> = value.first.as_deref().into_iter().chain(all(value, "qom-type")).collect();
        let kind = match kinds.as_slice() {
            [kind] => *kind,
            _ => return Err(None),
        };
        match kind {
            "rng-random" => require(value.iter().all(|(key, text)| {
                matches!(key, "id" | "qom-type") || (key == "filename" && RANDOM.contains(&text))
            })),
            "rng-builtin"
            | "iothread"
            | "throttle-group"
            | "memory-backend-memfd"
            | "memory-backend-ram"
            | "thread-context" => require(no_files(value)),
            _ => Err(None),
        }
    }

    /// A file that is only read, or none.
    fn drive(&self, value: &KeyValues) -> Outcome {
        require(value.first.is_none())?;
        only(value, &DRIVE)?;
        let off = |key| all(value, key).any(|text| !is_on(text));
        let read_only = value.get("readonly").is_some() || value.get("read-only").is_some();
        let cdrom = value.get("media").is_some() && all(value, "media").all(|media| media == "cdrom");
        require((read_only || cdrom) && !off("readonly") && !off("read-only"))?;
        all(value, "file").filter(|file| !file.is_empty()).try_for_each(|file| self.input(file))
    }

    /// The same, as a block node.
    fn node(&self, value: &KeyValues) -> Outcome {
        require(value.first.is_none())?;
        only(value, &NODE)?;
        let kinds: Vec<&str> = all(value, "driver").collect();
        match kinds.as_slice() {
            ["raw"] => require(
                all(value, "file").all(|node| !node.contains(['/', '{'])) && value.get("filename").is_none(),
            ),
            ["file"] => {
                let read_only =
                    all(value, "read-only").next().is_some() && all(value, "read-only").all(is_on);
                require(read_only && value.get("file").is_none())?;
                all(value, "filename").try_for_each(|file| self.input(file))
            }
            _ => Err(None),
        }
    }

    fn machine(&self, value: &KeyValues) -> Outcome {
        for (key, text) in value.iter() {
            match key {
                "kernel" | "initrd" | "dtb" | "firmware" => self.input(text)?,
                "append" => {}
                "dumpdtb" => return Err(None),
                _ => require(!text.contains('/'))?,
            }
        }
        Ok(())
    }
}

fn is_on(text: &str) -> bool {
    matches!(text, "on" | "yes" | "true" | "y")
}

/// Whether a file or socket that QEMU makes is one of this VM's, in the folder of whichever host, and nothing of the
/// agent's: `{runtime_dir}/NAME.x`, or `{runtime_dir}/vms/NAME.d/x`.
pub(crate) fn is_own_output(vm: &str, path: &str) -> bool {
    let plain = |name: &str| {
        name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte))
            && !name.is_empty()
            && !name.starts_with('.')
    };
    let Some(inside) = path.strip_prefix("{runtime_dir}/") else { return false };
    if let Some(name) = inside.strip_prefix(&format!("{}/", files_folder(vm).display())) {
        return plain(name);
    }
    let ending = inside.strip_prefix(vm).and_then(|rest| rest.strip_prefix('.'));
    // `agent.sock` is the agent's.
    vm != "agent" && ending.is_some_and(|ending| plain(ending) && !ending.contains('.'))
}
