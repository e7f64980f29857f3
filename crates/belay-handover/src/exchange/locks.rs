//! Who may touch which blocks: changes of the guest and fetches exclude each other where they overlap.

/// A range of blocks that somebody holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Held {
    from: u64,
    to: u64,
    holder: u64,
    /// Fetches may share blocks with fetches.
    shared: bool,
}

/// The ranges held now. A handful: searching them in a row is quickest.
#[derive(Clone, Debug, Default)]
pub(super) struct Locks {
    held: Vec<Held>,
}

impl Locks {
    /// Takes `from..to` for `holder`, unless somebody who excludes it holds part of it.
    pub(super) fn take(&mut self, from: u64, to: u64, holder: u64, shared: bool) -> bool {
        let free = self.held.iter().all(|held| held.to <= from || to <= held.from || (shared && held.shared));
        if free {
            self.held.push(Held { from, to, holder, shared });
        }
        free
    }

    /// Holds `from..to` for `holder` whoever else does: for what was under way before there were locks. Nobody takes
    /// part of it until it is released.
    pub(super) fn hold(&mut self, from: u64, to: u64, holder: u64) {
        self.held.push(Held { from, to, holder, shared: false });
    }

    /// Gives back what `holder` holds.
    pub(super) fn release(&mut self, holder: u64) {
        self.held.retain(|held| held.holder != holder);
    }
}
