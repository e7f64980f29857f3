//! Eventfds of a queue: kicks come in, interrupts and errors go out.

use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::OFlags;

/// One eventfd, made by the VMM.
pub(crate) struct Bell {
    fd: OwnedFd,
    /// A write might block, if the VMM filled the counter.
    may_block: bool,
}

/// The eventfds of a queue, shared between the queue's settings and the ring that runs.
#[derive(Clone, Default)]
pub(crate) struct Bells {
    pub(crate) kick: Option<Arc<Bell>>,
    /// SET_VRING_KICK came without a descriptor: the guest does not kick.
    pub(crate) polled: bool,
    pub(crate) call: Option<Arc<Bell>>,
    pub(crate) error: Option<Arc<Bell>>,
}

impl Bells {
    /// Whether SET_VRING_KICK came.
    pub(crate) fn has_kick(&self) -> bool {
        self.kick.is_some() || self.polled
    }

    pub(crate) fn forget_kick(&mut self) {
        self.kick = None;
        self.polled = false;
    }
}

impl Bell {
    /// An eventfd that the guest rings; it becomes non-blocking, as we are the only reader.
    pub(crate) fn incoming(fd: OwnedFd) -> std::io::Result<Arc<Self>> {
        let flags = rustix::fs::fcntl_getfl(&fd)?;
        rustix::fs::fcntl_setfl(&fd, flags | OFlags::NONBLOCK)?;
        Ok(Arc::new(Self { fd, may_block: false }))
    }

    /// An eventfd that we ring. Its flags are left alone: the VMM may want to block in a read of it.
    pub(crate) fn outgoing(fd: OwnedFd) -> std::io::Result<Arc<Self>> {
        let may_block = !rustix::fs::fcntl_getfl(&fd)?.contains(OFlags::NONBLOCK);
        Ok(Arc::new(Self { fd, may_block }))
    }

    pub(crate) fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }

    /// Adds one to the counter. A counter that is full has signalled enough.
    pub(crate) fn ring(&self) {
        if self.may_block && !self.is_writable() {
            return;
        }
        let _ = rustix::io::write(&self.fd, &1u64.to_ne_bytes());
    }

    /// Takes what the counter has. Nothing there is fine too.
    pub(crate) fn clear(&self) {
        let mut count = [0; 8];
        let _ = rustix::io::read(&self.fd, &mut count);
    }

    fn is_writable(&self) -> bool {
        let mut fds = [PollFd::new(&self.fd, PollFlags::OUT)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        rustix::event::poll(&mut fds, Some(&now)).is_ok_and(|ready| ready > 0)
    }
}
