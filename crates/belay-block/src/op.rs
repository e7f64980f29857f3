//! One block operation, as a backend sees it.
#![allow(
    unsafe_code,
    reason = "operations carry raw addresses of guest memory; each use says why it is sound"
)]

use std::any::Any;
use std::sync::Arc;

use smallvec::SmallVec;

/// A submitter's own number for an operation in flight; unique among those in flight at one backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct OpId(pub u64);

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum OpKind {
    /// Fill the buffer from the device.
    Read,
    /// Write the buffer to the device.
    Write,
    /// Everything acknowledged before this was submitted becomes durable. `offset` and `len` are 0.
    Flush,
    /// The range's content is no longer needed: it reads as zeroes afterwards, or as before where space cannot be given
    /// back.
    Discard,
    /// The range reads as zeroes afterwards. `unmap`: space may be given back.
    WriteZeroes {
        /// The guest allows the backend to free the space.
        unmap: bool,
    },
}

impl OpKind {
    /// Whether the operation changes the device's content.
    #[must_use]
    pub fn changes_content(self) -> bool {
        matches!(self, Self::Write | Self::Discard | Self::WriteZeroes { .. })
    }
}

/// A piece of memory: an address in this process and a length in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IoVec {
    /// Where it begins.
    pub base: *mut u8,
    /// Its length, in bytes.
    pub len: usize,
}

/// The memory of a read or write: pieces, in order, and what keeps them mapped.
///
/// Guest memory is shared with the guest, which may change it at any time: nobody may form a Rust reference to
/// it. Copy through [`Buf::copy_to`] and [`Buf::copy_from`], or give the addresses to the kernel.
#[derive(Clone, Default)]
pub struct Buf {
    /// The pieces, in the order of the device's bytes.
    pub pieces: SmallVec<[IoVec; 4]>,
    /// Keeps the memory valid; dropped with the last operation that uses it.
    pub keep: Option<Arc<dyn Any + Send + Sync>>,
}

// SAFETY: a `Buf` is addresses plus the owner that keeps them valid on every thread; access is only through raw
// copies and the kernel, never through references.
unsafe impl Send for Buf {}

impl std::fmt::Debug for Buf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Buf").field("pieces", &self.pieces.len()).field("len", &self.len()).finish()
    }
}

impl Buf {
    /// A buffer over a boxed slice of this process, which it owns.
    #[must_use]
    pub fn owned(bytes: Box<[u8]>) -> Self {
        let bytes = Arc::new(OwnedBytes(Box::into_raw(bytes)));
        let piece = IoVec { base: bytes.0.cast::<u8>(), len: bytes.0.len() };
        Self { pieces: SmallVec::from_slice(&[piece]), keep: Some(bytes) }
    }

    /// A buffer of `len` zero bytes whose start is aligned to `align` (a power of two), as O_DIRECT wants it.
    #[must_use]
    pub fn aligned(len: usize, align: usize) -> Self {
        Self::of(Arc::new(Aligned::new(len, align)), len)
    }

    /// The first `len` bytes of this memory.
    pub(crate) fn of(memory: Arc<Aligned>, len: usize) -> Self {
        assert!(len <= memory.len(), "{len} bytes of {}", memory.len());
        let piece = IoVec { base: memory.base, len };
        Self { pieces: SmallVec::from_slice(&[piece]), keep: Some(memory) }
    }

    /// Bytes in all.
    #[must_use]
    pub fn len(&self) -> usize {
        self.pieces.iter().map(|piece| piece.len).sum()
    }

