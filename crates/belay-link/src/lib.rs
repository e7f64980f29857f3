//! Mutually authenticated connections between agents.
//!
//! ```text
//!   Authority ──signs──▶ Identity ──▶ Listener ──▶ Incoming::{Control, Data, Memory, Joined}
//!   (CA host)            (every host)  dial_control / dial_data / dial_memory / ControlClient
//! ```
//! Every connection is TLS 1.3 with the certificates of both sides, and begins with the hello of
//! [`belay_wire::hello`]. The one exception is a host that joins: it has no certificate yet, so it proves itself
//! with a one-time token, and knows the cluster by the fingerprint in that token. There is no plaintext, no early
//! data and no session resumption.

mod authority;
mod backoff;
mod certificate;
mod connection;
mod dial;
mod files;
mod greeting;
mod hosts;
mod identity;
mod invite;
mod join;
mod listener;
mod memory;
mod name;
pub mod rpc;
mod tls;

pub use authority::{Authority, init, renew};
pub use backoff::Backoff;
pub use connection::{ControlConnection, DataConnection};
pub use dial::{DialError, dial_control, dial_data, dial_memory};
pub use hosts::{KnownHost, forget, known_hosts};
pub use identity::{Identity, PkiError, install_certificate, renewal_request};
pub use invite::{DEFAULT_INVITE_EXPIRY, TokenError, invite};
pub use join::{JoinError, JoinRefusal, Joined, join};
pub use listener::{Incoming, Listener, ListenerOptions};
pub use memory::{MemoryCall, MemoryStream};
pub use name::{HostName, HostNameError};
pub use rpc::{
    CallError, ControlClient, ControlClientOptions, ControlHandler, Heartbeat, LinkState, RpcError,
    serve_control,
};
pub use tls::{PeerError, client_config, peer_name, server_config};
