//! A synthetic VM whose guest, driver or VMM does what none should, and what few do.

mod support;

use belay_attach::{Command, Role};
use support::guest::Guest;
use support::{Host, Net, identity, wait_for};

const SIZE: u64 = 8 << 20;
const BLOCKS: u64 = SIZE / 4096;
const NEXT: u16 = 1;
const WRITE: u16 = 2;

fn start(net: &Net, queues: u16, delay_us: u64, seed: u64) -> (belay_wire::DeviceIdentity, Host, Guest) {
    let id = identity(queues, SIZE);
    let host = Host::new(net, &id, 1, Role::Local);
    let mut spec = net.image("a.img", SIZE);
    spec.delay_us = (delay_us > 0).then_some(delay_us);
    host.backend(&spec);
    let socket = net.path("vmm-0.sock");
    host.listen(&socket);
    let mut guest = Guest::new(usize::from(queues), BLOCKS, seed);
    guest.connect(&socket);
    guest.fresh_inflight_region();
    guest.start();
    (id, host, guest)
}

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
    let mut b = Host::new(&net, &id, 1, Role::Successor { from: "peer".into() });
    b.peer(&a);
    a.handle.send(Command::Offer { to: "peer".into() });
    wait_for(&mut b, &mut a, "Prepared");
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
        let mut host = Host::new(&net, &id, 1, Role::Local);
        host.backend(&spec);
        host.listen(&socket);
        let mut guest = Guest::new(2, BLOCKS, round as u64);
        guest.connect(&socket);
        guest.fresh_inflight_region();
        guest.start();
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
    let mut other = Host::new(&net, &other_id, 1, Role::Local);
    other.backend(&net.image("other.img", SIZE));
    other.listen(&net.path("other.sock"));
    let mut bystander = Guest::new(1, BLOCKS, 7);
    bystander.connect(&net.path("other.sock"));
    bystander.fresh_inflight_region();
    bystander.start();
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
        guest.connect(&net.path("vmm-0.sock"));
        guest.fresh_inflight_region();
        guest.start();
        let mut b = Host::new(&net, &id, 1, Role::Successor { from: "peer".into() });
        b.peer(&a);
        a.handle.send(Command::Offer { to: "peer".into() });
        wait_for(&mut b, &mut a, "Prepared");
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
