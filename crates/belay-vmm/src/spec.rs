//! The VM's specification: the TOML file of `belay vm run`, and what the source tells the destination in JSON.
//!
//! ```toml
//! name = "web"
//! memory_mib = 2048
//! cpus = 2
//! disks = [{ device = "disk0", boot_index = 0 }]
//! args = ["-netdev", "user,id=n0", "-device", "virtio-net-pci,netdev=n0,addr=0x2"]
//! ```

use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// The first PCI slot of a disk that names none. Slots below are left to the devices in `args`.
pub const FIRST_DISK_SLOT: u8 = 0x10;

/// The last slot that a disk may have: q35 has its own devices at 0x1f.
pub const LAST_DISK_SLOT: u8 = 0x1e;

/// vhost-user-blk offers at most this many queues in Belay.
pub const MAX_QUEUES: u16 = 64;

/// A disk that names no number of queues gets one per CPU, up to this many.
pub const DEFAULT_MAX_QUEUES: u16 = 4;

/// Longest name of a VM or device: it must fit into socket paths (108 bytes in all).
pub const MAX_NAME_BYTES: usize = 48;

const KEYS: [&str; 11] =
    ["name", "memory_mib", "cpus", "machine", "accel", "disks", "qemu", "args", "kernel", "initrd", "append"];
const DISK_KEYS: [&str; 4] = ["device", "pci_addr", "queues", "boot_index"];

/// A VM: what QEMU is started with, on whichever host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmSpec {
    /// The VM's name.
    pub name: String,
    /// Guest memory, MiB.
    #[serde(default = "default_memory_mib")]
    pub memory_mib: u64,
    /// Virtual CPUs.
    #[serde(default = "default_cpus")]
    pub cpus: u16,
    /// Machine type, such as `q35` or `pc-q35-7.2`. An alias is resolved when the VM first starts
    /// ([`VmSpec::resolve_machine`]), so that both ends of a migration use the same version.
    #[serde(default = "default_machine")]
    pub machine: String,
    /// Accelerator.
    #[serde(default)]
    pub accel: AccelChoice,
    /// Disks that are Belay devices.
    #[serde(default)]
    pub disks: Vec<DiskSpec>,
    /// The QEMU binary; without it `BELAY_QEMU`, else `qemu-system-x86_64` in `PATH`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub qemu: Option<PathBuf>,
    /// More QEMU arguments, for everything that Belay does not serve.
    #[serde(default)]
    pub args: Vec<String>,
    /// Kernel to boot directly.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel: Option<PathBuf>,
    /// Its initial ramdisk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initrd: Option<PathBuf>,
    /// Its command line.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub append: Option<String>,
    /// How an adopted VM is started, in place of everything above but name, accelerator and devices. Not a key of the
    /// file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub adopted: Option<crate::adopt::Adopted>,
}

fn default_memory_mib() -> u64 {
    512
}

fn default_cpus() -> u16 {
    1
}

fn default_machine() -> String {
    "q35".into()
}

/// A disk of a VM: one Belay device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskSpec {
    /// The Belay device's name.
    pub device: String,
    /// PCI slot (`0x10`) or slot and function (`0x10.1`); by default 0x10 upwards, in the order of the disks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pci_addr: Option<PciAddr>,
    /// Request queues; by default one per CPU, at most 4.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queues: Option<u16>,
    /// Boot order; the lowest boots first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boot_index: Option<u16>,
}

/// How the guest's CPU is run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AccelChoice {
    /// KVM if a trial boot works, else TCG.
    #[default]
    Auto,
    /// KVM, or an error.
    Kvm,
    /// QEMU's translator: slow, works everywhere.
    Tcg,
}

/// A place on the machine's first PCI bus.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct PciAddr {
    /// Slot, 1 to 31.
    pub slot: u8,
    /// Function, 0 to 7.
    pub function: u8,
}

impl fmt::Display for PciAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#04x}.{}", self.slot, self.function)
    }
}

impl FromStr for PciAddr {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let refuse = || {
            format!(
                "{text:?} is no PCI address; write a slot from 0x01 to 0x1f, or slot.function such as 0x10.0"
            )
        };
        let (slot, function) = text.split_once('.').unwrap_or((text, "0"));
        let slot = u8::from_str_radix(slot.trim_start_matches("0x"), 16).map_err(|_| refuse())?;
        let function = u8::from_str(function).map_err(|_| refuse())?;
        if !(1..=0x1f).contains(&slot) || function > 7 {
            return Err(refuse());
        }
        Ok(Self { slot, function })
    }
}

