//! Disks that are to follow their guest: an exchange that cannot begin is tried again until it can.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use belay_block::BackendSpec;

use crate::agent::{Agent, map_path};
use crate::device::Managed;
use crate::error::AgentError;
use crate::exchange::forget_map;
use crate::ledger::RoleRecord;

/// After the first failure.
const RETRY_FIRST: Duration = Duration::from_secs(1);
/// At most, between two attempts.
const RETRY_LONGEST: Duration = Duration::from_secs(60);

/// Delays between attempts, and what has been said of them.
#[derive(Debug, Default)]
struct Attempts {
    delay: Option<Duration>,
    said: String,
}

impl Attempts {
    /// After a failure: how long to wait, and whether its reason is worth an event. The same with other figures is not:
    /// the space that is free changes all the time.
    fn failed(&mut self, message: &str) -> (Duration, bool) {
        let delay = self.delay.map_or(RETRY_FIRST, |delay| (delay * 2).min(RETRY_LONGEST));
        self.delay = Some(delay);
        let gist: String = message.chars().filter(|char| !char.is_ascii_digit()).collect();
        let new = gist != self.said;
        self.said = gist;
        (delay, new)
    }
}

/// How long a copy waits that has found the disk full so many times in a row.
fn after_full(times: u32) -> Duration {
    (RETRY_FIRST * 2_u32.pow(times.saturating_sub(1).min(8))).min(RETRY_LONGEST)
}

impl Agent {
    /// Brings a device's backing here, in the background, as soon as that is possible: to this file, or to the usual
    /// place.
    pub(crate) fn follow_guest(self: &Arc<Self>, device: &Arc<Managed>, path: Option<PathBuf>) {
        self.follow_after(device, path, Duration::ZERO);
    }

    /// As [`Agent::follow_guest`], of a device whose copy has found the disk here full. Not at once, and ever more
    /// rarely: each attempt takes room from others.
    pub(crate) fn follow_when_there_is_room(self: &Arc<Self>, device: &Arc<Managed>, path: Option<PathBuf>) {
        self.follow_after(device, path, after_full(device.count_full()));
    }

    fn follow_after(self: &Arc<Self>, device: &Arc<Managed>, path: Option<PathBuf>, delay: Duration) {
        let (agent, device) = (Arc::clone(self), Arc::clone(device));
        tokio::spawn(async move {
            tokio::time::sleep(delay).await;
            let mut attempts = Attempts::default();
            // An operator may have begun it, ended it, or taken the device away meanwhile.
            while agent.is_to_follow(&device) {
                let bandwidth = device.record().bandwidth;
                let Err(error) = agent.begin_exchange(&device, path.clone(), bandwidth).await else { return };
                if !agent.is_to_follow(&device) {
                    break;
                }
                let (delay, new) = attempts.failed(&error.message);
                device.set_exchange_waits(Some(error.message.clone()));
                if new {
                    let message = format!("cannot begin, and is tried again: {error}");
                    agent.events.note("exchange", Some(&device.name()), None, message);
                }
                tokio::time::sleep(delay).await;
            }
            device.set_exchange_waits(None);
        });
    }

    /// Whether a device is still this one, and its backing elsewhere and to come here.
    fn is_to_follow(&self, device: &Arc<Managed>) -> bool {
        // The record of a handover may not be written yet; that is waited for.
        self.has_device(device)
            && matches!(device.role(), RoleRecord::Remote { follow: true, .. } | RoleRecord::Prepared { .. })
    }

    /// The backing is not to follow the guest any more. `false`: it was not going to.
    ///
    /// # Errors
    /// The disk.
    pub(crate) async fn stop_following(&self, device: &Managed) -> Result<bool, AgentError> {
        let _beginning = device.beginning.lock().await;
        // Whoever says this knows that it has stopped.
        device.set_copy_stopped(None);
        device.forget_full();
        let RoleRecord::Remote { backing, delay_us, direct, follow: true, replaces } = device.role() else {
            return Ok(false);
        };
        let role = RoleRecord::Remote { backing, delay_us, direct, follow: false, replaces };
        self.record(device, device.epoch(), role).await?;
        device.set_exchange_waits(None);
        self.events.note("exchange", Some(&device.name()), None, "will not begin: cancelled");
        Ok(true)
    }

