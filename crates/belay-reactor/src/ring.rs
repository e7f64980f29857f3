//! The io_uring of a data-plane thread.

use std::io;
use std::os::fd::RawFd;
use std::time::Duration;

use io_uring::{IoUring, cqueue, opcode, squeue, types};

use crate::{OwnerId, Token};

/// An operation's end, as the kernel reported it.
#[derive(Clone, Copy, Debug)]
pub struct Cqe {
    /// Whose it is.
    pub token: Token,
    /// Bytes done, or a negative errno.
    pub res: i32,
    /// A multishot operation that will report again.
    pub more: bool,
}

/// Completions of operations that nobody waits for (cancellations) go here, and are dropped.
const NOBODY: OwnerId = OwnerId(u16::MAX);

/// One io_uring and what is queued on it. Not `Sync`: it belongs to its thread.
pub struct Ring {
    uring: IoUring,
    unsubmitted: usize,
    /// The kernel says in shared memory whether completions wait to be made: without that word no system call is
    /// needed to look for them.
    tells: bool,
}

impl Ring {
    /// A ring with room for `entries` unsubmitted operations, and four times as many completions.
    ///
    /// Uses single-issuer and deferred task work where the kernel has them (6.1), plain rings otherwise. The
    /// thread that calls this must be the one that uses the ring.
    ///
    /// # Errors
    /// The kernel has no io_uring, forbids it (sysctl `kernel.io_uring_disabled`), or is out of locked memory.
    pub fn new(entries: u32) -> io::Result<Self> {
        let tuned = IoUring::builder()
            .setup_cqsize(entries * 4)
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_coop_taskrun()
            .setup_taskrun_flag()
            .build(entries);
        let (uring, tells) = match tuned {
            Ok(uring) => (uring, true),
            Err(_) => (IoUring::builder().setup_cqsize(entries * 4).build(entries)?, false),
        };
        Ok(Self { uring, unsubmitted: 0, tells })
    }

    /// Queues one operation. It reaches the kernel at the next [`Ring::submit`] or [`Ring::wait`], or at once
    /// when the submission queue is full.
    ///
    /// # Safety
    /// All memory that `entry` names must stay valid, and buffers must not move, until its completion has been
    /// taken; iovec arrays and the like until it has been submitted.
    ///
    /// # Errors
    /// The kernel refused the submission; `entry` was not queued.
    pub unsafe fn push(&mut self, entry: squeue::Entry, token: Token) -> io::Result<()> {
        let entry = entry.user_data(token.pack());
        if self.uring.submission().is_full() {
            self.submit()?;
        }
        // SAFETY: the caller keeps what the entry names valid (this function's contract).
        unsafe { self.uring.submission().push(&entry) }
            .map_err(|_| io::Error::from(io::ErrorKind::WouldBlock))?;
        self.unsubmitted += 1;
        Ok(())
    }

    /// Reports once when `fd` is ready for any of `events` (`libc::POLLIN` …).
    ///
    /// # Errors
    /// As [`Ring::push`].
    pub fn poll_once(&mut self, fd: RawFd, events: i16, token: Token) -> io::Result<()> {
        let entry = opcode::PollAdd::new(types::Fd(fd), events as u32).build();
        // SAFETY: a poll names no memory.
        unsafe { self.push(entry, token) }
    }

    /// Reports whenever `fd` becomes readable, until cancelled (a [`Cqe`] with `more == false` ends it: poll again).
    ///
    /// # Errors
    /// As [`Ring::push`].
    pub fn poll_readable(&mut self, fd: RawFd, token: Token) -> io::Result<()> {
        let entry = opcode::PollAdd::new(types::Fd(fd), libc::POLLIN as u32).multi(true).build();
        // SAFETY: a poll names no memory.
        unsafe { self.push(entry, token) }
    }

    /// Asks for the operation with `token` to be cancelled. Its own completion still comes.
    ///
    /// # Errors
    /// As [`Ring::push`].
    pub fn cancel(&mut self, token: Token) -> io::Result<()> {
        let entry = opcode::AsyncCancel::new(token.pack()).build();
        // SAFETY: a cancellation names no memory.
        unsafe { self.push(entry, Token::new(NOBODY, 0)) }
    }

    /// Operations queued but not yet given to the kernel.
    #[must_use]
    pub fn unsubmitted(&self) -> usize {
        self.unsubmitted
    }

