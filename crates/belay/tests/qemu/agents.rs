//! Agents that are killed or ended under I/O: the guest sees latency, and nothing else.

use super::boot::DELAY;
use super::{migrate, with_bed};

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
