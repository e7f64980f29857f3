//! The first frame in both directions of every connection: which wire version, and what the connection is for.
//!
//! ```text
//!   hello (client → server):   "BELAYHLO" │ u16 min │ u16 max │ u8 kind │ 3 × 0           16 bytes
//!   answer (server → client):  "BELAYHLO" │ u16 selected, or 0 │ u16 reason length │ 4 × 0 │ reason
//! ```
//! These bytes never change: they are what lets every future version refuse or agree.

use crate::frame::FrameError;

/// A version of the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version(pub u16);

/// The oldest version this build speaks.
pub const OLDEST: Version = Version(1);
/// The newest version this build speaks.
pub const NEWEST: Version = Version(1);

/// What a connection is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum ConnectionKind {
    /// Calls between agents.
    Control = 1,
    /// One device's requests, replies and handover messages.
    Data = 2,
    /// A host that wants to be enrolled (it has no certificate yet).
    Join = 3,
    /// A VM's memory on its way from VMM to VMM.
    Memory = 4,
}

/// What a client says first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hello {
    /// Oldest version it speaks.
    pub min: Version,
    /// Newest version it speaks.
    pub max: Version,
    /// What the connection is for.
    pub kind: ConnectionKind,
}

/// Bytes of a hello, and of an answer without its reason.
pub const HELLO_BYTES: usize = 16;
/// The longest reason of a refusal, in bytes.
pub const MAX_REASON_BYTES: usize = 1024;
const MAGIC: &[u8; 8] = b"BELAYHLO";

impl Hello {
    /// This build's hello.
    #[must_use]
    pub fn of(kind: ConnectionKind) -> Self {
        Self { min: OLDEST, max: NEWEST, kind }
    }

    /// Its bytes.
    #[must_use]
    pub fn encode(&self) -> [u8; HELLO_BYTES] {
        let mut out = [0; HELLO_BYTES];
        out[..8].copy_from_slice(MAGIC);
        out[8..10].copy_from_slice(&self.min.0.to_le_bytes());
        out[10..12].copy_from_slice(&self.max.0.to_le_bytes());
        out[12] = self.kind as u8;
        out
    }

    /// Reads a hello.
    ///
    /// # Errors
    /// Not ours, or for a kind of connection that this build does not know.
    pub fn decode(bytes: &[u8; HELLO_BYTES]) -> Result<Self, FrameError> {
        if &bytes[..8] != MAGIC {
            return Err(FrameError::Payload("not a Belay hello"));
        }
        let kind = match bytes[12] {
            1 => ConnectionKind::Control,
            2 => ConnectionKind::Data,
            3 => ConnectionKind::Join,
            4 => ConnectionKind::Memory,
            other => return Err(FrameError::Kind(other)),
        };
        let version = |at: usize| Version(u16::from_le_bytes([bytes[at], bytes[at + 1]]));
        Ok(Self { min: version(8), max: version(10), kind })
    }

    /// The newest version that both sides speak, if there is one.
    #[must_use]
    pub fn select(&self) -> Option<Version> {
        let newest = self.max.min(NEWEST);
        (newest >= self.min.max(OLDEST)).then_some(newest)
    }

    /// What a server answers: the version selected, or why there is none.
    #[must_use]
    pub fn answer(outcome: Result<Version, &str>) -> Vec<u8> {
        let (version, reason) = match outcome {
            Ok(version) => (version.0, ""),
            Err(reason) => (0, reason),
        };
        let mut end = reason.len().min(MAX_REASON_BYTES);
        while !reason.is_char_boundary(end) {
            end -= 1;
        }
        let mut out = MAGIC.to_vec();
        out.extend(version.to_le_bytes());
        out.extend((end as u16).to_le_bytes());
        out.extend([0; 4]);
        out.extend(&reason.as_bytes()[..end]);
        out
    }

    /// Reads an answer's fixed part: the version selected, or the length of the reason that follows.
    ///
    /// # Errors
    /// Not ours, or a reason above the limit.
    pub fn decode_answer(bytes: &[u8; HELLO_BYTES]) -> Result<Result<Version, usize>, FrameError> {
        if &bytes[..8] != MAGIC {
            return Err(FrameError::Payload("not a Belay hello"));
        }
        let version = u16::from_le_bytes([bytes[8], bytes[9]]);
        let reason = usize::from(u16::from_le_bytes([bytes[10], bytes[11]]));
        if reason > MAX_REASON_BYTES {
            return Err(FrameError::Payload("reason too long"));
        }
        Ok(if version == 0 { Err(reason) } else { Ok(Version(version)) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hello_keeps_its_bytes() {
        let golden = *b"BELAYHLO\x01\x00\x01\x00\x02\x00\x00\x00";
        assert_eq!(Hello::of(ConnectionKind::Data).encode(), golden);
        assert_eq!(Hello::decode(&golden), Ok(Hello::of(ConnectionKind::Data)));
    }

    #[test]
    fn newer_peer_that_still_speaks_ours_gets_ours() {
        let hello = Hello { min: Version(1), max: Version(7), kind: ConnectionKind::Control };
        assert_eq!(hello.select(), Some(NEWEST));
    }

    #[test]
    fn peer_without_a_common_version_gets_none_and_a_reason() {
        let hello = Hello { min: Version(5), max: Version(7), kind: ConnectionKind::Control };
        assert_eq!(hello.select(), None);
        let answer = Hello::answer(Err("no common version"));
        let fixed: [u8; HELLO_BYTES] = answer[..HELLO_BYTES].try_into().unwrap();
        assert_eq!(Hello::decode_answer(&fixed), Ok(Err(17)));
        assert_eq!(&answer[HELLO_BYTES..], b"no common version");
    }
}
