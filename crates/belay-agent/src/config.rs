//! The agent's configuration file.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::new_device::NewDevice;

/// Why a configuration is not used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration {path}: {source}", path = .path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// It does not say what it should.
    #[error("{path}: {message}", path = .path.display())]
    Invalid {
        /// Which.
        path: PathBuf,
        /// What and where; names the nearest known key.
        message: String,
    },
}

/// The whole file. Every key has a default.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// This host's name, as in its certificate; default: the certificate's.
    pub host_name: Option<String>,
    /// Where the ledger, maps and keys are kept.
    pub state_dir: PathBuf,
    /// Where sockets are: `agent.sock`, `devices/NAME.sock`, `vms/NAME.qmp`.
    pub runtime_dir: PathBuf,
    /// Certificates and keys; default: `pki` in `state_dir`.
    pub pki_dir: Option<PathBuf>,
    /// Where a disk that follows its VM is created; default: `images` in `state_dir`.
    pub images_dir: Option<PathBuf>,
    /// Connections of agents.
    pub link: LinkConfig,
    /// Addresses (`host:port`) of other hosts, besides those that were learnt when enrolling.
    pub peers: BTreeMap<String, Vec<String>>,
    /// QEMU.
    pub vmm: VmmConfig,
    /// Copying disks.
    pub exchange: ExchangeConfig,
    /// The threads that serve devices.
    pub data_plane: DataPlaneConfig,
    /// Devices that are added when the agent starts, if this host has never had one of that name.
    pub device: Vec<NewDevice>,
}

/// `[link]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LinkConfig {
    /// Where other agents connect, `address:port`.
    pub listen: String,
    /// A ping goes out after so much silence, in milliseconds.
    pub heartbeat_ms: u64,
    /// A connection is given up after so much silence, in milliseconds.
    pub dead_after_ms: u64,
}

/// `[vmm]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct VmmConfig {
    /// The QEMU binary; default: `BELAY_QEMU`, else `qemu-system-x86_64` in PATH.
    pub qemu: Option<PathBuf>,
    /// The user that QEMU runs as; default: the agent's.
    pub user: Option<String>,
    /// The limit of a VM's memory transfer, in bytes per second; 0: 4 GiB/s.
    pub migration_bandwidth_bytes_per_s: u64,
    /// QEMU arguments that other hosts may choose for a VM that they send here, besides those that are harmless.
    pub allow_args: Vec<String>,
    /// Folders with files that such a VM may read: kernels, firmware, images of CDs.
    pub allow_paths: Vec<PathBuf>,
}

/// `[exchange]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ExchangeConfig {
    /// The copier's limit, in bytes per second; 0: none.
    pub bandwidth_bytes_per_s: u64,
    /// Bytes that the copier asks for at a time.
    pub in_flight_bytes: u64,
}

/// `[data_plane]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DataPlaneConfig {
    /// How long a device's thread looks for work before it sleeps, at most, in microseconds.
    pub spin_us: u64,
    /// Offers VMMs to add and remove memory piece by piece (CONFIGURE_MEM_SLOTS). For those that insist on it, or have
    /// more than 8 pieces. A guest of QEMU that is paused while the agent is restarted then hangs.
    pub memory_slots: bool,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            host_name: None,
            state_dir: "/var/lib/belay".into(),
            runtime_dir: "/run/belay".into(),
            pki_dir: None,
            images_dir: None,
            link: LinkConfig::default(),
            peers: BTreeMap::new(),
            vmm: VmmConfig::default(),
            exchange: ExchangeConfig::default(),
            data_plane: DataPlaneConfig::default(),
            device: Vec::new(),
        }
    }
}

impl Default for LinkConfig {
    fn default() -> Self {
        Self { listen: "0.0.0.0:7420".into(), heartbeat_ms: 500, dead_after_ms: 3000 }
    }
}

impl Default for VmmConfig {
    fn default() -> Self {
        Self {
            qemu: None,
            user: None,
            migration_bandwidth_bytes_per_s: 0,
            allow_args: Vec::new(),
            allow_paths: vec!["/usr/share".into()],
        }
    }
}

impl Default for ExchangeConfig {
    fn default() -> Self {
        Self { bandwidth_bytes_per_s: 0, in_flight_bytes: 1 << 20 }
    }
}

impl Default for DataPlaneConfig {
    fn default() -> Self {
        Self { spin_us: 80, memory_slots: false }
    }
}

