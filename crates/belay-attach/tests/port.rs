//! A synthetic VM whose guest, driver or VMM does what none should, and what few do.

mod support;

use belay_attach::{Command, Role};
use support::guest::Guest;
use support::{BLOCKS, Host, Net, SIZE, identity, offer, start, wait_for};

const NEXT: u16 = 1;
const WRITE: u16 = 2;

#[test]
fn request_that_cannot_be_read_is_answered_with_an_error_where_its_status_is() {
    let net = Net::new();
    let (_, _host, mut guest) = start(&net, 1, 0, 1);
    let at = guest.scratch() as u64;
    guest.poke(at as usize, &[0; 16]);
    for (round, data) in [1 << 40, u64::MAX - 100].into_iter().enumerate() {
        guest.poke(at as usize + 0x100, &[0]);
        guest.offer_raw(0, &[(at, 16, NEXT), (data, 4096, NEXT | WRITE), (at + 0x100, 1, WRITE)]);
        guest.wait_raw(round + 1);
        assert_eq!((guest.raw[round], guest.peek(at as usize + 0x100)), ((0, 120, 4097), 1));
    }
    guest.run(100, 8);
    guest.verify();
}

#[test]
fn request_without_a_place_for_its_status_costs_the_guest_its_ring_and_nobody_anything_else() {
    let net = Net::new();
    let (_, host, mut guest) = start(&net, 2, 500, 2);
    let at = guest.scratch() as u64;
    guest.poke(at as usize, &[0; 16]);
    let unanswerable: [&[(u64, u32, u16)]; 3] = [
        &[(at, 16, 0)],
        &[(at, 16, NEXT), (at + 0x1000, 512, NEXT | WRITE)],
        &[(at, 16, NEXT), (1 << 40, 512, WRITE)],
    ];
    for chain in unanswerable {
        guest.run(20, 8);
        guest.fill(8);
        let bad = host.snapshot().bad_requests;
        guest.offer_raw(0, chain);
        // What was in flight on the ring ends, what comes behind waits.
        guest.drain();
        while host.snapshot().bad_requests == bad {
            std::thread::yield_now();
        }
        assert!(guest.offer(1));
        guest.kick(1);
        guest.drain();
        assert_eq!(guest.raw, []);
        // A pause helps nothing; its driver's reset does.
        guest.stop();
        guest.start();
        assert!(guest.offer(1));
        guest.kick(1);
        guest.drain();
        assert_eq!(guest.raw, []);
        guest.stop();
        guest.reset();
        guest.fresh_inflight_region();
        guest.start();
        guest.run(50, 8);
    }
    guest.verify();
}

#[test]
fn guest_that_does_not_kick_is_polled() {
    let net = Net::new();
    let (_, _host, mut guest) = start(&net, 2, 0, 3);
    guest.stop_kicking(0);
    guest.stop_kicking(1);
    guest.mute = true;
    guest.run(500, 4);
    for _ in 0..20 {
        guest.drain();
        // Long enough for the device's thread to sleep, if it would.
        std::thread::yield_now();
        guest.run(1, 1);
    }
    guest.stop();
    guest.start();
    guest.mute = false;
    guest.run(100, 4);
    guest.verify();
}

#[test]
fn pauses_go_on_after_a_handover_that_lost_a_request_the_guest_rewrote_under_way() {
    let net = Net::new();
    let (id, mut a, mut guest) = start(&net, 4, 10_000, 4);
    let mut b = Host::successor(&net, &id, 1, &a);
    offer(&mut a, &mut b);
    let socket = net.path("vmm-1.sock");
    b.listen(&socket);
    loop {
        guest.run(20, 16);
        guest.fill(16);
        guest.stop();
        guest.reap();
        if guest.spoil(2) {
            break;
        }
        guest.start();
    }
    guest.migrate_to(&socket);
    wait_for(&mut b, &mut a, "Attached");
    for _ in 0..4 {
        guest.run(50, 16);
        guest.fill(16);
        guest.stop();
        guest.start();
    }
    guest.run(200, 16);
    guest.verify();
    assert_eq!(b.snapshot().state, "remote");
}

