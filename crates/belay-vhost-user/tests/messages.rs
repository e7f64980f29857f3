//! The protocol, message by message, in raw bytes.

mod common;

use std::os::fd::AsFd;

use belay_vhost_user::{Connection, ConnectionError, Event, Offer};
use common::*;
use proptest::prelude::*;

#[test]
fn features_and_limits_are_answered_as_offered() {
    let mut vmm = Vmm::new();
    let features = long(&vmm.ask(1, 0, &[], &[]).0);
    assert_eq!(features, 1 << 9 | LOG_ALL | INDIRECT | EVENT_IDX | PROTOCOL | VERSION_1);
    assert_eq!(long(&vmm.ask(15, 0, &[], &[]).0), OFFERED_PROTOCOL);
    assert_eq!(long(&vmm.ask(17, 0, &[], &[]).0), 4);
    assert_eq!(long(&vmm.ask(36, 0, &[], &[]).0), 509);
}

#[test]
fn impossible_offers_refused() {
    let connect = |offer: Offer| Connection::new(std::os::unix::net::UnixStream::pair().unwrap().0, offer);
    assert!(connect(offer()).is_ok());
    assert!(connect(Offer { queues: 0, ..offer() }).is_err());
    assert!(connect(Offer { queues: 65, ..offer() }).is_err());
    assert!(connect(Offer { queue_entries: 100, ..offer() }).is_err());
    assert!(connect(Offer { config: vec![0; 257], ..offer() }).is_err());
    assert!(connect(Offer { device_features: 1 << 34, ..offer() }).is_err());
}

#[test]
fn memory_slots_are_offered_where_they_are_wanted() {
    for (memory_slots, expected) in [(false, OFFERED_PROTOCOL), (true, ALL_PROTOCOL)] {
        let mut vmm = Vmm::new();
        let (socket, other) = std::os::unix::net::UnixStream::pair().unwrap();
        socket.set_nonblocking(true).unwrap();
        vmm.connection = Connection::new(other, Offer { memory_slots, ..offer() }).unwrap();
        vmm.socket = socket;
        assert_eq!(long(&vmm.ask(15, 0, &[], &[]).0), expected);
    }
}

#[test]
fn reply_is_sent_only_if_asked_and_negotiated() {
    let mut vmm = Vmm::new();
    vmm.send(3, NEED_REPLY, &[], &[]);
    vmm.events().unwrap();
    assert!(vmm.reply(3).is_none());
    vmm.tell(16, &ALL_PROTOCOL.to_ne_bytes(), &[]);
    assert!(vmm.reply(16).is_none());
    assert_eq!(long(&vmm.ask(3, NEED_REPLY, &[], &[]).0), 0);
    vmm.tell(3, &[], &[]);
    assert!(vmm.reply(3).is_none());
}

#[test]
fn unknown_request_fails_or_ends_the_connection() {
    let mut vmm = Vmm::negotiated(PROTOCOL);
    assert_eq!(long(&vmm.ask(99, NEED_REPLY, &[1, 2, 3], &[]).0), 1);
    vmm.send(99, 0, &[], &[]);
    let error = vmm.events().unwrap_err();
    assert!(matches!(error, ConnectionError::Unknown { request: 99 }) && error.to_string().contains("99"));
    assert!(vmm.connection.next_event().is_err());
}

#[test]
fn features_not_offered_refused() {
    let mut vmm = Vmm::negotiated(PROTOCOL);
    assert_eq!(long(&vmm.ask(2, NEED_REPLY, &longs(&[1 << 34]), &[]).0), 1);
    assert_eq!(long(&vmm.ask(16, NEED_REPLY, &longs(&[ALL_PROTOCOL | 1 << 14]), &[]).0), 1);
}

#[test]
fn message_that_comes_byte_by_byte_is_taken_whole_with_its_descriptor() {
    let (mut vmm, guest) = (Vmm::negotiated(PROTOCOL), Guest::new(8));
    let payload = [longs(&[0]), longs(&[0, MEMORY, USER, 0])].concat();
    let bytes = [words(&[37, 1 | NEED_REPLY, payload.len() as u32]), payload].concat();
    for (index, byte) in bytes.iter().enumerate() {
        assert!(vmm.reply(37).is_none());
        let fds = [guest.memory.as_fd()];
        vmm.send_bytes(&[*byte], if index == 0 { &fds } else { &[] });
        vmm.events().unwrap();
    }
    assert_eq!(long(&vmm.reply(37).unwrap().0), 0);
}

