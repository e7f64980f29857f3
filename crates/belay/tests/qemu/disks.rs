//! VMs with two disks: both move, or none.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use belay_e2e::{Bed, BootGuest, Host, until};
use rustix::process::Signal;

use super::boot::DELAY;
use super::{hold_before_switchover, in_flight, migrate, with_bed};

const SECOND: &str = "second";

fn wait_both(host: &Host, guest: &BootGuest, state: &str) -> Result<()> {
    host.wait_device(&guest.disk, state)?;
    host.wait_device(SECOND, state)
}

fn run(bed: &Bed, delay: &str) -> Result<BootGuest> {
    let guest = bed.a.run_boot_guest_with_two_disks("vm", delay, SECOND)?;
    guest.goes_on(&bed.a, 8)?;
    let used = bed.a.device(SECOND)?;
    ensure!(used["written_bytes"].as_u64() > Some(0), "the guest does not use its second disk: {used}");
    Ok(guest)
}

#[test]
fn two_disks_go_there_and_back_with_requests_in_flight() {
    with_bed(|bed| {
        let guest = run(bed, DELAY)?;
        let mut carried = 0;
        for (from, to) in [(&bed.a, &bed.b), (&bed.b, &bed.a)] {
            carried += in_flight(&migrate(from, to, &guest.vm, &[])?);
            guest.goes_on(to, 6)?;
            wait_both(to, &guest, "local")?;
        }
        ensure!(carried > 0, "no request was in flight at either switchover");
        Ok(())
    });
}

#[test]
fn two_disks_that_stay_are_come_home_to() {
    with_bed(|bed| {
        let guest = run(bed, "50ms")?;
        for _ in 0..2 {
            migrate(&bed.a, &bed.b, &guest.vm, &["--mode", "stay"])?;
            guest.goes_on(&bed.b, 6)?;
            migrate(&bed.b, &bed.a, &guest.vm, &["--mode", "stay"])?;
            guest.goes_on(&bed.a, 6)?;
            wait_both(&bed.a, &guest, "local")?;
        }
        // One is brought along, the other stays; then both go back.
        migrate(&bed.a, &bed.b, &guest.vm, &["--mode", "stay"])?;
        bed.b.belay(&["exchange", SECOND, "--wait"])?;
        bed.b.wait_device(SECOND, "local")?;
        guest.goes_on(&bed.b, 6)?;
        migrate(&bed.b, &bed.a, &guest.vm, &[])?;
        guest.goes_on(&bed.a, 6)?;
        wait_both(&bed.a, &guest, "local")
    });
}

#[test]
fn two_disks_whose_migration_is_aborted_stay() {
    with_bed(|bed| {
        let guest = run(bed, DELAY)?;
        let (mut qmp, command) = hold_before_switchover(&bed.a, &bed.b, &guest.vm, &[])?;
        wait_both(&bed.a, &guest, "parked")?;
        // One of them cannot be taken out of the migration.
        let withdrawn = bed.a.spawn(&["device", "withdraw", SECOND])?.wait()?;
        ensure!(withdrawn.status.code() == Some(3), "{withdrawn:?}");
        command.signal(Signal::INT)?;
        let output = command.wait()?;
        ensure!(output.status.code() == Some(4), "{output:?}");
        wait_both(&bed.a, &guest, "local")?;
        guest.goes_on(&bed.a, 6)?;
        bed.b.wait_vm_gone(&guest.vm)?;
        until("the destination having forgotten the devices", || {
            Ok(bed.b.json(&["device", "list"])?.as_array().is_some_and(Vec::is_empty).then_some(()))
        })?;
        qmp.pause_before_switchover(false)?;
        drop(qmp);
        migrate(&bed.a, &bed.b, &guest.vm, &[])?;
        guest.goes_on(&bed.b, 4).map(drop)
    });
}

/// What happens right behind the switchover's beginning.
#[derive(Clone, Copy, Debug)]
enum Fault {
    SourceAgent,
    DestinationAgent,
    BothAgents,
    /// As soon as the source has granted a disk: the other one, if it goes home, may not be home yet.
    BothAgentsBehindTheGrant,
    Cancel,
}

/// Where the disks of a VM are that goes from host A to host B.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Disks {
    /// At A: they are handed over.
    Here,
    /// At B: the VM goes home to them.
    There,
    /// One each.
    Both,
}