    /// Whether there are no bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The part of this buffer that begins `skip` bytes in and is `len` bytes long, sharing the memory.
    ///
    /// # Panics
    /// The part reaches past the buffer's end: the caller computed it from the same buffer.
    #[must_use]
    pub fn part(&self, mut skip: usize, mut len: usize) -> Self {
        assert!(skip + len <= self.len(), "part {skip}+{len} of a buffer of {}", self.len());
        let mut pieces = SmallVec::new();
        for piece in &self.pieces {
            if len == 0 {
                break;
            }
            if skip >= piece.len {
                skip -= piece.len;
                continue;
            }
            let take = (piece.len - skip).min(len);
            // SAFETY: `skip < piece.len`, so the result stays inside the piece.
            pieces.push(IoVec { base: unsafe { piece.base.add(skip) }, len: take });
            skip = 0;
            len -= take;
        }
        Self { pieces, keep: self.keep.clone() }
    }

    /// Copies the buffer's first `out.len()` bytes, from `skip` on, to `out`.
    ///
    /// # Panics
    /// The range reaches past the buffer's end.
    pub fn copy_to(&self, skip: usize, out: &mut [u8]) {
        let mut at = 0;
        for piece in &self.part(skip, out.len()).pieces {
            // SAFETY: the piece is valid for reads while `keep` lives (contract of `Buf`); `out` is ours alone.
            unsafe { std::ptr::copy_nonoverlapping(piece.base, out[at..].as_mut_ptr(), piece.len) };
            at += piece.len;
        }
    }

    /// Copies `bytes` into the buffer, from `skip` on.
    ///
    /// # Panics
    /// The range reaches past the buffer's end.
    pub fn copy_from(&self, skip: usize, bytes: &[u8]) {
        let mut at = 0;
        for piece in &self.part(skip, bytes.len()).pieces {
            // SAFETY: the piece is valid for writes while `keep` lives; `bytes` is readable for `piece.len` here.
            unsafe { std::ptr::copy_nonoverlapping(bytes[at..].as_ptr(), piece.base, piece.len) };
            at += piece.len;
        }
    }

    /// Copies all of `from` into this buffer, from `skip` on.
    ///
    /// # Panics
    /// `from` does not fit.
    pub fn copy_from_buf(&self, skip: usize, from: &Self) {
        let mut at = skip;
        for source in &from.pieces {
            let mut done = 0;
            for target in &self.part(at, source.len).pieces {
                // SAFETY: both pieces are valid while their `keep`s live, and `done + target.len <= source.len`.
                // They may be the same guest memory, so this is the copy that allows overlap.
                unsafe { std::ptr::copy(source.base.add(done), target.base, target.len) };
                done += target.len;
            }
            at += source.len;
        }
    }

    /// Fills the part `skip..skip+len` with zeroes.
    ///
    /// # Panics
    /// The range reaches past the buffer's end.
    pub fn zero(&self, skip: usize, len: usize) {
        for piece in &self.part(skip, len).pieces {
            // SAFETY: the piece is valid for writes while `keep` lives.
            unsafe { std::ptr::write_bytes(piece.base, 0, piece.len) };
        }
    }

    /// Whether every byte is zero.
    #[must_use]
    pub fn is_zero(&self) -> bool {
        self.pieces.iter().all(|piece| {
            // SAFETY: valid for reads while `keep` lives. The bytes are read one volatile word at a time by
            // `memory_is_zero`, which forms no reference.
            unsafe { memory_is_zero(piece.base, piece.len) }
        })
    }
}

/// Whether `len` bytes from `base` on are zero, read through raw pointers.
///
/// # Safety
/// The range must be valid for reads.
unsafe fn memory_is_zero(base: *const u8, len: usize) -> bool {
    let mut at = 0;
    while at + 8 <= len {
        // SAFETY: inside the range; unaligned reads are allowed here.
        if unsafe { base.add(at).cast::<u64>().read_unaligned() } != 0 {
            return false;
        }
        at += 8;
    }
    // SAFETY: inside the range.
    (at..len).all(|i| unsafe { base.add(i).read() } == 0)
}

struct OwnedBytes(*mut [u8]);

// SAFETY: plain bytes, reached only through the raw copies of `Buf`.
unsafe impl Send for OwnedBytes {}
// SAFETY: as above; `Buf` gives out no references.
unsafe impl Sync for OwnedBytes {}