#[test]
fn numbers_that_the_vmm_made_up_in_the_in_flight_region_are_replaced() {
    let net = Net::new();
    let tags: [fn(u64) -> u64; 4] = [|_| u64::MAX, |_| (1 << 40) + 7, |_| 0, |index| u64::MAX - index];
    for (round, number) in tags.into_iter().enumerate() {
        let id = identity(2, SIZE);
        let mut spec = net.image(&format!("{round}.img"), SIZE);
        spec.delay_us = Some(2000);
        let socket = net.path("vmm-0.sock");
        let mut host = Host::local(&net, &id, &spec, &socket);
        let mut guest = Guest::new(2, BLOCKS, round as u64);
        guest.plug_in(&socket);
        for _ in 0..3 {
            guest.run(50, 16);
            guest.fill(16);
            host.kill();
            guest.lose_connection();
            guest.scribble_tags(number);
            host = Host::new(&net, &id, 1, Role::Local);
            host.backend(&spec);
            host.listen(&socket);
            guest.connect(&socket);
            guest.start();
        }
        guest.run(100, 16);
        guest.verify();
        host.kill();
    }
}

#[test]
fn memory_that_is_cut_short_costs_its_vm_the_device_and_nobody_anything_else() {
    let net = Net::new();
    let (_, mut host, mut guest) = start(&net, 2, 2000, 6);
    let other_id = identity(1, SIZE);
    let mut other = Host::local(&net, &other_id, &net.image("other.img", SIZE), &net.path("other.sock"));
    let mut bystander = Guest::new(1, BLOCKS, 7);
    bystander.plug_in(&net.path("other.sock"));
    for _ in 0..3 {
        guest.run(20, 16);
        guest.fill(16);
        host.forget();
        guest.take_memory_away();
        guest.kick(0);
        // Reads and writes on their way end one way or the other; the VMM's connection ends in any case.
        wait_for(&mut host, &mut other, "Vmm { connected: false");
        bystander.run(100, 8);
        guest.start_in_new_memory(&net.path("vmm-0.sock"));
    }
    guest.run(100, 16);
    guest.verify();
    bystander.verify();
}

#[test]
fn file_of_a_device_that_has_left_is_free_when_that_is_told() {
    let net = Net::new();
    for round in 0..8 {
        let id = identity(2, SIZE);
        let mut a = Host::new(&net, &id, 1, Role::Local);
        let spec = net.image(&format!("{round}.img"), SIZE);
        a.backend(&spec);
        a.listen(&net.path("vmm-0.sock"));
        let mut guest = Guest::new(2, BLOCKS, round);
        guest.plug_in(&net.path("vmm-0.sock"));
        let mut b = Host::successor(&net, &id, 1, &a);
        offer(&mut a, &mut b);
        b.listen(&net.path("vmm-1.sock"));
        guest.stop();
        guest.migrate_to(&net.path("vmm-1.sock"));
        wait_for(&mut b, &mut a, "Attached");
        guest.run(50, 32);
        guest.fill(32);
        // In the middle of its guest's requests.
        a.handle.send(Command::Retire);
        wait_for(&mut a, &mut b, "Retired");
        if let Err(error) = spec.build(belay_attach::BACKEND_OWNER) {
            panic!("round {round}: {error}");
        }
        a.kill();
        b.kill();
    }
}

#[test]
fn pieces_of_the_memory_that_a_vmm_has_told_of_are_counted() {
    let net = Net::new();
    let (_, host, mut guest) = start(&net, 1, 0, 7);
    guest.run(20, 8);
    support::until(|| host.snapshot().memory_pieces == 1);
}

/// Reads the block behind what was the end of the disk. Its status: 0 done, 1 error.
fn read_behind(guest: &mut Guest) -> u8 {
    let at = guest.scratch() as u64;
    let mut header = [0; 16];
    header[8..].copy_from_slice(&(SIZE / 512).to_le_bytes());
    guest.poke(at as usize, &header);
    guest.poke(at as usize + 0x100, &[0xff]);
    guest.offer_raw(0, &[(at, 16, NEXT), (at + 0x1000, 4096, NEXT | WRITE), (at + 0x100, 1, WRITE)]);
    guest.wait_raw(1);
    guest.raw.clear();
    guest.peek(at as usize + 0x100)
}

