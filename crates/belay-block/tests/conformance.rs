//! What every backend must keep: one suite, run for each.

use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use belay_block::testing::Harness;
use belay_block::{
    Backend, BackendSpec, Buf, Delay, Driver, FaultKind, FaultRule, MemoryBackend, OpId, OpKind, OpenError,
    Status, ThrottleSpec,
};
use belay_reactor::OwnerId;

const SIZE: u64 = 1 << 20;
const OWNER: OwnerId = OwnerId(20);

/// A small generator, so that a failing seed can be run again.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 33) % limit
    }
}

/// A new file each time: the ring of a backend that was dropped may hold the lock on its own for a moment.
fn image(folder: &tempfile::TempDir) -> PathBuf {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let path = folder.path().join(format!("disk-{}.img", COUNT.fetch_add(1, Ordering::Relaxed)));
    std::fs::File::create(&path).unwrap().set_len(SIZE).unwrap();
    path
}

fn buffer(bytes: &[u8], misalign: usize) -> Buf {
    let buf = Buf::aligned(bytes.len() + misalign, 4096).part(misalign, bytes.len());
    buf.copy_from(0, bytes);
    buf
}

fn content(buf: &Buf) -> Vec<u8> {
    let mut bytes = vec![0; buf.len()];
    buf.copy_to(0, &mut bytes);
    bytes
}

/// All of it. Two backends cannot keep all: `null` forgets what is written ([`forgetful_suite`]), and `fault` fails what
/// its rules name (see [`failing_rule_fails_what_it_names_and_leaves_it_as_it_was`]).
fn suite(make: &dyn Fn() -> Box<dyn Backend>) {
    behaves_like_an_array(make());
    completes_many_exactly_once(make());
    refuses_what_is_outside(make());
}

/// What holds for a backend that forgets what is written: everything but that a read finds what was written.
fn forgetful_suite(make: &dyn Fn() -> Box<dyn Backend>) {
    reads_as_zeroes_whatever_is_written(make());
    completes_many_exactly_once(make());
    refuses_what_is_outside(make());
}

fn reads_as_zeroes_whatever_is_written(backend: Box<dyn Backend>) {
    let mut harness = Harness::new(backend).unwrap();
    let mut random = Random(8);
    for round in 0..200u32 {
        let sectors = 1 + random.below(64);
        let (offset, len) = (random.below(SIZE / 512 - sectors) * 512, sectors * 512);
        let (kind, buf) = match random.below(5) {
            0 => (OpKind::Write, buffer(&vec![0xee; len as usize], 3)),
            1 => (OpKind::WriteZeroes { unmap: round % 2 == 0 }, Buf::default()),
            2 => (OpKind::Discard, Buf::default()),
            3 => (OpKind::Flush, Buf::default()),
            _ => (OpKind::Read, buffer(&vec![0xee; len as usize], 512)),
        };
        let (offset, len) = if kind == OpKind::Flush { (0, 0) } else { (offset, len) };
        assert_eq!(harness.one(kind, offset, len, buf.clone()).unwrap(), Status::Ok);
        if kind == OpKind::Read {
            assert!(content(&buf).iter().all(|byte| *byte == 0), "round {round}: {len} bytes at {offset}");
        }
    }
}

fn behaves_like_an_array(backend: Box<dyn Backend>) {
    let mut harness = Harness::new(backend).unwrap();
    let mut model = vec![0u8; SIZE as usize];
    let mut random = Random(7);
    for round in 0..400u32 {
        let sectors = 1 + random.below(64);
        let offset = random.below(SIZE / 512 - sectors) * 512;
        let len = sectors * 512;
        let range = offset as usize..(offset + len) as usize;
        let misalign = [0, 0, 512, 3][random.below(4) as usize];
        match random.below(6) {
            0 | 1 => {
                let bytes = vec![round as u8 | 1; len as usize];
                let status = harness.one(OpKind::Write, offset, len, buffer(&bytes, misalign)).unwrap();
                assert_eq!(status, Status::Ok);
                model[range].copy_from_slice(&bytes);
            }
            2 => {
                let kind = OpKind::WriteZeroes { unmap: random.below(2) == 0 };
                assert_eq!(harness.one(kind, offset, len, Buf::default()).unwrap(), Status::Ok);
                model[range].fill(0);
            }
            3 => {
                assert_eq!(harness.one(OpKind::Discard, offset, len, Buf::default()).unwrap(), Status::Ok);
                model[range].fill(0);
            }
            4 => assert_eq!(harness.one(OpKind::Flush, 0, 0, Buf::default()).unwrap(), Status::Ok),
            _ => {
                let buf = buffer(&vec![0xee; len as usize], misalign);
                assert_eq!(harness.one(OpKind::Read, offset, len, buf.clone()).unwrap(), Status::Ok);
                assert!(content(&buf) == model[range], "round {round}: {len} bytes at {offset}");
            }
        }
    }
}

