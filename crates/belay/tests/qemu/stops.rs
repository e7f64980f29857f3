//! Rings that stop without a migration: pause, reset.

use anyhow::{Result, ensure};
use belay_e2e::{BootGuest, Host};

use super::boot::DELAY;
use super::{migrate, with_bed};

#[test]
fn paused_guest_goes_on_with_the_request_that_was_in_flight() {
    with_bed(|bed| {
        let guest = bed.a.run_boot_guest("vm", DELAY)?;
        guest.goes_on(&bed.a, 2)?;
        let mut qmp = bed.a.qmp(&guest.vm)?;
        for round in 0..4 {
            bed.a.wait_in_flight(&guest.disk, 1)?;
            qmp.run("stop")?;
            ensure!(qmp.state()? == "paused");
            // In every second round it ends only after the guest has gone on.
            if round % 2 == 0 {
                let before = bed.a.device(&guest.disk)?["in_flight"].clone();
                ensure!(before == 1 || before == 0, "{before}");
            }
            qmp.run("cont")?;
            guest.goes_on(&bed.a, 3)?;
        }
        Ok(())
    });
}

#[test]
fn reset_guest_boots_again_and_nothing_of_before_lands_in_its_rings() {
    with_bed(|bed| {
        let guest = bed.a.run_boot_guest("vm", "50ms")?;
        resets(&bed.a, &guest)?;
        // At the other host, whose requests are executed at the first one: these cannot be cancelled, and come late.
        migrate(&bed.a, &bed.b, &guest.vm, &["--mode", "stay"])?;
        resets(&bed.b, &guest)
    });
}

/// Resets the guest with a request in flight, while it runs, while it boots, and while it is paused.
fn resets(host: &Host, guest: &BootGuest) -> Result<()> {
    let mut qmp = host.qmp(&guest.vm)?;
    for round in 0..6 {
        guest.goes_on(host, 4)?;
        host.wait_in_flight(&guest.disk, 1)?;
        match round % 3 {
            0 => qmp.run("system_reset")?,
            1 => {
                qmp.run("stop")?;
                qmp.run("system_reset")?;
                qmp.run("cont")?;
            }
            _ => {
                for _ in 0..3 {
                    qmp.run("system_reset")?;
                }
            }
        }
    }
    guest.goes_on(host, 6).map(drop)
}
