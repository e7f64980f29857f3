//! A request as the guest laid it out: pieces of guest memory.
#![allow(
    unsafe_code,
    reason = "pieces are raw addresses of guest memory; why they may cross threads is said here"
)]

use std::sync::Arc;

use smallvec::SmallVec;

use crate::memory::GuestMemory;

/// Contiguous guest memory, mapped here. Shared with the guest: never form a reference to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Address in this process.
    pub base: *mut u8,
    /// Length in bytes, never 0.
    pub len: usize,
    /// Guest-physical address of the first byte.
    pub guest_addr: u64,
}

/// A validated descriptor chain: every piece lies in the guest's memory, readable ones first.
///
/// A descriptor whose buffer crosses the border of two memory regions is split into several pieces.
#[derive(Clone)]
pub struct Chain {
    /// The head: the chain's name in this ring, from 0 to the ring's size less one.
    pub head: u16,
    /// What the device may read, in order.
    pub readable: SmallVec<[Piece; 4]>,
    /// What the device may write, in order.
    pub writable: SmallVec<[Piece; 4]>,
    /// Keeps the pieces mapped, whatever becomes of the memory table and the connection.
    pub memory: Arc<GuestMemory>,
}

// SAFETY: a chain is addresses plus the owner that keeps them mapped on every thread; the memory itself is only
// reached through raw copies and the kernel, never through references.
unsafe impl Send for Chain {}

impl std::fmt::Debug for Chain {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Chain")
            .field("head", &self.head)
            .field("readable", &self.readable)
            .field("writable", &self.writable)
            .finish_non_exhaustive()
    }
}

impl Chain {
    /// Bytes that the device may read.
    #[must_use]
    pub fn readable_len(&self) -> usize {
        self.readable.iter().map(|piece| piece.len).sum()
    }

    /// Bytes that the device may write.
    #[must_use]
    pub fn writable_len(&self) -> usize {
        self.writable.iter().map(|piece| piece.len).sum()
    }
}