impl Serialize for PciAddr {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for PciAddr {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// Why a specification is refused.
#[derive(Debug, thiserror::Error)]
pub enum SpecError {
    /// The file cannot be read.
    #[error("cannot read {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A key that means nothing here.
    #[error("unknown key `{key}`{}", suggestion(.nearest))]
    UnknownKey {
        /// The key, with the table it stands in.
        key: String,
        /// The key that was probably meant.
        nearest: Option<&'static str>,
    },
    /// Not TOML, or a value of the wrong type.
    #[error("{0}")]
    Syntax(String),
    /// A value that cannot be.
    #[error("{key}: {why}")]
    Value {
        /// The key.
        key: String,
        /// What is wrong and what would be right.
        why: String,
    },
    /// The machine type is not one of this QEMU's.
    #[error("this QEMU has no machine type {machine:?}{}", suggestion(.nearest))]
    UnknownMachine {
        /// What was asked for.
        machine: String,
        /// What is nearest.
        nearest: Option<String>,
    },
}

fn suggestion(nearest: &Option<impl AsRef<str>>) -> String {
    nearest.as_ref().map_or_else(String::new, |nearest| format!("; did you mean `{}`?", nearest.as_ref()))
}

impl VmSpec {
    /// Reads and checks a TOML text.
    ///
    /// # Errors
    ///
    /// [`SpecError`] names the key and what is wrong with it.
    pub fn from_toml(text: &str) -> Result<Self, SpecError> {
        let table: toml::Table =
            toml::from_str(text).map_err(|error| SpecError::Syntax(error.to_string()))?;
        check_keys("", table.keys(), &KEYS)?;
        if let Some(disks) = table.get("disks").and_then(toml::Value::as_array) {
            for (index, disk) in disks.iter().enumerate() {
                let Some(disk) = disk.as_table() else { continue };
                check_keys(&format!("disks[{index}]."), disk.keys(), &DISK_KEYS)?;
            }
        }
        // Parsed from the text again: only then do errors show line and column.
        let spec: Self = toml::from_str(text).map_err(|error| SpecError::Syntax(error.to_string()))?;
        spec.check()?;
        Ok(spec)
    }

    /// Reads and checks a TOML file. Relative paths of kernel, initrd and qemu start at the file's directory.
    ///
    /// # Errors
    ///
    /// As [`from_toml`](Self::from_toml), or [`SpecError::Read`].
    pub fn load(path: &Path) -> Result<Self, SpecError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| SpecError::Read { path: path.to_owned(), source })?;
        let mut spec = Self::from_toml(&text)?;
        let base = std::path::absolute(path).ok().and_then(|path| path.parent().map(Path::to_owned));
        if let Some(base) = base {
            spec.start_paths_at(&base);
        }
        Ok(spec)
    }

    /// Lets relative paths of kernel, initrd and qemu start at a folder.
    pub fn start_paths_at(&mut self, folder: &Path) {
        for file in [&mut self.kernel, &mut self.initrd, &mut self.qemu].into_iter().flatten() {
            *file = folder.join(&*file);
        }
    }

    /// Checks every value. A specification that came from a peer is checked, too.
    ///
    /// # Errors
    ///
    /// [`SpecError::Value`] for the first that cannot be.
    pub fn check(&self) -> Result<(), SpecError> {
        check_name("name", &self.name)?;
        require((16..=1 << 30).contains(&self.memory_mib), "memory_mib", || {
            format!("{} MiB of memory; at least 16 are needed", self.memory_mib)
        })?;
        require((1..=1024).contains(&self.cpus), "cpus", || {
            format!("{} is not between 1 and 1024", self.cpus)
        })?;
        let plain = |c: char| c.is_ascii_alphanumeric() || "-._".contains(c);
        require(!self.machine.is_empty() && self.machine.chars().all(plain), "machine", || {
            format!("{:?} is no machine type; options of the machine go into args", self.machine)
        })?;
        require(self.kernel.is_some() || (self.initrd.is_none() && self.append.is_none()), "kernel", || {
            "initrd and append need a kernel".into()
        })?;
        let mut devices = BTreeSet::new();
        for (index, disk) in self.disks.iter().enumerate() {
            let key = |field: &str| format!("disks[{index}].{field}");
            check_name(&key("device"), &disk.device)?;
            require(devices.insert(&disk.device), &key("device"), || {
                format!("{} is plugged twice", disk.device)
            })?;
            require(disk.queues.is_none_or(|n| (1..=MAX_QUEUES).contains(&n)), &key("queues"), || {
                format!("a disk has 1 to {MAX_QUEUES} queues")
            })?;
        }
        // An adopted VM's disks are where its own arguments say.
        if self.adopted.is_some() { Ok(()) } else { self.disk_addresses().map(drop) }
    }

