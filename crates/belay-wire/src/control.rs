//! What travels as JSON: the payloads of `OPEN` and `OPENED`, and refusals.

use serde::{Deserialize, Serialize};

use crate::ids::{DeviceId, Epoch};

/// What a data connection is used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Channel {
    /// The guest's requests and the messages of the handover. One at a time: a newer one replaces an older one.
    Guest,
    /// The copier of an exchange: reads and extents only.
    Copier,
}

/// The payload of `OPEN`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Open {
    /// Which device.
    pub device: DeviceId,
    /// What for.
    pub channel: Channel,
}

/// The payload of `OPENED`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Opened {
    /// The device's epoch at the server.
    pub epoch: Epoch,
    /// Whether the client is the attachment at that epoch (else it is a successor that waits).
    pub attached: bool,
    /// The device's size at the server, in bytes.
    pub size_bytes: u64,
}

/// Why a peer refused. The numbers are wire format (`Header::status` of `REFUSED`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, thiserror::Error)]
#[serde(rename_all = "snake_case")]
#[repr(i32)]
pub enum Refusal {
    /// The request is of an epoch that is over.
    #[error("the device has moved on to a newer epoch")]
    StaleEpoch = 1,
    /// The device was not offered to this host.
    #[error("the device is not offered to this host")]
    NotOffered = 2,
    /// There is no such device here.
    #[error("there is no such device here")]
    UnknownDevice = 3,
    /// The message is not allowed in this state.
    #[error("the message is not allowed in the present state")]
    WrongState = 4,
    /// The message could not be understood.
    #[error("the message could not be understood")]
    Malformed = 5,
    /// The device can not be served for now; try again.
    #[error("the device is not ready yet")]
    NotReady = 6,
}

impl Refusal {
    /// The refusal with this number.
    #[must_use]
    pub fn from_code(code: i32) -> Option<Self> {
        [
            Self::StaleEpoch,
            Self::NotOffered,
            Self::UnknownDevice,
            Self::WrongState,
            Self::Malformed,
            Self::NotReady,
        ]
        .into_iter()
        .find(|refusal| *refusal as i32 == code)
    }
}
