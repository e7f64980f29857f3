//! A QMP client for tests. It has a socket of its own at the VM: the agent's is the agent's.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::{LIMIT, until};

/// A connection to a VM's monitor.
pub struct Qmp {
    reader: BufReader<UnixStream>,
    writer: UnixStream,
}

impl Qmp {
    pub(crate) fn connect(socket: &Path) -> Result<Self> {
        let stream = until("the VM's monitor", || Ok(UnixStream::connect(socket).ok()))?;
        stream.set_read_timeout(Some(LIMIT))?;
        let mut qmp = Self { writer: stream.try_clone()?, reader: BufReader::new(stream) };
        qmp.line()?;
        qmp.execute("qmp_capabilities", &json!({}))?;
        Ok(qmp)
    }

    fn line(&mut self) -> Result<Value> {
        let mut line = String::new();
        if self.reader.read_line(&mut line).context("reading from the VM's monitor")? == 0 {
            bail!("the VM is gone");
        }
        Ok(serde_json::from_str(&line)?)
    }

    /// Executes a command and returns its answer.
    ///
    /// # Errors
    /// QEMU refuses, or is gone.
    pub fn execute(&mut self, command: &str, arguments: &Value) -> Result<Value> {
        let text = format!("{}\n", json!({ "execute": command, "arguments": arguments }));
        self.writer.write_all(text.as_bytes())?;
        loop {
            let mut answer = self.line()?;
            if answer.get("error").is_some() {
                bail!("{command}: {}", answer["error"]);
            }
            if answer.get("return").is_some() {
                return Ok(answer["return"].take());
            }
        }
    }

    /// Executes a command without arguments.
    ///
    /// # Errors
    /// As [`Qmp::execute`].
    pub fn run(&mut self, command: &str) -> Result<()> {
        self.execute(command, &json!({})).map(drop)
    }

    /// QEMU's run state, such as `running` or `paused`.
    ///
    /// # Errors
    /// As [`Qmp::execute`].
    pub fn state(&mut self) -> Result<String> {
        let state = self.execute("query-status", &json!({}))?;
        Ok(state["status"].as_str().unwrap_or_default().to_owned())
    }

    /// Where a migration away from here stands.
    ///
    /// # Errors
    /// As [`Qmp::execute`].
    pub fn migration(&mut self) -> Result<String> {
        let state = self.execute("query-migrate", &json!({}))?;
        Ok(state["status"].as_str().unwrap_or_default().to_owned())
    }

    /// Makes the next migrations stop before the switchover, until `migrate-continue`; the rings have stopped then.
    ///
    /// # Errors
    /// As [`Qmp::execute`].
    pub fn pause_before_switchover(&mut self, on: bool) -> Result<()> {
        let list = json!({ "capabilities": [{ "capability": "pause-before-switchover", "state": on }] });
        self.execute("migrate-set-capabilities", &list).map(drop)
    }

    /// Waits until a migration away from here waits before the switchover.
    ///
    /// # Errors
    /// It does not.
    pub fn wait_pre_switchover(&mut self) -> Result<()> {
        until("pre-switchover", || Ok((self.migration()? == "pre-switchover").then_some(())))
    }

    /// Cancels a migration away from here, whatever the agent thinks of it.
    ///
    /// # Errors
    /// As [`Qmp::execute`].
    pub fn cancel_migration(&mut self) -> Result<()> {
        self.run("migrate_cancel")
    }

    /// Lets such a migration go on.
    ///
    /// # Errors
    /// As [`Qmp::execute`].
    pub fn continue_migration(&mut self) -> Result<()> {
        self.execute("migrate-continue", &json!({ "state": "pre-switchover" })).map(drop)
    }
}
