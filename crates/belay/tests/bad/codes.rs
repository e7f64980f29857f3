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
