//! Rings: start, stop, requests, notifications, dirty log, in-flight region.
#![allow(unsafe_code, reason = "the device writes guest memory through raw pointers")]

mod common;

use std::os::fd::{AsFd, OwnedFd};

use belay_vhost_user::{Chain, Event, Marked};
use common::*;

/// Does what a device does with a read: fills the writable part.
fn fill(chain: &Chain, byte: u8) {
    for piece in &chain.writable {
        // SAFETY: the piece is mapped for as long as the chain lives.
        unsafe { piece.base.write_bytes(byte, piece.len) };
    }
}

fn serve_one(vmm: &mut Vmm, byte: u8) -> u16 {
    let ring = vmm.connection.ring(0).unwrap();
    let chain = ring.pop().unwrap().unwrap();
    fill(&chain, byte);
    let written = chain.writable_len() as u32;
    ring.log_written(&chain, written);
    ring.complete(chain.head, written);
    ring.publish();
    chain.head
}

#[test]
fn request_goes_through_and_stop_answers_with_the_next_index() {
    let (mut vmm, mut guest) = running(8, 0);
    guest.write(0x8000, b"header");
    guest.chain(3, &[(0x8000, 6, false), (0x9000, 512, true), (0x8100, 1, true)]);
    guest.offer(3);
    let ring = vmm.connection.ring(0).unwrap();
    let chain = ring.pop().unwrap().unwrap();
    assert_eq!((chain.head, chain.readable_len(), chain.writable_len()), (3, 6, 513));
    assert_eq!(chain.writable[1].guest_addr, 0x8100);
    assert!(ring.pop().unwrap().is_none());
    fill(&chain, 0xab);
    ring.complete(3, 513);
    assert_eq!(guest.used_idx(), 0, "nothing is seen before it is published");
    ring.publish();
    assert_eq!((guest.used_idx(), guest.used_entry(0)), (1, (3, 513)));
    assert_eq!(guest.read::<2>(0x91fe + 1), [0xab, 0]);
    assert_eq!(count(&vmm.call), 1);
    let base = vmm.ask(11, 0, &words(&[0, 0]), &[]).0;
    assert_eq!(base, words(&[0, 1]));
    assert!(vmm.connection.ring(0).is_none());
}

#[test]
fn stop_publishes_what_is_complete_drains_nothing_and_leaves_other_rings() {
    let (mut vmm, mut guest) = running(8, 0);
    let other = Guest::new(8);
    vmm.start(&other, 1, 0, false);
    for head in 0..3 {
        guest.chain(head, &[(0x9000 + 0x1000 * u64::from(head), 16, true)]);
        guest.offer(head);
    }
    let ring = vmm.connection.ring(0).unwrap();
    let chains: Vec<Chain> = (0..3).map(|_| ring.pop().unwrap().unwrap()).collect();
    ring.complete(1, 16);
    vmm.send(18, 0, &words(&[0, 0]), &[]);
    vmm.send(11, 0, &words(&[0, 0]), &[]);
    let events = vmm.events().unwrap();
    assert_eq!(events, [Event::RingDisabled { queue: 0 }, Event::RingStopped { queue: 0, base: 3 }]);
    assert_eq!(vmm.reply(11).unwrap().0, words(&[0, 3]));
    assert_eq!((guest.used_idx(), guest.used_entry(0).0), (1, 1));
    assert!(vmm.connection.ring(1).is_some());
    // The memory of what is in flight stays mapped, whatever happens to the connection.
    drop(vmm);
    fill(&chains[2], 7);
    assert_eq!(guest.read::<1>(0xb000), [7]);
}

