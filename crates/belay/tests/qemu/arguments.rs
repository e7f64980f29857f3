//! What another host may choose of QEMU's arguments.

use anyhow::{Result, ensure};
use belay_e2e::{BootGuest, Host};

use super::{migrate, with_bed};

/// Runs the guest in one sector with more of QEMU's arguments.
fn run_with(host: &Host, more: &str) -> Result<BootGuest> {
    let guest = host.add_boot_disk("vm", "2ms")?;
    host.run_vm(
        "vm",
        &format!(
            "name = \"vm\"\nmemory_mib = 32\naccel = \"tcg\"\ndisks = [{{ device = {:?}, boot_index = 0 }}]\n\
             args = [\"-serial\", \"file:{{runtime_dir}}/vm.serial\", \"-pidfile\", \"{{runtime_dir}}/vm.pid\", {more}]\n",
            guest.disk
        ),
    )?;
    Ok(guest)
}

#[test]
fn argument_that_reaches_the_destinations_files_is_refused_until_its_operator_allows_it() {
    with_bed(|bed| {
        let guest = run_with(&bed.a, "\"-fw_cfg\", \"name=opt/x,file=/etc/passwd\"")?;
        guest.goes_on(&bed.a, 2)?;
        for more in [&["--dry-run"][..], &[]] {
            let output = bed.a.spawn(&[&["migrate", "vm", bed.b.name], more].concat())?.wait()?;
            let said = [output.stdout, output.stderr].concat();
            let said = String::from_utf8_lossy(&said);
            ensure!(output.status.code() == Some(3), "{said}");
            ensure!(
                said.contains("file=/etc/passwd")
                    && said.contains("allow_paths = [\"/etc\"]")
                    && said.contains("host-b"),
                "{said}"
            );
        }
        ensure!(bed.b.json(&["device", "list"])?.as_array().is_some_and(Vec::is_empty));
        guest.goes_on(&bed.a, 4)?;
        bed.b.configure("[vmm]\nallow_args = [\"-fw_cfg\"]\n")?;
        bed.b.terminate_agent()?;
        bed.b.start_agent()?;
        migrate(&bed.a, &bed.b, "vm", &[])?;
        guest.goes_on(&bed.b, 4).map(drop)
    });
}
