//! A device whose backing stays at one host, while its guest goes to another and comes home.

mod support;

use belay_attach::{Command, ExchangeOptions, Role};
use belay_wire::DeviceIdentity;
use support::guest::Guest;
use support::{Host, Net, identity, offer, wait_for};

const SIZE: u64 = 4 << 20;
const BLOCKS: u64 = SIZE / 4096;

/// A guest at a host with a slow disk; the disk's file is `a.img`, the host's socket `a.sock`.
fn start(net: &Net, delay_us: u64, seed: u64) -> (DeviceIdentity, Host, Guest) {
    let id = identity(2, SIZE);
    let _ = net.image("a.img", SIZE);
    let host = backing(net, &id, 1, Role::Local, delay_us);
    let mut guest = Guest::new(2, BLOCKS, seed);
    guest.plug_in(&net.path("a.sock"));
    (id, host, guest)
}

/// The process of the host that has the disk.
fn backing(net: &Net, id: &DeviceIdentity, epoch: u64, role: Role, delay_us: u64) -> Host {
    let host = Host::new(net, id, epoch, role);
    let mut spec = belay_block::BackendSpec::file(net.path("a.img"));
    spec.delay_us = (delay_us > 0).then_some(delay_us);
    host.backend(&spec);
    host.listen(&net.path("a.sock"));
    host
}

fn lent() -> Role {
    Role::Lent { to: "peer".into() }
}

/// A host that the guest may come to, at the epoch of its source.
fn successor(net: &Net, id: &DeviceIdentity, epoch: u64, from: &mut Host) -> Host {
    let mut to = Host::successor(net, id, epoch, from);
    to.listen(&net.path("b.sock"));
    from.forget();
    offer(from, &mut to);
    to
}

/// The guest leaves, its disk stays.
fn leave(net: &Net, id: &DeviceIdentity, epoch: u64, a: &mut Host, guest: &mut Guest) -> Host {
    let mut b = successor(net, id, epoch, a);
    guest.fill(16);
    guest.stop();
    guest.migrate_to(&net.path("b.sock"));
    wait_for(&mut b, a, "Attached");
    b
}

fn offer_home(a: &mut Host, b: &mut Host) {
    a.forget();
    b.forget();
    b.handle.send(Command::Offer { to: "peer".into() });
    wait_for(b, a, "SuccessorReady");
}

/// The guest comes home with requests in flight.
fn come_home(net: &Net, a: &mut Host, b: &mut Host, guest: &mut Guest) {
    offer_home(a, b);
    guest.fill(16);
    guest.stop();
    guest.migrate_to(&net.path("a.sock"));
    wait_for(a, b, "Returned");
    wait_for(b, a, "Taken");
}

#[test]
fn guest_goes_and_comes_home_many_times_under_load() {
    let net = Net::new();
    let (id, mut a, mut guest) = start(&net, 500, 11);
    for trip in 0..20u64 {
        let mut b = leave(&net, &id, 1 + 2 * trip, &mut a, &mut guest);
        // Sometimes it turns round at once, with requests of its first stay still in flight.
        guest.run(if trip % 3 == 0 { 1 } else { 100 }, 16);
        come_home(&net, &mut a, &mut b, &mut guest);
        guest.run(if trip % 4 == 0 { 1 } else { 100 }, 16);
        b.kill();
    }
    guest.verify();
}

#[test]
fn guest_comes_home_while_its_disk_is_being_copied() {
    let net = Net::new();
    let (id, mut a, mut guest) = start(&net, 300, 12);
    for trip in 0..8u64 {
        guest.run(50, 16);
        let mut b = leave(&net, &id, 1 + 2 * trip, &mut a, &mut guest);
        let local = net.image(&format!("b-{trip}.img"), SIZE).build(belay_attach::BACKEND_OWNER).unwrap();
        let bandwidth = Some(if trip % 2 == 0 { 256 << 10 } else { 1 << 30 });
        let options =
            ExchangeOptions { map_path: net.path("b.map"), bandwidth, in_flight_bytes: 1 << 20, echo: true };
        offer_home(&mut a, &mut b);
        b.handle.send(Command::StartExchange { local, options });
        guest.run(600, 16);
        // It is all here, perhaps; but it was not cut over.
        b.pump();
        assert!(!b.has_seen("ReadyToCut"));
        come_home(&net, &mut a, &mut b, &mut guest);
        guest.run(100, 16);
        guest.verify();
        b.kill();
    }
}

