//! Agents that are killed or ended under I/O: the guest sees latency, and nothing else.

use anyhow::Result;
use belay_e2e::{Bed, until};
use serde_json::json;

use super::boot::{DELAY, still_at_source};
use super::{hold_before_switchover, migrate, with_bed};

#[test]
fn killed_agent_comes_back_to_a_guest_that_only_waited() {
    with_bed(|bed| {
        let guest = bed.a.run_boot_guest("vm", DELAY)?;
        for _ in 0..3 {
            guest.goes_on(&bed.a, 3)?;
            bed.a.wait_in_flight(&guest.disk, 1)?;
            bed.a.kill_agent()?;
            bed.a.start_agent()?;
        }
        guest.goes_on(&bed.a, 4)?;
        migrate(&bed.a, &bed.b, &guest.vm, &[])?;
        guest.goes_on(&bed.b, 4).map(drop)
    });
}

#[test]
fn terminated_agent_leaves_the_vm_alone_and_comes_back_to_it() {
    with_bed(|bed| {
        let guest = bed.a.run_boot_guest("vm", DELAY)?;
        for _ in 0..2 {
            guest.goes_on(&bed.a, 3)?;
            bed.a.wait_in_flight(&guest.disk, 1)?;
            bed.a.terminate_agent()?;
            anyhow::ensure!(bed.a.vm_pid(&guest.vm).is_some(), "the VM ended with the agent");
            bed.a.start_agent()?;
        }
        guest.goes_on(&bed.a, 4)?;
        migrate(&bed.a, &bed.b, &guest.vm, &[])?;
        guest.goes_on(&bed.b, 4).map(drop)
    });
}

#[test]
fn killed_agents_of_a_remote_guest_come_back_and_nothing_is_lost() {
    with_bed(|bed| {
        let guest = bed.a.run_boot_guest("vm", "50ms")?;
        guest.goes_on(&bed.a, 4)?;
        migrate(&bed.a, &bed.b, &guest.vm, &["--mode", "stay"])?;
        for round in 0..6 {
            guest.goes_on(&bed.b, 4)?;
            bed.b.wait_in_flight(&guest.disk, 1)?;
            if round % 3 != 0 {
                bed.a.kill_agent()?;
            }
            if round % 3 != 1 {
                bed.b.kill_agent()?;
                bed.b.start_agent()?;
            }
            if round % 3 != 0 {
                bed.a.start_agent()?;
            }
        }
        guest.goes_on(&bed.b, 6)?;
        // Its disk can still follow it.
        bed.b.belay(&["exchange", &guest.disk, "--wait"])?;
        bed.b.wait_device(&guest.disk, "local")?;
        guest.goes_on(&bed.b, 4).map(drop)
    });
}

#[test]
fn agents_killed_while_the_disk_is_copied_go_on_with_the_copy() {
    with_bed(|bed| {
        let guest = bed.a.run_boot_guest("vm", "20ms")?;
        guest.goes_on(&bed.a, 70)?;
        // Slow enough to be met in the middle.
        bed.b.configure("[exchange]\nbandwidth_bytes_per_s = 100000\nin_flight_bytes = 4096\n")?;
        bed.b.kill_agent()?;
        bed.b.start_agent()?;
        let id = bed.a.json(&["migrate", &guest.vm, bed.b.name, "--no-wait"])?["id"].clone();
        bed.a.wait_operation(id.as_str().unwrap_or_default())?;
        for round in 0..3 {
            guest.goes_on(&bed.b, 4)?;
            bed.b.wait_copying(&guest.disk)?;
            bed.b.wait_in_flight(&guest.disk, 1)?;
            if round != 1 {
                bed.b.kill_agent()?;
                bed.b.start_agent()?;
            }
            if round != 0 {
                bed.a.kill_agent()?;
                bed.a.start_agent()?;
            }
        }
        guest.goes_on(&bed.b, 4)?;
        bed.b.belay(&["exchange", &guest.disk, "--bandwidth", "100M"])?;
        bed.b.wait_device(&guest.disk, "local")?;
        guest.goes_on(&bed.b, 130).map(drop)
    });
}

#[test]
fn limit_of_a_copy_is_kept_when_its_agent_is_killed() {
    with_bed(|bed| {
        let guest = bed.a.run_boot_guest("vm", "20ms")?;
        bed.b.configure("[exchange]\nin_flight_bytes = 4096\n")?;
        bed.b.terminate_agent()?;
        bed.b.start_agent()?;
        migrate(&bed.a, &bed.b, &guest.vm, &["--mode", "stay"])?;
        // At once: the guest may have come just now. 2 MiB would take half an hour.
        bed.b.belay(&["exchange", &guest.disk, "--bandwidth", "1K"])?;
        for limit in ["1K", "2K"] {
            bed.b.belay(&["exchange", &guest.disk, "--bandwidth", limit])?;
            bed.b.kill_agent()?;
            bed.b.start_agent()?;
            bed.b.wait_copying(&guest.disk)?;
            guest.goes_on(&bed.b, 40)?;
            bed.b.wait_copying(&guest.disk)?;
        }
        bed.b.belay(&["exchange", &guest.disk, "--bandwidth", "100M"])?;
        bed.b.wait_device(&guest.disk, "local")?;
        guest.goes_on(&bed.b, 4).map(drop)
    });
}

/// Where a migration stands when an agent is killed.
#[derive(Clone, Copy, Debug)]
enum Moment {
    /// Memory is on its way.
    Memory,
    /// The rings have stopped.
    PreSwitchover,
}

