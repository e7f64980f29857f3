//! Agents that were frozen, and VMs that are resumed by mistake, when the device has moved on: they write nothing.

use anyhow::{Result, ensure};
use belay_e2e::Bed;
use belay_synthetic::Guest;

use crate::fleet::{DEPTH, Fleet, Side};
use crate::with_bed;

/// A VM at A, its disk at B or at A.
fn with_vm(test: impl FnOnce(&mut Fleet) -> Result<()>) {
    with_bed(|bed: &mut Bed| {
        let mut fleet = Fleet::new(bed);
        fleet.boot(Side::A, 2, 300, 51)?;
        fleet.run(200)?;
        test(&mut fleet)
    });
}

/// The zombie's rings are started where it was left. It gets nothing done.
fn resume(fleet: &mut Fleet, zombie: &mut Guest) -> Result<()> {
    // What had completed when it was stopped.
    zombie.reap();
    let left = fleet.vms[0].left.take();
    ensure!(left.is_some_and(|left| zombie.go_back(left)), "its VMM is still connected");
    for _ in 0..2000 {
        zombie.fill(DEPTH);
        ensure!(zombie.reap() == 0, "a request of the zombie has completed");
        fleet.run(1)?;
    }
    Ok(())
}

#[test]
fn agent_that_was_frozen_while_its_guest_went_home_writes_nothing() {
    with_vm(|fleet| {
        fleet.hand_over(0, "stay")?;
        fleet.run(100)?;
        let epoch = fleet.epoch(0)?;
        fleet.offer(0, "stay")?;
        fleet.stop(0)?;
        let mut zombie = fleet.vms[0].guest.zombie();
        fleet.leave(0);
        fleet.wait("the list at A", |fleet| {
            Ok((fleet.show(Side::A, 0)?["state"] == "coming").then_some(()))
        })?;
        fleet.host(Side::B).freeze_agent()?;
        fleet.arrive(0)?;
        fleet.moved(0, Side::A, epoch)?;
        fleet.run(500)?;
        fleet.host(Side::B).thaw_agent()?;
        resume(fleet, &mut zombie)?;
        fleet.verify()
    });
}

#[test]
fn agents_that_are_frozen_around_the_switchover_go_on_with_it() {
    with_vm(|fleet| {
        for turn in 0..4 {
            let (from, to) = (fleet.vms[0].at, fleet.vms[0].at.other());
            let epoch = fleet.epoch(0)?;
            fleet.offer(0, "stay")?;
            fleet.stop(0)?;
            // Its list may be on its way already, or not.
            let frozen = if turn < 2 { from } else { to };
            if frozen == from {
                fleet.host(frozen).freeze_agent()?;
            }
            fleet.leave(0);
            fleet.arrive(0)?;
            if frozen == to {
                fleet.host(frozen).freeze_agent()?;
            }
            fleet.linger(100);
            fleet.host(frozen).thaw_agent()?;
            fleet.moved(0, to, epoch)?;
            fleet.forget_left(0);
            fleet.run(50)?;
        }
        fleet.verify()
    });
}

#[test]
fn vm_that_is_resumed_where_it_has_left_writes_nothing() {
    with_vm(|fleet| {
        for mode in ["stay", "follow"] {
            let from = fleet.vms[0].at;
            let epoch = fleet.epoch(0)?;
            fleet.offer(0, mode)?;
            fleet.stop(0)?;
            let mut zombie = fleet.vms[0].guest.zombie();
            fleet.leave(0);
            fleet.arrive(0)?;
            fleet.moved(0, from.other(), epoch)?;
            resume(fleet, &mut zombie)?;
            fleet.verify()?;
        }
        Ok(())
    });
}

#[test]
fn agent_that_has_the_disk_is_frozen_and_its_guest_waits() {
    with_vm(|fleet| {
        fleet.hand_over(0, "stay")?;
        for rounds in [5, 50, 500, 5000] {
            fleet.run(100)?;
            fleet.host(Side::A).freeze_agent()?;
            fleet.linger(rounds);
            fleet.host(Side::A).thaw_agent()?;
        }
        fleet.run(100)?;
        fleet.verify()
    });
}