#[test]
fn stopped_ring_starts_again_and_requests_in_flight_are_taken_back() {
    let (mut vmm, mut guest) = running(8, 0);
    for head in 0..2 {
        guest.chain(head, &[(0x9000, 16, true)]);
        guest.offer(head);
    }
    let ring = vmm.connection.ring(0).unwrap();
    ring.pop().unwrap().unwrap();
    ring.pop().unwrap().unwrap();
    vmm.tell(18, &words(&[0, 0]), &[]);
    vmm.ask(11, 0, &words(&[0, 0]), &[]);
    let events = vmm.start(&guest, 0, 2, false);
    let started = Event::RingStarted { queue: 0, base: 2, used: 0, marked: vec![], inflight_region: false };
    assert_eq!(events, [started]);
    let ring = vmm.connection.ring(0).unwrap();
    let chain = ring.chain_at(1).unwrap();
    assert_eq!(chain.writable[0].guest_addr, 0x9000);
    assert!(ring.pop().unwrap().is_none());
    ring.complete(1, 16);
    ring.publish();
    assert_eq!((guest.used_idx(), guest.used_entry(0)), (1, (1, 16)));
    assert!(ring.chain_at(8).is_err());
}

#[test]
fn ring_starts_with_kick_and_enable_in_any_order() {
    for order in [[12, 18], [18, 12]] {
        let (mut vmm, guest) = (Vmm::negotiated(PROTOCOL), Guest::new(8));
        vmm.set_memory(&guest);
        vmm.tell(18, &words(&[3, 1]), &[]);
        vmm.tell(8, &words(&[0, 8]), &[]);
        vmm.set_address(&guest, 0, false);
        let kick = eventfd();
        for (step, request) in order.into_iter().enumerate() {
            let events = match request {
                12 => vmm.tell(12, &longs(&[0]), &[kick.as_fd()]),
                _ => vmm.tell(18, &words(&[0, 1]), &[]),
            };
            assert_eq!(events.len(), step, "{order:?}");
        }
    }
}

#[test]
fn ring_without_protocol_features_starts_enabled() {
    let (mut vmm, guest) = (Vmm::new(), Guest::new(8));
    vmm.tell(2, &longs(&[VERSION_1]), &[]);
    vmm.set_memory(&guest);
    vmm.tell(8, &words(&[0, 8]), &[]);
    vmm.set_address(&guest, 0, false);
    let kick = eventfd();
    let events = vmm.tell(12, &longs(&[0]), &[kick.as_fd()]);
    assert!(matches!(events[..], [Event::RingStarted { .. }]));
}

#[test]
fn disabled_ring_pops_nothing_but_completes() {
    let (mut vmm, mut guest) = running(8, 0);
    for head in 0..2 {
        guest.chain(head, &[(0x9000, 16, true)]);
        guest.offer(head);
    }
    vmm.connection.ring(0).unwrap().pop().unwrap().unwrap();
    assert_eq!(vmm.tell(18, &words(&[0, 0]), &[]), [Event::RingDisabled { queue: 0 }]);
    let ring = vmm.connection.ring(0).unwrap();
    assert!(ring.pop().unwrap().is_none());
    ring.complete(0, 16);
    ring.publish();
    assert_eq!(guest.used_idx(), 1);
    assert_eq!(vmm.tell(18, &words(&[0, 1]), &[]), [Event::RingEnabled { queue: 0 }]);
    assert!(vmm.connection.ring(0).unwrap().pop().unwrap().is_some());
}

#[test]
fn kick_replaced_while_running_is_told() {
    let (mut vmm, _guest) = running(8, 0);
    let kick = eventfd();
    assert_eq!(vmm.tell(12, &longs(&[0]), &[kick.as_fd()]), [Event::KickChanged { queue: 0 }]);
    rustix::io::write(&kick, &3u64.to_ne_bytes()).unwrap();
    let ring = vmm.connection.ring(0).unwrap();
    assert!(ring.kick_fd().is_some());
    ring.clear_kick();
    ring.clear_kick();
    assert_eq!(count(&kick), 0);
}

#[test]
fn call_replaced_while_running_is_signalled() {
    let (mut vmm, _guest) = running(8, 0);
    let call = eventfd();
    vmm.tell(13, &longs(&[0]), &[call.as_fd()]);
    assert_eq!(count(&call), 1);
}