    /// A copy that was under way cannot go on: the guest is served by the old backing alone, which has everything, and
    /// the copy begins anew when it can.
    pub(crate) async fn copy_anew(
        self: &Arc<Self>,
        device: &Arc<Managed>,
        backing: &str,
        backend: &BackendSpec,
        error: AgentError,
    ) -> Result<(), AgentError> {
        let name = device.name();
        // Before the guest writes anything: from now on it writes to the old backing only, and what the map says to be
        // here will be old.
        forget_map(&name, &map_path(&self.config, &name))?;
        let role = RoleRecord::Remote {
            backing: backing.to_owned(),
            delay_us: backend.delay_us,
            direct: backend.direct,
            follow: true,
            replaces: backend.path.clone(),
        };
        self.record_with(device, device.epoch(), role, device.record().bandwidth).await?;
        device.set_trouble(None);
        let message = format!("cannot go on, and begins anew when it can: {error}");
        self.events.note("exchange", Some(&name), None, message);
        self.follow_guest(device, backend.path.clone());
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use belay_wire::Epoch;

    use super::*;
    use crate::testing::{agent, record};

    #[test]
    fn attempts_become_rare_and_the_same_reason_is_told_once() {
        let mut attempts = Attempts::default();
        assert_eq!(attempts.failed("needs 10 bytes, 3 are free"), (RETRY_FIRST, true));
        assert_eq!(attempts.failed("needs 10 bytes, 4 are free"), (RETRY_FIRST * 2, false));
        assert_eq!(attempts.failed("no answer"), (RETRY_FIRST * 4, true));
        for _ in 0..20 {
            attempts.failed("no answer");
        }
        assert_eq!(attempts.failed("no answer"), (RETRY_LONGEST, false));
    }

    #[test]
    fn copy_that_finds_the_disk_full_each_time_becomes_rare() {
        assert_eq!(after_full(1), RETRY_FIRST);
        assert_eq!(after_full(3), RETRY_FIRST * 4);
        assert_eq!(after_full(u32::MAX), RETRY_LONGEST);
    }

    fn following() -> RoleRecord {
        RoleRecord::Remote {
            backing: "host-x".into(),
            delay_us: None,
            direct: false,
            follow: true,
            replaces: None,
        }
    }

    async fn until(mut so: impl FnMut() -> bool) {
        let waiting = async {
            while !so() {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(30), waiting).await.unwrap();
    }

    #[tokio::test]
    async fn why_a_disk_cannot_follow_yet_is_shown_until_it_is_not_to() {
        let (_folder, agent) = agent();
        let record = record("disk0", Epoch(2), following());
        agent.ledger.put_device(&record).unwrap();
        let device = agent.start_device(record).await.unwrap();
        until(|| device.exchange_waits().is_some()).await;
        assert!(device.exchange_waits().unwrap().contains("cluster"), "{:?}", device.exchange_waits());
        assert!(agent.stop_following(&device).await.unwrap());
        assert!(!agent.stop_following(&device).await.unwrap());
        assert_eq!(device.exchange_waits(), None);
        assert!(matches!(device.role(), RoleRecord::Remote { follow: false, .. }));
    }

    /// Before, the device was not served at all: its guest waited until somebody restarted the agent.
    #[tokio::test]
    async fn copy_whose_file_is_gone_after_a_restart_begins_anew_and_the_guest_is_served() {
        let (folder, agent) = agent();
        let backend = BackendSpec::file(folder.path().join("gone.img"));
        let role = RoleRecord::Exchanging { backing: "host-x".into(), backend: backend.clone() };
        let record = record("disk0", Epoch(2), role);
        agent.ledger.put_device(&record).unwrap();
        let map = map_path(&agent.config, "disk0");
        std::fs::create_dir_all(map.parent().unwrap()).unwrap();
        std::fs::write(&map, b"what was here").unwrap();
        let device = agent.start_device(record).await.unwrap();
        assert_eq!(device.trouble(), None);
        assert!(!map.exists(), "it would be believed later");
        assert!(agent.config.device_socket("disk0").exists(), "a VMM can connect");
        let RoleRecord::Remote { follow: true, replaces, .. } = device.role() else {
            panic!("{:?}", device.role())
        };
        assert_eq!(replaces, backend.path);
        until(|| device.exchange_waits().is_some()).await;
    }
}