#[test]
fn return_given_up_before_the_commit_leaves_the_guest_where_it_was() {
    let net = Net::new();
    let (id, mut a, mut guest) = start(&net, 1000, 13);
    let mut b = leave(&net, &id, 1, &mut a, &mut guest);
    offer_home(&mut a, &mut b);
    for _ in 0..10 {
        guest.run(50, 16);
        guest.fill(16);
        guest.stop();
        guest.start();
    }
    guest.fill(16);
    guest.stop();
    b.handle.send(Command::Withdraw);
    wait_for(&mut b, &mut a, "Withdrawn");
    guest.start();
    guest.run(200, 16);
    assert!(!a.has_seen("Returned") && !b.has_seen("Taken"));
    come_home(&net, &mut a, &mut b, &mut guest);
    guest.verify();
}

#[test]
fn link_lost_again_and_again_repeats_and_loses_nothing() {
    let net = Net::new();
    let (id, mut a, mut guest) = start(&net, 500, 14);
    let mut b = leave(&net, &id, 1, &mut a, &mut guest);
    for _ in 0..30 {
        b.cut_link();
        guest.run(60, 16);
        b.pump();
        a.pump();
    }
    offer_home(&mut a, &mut b);
    guest.fill(16);
    b.cut_link();
    guest.stop();
    guest.migrate_to(&net.path("a.sock"));
    b.cut_link();
    wait_for(&mut a, &mut b, "Returned");
    wait_for(&mut b, &mut a, "Taken");
    guest.run(100, 16);
    guest.verify();
}

/// The host of the guest dies and comes back; its VMM keeps the in-flight region.
fn restart_attachment(
    net: &Net,
    id: &DeviceIdentity,
    role: Role,
    epoch: u64,
    old: &mut Host,
    a: &Host,
) -> Host {
    old.kill();
    let new = Host::new(net, id, epoch, role);
    new.peer(a);
    new.listen(&net.path("b.sock"));
    new
}

fn reconnect(net: &Net, guest: &mut Guest, socket: &str) {
    guest.lose_connection();
    guest.connect(&net.path(socket));
    guest.start();
}

#[test]
fn restarted_attachment_asks_for_what_was_in_flight_and_uses_no_number_twice() {
    let net = Net::new();
    let (id, mut a, mut guest) = start(&net, 500, 15);
    let mut b = leave(&net, &id, 1, &mut a, &mut guest);
    for restart in 0..12 {
        guest.run(40, 16);
        if restart % 2 == 0 {
            // Nothing is in flight: nothing tells the new process which numbers were used.
            guest.drain();
        } else {
            guest.fill(16);
        }
        let role = Role::Remote { backing: "peer".into() };
        b = restart_attachment(&net, &id, role, 2, &mut b, &a);
        reconnect(&net, &mut guest, "b.sock");
        let (mut completed, mut rounds) = (guest.completed, 0);
        guest.run_until(16, |guest| {
            b.pump();
            a.pump();
            if guest.completed > completed {
                (completed, rounds) = (guest.completed, rounds + 1);
            }
            rounds > 20
        });
    }
    guest.drain();
    guest.verify();
}

#[test]
fn restarted_backing_is_asked_again_for_everything_unanswered() {
    let net = Net::new();
    let (id, mut a, mut guest) = start(&net, 500, 16);
    let mut b = leave(&net, &id, 1, &mut a, &mut guest);
    for _ in 0..6 {
        guest.run(60, 16);
        guest.fill(16);
        a.kill();
        a = backing(&net, &id, 2, lent(), 500);
        b.peer(&a);
        let target = guest.completed + 100;
        guest.run_until(16, |guest| {
            b.pump();
            a.pump();
            guest.completed >= target
        });
    }
    come_home(&net, &mut a, &mut b, &mut guest);
    guest.verify();
}

