//! Memory of a VMM's that may go away: files that are cut short under their mappings.
//!
//! Memory files can be sealed against that, other files cannot, and touching a page that a file has no more ends a
//! process with SIGBUS: one VMM could end the agent of all. So a handler puts an empty page of ours in the place of such
//! a page, and the thread goes on. It counts that: whoever works with the memory asks ([`faults`]) and lets go of it.
//! (The kernel itself never faults: an operation of its own on such a page fails with `EFAULT`.)
#![allow(unsafe_code, reason = "a signal handler, which maps memory")]

use std::cell::Cell;
use std::mem::MaybeUninit;
use std::ptr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};

thread_local! {
    /// How often this thread has touched a page that was gone. Without a destructor, so that a handler may use it.
    static FAULTS: Cell<u64> = const { Cell::new(0) };
}

/// A range that is guarded. Kept for ever, and used again: a handler may be looking at it at any time.
struct Node {
    /// First address; 0: free; 1: being filled.
    start: AtomicUsize,
    len: AtomicUsize,
    /// Size of its pages.
    page: AtomicUsize,
    next: *const Node,
}

/// The first of all nodes.
static NODES: AtomicPtr<Node> = AtomicPtr::new(ptr::null_mut());
/// What was there for SIGBUS before.
static BEFORE: OnceLock<libc::sigaction> = OnceLock::new();

const FREE: usize = 0;
const FILLING: usize = 1;

/// How often the calling thread has touched memory of a VMM's that is gone. It read zeroes, and what it wrote is lost.
#[must_use]
pub fn faults() -> u64 {
    FAULTS.get()
}

/// A guarded range; no longer when dropped, which must be before it is unmapped.
pub(crate) struct Guard(&'static Node);

impl Guard {
    /// Guards a mapping of pages of this size, which it begins and ends at.
    pub(crate) fn new(start: *mut u8, len: usize, page: usize) -> Self {
        BEFORE.get_or_init(install);
        let node = nodes().find(|node| {
            node.start.compare_exchange(FREE, FILLING, Ordering::Acquire, Ordering::Relaxed).is_ok()
        });
        let node = node.unwrap_or_else(add_node);
        node.len.store(len, Ordering::Relaxed);
        node.page.store(page, Ordering::Relaxed);
        node.start.store(start.addr(), Ordering::Release);
        Self(node)
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.0.start.store(FREE, Ordering::Release);
    }
}

fn nodes() -> impl Iterator<Item = &'static Node> {
    let mut at: *const Node = NODES.load(Ordering::Acquire);
    std::iter::from_fn(move || {
        // SAFETY: nodes are never freed, and complete before they are in the list.
        let node = unsafe { at.as_ref() }?;
        at = node.next;
        Some(node)
    })
}

fn add_node() -> &'static Node {
    let node = Box::leak(Box::new(Node {
        start: AtomicUsize::new(FILLING),
        len: AtomicUsize::new(0),
        page: AtomicUsize::new(0),
        next: ptr::null(),
    }));
    let node: *mut Node = node;
    let mut first = NODES.load(Ordering::Acquire);
    loop {
        // SAFETY: nobody else has this node before the exchange below.
        unsafe { (*node).next = first };
        match NODES.compare_exchange_weak(first, node, Ordering::AcqRel, Ordering::Acquire) {
            // SAFETY: leaked, and from here on only shared.
            Ok(_) => return unsafe { &*node },
            Err(now) => first = now,
        }
    }
}

/// Takes SIGBUS, and says who had it.
fn install() -> libc::sigaction {
    let mut before = MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: the structure is plain data, filled before it is used; the handler does only what handlers may.
    unsafe {
        let mut ours: libc::sigaction = std::mem::zeroed();
        ours.sa_sigaction = on_sigbus as *const () as usize;
        ours.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        libc::sigemptyset(&raw mut ours.sa_mask);
        libc::sigaction(libc::SIGBUS, &raw const ours, before.as_mut_ptr());
        before.assume_init()
    }
}

