//! The guest's memory: the regions that the VMM shares with us.
#![allow(unsafe_code, reason = "guest memory is reached through raw pointers")]

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use crate::mapping::{MapError, Mapping};

/// A region as the VMM describes it (specification, "Memory region description").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RegionSpec {
    /// Guest-physical address.
    pub(crate) guest_addr: u64,
    /// Bytes.
    pub(crate) size: u64,
    /// Address in the VMM's process, in which SET_VRING_ADDR names the rings.
    pub(crate) user_addr: u64,
    /// Where in the file it begins.
    pub(crate) mmap_offset: u64,
}

/// Why a region was not taken.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MemoryError {
    #[error("region at guest address {0:#x} reaches beyond the end of the address space")]
    Wraps(u64),
    #[error("region at guest address {new:#x} overlaps the one at {old:#x}")]
    Overlaps { new: u64, old: u64 },
    #[error("region at guest address {guest_addr:#x}: {source}")]
    Map { guest_addr: u64, source: MapError },
    #[error("there is no region at guest address {0:#x} to remove")]
    NoSuchRegion(u64),
    #[error("more than {0} memory regions")]
    TooMany(usize),
}

#[derive(Clone)]
struct Region {
    guest_addr: u64,
    size: u64,
    user_addr: u64,
    base: *mut u8,
    mapping: Arc<Mapping>,
}

/// The regions of one memory table, mapped. Immutable: a changed table is a new value, and whoever still holds the
/// old one keeps its mappings.
#[derive(Default)]
pub struct GuestMemory {
    /// Sorted by guest address, not overlapping.
    regions: Vec<Region>,
}

// SAFETY: the addresses inside are kept mapped by the `Arc`s beside them and are valid on every thread; guest memory
// is only reached through raw copies, atomics and the kernel.
unsafe impl Send for GuestMemory {}
// SAFETY: as above; the table never changes.
unsafe impl Sync for GuestMemory {}

impl std::fmt::Debug for GuestMemory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.regions.iter().map(|r| (r.guest_addr, r.size))).finish()
    }
}

impl GuestMemory {
    /// How many regions there may be; the number that QEMU itself can have. It must never shrink.
    pub(crate) const MAX_REGIONS: usize = 509;

    /// Number of regions.
    #[must_use]
    pub fn regions(&self) -> usize {
        self.regions.len()
    }

    /// This table with one more region.
    pub(crate) fn with(&self, spec: RegionSpec, fd: BorrowedFd<'_>) -> Result<Self, MemoryError> {
        if self.regions.len() >= Self::MAX_REGIONS {
            return Err(MemoryError::TooMany(Self::MAX_REGIONS));
        }
        let wraps = |addr: u64| addr.checked_add(spec.size).is_none();
        if wraps(spec.guest_addr) || wraps(spec.user_addr) {
            return Err(MemoryError::Wraps(spec.guest_addr));
        }
        let meets = |a: u64, b: u64, b_size: u64| a < b + b_size && b < a + spec.size;
        // The VMM's own addresses may overlap: memory that the guest sees twice has one address there.
        if let Some(old) = self.regions.iter().find(|r| meets(spec.guest_addr, r.guest_addr, r.size)) {
            return Err(MemoryError::Overlaps { new: spec.guest_addr, old: old.guest_addr });
        }
        let mapping = Mapping::new(fd, spec.mmap_offset, spec.size)
            .map_err(|source| MemoryError::Map { guest_addr: spec.guest_addr, source })?;
        let region = Region {
            guest_addr: spec.guest_addr,
            size: spec.size,
            user_addr: spec.user_addr,
            base: mapping.base(),
            mapping: Arc::new(mapping),
        };
        let mut regions = self.regions.clone();
        let at = regions.partition_point(|r| r.guest_addr < region.guest_addr);
        regions.insert(at, region);
        Ok(Self { regions })
    }

    /// This table without the region that has the same addresses and size (the offset does not count).
    pub(crate) fn without(&self, spec: RegionSpec) -> Result<Self, MemoryError> {
        let same =
            |r: &Region| (r.guest_addr, r.user_addr, r.size) == (spec.guest_addr, spec.user_addr, spec.size);
        let at = self.regions.iter().position(same).ok_or(MemoryError::NoSuchRegion(spec.guest_addr))?;
        let mut regions = self.regions.clone();
        regions.remove(at);
        Ok(Self { regions })
    }

    /// The address here of guest address `addr`, and the bytes from there to the end of its region.
    /// `hint` remembers the region found last.
    #[inline]
    pub(crate) fn locate(&self, addr: u64, hint: &mut usize) -> Option<(*mut u8, u64)> {
        if let Some(found) = self.regions.get(*hint).and_then(|region| region.locate(addr)) {
            return Some(found);
        }
        *hint = self.regions.partition_point(|r| r.guest_addr <= addr).checked_sub(1)?;
        self.regions.get(*hint)?.locate(addr)
    }

    /// The address here of `len` bytes at the VMM's address `user_addr`, which must lie in one region.
    pub(crate) fn locate_user(&self, user_addr: u64, len: u64) -> Option<*mut u8> {
        self.regions.iter().find_map(|r| {
            let skip = user_addr.checked_sub(r.user_addr)?;
            let fits = skip < r.size && len <= r.size - skip;
            // SAFETY: `skip` is inside the region, all of which is mapped from `base` on.
            fits.then(|| unsafe { r.base.add(skip as usize) })
        })
    }

