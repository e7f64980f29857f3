//! A Linux guest: many requests at a time, several queues, a file system, a driver that comes and goes.

use anyhow::{Result, bail, ensure};
use belay_e2e::{Background, Bed, Host, LinuxGuest, LinuxOptions, Qmp, until};
use rustix::process::Signal;
use serde_json::json;

use super::{in_flight, migrate, with_bed};

/// Round trips within which requests have to be in flight.
const TRIES: usize = 6;

/// Runs a test with a Linux guest on the first host, its load under way.
fn with_linux(options: LinuxOptions, test: impl FnOnce(&mut Bed, &LinuxGuest) -> Result<()>) {
    if let Err(reason) = belay_e2e::linux_guest() {
        belay_e2e::skip(reason);
        return;
    }
    with_bed(|bed| {
        let guest = bed.a.run_linux_guest("vm", &options)?;
        guest.wait_from(0, "ready")?;
        test(bed, &guest)
    });
}

/// Migrates and follows the guest's console; returns how many requests were carried over.
fn follow(guest: &LinuxGuest, from: &Host, to: &Host) -> Result<u64> {
    let operation = migrate(from, to, &guest.vm, &[])?;
    guest.moved_to(to)?;
    guest.goes_on(200)?;
    to.wait_device(&guest.disk, "local")?;
    guest.verify()?;
    Ok(in_flight(&operation))
}

/// Migrates there and back, until at least so many requests were in flight at a switchover each way: how many are
/// depends on how much the guest gets to run just then.
fn there_and_back(bed: &Bed, guest: &LinuxGuest, at_least: u64) -> Result<()> {
    let (mut there, mut back) = (0, 0);
    for _ in 0..TRIES {
        there = there.max(follow(guest, &bed.a, &bed.b)?);
        back = back.max(follow(guest, &bed.b, &bed.a)?);
        if there.min(back) >= at_least {
            return Ok(());
        }
    }
    bail!("only {there} and {back} requests were in flight at the switchovers")
}

#[test]
fn files_of_a_busy_guest_are_right_there_and_back_home() {
    let load = "files /mnt --files 24 --threads 8".to_owned();
    with_linux(
        LinuxOptions { load, ext4: true, delay: "60ms".into(), ..LinuxOptions::default() },
        |bed, guest| {
            there_and_back(bed, guest, 1)?;
            let mark = guest.mark();
            guest.send("poweroff")?;
            ensure!(guest.wait_from(mark, "exit")? == 0, "the probe found something wrong");
            bed.a.wait_vm_gone(&guest.vm)?;
            check_ext4(&bed.a, &guest.disk)
        },
    );
}

/// The file system on the host's image is as a file system should be.
fn check_ext4(host: &Host, disk: &str) -> Result<()> {
    let image = host.images.join(format!("{disk}.img"));
    let output = std::process::Command::new("/sbin/e2fsck").args(["-f", "-n"]).arg(&image).output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    Ok(())
}

#[test]
fn four_queues_with_requests_in_flight_move_and_outlive_a_killed_agent() {
    let options = LinuxOptions { cpus: 4, delay: "50ms".into(), ..LinuxOptions::default() };
    with_linux(options, |bed, guest| {
        there_and_back(bed, guest, 4)?;
        for _ in 0..2 {
            bed.a.wait_in_flight(&guest.disk, 4)?;
            bed.a.kill_agent()?;
            bed.a.start_agent()?;
            guest.goes_on(200)?;
        }
        let mut qmp = bed.a.qmp(&guest.vm)?;
        for _ in 0..3 {
            bed.a.wait_in_flight(&guest.disk, 4)?;
            qmp.run("stop")?;
            qmp.run("cont")?;
            guest.goes_on(50)?;
        }
        guest.verify()
    });
}

/// So slow that most of them are still in flight when somebody looks; so few blocks that all can be checked often.
fn many_slow_requests() -> LinuxOptions {
    let load = "--region-mib 4 --threads 16".to_owned();
    LinuxOptions { cpus: 2, delay: "200ms".into(), load, ..LinuxOptions::default() }
}

/// Begins a migration and stops it before the switchover: the rings have stopped, and the guest's requests are on the
/// list that the other host has. `end` ends the attempt. Tried again until enough requests were in flight just then.
fn attempts(
    bed: &Bed,
    guest: &LinuxGuest,
    code: i32,
    end: impl Fn(&mut Qmp, &Background) -> Result<()>,
) -> Result<()> {
    let mut qmp = bed.a.qmp(&guest.vm)?;
    let mut most = 0;
    for _ in 0..TRIES {
        bed.a.wait_in_flight(&guest.disk, 4)?;
        qmp.pause_before_switchover(true)?;
        let command = bed.a.spawn(&["migrate", &guest.vm, bed.b.name])?;
        qmp.wait_pre_switchover()?;
        bed.a.wait_device(&guest.disk, "parked")?;
        most = most.max(bed.a.device(&guest.disk)?["in_flight"].as_u64().unwrap_or(0));
        end(&mut qmp, &command)?;
        let output = command.wait()?;
        ensure!(output.status.code() == Some(code), "{output:?}");
        bed.a.wait_device(&guest.disk, "local")?;
        guest.goes_on(100)?;
        guest.verify()?;
        bed.b.wait_vm_gone(&guest.vm)?;
        until("the destination having forgotten the device", || {
            Ok(bed.b.json(&["device", "list"])?.as_array().is_some_and(Vec::is_empty).then_some(()))
        })?;
        if most >= 4 {
            break;
        }
    }
    ensure!(most >= 4, "only {most} requests were in flight before the switchovers");
    // Nothing of the attempts stands in the way of the next migration.
    qmp.pause_before_switchover(false)?;
    drop(qmp);
    there_and_back(bed, guest, 1)
}

