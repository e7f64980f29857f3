//! The two hosts, an agent on each.

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::limit::{self, CLEAN_UP};
use crate::network::Network;

/// How long an agent may take to be ready.
const READY: Duration = Duration::from_secs(20);
/// A host.
pub(crate) struct Host {
    pub(crate) name: &'static str,
    /// Address and port of its agent.
    endpoint: String,
    namespace: Option<String>,
    pub(crate) folder: PathBuf,
    pub(crate) images: PathBuf,
    /// The VM that runs on one of the hosts.
    vm: &'static str,
    belay: PathBuf,
    agent: Option<Child>,
}

/// Both hosts, and what joins them.
pub(crate) struct Hosts {
    pub(crate) all: [Host; 2],
    /// The VM that runs on one of them, and is ended with them.
    vm: &'static str,
    _network: Network,
}

impl Hosts {
    /// Makes the hosts' folders, networks and identities, and starts the agents, whose copies take so many bytes per
    /// second, and which take VMs with this guest from each other.
    pub(crate) fn start(
        belay: &Path,
        sockets: &Path,
        images: &Path,
        network: Network,
        copy_bytes_per_s: u64,
        vm: &'static str,
        guest: &Path,
    ) -> Result<Self> {
        let mut hosts = Self {
            all: [("host-a", 0), ("host-b", 1)].map(|(name, number)| Host {
                name,
                endpoint: network.endpoints[number].clone(),
                namespace: network.namespace(number),
                folder: sockets.join(name),
                images: images.join(name),
                vm,
                belay: belay.to_owned(),
                agent: None,
            }),
            vm,
            _network: network,
        };
        hosts.enrol_and_start(copy_bytes_per_s, guest)?;
        Ok(hosts)
    }

    fn enrol_and_start(&mut self, copy_bytes_per_s: u64, guest: &Path) -> Result<()> {
        for host in &self.all {
            host.write_config(copy_bytes_per_s, guest)?;
        }
        let [a, b] = &mut self.all;
        a.local(&["host", "init", "--name", a.name, "--pki", &a.pki()])?;
        a.start_agent()?;
        let token = a.local(&["host", "invite", "--pki", &a.pki(), "--address", &a.endpoint])?;
        let token =
            token.split_whitespace().find(|word| word.starts_with("belay1.")).context("no token")?.to_owned();
        b.local(&["host", "join", &token, "--name", b.name, "--address", &b.endpoint, "--pki", &b.pki()])?;
        b.start_agent()
    }
}

impl Drop for Hosts {
    fn drop(&mut self) {
        for host in &mut self.all {
            let _ = host.local_within(&["vm", "stop", self.vm], Some(CLEAN_UP));
        }
        for host in &mut self.all {
            if let Some(mut agent) = host.agent.take() {
                let pid = rustix::process::Pid::from_child(&agent);
                let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
                end(&mut agent);
            }
        }
    }
}

/// Waits for an agent that has been told to end; one that does not is killed.
fn end(agent: &mut Child) {
    let deadline = Instant::now() + CLEAN_UP;
    while matches!(agent.try_wait(), Ok(None)) {
        if Instant::now() > deadline {
            let _ = agent.kill();
            let _ = agent.wait();
            return;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

impl Host {
    fn pki(&self) -> String {
        self.folder.join("pki").display().to_string()
    }

    fn socket(&self) -> PathBuf {
        self.folder.join("agent.sock")
    }

    /// The guest's console here.
    pub(crate) fn console(&self) -> PathBuf {
        self.folder.join(format!("{}.console", self.vm))
    }

    fn write_config(&self, copy_bytes_per_s: u64, guest: &Path) -> Result<()> {
        std::fs::create_dir_all(&self.folder)?;
        std::fs::create_dir_all(&self.images)?;
        let text = format!(
            "state_dir = {:?}\nruntime_dir = {:?}\npki_dir = {:?}\nimages_dir = {:?}\n\n[link]\nlisten = {:?}\n\n[exchange]\nbandwidth_bytes_per_s = {copy_bytes_per_s}\n\n[vmm]\nallow_paths = [{guest:?}]\n",
            self.folder.join("state"),
            self.folder,
            self.folder.join("pki"),
            self.images,
            self.endpoint,
        );
        Ok(std::fs::write(self.folder.join("agent.toml"), text)?)
    }

    /// A command of this host, in its network.
    fn command(&self) -> Command {
        match &self.namespace {
            Some(name) => {
                let mut command = Command::new("ip");
                command.args(["netns", "exec", name]).arg(&self.belay);
                command
            }
            None => Command::new(&self.belay),
        }
    }

    fn start_agent(&mut self) -> Result<()> {
        let log = std::fs::File::create(self.folder.join("agent.log"))?;
        let config = self.folder.join("agent.toml");
        let child = self
            .command()
            .args(["agent", "--config"])
            .arg(&config)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            // Ctrl-C on a terminal reaches the whole group: the agents must live until they have ended the VM.
            .process_group(0)
            .spawn()
            .context("cannot start an agent")?;
        self.agent = Some(child);
        let deadline = Instant::now() + READY;
        while self.local(&["status"]).is_err() {
            let ended = self.agent.as_mut().and_then(|agent| agent.try_wait().ok().flatten());
            if ended.is_some() || Instant::now() > deadline {
                let log = std::fs::read_to_string(self.folder.join("agent.log")).unwrap_or_default();
                bail!("the agent of {} did not come up:\n{log}", self.name);
            }
            std::thread::yield_now();
        }
        Ok(())
    }

    /// Runs `belay` on this host and returns what it prints.
    pub(crate) fn local(&self, arguments: &[&str]) -> Result<String> {
        self.local_within(arguments, limit::left())
    }

    fn local_within(&self, arguments: &[&str], within: Option<Duration>) -> Result<String> {
        let mut command = self.command();
        command.arg("--socket").arg(self.socket()).args(arguments);
        let output = limit::output_within(&mut command, within)
            .with_context(|| format!("belay {} on {}", arguments.join(" "), self.name))?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
        ensure!(
            output.status.success(),
            "belay {} on {}: {} {}",
            arguments.join(" "),
            self.name,
            text(&output.stdout),
            text(&output.stderr)
        );
        Ok(text(&output.stdout))
    }

    /// Runs `belay --json`.
    pub(crate) fn json(&self, arguments: &[&str]) -> Result<Value> {
        let mut all = vec!["--json"];
        all.extend(arguments);
        let text = self.local(&all)?;
        serde_json::from_str(&text).with_context(|| format!("belay {} printed {text}", arguments.join(" ")))
    }
}
