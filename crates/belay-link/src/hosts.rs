//! The hosts of the cluster that this host knows, and where they are reached.

use std::path::Path;

use serde::{Deserialize, Serialize};

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
}

/// The hosts that this host knows: on the host that made the cluster all of them, elsewhere those that were known
/// when this host joined.
///
/// # Errors
/// The file can not be read.
pub fn known_hosts(directory: &Path) -> Result<Vec<KnownHost>, PkiError> {
    let path = files::path(directory, HOSTS);
    let Some(text) = files::read(&path)? else { return Ok(Vec::new()) };
    let file: HostsFile = serde_json::from_str(&text).map_err(|error| unusable(&path, &error.to_string()))?;
    Ok(file.hosts)
}

/// Forgets a host, so that its name can be enrolled again. Its certificate stays valid until it expires: remove the
/// key on a host that is given away. Returns whether the host was known.
///
/// # Errors
/// The file can not be read or written.
pub fn forget(directory: &Path, host: &HostName) -> Result<bool, PkiError> {
    let _lock = DirectoryLock::acquire(directory)?;
    let mut hosts = known_hosts(directory)?;
    let before = hosts.len();
    hosts.retain(|known| known.name != *host);
    let found = hosts.len() != before;
    if found {
        write(directory, hosts)?;
    }
    Ok(found)
}

/// Adds a host, or addresses to it. The caller holds the lock of the directory.
pub(crate) fn record(directory: &Path, host: &HostName, addresses: &[String]) -> Result<(), PkiError> {
    let mut hosts = known_hosts(directory)?;
    let at = hosts.iter().position(|known| known.name == *host).unwrap_or_else(|| {
        hosts.push(KnownHost { name: host.clone(), addresses: Vec::new() });
        hosts.len() - 1
    });
    for address in addresses {
        if !hosts[at].addresses.contains(address) {
            hosts[at].addresses.push(address.clone());
        }
    }
    write(directory, hosts)
}

/// Replaces the list. The caller holds the lock of the directory.
pub(crate) fn write(directory: &Path, hosts: Vec<KnownHost>) -> Result<(), PkiError> {
    let path = files::path(directory, HOSTS);
    let text = serde_json::to_string_pretty(&HostsFile { hosts })
        .map_err(|error| unusable(&path, &error.to_string()))?;
    files::write(&path, &text)
}
