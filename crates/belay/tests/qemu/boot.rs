//! Migrations of the guest in one sector.

use anyhow::{Result, ensure};
use belay_e2e::{Background, Bed, BootGuest, Host, until};
use rustix::process::Signal;

use super::{hold_before_switchover, in_flight, migrate, with_bed};

/// So long does each request take: far longer than the guest's own work between two of them, so that nearly always
/// one is in flight.
pub(crate) const DELAY: &str = "200ms";

#[test]
fn request_in_flight_at_the_switchover_completes_at_the_destination_and_back_home() {
    with_bed(|bed| {
        let guest = bed.a.run_boot_guest("vm", DELAY)?;
        guest.goes_on(&bed.a, 2)?;
        let mut carried = 0;
        for (from, to) in [(&bed.a, &bed.b), (&bed.b, &bed.a)] {
            let operation = migrate(from, to, &guest.vm, &[])?;
            carried += in_flight(&operation);
            guest.goes_on(to, 4)?;
            to.wait_device(&guest.disk, "local")?;
        }
        // Once in a hundred times a leg catches the guest between two requests, but not both legs.
        ensure!(carried > 0, "no request was in flight at either switchover");
        Ok(())
    });
}

#[test]
fn migration_aborted_before_the_switchover_leaves_the_guest_and_its_request_at_the_source() {
    with_bed(|bed| {
        let guest = bed.a.run_boot_guest("vm", DELAY)?;
        guest.goes_on(&bed.a, 2)?;
        let (mut qmp, command) = hold_before_switchover(&bed.a, &bed.b, &guest.vm, &[])?;
        // The rings have stopped: the guest's request is on the list that the other host has.
        bed.a.wait_device(&guest.disk, "parked")?;
        command.signal(Signal::INT)?;
        taken_back(bed, &guest, command)?;
        // Nothing of the attempt stands in the way of the next one.
        qmp.pause_before_switchover(false)?;
        drop(qmp);
        migrate(&bed.a, &bed.b, &guest.vm, &[])?;
        guest.goes_on(&bed.b, 4).map(drop)
    });
}

#[test]
fn migration_aborted_while_memory_moves_leaves_the_guest_at_the_source() {
    with_bed(|bed| {
        let guest = bed.a.run_boot_guest("vm", "20ms")?;
        guest.goes_on(&bed.a, 2)?;
        // So slow that it cannot end by itself.
        let command = bed.a.spawn(&["migrate", &guest.vm, bed.b.name, "--bandwidth", "20K"])?;
        wait_memory(bed, &guest)?;
        command.signal(Signal::INT)?;
        taken_back(bed, &guest, command)?;
        migrate(&bed.a, &bed.b, &guest.vm, &[])?;
        guest.goes_on(&bed.b, 4).map(drop)
    });
}

/// The command says that the migration was taken back; the guest goes on at the source, the destination is clean.
fn taken_back(bed: &Bed, guest: &BootGuest, command: Background) -> Result<()> {
    let output = command.wait()?;
    ensure!(output.status.code() == Some(4), "{output:?}");
    still_at_source(bed, guest)
}

pub(crate) fn still_at_source(bed: &Bed, guest: &BootGuest) -> Result<()> {
    bed.a.wait_device(&guest.disk, "local")?;
    guest.goes_on(&bed.a, 6)?;
    bed.b.wait_vm_gone(&guest.vm)?;
    until("the destination having forgotten the device", || {
        Ok(bed.b.json(&["device", "list"])?.as_array().is_some_and(Vec::is_empty).then_some(()))
    })
}

/// Waits until memory is on its way.
fn wait_memory(bed: &Bed, guest: &BootGuest) -> Result<()> {
    let mut qmp = bed.a.qmp(&guest.vm)?;
    until("memory on its way", || Ok((qmp.migration()? == "active").then_some(())))
}

#[test]
fn destination_vmm_killed_before_the_switchover_leaves_the_guest_at_the_source() {
    with_bed(|bed| {
        let guest = bed.a.run_boot_guest("vm", DELAY)?;
        guest.goes_on(&bed.a, 2)?;
        let (mut qmp, command) = hold_before_switchover(&bed.a, &bed.b, &guest.vm, &[])?;
        bed.b.kill_vm(&guest.vm)?;
        qmp.continue_migration()?;
        let output = command.wait()?;
        ensure!(output.status.code() == Some(1), "{output:?}");
        still_at_source(bed, &guest)
    });
}

#[test]
fn destination_vmm_killed_while_memory_moves_leaves_the_guest_at_the_source() {
    with_bed(|bed| {
        let guest = bed.a.run_boot_guest("vm", "20ms")?;
        guest.goes_on(&bed.a, 2)?;
        let command = bed.a.spawn(&["migrate", &guest.vm, bed.b.name, "--bandwidth", "20K"])?;
        wait_memory(bed, &guest)?;
        bed.b.kill_vm(&guest.vm)?;
        let output = command.wait()?;
        ensure!(output.status.code() == Some(1), "{output:?}");
        still_at_source(bed, &guest)?;
        migrate(&bed.a, &bed.b, &guest.vm, &[])?;
        guest.goes_on(&bed.b, 4).map(drop)
    });
}

