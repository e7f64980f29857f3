//! Tests of the side that has the backing.

use belay_wire::{
    Epoch, HeadIndex, InflightList, ListedRequest, QueueBase, QueueIndex, Refusal, RequestKind, RequestState,
    TxId,
};

use super::{RingStart, Source, SourceAction, SourceEvent};

fn run(source: Source, events: Vec<SourceEvent>) -> (Source, Vec<SourceAction>) {
    let mut all = Vec::new();
    let source = events.into_iter().fold(source, |source, event| {
        let (source, actions) = source.handle(event);
        all.extend(actions);
        source
    });
    (source, all)
}

fn offer() -> SourceEvent {
    SourceEvent::Offer { to: "b".into() }
}

fn stopped() -> SourceEvent {
    SourceEvent::RingsStopped(InflightList::default())
}

fn sent(generation: u64) -> SourceAction {
    SourceAction::SendList { list: InflightList::default(), generation }
}

fn claim(epoch: u64) -> SourceEvent {
    SourceEvent::Claim { by: "b".into(), epoch: Epoch(epoch), generation: 2 }
}

/// A claim that was on its way when the source's agent died comes to the next process, which has parked another list.
#[test]
fn claim_of_another_process_list_is_refused() {
    let old = Source::serving(Epoch(1)).numbering_from(70);
    let (old, _) = run(old, vec![offer(), stopped()]);
    let claimed = SourceEvent::Claim { by: "b".into(), epoch: Epoch(2), generation: 71 };
    assert_eq!(old.handle(claimed.clone()).0.name(), "granting");
    let (new, actions) =
        run(Source::serving(Epoch(1)).numbering_from(500), vec![offer(), stopped(), claimed]);
    assert_eq!((new.name(), actions.last()), ("parked", Some(&SourceAction::Refuse(Refusal::WrongState))));
}

#[test]
fn numbers_of_lists_go_on_through_a_grant_and_a_return() {
    let mut source = Source::serving(Epoch(1)).numbering_from(70);
    let claim = |generation| SourceEvent::Claim { by: "b".into(), epoch: Epoch(2), generation };
    for event in [offer(), stopped(), claim(71), SourceEvent::GrantDurable(Epoch(2))] {
        source = source.handle(event).0;
    }
    assert_eq!(source, Source::granted("b".into(), Epoch(2)).numbering_from(71));
}

#[test]
fn claim_after_the_stop_is_fenced_persisted_then_granted() {
    let (source, actions) = run(Source::serving(Epoch(4)), vec![offer(), stopped(), claim(5)]);
    let persist = SourceAction::PersistGrant { to: "b".into(), epoch: Epoch(5) };
    assert_eq!(actions, [sent(2), SourceAction::Fence, persist]);
    assert!(!source.may_serve());
    let (source, actions) = source.handle(SourceEvent::GrantDurable(Epoch(5)));
    let lend = SourceAction::Lend { to: "b".into(), epoch: Epoch(5) };
    assert_eq!(actions, [lend, SourceAction::SendGrant(Epoch(5))]);
    assert_eq!(source.successor(), Some("b"));
}

#[test]
fn rings_that_start_again_revoke_the_list_and_a_later_claim_is_refused() {
    let (source, actions) =
        run(Source::serving(Epoch(1)), vec![offer(), stopped(), SourceEvent::RingsStarted, claim(2)]);
    assert_eq!(actions[1], SourceAction::RevokeList);
    assert_eq!(actions[2], SourceAction::Refuse(Refusal::WrongState));
    assert!(source.may_serve());
}

#[test]
fn claim_of_a_host_without_offer_or_of_a_wrong_epoch_is_refused() {
    for event in [SourceEvent::Claim { by: "c".into(), epoch: Epoch(2), generation: 2 }, claim(3), claim(1)] {
        let (source, actions) = run(Source::serving(Epoch(1)), vec![offer(), stopped(), event]);
        assert_eq!(actions[1], SourceAction::Refuse(Refusal::WrongState));
        assert!(source.may_serve());
    }
}

#[test]
fn withdrawal_after_the_claim_is_too_late() {
    let (source, actions) =
        run(Source::serving(Epoch(1)), vec![offer(), stopped(), claim(2), SourceEvent::Withdraw]);
    assert_eq!(actions.last(), Some(&SourceAction::WithdrawTooLate));
    assert!(!source.may_serve());
}

