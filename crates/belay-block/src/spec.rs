//! A backend as it is written in a configuration, a request or a ledger.

use std::path::PathBuf;
use std::time::Duration;

use belay_reactor::OwnerId;
use serde::{Deserialize, Serialize};

use crate::backend::Backend;
use crate::delay::Delay;
use crate::fault::{Fault, FaultRule};
use crate::file::FileBackend;
use crate::memory::MemoryBackend;
use crate::open::{FileOptions, OpenError, SECTOR};
use crate::throttle::{Throttle, ThrottleSpec};

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
    /// Operations that are made to fail, for tests of what is above; none if empty.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub fault: Vec<FaultRule>,
    /// How much the disk may do; unlimited if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub throttle: Option<ThrottleSpec>,
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
            fault: Vec::new(),
            throttle: None,
        }
    }

    /// Opens it: throttled, then delayed, then made to fail, then the driver. `owner` must be this backend's alone on its ring.
    ///
    /// # Errors
    /// The file cannot be opened or locked, or the description lacks something.
    pub fn build(&self, owner: OwnerId) -> Result<Box<dyn Backend>, OpenError> {
        let missing = |what: &str| OpenError::Spec(format!("a {:?} backend needs `{what}`", self.driver));
        let problem = self.fault.iter().find_map(FaultRule::problem);
        if let Some(problem) = problem.or_else(|| self.throttle.and_then(|limits| limits.problem())) {
            return Err(OpenError::Spec(problem));
        }
        let mut backend: Box<dyn Backend> = match self.driver {
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
        if !self.fault.is_empty() {
            backend = Box::new(Fault::new(backend, self.fault.clone()));
        }
        if let Some(delay) = self.delay_us.filter(|delay| *delay > 0) {
            backend = Box::new(Delay::new(backend, Duration::from_micros(delay)));
        }
        if let Some(limits) = self.throttle {
            backend = Box::new(Throttle::new(backend, limits));
        }
        Ok(backend)
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

#[cfg(test)]
mod tests {
    use serde::de::value::{Error, MapDeserializer};

    use super::*;

    fn parse(fields: &[(&str, &str)]) -> Result<BackendSpec, Error> {
        BackendSpec::deserialize(MapDeserializer::new(fields.iter().copied()))
    }

    #[test]
    fn fields_left_out_describe_a_direct_writable_plain_file() {
        let described = parse(&[("driver", "file")]).unwrap();
        assert_eq!(described, BackendSpec { path: None, ..BackendSpec::file(PathBuf::new()) });
    }

    #[test]
    fn unknown_fields_and_drivers_are_refused() {
        let unknown = parse(&[("driver", "file"), ("readonly", "yes")]).unwrap_err();
        assert!(unknown.to_string().contains("unknown field `readonly`"));
        assert!(parse(&[("driver", "floppy")]).is_err());
        assert_eq!(parse(&[("driver", "null")]).unwrap().driver, Driver::Null);
    }
}
