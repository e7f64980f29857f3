//! A backend as it is written in a configuration, a request or a ledger.

use std::path::PathBuf;
use std::time::Duration;

use belay_reactor::OwnerId;
use serde::{Deserialize, Serialize};

use crate::backend::Backend;
use crate::delay::Delay;
use crate::file::FileBackend;
use crate::memory::MemoryBackend;
use crate::open::{FileOptions, OpenError, SECTOR};

/// What executes a device's requests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Driver {
    /// A regular file or a block device.
    #[default]
    File,
    /// Keeps nothing, reads as zeroes.
    Null,
    /// In the agent's memory; lost with it.
    Memory,
}

/// A backend's description.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BackendSpec {
    /// What executes the requests.
    #[serde(default)]
    pub driver: Driver,
    /// The file or block device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
    /// Size in bytes, of `null` and `memory`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size_bytes: Option<u64>,
    /// O_DIRECT: past the page cache.
    #[serde(default = "yes")]
    pub direct: bool,
    /// Refuse changes.
    #[serde(default)]
    pub read_only: bool,
    /// Hold every operation so long before it begins, in microseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub delay_us: Option<u64>,
}

fn yes() -> bool {
    true
}

impl BackendSpec {
    /// A file or block device, O_DIRECT, writable.
    #[must_use]
    pub fn file(path: PathBuf) -> Self {
        Self {
            driver: Driver::File,
            path: Some(path),
            size_bytes: None,
            direct: true,
            read_only: false,
            delay_us: None,
        }
    }

    /// Opens it. `owner` must be this backend's alone on its ring.
    ///
    /// # Errors
    /// The file cannot be opened or locked, or the description lacks something.
    pub fn build(&self, owner: OwnerId) -> Result<Box<dyn Backend>, OpenError> {
        let missing = |what: &str| OpenError::Spec(format!("a {:?} backend needs `{what}`", self.driver));
        let inner: Box<dyn Backend> = match self.driver {
            Driver::File => {
                let path = self.path.as_ref().ok_or_else(|| missing("path"))?;
                let options =
                    FileOptions { direct: self.direct, read_only: self.read_only, create_size: None };
                Box::new(FileBackend::open(path, &options, owner)?)
            }
            Driver::Memory => {
                let size = self.whole_size()?;
                Box::new(MemoryBackend::try_new(size).ok_or_else(|| {
                    OpenError::Spec(format!("there is no memory for a disk of {size} bytes: ask for less"))
                })?)
            }
            Driver::Null => Box::new(MemoryBackend::null(self.whole_size()?)),
        };
        Ok(match self.delay_us {
            Some(delay) if delay > 0 => Box::new(Delay::new(inner, Duration::from_micros(delay))),
            _ => inner,
        })
    }

    /// The size of a disk without a file.
    fn whole_size(&self) -> Result<u64, OpenError> {
        match self.size_bytes {
            Some(size) if size > 0 && size.is_multiple_of(SECTOR) => Ok(size),
            Some(size) => Err(OpenError::Spec(format!(
                "`size_bytes` is {size}: a disk has a multiple of 512, and at least 512"
            ))),
            None => Err(OpenError::Spec(format!("a {:?} backend needs `size_bytes`", self.driver))),
        }
    }
}
