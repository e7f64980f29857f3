//! Numbers and payloads of the vhost-user protocol (specification, "Communication" and "Front-end message types").

/// Numbers of the front-end's requests.
pub(crate) mod request {
    pub(crate) const GET_FEATURES: u32 = 1;
    pub(crate) const SET_FEATURES: u32 = 2;
    pub(crate) const SET_OWNER: u32 = 3;
    pub(crate) const RESET_OWNER: u32 = 4;
    pub(crate) const SET_MEM_TABLE: u32 = 5;
    pub(crate) const SET_LOG_BASE: u32 = 6;
    pub(crate) const SET_LOG_FD: u32 = 7;
    pub(crate) const SET_VRING_NUM: u32 = 8;
    pub(crate) const SET_VRING_ADDR: u32 = 9;
    pub(crate) const SET_VRING_BASE: u32 = 10;
    pub(crate) const GET_VRING_BASE: u32 = 11;
    pub(crate) const SET_VRING_KICK: u32 = 12;
    pub(crate) const SET_VRING_CALL: u32 = 13;
    pub(crate) const SET_VRING_ERR: u32 = 14;
    pub(crate) const GET_PROTOCOL_FEATURES: u32 = 15;
    pub(crate) const SET_PROTOCOL_FEATURES: u32 = 16;
    pub(crate) const GET_QUEUE_NUM: u32 = 17;
    pub(crate) const SET_VRING_ENABLE: u32 = 18;
    pub(crate) const SET_BACKEND_REQ_FD: u32 = 21;
    pub(crate) const GET_CONFIG: u32 = 24;
    pub(crate) const SET_CONFIG: u32 = 25;
    pub(crate) const GET_INFLIGHT_FD: u32 = 31;
    pub(crate) const SET_INFLIGHT_FD: u32 = 32;
    pub(crate) const RESET_DEVICE: u32 = 34;
    pub(crate) const GET_MAX_MEM_SLOTS: u32 = 36;
    pub(crate) const ADD_MEM_REG: u32 = 37;
    pub(crate) const REM_MEM_REG: u32 = 38;
    pub(crate) const SET_STATUS: u32 = 39;
    pub(crate) const GET_STATUS: u32 = 40;
}

/// Number of the back-end's request that says that the configuration space changed.
pub(crate) const CONFIG_CHANGE_MSG: u32 = 2;

/// Feature bits that do not belong to a device class.
pub(crate) mod feature {
    pub(crate) const LOG_ALL: u64 = 1 << 26;
    pub(crate) const INDIRECT_DESC: u64 = 1 << 28;
    pub(crate) const EVENT_IDX: u64 = 1 << 29;
    pub(crate) const PROTOCOL_FEATURES: u64 = 1 << 30;
    pub(crate) const VERSION_1: u64 = 1 << 32;
    /// What every device offers.
    pub(crate) const COMMON: u64 = LOG_ALL | INDIRECT_DESC | EVENT_IDX | PROTOCOL_FEATURES | VERSION_1;
}

bitflags::bitflags! {
    /// Protocol features. Deliberately without INBAND_NOTIFICATIONS (14) and XEN_MMAP (17), which QEMU acknowledges
    /// without implementing them.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub(crate) struct ProtocolFeatures: u64 {
        const MQ = 1 << 0;
        const LOG_SHMFD = 1 << 1;
        const REPLY_ACK = 1 << 3;
        const BACKEND_REQ = 1 << 5;
        const CONFIG = 1 << 9;
        const BACKEND_SEND_FD = 1 << 10;
        const INFLIGHT_SHMFD = 1 << 12;
        const RESET_DEVICE = 1 << 13;
        const CONFIGURE_MEM_SLOTS = 1 << 15;
    }
}

impl ProtocolFeatures {
    /// What is offered. CONFIGURE_MEM_SLOTS is always understood: with it QEMU sends guest memory once per device,
    /// without it at every start of the rings, also on a connection that it has not noticed to be a new one
    /// (`docs/decisions/0012-memory-comes-with-every-start.md`).
    pub(crate) fn offered(memory_slots: bool) -> Self {
        if memory_slots { Self::all() } else { Self::all().difference(Self::CONFIGURE_MEM_SLOTS) }
    }
}

/// The name of a request, for messages.
pub(crate) fn name(number: u32) -> Option<&'static str> {
    use request as r;
    Some(match number {
        r::GET_FEATURES => "GET_FEATURES",
        r::SET_FEATURES => "SET_FEATURES",
        r::SET_OWNER => "SET_OWNER",
        r::RESET_OWNER => "RESET_OWNER",
        r::SET_MEM_TABLE => "SET_MEM_TABLE",
        r::SET_LOG_BASE => "SET_LOG_BASE",
        r::SET_LOG_FD => "SET_LOG_FD",
        r::SET_VRING_NUM => "SET_VRING_NUM",
        r::SET_VRING_ADDR => "SET_VRING_ADDR",
        r::SET_VRING_BASE => "SET_VRING_BASE",
        r::GET_VRING_BASE => "GET_VRING_BASE",
        r::SET_VRING_KICK => "SET_VRING_KICK",
        r::SET_VRING_CALL => "SET_VRING_CALL",
        r::SET_VRING_ERR => "SET_VRING_ERR",
        r::GET_PROTOCOL_FEATURES => "GET_PROTOCOL_FEATURES",
        r::SET_PROTOCOL_FEATURES => "SET_PROTOCOL_FEATURES",
        r::GET_QUEUE_NUM => "GET_QUEUE_NUM",
        r::SET_VRING_ENABLE => "SET_VRING_ENABLE",
        r::SET_BACKEND_REQ_FD => "SET_BACKEND_REQ_FD",
        r::GET_CONFIG => "GET_CONFIG",
        r::SET_CONFIG => "SET_CONFIG",
        r::GET_INFLIGHT_FD => "GET_INFLIGHT_FD",
        r::SET_INFLIGHT_FD => "SET_INFLIGHT_FD",
        r::RESET_DEVICE => "RESET_DEVICE",
        r::GET_MAX_MEM_SLOTS => "GET_MAX_MEM_SLOTS",
        r::ADD_MEM_REG => "ADD_MEM_REG",
        r::REM_MEM_REG => "REM_MEM_REG",
        r::SET_STATUS => "SET_STATUS",
        r::GET_STATUS => "GET_STATUS",
        _ => return None,
    })
}

/// Takes numbers off the front of a payload.
pub(crate) struct Fields<'a>(pub(crate) &'a [u8]);

/// A payload ended before all of its fields.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("the payload is too short")]
pub(crate) struct TooShort;

impl Fields<'_> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N], TooShort> {
        let (field, rest) = self.0.split_first_chunk::<N>().ok_or(TooShort)?;
        self.0 = rest;
        Ok(*field)
    }

    pub(crate) fn u16(&mut self) -> Result<u16, TooShort> {
        self.take().map(u16::from_ne_bytes)
    }

    pub(crate) fn u32(&mut self) -> Result<u32, TooShort> {
        self.take().map(u32::from_ne_bytes)
    }

    pub(crate) fn u64(&mut self) -> Result<u64, TooShort> {
        self.take().map(u64::from_ne_bytes)
    }
}