/// Lets QEMU go on with the switchover, and something happen at once. Whatever comes of it, the guest goes on at one
/// of the hosts, with both disks, and can migrate again.
fn fault_behind_the_switchover(bed: &mut Bed, disks: Disks, fault: Fault) -> Result<()> {
    let guest = run(bed, "20ms")?;
    if disks != Disks::Here {
        migrate(&bed.a, &bed.b, &guest.vm, &["--mode", "stay"])?;
        if disks == Disks::Both {
            bed.b.belay(&["exchange", SECOND, "--wait"])?;
        }
        std::mem::swap(&mut bed.a, &mut bed.b);
        guest.goes_on(&bed.a, 4)?;
    }
    let grants = |host: &Host| host.log().matches("claimed it with").count();
    let granted_before = grants(&bed.a);
    let (mut qmp, command) = hold_before_switchover(&bed.a, &bed.b, &guest.vm, &["--no-wait"])?;
    qmp.continue_migration()?;
    match fault {
        Fault::SourceAgent => bed.a.kill_agent()?,
        Fault::DestinationAgent => bed.b.kill_agent()?,
        Fault::BothAgents => {
            bed.a.kill_agent()?;
            bed.b.kill_agent()?;
        }
        Fault::BothAgentsBehindTheGrant => {
            // What comes next takes the destination a few milliseconds.
            let deadline = Instant::now() + Duration::from_secs(60);
            while grants(&bed.a) == granted_before {
                ensure!(Instant::now() < deadline, "nothing is granted");
                std::thread::yield_now();
            }
            bed.b.kill_agent()?;
            bed.a.kill_agent()?;
            let home = bed.b.log().contains("its guest has come home");
            println!("the other disk was {}home already", if home { "" } else { "not " });
        }
        Fault::Cancel => drop(qmp.cancel_migration()),
    }
    drop(qmp);
    match fault {
        Fault::SourceAgent => bed.a.start_agent()?,
        Fault::DestinationAgent => bed.b.start_agent()?,
        Fault::BothAgents | Fault::BothAgentsBehindTheGrant => {
            bed.a.start_agent()?;
            bed.b.start_agent()?;
        }
        Fault::Cancel => {}
    }
    drop(command.wait()?);
    let lives = |host: &Host| host.vm_pid(&guest.vm).is_some();
    until("the VM being at one host", || Ok((lives(&bed.a) != lives(&bed.b)).then_some(())))?;
    let (here, there) = if lives(&bed.a) { (&bed.a, &bed.b) } else { (&bed.b, &bed.a) };
    println!(
        "{fault:?}, disks {disks:?}: the VM is at its {}",
        if lives(&bed.a) { "source" } else { "destination" }
    );
    guest.goes_on(here, 8)?;
    if disks == Disks::Here || lives(&bed.b) {
        wait_both(here, &guest, "local")?;
    } else {
        here.wait_device(&guest.disk, "remote")?;
    }
    ensure!(lives(here) && !lives(there), "the VM is at both hosts, or at none");
    if here.name == bed.a.name {
        bed.a.qmp(&guest.vm)?.pause_before_switchover(false)?;
    }
    // The same command while the first is still being taken back would only hear how that ends.
    until("the end of the first migration", || {
        let status = here.json(&["status"])?;
        let runs = |operation: &serde_json::Value| operation["state"] == "running";
        Ok((!status["operations"].as_array().is_some_and(|all| all.iter().any(runs))).then_some(()))
    })?;
    migrate(here, there, &guest.vm, &[])?;
    guest.goes_on(there, 8).map(drop)
}

macro_rules! faults {
    ($($name:ident: $disks:ident, $fault:ident;)*) => {$(
        #[test]
        fn $name() {
            with_bed(|bed| fault_behind_the_switchover(bed, Disks::$disks, Fault::$fault));
        }
    )*};
}

faults! {
    source_agent_killed_behind_the_switchover_leaves_both_disks_at_one_host: Here, SourceAgent;
    destination_agent_killed_behind_the_switchover_leaves_both_disks_at_one_host: Here, DestinationAgent;
    both_agents_killed_behind_the_switchover_leave_both_disks_at_one_host: Here, BothAgents;
    migration_cancelled_behind_the_switchover_leaves_both_disks_at_one_host: Here, Cancel;
    source_agent_killed_behind_the_switchover_home_leaves_both_disks_at_one_host: There, SourceAgent;
    destination_agent_killed_behind_the_switchover_home_leaves_both_disks_at_one_host: There, DestinationAgent;
    both_agents_killed_behind_the_switchover_home_leave_both_disks_at_one_host: There, BothAgents;
    migration_cancelled_behind_the_switchover_home_leaves_both_disks_at_one_host: There, Cancel;
    source_agent_killed_behind_the_switchover_with_disks_at_both_hosts: Both, SourceAgent;
    destination_agent_killed_behind_the_switchover_with_disks_at_both_hosts: Both, DestinationAgent;
    both_agents_killed_behind_the_switchover_with_disks_at_both_hosts: Both, BothAgents;
    both_agents_killed_behind_the_grant_with_disks_at_both_hosts: Both, BothAgentsBehindTheGrant;
    migration_cancelled_behind_the_switchover_with_disks_at_both_hosts: Both, Cancel;
}

#[test]
fn source_vmm_killed_before_the_switchover_leaves_the_disks_and_nothing_at_the_destination() {
    with_bed(|bed| {
        let guest = run(bed, "20ms")?;
        let (_qmp, command) = hold_before_switchover(&bed.a, &bed.b, &guest.vm, &[])?;
        bed.a.kill_vm(&guest.vm)?;
        let output = command.wait()?;
        ensure!(output.status.code() == Some(1), "{output:?}");
        wait_both(&bed.a, &guest, "local")?;
        bed.b.wait_vm_gone(&guest.vm)?;
        ensure!(bed.b.json(&["device", "list"])?.as_array().is_some_and(Vec::is_empty));
        ensure!(bed.b.json(&["vm", "list"])?.as_array().is_some_and(Vec::is_empty));
        Ok(())
    });
}

#[test]
fn source_vmm_killed_behind_the_switchover_leaves_the_disks_where_the_vm_is() {
    with_bed(|bed| {
        let guest = run(bed, "20ms")?;
        let (mut qmp, command) = hold_before_switchover(&bed.a, &bed.b, &guest.vm, &[])?;
        qmp.continue_migration()?;
        // It may have ended by itself.
        drop(bed.a.kill_vm(&guest.vm));
        let output = command.wait()?;
        if bed.b.vm_pid(&guest.vm).is_some() {
            println!("the VM has arrived");
            ensure!(output.status.success(), "{output:?}");
            guest.goes_on(&bed.b, 6)?;
            return wait_both(&bed.b, &guest, "local");
        }
        println!("the VM is lost");
        ensure!(output.status.code() == Some(1), "{output:?}");
        wait_both(&bed.a, &guest, "local")?;
        ensure!(bed.b.json(&["device", "list"])?.as_array().is_some_and(Vec::is_empty));
        Ok(())
    });
}
