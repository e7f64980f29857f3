//! Walks a descriptor chain and validates it (virtio 1.2, sections 2.7.5 and 2.7.7).
//!
//! Every descriptor is read once, into a copy: what is checked is what is used, though the guest may change it.
#![allow(unsafe_code, reason = "descriptor tables live in guest memory")]

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use smallvec::SmallVec;

use crate::chain::{Chain, Piece};
use crate::error::ChainFault;
use crate::memory::GuestMemory;

/// Bytes of a descriptor.
pub(crate) const DESCRIPTOR: usize = 16;
/// Most descriptors of a chain, if the ring is not larger: more than any driver uses, few enough that a ring full of
/// such chains costs us megabytes and not gigabytes.
const MAX_DESCRIPTORS: u32 = 1024;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

#[derive(Clone, Copy)]
struct Descriptor {
    addr: u64,
    len: u32,
    flags: u16,
    next: u16,
}

impl Descriptor {
    #[inline]
    fn from_words(addr: u64, rest: u64) -> Self {
        let rest = u64::from_le(rest);
        Self {
            addr: u64::from_le(addr),
            len: rest as u32,
            flags: (rest >> 32) as u16,
            next: (rest >> 48) as u16,
        }
    }
}

/// Where the descriptors are that `next` counts in.
#[derive(Clone, Copy)]
enum Table {
    /// The ring's own table, or an indirect one in a single region and aligned: an address here.
    Mapped { base: *const u8, entries: u32 },
    /// An indirect table that crosses regions or is not aligned: an address of the guest's.
    Guest { addr: u64, entries: u32 },
}

/// Where a chain that is not valid can be answered all the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Tail {
    /// Guest address of the last byte that the device may write.
    pub(crate) guest_addr: u64,
    /// Bytes that the device may write, that one included.
    pub(crate) len: u32,
}

/// What a ring lends for a walk.
pub(crate) struct Walk<'a> {
    pub(crate) memory: &'a Arc<GuestMemory>,
    /// The ring's descriptor table: mapped, aligned to 16.
    pub(crate) table: *const u8,
    /// Entries of it.
    pub(crate) size: u16,
    /// VIRTIO_F_INDIRECT_DESC was negotiated.
    pub(crate) indirect: bool,
    /// The region found last.
    pub(crate) hint: &'a mut usize,
}

