//! Whose a completion is.

/// A part of the thread that submits operations: a backend, a socket, a queue's kick.
///
/// The thread that builds the parts gives each a number of its own; numbers are not reused while operations of
/// the earlier owner may still complete.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct OwnerId(pub u16);

/// What an operation carries through the kernel and back (`user_data`): its owner, and a number of the owner's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Token {
    /// Who submitted it.
    pub owner: OwnerId,
    /// The owner's own number for it, below 2^48.
    pub slot: u64,
}

/// Bits of a token that hold the slot.
const SLOT_BITS: u32 = 48;
/// The largest slot.
const SLOT_MASK: u64 = (1 << SLOT_BITS) - 1;

impl Token {
    /// A token. `slot` is cut to its 48 bits.
    #[must_use]
    pub fn new(owner: OwnerId, slot: u64) -> Self {
        debug_assert!(slot <= SLOT_MASK, "slot {slot} does not fit a token");
        Self { owner, slot: slot & SLOT_MASK }
    }

    /// The 64 bits that travel through the kernel.
    #[must_use]
    pub fn pack(self) -> u64 {
        u64::from(self.owner.0) << SLOT_BITS | self.slot
    }

    /// The inverse of [`Token::pack`].
    #[must_use]
    pub fn unpack(bits: u64) -> Self {
        Self { owner: OwnerId((bits >> SLOT_BITS) as u16), slot: bits & SLOT_MASK }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packed_token_unpacks_to_itself() {
        for (owner, slot) in [(0, 0), (u16::MAX, SLOT_MASK), (7, 1 << 40)] {
            let token = Token::new(OwnerId(owner), slot);
            assert_eq!(Token::unpack(token.pack()), token);
        }
    }
}