#[test]
fn grant_that_was_durable_but_never_sent_is_heard_after_the_restart() {
    let net = Net::new();
    let (id, mut a, mut guest) = start(&net, 1000, 17);
    let mut b = successor(&net, &id, 1, &mut a);
    a.auto_grant = false;
    guest.run(50, 16);
    guest.fill(16);
    guest.stop();
    guest.migrate_to(&net.path("b.sock"));
    wait_for(&mut a, &mut b, "Claimed");
    // The ledger has it, and nobody has heard.
    a.kill();
    let mut a = backing(&net, &id, 2, lent(), 1000);
    b.peer(&a);
    wait_for(&mut b, &mut a, "Attached");
    guest.run(200, 16);
    b.cut_link();
    guest.run(200, 16);
    guest.verify();
}

#[test]
fn attachment_killed_between_claim_and_grant_finds_the_device_its_own() {
    let net = Net::new();
    let (id, mut a, mut guest) = start(&net, 1000, 18);
    let mut b = successor(&net, &id, 1, &mut a);
    a.auto_grant = false;
    guest.run(50, 16);
    guest.fill(16);
    guest.stop();
    guest.migrate_to(&net.path("b.sock"));
    wait_for(&mut a, &mut b, "Claimed");
    let role = Role::Successor { from: "peer".into() };
    let mut b = restart_attachment(&net, &id, role, 1, &mut b, &a);
    a.handle.send(Command::GrantDurable { epoch: belay_wire::Epoch(2) });
    reconnect(&net, &mut guest, "b.sock");
    wait_for(&mut b, &mut a, "Attached");
    guest.run(200, 16);
    guest.verify();
}

#[test]
fn guest_paused_while_the_grant_travels_goes_on() {
    let net = Net::new();
    let (id, mut a, mut guest) = start(&net, 1000, 19);
    let mut b = successor(&net, &id, 1, &mut a);
    a.auto_grant = false;
    guest.run(50, 16);
    guest.fill(16);
    guest.stop();
    guest.migrate_to(&net.path("b.sock"));
    wait_for(&mut a, &mut b, "Claimed");
    guest.fill(24);
    guest.stop();
    guest.start();
    a.handle.send(Command::GrantDurable { epoch: belay_wire::Epoch(2) });
    wait_for(&mut b, &mut a, "Attached");
    guest.run(200, 16);
    guest.verify();
}

#[test]
fn destination_vmm_that_dies_before_the_list_claims_nothing() {
    let net = Net::new();
    let (id, mut a, mut guest) = start(&net, 1000, 20);
    let mut b = successor(&net, &id, 1, &mut a);
    // The VM's memory has come before the list, and then its VMM dies.
    let mut other = Guest::new(2, BLOCKS, 1);
    other.plug_in(&net.path("b.sock"));
    other.disconnect();
    wait_for(&mut b, &mut a, "Vmm { connected: false");
    guest.run(50, 16);
    guest.stop();
    wait_for(&mut a, &mut b, "RingsStopped");
    guest.start();
    guest.run(200, 16);
    guest.verify();
    a.pump();
    assert!(!a.has_seen("Claimed"), "a dead VMM's rings made a claim");
}

#[test]
fn guest_that_was_reset_at_the_source_starts_afresh_at_the_destination() {
    let net = Net::new();
    let (id, mut a, mut guest) = start(&net, 1000, 21);
    let mut b = successor(&net, &id, 1, &mut a);
    guest.run(50, 16);
    // (With reads in flight the two hosts' guest memories would have to be two; here they are one.)
    guest.drain();
    guest.stop();
    // Its firmware has run, its driver has not: the VM moves, and the driver begins there.
    guest.reset();
    guest.migrate_to(&net.path("b.sock"));
    wait_for(&mut b, &mut a, "Attached");
    guest.run(200, 16);
    guest.verify();
}