#[test]
fn interrupts_follow_the_guests_flag_without_event_index() {
    let (mut vmm, mut guest) = running(8, 0);
    for (flag, interrupts) in [(1u16, 0), (0, 1)] {
        guest.write(guest.available, &flag.to_le_bytes());
        guest.chain(0, &[(0x9000, 16, true)]);
        guest.offer(0);
        serve_one(&mut vmm, 1);
        assert_eq!(count(&vmm.call), interrupts);
    }
    let ring = vmm.connection.ring(0).unwrap();
    ring.disable_notifications();
    assert_eq!(guest.read::<2>(guest.used), [1, 0]);
    assert!(!ring.enable_notifications());
    assert_eq!(guest.read::<2>(guest.used), [0, 0]);
}

#[test]
fn interrupts_and_kicks_follow_the_event_index() {
    let (mut vmm, mut guest) = running(8, EVENT_IDX);
    let used_event = guest.available + 4 + 16;
    let avail_event = guest.used + 4 + 64;
    let mut interrupts = Vec::new();
    for (request, event) in [5u16, 5, 2, 5, 5, 5].into_iter().enumerate() {
        guest.write(used_event, &event.to_le_bytes());
        guest.chain(0, &[(0x9000, 16, true)]);
        guest.offer(0);
        serve_one(&mut vmm, request as u8);
        interrupts.push(count(&vmm.call));
    }
    assert_eq!(interrupts, [1, 0, 1, 0, 0, 1], "the first in any case, then those that pass the index");
    let ring = vmm.connection.ring(0).unwrap();
    assert!(!ring.enable_notifications());
    assert_eq!(guest.read::<2>(avail_event), [6, 0]);
    guest.offer(0);
    assert!(vmm.connection.ring(0).unwrap().enable_notifications(), "something came meanwhile");
}

#[test]
fn indices_wrap_around() {
    let mut guest = Guest::new(4);
    let mut vmm = Vmm::negotiated(PROTOCOL);
    vmm.set_memory(&guest);
    guest.avail_idx = 0xfffe;
    guest.set_avail_idx(0xfffe);
    guest.write(guest.used + 2, &0xfffeu16.to_le_bytes());
    let events = vmm.start(&guest, 0, 0xfffe, false);
    assert!(matches!(events[..], [Event::RingStarted { base: 0xfffe, used: 0xfffe, .. }]));
    for head in [0, 3, 1, 2, 0] {
        guest.chain(head, &[(0x9000, 16, true)]);
        guest.offer(head);
        assert_eq!(serve_one(&mut vmm, 1), head);
    }
    assert_eq!(guest.used_idx(), 3);
    assert_eq!(vmm.ask(11, 0, &words(&[0, 0]), &[]).0, words(&[0, 3]));
}

fn set_log(vmm: &mut Vmm, len: u64) -> OwnedFd {
    let log = memfd(len);
    let reply = vmm.ask(6, 0, &longs(&[len, 0]), &[log.as_fd()]).0;
    assert_eq!(reply, longs(&[len, 0]));
    log
}

#[test]
fn dirty_log_has_exactly_the_pages_written() {
    let (mut vmm, mut guest) = running(8, 0);
    let log = set_log(&mut vmm, 64);
    guest.chain(0, &[(0x2_0000, 0x1000, false), (0x3_0800, 0x1000, true), (0x4_0000, 0x3000, true)]);
    guest.offer(0);
    serve_one(&mut vmm, 1);
    assert_eq!(dirty(&log, 64), [], "nothing is logged before LOG_ALL");
    vmm.tell(2, &longs(&[PROTOCOL | VERSION_1 | LOG_ALL]), &[]);
    guest.offer(0);
    serve_one(&mut vmm, 2);
    assert_eq!(dirty(&log, 64), [0x30, 0x31, 0x40, 0x41, 0x42], "the used ring is not asked for");
    vmm.set_address(&guest, 0, true);
    guest.offer(0);
    let ring = vmm.connection.ring(0).unwrap();
    let chain = ring.pop().unwrap().unwrap();
    ring.log_written(&chain, 0x801);
    ring.complete(chain.head, 0x801);
    ring.publish();
    assert_eq!(dirty(&log, 64), [0x5, 0x30, 0x31, 0x40, 0x41, 0x42]);
}

