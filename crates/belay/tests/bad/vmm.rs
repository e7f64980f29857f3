//! Something that is no VMM, or a hostile one, at a device's socket.

use std::io::{IoSlice, Read};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use belay_e2e::{Bed, Host, until};
use belay_synthetic::{Guest, Random};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};

use super::{with_bed, work_together};

const SIZE: u64 = 1 << 20;
const BLOCKS: u64 = SIZE / 4096;
const DEPTH: usize = 4;
/// The last number that vhost-user gives a request of the front-end's today, and some more.
const REQUESTS: u32 = 48;
/// VHOST_USER_F_PROTOCOL_FEATURES and VIRTIO_F_VERSION_1.
const FEATURES: u64 = 1 << 30 | 1 << 32;
/// MQ, LOG_SHMFD, REPLY_ACK, BACKEND_REQ, CONFIG, BACKEND_SEND_FD, INFLIGHT_SHMFD, RESET_DEVICE.
const PROTOCOL: u64 = 1 | 1 << 1 | 1 << 3 | 1 << 5 | 1 << 9 | 1 << 10 | 1 << 12 | 1 << 13;
const NEED_REPLY: u32 = 8;
/// Descriptor flags.
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
/// Where the VM in miniature has the index of its first available ring.
const AVAIL_INDEX: usize = 0x2002;

/// Address, length and flags of each descriptor.
type Chain<'a> = &'a [(u64, u32, u16)];

/// The socket of a device in memory that was made for this.
fn add(host: &Host, name: &str) -> Result<PathBuf> {
    let added = host.json(&["device", "add", name, "--driver", "memory", "--size", "1M", "--queues", "2"])?;
    Ok(added["socket"].as_str().context("a socket")?.into())
}