/// In between the size is written to the ledger: an agent that dies there starts the device with the old one.
#[test]
fn device_whose_backend_has_grown_has_its_size_until_it_is_set() {
    let net = Net::new();
    let (_, mut host, mut guest) = start(&net, 1, 0, 6);
    host.handle.send(Command::Resize(2 * SIZE));
    support::until(|| {
        host.pump();
        host.has_seen("Resized(Ok")
    });
    assert_eq!(std::fs::metadata(net.path("a.img")).unwrap().len(), 2 * SIZE);
    assert_eq!(read_behind(&mut guest), 1);
    host.handle.send(Command::SetSize(2 * SIZE));
    support::until(|| read_behind(&mut guest) == 0);
    guest.run(50, 8);
    guest.verify();
}

/// A request's length that is no number of whole parts, and where its data is.
const LONG: usize = (5 << 20) + 1536;
const FROM: u64 = 16 << 20;
const TO: u64 = 32 << 20;

/// Writes (or reads) LONG bytes from a sector on, in one request.
fn offer_long(guest: &mut Guest, write: bool, sector: u64) {
    let at = guest.scratch() as u64;
    let mut header = [0; 16];
    header[0] = u8::from(write);
    header[8..].copy_from_slice(&sector.to_le_bytes());
    guest.poke(at as usize, &header);
    guest.poke(at as usize + 0x100, &[0xff]);
    let data = if write { (FROM, LONG as u32, NEXT) } else { (TO, LONG as u32, NEXT | WRITE) };
    guest.offer_raw(0, &[(at, 16, NEXT), data, (at + 0x100, 1, WRITE)]);
}

/// Waits for the end of a long request, which must be the only raw one.
fn end_long(guest: &mut Guest, write: bool) {
    guest.wait_raw(1);
    let written = if write { 1 } else { LONG as u32 + 1 };
    let [(0, 120, length)] = guest.raw[..] else { panic!("{:?}", guest.raw) };
    assert_eq!((length, guest.peek(guest.scratch() + 0x100)), (written, 0));
    guest.raw.clear();
}

fn fill_long(guest: &Guest, seed: u8) -> Vec<u8> {
    let bytes: Vec<u8> =
        (0..LONG as u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8 ^ seed).collect();
    guest.poke(FROM as usize, &bytes);
    guest.poke(TO as usize, &vec![0; LONG]);
    bytes
}

#[test]
fn request_longer_than_a_frame_is_served_here_and_from_afar_and_moves_and_survives() {
    let net = Net::new();
    let (id, mut a, mut guest) = start(&net, 2, 3000, 9);
    let bytes = fill_long(&guest, 1);
    offer_long(&mut guest, true, 1);
    end_long(&mut guest, true);
    offer_long(&mut guest, false, 1);
    // Parked, and gone on with.
    guest.stop();
    guest.start();
    end_long(&mut guest, false);
    assert!(guest.peek_all(TO as usize, LONG) == bytes, "what was read is not what was written");

    // In flight while its guest moves: written there, then read back from afar.
    let mut b = Host::successor(&net, &id, 1, &a);
    offer(&mut a, &mut b);
    b.listen(&net.path("vmm-1.sock"));
    let bytes = fill_long(&guest, 2);
    offer_long(&mut guest, true, 8);
    while a.snapshot().in_flight == 0 && guest.raw.is_empty() {
        guest.reap();
    }
    guest.stop();
    guest.migrate_to(&net.path("vmm-1.sock"));
    wait_for(&mut b, &mut a, "Attached");
    end_long(&mut guest, true);
    offer_long(&mut guest, false, 8);
    guest.stop();
    guest.start();
    end_long(&mut guest, false);
    assert!(guest.peek_all(TO as usize, LONG) == bytes, "what was read afar is not what was written");

    // In flight when the agent dies; the in-flight region has one number for all parts.
    let epoch = b.snapshot().epoch;
    let bytes = fill_long(&guest, 3);
    for write in [true, false] {
        offer_long(&mut guest, write, 3);
        b.kill();
        guest.lose_connection();
        b = Host::new(&net, &id, epoch, Role::Remote { backing: "peer".into() });
        b.peer(&a);
        b.listen(&net.path("vmm-1.sock"));
        guest.connect(&net.path("vmm-1.sock"));
        guest.start();
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(30);
        while guest.raw.is_empty() {
            assert!(std::time::Instant::now() < deadline, "the request did not end");
            guest.reap();
            b.pump();
            a.pump();
            std::thread::yield_now();
        }
        end_long(&mut guest, write);
    }
    assert!(
        guest.peek_all(TO as usize, LONG) == bytes,
        "what was read after the kills is not what was written"
    );
}

