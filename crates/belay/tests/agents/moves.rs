//! Handovers and offers.

use anyhow::{Result, ensure};
use belay_e2e::{Host, until};
use serde_json::Value;

use crate::{
    DEPTH, boot, bring, hand_over, is_local, meanwhile, offer, run_until, show, socket, switch_over, with_bed,
};

/// Handovers of one run of the tests; `BELAY_HANDOVERS` asks for more.
const HANDOVERS: u32 = 200;

#[test]
fn handovers_between_two_agents_lose_and_double_nothing() {
    let legs = std::env::var("BELAY_HANDOVERS").ok().and_then(|text| text.parse().ok()).unwrap_or(HANDOVERS);
    with_bed(|bed| {
        let mut guest = boot(&bed.a, 4, 300, 11)?;
        let (mut from, mut to): (&Host, &Host) = (&bed.a, &bed.b);
        for leg in 0..legs {
            let mode = if leg % 5 == 4 { "stay" } else { "follow" };
            hand_over(&mut guest, from, to, mode)?;
            if mode == "stay" {
                guest.run(100, DEPTH);
                let folder = to.folder.clone();
                meanwhile(&mut guest, move || bring(&folder))?;
            }
            run_until(&mut guest, to, "the disk at its new host", is_local)?;
            (from, to) = (to, from);
        }
        guest.verify();
        ensure!(show(from)?["epoch"] == u64::from(legs) + 1);
        Ok(())
    });
}

#[test]
fn disk_that_cannot_follow_yet_does_as_soon_as_it_can() {
    with_bed(|bed| {
        let mut guest = boot(&bed.a, 2, 300, 17)?;
        let in_the_way = bed.b.images.join("disk0.img");
        std::fs::write(&in_the_way, "of somebody else")?;
        hand_over(&mut guest, &bed.a, &bed.b, "follow")?;
        run_until(&mut guest, &bed.b, "the reason being told", |device| {
            device["exchange_waits"].as_str().is_some_and(|reason| reason.contains("something already"))
        })?;
        let said = bed.b.belay(&["status"])?;
        ensure!(said.contains("its copy waits: ") && said.contains("disk0.img"), "{said}");
        ensure!(std::fs::read_to_string(&in_the_way)? == "of somebody else");
        std::fs::remove_file(&in_the_way)?;
        run_until(&mut guest, &bed.b, "the disk at its new host", is_local)?;
        guest.verify();
        ensure!(bed.b.device("disk0")?["exchange_waits"].is_null());
        let events = bed.b.belay(&["events"])?;
        ensure!(events.matches("cannot begin").count() == 1, "{events}");
        Ok(())
    });
}

fn refused(host: &Host, arguments: &[&str]) -> Result<String> {
    match host.belay(arguments) {
        Ok(said) => anyhow::bail!("belay {} was not refused: {said}", arguments.join(" ")),
        Err(error) => Ok(error.to_string()),
    }
}

#[test]
fn offer_is_repeatable_outlives_restarts_and_can_be_withdrawn() {
    with_bed(|bed| {
        let mut guest = boot(&bed.a, 2, 300, 12)?;
        let checked = bed.a.json(&["device", "offer", "disk0", "host-b", "--dry-run"])?;
        ensure!(checked["dry_run"] == true && bed.b.device("disk0").is_err());
        let first = bed.a.json(&["device", "offer", "disk0", "host-b"])?;
        ensure!(first["socket"] == socket(&bed.b).display().to_string(), "{first}");
        ensure!(bed.a.json(&["device", "offer", "disk0", "host-b"])? == first);
        ensure!(bed.a.device("disk0")?["offered_to"] == "host-b");
        ensure!(bed.a.belay(&["status"])?.contains("offered to host-b"));
        refused(&bed.a, &["device", "offer", "disk0", "host-b", "--mode", "stay"])?;
        refused(&bed.a, &["device", "resize", "disk0", "8M"])?;
        refused(&bed.b, &["device", "offer", "disk0", "host-a"])?;
        bed.b.kill_agent()?;
        bed.b.start_agent()?;
        bed.a.kill_agent()?;
        bed.a.start_agent()?;
        reconnect_and_run(&mut guest, &bed.a);
        ensure!(bed.a.device("disk0")?["offered_to"] == "host-b");
        ensure!(bed.a.json(&["device", "offer", "disk0", "host-b"])? == first);
        let gone = bed.a.json(&["device", "withdraw", "disk0"])?;
        ensure!(gone["was_offered_to"] == "host-b" && gone["not_told"] == Value::Null, "{gone}");
        ensure!(bed.a.json(&["device", "withdraw", "disk0"])?["was_offered_to"] == Value::Null);
        ensure!(bed.b.device("disk0").is_err());
        guest.run(200, DEPTH);
        switch_over(&mut guest, &offer(&bed.a.folder, "host-b", "stay")?);
        run_until(&mut guest, &bed.b, "the handover", |device| device["state"] == "remote")?;
        let late = refused(&bed.a, &["device", "withdraw", "disk0"])?;
        ensure!(late.contains("too late"), "{late}");
        guest.verify();
        Ok(())
    });
}

fn reconnect_and_run(guest: &mut belay_synthetic::Guest, host: &Host) {
    crate::reconnect(guest, host);
    guest.run(200, DEPTH);
}

#[test]
fn vm_with_more_memory_than_the_other_agent_takes_is_refused_before_and_goes_on() {
    with_bed(|bed| {
        let slots = "[data_plane]\nmemory_slots = true\n";
        bed.a.configure(slots)?;
        bed.a.terminate_agent()?;
        bed.a.start_agent()?;
        let mut guest = boot(&bed.a, 1, 0, 61)?;
        guest.plug_memory(8);
        guest.run(100, DEPTH);
        until("all of its memory", || {
            let refused = bed.a.spawn(&["device", "offer", "disk0", "host-b"])?.wait()?;
            if refused.status.success() {
                // The agent had not seen it all.
                bed.a.belay(&["device", "withdraw", "disk0"])?;
                return Ok(None);
            }
            let said = String::from_utf8_lossy(&refused.stderr).into_owned();
            ensure!(refused.status.code() == Some(3) && said.contains("9 pieces of memory"), "{said}");
            ensure!(said.contains("memory_slots = true"), "{said}");
            Ok(Some(()))
        })?;
        ensure!(bed.b.device("disk0").is_err(), "it is left at the other host");
        guest.run(100, DEPTH);
        bed.b.configure(slots)?;
        bed.b.terminate_agent()?;
        bed.b.start_agent()?;
        bed.a.belay(&["device", "offer", "disk0", "host-b"])?;
        bed.a.belay(&["device", "withdraw", "disk0"])?;
        guest.run(100, DEPTH);
        guest.verify();
        Ok(())
    });
}