fn send(socket: &UnixStream, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(64))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    ensure!(fds.is_empty() || control.push(SendAncillaryMessage::ScmRights(fds)), "too many descriptors");
    match rustix::net::sendmsg(socket, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL) {
        // What came before it was enough.
        Ok(_) | Err(rustix::io::Errno::PIPE | rustix::io::Errno::CONNRESET) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// A message with this header, whatever it announces.
fn message(request: u32, flags: u32, announced: u32, payload: &[u8]) -> Vec<u8> {
    let header = [request, flags, announced].map(u32::to_ne_bytes).concat();
    [&header, payload].concat()
}

/// A message as it should be.
fn proper(request: u32, payload: &[u8]) -> Vec<u8> {
    message(request, 1, payload.len() as u32, payload)
}

fn longs(longs: &[u64]) -> Vec<u8> {
    longs.iter().flat_map(|long| long.to_ne_bytes()).collect()
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

fn memory(len: u64) -> Result<OwnedFd> {
    let fd = rustix::fs::memfd_create("hostile", rustix::fs::MemfdFlags::CLOEXEC)?;
    rustix::fs::ftruncate(&fd, len)?;
    Ok(fd)
}

/// The device that is not attacked, and its VM, which is answered all the time.
struct Attack {
    target: PathBuf,
    other: Guest,
}

impl Attack {
    fn prepare(bed: &Bed) -> Result<Self> {
        let target = add(&bed.a, "target")?;
        let mut other = Guest::new(2, BLOCKS, 2);
        other.plug_in(&add(&bed.a, "other")?);
        Ok(Self { target, other })
    }

    /// Sends this on a connection of its own, says no more, and waits until the agent has hung up as well: it has
    /// looked at everything then. The other VM goes on before the end, and behind it.
    fn send(&mut self, what: &str, messages: &[(Vec<u8>, &[BorrowedFd<'_>])]) -> Result<()> {
        let mut socket = UnixStream::connect(&self.target).with_context(|| format!("before {what}"))?;
        for (bytes, fds) in messages {
            send(&socket, bytes, fds).with_context(|| what.to_owned())?;
        }
        self.other.run(4, DEPTH);
        // It may have hung up already.
        let _ = socket.shutdown(Shutdown::Write);
        socket.set_read_timeout(Some(Duration::from_secs(30)))?;
        match socket.read_to_end(&mut Vec::new()) {
            Ok(_) => {}
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => {}
            Err(error) => bail!("the agent does not hang up behind {what}: {error}"),
        }
        self.other.run(4, DEPTH);
        Ok(())
    }

    /// As [`Attack::send`], once at once and once behind a handshake.
    fn send_twice(&mut self, what: &str, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<()> {
        self.send(what, &[(bytes.to_vec(), fds)])?;
        let mut messages: Vec<(Vec<u8>, &[BorrowedFd<'_>])> =
            handshake().map(|bytes| (bytes, &[][..])).into();
        messages.push((bytes.to_vec(), fds));
        self.send(&format!("a handshake and {what}"), &messages)
    }

    /// The device that was attacked serves a proper VM, both agents work.
    fn survived(mut self, bed: &Bed, mut guest: Guest) -> Result<()> {
        vmm_gone(bed)?;
        guest.connect(&self.target);
        guest.fresh_inflight_region();
        guest.start();
        guest.run(100, DEPTH);
        guest.verify();
        self.other.verify();
        ensure!(!bed.a.log().contains("panicked"), "a thread of the agent has panicked");
        work_together(bed)
    }
}

fn handshake() -> [Vec<u8>; 3] {
    [proper(2, &longs(&[FEATURES])), proper(16, &longs(&[PROTOCOL])), proper(3, &[])]
}

/// A VM that has written something to the device, and is gone now.
fn writer(target: &Path) -> Guest {
    let mut guest = Guest::new(2, BLOCKS, 1);
    guest.plug_in(target);
    guest.run(200, DEPTH);
    guest.drain();
    guest.stop();
    guest.disconnect();
    guest
}

#[test]
fn messages_of_every_kind_with_wrong_sizes_and_descriptors_harm_no_device() {
    with_bed(|bed| {
        let mut attack = Attack::prepare(bed)?;
        let guest = writer(&attack.target);
        let pages = memory(8192)?;
        let (folder, null) = (std::fs::File::open("/")?, std::fs::File::open("/dev/null")?);
        let none: &[BorrowedFd<'_>] = &[];
        let one = [pages.as_fd()];
        let odd = [folder.as_fd()];
        let no_memory = [null.as_fd()];
        let many = [pages.as_fd(); 40];
        for request in 0..REQUESTS {
            let flags = if request % 2 == 0 { 1 } else { 1 | NEED_REPLY };
            // Sizes that no request has, or only some; payloads of zeroes and of ones.
            for (size, byte) in [(0, 0), (1, 0xff), (8, 0), (8, 0xff), (12, 0xff), (40, 0), (4096, 0xff)] {
                let bytes = message(request, flags, size, &vec![byte; size as usize]);
                let fds = [none, &one, &odd, &no_memory, &many][(request + size) as usize % 5];
                let what = format!("request {request} with {size} bytes and {} descriptors", fds.len());
                attack.send_twice(&what, &bytes, fds)?;
            }
        }
        attack.survived(bed, guest)
    });
}

#[test]
fn garbage_and_messages_cut_anywhere_harm_no_device() {
    with_bed(|bed| {
        let mut attack = Attack::prepare(bed)?;
        let guest = writer(&attack.target);
        let mut random = Random(5);
        for len in [0, 1, 11, 12, 13, 20, 512, 100_000] {
            let bytes: Vec<u8> = (0..len).map(|_| random.below(256) as u8).collect();
            attack.send_twice(&format!("{len} bytes of garbage"), &bytes, &[])?;
        }
        attack.send_twice("HTTP", b"GET / HTTP/1.1\r\nhost: belay\r\n\r\n", &[])?;
        // A proper message that ends too early, with its descriptor and without.
        let pages = memory(8192)?;
        let table = proper(5, &[words(&[1, 0]), longs(&[0, 8192, 1 << 20, 0])].concat());
        for cut in 1..table.len() {
            let fds = [pages.as_fd()];
            attack.send_twice(&format!("{cut} bytes of a memory table"), &table[..cut], &fds[..cut % 2])?;
        }
        for (what, bytes) in [
            ("another version", message(1, 2, 0, &[])),
            ("a reply that nobody awaits", message(1, 5, 8, &[0; 8])),
            ("four gigabytes that do not come", message(5, 1, u32::MAX, &[])),
            ("a size that is more than what comes", message(2, 1, 8, &[0; 4])),
        ] {
            attack.send_twice(what, &bytes, &[])?;
        }
        // Random payloads of the right size for most requests.
        for round in 0..200 {
            let (request, size) = (random.below(REQUESTS.into()) as u32, [8, 8, 12, 40, 56][round % 5]);
            let payload: Vec<u8> = (0..size).map(|_| random.below(256) as u8).collect();
            attack.send_twice(&format!("a random request {request}"), &proper(request, &payload), &[])?;
        }
        attack.survived(bed, guest)
    });
}

#[test]
fn memory_and_rings_that_are_not_there_harm_no_device() {
    with_bed(|bed| {
        let mut attack = Attack::prepare(bed)?;
        let guest = writer(&attack.target);
        let small = memory(4096)?;
        let fd = [small.as_fd()];
        let none: &[BorrowedFd<'_>] = &[];
        let region = |addr: u64, len: u64, user: u64, offset: u64| {
            proper(5, &[words(&[1, 0]), longs(&[addr, len, user, offset])].concat())
        };
        let user = 1 << 40;
        for (what, table, fds) in [
            ("memory without a descriptor", region(0, 4096, user, 0), none),
            ("memory that is longer than its file", region(0, 1 << 30, user, 0), &fd),
            ("memory behind the end of its file", region(0, 4096, user, 1 << 40), &fd),
            ("memory that goes round the end", region(u64::MAX - 100, 4096, user, 0), &fd),
            ("memory of nothing", region(0, 0, user, 0), &fd),
            ("nine hundred regions", proper(5, &words(&[900, 0])), none),
            ("memory that is right", region(0, 4096, user, 0), &fd),
        ] {
            for at in
                [[user, user, user], [user + 4000, user, user], [0, 0, 0], [user + 1, user + 1, user + 1]]
            {
                let [descriptors, used, available] = at;
                let mut messages: Vec<(Vec<u8>, &[BorrowedFd<'_>])> =
                    handshake().map(|bytes| (bytes, none)).into();
                messages.push((table.clone(), fds));
                for queue in [0, 1, 2, u32::MAX] {
                    let kick = u64::from(queue) | 1 << 8;
                    let addresses = longs(&[descriptors, used, available, 0]);
                    messages.push((proper(8, &words(&[queue, 256])), none));
                    messages.push((proper(9, &[words(&[queue, 0]), addresses].concat()), none));
                    messages.push((proper(12, &longs(&[kick])), none));
                    messages.push((proper(18, &words(&[queue, 1])), none));
                    attack.send(what, &messages)?;
                }
            }
        }
        attack.survived(bed, guest)
    });
}

#[test]
fn hostile_rings_cost_their_own_vm_its_ring_and_nobody_else_anything() {
    with_bed(|bed| {
        let mut attack = Attack::prepare(bed)?;
        let mut guest = writer(&attack.target);
        let at = guest.scratch() as u64;
        let chains: [(&str, Chain<'_>); 7] = [
            ("a loop", &[(at, 16, NEXT), (at, 16, NEXT)]),
            ("memory that there is not", &[(1 << 40, 16, NEXT), (at, 1, WRITE)]),
            ("an address that overflows", &[(u64::MAX - 4, 16, NEXT), (at, 1, WRITE)]),
            ("no length", &[(at, 0, NEXT), (at, 0, WRITE)]),
            ("all the memory of the world", &[(at, u32::MAX, NEXT), (at, u32::MAX, WRITE)]),
            ("an indirect table of a part of a descriptor", &[(at, 17, INDIRECT)]),
            ("what is read behind what is written", &[(at, 1, WRITE | NEXT), (at, 16, 0)]),
        ];
        for (what, chain) in chains {
            hostile(bed, &mut attack, &mut guest, what, |guest| guest.offer_raw(0, chain))?;
        }
        for jump in [300u16, 0x7fff, 0xffff] {
            let what = format!("an index that jumps to {jump}");
            hostile(bed, &mut attack, &mut guest, &what, |guest| {
                guest.poke(AVAIL_INDEX, &jump.to_le_bytes());
                guest.kick(0);
            })?;
        }
        attack.survived(bed, guest)
    });
}

/// Waits until the target knows that its VMM is gone: it serves one at a time, and turns a second one away.
fn vmm_gone(bed: &Bed) -> Result<()> {
    until(
        "the device without a VMM",
        || Ok((bed.a.device("target")?["vmm_connected"] == false).then_some(())),
    )
}

/// What the target has counted as malformed so far.
fn bad_requests(bed: &Bed) -> Result<u64> {
    let metrics = bed.a.belay(&["metrics"])?;
    let line = metrics.lines().find(|line| line.contains("bad_requests") && line.contains("\"target\""));
    let count = line.and_then(|line| line.rsplit(' ').next()).context("no count of malformed requests")?;
    Ok(count.parse::<f64>()? as u64)
}

/// Does something hostile to a running ring of the target, which counts it. Its other ring and the other device go on,
/// and it serves the VM again when that starts anew.
fn hostile(
    bed: &Bed,
    attack: &mut Attack,
    guest: &mut Guest,
    what: &str,
    act: impl FnOnce(&mut Guest),
) -> Result<()> {
    guest.disconnect();
    vmm_gone(bed)?;
    guest.start_in_new_memory(&attack.target);
    guest.run(20, DEPTH);
    guest.drain();
    let before = bad_requests(bed)?;
    act(guest);
    // The second queue has nothing to do with it.
    for _ in 0..4 {
        ensure!(guest.offer(1), "no room on the second queue");
        guest.kick(1);
        guest.drain();
        attack.other.run(4, DEPTH);
    }
    until(&format!("the device noticing {what}"), || Ok((bad_requests(bed)? > before).then_some(())))?;
    guest.disconnect();
    vmm_gone(bed)?;
    guest.start_in_new_memory(&attack.target);
    guest.run(20, DEPTH);
    guest.verify();
    guest.stop();
    guest.disconnect();
    Ok(())
}