    /// Copies guest memory at `addr`, which may cross regions. `false`: not all of it exists.
    pub(crate) fn read(&self, mut addr: u64, mut to: &mut [u8], hint: &mut usize) -> bool {
        while !to.is_empty() {
            let Some((from, have)) = self.locate(addr, hint) else { return false };
            let take = to.len().min(usize::try_from(have).unwrap_or(usize::MAX));
            let (now, later) = to.split_at_mut(take);
            for (index, byte) in now.iter_mut().enumerate() {
                // SAFETY: `take <= have` bytes are mapped from `from` on.
                *byte = unsafe { from.add(index).read_volatile() };
            }
            to = later;
            match addr.checked_add(take as u64) {
                Some(next) => addr = next,
                None => return to.is_empty(),
            }
        }
        true
    }
}

impl Region {
    #[inline]
    fn locate(&self, addr: u64) -> Option<(*mut u8, u64)> {
        debug_assert_eq!(self.mapping.len() as u64, self.size);
        let skip = addr.wrapping_sub(self.guest_addr);
        if skip >= self.size {
            return None;
        }
        // SAFETY: `skip` is inside the region, all of which is mapped from `base` on.
        Some((unsafe { self.base.add(skip as usize) }, self.size - skip))
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::{AsFd, OwnedFd};

    use rustix::fs::MemfdFlags;

    use super::*;

    fn memfd(len: u64) -> OwnedFd {
        let fd = rustix::fs::memfd_create("guest", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
        rustix::fs::ftruncate(&fd, len).unwrap();
        fd
    }

    fn spec(guest_addr: u64, size: u64, user_addr: u64, mmap_offset: u64) -> RegionSpec {
        RegionSpec { guest_addr, size, user_addr, mmap_offset }
    }

    #[test]
    fn overlap_and_wrap_refused() {
        let fd = memfd(0x10_000);
        let one = GuestMemory::default().with(spec(0x1000, 0x2000, 0x7000_0000, 0), fd.as_fd()).unwrap();
        let overlap = one.with(spec(0x2000, 0x2000, 0x8000_0000, 0), fd.as_fd());
        assert!(matches!(overlap, Err(MemoryError::Overlaps { .. })));
        let wrap = one.with(spec(u64::MAX - 0xfff, 0x2000, 0x9000_0000, 0), fd.as_fd());
        assert!(matches!(wrap, Err(MemoryError::Wraps(_))));
        assert!(one.with(spec(0x3000, 0x1000, 0x7000_2000, 0x3000), fd.as_fd()).is_ok());
    }

    #[test]
    fn memory_that_the_guest_sees_twice_has_one_address_in_the_vmm() {
        let fd = memfd(0x10_000);
        let alias = GuestMemory::default()
            .with(spec(0x1000, 0x4000, 0x7000_0000, 0), fd.as_fd())
            .and_then(|m| m.with(spec(0x10_0000, 0x1000, 0x7000_2000, 0x2000), fd.as_fd()))
            .unwrap();
        rustix::io::pwrite(&fd, b"twice", 0x2000).unwrap();
        for at in [0x3000, 0x10_0000] {
            let mut seen = [0; 5];
            assert!(alias.read(at, &mut seen, &mut 0));
            assert_eq!(&seen, b"twice");
        }
        assert!(alias.locate_user(0x7000_2000, 0x1000).is_some());
    }

    #[test]
    fn addresses_found_in_their_regions_only() {
        let fd = memfd(0x4000);
        let memory = GuestMemory::default()
            .with(spec(0x8000, 0x2000, 0x7000_0000, 0x2000), fd.as_fd())
            .and_then(|m| m.with(spec(0x1000, 0x2000, 0x6000_0000, 0), fd.as_fd()))
            .unwrap();
        let mut hint = 0;
        assert!(memory.locate(0xfff, &mut hint).is_none());
        assert_eq!(memory.locate(0x1000, &mut hint).unwrap().1, 0x2000);
        assert_eq!(memory.locate(0x9fff, &mut hint).unwrap().1, 1);
        assert!(memory.locate(0xa000, &mut hint).is_none());
        assert!(memory.locate(u64::MAX, &mut hint).is_none());
        assert!(memory.locate_user(0x7000_0000, 0x2000).is_some());
        assert!(memory.locate_user(0x7000_0001, 0x2000).is_none());
        assert!(memory.locate_user(0x7000_0000, u64::MAX).is_none());
    }

    #[test]
    fn read_across_adjacent_regions_joins_them() {
        let fd = memfd(0x4000);
        rustix::io::pwrite(&fd, b"ab", 0x1fff).unwrap();
        rustix::io::pwrite(&fd, b"cd", 0x3000).unwrap();
        let memory = GuestMemory::default()
            .with(spec(0x1000, 0x2000, 0x6000_0000, 0), fd.as_fd())
            .and_then(|m| m.with(spec(0x3000, 0x1000, 0x7000_0000, 0x3000), fd.as_fd()))
            .unwrap();
        let mut seen = [0; 3];
        let mut hint = 0;
        assert!(memory.read(0x2fff, &mut seen, &mut hint));
        assert_eq!(&seen, b"acd");
        assert!(!memory.read(0x3fff, &mut seen, &mut hint));
    }

    #[test]
    fn removal_needs_the_same_region_and_keeps_old_tables_mapped() {
        let fd = memfd(0x4000);
        let whole = spec(0x1000, 0x2000, 0x6000_0000, 0);
        let memory = GuestMemory::default().with(whole, fd.as_fd()).unwrap();
        assert!(memory.without(spec(0x1000, 0x1000, 0x6000_0000, 0)).is_err());
        let empty = memory.without(whole).unwrap();
        assert_eq!(empty.regions(), 0);
        let mut byte = [1];
        assert!(memory.read(0x1000, &mut byte, &mut 0));
    }
}
