//! How a file or block device is opened, locked and looked at.
#![allow(unsafe_code, reason = "asks the kernel through fcntl and ioctl")]

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// The unit of addressing, in bytes.
pub(crate) const SECTOR: u64 = 512;

/// How a file is opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileOptions {
    /// O_DIRECT: past the page cache.
    pub direct: bool,
    /// Refuse changes.
    pub read_only: bool,
    /// Create the file with this size in bytes; it must not exist.
    pub create_size: Option<u64>,
}

/// Why a file cannot be a disk.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// It cannot be opened.
    #[error("cannot open {path}: {source}", path = .path.display())]
    Open {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// There is nothing of that name.
    #[error("{path} does not exist: create it, or give the path of a file or block device that does", path = .path.display())]
    Missing {
        /// Which.
        path: PathBuf,
    },
    /// This process may not open it.
    #[error("{path} may not be opened by this process: change its owner or mode", path = .path.display())]
    Permission {
        /// Which.
        path: PathBuf,
    },
    /// Its file system is full.
    #[error("the file system has no room for {path}: free some space or raise the quota", path = .path.display())]
    NoSpace {
        /// Which.
        path: PathBuf,
    },
    /// It is neither a file nor a block device.
    #[error("{path} is neither a regular file nor a block device", path = .path.display())]
    NotADisk {
        /// Which.
        path: PathBuf,
    },
    /// Its size cannot be a disk's.
    #[error("{path} has {size_bytes} bytes: a disk has a multiple of 512, and at least 512", path = .path.display())]
    Size {
        /// Which.
        path: PathBuf,
        /// Its size.
        size_bytes: u64,
    },
    /// It cannot be the disk of a guest with such blocks.
    #[error(
        "the disk takes blocks of {needs} bytes past the page cache, the device has blocks of {block_bytes}: give a new \
         device `--block-size {needs}`, or go through the page cache (`--buffered`)"
    )]
    Blocks {
        /// The guest's logical block size, in bytes.
        block_bytes: u32,
        /// The smallest that the disk takes past the page cache, in bytes.
        needs: u32,
    },
    /// Another process has it.
    #[error("{path} is in use: another process holds a lock on it", path = .path.display())]
    Locked {
        /// Which.
        path: PathBuf,
    },
    /// The description of the backend makes no sense.
    #[error("{0}")]
    Spec(String),
}

impl OpenError {
    /// What it means that `path` could not be opened, or looked at, because of `source`.
    pub(crate) fn of(path: &Path, source: io::Error) -> Self {
        let path = path.to_owned();
        match source.raw_os_error() {
            Some(libc::ENOENT) => Self::Missing { path },
            Some(libc::EACCES | libc::EPERM) => Self::Permission { path },
            Some(libc::ENOSPC | libc::EDQUOT) => Self::NoSpace { path },
            Some(libc::EISDIR) => Self::NotADisk { path },
            _ => Self::Open { path, source },
        }
    }
}

pub(crate) fn open_file(path: &Path, options: &FileOptions) -> io::Result<File> {
    let mut how = OpenOptions::new();
    how.read(true).write(!options.read_only);
    if options.create_size.is_some() {
        how.create_new(true);
    }
    if options.direct {
        match how.clone().custom_flags(libc::O_DIRECT | libc::O_CLOEXEC).open(path) {
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                tracing::warn!(path = %path.display(), "the file system has no O_DIRECT: going through the page cache");
                how.create_new(false);
            }
            other => return other,
        }
    }
    how.custom_flags(libc::O_CLOEXEC).open(path)
}

/// Takes the OFD lock; `false`: another has it.
pub(crate) fn lock(fd: RawFd, read_only: bool) -> io::Result<bool> {
    let kind = if read_only { libc::F_RDLCK } else { libc::F_WRLCK };
    let range =
        libc::flock { l_type: kind as i16, l_whence: libc::SEEK_SET as i16, l_start: 0, l_len: 0, l_pid: 0 };
    // SAFETY: `range` is a valid flock for the length of the call, and OFD locks want `l_pid` 0.
    if unsafe { libc::fcntl(fd, libc::F_OFD_SETLK, &range) } == 0 {
        return Ok(true);
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::EAGAIN | libc::EACCES) => Ok(false),
        _ => Err(error),
    }
}