#[test]
fn dirty_log_counts_only_what_was_written() {
    let (mut vmm, mut guest) = running(8, LOG_ALL);
    let log = set_log(&mut vmm, 64);
    guest.chain(0, &[(0x3_0000, 0x2000, true), (0x4_0000, 0x1000, true)]);
    guest.offer(0);
    let ring = vmm.connection.ring(0).unwrap();
    let chain = ring.pop().unwrap().unwrap();
    ring.log_written(&chain, 0);
    assert_eq!(dirty(&log, 64), []);
    ring.log_written(&chain, 0x1000);
    assert_eq!(dirty(&log, 64), [0x30]);
    ring.log_written(&chain, 0x2001);
    assert_eq!(dirty(&log, 64), [0x30, 0x31, 0x40]);
    vmm.connection.ring(0).unwrap().log_range(0x5_0fff, 2);
    assert_eq!(dirty(&log, 64), [0x30, 0x31, 0x40, 0x50, 0x51]);
}

#[test]
fn used_entry_is_logged_when_complete_and_used_index_when_published() {
    // The entries begin on the page behind the one with the index.
    let mut guest = Guest { used: 0x6ffc, ..Guest::new(8) };
    let mut vmm = Vmm::negotiated(PROTOCOL | LOG_ALL);
    vmm.set_memory(&guest);
    let log = set_log(&mut vmm, 64);
    vmm.start(&guest, 0, 0, true);
    guest.chain(0, &[(0x9000, 16, false)]);
    guest.offer(0);
    let ring = vmm.connection.ring(0).unwrap();
    ring.pop().unwrap().unwrap();
    ring.complete(0, 0);
    assert_eq!(dirty(&log, 64), [7]);
    ring.publish();
    assert_eq!(dirty(&log, 64), [6, 7]);
}

#[test]
fn replaced_log_gets_what_comes_after_and_cleared_feature_ends_logging() {
    let (mut vmm, mut guest) = running(8, LOG_ALL);
    let old = set_log(&mut vmm, 64);
    guest.chain(0, &[(0x3_0000, 0x1000, true)]);
    guest.chain(1, &[(0x4_0000, 0x1000, true)]);
    guest.offer(0);
    guest.offer(1);
    serve_one(&mut vmm, 1);
    let new = set_log(&mut vmm, 128);
    serve_one(&mut vmm, 2);
    assert_eq!((dirty(&old, 64), dirty(&new, 128)), (vec![0x30], vec![0x40]));
    vmm.tell(2, &longs(&[PROTOCOL | VERSION_1]), &[]);
    assert!(!vmm.connection.ring(0).unwrap().is_logging());
    guest.offer(0);
    serve_one(&mut vmm, 3);
    assert_eq!((dirty(&old, 64), dirty(&new, 128)), (vec![0x30], vec![0x40]));
    // What is set again starts with a log of its own.
    vmm.tell(2, &longs(&[PROTOCOL | VERSION_1 | LOG_ALL]), &[]);
    assert!(!vmm.connection.ring(0).unwrap().is_logging());
}

#[test]
fn log_that_is_too_short_or_missing_refused() {
    let mut vmm = Vmm::negotiated(PROTOCOL);
    let log = memfd(64);
    assert_eq!(long(&vmm.ask(6, NEED_REPLY, &longs(&[65, 0]), &[log.as_fd()]).0), 1);
    assert_eq!(long(&vmm.ask(6, NEED_REPLY, &longs(&[64, 0]), &[]).0), 1);
}