fn completes_many_exactly_once(backend: Box<dyn Backend>) {
    let mut harness = Harness::new(backend).unwrap();
    let mut submitted: Vec<OpId> = Vec::new();
    for block in 0..1000u64 {
        let offset = block % 256 * 4096;
        submitted.push(harness.submit(OpKind::Read, offset, 4096, Buf::aligned(4096, 4096)));
    }
    let mut ended: Vec<OpId> = harness.drain().unwrap().into_iter().map(|done| done.op.id).collect();
    ended.sort_unstable();
    assert_eq!(ended, submitted);
}

fn refuses_what_is_outside(backend: Box<dyn Backend>) {
    let mut harness = Harness::new(backend).unwrap();
    let invalid = Status::Failed { errno: 22 };
    for (offset, len) in [(SIZE, 512), (SIZE - 512, 1024), (u64::MAX - 511, 512), (256, 512)] {
        let buf = Buf::aligned(len as usize, 512);
        assert_eq!(harness.one(OpKind::Read, offset, len, buf.clone()).unwrap(), invalid);
        assert_eq!(harness.one(OpKind::Write, offset, len, buf).unwrap(), invalid);
        assert_eq!(harness.one(OpKind::Discard, offset, len, Buf::default()).unwrap(), invalid);
    }
}

#[test]
fn memory_keeps_the_contract() {
    suite(&|| Box::new(MemoryBackend::new(SIZE)));
}

#[test]
fn null_keeps_the_contract_but_for_what_is_written() {
    let spec = BackendSpec { driver: Driver::Null, ..in_memory() };
    forgetful_suite(&|| spec.build(OWNER).unwrap());
}

/// A disk in memory, by its specification.
fn in_memory() -> BackendSpec {
    BackendSpec {
        driver: Driver::Memory,
        path: None,
        size_bytes: Some(SIZE),
        ..BackendSpec::file("x".into())
    }
}

#[test]
fn fault_whose_rule_does_not_fire_keeps_the_contract() {
    let never = FaultRule { first: Some(0), ..FaultRule::all(5) };
    let rarely = FaultRule { every: Some(1 << 40), kind: Some(FaultKind::Write), ..FaultRule::all(28) };
    let spec = BackendSpec { fault: vec![never, rarely], ..in_memory() };
    suite(&|| spec.build(OWNER).unwrap());
}

#[test]
fn failing_rule_fails_what_it_names_and_leaves_it_as_it_was() {
    let half = SIZE / 2;
    let rule = FaultRule { offset: half, kind: Some(FaultKind::Write), ..FaultRule::all(28) };
    let spec = BackendSpec { fault: vec![rule], ..in_memory() };
    // What is the same for all backends is the same for this one.
    completes_many_exactly_once(spec.build(OWNER).unwrap());
    let mut harness = Harness::new(spec.build(OWNER).unwrap()).unwrap();
    for (offset, len, status) in [
        (0, 4096, Status::Ok),
        (half - 4096, 4096, Status::Ok),
        (half - 4096, 8192, Status::Failed { errno: 28 }),
        (half, 512, Status::Failed { errno: 28 }),
        (SIZE - 512, 512, Status::Failed { errno: 28 }),
    ] {
        let bytes = vec![7; len as usize];
        assert_eq!(
            harness.one(OpKind::Write, offset, len, buffer(&bytes, 0)).unwrap(),
            status,
            "at {offset}"
        );
    }
    let buf = buffer(&[0xee; SIZE as usize], 0);
    assert_eq!(harness.one(OpKind::Read, 0, SIZE, buf.clone()).unwrap(), Status::Ok);
    let mut expected = vec![0; SIZE as usize];
    expected[..4096].fill(7);
    expected[half as usize - 4096..half as usize].fill(7);
    assert!(content(&buf) == expected);
    // Zeroes are no writes to a rule.
    let zeroes = OpKind::WriteZeroes { unmap: true };
    assert_eq!(harness.one(zeroes, half, 4096, Buf::default()).unwrap(), Status::Ok);
}

