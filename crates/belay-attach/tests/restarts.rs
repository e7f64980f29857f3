//! An agent that dies, and what its successor finds.

mod support;

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
