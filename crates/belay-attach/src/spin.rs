//! How long a thread looks for work before it sleeps.
//!
//! Waking a sleeping thread takes longer than a request on a fast disk, so looking pays if the next work comes soon,
//! and costs a processor's time if it does not. What comes next is guessed from what came last: while idle times
//! are short the thread looks for as long as it may, and less and less while they are longer than that.

use std::time::Duration;

/// The present limit of looking, between nothing and what the configuration allows.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Spin {
    most: Duration,
    limit: Duration,
}

/// The first step up from nothing is this part of the most.
const FIRST_STEP: u32 = 8;

impl Spin {
    pub(crate) fn new(most: Duration) -> Self {
        Self { most, limit: most }
    }

    /// How long to look now.
    pub(crate) fn limit(&self) -> Duration {
        self.limit
    }

    /// Work came after the thread had been idle for so long.
    pub(crate) fn learn(&mut self, idle: Duration) {
        if idle <= self.most {
            self.limit = (self.limit * 2).clamp(self.most / FIRST_STEP, self.most);
        } else {
            self.limit /= 2;
            if self.limit < self.most / FIRST_STEP {
                self.limit = Duration::ZERO;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOST: Duration = Duration::from_micros(40);

    #[test]
    fn long_idle_times_end_the_looking_and_short_ones_begin_it_again() {
        let mut spin = Spin::new(MOST);
        assert_eq!(spin.limit(), MOST);
        (0..8).for_each(|_| spin.learn(MOST * 2));
        assert_eq!(spin.limit(), Duration::ZERO);
        spin.learn(MOST / 2);
        assert!(spin.limit() > Duration::ZERO && spin.limit() < MOST);
        (0..8).for_each(|_| spin.learn(MOST / 2));
        assert_eq!(spin.limit(), MOST);
    }

    #[test]
    fn thread_that_may_not_look_never_does() {
        let mut spin = Spin::new(Duration::ZERO);
        spin.learn(Duration::ZERO);
        spin.learn(MOST);
        assert_eq!(spin.limit(), Duration::ZERO);
    }
}