#[test]
fn messages_sent_together_keep_their_own_descriptors() {
    let (mut vmm, guest) = (Vmm::negotiated(PROTOCOL), Guest::new(8));
    let other = memfd(MEMORY);
    for (guest_addr, fd) in [(0, &guest.memory), (MEMORY, &other)] {
        let payload = [longs(&[0]), longs(&[guest_addr, MEMORY, USER + guest_addr, 0])].concat();
        vmm.send(37, NEED_REPLY, &payload, &[fd.as_fd()]);
    }
    vmm.send(1, 0, &[], &[]);
    vmm.events().unwrap();
    let events = vmm.start(&guest, 0, 0, false);
    assert!(matches!(events[..], [Event::RingStarted { .. }]));
}

#[test]
fn broken_headers_end_the_connection() {
    for header in [[1, 0, 0], [1, 2, 0], [1, 5, 0], [1, 1, 1 << 20]] {
        let mut vmm = Vmm::new();
        vmm.send_bytes(&words(&header), &[]);
        assert!(matches!(vmm.events(), Err(ConnectionError::Malformed(_))), "{header:?}");
    }
}

#[test]
fn close_between_and_within_messages_told_apart() {
    let mut vmm = Vmm::new();
    vmm.send_bytes(&[1, 0, 0], &[]);
    assert!(vmm.events().unwrap().is_empty());
    vmm.socket.shutdown(std::net::Shutdown::Both).unwrap();
    assert!(matches!(vmm.events(), Err(ConnectionError::Truncated { have: 3, need: 12 })));
    let mut vmm = Vmm::new();
    vmm.socket.shutdown(std::net::Shutdown::Both).unwrap();
    assert!(matches!(vmm.events(), Err(ConnectionError::Closed)));
}

#[test]
fn too_many_descriptors_end_the_connection() {
    for (many, request) in [(9, 3), (40, 5)] {
        let mut vmm = Vmm::new();
        let fd = eventfd();
        vmm.send(request, 0, &[], &vec![fd.as_fd(); many]);
        assert!(matches!(vmm.events(), Err(ConnectionError::Malformed(_))));
    }
}

#[test]
fn every_request_with_a_short_payload_or_stray_descriptor_is_survived() {
    for request in (1..=45).filter(|request| *request != 34) {
        for (payload, fds) in [(0, 0), (3, 0), (3, 2), (200, 1)] {
            let mut vmm = Vmm::negotiated(PROTOCOL);
            let fd = eventfd();
            vmm.send(request, NEED_REPLY, &vec![0xff; payload], &vec![fd.as_fd(); fds]);
            let _ = vmm.events();
        }
    }
}

#[test]
fn kick_without_descriptor_starts_a_ring_that_is_polled() {
    let (mut vmm, mut guest) = (Vmm::negotiated(PROTOCOL), Guest::new(8));
    vmm.set_memory(&guest);
    vmm.tell(8, &words(&[0, 8]), &[]);
    vmm.set_address(&guest, 0, false);
    vmm.tell(18, &words(&[0, 1]), &[]);
    vmm.send(12, NEED_REPLY, &longs(&[0x100]), &[]);
    assert!(matches!(vmm.events().unwrap()[..], [Event::RingStarted { queue: 0, .. }]));
    assert_eq!(long(&vmm.reply(12).unwrap().0), 0);
    let ring = vmm.connection.ring(0).unwrap();
    assert!(ring.is_polled() && ring.kick_fd().is_none());
    guest.chain(0, &[(0x9000, 1, true)]);
    guest.offer(0);
    assert!(vmm.connection.ring(0).unwrap().pop().unwrap().is_some());
    // A descriptor that comes later is used from then on, and the other way round.
    let kick = eventfd();
    assert_eq!(vmm.tell(12, &longs(&[0]), &[kick.as_fd()]), [Event::KickChanged { queue: 0 }]);
    assert!(!vmm.connection.ring(0).unwrap().is_polled());
    assert_eq!(vmm.tell(12, &longs(&[0x100]), &[]), [Event::KickChanged { queue: 0 }]);
    assert!(vmm.connection.ring(0).unwrap().is_polled());
    // The stop forgets it: the next start needs a new one.
    vmm.ask(11, 0, &words(&[0, 0]), &[]);
    vmm.tell(18, &words(&[0, 1]), &[]);
    assert!(vmm.connection.ring(0).is_none());
}

#[test]
fn eventfd_that_is_announced_and_missing_is_refused() {
    let mut vmm = Vmm::negotiated(PROTOCOL);
    for request in [12, 13, 14] {
        assert_eq!(long(&vmm.ask(request, NEED_REPLY, &longs(&[0]), &[]).0), 1, "{request}");
        assert_eq!(long(&vmm.ask(request, NEED_REPLY, &longs(&[0x100]), &[]).0), 0, "{request}");
    }
}

