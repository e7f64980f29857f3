//! The decisions without I/O: handover, remote session, exchange