#[test]
fn file_past_the_page_cache_keeps_the_contract() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    suite(&|| BackendSpec::file(image(&folder)).build(OWNER).unwrap());
}

#[test]
fn file_through_the_page_cache_keeps_the_contract() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let spec = |path| BackendSpec { direct: false, ..BackendSpec::file(path) };
    suite(&|| spec(image(&folder)).build(OWNER).unwrap());
}

#[test]
fn delayed_file_keeps_the_contract() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let spec = |path| BackendSpec { delay_us: Some(50), ..BackendSpec::file(path) };
    suite(&|| spec(image(&folder)).build(OWNER).unwrap());
}

#[test]
fn throttled_and_delayed_file_with_a_rule_that_never_fires_keeps_the_contract() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let spec = |path| BackendSpec {
        delay_us: Some(50),
        fault: vec![FaultRule { first: Some(0), ..FaultRule::all(5) }],
        throttle: Some(ThrottleSpec { iops: Some(5000), bytes_per_s: Some(1 << 30) }),
        ..BackendSpec::file(path)
    };
    suite(&|| spec(image(&folder)).build(OWNER).unwrap());
}

#[test]
fn half_of_many_operations_in_flight_fail_and_all_end_once() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let fault = vec![FaultRule { every: Some(2), ..FaultRule::all(5) }];
    let spec = BackendSpec { fault, delay_us: Some(20), ..BackendSpec::file(image(&folder)) };
    let mut harness = Harness::new(spec.build(OWNER).unwrap()).unwrap();
    let submitted: Vec<OpId> = (0..1000u64)
        .map(|block| harness.submit(OpKind::Write, block % 256 * 4096, 4096, Buf::aligned(4096, 4096)))
        .collect();
    let done = harness.drain().unwrap();
    let failed = done.iter().filter(|done| done.status == Status::Failed { errno: 5 }).count();
    assert_eq!(failed, 500);
    let mut ended: Vec<OpId> = done.into_iter().map(|done| done.op.id).collect();
    ended.sort_unstable();
    assert_eq!(ended, submitted);
}

#[test]
fn rules_and_limits_that_make_no_sense_are_refused() {
    let memory = BackendSpec {
        driver: Driver::Memory,
        path: None,
        size_bytes: Some(SIZE),
        ..BackendSpec::file("x".into())
    };
    let every = FaultRule { every: Some(0), ..FaultRule::all(5) };
    for rule in [FaultRule::all(0), FaultRule::all(-5), every] {
        let spec = BackendSpec { fault: vec![rule], ..memory.clone() };
        assert!(matches!(spec.build(OWNER).err(), Some(OpenError::Spec(_))));
    }
    let limits = ThrottleSpec { iops: Some(0), bytes_per_s: None };
    let spec = BackendSpec { throttle: Some(limits), ..memory };
    assert!(matches!(spec.build(OWNER).err(), Some(OpenError::Spec(_))));
}

#[test]
fn held_operation_is_cancelled_and_a_begun_one_is_not() {
    let slow = Delay::new(Box::new(MemoryBackend::new(SIZE)), Duration::from_secs(3600));
    let mut harness = Harness::new(Box::new(slow)).unwrap();
    let id = harness.submit(OpKind::Read, 0, 512, Buf::aligned(512, 512));
    harness.backend.cancel(OpId(id.0 + 1));
    harness.backend.cancel(id);
    let done = harness.drain().unwrap();
    assert_eq!(done.len(), 1);
    assert_eq!(done[0].status, Status::Failed { errno: 125 });
}