    /// Gives what is queued to the kernel, without waiting, and lets it make completions that are due.
    ///
    /// # Errors
    /// Anything but an interrupted or momentarily busy submission, which are retried later.
    pub fn submit(&mut self) -> io::Result<()> {
        let queue = self.uring.submission();
        if self.tells && queue.is_empty() && !queue.taskrun() && !queue.cq_overflow() {
            return Ok(());
        }
        drop(queue);
        self.enter(0, None)
    }

    /// Gives what is queued to the kernel and waits for a completion, at most `limit`.
    ///
    /// # Errors
    /// As [`Ring::submit`]. Time running out is not an error.
    pub fn wait(&mut self, limit: Option<Duration>) -> io::Result<()> {
        self.enter(1, limit)
    }

    /// Takes the completions that have come, into `out`.
    pub fn completions(&mut self, out: &mut Vec<Cqe>) {
        for cqe in self.uring.completion() {
            let token = Token::unpack(cqe.user_data());
            if token.owner != NOBODY {
                out.push(Cqe { token, res: cqe.result(), more: cqueue::more(cqe.flags()) });
            }
        }
    }

    fn enter(&mut self, want: usize, limit: Option<Duration>) -> io::Result<()> {
        let submitter = self.uring.submitter();
        let result = match limit {
            Some(limit) if want > 0 => {
                let time = types::Timespec::new().sec(limit.as_secs()).nsec(limit.subsec_nanos());
                submitter.submit_with_args(want, &types::SubmitArgs::new().timespec(&time))
            }
            // With deferred task work, completions are only made when asked for: GETEVENTS.
            _ if want == 0 => {
                // SAFETY: no argument is passed, and the ring is the thread's own.
                unsafe {
                    let count = self.uring.submission_shared().len() as u32;
                    submitter.enter::<libc::sigset_t>(count, 0, 1, None)
                }
            }
            _ => submitter.submit_and_wait(want),
        };
        match result {
            Ok(_) => {}
            Err(error) => match error.raw_os_error() {
                Some(libc::ETIME | libc::EINTR | libc::EBUSY | libc::EAGAIN) => {}
                _ => return Err(error),
            },
        }
        self.unsubmitted = self.uring.submission().len();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use super::*;
    use crate::Waker;

    fn next(ring: &mut Ring) -> Cqe {
        let mut out = Vec::new();
        while out.is_empty() {
            ring.wait(Some(Duration::from_secs(10))).unwrap();
            ring.completions(&mut out);
        }
        out[0]
    }

    #[test]
    fn woken_waker_completes_its_poll() {
        let mut ring = Ring::new(8).unwrap();
        let waker = Waker::new().unwrap();
        let token = Token::new(OwnerId(3), 9);
        ring.poll_readable(waker.as_raw_fd(), token).unwrap();
        waker.wake();
        let cqe = next(&mut ring);
        assert_eq!(cqe.token, token);
        assert!(cqe.more);
        waker.clear();
    }

    #[test]
    fn more_operations_than_entries_all_complete() {
        let mut ring = Ring::new(4).unwrap();
        for slot in 0..64 {
            // SAFETY: a no-op names no memory.
            unsafe { ring.push(opcode::Nop::new().build(), Token::new(OwnerId(1), slot)) }.unwrap();
        }
        let mut out = Vec::new();
        while out.len() < 64 {
            ring.wait(Some(Duration::from_secs(10))).unwrap();
            ring.completions(&mut out);
        }
        assert_eq!(out.len(), 64);
    }

    #[test]
    fn wait_without_work_returns_when_the_limit_is_over() {
        let mut ring = Ring::new(4).unwrap();
        ring.wait(Some(Duration::from_millis(1))).unwrap();
        let mut out = Vec::new();
        ring.completions(&mut out);
        assert!(out.is_empty());
    }

    #[test]
    fn cancelled_poll_reports_its_end() {
        let mut ring = Ring::new(4).unwrap();
        let waker = Waker::new().unwrap();
        let token = Token::new(OwnerId(1), 5);
        ring.poll_readable(waker.as_raw_fd(), token).unwrap();
        ring.submit().unwrap();
        ring.cancel(token).unwrap();
        let cqe = next(&mut ring);
        assert_eq!(cqe.res, -libc::ECANCELED);
        assert!(!cqe.more);
    }
}
