//! How long to wait before the next attempt.

use std::time::Duration;

/// Doubling delays with jitter, from 50 ms to 2 s. Chance is an argument, so that a simulation can repeat it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backoff {
    ceiling: Duration,
}

impl Backoff {
    /// The longest first delay.
    pub const FIRST: Duration = Duration::from_millis(50);
    /// The longest delay.
    pub const LONGEST: Duration = Duration::from_secs(2);

    /// Begins with the shortest delay.
    #[must_use]
    pub fn new() -> Self {
        Self { ceiling: Self::FIRST }
    }

    /// The delay before the next attempt: between half of the present ceiling (`chance` 0) and the whole (`chance`
    /// 255); the ceiling then doubles.
    #[must_use]
    pub fn next_delay(&mut self, chance: u8) -> Duration {
        let half = self.ceiling / 2;
        let delay = half + half * u32::from(chance) / 255;
        self.ceiling = (self.ceiling * 2).min(Self::LONGEST);
        delay
    }

    /// After a success: begins again with the shortest delay.
    pub fn reset(&mut self) {
        *self = Self::new();
    }
}

impl Default for Backoff {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_double_to_their_limit_and_begin_again_after_a_success() {
        let mut backoff = Backoff::new();
        let delays: Vec<u128> = (0..8).map(|_| backoff.next_delay(255).as_millis()).collect();
        assert_eq!(delays, [50, 100, 200, 400, 800, 1600, 2000, 2000]);
        assert_eq!(backoff.next_delay(0), Duration::from_secs(1), "the least is half");
        backoff.reset();
        assert_eq!(backoff.next_delay(255), Backoff::FIRST);
    }
}
