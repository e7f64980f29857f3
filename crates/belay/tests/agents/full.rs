//! A disk that becomes full while another one is copied to it.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Result, ensure};

use crate::fleet::{Fleet, Side};
use crate::{bring_named, with_bed};

/// A file system of a few MiB; gone when dropped.
struct SmallDisk(PathBuf);

impl SmallDisk {
    /// Mounts one. `None`: only root may.
    fn mount(at: &Path, size: &str) -> Option<Self> {
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={size}"), "belay-test"])
            .arg(at)
            .output();
        mounted.is_ok_and(|output| output.status.success()).then(|| Self(at.to_owned()))
    }

    /// Takes all the room that there is.
    fn fill(&self) -> Result<PathBuf> {
        let path = self.0.join("filler");
        let mut file = std::fs::File::create(&path)?;
        let piece = [1; 4096];
        while std::io::Write::write_all(&mut file, &piece).is_ok() {}
        Ok(path)
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).output();
    }
}

#[test]
fn full_disk_stops_the_copy_and_nothing_else_and_it_goes_on_when_there_is_room() {
    with_bed(|bed| {
        let images = bed.b.images.clone();
        let Some(disk) = SmallDisk::mount(&images, "8m") else {
            println!(
                "skipped full_disk_stops_the_copy_and_nothing_else_and_it_goes_on_when_there_is_room: not root"
            );
            return Ok(());
        };
        let mut fleet = Fleet::new(bed);
        fleet.boot(Side::A, 2, 0, 41)?;
        fleet.boot(Side::B, 2, 0, 42)?;
        fleet.run(3000)?;
        fleet.hand_over(0, "stay")?;
        let folder = fleet.host(Side::B).folder.clone();
        let filler = disk.fill()?;
        let begin = |bandwidth| {
            let folder = folder.clone();
            move || bring_named(&folder, "disk0", bandwidth)
        };
        let refused = fleet.meanwhile(begin(None)).map_err(|error| error.to_string());
        ensure!(refused.as_ref().is_err_and(|error| error.contains("are free")), "{refused:?}");
        std::fs::remove_file(&filler)?;
        fleet.meanwhile(begin(Some(64 << 10)))?;
        fleet.wait("a copy under way", |fleet| {
            let device = fleet.show(Side::B, 0)?;
            Ok((device["exchange"]["local_bytes"].as_u64() > Some(0)).then_some(()))
        })?;
        let filler = disk.fill()?;
        fleet.wait("the end of the copy, and another attempt", |fleet| {
            let waits = fleet.show(Side::B, 0)?["exchange_waits"].clone();
            Ok(waits.as_str().is_some_and(|reason| reason.contains("are free")).then_some(()))
        })?;
        // The guests have noticed nothing.
        fleet.run(500)?;
        ensure!(fleet.show(Side::B, 0)?["backed_by"] == "host-a");
        let status = fleet.host(Side::B).belay(&["status"])?;
        ensure!(status.contains("remote, its copy waits: device disk0 needs"), "{status}");
        let events = fleet.host(Side::B).belay(&["events"])?;
        ensure!(events.contains("copied when there is room: No space left on device"), "{events}");
        let waiting = "belay_exchange_waiting{device=\"disk0\"}";
        let metrics = fleet.host(Side::B).belay(&["metrics"])?;
        ensure!(metrics.contains(&format!("{waiting} 1\n")), "{metrics}");
        // Nobody but time says that there is room; the limit of the copy is as it was.
        std::fs::remove_file(&filler)?;
        fleet.wait("a copy that has begun by itself", |fleet| {
            let device = fleet.show(Side::B, 0)?;
            Ok((device["exchange"]["local_bytes"].as_u64() > Some(0)).then_some(()))
        })?;
        let metrics = fleet.host(Side::B).belay(&["metrics"])?;
        ensure!(metrics.contains(&format!("{waiting} 0\n")), "{metrics}");
        fleet.meanwhile(begin(Some(1 << 30)))?;
        fleet.wait("the disk at its new host", |fleet| {
            Ok((fleet.show(Side::B, 0)?["backed_by"] == "host-b").then_some(()))
        })?;
        let device = fleet.show(Side::B, 0)?;
        ensure!(device["exchange_stopped"].is_null() && device["exchange_waits"].is_null(), "{device}");
        fleet.run(500)?;
        fleet.verify()?;
        fleet.vms[0].guest.drain();
        fleet.vms[0].guest.check_image(&std::fs::read(images.join("disk0.img"))?);
        drop(disk);
        Ok(())
    });
}
