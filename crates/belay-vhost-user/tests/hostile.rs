//! Guests that lie: every ring content gives a chain inside memory, or an error, and never more.

mod common;

use std::os::fd::AsFd;

use belay_vhost_user::{ChainFault, RingError, RingFault};
use common::*;
use proptest::prelude::*;

/// Address, length, flags, next.
type Descriptor = (u64, u32, u16, u16);

/// The fault of a chain at head 0 made of these descriptors.
fn fault_of(features: u64, descriptors: &[Descriptor]) -> Option<ChainFault> {
    let (mut vmm, mut guest) = running(8, features);
    for (index, (addr, len, flags, next)) in descriptors.iter().enumerate() {
        guest.describe(guest.descriptors, index as u16, *addr, *len, *flags, *next);
    }
    guest.offer(0);
    let ring = vmm.connection.ring(0).unwrap();
    match ring.pop() {
        Ok(Some(_)) => None,
        Err(RingError::BadChain { head: 0, fault }) => {
            ring.complete(0, 0);
            ring.publish();
            assert_eq!(guest.used_entry(0), (0, 0));
            Some(fault)
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn bad_chains_cost_the_request_and_not_the_ring() {
    use ChainFault::*;
    let cases: [(&[Descriptor], ChainFault); 8] = [
        (&[(0x9000, 1, F_NEXT, 1), (0x9000, 1, F_NEXT, 0)], Loop),
        (&[(0x9000, 1, F_NEXT, 0)], Loop),
        (&[(0x9000, 1, F_NEXT, 8)], NextOutOfRange),
        (&[(0x9000, 0, 0, 0)], ZeroLength),
        (&[(MEMORY - 1, 2, 0, 0)], OutsideMemory),
        (&[(u64::MAX, u32::MAX, F_WRITE, 0)], OutsideMemory),
        (&[(0x9000, 1, F_WRITE | F_NEXT, 1), (0x9000, 1, 0, 0)], ReadableAfterWritable),
        (&[(0x9000, 16, F_INDIRECT, 0)], IndirectNotNegotiated),
    ];
    for (descriptors, fault) in cases {
        assert_eq!(fault_of(0, descriptors), Some(fault), "{descriptors:?}");
    }
}

#[test]
fn bad_indirect_tables_refused() {
    use ChainFault::*;
    for (len, fault) in [(0, IndirectLength), (17, IndirectLength), (16 * 40_000, IndirectLength)] {
        assert_eq!(fault_of(INDIRECT, &[(0x9000, len, F_INDIRECT, 0)]), Some(fault));
    }
    assert_eq!(fault_of(INDIRECT, &[(0x9000, 16, F_INDIRECT | F_NEXT, 1)]), Some(IndirectWithNext));
    assert_eq!(fault_of(INDIRECT, &[(MEMORY, 16, F_INDIRECT, 0)]), Some(OutsideMemory));
    // The table begins with the ring's own first descriptor, which is indirect.
    assert_eq!(fault_of(INDIRECT, &[(0x1000, 16, F_INDIRECT, 0)]), Some(NestedIndirect));
}

#[test]
fn indirect_table_works_aligned_unaligned_and_across_regions() {
    let second = memfd(MEMORY);
    for table in [0x9000u64, 0x9001, MEMORY - 24] {
        let (mut vmm, mut guest) = running(8, INDIRECT);
        let region = longs(&[0, MEMORY, MEMORY, USER - MEMORY, 0]);
        vmm.tell(37, &region, &[second.as_fd()]);
        let entries = [(0xa000u64, 16u32, F_NEXT, 2u16), (0, 0, 0, 0), (0xb000, 512, F_WRITE, 0)];
        let mut bytes = Vec::new();
        for (addr, len, flags, next) in entries {
            bytes.extend(
                [&addr.to_le_bytes()[..], &len.to_le_bytes(), &flags.to_le_bytes(), &next.to_le_bytes()]
                    .concat(),
            );
        }
        let here = bytes.len().min((MEMORY - table) as usize);
        guest.write(table, &bytes[..here]);
        rustix::io::pwrite(&second, &bytes[here..], 0).unwrap();
        guest.describe(guest.descriptors, 5, table, 48, F_INDIRECT, 0);
        guest.offer(5);
        let chain = vmm.connection.ring(0).unwrap().pop().unwrap().unwrap();
        assert_eq!(
            (chain.readable[0].guest_addr, chain.writable[0].guest_addr),
            (0xa000, 0xb000),
            "{table:#x}"
        );
        assert_eq!((chain.readable_len(), chain.writable_len()), (16, 512));
    }
}

/// Pops a bad chain at head 0 and rejects it; what the status byte at `at` was and is, and the used entry.
fn rejected(vmm: &mut Vmm, guest: &Guest, at: u64) -> (u8, (u32, u32)) {
    guest.write(at, &[0]);
    let ring = vmm.connection.ring(0).unwrap();
    assert!(matches!(ring.pop(), Err(RingError::BadChain { head: 0, .. })));
    ring.reject(0, 1).unwrap();
    ring.publish();
    (guest.read::<1>(at)[0], guest.used_entry(0))
}

#[test]
fn bad_chain_is_answered_where_its_status_is() {
    for buffers in [
        [(0x8000, 16, false), (MEMORY, 512, true), (0x9000, 1, true)],
        [(0x8000, 16, false), (MEMORY - 1, 512, true), (0x9000, 1, true)],
        [(u64::MAX, 16, false), (0x9200, 512, true), (0x9000, 1, true)],
        [(0x8000, 16, true), (0x8000, 16, false), (0x8ff0, 17, true)],
        [(0x8000, 16, true), (0x9000, 1, true), (0x8000, 16, false)],
        [(0x8000, 16, false), (0x9000, 1, true), (0x8000, 0, true)],
    ] {
        let (mut vmm, mut guest) = running(8, 0);
        guest.chain(0, &buffers);
        guest.offer(0);
        let len: u32 = buffers.iter().filter(|(_, _, writable)| *writable).map(|(_, len, _)| len).sum();
        assert_eq!(rejected(&mut vmm, &guest, 0x9000), (1, (0, len)), "{buffers:x?}");
    }
}

#[test]
fn bad_indirect_chain_is_answered_and_logged_where_its_status_is() {
    let (mut vmm, mut guest) = running(8, INDIRECT | LOG_ALL);
    let log = memfd(64);
    vmm.ask(6, 0, &longs(&[64, 0]), &[log.as_fd()]);
    guest.describe(0x2_0000, 0, MEMORY, 512, F_WRITE | F_NEXT, 1);
    guest.describe(0x2_0000, 1, 0x3_0000, 1, F_WRITE, 0);
    guest.describe(guest.descriptors, 0, 0x2_0000, 32, F_INDIRECT, 0);
    guest.offer(0);
    assert_eq!(rejected(&mut vmm, &guest, 0x3_0000), (1, (0, 513)));
    assert_eq!(dirty(&log, 64), [0x30]);
}

#[test]
fn bad_chain_without_a_place_for_an_answer_breaks_the_ring_and_is_not_given_back() {
    let unanswerable: [fn(&Guest); 5] = [
        |guest| guest.describe(guest.descriptors, 0, 0x9000, 1, F_WRITE | F_NEXT, 0),
        |guest| guest.describe(guest.descriptors, 0, 0x9000, 1, F_WRITE | F_NEXT, 8),
        |guest| guest.chain(0, &[(0x8000, 16, false), (MEMORY, 1, true)]),
        |guest| guest.chain(0, &[(MEMORY, 16, false)]),
        |guest| guest.describe(guest.descriptors, 0, 0x2_0000, 15, F_INDIRECT, 0),
    ];
    for (index, lay_out) in unanswerable.into_iter().enumerate() {
        let (mut vmm, mut guest) = running(8, INDIRECT);
        let error = eventfd();
        vmm.tell(14, &longs(&[0]), &[error.as_fd()]);
        guest.chain(5, &[(0x9000, 1, true)]);
        guest.offer(5);
        lay_out(&guest);
        guest.offer(0);
        let ring = vmm.connection.ring(0).unwrap();
        ring.pop().unwrap().unwrap();
        assert!(matches!(ring.pop(), Err(RingError::BadChain { head: 0, .. })), "{index}");
        let broken = Err(RingError::Broken(RingFault::NoAnswer { head: 0 }));
        assert_eq!(ring.reject(0, 1), broken);
        assert_eq!(ring.pop().map(|_| ()), broken, "it stays broken");
        // What was in flight ends as ever, and a pause meets the same chain again.
        ring.complete(5, 1);
        ring.publish();
        assert_eq!((guest.used_idx(), count(&error)), (1, 1));
        assert_eq!(vmm.ask(11, 0, &words(&[0, 0]), &[]).0, words(&[0, 1]));
        vmm.start(&guest, 0, 1, false);
        assert!(matches!(vmm.connection.ring(0).unwrap().pop(), Err(RingError::BadChain { head: 0, .. })));
    }
}

#[test]
fn rejection_of_a_head_that_is_not_in_flight_does_nothing() {
    let (mut vmm, guest) = running(8, 0);
    let ring = vmm.connection.ring(0).unwrap();
    for head in [0, 8, u16::MAX] {
        ring.reject(head, 1).unwrap();
    }
    ring.publish();
    assert_eq!(guest.used_idx(), 0);
}

#[test]
fn endless_indirect_chain_is_bounded() {
    let (mut vmm, mut guest) = running(8, INDIRECT);
    for index in 0..2000 {
        guest.describe(0x2_0000, index, 0xa000, 1, F_NEXT, index + 1);
    }
    guest.describe(guest.descriptors, 0, 0x2_0000, 2000 * 16, F_INDIRECT, 0);
    guest.offer(0);
    let popped = vmm.connection.ring(0).unwrap().pop();
    assert!(matches!(popped, Err(RingError::BadChain { fault: ChainFault::Loop, .. })));
}

#[test]
fn jumping_index_breaks_the_ring_and_signals_the_error() {
    let (mut vmm, guest) = running(8, 0);
    let error = eventfd();
    vmm.tell(14, &longs(&[0]), &[error.as_fd()]);
    guest.set_avail_idx(9);
    let ring = vmm.connection.ring(0).unwrap();
    let broken = Err(RingError::Broken(RingFault::AvailJumped { avail: 9, next: 0, size: 8 }));
    assert_eq!(ring.pop().map(|_| ()), broken);
    guest.set_avail_idx(0);
    assert_eq!(ring.pop().map(|_| ()), broken, "it stays broken");
    assert!(!ring.enable_notifications());
    assert_eq!(count(&error), 1);
}

#[test]
fn index_that_goes_back_breaks_the_ring() {
    let (mut vmm, mut guest) = running(8, 0);
    guest.chain(0, &[(0x9000, 1, true)]);
    guest.offer(0);
    let ring = vmm.connection.ring(0).unwrap();
    ring.pop().unwrap().unwrap();
    guest.set_avail_idx(0);
    assert!(matches!(ring.pop(), Err(RingError::Broken(RingFault::AvailJumped { .. }))));
}

#[test]
fn head_outside_the_ring_or_in_flight_breaks_it() {
    let (mut vmm, mut guest) = running(8, 0);
    guest.offer(8);
    let popped = vmm.connection.ring(0).unwrap().pop();
    assert!(matches!(popped, Err(RingError::Broken(RingFault::HeadOutOfRange { head: 8 }))));
    let (mut vmm, mut guest) = running(8, 0);
    guest.chain(1, &[(0x9000, 1, true)]);
    guest.offer(1);
    guest.offer(1);
    let ring = vmm.connection.ring(0).unwrap();
    ring.pop().unwrap().unwrap();
    assert!(matches!(ring.pop(), Err(RingError::Broken(RingFault::HeadInFlight { head: 1 }))));
}

#[test]
fn ring_outside_memory_or_misaligned_is_not_started() {
    for wrong in [
        Guest { descriptors: 0x1008, ..Guest::new(8) },
        Guest { available: 0x4001, ..Guest::new(8) },
        Guest { used: 0x5002, ..Guest::new(8) },
        Guest { used: MEMORY - 8, ..Guest::new(8) },
        Guest { descriptors: u64::MAX - USER - 15, ..Guest::new(8) },
    ] {
        let mut vmm = Vmm::negotiated(PROTOCOL);
        vmm.set_memory(&wrong);
        vmm.tell(8, &words(&[0, 8]), &[]);
        vmm.set_address(&wrong, 0, false);
        let kick = eventfd();
        vmm.tell(12, &longs(&[0]), &[kick.as_fd()]);
        assert_eq!(long(&vmm.ask(18, NEED_REPLY, &words(&[0, 1]), &[]).0), 1);
        assert!(vmm.connection.ring(0).is_none());
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_ring_content_stays_inside_memory(
        descriptors in proptest::collection::vec(
            (prop_oneof![0u64..MEMORY + 64, Just(0x1000u64), any::<u64>()],
             prop_oneof![0u32..64, Just(128u32), any::<u32>()], 0u16..8, 0u16..10),
            8),
        heads in proptest::collection::vec(0u16..9, 8),
        avail in 0u16..10,
    ) {
        let (mut vmm, mut guest) = running(8, INDIRECT | EVENT_IDX);
        for (index, (addr, len, flags, next)) in descriptors.into_iter().enumerate() {
            guest.describe(guest.descriptors, index as u16, addr, len, flags, next);
        }
        for head in heads {
            guest.offer(head);
        }
        guest.set_avail_idx(avail);
        let ring = vmm.connection.ring(0).unwrap();
        for _ in 0..20 {
            match ring.pop() {
                Ok(Some(chain)) => {
                    let pieces = chain.readable.iter().chain(&chain.writable);
                    prop_assert!(pieces.clone().count() > 0);
                    for piece in pieces {
                        prop_assert!(piece.len > 0 && piece.guest_addr + piece.len as u64 <= MEMORY);
                    }
                    ring.log_written(&chain, u32::MAX);
                    ring.complete(chain.head, 1);
                }
                Err(RingError::BadChain { head, .. }) => {
                    let _ = ring.reject(head, 1);
                }
                Ok(None) | Err(RingError::Broken(_)) => break,
            }
            ring.publish();
        }
        prop_assert!(ring.next_avail() <= 8);
        prop_assert_eq!(ring.used_idx(), guest.used_idx());
    }
}
