//! Files of the PKI directory: where they are, and how they are read and written.
//!
//! ```text
//!   /var/lib/belay/pki        0700
//!   ├── ca.crt                the cluster's certificate authority
//!   ├── ca.key                0600, only on the host that ran `belay host init`
//!   ├── host.crt, host.key    0600, this host
//!   ├── hosts.json            0600, hosts enrolled, and where they are reached
//!   └── invites.json          0600, hashes of one-time tokens
//! ```

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use crate::identity::PkiError;

pub(crate) const CA_CERTIFICATE: &str = "ca.crt";
pub(crate) const CA_KEY: &str = "ca.key";
pub(crate) const HOST_CERTIFICATE: &str = "host.crt";
pub(crate) const HOST_KEY: &str = "host.key";
pub(crate) const HOSTS: &str = "hosts.json";
pub(crate) const INVITES: &str = "invites.json";
const LOCK: &str = "lock";

fn failed<'a>(action: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> PkiError + 'a {
    move |source| PkiError::Io { action, path: path.to_owned(), source }
}

/// Makes the directory, for its owner only, and its parents.
pub(crate) fn make_directory(directory: &Path) -> Result<(), PkiError> {
    DirBuilder::new().recursive(true).mode(0o700).create(directory).map_err(failed("create", directory))?;
    check_directory(directory)
}

/// Refuses a directory that others may write to: they could put their own files in place of ours.
pub(crate) fn check_directory(directory: &Path) -> Result<(), PkiError> {
    let mode = match fs::metadata(directory) {
        Ok(metadata) => metadata.mode() & 0o777,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(PkiError::NotEnrolled { directory: directory.to_owned() });
        }
        Err(error) => return Err(failed("read", directory)(error)),
    };
    if mode & 0o022 != 0 {
        return Err(PkiError::Permissions { path: directory.to_owned(), mode, wanted: 0o700 });
    }
    Ok(())
}

/// Whether a file is there.
pub(crate) fn exists(path: &Path) -> Result<bool, PkiError> {
    path.try_exists().map_err(failed("look for", path))
}

/// Reads a text file; `None` if there is none.
pub(crate) fn read(path: &Path) -> Result<Option<String>, PkiError> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(failed("read", path)(error)),
    }
}

/// Reads a file that only its owner may read; `None` if there is none.
pub(crate) fn read_secret(path: &Path) -> Result<Option<String>, PkiError> {
    match fs::metadata(path) {
        Ok(metadata) if metadata.mode() & 0o077 != 0 => {
            Err(PkiError::Permissions { path: path.to_owned(), mode: metadata.mode() & 0o777, wanted: 0o600 })
        }
        Ok(_) => read(path),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(failed("read", path)(error)),
    }
}

/// Writes a file (0600) so that after a crash either the old or the new content is there, durably.
pub(crate) fn write(path: &Path, content: &str) -> Result<(), PkiError> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".new");
    let temporary = path.with_file_name(name);
    match fs::remove_file(&temporary) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(failed("replace", &temporary)(error));
        }
        _ => {}
    }
    let write_all = || -> io::Result<()> {
        // The mode is given when the file is made, so that nobody can open it in between.
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary)?;
        file.write_all(content.as_bytes())?;
        file.sync_all()?;
        fs::rename(&temporary, path)?;
        path.parent().map_or(Ok(()), |parent| File::open(parent)?.sync_all())
    };
    write_all().map_err(failed("write", path))
}

/// Holds other processes and threads off the directory's files until it is dropped. Commands and the agent may
/// change them at the same time.
#[derive(Debug)]
pub(crate) struct DirectoryLock(#[allow(dead_code, reason = "held for its lock")] File);

impl DirectoryLock {
    /// Waits for the lock.
    pub(crate) fn acquire(directory: &Path) -> Result<Self, PkiError> {
        let path = directory.join(LOCK);
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(failed("open", &path))?;
        rustix::fs::flock(&file, rustix::fs::FlockOperation::LockExclusive)
            .map_err(|error| failed("lock", &path)(error.into()))?;
        Ok(Self(file))
    }
}

/// A path in the directory.
pub(crate) fn path(directory: &Path, name: &str) -> PathBuf {
    directory.join(name)
}
