//! An agent that dies, and what its successor finds.

mod support;

use belay_attach::Command;
use support::guest::Guest;
use support::{Host, Net, identity, offer, wait_for};

const SIZE: u64 = 4 << 20;
const BLOCKS: u64 = SIZE / 4096;

/// Found with agents that were killed at random: the ring that started first drew numbers that requests in flight of
/// another ring had. One of two requests with the same number counts as done when the other is.
#[test]
fn ring_that_starts_first_draws_no_number_that_a_later_one_has_in_flight() {
    let net = Net::new();
    let id = identity(2, SIZE);
    let mut spec = net.image("a.img", SIZE);
    spec.delay_us = Some(2_000_000);
    let socket = net.path("a.sock");
    let process = || Host::local(&net, &id, &spec, &socket);
    let mut a = process();
    let mut guest = Guest::new(2, BLOCKS, 31);
    guest.plug_in(&socket);
    guest.fill(8);
    support::until(|| a.snapshot().in_flight >= 14);
    a.kill();
    guest.lose_connection();
    let mut a = process();
    guest.fill(16);
    guest.connect(&socket);
    guest.give_memory();
    guest.start_ring(0);
    support::until(|| a.snapshot().in_flight >= 14);
    guest.start_ring(1);
    support::until(|| a.snapshot().in_flight >= 28);
    // Numbers count when the guest leaves with requests in flight.
    let mut b = Host::successor(&net, &id, 1, &a);
    b.listen(&net.path("b.sock"));
    offer(&mut a, &mut b);
    guest.fill(16);
    guest.stop();
    guest.migrate_to(&net.path("b.sock"));
    wait_for(&mut b, &mut a, "Attached");
    guest.drain();
    assert_eq!(guest.errors, 0);
    guest.check_image(&std::fs::read(net.path("a.img")).unwrap());
}

/// The claim names the list that the destination's rings were checked against. Numbers that began anew with every process
/// made it name whatever list the source's next process had parked.
#[test]
fn claim_of_a_dead_process_list_takes_nothing_of_the_next_ones() {
    let net = Net::new();
    let id = identity(1, SIZE);
    let spec = net.image("a.img", SIZE);
    let socket = net.path("a.sock");
    let mut a = Host::local(&net, &id, &spec, &socket);
    a.auto_grant = false;
    let mut guest = Guest::new(1, BLOCKS, 32);
    guest.plug_in(&socket);
    let mut b = Host::successor(&net, &id, 1, &a);
    b.listen(&net.path("b.sock"));
    offer(&mut a, &mut b);
    guest.run(20, 4);
    guest.stop();
    let left = guest.leave();
    guest.plug_in(&net.path("b.sock"));
    wait_for(&mut a, &mut b, "Claimed");
    a.kill();
    drop(left);
    // The VM at the source has gone on and stopped again: another list.
    let mut a = Host::local(&net, &id, &spec, &socket);
    let mut other = Guest::new(1, BLOCKS, 33);
    other.plug_in(&socket);
    a.handle.send(Command::Offer { to: "peer".into() });
    other.run(20, 4);
    other.stop();
    wait_for(&mut a, &mut b, "RingsStopped");
    b.peer(&a);
    wait_for(&mut b, &mut a, "HandoverFailed");
    assert!(!a.has_seen("Claimed"), "an old claim took a list that it was not checked against");
}
