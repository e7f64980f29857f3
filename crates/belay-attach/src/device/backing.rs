//! The backend: how it is set, resized, and let go.

use std::time::Instant;

use belay_block::virtio::Limits;
use belay_block::{Backend, OpId};
use belay_reactor::{Cqe, Ring};

use super::{Device, GUEST_OP, LET_GO_LIMIT, LET_GO_STEP};
use crate::handle::Notice;

impl Device {
    pub(super) fn set_backend(&mut self, backend: Box<dyn Backend>) {
        self.local = Some(backend);
        for key in std::mem::take(&mut self.waiting) {
            self.submit_guest(key);
        }
    }

    /// The backing has left this host: nothing is served any more. When what runs has ended, the file is closed.
    pub(super) fn retire(&mut self) {
        self.retired = true;
        self.server.sessions.clear();
        self.server.drop_held();
        let ops: Vec<OpId> = self.server.op_ids().collect();
        if let Some(local) = &mut self.local {
            ops.into_iter().for_each(|op| local.cancel(op));
        }
        self.retiring = true;
        self.finish_retiring();
    }

    /// Closes the file of a device that has left, when nothing is in flight there: its lock is free then, and no write
    /// can come any more.
    pub(super) fn finish_retiring(&mut self) {
        if self.retiring && self.local.as_ref().is_none_or(|local| local.in_flight() == 0) {
            self.retiring = false;
            self.local = None;
            self.notice(Notice::Retired);
        }
    }

    pub(super) fn resize(&mut self, size: u64) {
        let result = match &mut self.local {
            _ if !size.is_multiple_of(u64::from(self.block.block_bytes)) => Err(format!(
                "the device has blocks of {} bytes: give a multiple of that",
                self.block.block_bytes
            )),
            Some(local) => local.resize(size).map_err(|error| error.to_string()),
            None => Err("the device's backing is not on this host".to_owned()),
        };
        self.notice(Notice::Resized(result.map(|()| size)));
    }

    pub(super) fn set_size(&mut self, size: u64) {
        self.block.set_size(size);
        self.limits = Limits::of(&self.block);
        let config = belay_block::virtio::config_space(&self.block);
        if let Some(connection) = &mut self.port.connection
            && let Err(error) = connection.set_config(config)
        {
            tracing::warn!(device = %self.identity.name, %error, "the VMM could not be told of the new size");
        }
    }

    /// Ends what has not begun, and waits for what has: the file's lock is free for the next thread then.
    pub(super) fn let_go(&mut self) -> std::io::Result<()> {
        let guests = self.requests.all().into_iter().map(|key| OpId(GUEST_OP | key as u64));
        let ops: Vec<OpId> = guests.chain(self.server.op_ids()).collect();
        if let Some(local) = &mut self.local {
            ops.into_iter().for_each(|op| local.cancel(op));
        }
        let deadline = Instant::now() + LET_GO_LIMIT;
        let mut cqes = Vec::new();
        loop {
            let mut busy = false;
            if let Some(local) = &mut self.local {
                busy |= settle(&mut **local, &cqes, &mut self.ring, self.now);
            }
            if let Some(exchange) = &mut self.exchange {
                busy |= settle(exchange.local_mut(), &cqes, &mut self.ring, self.now);
            }
            if !busy || Instant::now() > deadline {
                return Ok(());
            }
            cqes.clear();
            self.ring.wait(Some(LET_GO_STEP))?;
            self.ring.completions(&mut cqes);
        }
    }
}

/// Takes a backend's completions for nobody. Whether there are more to come.
pub(super) fn settle(backend: &mut dyn Backend, cqes: &[Cqe], ring: &mut Ring, now: Instant) -> bool {
    for cqe in cqes {
        backend.on_completion(*cqe, ring, now);
    }
    while backend.finished().is_some() {}
    backend.in_flight() > 0
}