#[test]
fn many_requests_in_flight_stay_at_the_source_if_the_migration_is_aborted_before_the_switchover() {
    with_linux(many_slow_requests(), |bed, guest| {
        attempts(bed, guest, 4, |_, command| command.signal(Signal::INT))
    });
}

#[test]
fn many_requests_in_flight_stay_at_the_source_if_the_destination_vmm_dies_before_the_switchover() {
    with_linux(many_slow_requests(), |bed, guest| {
        attempts(bed, guest, 1, |qmp, _| {
            bed.b.kill_vm(&guest.vm)?;
            qmp.continue_migration()
        })
    });
}

#[test]
fn eight_queues_with_requests_in_flight_move_there_and_back() {
    // One queue for each CPU, more CPUs than this machine has.
    let options = LinuxOptions { cpus: 8, delay: "50ms".into(), ..LinuxOptions::default() };
    with_linux(options, |bed, guest| there_and_back(bed, guest, 1));
}

#[test]
fn killed_agents_of_a_remote_linux_guest_lose_nothing_of_many_requests() {
    let options = LinuxOptions { cpus: 2, delay: "10ms".into(), ..LinuxOptions::default() };
    with_linux(options, |bed, guest| {
        guest.goes_on(50)?;
        migrate(&bed.a, &bed.b, &guest.vm, &["--mode", "stay"])?;
        guest.moved_to(&bed.b)?;
        for round in 0..4 {
            guest.goes_on(200)?;
            bed.b.wait_in_flight(&guest.disk, 4)?;
            let host = if round % 2 == 0 { &mut bed.a } else { &mut bed.b };
            host.kill_agent()?;
            host.start_agent()?;
        }
        guest.goes_on(200)?;
        guest.verify()?;
        // The disk follows, slowly; both agents are killed under way.
        bed.b.configure("[exchange]\nbandwidth_bytes_per_s = 1000000\nin_flight_bytes = 65536\n")?;
        bed.b.terminate_agent()?;
        bed.b.start_agent()?;
        bed.b.belay(&["exchange", &guest.disk])?;
        for _ in 0..2 {
            bed.b.wait_copying(&guest.disk)?;
            bed.b.kill_agent()?;
            bed.a.kill_agent()?;
            bed.b.start_agent()?;
            bed.a.start_agent()?;
            guest.goes_on(200)?;
        }
        bed.b.belay(&["exchange", &guest.disk, "--bandwidth", "1G"])?;
        bed.b.wait_device(&guest.disk, "local")?;
        guest.goes_on(200)?;
        guest.verify()
    });
}

#[test]
fn linux_that_reboots_with_requests_in_flight_finds_nothing_of_before_in_its_rings() {
    let options =
        LinuxOptions { delay: "30ms".into(), append: "belay.rebind".into(), ..LinuxOptions::default() };
    with_linux(options, |bed, guest| {
        let mut qmp = bed.a.qmp(&guest.vm)?;
        for hard in [false, true] {
            bed.a.wait_in_flight(&guest.disk, 4)?;
            let mark = guest.mark();
            if hard {
                qmp.run("system_reset")?
            } else {
                guest.send("reboot")?
            }
            guest.wait_from(mark, "ready")?;
            guest.goes_on(100)?;
            guest.verify()?;
        }
        // Then its driver is unloaded and loaded, with I/O before and after.
        let mark = guest.mark();
        guest.send("poweroff")?;
        guest.wait_from(mark, "rebound")?;
        guest.wait_from(mark, "prepared")?;
        guest.goes_on(100)?;
        there_and_back(bed, guest, 1)
    });
}

/// Writes a block at the first host with such a delay, and again at the second. Whether the older write was still in
/// flight then; whatever was, the newer one must be found.
fn older_write_meets_newer_one(delay: &str) -> bool {
    // Nothing is said of a test that is skipped.
    let mut met = true;
    let options = LinuxOptions {
        delay: delay.to_owned(),
        load: "--region-mib 1 --threads 16".into(),
        ..LinuxOptions::default()
    };
    with_linux(options, |bed, guest| {
        // Without the load there is nothing in flight but the two writes.
        guest.ask("stop", "stopped")?;
        let mut qmp = bed.a.qmp(&guest.vm)?;
        let _command =
            bed.a.spawn(&["migrate", &guest.vm, bed.b.name, "--mode", "stay", "--bandwidth", "2M"])?;
        until("memory on its way", || Ok((qmp.migration()? == "active").then_some(())))?;
        guest.ask("older", "older")?;
        bed.a.wait_in_flight(&guest.disk, 1)?;
        qmp.execute("migrate-set-parameters", &json!({ "max-bandwidth": 4u64 << 30 }))?;
        guest.moved_to(&bed.b)?;
        let race = guest.ask("newer", "race")?;
        ensure!(race["found"] == "newer", "{race}");
        met = race["older_in_flight"] == true;
        Ok(())
    });
    met
}

#[test]
fn write_that_the_guest_repeats_at_the_destination_wins_over_its_older_one_at_the_source() {
    // The older write has to last longer than the migration, which takes as long as it takes.
    let delays = ["1s", "3s", "9s", "20s"];
    assert!(delays.into_iter().any(older_write_meets_newer_one), "the older write was always done too early");
}