/// VIRTIO_BLK_F_FLUSH.
const FLUSH: u64 = 1 << 9;

/// The status of a write, of a read, and of a discard, as a guest that takes a flush and one that does not get it from a
/// disk whose flushes fail.
#[test]
fn write_of_a_guest_that_does_not_flush_is_completed_when_it_is_durable() {
    let net = Net::new();
    for (declines, want) in [(0, [0, 0, 0]), (FLUSH, [1, 0, 1])] {
        let id = identity(1, SIZE);
        let host = Host::new(&net, &id, 1, Role::Local);
        let mut spec = net.image(&format!("{declines}.img"), SIZE);
        let fault = serde_json::json!({ "kind": "flush", "errno": 5 });
        spec.fault = vec![serde_json::from_value(fault).unwrap()];
        host.backend(&spec);
        let socket = net.path(&format!("{declines}.sock"));
        host.listen(&socket);
        let mut guest = Guest::new(1, BLOCKS, 1);
        guest.declines = declines;
        guest.plug_in(&socket);
        let at = guest.scratch() as u64;
        let mut segment = [0; 16];
        segment[8] = 8;
        guest.poke(at as usize + 0x200, &segment);
        for (number, want) in [1u8, 0, 11].into_iter().zip(want) {
            let mut header = [0; 16];
            header[0] = number;
            guest.poke(at as usize, &header);
            guest.poke(at as usize + 0x100, &[0xff]);
            let data = match number {
                1 => (at + 0x1000, 512, NEXT),
                0 => (at + 0x1000, 512, NEXT | WRITE),
                _ => (at + 0x200, 16, NEXT),
            };
            guest.offer_raw(0, &[(at, 16, NEXT), data, (at + 0x100, 1, WRITE)]);
            guest.wait_raw(1);
            guest.raw.clear();
            assert_eq!(guest.peek(at as usize + 0x100), want, "request {number}, declines {declines:#x}");
        }
    }
}

#[test]
fn guest_that_does_not_flush_pauses_moves_and_survives() {
    let net = Net::new();
    let id = identity(2, SIZE);
    let mut a = Host::new(&net, &id, 1, Role::Local);
    let mut spec = net.image("a.img", SIZE);
    spec.delay_us = Some(1000);
    a.backend(&spec);
    a.listen(&net.path("vmm-0.sock"));
    let mut guest = Guest::new(2, BLOCKS, 21);
    guest.declines = FLUSH;
    guest.plug_in(&net.path("vmm-0.sock"));
    for _ in 0..3 {
        guest.run(50, 16);
        guest.stop();
        guest.start();
    }
    let mut b = Host::successor(&net, &id, 1, &a);
    offer(&mut a, &mut b);
    b.listen(&net.path("vmm-1.sock"));
    guest.run(50, 16);
    guest.stop();
    guest.migrate_to(&net.path("vmm-1.sock"));
    wait_for(&mut b, &mut a, "Attached");
    guest.run(100, 16);
    let epoch = b.snapshot().epoch;
    b.kill();
    guest.lose_connection();
    b = Host::new(&net, &id, epoch, Role::Remote { backing: "peer".into() });
    b.peer(&a);
    b.listen(&net.path("vmm-1.sock"));
    guest.connect(&net.path("vmm-1.sock"));
    guest.start();
    let target = guest.completed + 100;
    guest.run_until(16, |guest| {
        a.pump();
        b.pump();
        guest.completed >= target
    });
    // And its disk follows it.
    let local = net.image("b.img", SIZE).build(belay_attach::BACKEND_OWNER).unwrap();
    let options = belay_attach::ExchangeOptions {
        map_path: net.path("b.map"),
        bandwidth: None,
        in_flight_bytes: 1 << 20,
        echo: true,
    };
    b.handle.send(Command::StartExchange { local, options });
    let mut retiring = false;
    let mut committed = false;
    guest.run_until(16, |_| {
        a.pump();
        b.pump();
        if b.has_seen("ReadyToCut") && !retiring {
            retiring = true;
            a.handle.send(Command::Retire);
        }
        if a.has_seen("Retired") && !committed {
            committed = true;
            b.handle.send(Command::CutCommitted);
        }
        b.has_seen("ExchangeDone")
    });
    guest.run(100, 16);
    guest.verify();
}