#[test]
fn in_flight_region_for_more_than_was_offered_is_not_made() {
    let mut vmm = Vmm::negotiated(PROTOCOL);
    let mut get = |queues: u16, entries: u16| {
        let shape = [queues.to_ne_bytes(), entries.to_ne_bytes()].concat();
        let (payload, fd) = vmm.ask(31, 0, &[longs(&[0, 0]), shape].concat(), &[]);
        (long(&payload) > 0, fd.is_some())
    };
    assert_eq!(get(4, 256), (true, true));
    for (queues, entries) in [(5, 256), (4, 257), (4, 0), (0, 8), (u16::MAX, u16::MAX)] {
        assert_eq!(get(queues, entries), (false, false), "{queues} queues of {entries}");
    }
}

#[test]
fn call_without_descriptor_is_a_guest_that_polls() {
    let (mut vmm, _guest) = running(8, 0);
    assert_eq!(long(&vmm.ask(13, NEED_REPLY, &longs(&[0x100]), &[]).0), 0);
    vmm.connection.ring(0).unwrap().signal();
    assert_eq!(count(&vmm.call), 0);
}

#[test]
fn queue_beyond_the_offer_refused_by_every_vring_request() {
    let mut vmm = Vmm::negotiated(PROTOCOL);
    for request in [8, 10, 18] {
        assert_eq!(long(&vmm.ask(request, NEED_REPLY, &words(&[4, 1]), &[]).0), 1);
    }
    let fd = eventfd();
    for request in [12, 13, 14] {
        assert_eq!(long(&vmm.ask(request, NEED_REPLY, &longs(&[4]), &[fd.as_fd()]).0), 1);
    }
}

#[test]
fn impossible_ring_sizes_refused() {
    let mut vmm = Vmm::negotiated(PROTOCOL);
    for (entries, refused) in [(0, 1), (3, 1), (512, 1), (1 << 16, 1), (256, 0), (1, 0)] {
        assert_eq!(long(&vmm.ask(8, NEED_REPLY, &words(&[0, entries]), &[]).0), refused, "{entries}");
    }
}

#[test]
fn config_read_by_offset_and_size_with_zeroes_behind_its_end() {
    let mut vmm = Vmm::negotiated(PROTOCOL);
    let mut get = |offset: u32, size: u32| {
        let request = [words(&[offset, size, 0]), vec![0; size.min(256) as usize]].concat();
        vmm.ask(24, 0, &request, &[]).0
    };
    assert_eq!(get(8, 4), [words(&[8, 4, 0]), vec![8, 9, 10, 11]].concat());
    assert_eq!(get(58, 4), [words(&[58, 4, 0]), vec![58, 59, 0, 0]].concat());
    assert_eq!(get(0, 256).len(), 12 + 256);
    assert_eq!(get(1, 256), words(&[1, 0, 0]));
    assert_eq!(get(u32::MAX, u32::MAX), words(&[u32::MAX, 0, 0]));
}

