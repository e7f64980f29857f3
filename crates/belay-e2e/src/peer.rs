//! An enrolled host that is nothing but a test: it says to the agents whatever the test wants.

use std::io::{ErrorKind, Read, Write};
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use belay_link::{
    CallError, ControlClient, ControlClientOptions, DataConnection, HostName, Identity, dial_data,
};
use belay_wire::control::{Channel, Open};
use belay_wire::{DeviceId, Epoch, FrameKind, HEADER_BYTES, Header};
use serde_json::Value;

use crate::{Host, LIMIT};

/// The host.
pub struct Peer {
    identity: Arc<Identity>,
    runtime: tokio::runtime::Runtime,
}

/// A data connection of its.
pub struct Line(DataConnection);

impl Peer {
    /// The host with these keys.
    ///
    /// # Errors
    /// There are none.
    pub fn new(pki: &Path) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        Ok(Self { identity: Arc::new(Identity::load(pki)?), runtime })
    }

    /// Calls an agent; the inner result is its answer, or the code with which it refused.
    ///
    /// # Errors
    /// It cannot be reached.
    pub fn call(&self, to: &Host, method: &str, body: &Value) -> Result<Result<Value, String>> {
        let (name, addresses) = (HostName::new(to.name)?, vec![to.address().to_owned()]);
        self.runtime.block_on(async {
            let identity = Arc::clone(&self.identity);
            let client = ControlClient::new(name, addresses, identity, ControlClientOptions::default());
            match client.call_within(LIMIT, method, body).await {
                Ok(answer) => Ok(Ok(answer)),
                Err(CallError::Refused { error, .. }) => Ok(Err(error.code)),
                Err(error) => Err(error.into()),
            }
        })
    }

    /// Connects for data.
    ///
    /// # Errors
    /// It cannot be reached.
    pub fn line(&self, to: &Host) -> Result<Line> {
        let name = HostName::new(to.name)?;
        let addresses = [to.address().to_owned()];
        let dialled = self.runtime.block_on(dial_data(&addresses, &name, &self.identity, LIMIT))?;
        dialled.socket.set_nonblocking(false)?;
        dialled.socket.set_read_timeout(Some(LIMIT))?;
        Ok(Line(dialled))
    }

    /// Connects for a device's data; the first frame of the answer, if there is one.
    ///
    /// # Errors
    /// It cannot be reached.
    pub fn open(
        &self,
        to: &Host,
        device: &Value,
        channel: Channel,
        epoch: u64,
    ) -> Result<(Line, Option<Header>)> {
        let mut line = self.line(to)?;
        let id = device["id"].as_str().context("no id")?;
        let id: DeviceId = serde_json::from_value(id.into())?;
        let mut header = Header::new(FrameKind::Open);
        header.epoch = Epoch(epoch);
        line.send(header, &serde_json::to_vec(&Open { device: id, channel })?)?;
        let answer = line.receive()?;
        Ok((line, answer.map(|(header, _)| header)))
    }
}

impl Line {
    /// Sends a frame.
    ///
    /// # Errors
    /// The connection is lost.
    pub fn send(&mut self, mut header: Header, payload: &[u8]) -> Result<()> {
        header.payload_len = u32::try_from(payload.len())?;
        self.send_bytes(&[&header.encode(), payload].concat())
    }

    /// Sends anything.
    ///
    /// # Errors
    /// The connection is lost.
    pub fn send_bytes(&mut self, bytes: &[u8]) -> Result<()> {
        self.0.tls.writer().write_all(bytes)?;
        while self.0.tls.wants_write() {
            self.0.tls.write_tls(&mut self.0.socket)?;
        }
        Ok(())
    }

    /// The next frame; none: the agent has ended the connection.
    ///
    /// # Errors
    /// What comes is no frame, or nothing comes.
    pub fn receive(&mut self) -> Result<Option<(Header, Vec<u8>)>> {
        let mut header = [0; HEADER_BYTES];
        if !self.fill(&mut header)? {
            return Ok(None);
        }
        let header = Header::decode(&header)?;
        let mut payload = vec![0; header.payload_len as usize];
        ensure!(self.fill(&mut payload)?, "the connection ended within a frame");
        Ok(Some((header, payload)))
    }

    fn fill(&mut self, out: &mut [u8]) -> Result<bool> {
        let mut got = self.0.early.len().min(out.len());
        out[..got].copy_from_slice(&self.0.early.drain(..got).collect::<Vec<_>>());
        while got < out.len() {
            match self.0.tls.reader().read(&mut out[got..]) {
                Ok(0) => return Ok(false),
                Ok(count) => got += count,
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    match self.0.tls.read_tls(&mut self.0.socket) {
                        Ok(0) => return Ok(false),
                        Err(error) if error.kind() == ErrorKind::ConnectionReset => return Ok(false),
                        read => drop(read?),
                    }
                    self.0.tls.process_new_packets()?;
                }
                Err(error) if error.kind() == ErrorKind::UnexpectedEof => return Ok(false),
                Err(error) => return Err(error.into()),
            }
        }
        Ok(true)
    }
}
