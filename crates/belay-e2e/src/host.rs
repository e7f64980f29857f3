//! A host: its folder, its agent, its VMs.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal};
use serde_json::Value;

use crate::process::{is_ours, kill_ours};
use crate::{Background, Qmp, until};

/// A host.
pub struct Host {
    /// Its name.
    pub name: &'static str,
    /// Its sockets, logs and state.
    pub folder: PathBuf,
    /// Where disks come to that follow their VM.
    pub images: PathBuf,
    address: String,
    belay: PathBuf,
    agent: Option<Child>,
}

impl Host {
    pub(crate) fn new(name: &'static str, address: &str, parent: &Path, belay: &Path) -> Result<Self> {
        let folder = parent.join(name);
        let host = Self {
            name,
            images: folder.join("images"),
            folder,
            address: address.to_owned(),
            belay: belay.to_owned(),
            agent: None,
        };
        std::fs::create_dir_all(&host.images)?;
        host.configure("")?;
        Ok(host)
    }

    /// Writes the agent's configuration: what a test host needs, and in its tables what `more` says. The next agent
    /// obeys it.
    ///
    /// # Errors
    /// `more` is no TOML, or the file cannot be written.
    pub fn configure(&self, more: &str) -> Result<()> {
        let mut config = toml::toml! {
            [link]
            [vmm]
        };
        let mut set = |key: &str, value: &Path| config.insert(key.into(), value.display().to_string().into());
        set("state_dir", &self.folder.join("state"));
        set("runtime_dir", &self.folder);
        set("pki_dir", &self.folder.join("pki"));
        set("images_dir", &self.images);
        config["link"]
            .as_table_mut()
            .context("a table")?
            .insert("listen".into(), self.address.clone().into());
        if let Ok(guest) = crate::linux_guest() {
            // The kernel of Linux guests, at the same place on every host.
            let paths = vec![toml::Value::from(guest.display().to_string())];
            config["vmm"].as_table_mut().context("a table")?.insert("allow_paths".into(), paths.into());
        }
        for (name, table) in more.parse::<toml::Table>()? {
            match (config.get_mut(&name).and_then(toml::Value::as_table_mut), table) {
                (Some(present), toml::Value::Table(table)) => present.extend(table),
                (_, value) => drop(config.insert(name, value)),
            }
        }
        Ok(std::fs::write(self.folder.join("agent.toml"), config.to_string())?)
    }

    /// Where its keys are.
    #[must_use]
    pub fn pki(&self) -> String {
        self.folder.join("pki").display().to_string()
    }