#[test]
fn discarded_space_is_given_back_and_holes_are_found() {
    use std::os::unix::fs::MetadataExt;
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = image(&folder);
    let mut harness = Harness::new(BackendSpec::file(path.clone()).build(OWNER).unwrap()).unwrap();
    let full = buffer(&vec![9; SIZE as usize], 0);
    assert_eq!(harness.one(OpKind::Write, 0, SIZE, full).unwrap(), Status::Ok);
    let before = std::fs::metadata(&path).unwrap().blocks();
    assert_eq!(harness.one(OpKind::Discard, 65536, SIZE - 131072, Buf::default()).unwrap(), Status::Ok);
    assert!(std::fs::metadata(&path).unwrap().blocks() < before / 2);
    assert_eq!(harness.backend.data_extents(0, SIZE).unwrap(), [0..65536, SIZE - 65536..SIZE]);
}

#[test]
fn read_only_file_refuses_changes() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let spec = BackendSpec { read_only: true, ..BackendSpec::file(image(&folder)) };
    let mut harness = Harness::new(spec.build(OWNER).unwrap()).unwrap();
    let status = harness.one(OpKind::Write, 0, 512, Buf::aligned(512, 512)).unwrap();
    assert_eq!(status, Status::Failed { errno: 30 });
}

#[test]
fn file_that_is_open_elsewhere_is_refused_until_it_is_closed() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let spec = BackendSpec::file(image(&folder));
    let first = spec.build(OWNER).unwrap();
    assert!(matches!(spec.build(OWNER).err(), Some(OpenError::Locked { .. })));
    drop(first);
    assert!(spec.build(OWNER).is_ok());
}

#[test]
fn missing_odd_and_foreign_files_are_refused_by_name() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let missing = BackendSpec::file(folder.path().join("nothing.img"));
    let error = missing.build(OWNER).err().unwrap();
    assert!(matches!(error, OpenError::Missing { .. }) && error.to_string().contains("nothing.img"));
    let odd = folder.path().join("odd.img");
    std::fs::write(&odd, [0; 700]).unwrap();
    assert!(matches!(
        BackendSpec::file(odd).build(OWNER).err(),
        Some(OpenError::Size { size_bytes: 700, .. })
    ));
    for read_only in [false, true] {
        let spec = BackendSpec { read_only, ..BackendSpec::file(folder.path().to_owned()) };
        assert!(matches!(spec.build(OWNER).err(), Some(OpenError::NotADisk { .. })));
    }
    let nothing = BackendSpec { driver: Driver::Memory, path: None, ..BackendSpec::file("x".into()) };
    assert!(nothing.build(OWNER).err().unwrap().to_string().contains("size_bytes"));
}

#[test]
fn grown_file_has_its_new_end_and_shrinking_is_refused() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let mut harness = Harness::new(BackendSpec::file(image(&folder)).build(OWNER).unwrap()).unwrap();
    harness.backend.resize(SIZE * 2).unwrap();
    assert_eq!(harness.one(OpKind::Read, SIZE, 512, Buf::aligned(512, 512)).unwrap(), Status::Ok);
    assert!(harness.backend.resize(SIZE).is_err());
}

#[test]
fn more_pieces_than_the_kernel_takes_at_once_are_all_transferred() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let mut harness = Harness::new(BackendSpec::file(image(&folder)).build(OWNER).unwrap()).unwrap();
    let bytes: Vec<u8> = (0..SIZE).map(|at| (at / 512 % 251) as u8).collect();
    let pieces = |whole: &Buf| {
        let parts = (0..whole.len() / 512).flat_map(|part| whole.part(part * 512, 512).pieces);
        Buf { pieces: parts.collect(), keep: whole.keep.clone() }
    };
    let from = pieces(&buffer(&bytes, 0));
    assert_eq!(from.pieces.len(), 2048);
    assert_eq!(harness.one(OpKind::Write, 0, SIZE, from).unwrap(), Status::Ok);
    let to = buffer(&vec![0xee; SIZE as usize], 0);
    assert_eq!(harness.one(OpKind::Read, 0, SIZE, pieces(&to)).unwrap(), Status::Ok);
    assert!(content(&to) == bytes);
}

