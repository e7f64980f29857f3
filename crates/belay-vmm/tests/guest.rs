//! The Linux guest of the tests and the demonstration, on QEMU's own virtio-blk: that it boots, does verified I/O
//! and obeys is the ground that everything else stands on.
//!
//! Needs QEMU and the guest that `scripts/guest-image` makes (`.cache/guest`, or where `BELAY_GUEST` says).

use belay_probe::disk;
use belay_vmm::Qemu;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};

const LIMIT: Duration = Duration::from_secs(120);
const REGION_MIB: u64 = 8;

/// QEMU and the guest's directory, or the printed reason why the test is skipped.
async fn prepared() -> Option<(Qemu, PathBuf)> {
    let dir = std::env::var_os("BELAY_GUEST")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../../.cache/guest"), PathBuf::from);
    if !dir.join("initrd.img").is_file() {
        belay_e2e::skip(format!("no guest in {}; run scripts/guest-image", dir.display()));
        return None;
    }
    match Qemu::find(None).await {
        Ok(qemu) => Some((qemu, dir)),
        Err(reason) => {
            belay_e2e::skip(reason);
            None
        }
    }
}

/// A running guest and its console.
struct Guest {
    qemu: Child,
    commands: ChildStdin,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Guest {
    fn boot(qemu: &Qemu, guest: &Path, image: &Path, probe: &str) -> Self {
        let mut qemu = Command::new(&qemu.path)
            .args([
                "-accel",
                "tcg",
                "-machine",
                "q35",
                "-m",
                "256",
                "-smp",
                "2",
                "-nodefaults",
                "-no-user-config",
            ])
            .args(["-display", "none", "-no-reboot", "-serial", "stdio"])
            .arg("-kernel")
            .arg(guest.join("vmlinuz"))
            .arg("-initrd")
            .arg(guest.join("initrd.img"))
            .args(["-append", &format!("console=ttyS0 quiet panic=-1 belay.probe=\"{probe}\"")])
            .arg("-drive")
            .arg(format!("if=virtio,format=raw,file={}", image.display()))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let commands = qemu.stdin.take().unwrap();
        let lines = BufReader::new(qemu.stdout.take().unwrap()).lines();
        Self { qemu, commands, lines }
    }

    /// Waits for a line that has this key, and returns its value there. Other lines must not tell of trouble.
    async fn wait_for(&mut self, key: &str) -> Value {
        let found = async {
            loop {
                let line = self.lines.next_line().await.unwrap().expect("the guest still talks");
                let Ok(Value::Object(mut line)) = serde_json::from_str(&line) else { continue };
                for trouble in ["fatal", "error", "mismatch", "module_not_loaded", "unknown_command"] {
                    assert!(!line.contains_key(trouble), "{line:?}");
                }
                if let Some(value) = line.remove(key) {
                    return value;
                }
            }
        };
        tokio::time::timeout(LIMIT, found).await.unwrap_or_else(|_| panic!("no {key} from the guest"))
    }

    async fn command(&mut self, command: &str) {
        self.commands.write_all(format!("{command}\n").as_bytes()).await.unwrap();
    }

    /// Load, verification, power-off; returns the last report.
    async fn exercise(mut self) -> Value {
        self.wait_for("ready").await;
        // A few intervals of load.
        for _ in 0..5 {
            let ops = self.wait_for("ops").await;
            assert!(ops.is_u64());
        }
        self.command("verify").await;
        let verified = self.wait_for("verified").await;
        assert_eq!((verified["errors"].as_u64(), verified["mismatches"].as_u64()), (Some(0), Some(0)));
        self.command("poweroff").await;
        let end = self.wait_for("end").await;
        assert_eq!(self.wait_for("exit").await, 0);
        let status =
            tokio::time::timeout(LIMIT, self.qemu.wait()).await.expect("the guest powers off").unwrap();
        assert!(status.success(), "{status}");
        assert!(end["ops"].as_u64().unwrap() > 0, "{end}");
        assert_eq!((end["guest_resets"].as_u64(), end["inflight"].as_u64()), (Some(0), Some(0)), "{end}");
        end
    }
}

#[tokio::test]
async fn linux_guest_does_verified_disk_io() {
    let Some((qemu, guest)) = prepared().await else { return };
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("disk.img");
    std::fs::File::create(&image).unwrap().set_len(32 << 20).unwrap();
    disk::prepare_image(&image, 1 << 20, REGION_MIB << 20).unwrap();
    let probe = format!("--threads 8 --prepared --offset-mib 1 --region-mib {REGION_MIB}");
    let end = Guest::boot(&qemu, &guest, &image, &probe).exercise().await;
    assert!(end["writes"].as_u64().unwrap() > 0 && end["reads"].as_u64().unwrap() > 0, "{end}");
    // What the guest verified is what is in the image.
    assert_eq!(disk::check_image(&image, 1 << 20, REGION_MIB << 20).unwrap(), (REGION_MIB * 256, 0));
}

#[tokio::test]
async fn linux_guest_does_verified_io_on_ext4() {
    let Some((qemu, guest)) = prepared().await else { return };
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("disk.img");
    std::fs::File::create(&image).unwrap().set_len(64 << 20).unwrap();
    let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
    let made = std::process::Command::new("mkfs.ext4").env("PATH", path).arg("-q").arg(&image).status();
    if !made.is_ok_and(|status| status.success()) {
        belay_e2e::skip("no mkfs.ext4; run scripts/setup");
        return;
    }
    Guest::boot(&qemu, &guest, &image, "files /mnt --threads 4 --files 16").exercise().await;
}
