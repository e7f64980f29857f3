//! The hosts of the cluster that this host knows, and where they are reached.

use std::path::Path;

use serde::{Deserialize, Serialize};
use time::OffsetDateTime;

use crate::files::{self, DirectoryLock, HOSTS};
use crate::identity::{PkiError, unusable};
use crate::name::HostName;

/// A host of the cluster.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KnownHost {
    /// Its name.
    pub name: HostName,
    /// Where its agent is reached, as `host:port`; none if it never said so.
    pub addresses: Vec<String>,
}

#[derive(Debug, Default, Serialize, Deserialize)]
struct HostsFile {
    hosts: Vec<KnownHost>,
    /// Hosts whose certificates from before that time are refused.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    removed: Vec<Removed>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Removed {
    name: HostName,
    /// When, in seconds since 1970.
    at_s: i64,
}

/// The hosts that this host knows: on the host that made the cluster all of them, elsewhere those that were known
/// when this host joined.
///
/// # Errors
/// The file can not be read.
pub fn known_hosts(directory: &Path) -> Result<Vec<KnownHost>, PkiError> {
    Ok(read(directory)?.hosts)
}

fn read(directory: &Path) -> Result<HostsFile, PkiError> {
    let path = files::path(directory, HOSTS);
    let Some(text) = files::read(&path)? else { return Ok(HostsFile::default()) };
    serde_json::from_str(&text).map_err(|error| unusable(&path, &error.to_string()))
}

/// Forgets a host: this host refuses the certificate that it has, until it is enrolled again. Returns whether the
/// host was known.
///
/// # Errors
/// The file can not be read or written.
pub fn forget(directory: &Path, host: &HostName) -> Result<bool, PkiError> {
    let _lock = DirectoryLock::acquire(directory)?;
    let mut file = read(directory)?;
    let before = file.hosts.len();
    file.hosts.retain(|known| known.name != *host);
    let found = file.hosts.len() != before;
    file.removed.retain(|removed| removed.name != *host);
    file.removed.push(Removed { name: host.clone(), at_s: OffsetDateTime::now_utc().unix_timestamp() });
    write(directory, &file)?;
    Ok(found)
}

/// When a host was removed, if it was: its certificate must be newer.
pub(crate) fn removed_at(directory: &Path, host: &HostName) -> Result<Option<OffsetDateTime>, PkiError> {
    let removed = read(directory)?.removed.into_iter().find(|removed| removed.name == *host);
    Ok(removed.and_then(|removed| OffsetDateTime::from_unix_timestamp(removed.at_s).ok()))
}

/// Adds a host, or addresses to it. The caller holds the lock of the directory.
pub(crate) fn record(directory: &Path, host: &HostName, addresses: &[String]) -> Result<(), PkiError> {
    let mut file = read(directory)?;
    let hosts = &mut file.hosts;
    let at = hosts.iter().position(|known| known.name == *host).unwrap_or_else(|| {
        hosts.push(KnownHost { name: host.clone(), addresses: Vec::new() });
        hosts.len() - 1
    });
    for address in addresses {
        if !hosts[at].addresses.contains(address) {
            hosts[at].addresses.push(address.clone());
        }
    }
    write(directory, &file)
}

/// Writes the list of a host that has just joined. The caller holds the lock of the directory.
pub(crate) fn write_first(directory: &Path, hosts: Vec<KnownHost>) -> Result<(), PkiError> {
    write(directory, &HostsFile { hosts, removed: Vec::new() })
}

fn write(directory: &Path, file: &HostsFile) -> Result<(), PkiError> {
    let path = files::path(directory, HOSTS);
    let text = serde_json::to_string_pretty(file).map_err(|error| unusable(&path, &error.to_string()))?;
    files::write(&path, &text)
}
