//! How many connections one peer may have here: one that misbehaves takes nothing from the others.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Connections for calls; an agent needs one, and another when it has lost that.
const CONTROL: usize = 16;
/// Data connections whose first frame is being waited for, each by a thread.
const OPENING: usize = 8;
/// Data connections that wait for their turn to be opened.
const WAITING: usize = 1024;

/// The connections of one peer.
struct OfPeer {
    control: Arc<Semaphore>,
    waiting: Arc<Semaphore>,
    opening: Arc<Semaphore>,
}

/// The connections of all peers.
#[derive(Default)]
pub(crate) struct Limits(Mutex<BTreeMap<String, Arc<OfPeer>>>);

impl Limits {
    fn of(&self, peer: &str) -> Arc<OfPeer> {
        let mut peers = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let new = || {
            let [control, waiting, opening] =
                [CONTROL, WAITING, OPENING].map(|permits| Arc::new(Semaphore::new(permits)));
            Arc::new(OfPeer { control, waiting, opening })
        };
        Arc::clone(peers.entry(peer.to_owned()).or_insert_with(new))
    }

    /// Room for another connection for calls, for as long as the permit is held.
    pub(crate) fn control(&self, peer: &str) -> Option<OwnedSemaphorePermit> {
        Arc::clone(&self.of(peer).control).try_acquire_owned().ok()
    }

    /// Waits until another data connection of this peer may be opened; none: too many wait already.
    pub(crate) async fn opening(&self, peer: &str) -> Option<OwnedSemaphorePermit> {
        let of_peer = self.of(peer);
        let _waits = of_peer.waiting.try_acquire().ok()?;
        Arc::clone(&of_peer.opening).acquire_owned().await.ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn peer_with_too_many_connections_gets_no_more_and_others_do() {
        let limits = Arc::new(Limits::default());
        let calls: Vec<_> = std::iter::from_fn(|| limits.control("a")).collect();
        assert_eq!(calls.len(), CONTROL);
        assert!(limits.control("b").is_some());
        drop(calls);
        assert!(limits.control("a").is_some());
        let mut opening = Vec::new();
        for _ in 0..OPENING {
            opening.push(limits.opening("a").await.unwrap());
        }
        let waiting: Vec<_> = (0..WAITING)
            .map(|_| {
                let limits = Arc::clone(&limits);
                tokio::spawn(async move { limits.opening("a").await.is_some() })
            })
            .collect();
        while limits.of("a").waiting.available_permits() > 0 {
            tokio::task::yield_now().await;
        }
        assert!(limits.opening("a").await.is_none());
        assert!(limits.opening("b").await.is_some());
        drop(opening);
        for waiting in waiting {
            assert!(waiting.await.unwrap());
        }
    }
}
