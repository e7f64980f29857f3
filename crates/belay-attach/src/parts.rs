//! Requests that are longer than what one frame carries.
//!
//! ```text
//!   chain of 9 MiB ─▶ 4 MiB, number n │ 4 MiB, n + 1 │ 1 MiB, n + 2      its mark: n + 2
//! ```
//!
//! Such a request is executed as several, each with a number of its own, in the table, in lists and on the link. Those
//! that have ended stay in the table until all have: then the chain is completed, once, and until then a list has all of
//! them. The in-flight region has room for one number; it is the last, so that whoever sees it draws none of them again.

use belay_block::virtio::Request;
use belay_block::{OpKind, Status};
use belay_vhost_user::Chain;
use belay_wire::TxId;

use crate::device::Device;
use crate::requests::GuestRequest;
use crate::serve::MAX_REQUEST_BYTES;

/// How many parts a request has.
pub(crate) fn parts_of(kind: OpKind, len: u64) -> u16 {
    match kind {
        // At most `virtio::MAX_DATA_BYTES`: the number is small.
        OpKind::Read | OpKind::Write => len.div_ceil(MAX_REQUEST_BYTES).max(1) as u16,
        _ => 1,
    }
}

impl GuestRequest {
    /// A part of a request; `txid` is the part's own number. The only part takes the data.
    pub(crate) fn part(
        request: &mut Request,
        kind: OpKind,
        (part, parts): (u16, u16),
        txid: TxId,
        (queue, chain): (u16, Chain),
        born: std::time::Instant,
    ) -> Self {
        let skip = u64::from(part) * MAX_REQUEST_BYTES;
        let len = if parts == 1 { request.len } else { (request.len - skip).min(MAX_REQUEST_BYTES) };
        let data = match parts {
            1 => std::mem::take(&mut request.data),
            _ => request.data.part(skip as usize, len as usize),
        };
        Self {
            queue,
            head: chain.head,
            txid,
            kind,
            offset: request.offset + skip,
            len,
            data,
            status_at: request.status,
            chain,
            part,
            parts,
            landing: None,
            reading: false,
            born,
            flushing: false,
            done: None,
            orphan: false,
        }
    }

    /// The number that is marked for its chain.
    pub(crate) fn tag(&self) -> u64 {
        self.txid.0.saturating_add(u64::from(self.parts - 1 - self.part))
    }
}

impl Device {
    /// The numbers of a request of so many parts: those that end with `last`, or new ones.
    pub(crate) fn numbers_of_parts(&mut self, parts: u16, last: Option<TxId>) -> TxId {
        let more = u64::from(parts - 1);
        let known = last.and_then(|last| last.0.checked_sub(more)).filter(|first| {
            // Of several parts, the mark has vouched for the last only.
            let others = *first..*first + more;
            more == 0 || *first > 0 && !self.requests.everything().any(|(_, r)| others.contains(&r.txid.0))
        });
        if let Some(first) = known {
            return TxId(first);
        }
        let first = self.draw_txid();
        self.seen_txid(TxId(first.0 + more));
        first
    }

    /// How a head's request has ended, if all of its parts have; they are taken out of the table.
    pub(crate) fn take_ended(&mut self, key: usize) -> Option<(GuestRequest, Status)> {
        let request = self.requests.get(key)?;
        let (status, queue, head) = (request.done?, request.queue, request.head);
        if request.parts == 1 {
            let request = self.requests.remove(key)?;
            land(&request);
            return Some((request, status));
        }
        let parts = usize::from(request.parts);
        let keys = self.requests.of_head(queue, head);
        if keys.len() != parts {
            return None;
        }
        let ends: Option<Vec<Status>> =
            keys.iter().map(|key| self.requests.get(*key).and_then(|request| request.done)).collect();
        let status = ends?.into_iter().find(|status| *status != Status::Ok).unwrap_or(Status::Ok);
        let mut whole: Option<GuestRequest> = None;
        for part in keys.into_iter().filter_map(|key| self.requests.remove(key)) {
            land(&part);
            match &mut whole {
                Some(whole) => whole.len += part.len,
                None => whole = Some(part),
            }
        }
        Some((whole?, status))
    }
}

/// Puts data that landed elsewhere where the guest wants it.
fn land(request: &GuestRequest) {
    if let Some(landing) = request.landing.as_ref().filter(|_| request.done == Some(Status::Ok)) {
        request.data.copy_from_buf(0, landing);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_as_many_as_frames() {
        let max = MAX_REQUEST_BYTES;
        for (len, parts) in [(512, 1), (max, 1), (max + 512, 2), (2 * max, 2), (9 << 20, 3)] {
            assert_eq!(parts_of(OpKind::Read, len), parts, "{len}");
        }
        assert_eq!(parts_of(OpKind::Flush, 0), 1);
        assert_eq!(parts_of(OpKind::Discard, 1 << 31), 1, "which carries no data");
    }
}
