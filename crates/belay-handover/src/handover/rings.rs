//! A ring that was started at the host that its guest comes to, and the requests in flight that belong to it.

use belay_wire::{InflightList, ListedRequest, QueueIndex};

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
                if !adopted.is_empty() && usize::from(base.wrapping_sub(ring.used)) == adopted.len() =>
            {
                ring.base = base;
            }
            _ => return Ok((ring, Vec::new())),
        }
    }
    let outstanding = ring.base.wrapping_sub(ring.used);
    if usize::from(outstanding) != adopted.len() || outstanding > ring.size {
        return Err(format!(
            "queue {queue}: the ring has {outstanding} requests in flight (base {}, used {}), the source's list has {}",
            ring.base,
            ring.used,
            adopted.len()
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
    let mut heads = vec![false; usize::from(ring.size)];
    for request in &adopted {
        match heads.get_mut(usize::from(request.head.0)) {
            Some(seen) if !*seen => *seen = true,
            Some(_) => return Err(format!("queue {queue}: head {} is listed twice", request.head.0)),
            None => return Err(format!("queue {queue}: head {} is outside the ring", request.head.0)),
        }
    }
    Ok((ring, adopted))
}
