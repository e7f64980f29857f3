//! The reactor of a data-plane thread: one io_uring, completions sorted to their owners by a token.
//!
//! A data-plane thread owns everything it touches: queues, sockets, files. It has one [`Ring`], which each of
//! these parts is lent while it queues work, and which hands completions back as [`Cqe`]s. Who a completion
//! belongs to is written into its [`Token`]; there is no callback, no lock and no allocation per operation.
//!
//! ```text
//!   token (64 bit):  owner: u16 │ slot: 48 bit
//! ```
#![allow(unsafe_code, reason = "io_uring: the kernel reads and writes memory that a submission names")]

mod ring;
mod token;
mod waker;

pub use io_uring::{opcode, squeue, types};
pub use ring::{Cqe, Ring};
pub use token::{OwnerId, Token};
pub use waker::Waker;
