//! Disks of 4096-byte sectors: a loop device stands for one. Needs root and `losetup`; skipped without.

use std::path::{Path, PathBuf};
use std::process::Command;

use belay_block::testing::Harness;
use belay_block::{Backend, BackendSpec, Buf, OpKind, Status};
use belay_reactor::OwnerId;

const OWNER: OwnerId = OwnerId(20);

/// A loop device of 4096-byte sectors.
struct Loop {
    path: PathBuf,
}

impl Loop {
    fn new(file: &Path) -> Option<Self> {
        let output = Command::new("losetup").args(["-f", "--show", "-b", "4096"]).arg(file).output().ok()?;
        let path = String::from_utf8(output.stdout).ok()?;
        output.status.success().then(|| Self { path: path.trim().into() })
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("-d").arg(&self.path).status();
    }
}

fn open(path: &Path, direct: bool) -> Box<dyn Backend> {
    BackendSpec { direct, ..BackendSpec::file(path.to_owned()) }.build(OWNER).unwrap()
}

fn filled(byte: u8, len: usize, misalign: usize) -> Buf {
    let buf = Buf::aligned(len + misalign, 4096).part(misalign, len);
    buf.copy_from(0, &vec![byte; len]);
    buf
}

#[test]
fn disk_of_large_sectors_serves_large_blocks_and_small_ones_through_the_page_cache() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("disk.img");
    std::fs::File::create(&file).unwrap().set_len(1 << 20).unwrap();
    let Some(disk) = Loop::new(&file) else {
        belay_e2e::skip("no loop device can be made here");
        return;
    };
    let direct = open(&disk.path, true);
    assert_eq!(direct.info().block_bytes, 4096);
    direct.info().check_blocks(4096).unwrap();
    let refusal = direct.info().check_blocks(512).unwrap_err().to_string();
    assert!(refusal.contains("--block-size 4096") && refusal.contains("--buffered"), "{refusal}");
    let mut harness = Harness::new(direct).unwrap();
    for (offset, len, misalign) in [(4096, 4096, 0), (8192, 12288, 512), (0, 4096, 3)] {
        let write = harness.one(OpKind::Write, offset, len, filled(9, len as usize, misalign)).unwrap();
        assert_eq!(write, Status::Ok, "{offset} {len} {misalign}");
    }
    for kind in [OpKind::Discard, OpKind::WriteZeroes { unmap: true }, OpKind::WriteZeroes { unmap: false }] {
        assert_eq!(harness.one(kind, 4096, 4096, Buf::default()).unwrap(), Status::Ok, "{kind:?}");
    }
    drop(harness);

    let buffered = open(&disk.path, false);
    buffered.info().check_blocks(512).unwrap();
    let mut harness = Harness::new(buffered).unwrap();
    assert_eq!(harness.one(OpKind::Write, 512, 512, filled(5, 512, 0)).unwrap(), Status::Ok);
    let read = filled(0, 2048, 0);
    assert_eq!(harness.one(OpKind::Read, 0, 2048, read.clone()).unwrap(), Status::Ok);
    let mut bytes = [0; 2048];
    read.copy_to(0, &mut bytes);
    assert_eq!((bytes[511], bytes[512], bytes[1023], bytes[1024]), (9, 5, 5, 9));
}