#[test]
fn rings_of_a_vmm_resumed_by_mistake_do_not_run_after_the_grant() {
    let events =
        vec![offer(), stopped(), claim(2), SourceEvent::GrantDurable(Epoch(2)), SourceEvent::RingsStarted];
    let (source, _) = run(Source::serving(Epoch(1)), events);
    assert!(!source.may_serve());
}

#[test]
fn grant_that_could_not_be_written_gives_the_device_back() {
    let events = vec![offer(), stopped(), claim(2), SourceEvent::GrantFailed(Epoch(2))];
    let (source, actions) = run(Source::serving(Epoch(1)), events);
    assert_eq!(actions.last(), Some(&SourceAction::Unfence));
    assert!(source.may_serve());
}

#[test]
fn grant_lost_on_the_way_is_sent_again_when_the_successor_is_back() {
    let source = Source::granted("b".into(), Epoch(2));
    let (source, actions) = source.handle(SourceEvent::SuccessorOpened);
    assert_eq!(actions, [SourceAction::SendGrant(Epoch(2))]);
    let (_, actions) = source.handle(claim(2));
    assert_eq!(actions, [SourceAction::SendGrant(Epoch(2))]);
}

#[test]
fn device_that_was_paused_before_the_offer_sends_its_list_to_the_successor() {
    let (source, actions) =
        run(Source::serving(Epoch(1)), vec![stopped(), offer(), SourceEvent::SuccessorOpened]);
    assert_eq!(actions, [sent(2)]);
    assert_eq!(source.name(), "parked");
}

#[test]
fn device_whose_rings_never_ran_can_be_handed_over() {
    let (source, actions) = run(Source::serving(Epoch(1)), vec![offer(), SourceEvent::SuccessorOpened]);
    assert_eq!(actions, [sent(1)]);
    assert_eq!(source.name(), "parked");
}

#[test]
fn claim_by_a_list_that_was_revoked_meanwhile_is_refused() {
    // The guest stopped, ran again, and stopped again, while the claim of the first list was on its way.
    let events = vec![offer(), stopped(), SourceEvent::RingsStarted, stopped(), claim(2)];
    let (source, actions) = run(Source::serving(Epoch(1)), events);
    assert_eq!(actions.last(), Some(&SourceAction::Refuse(Refusal::WrongState)));
    assert!(source.may_serve());
}

fn list(base: u16) -> InflightList {
    let request = ListedRequest {
        queue: QueueIndex(0),
        head: HeadIndex(3),
        kind: RequestKind::Write,
        state: RequestState::Sent,
        txid: TxId(9),
        offset: 0,
        len: 512,
    };
    InflightList { queues: vec![QueueBase { queue: QueueIndex(0), base }], requests: vec![request] }
}

fn borrower_list() -> SourceEvent {
    SourceEvent::BorrowerList { list: list(7), generation: 1 }
}

fn ring(base: u16, used: u16) -> RingStart {
    RingStart { queue: QueueIndex(0), size: 8, base, used }
}

#[test]
fn guest_comes_home_with_one_write_in_this_ledger() {
    let lent = Source::granted("b".into(), Epoch(2));
    for events in [
        vec![borrower_list(), SourceEvent::RingWaits(ring(7, 6))],
        vec![SourceEvent::RingWaits(ring(7, 6)), borrower_list()],
    ] {
        let (source, actions) = run(lent.clone(), events);
        let mark = SourceAction::MarkRing { ring: ring(7, 6), adopted: list(7).requests };
        assert_eq!(actions, [mark, SourceAction::PersistReturn { from: "b".into(), epoch: Epoch(3) }]);
        assert!(!source.may_serve() && !source.serves_borrower());
        let (source, actions) = source.handle(SourceEvent::ReturnDurable(Epoch(3)));
        let back = SourceAction::TakeBack { from: "b".into(), epoch: Epoch(3) };
        let run = SourceAction::RunRing { ring: ring(7, 6), adopted: list(7).requests };
        assert_eq!(actions, [back, run, SourceAction::SendTaken(Epoch(3))]);
        assert!(source.may_serve());
    }
}

#[test]
fn borrower_that_takes_its_list_back_before_the_commit_goes_on() {
    let events = vec![
        borrower_list(),
        SourceEvent::BorrowerRevoked { generation: 1 },
        SourceEvent::RingWaits(ring(7, 6)),
    ];
    let (source, actions) = run(Source::granted("b".into(), Epoch(2)), events);
    assert_eq!(actions, [SourceAction::AckRevoke { generation: 1 }]);
    assert!(source.serves_borrower());
}