impl Walk<'_> {
    /// The chain that begins at `head`, which must be below `size`.
    #[inline]
    pub(crate) fn chain(&mut self, head: u16) -> Result<Chain, ChainFault> {
        debug_assert!(head < self.size);
        let mut chain = Chain {
            head,
            readable: SmallVec::new(),
            writable: SmallVec::new(),
            memory: Arc::clone(self.memory),
        };
        let mut table = Table::Mapped { base: self.table, entries: u32::from(self.size) };
        let mut nested = false;
        let (mut index, mut seen, mut total) = (head, 0u32, 0u64);
        loop {
            seen += 1;
            if seen > table.entries().max(1) || seen > MAX_DESCRIPTORS.max(u32::from(self.size)) {
                return Err(ChainFault::Loop);
            }
            let found = self.descriptor(table, index)?;
            if found.flags & INDIRECT != 0 {
                if nested {
                    return Err(ChainFault::NestedIndirect);
                }
                table = self.indirect_table(found)?;
                (nested, index, seen) = (true, 0, 0);
                continue;
            }
            total += u64::from(found.len);
            if total > u64::from(u32::MAX) {
                return Err(ChainFault::TooLong);
            }
            self.add(&mut chain, found)?;
            if found.flags & NEXT == 0 {
                return Ok(chain);
            }
            if u32::from(found.next) >= table.entries() {
                return Err(ChainFault::NextOutOfRange);
            }
            index = found.next;
        }
    }

    /// The last byte that the device may write of a chain that may not be valid, if its descriptors can be followed to
    /// their end and that byte is in the guest's memory. `head` must be below `size`.
    #[cold]
    pub(crate) fn tail(&mut self, head: u16) -> Option<Tail> {
        let mut table = Table::Mapped { base: self.table, entries: u32::from(self.size) };
        let (mut index, mut seen, mut nested) = (head, 0u32, false);
        let (mut last, mut len) = (None, 0u32);
        loop {
            seen += 1;
            if seen > table.entries() || seen > MAX_DESCRIPTORS.max(u32::from(self.size)) {
                return None;
            }
            let found = self.descriptor(table, index).ok()?;
            if found.flags & INDIRECT != 0 {
                if nested {
                    return None;
                }
                table = self.indirect_table(found).ok()?;
                (nested, index, seen) = (true, 0, 0);
                continue;
            }
            if found.flags & WRITE != 0 && found.len > 0 {
                last = found.addr.checked_add(u64::from(found.len) - 1);
                len = len.saturating_add(found.len);
            }
            if found.flags & NEXT == 0 {
                break;
            }
            if u32::from(found.next) >= table.entries() {
                return None;
            }
            index = found.next;
        }
        let guest_addr = last?;
        self.memory.locate(guest_addr, self.hint)?;
        Some(Tail { guest_addr, len })
    }

    /// Reads one descriptor of a table; `index` is below its entries.
    #[inline]
    fn descriptor(&mut self, table: Table, index: u16) -> Result<Descriptor, ChainFault> {
        let skip = usize::from(index) * DESCRIPTOR;
        match table {
            Table::Mapped { base, .. } => {
                // SAFETY: the table's entries are mapped, aligned to 8, and `index` is below their number; the guest
                // may write them meanwhile, so they are read with atomics.
                let (addr, rest) = unsafe {
                    let at = base.add(skip).cast_mut();
                    (AtomicU64::from_ptr(at.cast()), AtomicU64::from_ptr(at.add(8).cast()))
                };
                Ok(Descriptor::from_words(addr.load(Ordering::Relaxed), rest.load(Ordering::Relaxed)))
            }
            Table::Guest { addr, .. } => {
                let mut bytes = [0; DESCRIPTOR];
                let at = addr.checked_add(skip as u64).ok_or(ChainFault::OutsideMemory)?;
                if !self.memory.read(at, &mut bytes, self.hint) {
                    return Err(ChainFault::OutsideMemory);
                }
                let all = u128::from_ne_bytes(bytes);
                Ok(if cfg!(target_endian = "little") {
                    Descriptor::from_words(all as u64, (all >> 64) as u64)
                } else {
                    Descriptor::from_words((all >> 64) as u64, all as u64)
                })
            }
        }
    }

    fn indirect_table(&mut self, descriptor: Descriptor) -> Result<Table, ChainFault> {
        if !self.indirect {
            return Err(ChainFault::IndirectNotNegotiated);
        }
        if descriptor.flags & NEXT != 0 {
            return Err(ChainFault::IndirectWithNext);
        }
        let len = u64::from(descriptor.len);
        let entries = descriptor.len / DESCRIPTOR as u32;
        if entries == 0 || !len.is_multiple_of(DESCRIPTOR as u64) || entries > 32768 {
            return Err(ChainFault::IndirectLength);
        }
        let (base, have) = self.memory.locate(descriptor.addr, self.hint).ok_or(ChainFault::OutsideMemory)?;
        if have >= len && base.addr().is_multiple_of(align_of::<AtomicU64>()) {
            return Ok(Table::Mapped { base, entries });
        }
        Ok(Table::Guest { addr: descriptor.addr, entries })
    }

    /// Adds a descriptor's buffer to the chain, in one piece for each region that it lies in.
    #[inline]
    fn add(&mut self, chain: &mut Chain, descriptor: Descriptor) -> Result<(), ChainFault> {
        let pieces = if descriptor.flags & WRITE != 0 {
            &mut chain.writable
        } else if chain.writable.is_empty() {
            &mut chain.readable
        } else {
            return Err(ChainFault::ReadableAfterWritable);
        };
        let (mut addr, mut left) = (descriptor.addr, u64::from(descriptor.len));
        if left == 0 {
            return Err(ChainFault::ZeroLength);
        }
        loop {
            let (base, have) = self.memory.locate(addr, self.hint).ok_or(ChainFault::OutsideMemory)?;
            let len = left.min(have);
            pieces.push(Piece { base, len: len as usize, guest_addr: addr });
            left -= len;
            if left == 0 {
                return Ok(());
            }
            addr = addr.checked_add(len).ok_or(ChainFault::OutsideMemory)?;
        }
    }
}

impl Table {
    #[inline]
    fn entries(self) -> u32 {
        match self {
            Self::Mapped { entries, .. } | Self::Guest { entries, .. } => entries,
        }
    }
}

// Descriptors are read as two words, which must not need more alignment than the ring's address has.
const _: () = assert!(align_of::<AtomicU64>() <= DESCRIPTOR);
