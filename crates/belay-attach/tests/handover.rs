//! A synthetic VM moves between two devices' threads under load: every request is checked.

mod support;

use belay_attach::{Command, ExchangeOptions};
use belay_handover::exchange::{BlockMap, BootId};
use support::guest::Guest;
use support::{Host, Net, SIZE, offer, start, wait_for};

fn options(net: &Net, name: &str) -> ExchangeOptions {
    ExchangeOptions { map_path: net.path(name), bandwidth: None, in_flight_bytes: 1 << 20, echo: true }
}

/// Moves the guest from `from` to a new host; the requests in flight go along.
fn migrate(
    net: &Net,
    guest: &mut Guest,
    from: &mut Host,
    id: &belay_wire::DeviceIdentity,
    epoch: u64,
    leg: u32,
) -> Host {
    let mut to = Host::successor(net, id, epoch, from);
    offer(from, &mut to);
    let socket = net.path(&format!("vmm-{leg}.sock"));
    to.listen(&socket);
    guest.run(200, 16);
    guest.fill(16);
    guest.stop();
    guest.migrate_to(&socket);
    wait_for(&mut to, from, "Attached");
    to
}

/// Copies the device to its new host under load, and lets the old one go.
fn exchange(net: &Net, guest: &mut Guest, old: &mut Host, new: &mut Host, leg: u32) {
    let local = net.image(&format!("leg-{leg}.img"), SIZE).build(belay_attach::BACKEND_OWNER).unwrap();
    new.handle.send(Command::StartExchange { local, options: options(net, &format!("leg-{leg}.map")) });
    let (mut retiring, mut committed) = (false, false);
    guest.run_until(16, |_| {
        old.pump();
        new.pump();
        assert!(!new.has_seen("ExchangePaused"));
        if new.has_seen("ReadyToCut") && !retiring {
            retiring = true;
            old.handle.send(Command::Retire);
        }
        if old.has_seen("Retired") && !committed {
            committed = true;
            new.handle.send(Command::CutCommitted);
        }
        new.has_seen("ExchangeDone")
    });
}

#[test]
fn local_requests_are_right() {
    let net = Net::new();
    let (_, _host, mut guest) = start(&net, 4, 0, 1);
    guest.run(5000, 16);
    guest.verify();
}

#[test]
fn pause_and_resume_completes_what_was_in_flight() {
    let net = Net::new();
    let (_, _host, mut guest) = start(&net, 2, 500, 2);
    for _ in 0..20 {
        guest.run(100, 16);
        guest.fill(16);
        guest.stop();
        assert!(guest.in_flight() > 0);
        guest.start();
    }
    guest.verify();
}

#[test]
fn reset_with_requests_in_flight_leaves_nothing_for_the_new_rings() {
    let net = Net::new();
    let (_, _host, mut guest) = start(&net, 2, 2000, 3);
    for _ in 0..10 {
        guest.run(50, 16);
        guest.stop();
        guest.reset();
        guest.fresh_inflight_region();
        guest.start();
    }
    guest.run(200, 16);
    guest.verify();
}

/// What a buffer of a read holds before the read is done.
const UNREAD: [u8; 4096] = [0xa5; 4096];

#[test]
fn stop_is_answered_when_no_disk_here_reads_into_the_guests_memory_any_more() {
    let net = Net::new();
    let (_, _host, mut guest) = start(&net, 2, 20_000, 11);
    for _ in 0..4 {
        guest.run(20, 16);
        guest.fill(16);
        guest.stop();
        // Whatever the guest's memory is used for from now on, nothing lands in it.
        let unread = guest.read_buffers().iter().filter(|(_, bytes)| *bytes == UNREAD).count();
        assert!(
            unread <= guest.not_taken(),
            "{unread} buffers are not filled, {} requests were not taken",
            guest.not_taken()
        );
        guest.start();
    }
    guest.verify();
}

#[test]
fn data_from_another_host_does_not_land_in_a_guest_that_was_stopped_unless_it_goes_on() {
    let net = Net::new();
    let (id, mut a, mut guest) = start(&net, 2, 20_000, 12);
    let _b = migrate(&net, &mut guest, &mut a, &id, 1, 1);
    // The old host ends what it has begun, in memory that only here is the guest's own, too.
    guest.drain();
    for round in 0..4 {
        guest.run(20, 16);
        guest.fill(16);
        guest.stop();
        let buffers = guest.read_buffers();
        assert!(buffers.iter().any(|(_, bytes)| *bytes == UNREAD), "no read was in flight");
        if round % 2 == 0 {
            // A reset. The new region comes when nothing of before is under way any more.
            guest.reset();
            guest.fresh_inflight_region();
            assert!(guest.same_buffers(&buffers), "data of before the reset has landed");
        }
        guest.start();
    }
    guest.run(20, 16);
    guest.verify();
}

#[test]
fn handover_moves_the_guest_with_its_requests_in_flight() {
    let net = Net::new();
    let (id, mut a, mut guest) = start(&net, 4, 1000, 4);
    let mut b = migrate(&net, &mut guest, &mut a, &id, 1, 1);
    guest.run(1000, 16);
    guest.verify();
    assert_eq!(b.snapshot().state, "remote");
    b.pump();
    assert!(a.has_seen("Granted"));
}

#[test]
fn exchange_under_load_then_back_again() {
    let net = Net::new();
    let (id, mut a, mut guest) = start(&net, 2, 0, 5);
    for leg in 1..=4u32 {
        let mut b = migrate(&net, &mut guest, &mut a, &id, u64::from(leg), leg);
        exchange(&net, &mut guest, &mut a, &mut b, leg);
        guest.run(300, 16);
        guest.verify();
        a = b;
    }
}

/// A power loss takes writes that were not flushed, also to blocks that had been flushed and marked before.
#[test]
fn nothing_is_believed_of_a_copy_from_before_the_host_was_started_anew() {
    let net = Net::new();
    let (id, mut a, mut guest) = start(&net, 2, 0, 13);
    let mut b = migrate(&net, &mut guest, &mut a, &id, 1, 1);
    let mut map = BlockMap::empty(SIZE);
    map.set(0, map.blocks());
    std::fs::write(net.path("leg-1.map"), map.encode(id.id, BootId([1; 16]))).unwrap();
    exchange(&net, &mut guest, &mut a, &mut b, 1);
    guest.verify();
}

#[test]
fn handover_taken_back_before_the_claim_leaves_the_guest_where_it_was() {
    let net = Net::new();
    let (id, mut a, mut guest) = start(&net, 2, 1000, 6);
    let mut b = Host::successor(&net, &id, 1, &a);
    offer(&mut a, &mut b);
    for _ in 0..5 {
        guest.run(100, 16);
        guest.stop();
        guest.start();
    }
    a.handle.send(Command::Withdraw);
    wait_for(&mut a, &mut b, "Withdrawn");
    guest.run(500, 16);
    guest.verify();
    assert!(!b.has_seen("Attached"));
}

#[test]
fn many_handovers_under_load_lose_and_double_nothing() {
    let net = Net::new();
    let (id, mut a, mut guest) = start(&net, 2, 300, 7);
    for leg in 1..=25u32 {
        let mut b = migrate(&net, &mut guest, &mut a, &id, u64::from(leg), leg);
        exchange(&net, &mut guest, &mut a, &mut b, leg);
        a = b;
    }
    guest.verify();
}
