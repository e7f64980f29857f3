//! How commands end.

use anyhow::{Result, ensure};

use super::{fails_with, with_bed};

#[test]
fn every_exit_code_is_the_one_that_is_documented() {
    with_bed(|bed| {
        let a = &bed.a;
        a.belay(&["device", "add", "d", "--driver", "memory", "--size", "1M"])?;
        // 1: it failed, or is not there.
        fails_with(a, 1, &["device", "show", "none"], &["no device none", "belay device list"])?;
        fails_with(a, 1, &["vm", "stop", "none"], &["no VM none", "belay vm list"])?;
        fails_with(a, 1, &["migrate", "none", "host-b"], &["no VM none"])?;
        // 2: it was asked wrongly.
        fails_with(a, 2, &["device", "resize", "d", "lots"], &["10G"])?;
        fails_with(a, 2, &["device", "add", "x y", "--path", "/x"], &["no name"])?;
        fails_with(a, 2, &["vm", "run", "/no/such.toml"], &["/no/such.toml"])?;
        fails_with(a, 2, &["no-such-command"], &["no-such-command"])?;
        // 3: a check refused it; nothing was changed.
        fails_with(a, 3, &["device", "offer", "d", "host-x"], &["host-x is not known"])?;
        fails_with(a, 3, &["device", "offer", "d", "host-a"], &["already"])?;
        a.belay(&["device", "offer", "d", "host-b"])?;
        fails_with(a, 3, &["device", "remove", "d"], &["offered to host-b", "belay device withdraw d"])?;
        a.belay(&["device", "withdraw", "d"])?;
        // 6: the other host does not answer.
        bed.b.terminate_agent()?;
        fails_with(&bed.a, 6, &["device", "offer", "d", "host-b"], &["host-b"])?;
        ensure!(bed.a.device("d")?["offered_to"].is_null());
        Ok(())
    });
}

#[test]
fn commands_that_are_repeated_do_no_more_and_no_harm() {
    with_bed(|bed| {
        let a = &bed.a;
        let twice = |arguments: &[&str]| -> Result<()> {
            let first = a.belay(arguments)?;
            let second = a.belay(arguments)?;
            ensure!(first == second, "{arguments:?}: {first} | {second}");
            Ok(())
        };
        twice(&["device", "add", "d", "--driver", "memory", "--size", "1M"])?;
        twice(&["device", "resize", "d", "2M"])?;
        twice(&["device", "add", "d", "--driver", "memory", "--size", "2M"])?;
        twice(&["device", "offer", "d", "host-b"])?;
        a.belay(&["device", "withdraw", "d"])?;
        twice(&["device", "withdraw", "d"])?;
        twice(&["exchange", "d"])?;
        twice(&["exchange", "d", "--cancel"])?;
        twice(&["device", "show", "d"])?;
        Ok(())
    });
}

#[test]
fn vm_that_runs_or_has_ended_already_is_no_error_and_another_one_of_its_name_is() {
    with_bed(|bed| {
        let a = &bed.a;
        a.belay(&["device", "add", "d", "--driver", "memory", "--size", "1M"])?;
        let spec = |file: &str, memory_mib: u32| -> Result<String> {
            let path = a.folder.join(file);
            let text = format!(
                "name = \"vm\"\nmemory_mib = {memory_mib}\naccel = \"tcg\"\nmachine = \"pc\"\n\
                 disks = [{{ device = \"d\" }}]\nargs = [\"-display\", \"none\"]\n"
            );
            std::fs::write(&path, text)?;
            Ok(path.display().to_string())
        };
        let (one, other) = (spec("one.toml", 32)?, spec("other.toml", 64)?);
        ensure!(a.json(&["vm", "run", &one])?["already"] == false);
        let pid = a.json(&["vm", "list"])?[0]["pid"].clone();
        ensure!(a.json(&["vm", "run", &one])?["already"] == true);
        let said = a.belay(&["vm", "run", &one])?;
        ensure!(said.contains("runs already"), "{said}");
        fails_with(a, 3, &["vm", "run", &other], &["another specification: memory_mib differ"])?;
        let vms = a.json(&["vm", "list"])?;
        ensure!(vms.as_array().is_some_and(|vms| vms.len() == 1) && vms[0]["pid"] == pid, "{vms}");
        a.belay(&["vm", "stop", "vm"])?;
        a.belay(&["vm", "stop", "vm"])?;
        // A name that was never known here is a slip of somebody's finger.
        fails_with(a, 1, &["vm", "stop", "wm"], &["no VM wm"])
    });
}

#[test]
fn cluster_that_is_made_twice_is_there_already_and_another_one_is_refused() {
    with_bed(|bed| {
        let pki = bed.a.folder.join("own-pki").display().to_string();
        let init = |name| ["host", "init", "--name", name, "--pki", &pki].map(str::to_owned);
        let run = |name| -> Result<String> {
            let arguments = init(name);
            bed.a.belay(&arguments.each_ref().map(String::as_str))
        };
        let (first, second) = (run("host-x")?, run("host-x")?);
        ensure!(first.contains("made") && second.contains("is there already"), "{first} | {second}");
        let arguments = init("host-y");
        let arguments = arguments.each_ref().map(String::as_str);
        fails_with(&bed.a, 3, &arguments, &["exists already", "this host is host-x"])
    });
}