/// A guest goes home with requests in flight. Its return is not durable until somebody says so.
fn go_home_until_returning(net: &Net, a: &mut Host, b: &mut Host, guest: &mut Guest) {
    offer_home(a, b);
    a.auto_grant = false;
    guest.run(50, 16);
    guest.fill(16);
    guest.stop();
    guest.migrate_to(&net.path("a.sock"));
    wait_for(a, b, "Returning");
}

#[test]
fn crash_of_the_backing_before_the_return_is_durable_lets_the_return_happen_later() {
    let net = Net::new();
    let (id, mut a, mut guest) = start(&net, 500, 22);
    let mut b = leave(&net, &id, 1, &mut a, &mut guest);
    go_home_until_returning(&net, &mut a, &mut b, &mut guest);
    a.kill();
    let mut a = backing(&net, &id, 2, lent(), 500);
    b.peer(&a);
    reconnect(&net, &mut guest, "a.sock");
    wait_for(&mut a, &mut b, "Returned");
    wait_for(&mut b, &mut a, "Taken");
    guest.run(200, 16);
    guest.verify();
}

/// The host that the guest leaves has written its list to its ledger: it will not run there again, says what was written
/// with it. Both have forgotten the rest.
#[test]
fn crash_of_both_before_the_return_is_durable_completes_what_was_in_flight_from_the_list() {
    let net = Net::new();
    let (id, mut a, mut guest) = start(&net, 20_000, 25);
    let mut b = leave(&net, &id, 1, &mut a, &mut guest);
    go_home_until_returning(&net, &mut a, &mut b, &mut guest);
    let list = b.listed.take().unwrap();
    assert!(!list.requests.is_empty());
    a.kill();
    b.kill();
    let mut a = backing(&net, &id, 2, lent(), 500);
    reconnect(&net, &mut guest, "a.sock");
    let mut b = Host::new(&net, &id, 2, Role::Remote { backing: "peer".into() });
    b.peer(&a);
    b.handle.send(Command::Remember(list));
    b.handle.send(Command::Offer { to: "peer".into() });
    wait_for(&mut a, &mut b, "Returned");
    wait_for(&mut b, &mut a, "Taken");
    guest.run(200, 16);
    guest.verify();
}

#[test]
fn crash_of_the_backing_after_the_return_is_durable_keeps_it() {
    let net = Net::new();
    let (id, mut a, mut guest) = start(&net, 500, 23);
    let mut b = leave(&net, &id, 1, &mut a, &mut guest);
    go_home_until_returning(&net, &mut a, &mut b, &mut guest);
    a.kill();
    let mut a = backing(&net, &id, 3, Role::Local, 500);
    b.peer(&a);
    reconnect(&net, &mut guest, "a.sock");
    // The borrower asks, and hears that its epoch is over.
    wait_for(&mut b, &mut a, "Taken");
    guest.run(200, 16);
    guest.verify();
}

#[test]
fn crash_of_the_borrower_before_the_return_leaves_the_guest_there() {
    let net = Net::new();
    let (id, mut a, mut guest) = start(&net, 500, 24);
    let mut b = leave(&net, &id, 1, &mut a, &mut guest);
    offer_home(&mut a, &mut b);
    guest.run(50, 16);
    guest.fill(16);
    guest.stop();
    let role = Role::Remote { backing: "peer".into() };
    let mut b = restart_attachment(&net, &id, role, 2, &mut b, &a);
    reconnect(&net, &mut guest, "b.sock");
    guest.run_until(16, |_| {
        a.pump();
        b.pump();
        b.has_seen("Link")
    });
    guest.run(200, 16);
    assert!(!a.has_seen("Return"));
    come_home(&net, &mut a, &mut b, &mut guest);
    guest.verify();
}

/// Time that each request takes, microseconds: long enough for what was seen in flight to be so still when an agent is
/// killed right after, on a busy machine, too.
const SLOW_US: u64 = 200_000;

