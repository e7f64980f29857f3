//! VMs that were started by hand, and taken with `belay vm adopt`.

use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, ensure};
use belay_e2e::{BootGuest, Host, until};

use super::{in_flight, migrate, with_bed};

/// A QEMU that the test has started itself. Killed when dropped.
struct ByHand(Child);

impl Drop for ByHand {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts a VM with the guest in one sector, as somebody would who knows nothing of `belay vm run`.
fn by_hand(host: &Host, guest: &BootGuest, more: &str) -> Result<ByHand> {
    let named = std::env::var("BELAY_QEMU").ok().filter(|name| !name.is_empty());
    let socket = host.device(&guest.disk)?["socket"].as_str().context("a socket")?.to_owned();
    let folder = host.folder.display();
    let vm = &guest.vm;
    let line = format!(
        "-M pc,memory-backend=ram,vmport=off -m 32M -nodefaults -accel tcg -S \
         -object memory-backend-memfd,id=ram,size=32M,share=on -qmp unix:{folder}/own.qmp,server,nowait \
         -chardev socket,id=c,path={socket} -device vhost-user-blk-pci,id=mine,chardev=c,bootindex=0 \
         -serial file:{folder}/{vm}.serial -pidfile {folder}/{vm}.pid -display none \
         -qmp unix:{folder}/{vm}.test-qmp,server=on,wait=off {more}"
    );
    let child = Command::new(named.unwrap_or_else(|| "qemu-system-x86_64".to_owned()))
        .args(line.split_whitespace())
        .stdin(Stdio::null())
        .spawn()?;
    let by_hand = ByHand(child);
    host.qmp(vm)?.run("cont")?;
    Ok(by_hand)
}

fn own_qmp(host: &Host) -> String {
    host.folder.join("own.qmp").display().to_string()
}

#[test]
fn vm_started_by_hand_is_adopted_with_its_devices_and_migrates_there_and_back() {
    with_bed(|bed| {
        let guest = bed.a.add_boot_disk("vm", super::boot::DELAY)?;
        let mut qemu = by_hand(&bed.a, &guest, "")?;
        let adopted = bed.a.json(&["vm", "adopt", "vm", "--qmp", &own_qmp(&bed.a)])?;
        ensure!(adopted["warnings"][0].as_str().is_some_and(|text| text.contains("reconnect")), "{adopted}");
        ensure!(adopted["devices"] == serde_json::json!([guest.disk]), "{adopted}");
        ensure!(adopted["pid"] == qemu.0.id(), "{adopted}");
        let again = bed.a.json(&["vm", "adopt", "vm", "--qmp", &own_qmp(&bed.a)])?;
        ensure!(again["pid"] == qemu.0.id() && again["devices"] == adopted["devices"], "{again}");
        guest.goes_on(&bed.a, 2)?;
        let mut carried = 0;
        for (from, to) in [(&bed.a, &bed.b), (&bed.b, &bed.a)] {
            carried += in_flight(&migrate(from, to, "vm", &[])?);
            guest.goes_on(to, 4)?;
            to.wait_device(&guest.disk, "local")?;
        }
        until("the end of the QEMU that was started by hand", || Ok(qemu.0.try_wait()?))?;
        ensure!(carried > 0, "no request was in flight at either switchover");
        Ok(())
    });
}

#[test]
fn vm_with_a_disk_that_is_only_here_is_not_adopted_and_goes_on() {
    with_bed(|bed| {
        let guest = bed.a.add_boot_disk("vm", "2ms")?;
        let local = bed.a.folder.join("local.img");
        std::fs::File::create(&local)?.set_len(4 << 20)?;
        let more = format!("-drive if=virtio,format=raw,file={}", local.display());
        let _qemu = by_hand(&bed.a, &guest, &more)?;
        let command = bed.a.spawn(&["vm", "adopt", "vm", "--qmp", &own_qmp(&bed.a)])?;
        let output = command.wait()?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.code() == Some(3) && said.contains("local.img"), "{output:?}");
        guest.goes_on(&bed.a, 4)?;
        ensure!(bed.a.json(&["vm", "list"])?.as_array().is_some_and(Vec::is_empty));
        Ok(())
    });
}

#[test]
fn adopted_vm_is_known_again_after_a_restart_of_the_agent() {
    with_bed(|bed| {
        let guest = bed.a.add_boot_disk("vm", "2ms")?;
        let _qemu = by_hand(&bed.a, &guest, "")?;
        bed.a.belay(&["vm", "adopt", "vm", "--qmp", &own_qmp(&bed.a)])?;
        bed.a.kill_agent()?;
        bed.a.start_agent()?;
        let vms = bed.a.json(&["vm", "list"])?;
        ensure!(vms[0]["name"] == "vm" && vms[0]["state"] == "running", "{vms}");
        Ok(())
    });
}