#[test]
fn queued_writes_of_a_dropped_backend_do_not_reach_the_next_file() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = image(&folder);
    let spec = BackendSpec { direct: false, ..BackendSpec::file(path.clone()) };
    let mut harness = Harness::new(spec.build(OWNER).unwrap()).unwrap();
    harness.submit(OpKind::Write, 0, 4096, buffer(&[9; 4096], 0));
    harness.backend = Box::new(MemoryBackend::new(SIZE));
    let next = folder.path().join("next.img");
    let file = std::fs::File::options().create_new(true).read(true).write(true).open(&next).unwrap();
    harness.ring.wait(Some(Duration::from_secs(10))).unwrap();
    assert_eq!(file.metadata().unwrap().len(), 0);
    assert_eq!(std::fs::read(path).unwrap()[..4096], [9; 4096]);
}

#[test]
fn impossible_sizes_of_memory_are_refused() {
    for size_bytes in [0, 100, u64::MAX / 512 * 512, 1 << 60] {
        let spec = BackendSpec {
            driver: Driver::Memory,
            path: None,
            size_bytes: Some(size_bytes),
            ..BackendSpec::file("x".into())
        };
        assert!(matches!(spec.build(OWNER).err(), Some(OpenError::Spec(_))), "{size_bytes} bytes");
    }
    let mut memory = MemoryBackend::new(1024);
    for size_bytes in [512, 1500, 1 << 60] {
        assert!(memory.resize(size_bytes).is_err(), "{size_bytes} bytes");
    }
    assert_eq!(memory.info().size_bytes, 1024);
}

/// A file system without FALLOC_FL_ZERO_RANGE: zeroes have to be written.
#[test]
fn file_in_a_memory_file_system_keeps_the_contract() {
    let Ok(folder) = tempfile::tempdir_in("/dev/shm") else {
        println!("SKIPPED: no file can be made in /dev/shm");
        return;
    };
    suite(&|| BackendSpec::file(image(&folder)).build(OWNER).unwrap());
}

/// A loop device, detached at the end of the test.
struct LoopDevice(PathBuf);

impl LoopDevice {
    fn attach(image: &std::path::Path) -> Result<Self, String> {
        let output = std::process::Command::new("losetup").args(["--find", "--show"]).arg(image).output();
        let output = output.map_err(|error| format!("losetup cannot be run: {error}"))?;
        if !output.status.success() {
            return Err(format!("losetup: {}", String::from_utf8_lossy(&output.stderr).trim()));
        }
        Ok(Self(String::from_utf8_lossy(&output.stdout).trim().into()))
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let _ = std::process::Command::new("losetup").arg("--detach").arg(&self.0).status();
    }
}

#[test]
fn block_device_keeps_the_contract() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let device = match LoopDevice::attach(&image(&folder)) {
        Ok(device) => device,
        Err(reason) => {
            println!("SKIPPED: no loop device: {reason}");
            return;
        }
    };
    // One suite after another on the same device: it is made of zeroes again each time.
    suite(&|| {
        let backend = BackendSpec::file(device.0.clone()).build(OWNER).unwrap();
        let mut harness = Harness::new(backend).unwrap();
        let zeroes = OpKind::WriteZeroes { unmap: false };
        assert_eq!(harness.one(zeroes, 0, SIZE, Buf::default()).unwrap(), Status::Ok);
        drop(harness);
        BackendSpec::file(device.0.clone()).build(OWNER).unwrap()
    });
    let backend = BackendSpec::file(device.0.clone()).build(OWNER).unwrap();
    assert_eq!(backend.info().size_bytes, SIZE);
    assert!(matches!(BackendSpec::file(device.0.clone()).build(OWNER).err(), Some(OpenError::Locked { .. })));
}
