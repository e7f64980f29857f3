//! How the C library's allocator treats freed memory.
#![allow(unsafe_code, reason = "mallopt is a C function")]

/// Free memory at a heap's end that is kept, in bytes, per heap (about one per device).
const KEPT_BYTES: libc::c_int = 16 << 20;
/// From this size on, in bytes, an allocation is mapped and unmapped by itself: larger than any frame.
const MAPPED_BYTES: libc::c_int = 8 << 20;

/// Keeps what is freed. TLS allocates every record's buffer; with the defaults the heap's end goes back to the kernel
/// after each burst, and the next burst takes a page fault for every 4 KiB. (Measured on the thread that serves
/// 128 KiB reads to a peer: a third of its time.)
pub(crate) fn keep_freed() {
    #[cfg(target_env = "gnu")]
    // SAFETY: sets parameters of the allocator, in the main thread, before any other is started.
    unsafe {
        libc::mallopt(libc::M_TRIM_THRESHOLD, KEPT_BYTES);
        libc::mallopt(libc::M_MMAP_THRESHOLD, MAPPED_BYTES);
    }
}