#[test]
fn revocation_after_the_commit_began_is_not_acknowledged() {
    let events = vec![
        borrower_list(),
        SourceEvent::RingWaits(ring(7, 6)),
        SourceEvent::BorrowerRevoked { generation: 1 },
    ];
    let (source, actions) = run(Source::granted("b".into(), Epoch(2)), events);
    assert!(!actions.iter().any(|action| matches!(action, SourceAction::AckRevoke { .. })));
    let (source, actions) = source.handle(SourceEvent::ReturnFailed(Epoch(3)));
    assert_eq!(actions, [SourceAction::DropBorrower]);
    assert!(source.serves_borrower());
}

#[test]
fn ring_that_does_not_fit_takes_nothing_from_the_borrower() {
    let events = vec![borrower_list(), SourceEvent::RingWaits(ring(7, 5))];
    let (source, actions) = run(Source::granted("b".into(), Epoch(2)), events);
    assert!(matches!(actions[..], [SourceAction::Misfit { .. }]));
    assert!(source.serves_borrower());
}

/// The borrower's VM had stopped, and its agent was killed: it has forgotten what is in flight.
#[test]
fn list_of_a_borrower_that_does_not_know_the_rings_takes_nothing() {
    let unknown = SourceEvent::BorrowerList { list: InflightList::default(), generation: 1 };
    let idle = RingStart { queue: QueueIndex(1), size: 8, base: 4, used: 4 };
    for events in [
        vec![unknown.clone(), SourceEvent::RingWaits(idle), SourceEvent::RingWaits(ring(7, 6))],
        vec![SourceEvent::RingWaits(ring(7, 6)), SourceEvent::RingWaits(idle), unknown],
    ] {
        let (source, actions) = run(Source::granted("b".into(), Epoch(2)), events);
        assert!(!actions.iter().any(|action| matches!(action, SourceAction::PersistReturn { .. })));
        assert!(source.serves_borrower());
    }
}

#[test]
fn ring_that_does_not_fit_keeps_the_others_with_the_borrower_too() {
    let mut listed = list(7);
    listed.queues.push(QueueBase { queue: QueueIndex(1), base: 4 });
    let misfit = RingStart { queue: QueueIndex(1), size: 8, base: 4, used: 3 };
    let events = vec![
        SourceEvent::RingWaits(misfit),
        SourceEvent::RingWaits(ring(7, 6)),
        SourceEvent::BorrowerList { list: listed.clone(), generation: 1 },
        SourceEvent::BorrowerList { list: listed, generation: 1 },
    ];
    let (source, actions) = run(Source::granted("b".into(), Epoch(2)), events);
    assert!(
        !actions.iter().any(|action| matches!(action, SourceAction::PersistReturn { .. })),
        "{actions:?}"
    );
    assert!(source.serves_borrower());
}

#[test]
fn return_waits_for_every_ring_with_requests_and_others_may_start_later() {
    let mut listed = list(7);
    for queue in [1, 2] {
        listed.queues.push(QueueBase { queue: QueueIndex(queue), base: 1 });
    }
    listed.requests.push(ListedRequest { queue: QueueIndex(1), txid: TxId(10), ..listed.requests[0] });
    let second = RingStart { queue: QueueIndex(1), size: 8, base: 1, used: 0 };
    let third = RingStart { queue: QueueIndex(2), size: 8, base: 1, used: 1 };
    let events = vec![
        SourceEvent::BorrowerList { list: listed.clone(), generation: 1 },
        SourceEvent::RingWaits(ring(7, 6)),
    ];
    let (source, actions) = run(Source::granted("b".into(), Epoch(2)), events);
    assert!(actions.is_empty(), "{actions:?}");
    let (source, actions) =
        run(source, vec![SourceEvent::RingWaits(second), SourceEvent::ReturnDurable(Epoch(3))]);
    assert!(actions.contains(&SourceAction::RunRing { ring: second, adopted: vec![listed.requests[1]] }));
    assert!(source.decides_start_of(QueueIndex(2)) && !source.decides_start_of(QueueIndex(0)));
    let (source, actions) = source.handle(SourceEvent::RingWaits(third));
    assert_eq!(actions, [SourceAction::RunRing { ring: third, adopted: vec![] }]);
    assert!(!source.decides_start_of(QueueIndex(2)));
}

#[test]
fn list_of_a_borrower_that_was_restarted_is_forgotten() {
    let events = vec![borrower_list(), SourceEvent::BorrowerOpened, SourceEvent::RingWaits(ring(7, 6))];
    let (source, actions) = run(Source::granted("b".into(), Epoch(2)), events);
    assert!(actions.is_empty(), "{actions:?}");
    assert!(source.serves_borrower());
}