impl Config {
    /// Reads a file.
    ///
    /// # Errors
    /// It cannot be read, or has unknown keys or wrong values.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
        let parsed = Self::parse(&text).and_then(|config| config.check().map(|()| config));
        parsed.map_err(|message| ConfigError::Invalid { path: path.to_owned(), message })
    }

    /// Reads a text.
    ///
    /// # Errors
    /// What is wrong, where, and for an unknown key the nearest known one.
    pub fn parse(text: &str) -> Result<Self, String> {
        toml::from_str(text).map_err(|error| {
            let message = error.to_string();
            match nearest_key(&message) {
                Some(hint) => format!("{}\ndid you mean `{hint}`?", message.trim_end()),
                None => message,
            }
        })
    }

    /// What types cannot say.
    fn check(&self) -> Result<(), String> {
        let link = &self.link;
        if link.listen.parse::<std::net::SocketAddr>().is_err() {
            return Err(format!(
                "link.listen = {:?}: write ADDRESS:PORT, such as \"0.0.0.0:7420\"",
                link.listen
            ));
        }
        if link.heartbeat_ms == 0 || link.dead_after_ms <= link.heartbeat_ms {
            return Err(format!(
                "link.dead_after_ms = {}: it must be more than link.heartbeat_ms = {}, and that more than 0",
                link.dead_after_ms, link.heartbeat_ms
            ));
        }
        if self.exchange.in_flight_bytes == 0 {
            return Err("exchange.in_flight_bytes = 0: nothing could be copied".to_owned());
        }
        if let Some(wrong) =
            self.vmm.allow_args.iter().find(|entry| !entry.starts_with('-') && entry.trim() != "*")
        {
            return Err(format!(
                "vmm.allow_args: {wrong:?}: write a QEMU option such as \"-netdev tap\", or \"*\" for all"
            ));
        }
        if let Some(wrong) = self.vmm.allow_paths.iter().find(|folder| !folder.is_absolute()) {
            return Err(format!(
                "vmm.allow_paths: {:?}: write a path that begins with /",
                wrong.display().to_string()
            ));
        }
        Ok(())
    }

    /// Where certificates and keys are.
    #[must_use]
    pub fn pki_dir(&self) -> PathBuf {
        self.pki_dir.clone().unwrap_or_else(|| self.state_dir.join("pki"))
    }

    /// Where disks are created.
    #[must_use]
    pub fn images_dir(&self) -> PathBuf {
        self.images_dir.clone().unwrap_or_else(|| self.state_dir.join("images"))
    }

    /// The API's socket.
    #[must_use]
    pub fn api_socket(&self) -> PathBuf {
        self.runtime_dir.join("agent.sock")
    }

    /// A device's vhost-user socket.
    #[must_use]
    pub fn device_socket(&self, name: &str) -> PathBuf {
        self.runtime_dir.join("devices").join(format!("{name}.sock"))
    }
}

/// serde names the unknown key and those it expected: the nearest of them.
fn nearest_key(message: &str) -> Option<String> {
    let rest = message.split("unknown field `").nth(1)?;
    let (unknown, rest) = rest.split_once('`')?;
    rest.split('`')
        .skip(1)
        .step_by(2)
        .map(|known| (strsim::jaro_winkler(unknown, known), known))
        .filter(|(likeness, _)| *likeness > 0.7)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, known)| known.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn empty_file_gives_the_defaults_and_they_can_be_read_again() {
        let config = Config::parse("").unwrap();
        assert_eq!(config, Config::default());
        assert_eq!(Config::parse(&toml::to_string(&config).unwrap()).unwrap(), config);
    }

    #[test]
    fn unknown_key_names_the_nearest_and_its_line() {
        let error = Config::parse("[link]\nheartbeat_sm = 5\n").unwrap_err();
        assert!(error.contains("line 2"), "{error}");
        assert!(error.contains("did you mean `heartbeat_ms`?"), "{error}");
    }

    #[test]
    fn value_of_a_wrong_type_is_an_error_with_its_line() {
        let error = Config::parse("[exchange]\nin_flight_bytes = \"much\"\n").unwrap_err();
        assert!(error.contains("line 2") && error.contains("expected u64"), "{error}");
    }

    #[test]
    fn values_that_cannot_be_are_refused_by_their_key() {
        for (text, key) in [
            ("[link]\nlisten = \"7420\"", "link.listen"),
            ("[link]\nheartbeat_ms = 0", "link.dead_after_ms"),
            ("[link]\ndead_after_ms = 500", "link.dead_after_ms"),
            ("[exchange]\nin_flight_bytes = 0", "exchange.in_flight_bytes"),
            ("[vmm]\nallow_args = [\"netdev\"]", "vmm.allow_args"),
            ("[vmm]\nallow_paths = [\"boot\"]", "vmm.allow_paths"),
        ] {
            let error = Config::parse(text).unwrap().check().unwrap_err();
            assert!(error.starts_with(key), "{error}");
        }
        Config::default().check().unwrap();
    }

    /// Table and key of everything that can be configured, as serde tells.
    fn keys() -> Vec<(&'static str, String)> {
        let mut keys = Vec::new();
        for table in ["", "link", "vmm", "exchange", "data_plane"] {
            let text = if table.is_empty() { "zz = 0".to_owned() } else { format!("[{table}]\nzz = 0") };
            let error = toml::from_str::<Config>(&text).unwrap_err().message().to_owned();
            let known = error.split("expected").nth(1).unwrap();
            keys.extend(known.split('`').skip(1).step_by(2).map(|key| (table, key.to_owned())));
        }
        assert!(keys.len() > 15, "{keys:?}");
        keys
    }

    const SAMPLE: &str = include_str!("../../../packaging/agent.toml");

    #[test]
    fn sample_has_the_defaults_and_every_key() {
        assert_eq!(Config::parse(SAMPLE).unwrap(), Config::default());
        let all: String = SAMPLE
            .lines()
            .map(|line| match line.strip_prefix('#') {
                Some(key) if !key.starts_with(' ') => format!("{key}\n"),
                _ => format!("{line}\n"),
            })
            .collect();
        let config = Config::parse(&all).unwrap();
        config.check().unwrap();
        assert_eq!(config.device[0].queues, 4);
        let table: toml::Table = toml::from_str(&all).unwrap();
        for (part, key) in keys() {
            let there = if part.is_empty() { table.get(&key) } else { table[part].get(&key) };
            assert!(there.is_some(), "packaging/agent.toml has no {part} {key}");
        }
    }

    #[test]
    fn operating_names_every_key() {
        let text = include_str!("../../../docs/operating.md");
        for (part, key) in keys() {
            let known = text.lines().any(|line| line.starts_with('|') && line.contains(&key));
            assert!(known, "docs/operating.md has no {part} {key}");
        }
    }
}