    /// Where other agents reach it.
    #[must_use]
    pub fn address(&self) -> &str {
        &self.address
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.belay);
        command.arg("--socket").arg(self.folder.join("agent.sock")).args(arguments).stdin(Stdio::null());
        command
    }

    /// Runs `belay` here and returns what it prints.
    ///
    /// # Errors
    /// It fails; the error holds what it says.
    pub fn belay(&self, arguments: &[&str]) -> Result<String> {
        let output = self.command(arguments).output()?;
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

    /// Runs `belay --json` here.
    ///
    /// # Errors
    /// As [`Host::belay`].
    pub fn json(&self, arguments: &[&str]) -> Result<Value> {
        let text = self.belay(&[&["--json"], arguments].concat())?;
        serde_json::from_str(&text).with_context(|| format!("belay {} printed {text}", arguments.join(" ")))
    }

    /// Starts `belay` here, beside the test.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn spawn(&self, arguments: &[&str]) -> Result<Background> {
        let mut command = self.command(arguments);
        Ok(Background::new(command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?))
    }

    /// Starts the agent and waits until it answers.
    ///
    /// # Errors
    /// It ends instead.
    pub fn start_agent(&mut self) -> Result<()> {
        ensure!(self.agent.is_none(), "the agent of {} runs already", self.name);
        let log = std::fs::OpenOptions::new().create(true).append(true).open(self.log_path())?;
        let child = Command::new(&self.belay)
            .args(["agent", "--config"])
            .arg(self.folder.join("agent.toml"))
            .env("NO_COLOR", "1")
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("cannot start an agent")?;
        std::fs::write(self.folder.join("agent.pid"), child.id().to_string())?;
        self.agent = Some(child);
        until("an agent that answers", || {
            let ended = self.agent.as_mut().and_then(|agent| agent.try_wait().ok().flatten());
            ensure!(ended.is_none(), "the agent of {} ended:\n{}", self.name, self.log());
            Ok(self.belay(&["status"]).ok().map(drop))
        })
    }

    /// Kills the agent (SIGKILL), and waits until it is gone.
    ///
    /// # Errors
    /// There is none.
    pub fn kill_agent(&mut self) -> Result<()> {
        self.end_agent(Signal::KILL).map(drop)
    }

    /// Asks the agent to end (SIGTERM), and waits until it has. It must end well.
    ///
    /// # Errors
    /// There is none, or it fails.
    pub fn terminate_agent(&mut self) -> Result<()> {
        let status = self.end_agent(Signal::TERM)?;
        ensure!(status.success(), "the agent of {} ended with {status}:\n{}", self.name, self.log());
        Ok(())
    }

    /// Stops the agent's process where it is (SIGSTOP), until [`Host::thaw_agent`].
    ///
    /// # Errors
    /// There is none.
    pub fn freeze_agent(&self) -> Result<()> {
        self.signal_agent(Signal::STOP)
    }

    /// Lets a frozen agent go on (SIGCONT).
    ///
    /// # Errors
    /// There is none.
    pub fn thaw_agent(&self) -> Result<()> {
        self.signal_agent(Signal::CONT)
    }

    fn signal_agent(&self, signal: Signal) -> Result<()> {
        let agent = self.agent.as_ref().context("there is no agent")?;
        Ok(rustix::process::kill_process(Pid::from_child(agent), signal)?)
    }

    fn end_agent(&mut self, signal: Signal) -> Result<std::process::ExitStatus> {
        let mut agent = self.agent.take().context("there is no agent")?;
        rustix::process::kill_process(Pid::from_child(&agent), signal)?;
        let ended = until("the end of the agent", || Ok(agent.try_wait()?));
        if ended.is_err() {
            let _ = agent.kill();
            let _ = agent.wait();
        }
        ended
    }

    fn log_path(&self) -> PathBuf {
        self.folder.join("agent.log")
    }

    /// What the agent has logged, and the VMs.
    #[must_use]
    pub fn log(&self) -> String {
        let mut text = std::fs::read_to_string(self.log_path()).unwrap_or_default();
        for entry in std::fs::read_dir(self.folder.join("vms")).into_iter().flatten().flatten() {
            if entry.path().extension().is_some_and(|extension| extension == "log") {
                let log = std::fs::read_to_string(entry.path()).unwrap_or_default();
                text.push_str(&format!("{}:\n{log}", entry.path().display()));
            }
        }
        text
    }

    /// A device, described.
    ///
    /// # Errors
    /// It is not here.
    pub fn device(&self, name: &str) -> Result<Value> {
        self.json(&["device", "show", name])
    }

    /// Waits until a device is in a state, with a VM connected and no exchange under way.
    ///
    /// # Errors
    /// It does not get there.
    pub fn wait_device(&self, name: &str, state: &str) -> Result<()> {
        until(&format!("device {name} of {} being {state}", self.name), || {
            // The agent may just be coming back.
            let Ok(device) = self.device(name) else { return Ok(None) };
            Ok((device["state"] == state && device["exchange"].is_null()).then_some(()))
        })
    }

    /// Waits until so many of the guest's requests are in flight.
    ///
    /// # Errors
    /// They never are.
    pub fn wait_in_flight(&self, name: &str, at_least: u64) -> Result<()> {
        until("requests in flight", || {
            Ok(self.device(name)?["in_flight"].as_u64().filter(|count| *count >= at_least).map(drop))
        })
    }

    /// Waits until a device's copy is under way, and has got somewhere.
    ///
    /// # Errors
    /// It is not copied (any more).
    pub fn wait_copying(&self, name: &str) -> Result<()> {
        until("a copy under way", || {
            let device = self.device(name)?;
            ensure!(device["state"] != "local", "the copy is over");
            Ok((device["exchange"]["local_bytes"].as_u64() > Some(0)).then_some(()))
        })
    }

    /// Waits until an operation has been done; a disk may still be on its way.
    ///
    /// # Errors
    /// It failed.
    pub fn wait_operation(&self, id: &str) -> Result<Value> {
        until("the end of an operation", || {
            let operation = self.json(&["operation", id])?;
            match operation["state"].as_str() {
                Some("running") => Ok(None),
                Some("done") => Ok(Some(operation)),
                _ => bail!("the operation ended as {operation}"),
            }
        })
    }

    /// A VM's monitor, for the test alone. One test connection at a time.
    ///
    /// # Errors
    /// The VM is not here.
    pub fn qmp(&self, vm: &str) -> Result<Qmp> {
        Qmp::connect(&self.folder.join(format!("{vm}.test-qmp")))
    }

    /// Where the VMs are that run here, for a test that failed.
    pub(crate) fn vm_states(&self) -> String {
        let mut text = String::new();
        for entry in std::fs::read_dir(&self.folder).into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            let Some(vm) = name.strip_suffix(".pid").filter(|vm| *vm != "agent" && self.vm_pid(vm).is_some())
            else {
                continue;
            };
            let registers = self.qmp(vm).and_then(|mut qmp| {
                let state = qmp.state()?;
                let line = serde_json::json!({ "command-line": "info registers" });
                let registers = qmp.execute("human-monitor-command", &line)?;
                Ok(format!("{state}\n{}", registers.as_str().unwrap_or_default()))
            });
            text.push_str(&format!("VM {vm}: {}\n", registers.unwrap_or_else(|error| error.to_string())));
        }
        text
    }

    fn pid_file(&self, vm: &str) -> PathBuf {
        self.folder.join(format!("{vm}.pid"))
    }

    /// QEMU's process id, if the VM runs here.
    #[must_use]
    pub fn vm_pid(&self, vm: &str) -> Option<u32> {
        let pid = std::fs::read_to_string(self.pid_file(vm)).ok()?.trim().parse().ok()?;
        is_ours(pid, &self.folder).then_some(pid)
    }

    /// Kills a VM (SIGKILL), and waits until it is gone.
    ///
    /// # Errors
    /// It is not here.
    pub fn kill_vm(&self, vm: &str) -> Result<()> {
        let Some(pid) = self.vm_pid(vm) else { bail!("VM {vm} is not on {}", self.name) };
        kill_ours(pid, &self.folder)
    }

    /// Waits until a VM's process is gone.
    ///
    /// # Errors
    /// It stays.
    pub fn wait_vm_gone(&self, vm: &str) -> Result<()> {
        until("the VM's end", || Ok(self.vm_pid(vm).is_none().then_some(())))
    }

    /// Starts a VM from the text of its specification. `{runtime_dir}` stands for the folder of whichever host.
    ///
    /// # Errors
    /// It does not start.
    pub fn run_vm(&self, vm: &str, specification: &str) -> Result<()> {
        let path = self.folder.join(format!("{vm}.toml"));
        std::fs::write(&path, specification)?;
        self.belay(&["vm", "run", &path.display().to_string()]).map(drop)
    }

    /// Ends whatever runs here, by pid.
    fn end_all(&mut self) {
        if let Some(mut agent) = self.agent.take() {
            let _ = agent.kill();
            let _ = agent.wait();
        }
        for entry in std::fs::read_dir(&self.folder).into_iter().flatten().flatten() {
            let path = entry.path();
            if path.extension().is_some_and(|extension| extension == "pid")
                && let Some(pid) = std::fs::read_to_string(&path).ok().and_then(|pid| pid.trim().parse().ok())
            {
                let _ = kill_ours(pid, &self.folder);
            }
        }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.end_all();
    }
}
