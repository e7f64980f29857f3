//! The two hosts.

use std::net::TcpListener;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use tempfile::TempDir;

use crate::Host;
use crate::process::Reaper;

/// Two hosts, enrolled with each other. Dropped, it ends all their processes.
pub struct Bed {
    /// The host that VMs start on.
    pub a: Host,
    /// The other.
    pub b: Host,
    _reaper: Reaper,
    _folder: TempDir,
}

impl Bed {
    /// Makes the hosts and starts their agents with this `belay`.
    ///
    /// # Errors
    /// An agent does not come up; the error holds its log.
    pub fn start(belay: &Path) -> Result<Self> {
        // Sockets' paths may have 108 bytes only: not below the target directory.
        let folder = tempfile::Builder::new().prefix("belay-e2e-").tempdir()?;
        let reaper = Reaper::start(folder.path())?;
        let host = |name: &'static str, address: &str| {
            // The number is free now, and chosen by the kernel from thousands: nobody will take it meanwhile.
            let port = TcpListener::bind((address, 0))?.local_addr()?.port();
            Host::new(name, &format!("{address}:{port}"), folder.path(), belay)
        };
        let mut bed = Self {
            a: host("host-a", "127.0.0.1")?,
            b: host("host-b", "127.0.0.2")?,
            _reaper: reaper,
            _folder: folder,
        };
        let (a, b) = (&mut bed.a, &mut bed.b);
        a.belay(&["host", "init", "--name", a.name, "--pki", &a.pki()])?;
        a.start_agent()?;
        let said = a.belay(&["host", "invite", "--pki", &a.pki(), "--address", a.address()])?;
        let token = said.split_whitespace().find(|word| word.starts_with("belay1.")).context("no token")?;
        b.belay(&["host", "join", token, "--name", b.name, "--address", b.address(), "--pki", &b.pki()])?;
        b.start_agent()?;
        Ok(bed)
    }

    /// Enrols another host, at which nothing runs; where its keys are.
    ///
    /// # Errors
    /// It is not let in.
    pub fn enrol(&self, name: &str) -> Result<PathBuf> {
        let pki = self._folder.path().join(name);
        let text = pki.display().to_string();
        let said =
            self.a.belay(&["host", "invite", "--pki", &self.a.pki(), "--address", self.a.address()])?;
        let token = said.split_whitespace().find(|word| word.starts_with("belay1.")).context("no token")?;
        self.a.belay(&["host", "join", token, "--name", name, "--address", "127.0.0.3:1", "--pki", &text])?;
        Ok(pki)
    }

    /// Both agents' logs and devices, for a test that failed.
    #[must_use]
    pub fn logs(&self) -> String {
        let tell = |host: &Host| {
            let devices = host.json(&["device", "list"]).unwrap_or_default();
            format!("--- {} ---\n{}devices: {devices}\n{}", host.name, host.log(), host.vm_states())
        };
        [&self.a, &self.b].map(tell).join("\n")
    }
}
