//! What has been claimed of a VM's devices, until it is decided about all of them at once. No I/O.
//!
//! ```text
//!   Open ──▶ Committed: one write gave all of them
//!     └────▶ Off: that write failed, or the migration was taken back: nothing is given any more
//! ```

use std::mem::replace;

/// Why a claim of what was called off is refused.
pub(crate) const TAKEN_BACK: &str = "the migration was taken back";

/// The claims of one VM. `C` is what is kept of each.
#[derive(Debug)]
pub(crate) enum Claims<C> {
    /// Nothing has been given.
    Open(Vec<C>),
    /// All has been given.
    Committed,
    /// Nothing is given any more.
    Off,
}

impl<C> Default for Claims<C> {
    fn default() -> Self {
        Self::Open(Vec::new())
    }
}

impl<C> Claims<C> {
    /// Calls it off. The claims that are to be refused; `None`: too late, all has been given.
    pub(crate) fn call_off(&mut self) -> Option<Vec<C>> {
        match replace(self, Self::Off) {
            Self::Open(claims) => Some(claims),
            Self::Off => Some(Vec::new()),
            Self::Committed => {
                *self = Self::Committed;
                None
            }
        }
    }

    /// The one write that gives `claims` has been tried. Those that are to be refused.
    pub(crate) fn written<E>(&mut self, claims: Vec<C>, outcome: Result<(), E>) -> Option<(Vec<C>, E)> {
        match outcome {
            Ok(()) => {
                *self = Self::Committed;
                None
            }
            Err(error) => {
                *self = Self::Off;
                Some((claims, error))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_called_off_gives_its_claims_back_once_and_what_is_committed_none() {
        let mut claims = Claims::Open(vec![1, 2]);
        assert_eq!(claims.call_off(), Some(vec![1, 2]));
        assert_eq!(claims.call_off(), Some(vec![]));
        let mut claims = Claims::default();
        assert!(claims.written(vec![1], Ok::<_, ()>(())).is_none());
        assert_eq!(claims.call_off(), None);
    }

    #[test]
    fn write_that_failed_refuses_what_it_was_for_and_all_that_comes_later() {
        let mut claims = Claims::default();
        assert_eq!(claims.written(vec![1], Err("full")), Some((vec![1], "full")));
        assert!(matches!(claims, Claims::Off));
    }
}
