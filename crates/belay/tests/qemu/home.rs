//! VMs whose disk stayed behind, and which come home to it.

use rustix::process::Signal;

use super::boot::DELAY;
use super::{hold_before_switchover, in_flight, migrate, with_bed};

#[test]
fn guest_goes_and_comes_home_to_its_disk_with_requests_in_flight() {
    with_bed(|bed| {
        let guest = bed.a.run_boot_guest("vm", DELAY)?;
        let mut carried = 0;
        for _ in 0..3 {
            guest.goes_on(&bed.a, 2)?;
            carried += in_flight(&migrate(&bed.a, &bed.b, &guest.vm, &["--mode", "stay"])?);
            guest.goes_on(&bed.b, 4)?;
            carried += in_flight(&migrate(&bed.b, &bed.a, &guest.vm, &["--mode", "stay"])?);
            bed.a.wait_device(&guest.disk, "local")?;
            guest.goes_on(&bed.a, 4)?;
        }
        anyhow::ensure!(carried > 0, "no request was in flight at any switchover");
        Ok(())
    });
}

#[test]
fn guest_whose_return_is_aborted_goes_on_where_it_is_and_comes_home_later() {
    with_bed(|bed| {
        let guest = bed.a.run_boot_guest("vm", DELAY)?;
        guest.goes_on(&bed.a, 2)?;
        migrate(&bed.a, &bed.b, &guest.vm, &["--mode", "stay"])?;
        guest.goes_on(&bed.b, 2)?;
        let (mut qmp, command) = hold_before_switchover(&bed.b, &bed.a, &guest.vm, &["--mode", "stay"])?;
        bed.b.wait_device(&guest.disk, "parked")?;
        command.signal(Signal::INT)?;
        let output = command.wait()?;
        anyhow::ensure!(output.status.code() == Some(4), "{output:?}");
        bed.b.wait_device(&guest.disk, "remote")?;
        guest.goes_on(&bed.b, 4)?;
        bed.a.wait_vm_gone(&guest.vm)?;
        qmp.pause_before_switchover(false)?;
        drop(qmp);
        migrate(&bed.b, &bed.a, &guest.vm, &["--mode", "stay"])?;
        guest.goes_on(&bed.a, 4).map(drop)
    });
}

#[test]
fn guest_comes_home_while_its_disk_is_on_its_way_to_it() {
    with_bed(|bed| {
        bed.b.configure("[exchange]\nbandwidth_bytes_per_s = 20000\nin_flight_bytes = 65536\n")?;
        bed.b.terminate_agent()?;
        bed.b.start_agent()?;
        let guest = bed.a.run_boot_guest("vm", "20ms")?;
        guest.goes_on(&bed.a, 4)?;
        migrate(&bed.a, &bed.b, &guest.vm, &["--mode", "stay"])?;
        bed.b.belay(&["exchange", &guest.disk])?;
        bed.b.wait_copying(&guest.disk)?;
        guest.goes_on(&bed.b, 6)?;
        // Both agents have been killed meanwhile; the copy and the guest go on.
        bed.b.kill_agent()?;
        bed.a.kill_agent()?;
        bed.a.start_agent()?;
        bed.b.start_agent()?;
        guest.goes_on(&bed.b, 6)?;
        bed.b.wait_copying(&guest.disk)?;
        migrate(&bed.b, &bed.a, &guest.vm, &["--mode", "stay"])?;
        bed.a.wait_device(&guest.disk, "local")?;
        guest.goes_on(&bed.a, 4)?;
        // It goes again, and this time its disk follows it to the end.
        bed.b.configure("[exchange]\nbandwidth_bytes_per_s = 0\n")?;
        bed.b.terminate_agent()?;
        bed.b.start_agent()?;
        migrate(&bed.a, &bed.b, &guest.vm, &[])?;
        bed.b.wait_device(&guest.disk, "local")?;
        guest.goes_on(&bed.b, 4).map(drop)
    });
}
