//! The device's connections to other hosts, on its thread.

use std::os::fd::RawFd;

use belay_reactor::{Cqe, OwnerId, Token};
use belay_wire::{FrameKind, Header};

use super::{CONN, Device};
use crate::conn::DataConn;
use crate::stats::since;

impl Device {
    /// Polls a descriptor for readability, for this owner and slot.
    pub(crate) fn poll(&mut self, fd: RawFd, owner: OwnerId, slot: u64) {
        if let Err(error) = self.ring.poll_readable(fd, Token::new(owner, slot)) {
            tracing::error!(device = %self.identity.name, %error, "cannot poll a descriptor");
        }
    }

    pub(crate) fn unpoll(&mut self, owner: OwnerId, slot: u64) {
        let _ = self.ring.cancel(Token::new(owner, slot));
        // The kernel must have taken the cancellation before the descriptor is closed.
        let _ = self.ring.submit();
    }

    /// Polls a data connection, under a new id.
    pub(crate) fn watch_conn(&mut self, conn: &DataConn) -> u64 {
        let id = self.next_conn_id;
        self.next_conn_id += 1;
        self.poll(conn.as_raw_fd(), CONN, id << 1);
        id
    }

    pub(super) fn on_conn_ready(&mut self, cqe: Cqe) {
        let id = cqe.token.slot >> 1;
        if cqe.more && self.conn_by_id(id).is_none() {
            // The connection was dropped, which its own shutdown has just told: let go of the socket.
            self.unpoll(CONN, cqe.token.slot);
            return;
        }
        if cqe.token.slot & 1 == 1 {
            if let Some(conn) = self.conn_by_id(id) {
                conn.blocked_on_write = false;
            }
            return;
        }
        self.read_conn(id);
        if !cqe.more
            && let Some(fd) = self.conn_by_id(id).map(|conn| conn.as_raw_fd())
        {
            self.poll(fd, CONN, id << 1);
        }
    }

    fn conn_by_id(&mut self, id: u64) -> Option<&mut DataConn> {
        if let Some(key) = self.server.by_id(id) {
            return self.server.sessions.get_mut(key).map(|session| &mut session.conn);
        }
        self.client.as_mut()?.channels().into_iter().find(|state| state.id == id)?.conn.as_mut()
    }

    fn read_conn(&mut self, id: u64) {
        if let Some(key) = self.server.by_id(id) {
            self.serve_session(key);
            return;
        }
        let channel = self.client.as_mut().and_then(|client| {
            client.channels().into_iter().find(|state| state.id == id).map(|state| state.channel)
        });
        if let Some(channel) = channel {
            self.read_channel(channel);
        }
    }

    pub(super) fn read_leftovers(&mut self) -> bool {
        if std::mem::take(&mut self.vmm_readable_later) {
            self.on_vmm_readable();
        }
        let ids = std::mem::take(&mut self.more_to_read);
        for id in &ids {
            self.read_conn(*id);
        }
        !ids.is_empty()
    }

    /// Writes what is queued on every connection, and polls those that are full.
    pub(super) fn flush_connections(&mut self) {
        let now = self.now;
        let mut blocked = Vec::new();
        let mut failed = Vec::new();
        let mut flush = |id: u64, conn: &mut DataConn| {
            if conn.blocked_on_write {
                return;
            }
            match conn.flush(now) {
                Ok(()) if conn.blocked_on_write => blocked.push((id, conn.as_raw_fd())),
                Ok(()) => {}
                Err(error) => failed.push((id, error.to_string())),
            }
        };
        for (_, session) in &mut self.server.sessions {
            flush(session.id, &mut session.conn);
        }
        if let Some(client) = &mut self.client {
            for state in client.channels() {
                if let Some(conn) = &mut state.conn {
                    flush(state.id, conn);
                }
            }
        }
        for (id, fd) in blocked {
            let _ = self.ring.poll_once(fd, libc::POLLOUT, Token::new(CONN, id << 1 | 1));
        }
        for (id, reason) in failed {
            self.conn_failed(id, &reason);
        }
    }

    fn conn_failed(&mut self, id: u64, reason: &str) {
        if let Some(key) = self.server.by_id(id) {
            self.drop_session(key, &crate::conn::ConnError::Io(std::io::Error::other(reason.to_owned())));
            return;
        }
        let channel = self.client.as_mut().and_then(|client| {
            client.channels().into_iter().find(|state| state.id == id).map(|state| state.channel)
        });
        if let Some(channel) = channel {
            self.lose_connection(channel, reason);
        }
    }

    /// Pings quiet peers, and gives up those that have not been heard of for too long.
    pub(super) fn heartbeats(&mut self) {
        let (now, link) = (self.now, self.link);
        let mut dead = Vec::new();
        let mut check = |id: u64, conn: &mut DataConn| {
            if since(now, conn.last_heard) > link.dead_after {
                dead.push(id);
            } else if since(now, conn.last_heard) > link.heartbeat
                && since(now, conn.last_sent) > link.heartbeat
            {
                conn.last_sent = now;
                let _ = conn.send(Header::new(FrameKind::Ping), &[]);
            }
        };
        for (_, session) in &mut self.server.sessions {
            check(session.id, &mut session.conn);
        }
        if let Some(client) = &mut self.client {
            for state in client.channels() {
                if let Some(conn) = &mut state.conn {
                    check(state.id, conn);
                }
            }
        }
        for id in dead {
            self.conn_failed(id, "nothing was heard from the peer for too long");
        }
    }
}
