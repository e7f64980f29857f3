//! What makes it last: the map is saved behind a flush, and once every block is here, the old backing is let go.

use std::time::Duration;

use super::{Action, BlockMap, GuestKind, Outcome, Phase, Pull};

impl Pull {
    /// Keeps the copy from being cut over, or lets it. `false`: the cut-over is under way, and goes on.
    pub fn hold(&mut self, hold: bool) -> bool {
        let possible = !hold || !self.is_cutting();
        self.held = hold && possible;
        possible
    }

    pub(super) fn save_flushed(&mut self, outcome: Outcome, out: &mut Vec<Action>) {
        self.saving = false;
        match outcome {
            Outcome::Ok => {
                self.flushed = self.snapshot.take();
                out.push(Action::SaveMap);
            }
            // A flush that failed is never tried again: what it should have made durable may be gone.
            Outcome::Errno(errno) => self.abandon(errno, out),
        }
    }

    /// The map as it was before the flush that [`Action::SaveMap`] follows.
    pub fn take_snapshot(&mut self) -> Option<BlockMap> {
        let snapshot = self.flushed.take()?;
        self.saved_count = snapshot.count();
        Some(snapshot)
    }

    pub(super) fn begin_cut(&mut self, out: &mut Vec<Action>) {
        if self.phase == Phase::Copying && !self.held {
            self.phase = Phase::Draining;
            self.go_on(out);
        }
    }

    pub(super) fn changes_in_flight(&self) -> bool {
        !self.elders.is_empty()
            || self.ops.iter().any(|(op, entry)| entry.kind != GuestKind::Read && !self.waiting.contains(op))
    }

    pub(super) fn cut_flushed(&mut self, outcome: Outcome, out: &mut Vec<Action>) {
        let Phase::Flushing { pending, failed } = self.phase else { return };
        let failed = failed || outcome != Outcome::Ok;
        self.phase = Phase::Flushing { pending: pending - 1, failed };
        if pending > 1 {
            return;
        }
        if failed {
            self.abandon(5, out);
        } else {
            self.phase = Phase::Ready;
            out.push(Action::ReadyToCut);
        }
    }

    /// The old backing has committed: everything is local. Guest operations that wait are the driver's
    /// ([`Pull::take_waiting`]).
    pub fn cut_committed(&mut self) {
        assert_eq!(self.phase, Phase::Ready, "a cut that was not offered");
        self.phase = Phase::Cut;
    }

    /// The old backing could not be asked: go on as before, and try again in a while.
    pub fn cut_aborted(&mut self, now: Duration, out: &mut Vec<Action>) {
        if self.is_cutting() {
            self.phase = Phase::Copying;
            self.pause_until = now + Duration::from_secs(1);
            if let Some(errno) = self.failed_in_cut.take() {
                self.abandon(errno, out);
            }
            self.go_on(out);
        }
    }
}