#[test]
fn memory_table_changed_while_logging_keeps_chains_rings_and_log() {
    let (mut vmm, mut guest) = running(8, LOG_ALL);
    vmm.set_address(&guest, 0, true);
    let log = set_log(&mut vmm, 128);
    guest.chain(0, &[(0x3_0000, 0x1000, true)]);
    guest.offer(0);
    let chain = vmm.connection.ring(0).unwrap().pop().unwrap().unwrap();
    // A DIMM is plugged, then the first region is replaced in two steps by two halves of it.
    let more = memfd(MEMORY);
    let region =
        |addr: u64, size: u64, user: u64, offset: u64| [longs(&[0, addr, size, user, offset])].concat();
    vmm.tell(37, &region(MEMORY, MEMORY, USER - MEMORY, 0), &[more.as_fd()]);
    vmm.tell(38, &region(0, MEMORY, USER, 0), &[]);
    let half = MEMORY / 2;
    vmm.tell(37, &region(half, half, USER + half, half), &[guest.memory.as_fd()]);
    let ring = vmm.connection.ring(0).unwrap();
    fill(&chain, 5);
    ring.log_written(&chain, 0x1000);
    ring.complete(chain.head, 0x1000);
    ring.publish();
    assert_eq!((guest.used_idx(), guest.read::<1>(0x3_0fff)), (1, [5]));
    vmm.tell(37, &region(0, half, USER, 0), &[guest.memory.as_fd()]);
    // A buffer across all three regions, one of which is another file.
    let (first, second) = (half - 0x800, 0x1000u64);
    guest.chain(1, &[(first, second as u32, true), (MEMORY - 0x10, 0x20, true)]);
    guest.offer(1);
    let ring = vmm.connection.ring(0).unwrap();
    let chain = ring.pop().unwrap().unwrap();
    let pieces: Vec<_> = chain.writable.iter().map(|p| (p.guest_addr, p.len)).collect();
    assert_eq!(pieces, [(first, 0x800), (half, 0x800), (MEMORY - 0x10, 0x10), (MEMORY, 0x10)]);
    fill(&chain, 6);
    ring.log_written(&chain, 0x1020);
    assert_eq!(guest.read::<1>(half), [6]);
    assert_eq!(dirty(&log, 128), [0x5, 0x30, half / 4096 - 1, half / 4096, MEMORY / 4096 - 1, MEMORY / 4096]);
}

fn inflight_payload(len: u64, queues: u16, entries: u16) -> Vec<u8> {
    [longs(&[len, 0]), queues.to_ne_bytes().to_vec(), entries.to_ne_bytes().to_vec(), vec![0; 4]].concat()
}

fn get_region(vmm: &mut Vmm) -> (Vec<u8>, OwnedFd) {
    let (payload, fd) = vmm.ask(31, 0, &inflight_payload(0, 1, 8), &[]);
    assert_eq!(payload.len(), 24, "QEMU wants its padding back");
    let fd = fd.unwrap();
    vmm.tell(32, &payload, &[fd.as_fd()]);
    (payload, fd)
}