#[test]
fn config_change_told_over_the_back_end_channel() {
    use std::io::Read;
    let mut vmm = Vmm::negotiated(PROTOCOL);
    vmm.connection.set_config(vec![7; 60]).unwrap();
    let (mut ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    assert_eq!(long(&vmm.ask(21, NEED_REPLY, &[], &[theirs.as_fd()]).0), 0);
    vmm.connection.set_config(vec![9; 60]).unwrap();
    let mut message = [0; 12];
    ours.read_exact(&mut message).unwrap();
    assert_eq!(message.to_vec(), words(&[2, 1, 0]));
    assert_eq!(vmm.ask(24, 0, &words(&[0, 1, 0]), &[]).0[12..], [9]);
    assert!(vmm.connection.set_config(vec![0; 257]).is_err());
}

#[test]
fn guest_writing_config_is_refused_without_ending_the_connection() {
    let mut vmm = Vmm::negotiated(PROTOCOL);
    let payload = [words(&[0, 1, 0]), vec![1]].concat();
    assert_eq!(long(&vmm.ask(25, NEED_REPLY, &payload, &[]).0), 1);
    vmm.tell(25, &payload, &[]);
    assert_eq!(vmm.ask(24, 0, &words(&[0, 1, 0]), &[]).0[12..], [0]);
}

#[test]
fn memory_that_is_not_there_refused() {
    let (mut vmm, guest) = (Vmm::negotiated(PROTOCOL), Guest::new(8));
    let region = |size, offset| [longs(&[0]), longs(&[0, size, USER, offset])].concat();
    let mut add =
        |size, offset| long(&vmm.ask(37, NEED_REPLY, &region(size, offset), &[guest.memory.as_fd()]).0);
    assert_eq!(add(MEMORY + 1, 0), 1);
    assert_eq!(add(MEMORY, 0x1000), 1);
    assert_eq!(add(0, 0), 1);
    assert_eq!(add(MEMORY, 0), 0);
    assert_eq!(add(MEMORY, 0), 1, "the same region twice");
    assert_eq!(long(&vmm.ask(38, NEED_REPLY, &region(MEMORY, 0), &[guest.memory.as_fd()]).0), 0);
    assert_eq!(long(&vmm.ask(38, NEED_REPLY, &region(MEMORY, 0), &[]).0), 1);
}

#[test]
fn as_many_regions_as_were_promised_and_no_more() {
    let (mut vmm, guest) = (Vmm::negotiated(PROTOCOL), Guest::new(8));
    let slots = long(&vmm.ask(36, 0, &[], &[]).0);
    let region = |index: u64| [longs(&[0]), longs(&[index << 20, 0x1000, USER + (index << 20), 0])].concat();
    for index in 0..=slots {
        let refused = long(&vmm.ask(37, NEED_REPLY, &region(index), &[guest.memory.as_fd()]).0);
        assert_eq!(refused, u64::from(index == slots), "region {index}");
    }
    assert_eq!(long(&vmm.ask(38, NEED_REPLY, &region(7), &[]).0), 0);
    assert_eq!(long(&vmm.ask(37, NEED_REPLY, &region(slots), &[guest.memory.as_fd()]).0), 0);
}

#[test]
fn memory_table_replaces_all_regions_or_none() {
    let (mut vmm, guest) = (Vmm::negotiated(PROTOCOL), Guest::new(8));
    let table = |regions: &[[u64; 4]]| {
        [words(&[regions.len() as u32, 0]), regions.iter().flat_map(|region| longs(region)).collect()]
            .concat()
    };
    let fd = guest.memory.as_fd();
    let good = table(&[[0, 0x1000, USER, 0], [0x1000, 0x1000, USER + 0x1000, 0x1000]]);
    assert_eq!(long(&vmm.ask(5, NEED_REPLY, &good, &[fd, fd]).0), 0);
    for (bad, fds) in [
        (table(&[[0, 0x1000, USER, 0], [0x800, 0x1000, USER + 0x1000, 0]]), vec![fd, fd]),
        (table(&[[0, MEMORY + 1, USER, 0]]), vec![fd]),
        (good.clone(), vec![fd]),
        (good[..good.len() - 1].to_vec(), vec![fd, fd]),
        (words(&[33, 0]), vec![]),
    ] {
        assert_eq!(long(&vmm.ask(5, NEED_REPLY, &bad, &fds).0), 1);
        // Both of before are still there: neither can be added, each can be removed.
        let region = |at: u64| [longs(&[0]), longs(&[at, 0x1000, USER + at, at])].concat();
        for at in [0, 0x1000] {
            assert_eq!(long(&vmm.ask(38, NEED_REPLY, &region(at), &[]).0), 0);
            assert_eq!(long(&vmm.ask(37, NEED_REPLY, &region(at), &[fd]).0), 0);
        }
    }
}

#[test]
fn vmm_that_does_not_read_replies_loses_its_connection() {
    let mut vmm = Vmm::new();
    let mut end = None;
    for _ in 0..100_000 {
        vmm.send(1, 0, &[], &[]);
        if let Err(error) = vmm.events() {
            end = Some(error);
            break;
        }
    }
    assert!(matches!(end, Some(ConnectionError::NotReading)));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn garbage_is_survived(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
        let mut vmm = Vmm::negotiated(PROTOCOL);
        vmm.send_bytes(&[&bytes[..], &[0]].concat(), &[]);
        let _ = vmm.events();
    }

    #[test]
    fn well_formed_requests_with_random_content_are_survived(
        requests in proptest::collection::vec(
            (1u32..46, proptest::collection::vec(prop_oneof![Just(0u32), Just(1), 0u32..300, any::<u32>()], 0..12), 0usize..3),
            1..40,
        )
    ) {
        let (mut vmm, guest) = running(8, 0);
        for (request, content, fds) in requests {
            let fds = vec![guest.memory.as_fd(); fds];
            vmm.send(request, NEED_REPLY, &words(&content), &fds);
            if vmm.events().is_err() {
                break;
            }
            while vmm.reply_any() {}
            for queue in 0..5 {
                if let Some(ring) = vmm.connection.ring(queue) {
                    let _ = ring.pop();
                    ring.publish();
                }
            }
        }
    }
}
