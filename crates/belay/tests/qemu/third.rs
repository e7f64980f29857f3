//! What an enrolled host may do to devices that are not its own: nothing.

use anyhow::{Context, Result, ensure};
use belay_e2e::{Bed, Peer};
use belay_wire::control::Channel;
use belay_wire::{Epoch, FrameKind, Header, Refusal, TxId};
use serde_json::{Value, json};

use super::{migrate, with_bed};

/// A device in every role: what an agent has of it, and where.
struct Scene {
    guest: belay_e2e::BootGuest,
    /// Of host-a: only here; offered to host-b; lent to host-b.
    at_a: [Value; 3],
    /// Of host-b: prepared for what host-a offers; of the guest whose disk is at host-a.
    at_b: [Value; 2],
}

fn make_scene(bed: &Bed) -> Result<Scene> {
    let guest = bed.a.run_boot_guest("vm", "2ms")?;
    guest.goes_on(&bed.a, 2)?;
    migrate(&bed.a, &bed.b, &guest.vm, &["--mode", "stay"])?;
    for name in ["own", "offered"] {
        bed.a.belay(&["device", "add", name, "--driver", "memory", "--size", "1M"])?;
    }
    bed.a.belay(&["device", "offer", "offered", bed.b.name])?;
    Ok(Scene {
        at_a: [bed.a.device("own")?, bed.a.device("offered")?, bed.a.device(&guest.disk)?],
        at_b: [bed.b.device("offered")?, bed.b.device(&guest.disk)?],
        guest,
    })
}

/// Everything is as it was, and the guest goes on.
fn unchanged(bed: &Bed, scene: &Scene) -> Result<()> {
    let essence = |device: &Value| {
        let mut essence =
            ["name", "id", "state", "epoch", "attached_to", "backed_by", "offered_to", "served"]
                .map(|key| device[key].clone());
        // Without a VM it is one or the other.
        if essence[2] == "parked" {
            essence[2] = "offered".into();
        }
        if essence[4] != essence[5] {
            essence[7] = Value::Null;
        }
        essence
    };
    let hosts = scene.at_a.iter().map(|device| (&bed.a, device));
    for (host, before) in hosts.chain(scene.at_b.iter().map(|device| (&bed.b, device))) {
        let now = host.device(before["name"].as_str().context("a name")?)?;
        ensure!(essence(&now) == essence(before), "{before} of {} has become {now}", host.name);
    }
    scene.guest.goes_on(&bed.b, 4).map(drop)
}

fn identity(device: &Value, name: &str) -> Value {
    json!({ "id": device["id"], "name": name, "vm": null, "class": { "class": "block",
        "size_bytes": device["size_bytes"], "block_bytes": 512, "queues": 1, "queue_entries": 256, "read_only": false,
        "serial": "" } })
}

