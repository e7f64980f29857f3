//! A ring that was started at the host that its guest comes to, and the requests in flight that belong to it.

use belay_wire::{InflightList, ListedRequest, QueueIndex, RequestKind};

/// How the VMM started a ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingStart {
    /// Which.
    pub queue: QueueIndex,
    /// Its entries.
    pub size: u16,
    /// What SET_VRING_BASE said: the next available index.
    pub base: u16,
    /// The used index found in guest memory.
    pub used: u16,
}

/// Whether every ring that has requests in the list was started. Until they are all known where the guest comes to, the
/// host that it left is the only one that knows them, and must not let it go.
pub(super) fn all_here(list: &InflightList, started: &[RingStart]) -> bool {
    list.requests.iter().all(|request| started.iter().any(|ring| ring.queue == request.queue))
}

/// Whether the host that made the list knows this ring, or there is nothing to know. An agent that was restarted while
/// its VM was stopped knows of no ring, and of no request in flight in any: its list says nothing about a ring that
/// has run, nor about those that are still to come.
pub(super) fn known(list: &InflightList, ring: &RingStart) -> Result<(), String> {
    let fresh = ring.base == 0 && ring.used == 0;
    if fresh || list.queues.iter().any(|listed| listed.queue == ring.queue) {
        return Ok(());
    }
    Err(format!(
        "queue {}: the ring has run, and the other host, whose agent was restarted, does not know what is in flight",
        ring.queue
    ))
}

/// The listed requests of a ring, checked against how the ring stands in guest memory.
///
/// A VMM whose agent died before the ring ran has wound it back to its used index: it runs from where the list says.
/// Any other ring with nothing in flight that does not start there has had a reset since: it adopts nothing, and what
/// is listed for it is forgotten with its old life.
pub(super) fn adopted_by(
    list: &InflightList,
    mut ring: RingStart,
) -> Result<(RingStart, Vec<ListedRequest>), String> {
    let queue = ring.queue;
    let adopted: Vec<ListedRequest> =
        list.requests.iter().filter(|request| request.queue == queue).copied().collect();
    let listed = list.queues.iter().find(|listed| listed.queue == queue).map(|listed| listed.base);
    if ring.base == ring.used && listed != Some(ring.base) {
        match listed {
            Some(base)
                if !adopted.is_empty() && usize::from(base.wrapping_sub(ring.used)) == heads_of(&adopted) =>
            {
                ring.base = base;
            }
            _ => return Ok((ring, Vec::new())),
        }
    }
    let outstanding = ring.base.wrapping_sub(ring.used);
    if usize::from(outstanding) != heads_of(&adopted) || outstanding > ring.size {
        return Err(format!(
            "queue {queue}: the ring has {outstanding} requests in flight (base {}, used {}), the source's list has {}",
            ring.base,
            ring.used,
            heads_of(&adopted)
        ));
    }
    match listed {
        Some(base) if base == ring.base => {}
        Some(base) => {
            return Err(format!(
                "queue {queue}: the ring starts at {}, the source stopped at {base}",
                ring.base
            ));
        }
        None => return Err(format!("queue {queue} did not run at the source")),
    }
    let mut heads: Vec<Option<ListedRequest>> = vec![None; usize::from(ring.size)];
    for request in &adopted {
        match heads.get_mut(usize::from(request.head.0)) {
            Some(seen) if seen.is_none_or(|before| continues(&before, request)) => *seen = Some(*request),
            Some(_) => return Err(format!("queue {queue}: head {} is listed twice", request.head.0)),
            None => return Err(format!("queue {queue}: head {} is outside the ring", request.head.0)),
        }
    }
    Ok((ring, adopted))
}

/// How many heads these requests have. A long request is listed in parts, all with its head.
fn heads_of(requests: &[ListedRequest]) -> usize {
    requests.iter().map(|request| request.head).collect::<std::collections::BTreeSet<_>>().len()
}

/// Whether this is the next part of the same request.
fn continues(before: &ListedRequest, part: &ListedRequest) -> bool {
    let carries_data = matches!(part.kind, RequestKind::Read | RequestKind::Write);
    carries_data
        && part.kind == before.kind
        && before.offset.checked_add(before.len) == Some(part.offset)
        && before.txid < part.txid
}

#[cfg(test)]
mod tests {
    use belay_wire::{HeadIndex, QueueBase, RequestState, TxId};

    use super::*;

    fn listed(head: u16, txid: u64, kind: RequestKind, offset: u64) -> ListedRequest {
        let (queue, head, state) = (QueueIndex(0), HeadIndex(head), RequestState::Sent);
        ListedRequest { queue, head, kind, state, txid: TxId(txid), offset, len: 4096 }
    }

    fn adopted(requests: Vec<ListedRequest>, in_flight: u16) -> Result<usize, String> {
        let list =
            InflightList { queues: vec![QueueBase { queue: QueueIndex(0), base: in_flight }], requests };
        let ring = RingStart { queue: QueueIndex(0), size: 8, base: in_flight, used: 0 };
        adopted_by(&list, ring).map(|(_, adopted)| adopted.len())
    }

    #[test]
    fn parts_of_one_request_count_as_one_head() {
        let write = RequestKind::Write;
        let long = vec![listed(1, 5, write, 0), listed(1, 6, write, 4096), listed(2, 7, write, 0)];
        assert_eq!(adopted(long.clone(), 2), Ok(3));
        assert!(adopted(long, 3).unwrap_err().contains("has 2"));
    }

    #[test]
    fn head_that_is_listed_twice_is_refused_unless_it_goes_on() {
        let (write, read) = (RequestKind::Write, RequestKind::Read);
        for second in [
            listed(1, 6, write, 8192),
            listed(1, 6, read, 4096),
            listed(1, 5, write, 4096),
            listed(1, 6, RequestKind::Flush, 4096),
        ] {
            let refusal = adopted(vec![listed(1, 5, write, 0), second], 1).unwrap_err();
            assert!(refusal.contains("twice"), "{refusal}");
        }
    }
}