/// Kills an agent while the VM migrates, starts it again, and lets the migration end as it will: the guest must go
/// on, on one of the hosts, and be able to migrate again.
fn agent_killed_while_migrating(bed: &mut Bed, source: bool, moment: Moment) -> Result<()> {
    let guest = bed.a.run_boot_guest("vm", "50ms")?;
    guest.goes_on(&bed.a, 2)?;
    let mut qmp = bed.a.qmp(&guest.vm)?;
    let mut arguments = vec!["migrate", &guest.vm, bed.b.name];
    match moment {
        Moment::Memory => arguments.extend(["--bandwidth", "20K"]),
        Moment::PreSwitchover => qmp.pause_before_switchover(true)?,
    }
    let command = bed.a.spawn(&arguments)?;
    match moment {
        Moment::Memory => until("memory on its way", || Ok((qmp.migration()? == "active").then_some(())))?,
        Moment::PreSwitchover => qmp.wait_pre_switchover()?,
    }
    let host = if source { &mut bed.a } else { &mut bed.b };
    host.kill_agent()?;
    host.start_agent()?;
    // Whoever has not given the migration up yet goes on with it.
    let _ = match moment {
        Moment::Memory => {
            qmp.execute("migrate-set-parameters", &json!({ "max-bandwidth": 1u64 << 30 })).map(drop)
        }
        Moment::PreSwitchover => qmp.continue_migration(),
    };
    let before = [&bed.a, &bed.b].map(|host| guest.counts(host));
    let (before_a, before_b) = match before {
        [Ok(a), Ok(b)] => (a.written + a.read, b.written + b.read),
        [a, b] => return a.and(b).map(drop),
    };
    let said = command.wait()?;
    let at_a = until("the guest going on", || {
        let (a, b) = (guest.counts(&bed.a)?, guest.counts(&bed.b)?);
        let (a, b) = (a.written + a.read, b.written + b.read);
        Ok((a >= before_a + 20 || b >= before_b + 20).then_some(a >= before_a + 20))
    })?;
    drop(qmp);
    if source {
        // The command has followed it to its end, over the restart, and says where the VM is.
        anyhow::ensure!(said.status.success() != at_a, "at host-a: {at_a}, {said:?}");
        let text = String::from_utf8_lossy(&said.stderr);
        anyhow::ensure!(!at_a || text.contains("the agent was restarted during the migration"), "{said:?}");
    }
    let (from, to) = if at_a { (&bed.a, &bed.b) } else { (&bed.b, &bed.a) };
    from.wait_device(&guest.disk, "local")?;
    until("the other host having let go", || Ok(to.vm_pid(&guest.vm).is_none().then_some(())))?;
    if at_a {
        bed.a.qmp(&guest.vm)?.pause_before_switchover(false)?;
    }
    migrate(from, to, &guest.vm, &[])?;
    guest.goes_on(to, 4).map(drop)
}

#[test]
fn source_agent_killed_while_memory_moves_leaves_a_guest_that_goes_on() {
    with_bed(|bed| agent_killed_while_migrating(bed, true, Moment::Memory));
}

#[test]
fn source_agent_killed_before_the_switchover_leaves_a_guest_that_goes_on() {
    with_bed(|bed| agent_killed_while_migrating(bed, true, Moment::PreSwitchover));
}

#[test]
fn destination_agent_killed_while_memory_moves_leaves_a_guest_that_goes_on() {
    with_bed(|bed| agent_killed_while_migrating(bed, false, Moment::Memory));
}

#[test]
fn destination_agent_killed_before_the_switchover_leaves_a_guest_that_goes_on() {
    with_bed(|bed| agent_killed_while_migrating(bed, false, Moment::PreSwitchover));
}

/// QEMU does not notice that its disk's agent has gone away while it is paused.
#[test]
fn vm_that_is_paused_while_its_agent_is_killed_goes_on() {
    with_bed(|bed| {
        let guest = bed.a.run_boot_guest("vm", "20ms")?;
        for restart_first in [true, false] {
            guest.goes_on(&bed.a, 4)?;
            let mut qmp = bed.a.qmp(&guest.vm)?;
            qmp.run("stop")?;
            bed.a.kill_agent()?;
            if restart_first {
                bed.a.start_agent()?;
                until("the VM's connection", || {
                    Ok((bed.a.device(&guest.disk)?["vmm_connected"] == true).then_some(()))
                })?;
            }
            qmp.run("cont")?;
            if !restart_first {
                bed.a.start_agent()?;
            }
            drop(qmp);
            guest.goes_on(&bed.a, 4)?;
        }
        migrate(&bed.a, &bed.b, &guest.vm, &[])?;
        guest.goes_on(&bed.b, 4).map(drop)
    });
}

#[test]
fn destination_agent_that_was_away_when_the_migration_was_taken_back_does_not_wait_for_the_vm() {
    with_bed(|bed| {
        let guest = bed.a.run_boot_guest("vm", "20ms")?;
        guest.goes_on(&bed.a, 2)?;
        let (_qmp, command) = hold_before_switchover(&bed.a, &bed.b, &guest.vm, &[])?;
        bed.b.kill_agent()?;
        let output = command.wait()?;
        anyhow::ensure!(!output.status.success(), "{output:?}");
        guest.goes_on(&bed.a, 4)?;
        bed.b.start_agent()?;
        still_at_source(bed, &guest)
    });
}