impl Drop for OwnedBytes {
    fn drop(&mut self) {
        // SAFETY: made by `Box::into_raw` in `Buf::owned`, and dropped once, here.
        drop(unsafe { Box::from_raw(self.0) });
    }
}

/// Aligned memory of this process.
pub(crate) struct Aligned {
    base: *mut u8,
    layout: std::alloc::Layout,
}

// SAFETY: plain bytes, reached only through the raw copies of `Buf`.
unsafe impl Send for Aligned {}
// SAFETY: as above.
unsafe impl Sync for Aligned {}

impl Aligned {
    /// Zeroed memory.
    pub(crate) fn new(len: usize, align: usize) -> Self {
        let layout =
            std::alloc::Layout::from_size_align(len.max(1), align).expect("a power-of-two alignment");
        // SAFETY: the layout's size is not zero.
        let base = unsafe { std::alloc::alloc_zeroed(layout) };
        assert!(!base.is_null(), "out of memory for {len} bytes");
        Self { base, layout }
    }

    /// Its length, in bytes.
    pub(crate) fn len(&self) -> usize {
        self.layout.size()
    }
}

impl Drop for Aligned {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this layout, freed once.
        unsafe { std::alloc::dealloc(self.base, self.layout) };
    }
}

/// An operation in flight.
#[derive(Debug)]
pub struct Op {
    /// The submitter's number for it.
    pub id: OpId,
    /// What to do.
    pub kind: OpKind,
    /// Where on the device, in bytes; a multiple of 512.
    pub offset: u64,
    /// How much, in bytes; equals `buf.len()` for reads and writes.
    pub len: u64,
    /// The memory of a read or a write; empty otherwise.
    pub buf: Buf,
}

/// How an operation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Status {
    /// Done, entirely.
    Ok,
    /// The device failed it. The errno says why (`EIO`, `ENOSPC` …).
    Failed {
        /// A positive errno.
        errno: i32,
    },
    /// The device does not do such operations.
    Unsupported,
}

impl Status {
    /// The status of an operation that ended with this errno (positive).
    #[must_use]
    pub fn failed(errno: i32) -> Self {
        debug_assert!(errno > 0, "errnos are positive here");
        if errno == libc::EOPNOTSUPP { Self::Unsupported } else { Self::Failed { errno } }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(buf: &Buf) -> Vec<u8> {
        let mut out = vec![0; buf.len()];
        buf.copy_to(0, &mut out);
        out
    }

    fn pieces(lens: &[usize]) -> (Buf, Buf) {
        let all = Buf::aligned(lens.iter().sum(), 64);
        let mut split = Buf { keep: all.keep.clone(), ..Buf::default() };
        let mut at = 0;
        for &len in lens {
            split.pieces.extend(all.part(at, len).pieces);
            at += len;
        }
        (all, split)
    }

    #[test]
    fn copy_across_pieces_keeps_the_order() {
        let (all, split) = pieces(&[3, 1, 4]);
        split.copy_from(1, b"abcdef");
        assert_eq!(bytes(&all), b"\0abcdef\0");
        assert_eq!(bytes(&split.part(2, 3)), b"bcd");
    }

    #[test]
    fn copy_between_differently_split_buffers_is_exact() {
        let (_, from) = pieces(&[2, 5, 1]);
        from.copy_from(0, b"12345678");
        let (to, to_split) = pieces(&[1, 7, 2]);
        to_split.copy_from_buf(1, &from);
        assert_eq!(bytes(&to), b"\x0012345678\0");
    }

    #[test]
    fn one_set_byte_anywhere_is_not_zero() {
        for at in 0..19 {
            let (_, split) = pieces(&[9, 10]);
            assert!(split.is_zero());
            split.copy_from(at, &[1]);
            assert!(!split.is_zero());
        }
    }
}