/// Everything that a call can ask for about a device.
fn calls(device: &Value, name: &str) -> Vec<(&'static str, Value, &'static [&'static str])> {
    let id = &device["id"];
    let epoch = device["epoch"].as_u64().unwrap_or_default();
    let mut calls: Vec<(&str, Value, &[&str])> = vec![
        ("device_info", json!({ "id": id }), &["not_found"]),
        ("device_state", json!({ "id": id }), &["not_found"]),
        ("incoming_done", json!({ "vm": "vm", "devices": [id] }), &["fenced"]),
    ];
    for epoch in [epoch - 1, epoch, epoch + 1] {
        calls.push(("commit_cut", json!({ "id": id, "epoch": epoch }), &["fenced"]));
        for name in [name, "unheard-of"] {
            for dry_run in [true, false] {
                let prepare = json!({ "identity": identity(device, name), "epoch": epoch, "mode": "follow",
                    "needed_bytes": 0, "delay_us": null, "dry_run": dry_run });
                calls.push(("prepare", prepare, &["precheck", "fenced"]));
            }
        }
    }
    for vm in ["vm", "another"] {
        let spec =
            json!({ "name": vm, "machine": "pc-q35-7.2", "accel": "tcg", "disks": [{ "device": name }] });
        calls.push(("start_incoming", json!({ "spec": spec }), &["fenced"]));
    }
    calls
}

#[test]
fn third_host_gets_nothing_by_calls_and_changes_nothing() {
    with_bed(|bed| {
        let scene = make_scene(bed)?;
        let third = Peer::new(&bed.enrol("host-c")?)?;
        let devices = scene.at_a.iter().map(|device| (&bed.a, device));
        for (host, device) in devices.chain(scene.at_b.iter().map(|device| (&bed.b, device))) {
            let name = device["name"].as_str().context("a name")?;
            for (method, body, codes) in calls(device, name) {
                let outcome = third.call(host, method, &body)?;
                let refused = outcome.as_ref().is_err_and(|code| codes.contains(&code.as_str()));
                ensure!(refused, "{method} {body} at {}: {outcome:?}", host.name);
            }
            // Said of what there is not as well; nothing comes of it.
            ensure!(third.call(host, "withdraw", &json!({ "devices": [device["id"]] }))?.is_ok());
            // Who names all devices of a VM by their ids is told that it is here: a host whose migration was finished
            // by the other one has to know it, also after both agents were restarted.
            let body = json!({ "vm": "vm", "devices": [device["id"]] });
            let outcome = third.call(host, "abort_incoming", &body)?;
            ensure!(outcome.is_ok() || outcome.is_err_and(|code| code == "fenced"));
        }
        ensure!(third.call(&bed.a, "no_such_call", &json!({}))?.is_err());
        ensure!(third.call(&bed.a, "commit_cut", &json!({ "id": 5 }))?.is_err());
        unchanged(bed, &scene)
    });
}

#[test]
fn files_of_the_destination_are_not_looked_for_on_behalf_of_a_peer() {
    with_bed(|bed| {
        let third = Peer::new(&bed.enrol("host-c")?)?;
        let ask = |file: &str| -> Result<String> {
            let spec = json!({ "name": "x", "machine": "pc-q35-7.2", "kernel": "/usr/share/none", "initrd": file,
                "adopted": null, "accel": "tcg" });
            let answer = third.call(&bed.a, "check_vm", &json!({ "spec": spec, "qemu": "7.2.0" }))?;
            Ok(answer.map_err(anyhow::Error::msg)?.to_string())
        };
        let (there, not_there) = (ask("/etc/passwd")?, ask("/etc/nothing")?);
        ensure!(there.replace("passwd", "nothing") == not_there, "{there}\n{not_there}");
        ensure!(there.contains("allow_paths"), "{there}");
        Ok(())
    });
}

#[test]
fn device_that_belongs_to_another_host_is_neither_offered_nor_taken_back_exit_code_5() {
    with_bed(|bed| {
        let scene = make_scene(bed)?;
        let disk = scene.guest.disk.as_str();
        for line in [&["device", "offer", disk, "host-b"][..], &["device", "withdraw", disk]] {
            let output = bed.a.spawn(line)?.wait()?;
            let said = String::from_utf8_lossy(&output.stderr);
            ensure!(
                output.status.code() == Some(5) && said.contains("belongs to host-b"),
                "{line:?}: {said}"
            );
        }
        unchanged(bed, &scene)
    });
}

/// Every frame that a client may send.
fn frames(epoch: u64) -> impl Iterator<Item = Header> {
    let kinds = (1..=19).filter_map(FrameKind::from_u8);
    kinds.map(move |kind| {
        let mut header = Header::new(kind);
        (header.epoch, header.txid, header.len) = (Epoch(epoch), TxId(1), 4096);
        header
    })
}

fn refused(answer: Option<&Header>) -> bool {
    answer.is_none_or(|header| header.kind == FrameKind::Refused)
}

#[test]
fn third_host_opens_no_device_in_any_epoch() {
    with_bed(|bed| {
        let scene = make_scene(bed)?;
        let third = Peer::new(&bed.enrol("host-c")?)?;
        let devices = scene.at_a.iter().map(|device| (&bed.a, device));
        for (host, device) in devices.chain(scene.at_b.iter().map(|device| (&bed.b, device))) {
            let epoch = device["epoch"].as_u64().context("an epoch")?;
            for channel in [Channel::Guest, Channel::Copier] {
                for epoch in [epoch - 1, epoch, epoch + 1, u64::MAX] {
                    let (_, answer) = third.open(host, device, channel, epoch)?;
                    ensure!(refused(answer.as_ref()), "{} {channel:?} {epoch}: {answer:?}", device["name"]);
                }
            }
            // Without asking.
            for header in frames(epoch) {
                let mut line = third.line(host)?;
                line.send(header, &[])?;
                let answer = line.receive()?.map(|(header, _)| header);
                ensure!(refused(answer.as_ref()), "{header:?}: {answer:?}");
            }
        }
        unchanged(bed, &scene)
    });
}

/// A host that was offered a device, before it has claimed it.
#[test]
fn host_that_a_device_is_only_offered_to_reads_and_writes_nothing_of_it() {
    with_bed(|bed| {
        bed.a.belay(&["device", "add", "offered", "--driver", "memory", "--size", "1M"])?;
        bed.a.belay(&["device", "offer", "offered", bed.b.name])?;
        let device = bed.a.device("offered")?;
        let epoch = device["epoch"].as_u64().context("an epoch")?;
        // host-b, with another agent than its own, which would dial as well, and of two connections the newer counts.
        bed.b.terminate_agent()?;
        let second = Peer::new(std::path::Path::new(&bed.b.pki()))?;
        let (_, answer) = second.open(&bed.a, &device, Channel::Copier, epoch)?;
        ensure!(refused(answer.as_ref()), "{answer:?}");
        for epoch in [epoch - 1, epoch + 1] {
            let (_, answer) = second.open(&bed.a, &device, Channel::Guest, epoch)?;
            ensure!(refused(answer.as_ref()), "{answer:?}");
        }
        let harmless = [FrameKind::Ping, FrameKind::Pong, FrameKind::Ack, FrameKind::Bye];
        for header in frames(epoch).filter(|header| !harmless.contains(&header.kind)) {
            let (mut line, answer) = second.open(&bed.a, &device, Channel::Guest, epoch)?;
            ensure!(answer.is_some_and(|answer| answer.kind == FrameKind::Opened), "{answer:?}");
            let payload = if header.kind == FrameKind::Write { vec![7; 4096] } else { Vec::new() };
            line.send(header, &payload)?;
            // No VM uses the device: its rings stand still, and the list of their requests is on its way.
            let mut answer = line.receive()?.map(|(header, _)| header);
            while answer.is_some_and(|answer| answer.kind == FrameKind::List) {
                answer = line.receive()?.map(|(header, _)| header);
            }
            let fits = answer.is_some_and(|answer| {
                let why = Refusal::from_code(answer.status);
                answer.kind == FrameKind::Refused
                    && matches!(why, Some(Refusal::WrongState | Refusal::StaleEpoch | Refusal::Malformed))
            });
            ensure!(fits, "{header:?}: {answer:?}");
        }
        let after = bed.a.device("offered")?;
        ensure!(
            after["served"] == 0 && after["epoch"] == epoch && after["attached_to"] == bed.a.name,
            "{after}"
        );
        ensure!(after["state"] == "offered" || after["state"] == "parked", "{after}");
        Ok(())
    });
}