extern "C" fn on_sigbus(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel gives a valid siginfo; SIGBUS has an address.
    let addr = unsafe { (*info).si_addr() }.addr();
    if replace_page(addr) {
        FAULTS.set(FAULTS.get() + 1);
        return;
    }
    // Not ours. `BEFORE` may not be set yet on another thread: then nobody had it.
    let before = BEFORE.get();
    // SAFETY: what was installed before is called as the kernel would have; without a handler the default action is put
    // back, and the access that comes again ends the process as it would have.
    unsafe {
        match before {
            Some(before) if before.sa_sigaction != libc::SIG_DFL && before.sa_sigaction != libc::SIG_IGN => {
                if before.sa_flags & libc::SA_SIGINFO != 0 {
                    let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) =
                        std::mem::transmute(before.sa_sigaction);
                    handler(signal, info, context);
                } else {
                    let handler: extern "C" fn(libc::c_int) = std::mem::transmute(before.sa_sigaction);
                    handler(signal);
                }
            }
            _ => {
                libc::signal(libc::SIGBUS, libc::SIG_DFL);
            }
        }
    }
}

/// Puts an empty page where this address is, if that is in a guarded range.
fn replace_page(addr: usize) -> bool {
    let Some((start, page)) = nodes().find_map(|node| {
        let start = node.start.load(Ordering::Acquire);
        let inside = start > FILLING && addr >= start && addr - start < node.len.load(Ordering::Relaxed);
        inside.then(|| (start, node.page.load(Ordering::Relaxed)))
    }) else {
        return false;
    };
    let at = start + (addr - start) / page * page;
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE;
    // SAFETY: the page is one of a mapping that is alive, as a thread is just touching it, and that is reached through
    // raw copies and atomics only. `errno` is what the interrupted code may be about to read.
    unsafe {
        let errno = *libc::__errno_location();
        let mapped = libc::mmap(at as *mut libc::c_void, page, protection, flags, -1, 0);
        *libc::__errno_location() = errno;
        mapped != libc::MAP_FAILED
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use rustix::fs::MemfdFlags;

    use crate::mapping::Mapping;

    use super::*;

    #[test]
    fn page_that_a_file_has_no_more_is_empty_and_counted() {
        // Without ALLOW_SEALING: as little sealable as a file on disk.
        let fd = rustix::fs::memfd_create("test", MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&fd, 0x4000).unwrap();
        rustix::io::pwrite(&fd, &[7; 0x4000], 0).unwrap();
        let mapping = Mapping::new(fd.as_fd(), 0x1000, 0x3000).unwrap();
        // SAFETY: every address is inside the mapping.
        let read = |at: usize| unsafe { mapping.base().add(at).read_volatile() };
        assert_eq!((read(0x2fff), faults()), (7, 0));
        rustix::fs::ftruncate(&fd, 0x2000).unwrap();
        assert_eq!((read(0xfff), faults()), (7, 0), "what is there still stays");
        assert_eq!((read(0x1000), read(0x1fff), faults()), (0, 0, 1));
        assert_eq!((read(0x2fff), faults()), (0, 2));
        // SAFETY: as above.
        unsafe { mapping.base().add(0x2000).write_volatile(3) };
        assert_eq!((read(0x2000), faults()), (3, 2));
        assert_eq!(std::thread::spawn(faults).join().unwrap(), 0);
    }

    #[test]
    fn ranges_are_used_again() {
        let fd = rustix::fs::memfd_create("test", MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&fd, 0x1000).unwrap();
        let two = || [Mapping::new(fd.as_fd(), 0, 1).unwrap(), Mapping::new(fd.as_fd(), 0, 1).unwrap()];
        drop(two());
        let before = nodes().count();
        for _ in 0..100 {
            drop(two());
        }
        // Other tests map at the same time.
        assert!(nodes().count() < before + 50);
    }
}
