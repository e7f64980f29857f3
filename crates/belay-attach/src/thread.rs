//! Starts a device's thread.

use std::io;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};

use belay_reactor::Waker;

use crate::device::{Device, Ends};
use crate::handle::{DeviceConfig, DeviceHandle, Notice};
use crate::stats::Snapshot;

/// Bytes of a thread's name that Linux keeps.
const NAME_BYTES: usize = 15;

pub(crate) fn spawn(config: DeviceConfig) -> io::Result<(DeviceHandle, Receiver<Notice>)> {
    let (commands, command_end) = channel();
    let (notices, notice_end) = channel();
    let waker = Arc::new(Waker::new()?);
    let snapshot = Arc::new(Mutex::new(Snapshot::default()));
    let handle = DeviceHandle { commands, waker: Arc::clone(&waker), snapshot: Arc::clone(&snapshot) };
    let name: String = config.identity.name.chars().take(NAME_BYTES).collect();
    let (started, start_end) = channel();
    std::thread::Builder::new().name(name).spawn(move || {
        // The ring must be made by the thread that uses it.
        let ends = Ends { notices: notices.clone(), commands: command_end, waker, snapshot };
        let mut device = match Device::new(config, ends) {
            Ok(device) => device,
            Err(error) => {
                let _ = started.send(Err(error));
                return;
            }
        };
        let _ = started.send(Ok(()));
        let outcome = device.run();
        let reason = outcome.err().map(|error| error.to_string());
        drop(device);
        let _ = notices.send(Notice::Stopped(reason));
    })?;
    start_end.recv().map_err(|_| io::Error::other("the device's thread died at its start"))??;
    Ok((handle, notice_end))
}