    /// Each disk's place on the PCI bus, in the order of [`disks`](Self::disks). The same on every host.
    ///
    /// # Errors
    ///
    /// [`SpecError::Value`] if two disks want one place, or there are more disks than places.
    pub fn disk_addresses(&self) -> Result<Vec<PciAddr>, SpecError> {
        let mut taken = BTreeSet::new();
        for (index, disk) in self.disks.iter().enumerate() {
            let Some(addr) = disk.pci_addr else { continue };
            require(taken.insert(addr), &format!("disks[{index}].pci_addr"), || format!("{addr} is taken"))?;
        }
        let used: BTreeSet<u8> = taken.iter().map(|addr| addr.slot).collect();
        let mut free = (FIRST_DISK_SLOT..=LAST_DISK_SLOT).filter(|slot| !used.contains(slot));
        let place = |disk: &DiskSpec| {
            disk.pci_addr.or_else(|| free.next().map(|slot| PciAddr { slot, function: 0 })).ok_or_else(|| {
                SpecError::Value {
                    key: "disks".into(),
                    why: "more disks than PCI slots; give some a pci_addr with a function".into(),
                }
            })
        };
        self.disks.iter().map(place).collect()
    }

    /// The number of queues of a disk of this VM.
    #[must_use]
    pub fn queues_of(&self, disk: &DiskSpec) -> u16 {
        disk.queues.unwrap_or_else(|| self.cpus.clamp(1, DEFAULT_MAX_QUEUES))
    }

    /// Replaces an alias such as `q35` by the versioned type it stands for, such as `pc-q35-7.2`.
    ///
    /// `machines` are those of the QEMU that the VM first starts on ([`Qemu::machines`](crate::Qemu::machines)).
    /// At the destination, where the name is versioned already, this only checks that it exists there.
    ///
    /// # Errors
    ///
    /// [`SpecError::UnknownMachine`] if this QEMU has no such machine.
    pub fn resolve_machine(&mut self, machines: &[crate::MachineInfo]) -> Result<(), SpecError> {
        if let Some(found) = machines.iter().find(|m| m.alias.as_deref() == Some(&self.machine)) {
            self.machine.clone_from(&found.name);
        } else if !machines.iter().any(|m| m.name == self.machine) {
            let names = machines.iter().flat_map(|m| m.alias.iter().chain([&m.name]));
            let nearest = names.max_by(|a, b| {
                let near = |name: &str| strsim::jaro_winkler(name, &self.machine);
                near(a).total_cmp(&near(b))
            });
            let nearest = nearest.cloned();
            return Err(SpecError::UnknownMachine { machine: self.machine.clone(), nearest });
        }
        Ok(())
    }
}

fn require(holds: bool, key: &str, why: impl FnOnce() -> String) -> Result<(), SpecError> {
    if holds { Ok(()) } else { Err(SpecError::Value { key: key.to_owned(), why: why() }) }
}

/// Names become file names, socket names and QEMU ids.
fn check_name(key: &str, name: &str) -> Result<(), SpecError> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-._".contains(c);
    let good = name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name.chars().all(plain)
        && name.len() <= MAX_NAME_BYTES;
    require(good, key, || {
        format!(
            "{name:?} is no name: letters, digits, `-`, `.`, `_`, at most {MAX_NAME_BYTES}, a letter or digit first"
        )
    })
}