/// Asks the disk for its name, which is answered before what is in flight.
fn ask_for_the_id(guest: &mut Guest) {
    let at = guest.scratch() as u64;
    guest.poke(at as usize, &[8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    guest.offer_raw(0, &[(at, 16, 1), (at + 0x100, 20, 3), (at + 0x200, 1, 2)]);
    guest.wait_raw(1);
}

/// A guest away from its disk, with requests in flight, one of which was answered out of order; its agent was killed,
/// and the new one has no way to the disk's host yet: rings that its VMM starts wait for word from there.
fn restarted_without_a_link(net: &Net, seed: u64) -> (Host, Host, Guest) {
    let (id, mut a, mut guest) = start(net, SLOW_US, seed);
    let b = leave(net, &id, 1, &mut a, &mut guest);
    guest.run(16, 16);
    support::until(|| {
        guest.step(16);
        b.snapshot().in_flight > 16
    });
    ask_for_the_id(&mut guest);
    let b = restart_without_a_link(net, &id, b, &mut guest);
    (a, b, guest)
}

fn restart_without_a_link(net: &Net, id: &DeviceIdentity, mut b: Host, guest: &mut Guest) -> Host {
    b.kill();
    guest.lose_connection();
    let b = Host::new(net, id, 2, Role::Remote { backing: "peer".into() });
    b.listen(&net.path("b.sock"));
    guest.connect(&net.path("b.sock"));
    guest.start();
    b
}

/// The guest gets more done, all of it right, while both hosts answer.
fn go_on(a: &mut Host, b: &mut Host, guest: &mut Guest) {
    let target = guest.completed + 32;
    guest.run_until(16, |guest| {
        a.pump();
        b.pump();
        guest.completed > target
    });
    guest.verify();
}

/// Such a guest is stopped, and tries to go home when there is a link again. It has to stay.
fn try_to_go_home(net: &Net, a: &mut Host, b: &mut Host, guest: &mut Guest) {
    guest.stop();
    b.peer(a);
    offer_home(a, b);
    let left = guest.leave();
    guest.plug_in(&net.path("a.sock"));
    wait_for(a, b, "HandoverFailed");
    assert!(!a.has_seen("Returning"));
    drop(guest.leave());
    assert!(guest.go_back(left));
    go_on(a, b, guest);
}

/// Found with random schedules of the machines: such rings, stopped meanwhile, seemed to have nothing in flight, and the
/// guest went home without its requests.
#[test]
fn guest_whose_rings_have_not_run_since_a_restart_is_not_taken_home_without_its_requests() {
    let net = Net::new();
    let (mut a, mut b, mut guest) = restarted_without_a_link(&net, 41);
    try_to_go_home(&net, &mut a, &mut b, &mut guest);
}

/// The ring that starts first has never been used: it fits any list.
#[test]
fn guest_with_an_unused_ring_is_not_taken_home_without_the_requests_of_another() {
    let net = Net::new();
    let (id, mut a, mut guest) = start(&net, SLOW_US, 43);
    let mut b = successor(&net, &id, 1, &mut a);
    guest.stop();
    guest.migrate_to(&net.path("b.sock"));
    wait_for(&mut b, &mut a, "Attached");
    support::until(|| {
        guest.reap();
        while guest.in_flight() < 16 {
            guest.offer(1);
        }
        guest.kick(1);
        b.snapshot().in_flight > 8
    });
    let mut b = restart_without_a_link(&net, &id, b, &mut guest);
    try_to_go_home(&net, &mut a, &mut b, &mut guest);
}

/// Nor did they when it was merely paused and resumed: what the in-flight region said was passed over.
#[test]
fn guest_whose_rings_have_not_run_since_a_restart_is_paused_and_goes_on_with_its_requests() {
    let net = Net::new();
    let (mut a, mut b, mut guest) = restarted_without_a_link(&net, 42);
    guest.stop();
    guest.start();
    b.peer(&a);
    go_on(&mut a, &mut b, &mut guest);
    assert_eq!(guest.raw.len(), 1, "answered twice");
}