#[test]
fn inflight_region_brings_requests_back_after_a_crash() {
    let mut guest = Guest::new(8);
    let mut vmm = Vmm::negotiated(PROTOCOL | LOG_ALL);
    vmm.set_memory(&guest);
    let (payload, region) = get_region(&mut vmm);
    let events = vmm.start(&guest, 0, 0, false);
    let started = Event::RingStarted { queue: 0, base: 0, used: 0, marked: vec![], inflight_region: true };
    assert_eq!(events, [started]);
    for head in [6, 0, 3] {
        guest.chain(head, &[(0x9000, 16, true)]);
        guest.offer(head);
        let ring = vmm.connection.ring(0).unwrap();
        let chain = ring.pop().unwrap().unwrap();
        ring.mark(chain.head, 1000 + u64::from(chain.head));
    }
    let ring = vmm.connection.ring(0).unwrap();
    ring.complete(0, 16);
    ring.publish();
    // The agent dies without a word; a new one is connected to, and gets the region back.
    drop(vmm);
    let mut vmm = Vmm::negotiated(PROTOCOL);
    vmm.set_memory(&guest);
    vmm.tell(32, &payload, &[region.as_fd()]);
    let marked = vec![Marked { head: 6, tag: 1006 }, Marked { head: 3, tag: 1003 }];
    let events = vmm.start(&guest, 0, 1, false);
    assert_eq!(events, [Event::RingStarted { queue: 0, base: 1, used: 1, marked, inflight_region: true }]);
    let ring = vmm.connection.ring(0).unwrap();
    ring.start_at(3);
    for head in [3, 6] {
        let chain = ring.chain_at(head).unwrap();
        ring.complete(chain.head, 16);
    }
    ring.publish();
    assert!(ring.pop().unwrap().is_none());
    assert_eq!((guest.used_idx(), guest.used_entry(1).0, guest.used_entry(2).0), (3, 3, 6));
}

#[test]
fn region_survives_a_stop_and_is_dropped_at_a_reset() {
    let mut guest = Guest::new(8);
    let mut vmm = Vmm::negotiated(PROTOCOL);
    vmm.set_memory(&guest);
    get_region(&mut vmm);
    vmm.start(&guest, 0, 0, false);
    guest.chain(2, &[(0x9000, 16, true)]);
    guest.offer(2);
    let ring = vmm.connection.ring(0).unwrap();
    ring.pop().unwrap().unwrap();
    ring.mark(2, 5);
    vmm.ask(11, 0, &words(&[0, 0]), &[]);
    let events = vmm.start(&guest, 0, 1, false);
    assert!(
        matches!(&events[..], [Event::RingStarted { marked, .. }] if *marked == [Marked { head: 2, tag: 5 }])
    );
    vmm.connection.ring(0).unwrap().unmark(2);
    vmm.tell(34, &[], &[]);
    let events = vmm.start(&guest, 0, 1, false);
    assert!(
        matches!(&events[..], [Event::RingStarted { marked, inflight_region: false, .. }] if marked.is_empty())
    );
}

#[test]
fn reset_stops_rings_and_is_answered_when_quiesced() {
    let (mut vmm, _guest) = running(8, 0);
    vmm.send(34, NEED_REPLY, &[], &[]);
    vmm.send(1, 0, &[], &[]);
    assert_eq!(vmm.connection.next_event().unwrap(), Some(Event::RingStopped { queue: 0, base: 0 }));
    assert_eq!(vmm.connection.next_event().unwrap(), Some(Event::Quiesce { reset: true }));
    assert_eq!(vmm.connection.next_event().unwrap(), None);
    assert!(vmm.reply(34).is_none(), "neither the reset nor what follows is answered yet");
    vmm.connection.quiesced().unwrap();
    assert_eq!(vmm.connection.next_event().unwrap(), None);
    let mut both = [0; 64];
    let len = std::io::Read::read(&mut &vmm.socket, &mut both).unwrap();
    assert_eq!(
        both[..len],
        [words(&[34, 5, 8]), longs(&[0]), words(&[1, 5, 8]), both[32..40].to_vec()].concat()
    );
}

#[test]
fn stop_whose_reply_is_lost_is_told_before_the_end() {
    let (mut vmm, _guest) = running(8, 0);
    vmm.send(11, 0, &words(&[0, 0]), &[]);
    vmm.socket.shutdown(std::net::Shutdown::Read).unwrap();
    assert_eq!(vmm.connection.next_event().unwrap(), Some(Event::RingStopped { queue: 0, base: 0 }));
    assert!(vmm.connection.next_event().is_err());
    assert!(vmm.connection.next_event().is_err());
}