#[test]
fn accelerator_is_chosen_where_the_vm_starts_and_not_tried_again_while_it_migrates() {
    with_bed(|bed| {
        let guest = bed.a.run_boot_guest_with("vm", "2ms", "accel = \"auto\"")?;
        if bed.a.log().contains("started, kvm,") {
            // Where KVM half works, a trial may succeed on one host and time out on the other.
            belay_e2e::skip("KVM runs a guest in one sector here");
            return Ok(());
        }
        guest.goes_on(&bed.a, 2)?;
        migrate(&bed.a, &bed.b, &guest.vm, &[])?;
        guest.goes_on(&bed.b, 4)?;
        let chosen =
            |host: &Host| ["kvm", "tcg"].map(|name| host.log().contains(&format!("started, {name},")));
        ensure!(chosen(&bed.a) == chosen(&bed.b), "another accelerator");
        ensure!(
            !bed.b.log().contains("no KVM"),
            "the destination has tried KVM for a guest that runs with TCG"
        );
        Ok(())
    });
}

#[test]
fn copy_that_a_device_has_left_behind_is_not_taken_for_it_unless_it_is_forgotten() {
    with_bed(|bed| {
        let guest = bed.a.run_boot_guest("vm", "2ms")?;
        ensure!(bed.a.device(&guest.disk)?["vm"] == "vm");
        guest.goes_on(&bed.a, 2)?;
        migrate(&bed.a, &bed.b, &guest.vm, &[])?;
        bed.b.wait_device(&guest.disk, "local")?;
        let left = bed.a.images.join(format!("{}-original.img", guest.disk)).display().to_string();
        let other = bed.a.images.join("other.img").display().to_string();
        for line in [
            &["device", "add", "fresh", "--path", &left][..],
            &["device", "add", &guest.disk, "--path", &other, "--size", "1M"],
        ] {
            let output = bed.a.spawn(line)?.wait()?;
            let said = String::from_utf8_lossy(&output.stderr);
            ensure!(output.status.code() == Some(3) && said.contains("moved to host-b"), "{line:?}: {said}");
        }
        bed.a.belay(&["device", "remove", &guest.disk])?;
        bed.a.belay(&["device", "add", "fresh", "--path", &left])?;
        guest.goes_on(&bed.b, 4).map(drop)
    });
}

#[test]
fn device_that_is_still_on_its_way_is_not_forgotten_where_its_data_is() {
    with_bed(|bed| {
        let guest = bed.a.run_boot_guest("vm", "2ms")?;
        guest.goes_on(&bed.a, 2)?;
        migrate(&bed.a, &bed.b, &guest.vm, &["--mode", "stay"])?;
        let output = bed.a.spawn(&["device", "remove", &guest.disk])?.wait()?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(
            output.status.code() == Some(3) && said.contains("is at host-b, and its data here"),
            "{said}"
        );
        guest.goes_on(&bed.b, 4).map(drop)
    });
}

#[test]
fn vm_of_an_unprivileged_user_has_its_disk_again_after_a_restart_of_the_agent_and_migrates() {
    if !rustix::process::geteuid().is_root() {
        belay_e2e::skip("only root can let QEMU run as another user");
        return;
    }
    with_bed(|bed| {
        for host in [&mut bed.a, &mut bed.b] {
            host.configure("[vmm]\nuser = \"nobody\"\n")?;
            host.terminate_agent()?;
            host.start_agent()?;
        }
        let guest = bed.a.run_boot_guest("vm", "2ms")?;
        guest.goes_on(&bed.a, 2)?;
        let uid = |host: &Host| -> Result<String> {
            let status = std::fs::read_to_string(format!("/proc/{}/status", host.vm_pid("vm").unwrap_or(0)))?;
            Ok(status.lines().find(|line| line.starts_with("Uid:")).unwrap_or_default().to_owned())
        };
        ensure!(!uid(&bed.a)?.contains("\t0"), "{}", uid(&bed.a)?);
        bed.a.kill_agent()?;
        bed.a.start_agent()?;
        guest.goes_on(&bed.a, 6)?;
        migrate(&bed.a, &bed.b, &guest.vm, &[])?;
        ensure!(!uid(&bed.b)?.contains("\t0"), "{}", uid(&bed.b)?);
        bed.b.terminate_agent()?;
        bed.b.start_agent()?;
        guest.goes_on(&bed.b, 6)?;
        bed.b.belay(&["vm", "stop", "vm"]).map(drop)
    });
}

#[test]
fn disk_that_grows_under_a_running_vm_keeps_its_size_where_the_vm_goes() {
    with_bed(|bed| {
        let guest = bed.a.run_boot_guest("vm", "20ms")?;
        guest.goes_on(&bed.a, 2)?;
        bed.a.belay(&["device", "resize", &guest.disk, "6M"])?;
        guest.goes_on(&bed.a, 6)?;
        migrate(&bed.a, &bed.b, &guest.vm, &[])?;
        guest.goes_on(&bed.b, 6)?;
        bed.b.wait_device(&guest.disk, "local")?;
        ensure!(bed.b.device(&guest.disk)?["size_bytes"] == 6 << 20, "another size at the destination");
        bed.b.belay(&["device", "resize", &guest.disk, "8M"])?;
        guest.goes_on(&bed.b, 6).map(drop)
    });
}