fn check_keys<'a>(
    table: &str,
    keys: impl Iterator<Item = &'a String>,
    known: &[&'static str],
) -> Result<(), SpecError> {
    for key in keys {
        if !known.contains(&key.as_str()) {
            let nearest = known
                .iter()
                .copied()
                .filter(|known| strsim::jaro_winkler(known, key) > 0.7)
                .max_by(|a, b| strsim::jaro_winkler(a, key).total_cmp(&strsim::jaro_winkler(b, key)));
            return Err(SpecError::UnknownKey { key: format!("{table}{key}"), nearest });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const SPEC: &str = r#"
        name = "web"
        memory_mib = 256
        cpus = 8
        disks = [{ device = "disk0", boot_index = 0 }, { device = "d1", pci_addr = "0x10", queues = 2 }, { device = "d2" }]
        args = ["-device", "virtio-rng-pci"]
        kernel = "/boot/vmlinuz"
        append = "console=ttyS0"
    "#;

    #[test]
    fn spec_through_json_is_the_same() {
        let spec = VmSpec::from_toml(SPEC).unwrap();
        assert_eq!(spec.machine, "q35");
        assert_eq!(spec.accel, AccelChoice::Auto);
        let json = serde_json::to_string(&spec).unwrap();
        assert_eq!(serde_json::from_str::<VmSpec>(&json).unwrap(), spec);
    }

    #[test]
    fn disks_without_address_get_the_free_slots_in_order() {
        let spec = VmSpec::from_toml(SPEC).unwrap();
        let slots: Vec<u8> = spec.disk_addresses().unwrap().iter().map(|addr| addr.slot).collect();
        assert_eq!(slots, [0x11, 0x10, 0x12]);
        assert_eq!(spec.queues_of(&spec.disks[0]), DEFAULT_MAX_QUEUES);
        assert_eq!(spec.queues_of(&spec.disks[1]), 2);
    }

    #[test]
    fn unknown_key_names_the_nearest() {
        let refused = |text: &str| VmSpec::from_toml(text).unwrap_err().to_string();
        assert_eq!(refused("name='a'\nmemory_mb=1"), "unknown key `memory_mb`; did you mean `memory_mib`?");
        assert_eq!(
            refused("name='a'\ndisks=[{devise='d'}]"),
            "unknown key `disks[0].devise`; did you mean `device`?"
        );
        assert_eq!(refused("name='a'\nzzz=1"), "unknown key `zzz`");
    }

    #[test]
    fn impossible_values_are_refused_by_key() {
        let bad = [
            ("name='../x'", "name"),
            ("name='a'\nmemory_mib=1", "memory_mib"),
            ("name='a'\ncpus=0", "cpus"),
            ("name='a'\nmachine='q35,dump=on'", "machine"),
            ("name='a'\ninitrd='x'", "kernel"),
            ("name='a'\ndisks=[{device='d'},{device='d'}]", "disks[1].device"),
            ("name='a'\ndisks=[{device='d',queues=65}]", "disks[0].queues"),
            (
                "name='a'\ndisks=[{device='d',pci_addr='0x10'},{device='e',pci_addr='10.0'}]",
                "disks[1].pci_addr",
            ),
        ];
        for (text, key) in bad {
            match VmSpec::from_toml(text) {
                Err(SpecError::Value { key: named, .. }) => assert_eq!(named, key),
                other => panic!("{text:?} gave {other:?}"),
            }
        }
        assert!(matches!(
            VmSpec::from_toml("name='a'\ndisks=[{device='d',pci_addr='0x20'}]"),
            Err(SpecError::Syntax(_))
        ));
        assert!(matches!(VmSpec::from_toml("name="), Err(SpecError::Syntax(_))));
    }

    #[test]
    fn machine_alias_becomes_the_versioned_type() {
        let machine = |name: &str, alias: Option<&str>| crate::MachineInfo {
            name: name.into(),
            alias: alias.map(Into::into),
        };
        let machines = [machine("pc-q35-7.2", Some("q35")), machine("pc-q35-7.1", None)];
        let mut spec = VmSpec::from_toml("name='a'").unwrap();
        spec.resolve_machine(&machines).unwrap();
        assert_eq!(spec.machine, "pc-q35-7.2");
        spec.resolve_machine(&machines).unwrap();
        spec.machine = "pc-q35-9.9".into();
        assert!(matches!(
            spec.resolve_machine(&machines),
            Err(SpecError::UnknownMachine { nearest: Some(_), .. })
        ));
    }
}