#[test]
fn impossible_region_is_answered_with_none() {
    let mut vmm = Vmm::negotiated(PROTOCOL);
    let (payload, fd) = vmm.ask(31, 0, &inflight_payload(0, 0, 8), &[]);
    assert_eq!((long(&payload), fd.is_none()), (0, true));
    let short = memfd(64);
    assert_eq!(long(&vmm.ask(32, NEED_REPLY, &inflight_payload(4096, 1, 8), &[short.as_fd()]).0), 1);
    assert_eq!(long(&vmm.ask(32, NEED_REPLY, &inflight_payload(64, 1, 8), &[short.as_fd()]).0), 1);
}

/// QEMU's TCG lets a guest with one processor see the used index before its own wish for an interrupt is seen.
#[test]
fn guest_whose_wish_for_an_interrupt_came_late_is_reminded() {
    let (mut vmm, mut guest) = running(8, 1 << 29);
    let used_event = 4 + 2 * u64::from(guest.size);
    for head in 0..3 {
        guest.chain(head, &[(0x9000, 16, true)]);
        guest.offer(head);
    }
    serve_one(&mut vmm, 1);
    assert_eq!(count(&vmm.call), 1, "the first since the start");
    // The guest has taken that one and asks for the next, but its word is not to be seen yet.
    serve_one(&mut vmm, 1);
    assert_eq!(count(&vmm.call), 0);
    guest.write(guest.available + used_event, &1u16.to_le_bytes());
    vmm.connection.ring(0).unwrap().remind();
    assert_eq!(count(&vmm.call), 1);
    // Once is enough; and a guest that polls is left alone.
    vmm.connection.ring(0).unwrap().remind();
    serve_one(&mut vmm, 1);
    vmm.connection.ring(0).unwrap().remind();
    assert_eq!(count(&vmm.call), 0);
}

#[test]
fn log_is_found_at_its_offset_and_what_a_gone_region_held_is_logged_there() {
    let (mut vmm, mut guest) = running(8, LOG_ALL);
    let log = memfd(0x3000);
    assert_eq!(vmm.ask(6, 0, &longs(&[64, 0x1000]), &[log.as_fd()]).0, longs(&[64, 0x1000]));
    // A second region, written to after it was removed: the request was popped before.
    let more = memfd(0x1_0000);
    let region = [longs(&[0]), longs(&[MEMORY, 0x1_0000, USER + MEMORY, 0])].concat();
    vmm.tell(37, &region, &[more.as_fd()]);
    guest.chain(0, &[(MEMORY + 0x2000, 0x1000, true)]);
    guest.offer(0);
    let chain = vmm.connection.ring(0).unwrap().pop().unwrap().unwrap();
    vmm.tell(38, &region, &[]);
    fill(&chain, 5);
    let ring = vmm.connection.ring(0).unwrap();
    ring.log_written(&chain, 0x1000);
    ring.complete(0, 0x1000);
    ring.publish();
    let mut bytes = [0; 64];
    rustix::io::pread(&log, &mut bytes, 0x1000).unwrap();
    let page = (MEMORY + 0x2000) / 4096;
    let mut want = [0; 64];
    want[(page / 8) as usize] = 1 << (page % 8);
    assert_eq!(bytes, want);
    let mut rest = [0; 0x1000];
    rustix::io::pread(&log, &mut rest, 0).unwrap();
    assert_eq!(rest, [0; 0x1000], "nothing before the offset is touched");
}