pub(crate) fn is_direct(fd: RawFd) -> bool {
    // SAFETY: F_GETFL reads flags of a descriptor that is open.
    unsafe { libc::fcntl(fd, libc::F_GETFL) & libc::O_DIRECT != 0 }
}

pub(crate) fn size_of(file: &File, is_block_device: bool) -> io::Result<u64> {
    if is_block_device {
        rustix::fs::seek(file, rustix::fs::SeekFrom::End(0)).map_err(Into::into)
    } else {
        Ok(file.metadata()?.len())
    }
}

/// What O_DIRECT wants, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Alignment {
    /// Of addresses.
    pub(crate) memory: u32,
    /// Of offsets and lengths.
    pub(crate) block: u32,
}

/// What O_DIRECT on this file wants: what the kernel says (`STATX_DIOALIGN`, Linux 6.1), else the device's block
/// size, or what a file is found to take.
pub(crate) fn required_alignment(file: &File, is_block_device: bool) -> Alignment {
    let flags = rustix::fs::AtFlags::EMPTY_PATH;
    if let Ok(stat) = rustix::fs::statx(file, "", flags, rustix::fs::StatxFlags::DIOALIGN) {
        let known = stat.stx_mask & rustix::fs::StatxFlags::DIOALIGN.bits() != 0;
        if known && stat.stx_dio_mem_align.is_power_of_two() && stat.stx_dio_offset_align.is_power_of_two() {
            return Alignment {
                memory: stat.stx_dio_mem_align,
                block: stat.stx_dio_offset_align.max(SECTOR as u32),
            };
        }
    }
    if !is_block_device {
        let block = probe(file);
        return Alignment { memory: block, block };
    }
    let mut bytes: libc::c_int = 0;
    // SAFETY: BLKSSZGET writes one int to the address.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), libc::BLKSSZGET, &raw mut bytes) };
    if result != 0 {
        bytes = 0;
    }
    let block = u32::try_from(bytes).unwrap_or(0).max(SECTOR as u32);
    Alignment { memory: block, block }
}

/// The smallest block that a file takes past the page cache, by trying to read one at an offset of 512.
fn probe(file: &File) -> u32 {
    use std::os::unix::fs::FileExt;
    let mut bytes = vec![0u8; 3 * 4096];
    let skip = bytes.as_ptr().align_offset(4096);
    match file.read_at(&mut bytes[skip..skip + SECTOR as usize], SECTOR) {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => 4096,
        _ => SECTOR as u32,
    }
}

/// Bytes free for an ordinary user on the file system of `path`.
///
/// # Errors
/// The path cannot be looked at.
pub fn free_space(path: &Path) -> io::Result<u64> {
    let stat = rustix::fs::statvfs(path)?;
    Ok(stat.f_bavail * stat.f_frsize)
}

/// The smallest block, in bytes, that a new file in this folder would take past the page cache; 512 if its file system
/// has no O_DIRECT, since such a file goes through the page cache.
///
/// # Errors
/// No file can be made there.
pub fn direct_block_bytes(folder: &Path) -> io::Result<u32> {
    use rustix::fs::{Mode, OFlags};
    // Without a name: nothing is left behind.
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    let file = match rustix::fs::open(folder, flags | OFlags::DIRECT, Mode::RUSR | Mode::WUSR) {
        // Neither O_DIRECT nor, on some, files without a name. What it needs shows when the file is opened.
        Err(rustix::io::Errno::INVAL | rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::ISDIR) => {
            return Ok(SECTOR as u32);
        }
        opened => File::from(opened?),
    };
    file.set_len(4 * 4096)?;
    Ok(required_alignment(&file, false).block)
}