#[test]
fn every_one_of_64_queues_is_served() {
    use belay_vhost_user::{Connection, Offer};
    let mut vmm = Vmm::new();
    let (socket, other) = std::os::unix::net::UnixStream::pair().unwrap();
    socket.set_nonblocking(true).unwrap();
    vmm.connection = Connection::new(other, Offer { queues: 64, ..offer() }).unwrap();
    vmm.socket = socket;
    vmm.tell(16, &ALL_PROTOCOL.to_ne_bytes(), &[]);
    vmm.tell(2, &longs(&[PROTOCOL | VERSION_1]), &[]);
    assert_eq!(long(&vmm.ask(17, 0, &[], &[]).0), 64);
    let mut guest = Guest::new(8);
    let mut rings = Vec::new();
    vmm.set_memory(&guest);
    for queue in 0..64u64 {
        // All in one memory, each at a place of its own.
        let at = 0x8000 + queue * 0x1000;
        let ring = Guest {
            memory: guest.memory,
            descriptors: at,
            available: at + 0x400,
            used: at + 0x800,
            ..Guest::new(8)
        };
        assert!(matches!(vmm.start(&ring, queue as u32, 0, false)[..], [Event::RingStarted { .. }]));
        guest = Guest { memory: ring.memory, ..Guest::new(8) };
        rings.push((at, at + 0x400, at + 0x800));
    }
    for (queue, (descriptors, available, used)) in rings.into_iter().enumerate() {
        let mut ring = Guest { memory: guest.memory, descriptors, available, used, ..Guest::new(8) };
        ring.chain(2, &[(0x7000, 16, true)]);
        ring.offer(2);
        let served = vmm.connection.ring(queue as u16).unwrap();
        assert_eq!(served.pop().unwrap().unwrap().head, 2);
        served.complete(2, 16);
        served.publish();
        assert_eq!((ring.used_idx(), ring.used_entry(0)), (1, (2, 16)));
        guest = Guest { memory: ring.memory, ..Guest::new(8) };
    }
    assert!(vmm.connection.ring(64).is_none());
    // What the messages can name beyond that is refused.
    assert_eq!(long(&vmm.ask(8, NEED_REPLY, &words(&[64, 8]), &[]).0), 1);
    assert_eq!(long(&vmm.ask(13, NEED_REPLY, &longs(&[0xff | 0x100]), &[]).0), 1);
}

/// QEMU, whose back-end went away while its rings were stopped: it has not noticed that the connection is a new one.
fn start_without_greeting(vmm: &mut Vmm, guest: &Guest, memory: bool) -> Vec<Event> {
    let mut events = vmm.tell(2, &longs(&[PROTOCOL | VERSION_1]), &[]);
    if memory {
        let table = [words(&[1, 0]), longs(&[0, MEMORY, USER, 0])].concat();
        // It waits for the reply, as it may since it negotiated that.
        assert_eq!(long(&vmm.ask(5, NEED_REPLY, &table, &[guest.memory.as_fd()]).0), 0);
    }
    for queue in 0..3 {
        events.extend(vmm.tell(18, &words(&[queue, 1]), &[]));
    }
    let (kick, call) = (vmm.kick.try_clone().unwrap(), vmm.call.try_clone().unwrap());
    events.extend(vmm.tell(8, &words(&[0, guest.size.into()]), &[]));
    events.extend(vmm.tell(10, &words(&[0, 0]), &[]));
    events.extend(vmm.set_address(guest, 0, false));
    events.extend(vmm.tell(13, &longs(&[0]), &[call.as_fd()]));
    events.extend(vmm.tell(12, &longs(&[0]), &[kick.as_fd()]));
    events
}

#[test]
fn rings_that_are_started_on_a_new_connection_that_the_vmm_has_not_noticed_run() {
    let (mut vmm, mut guest) = (Vmm::new(), Guest::new(8));
    let events = start_without_greeting(&mut vmm, &guest, true);
    assert!(matches!(events[..], [Event::RingStarted { queue: 0, .. }]), "{events:?}");
    guest.chain(0, &[(0x9000, 16, true)]);
    guest.offer(0);
    assert_eq!(serve_one(&mut vmm, 7), 0);
}

#[test]
fn rings_that_are_started_without_greeting_and_memory_end_the_connection() {
    let (mut vmm, guest) = (Vmm::new(), Guest::new(8));
    let events = start_without_greeting(&mut vmm, &guest, false);
    assert!(events.is_empty(), "{events:?}");
    vmm.send(18, 0, &words(&[3, 1]), &[]);
    assert!(vmm.events().is_err());
    assert!(vmm.connection.next_event().is_err());
}
