//! `belay device`.

use serde_json::{Map, Value, json};

use super::{Context, absolute, status};
use crate::args::{DeviceAddArgs, DeviceCommand, Driver};
use crate::client::{segment, understood};
use crate::error::Failure;
use crate::model::Device;
use crate::output;
use crate::units::{micros, percent, size};

pub(super) async fn run(context: &Context, command: DeviceCommand) -> Result<(), Failure> {
    let client = &context.client;
    let (value, done) = match command {
        DeviceCommand::Add(args) => {
            let added = client.post("/v1/devices", &add_body(&args)?).await?;
            let socket =
                added.get("socket").and_then(Value::as_str).map(|socket| format!(", served at {socket}"));
            (added, format!("device {} added{}", args.name, socket.unwrap_or_default()))
        }
        DeviceCommand::List => {
            let value = client.get("/v1/devices").await?;
            if context.json {
                return output::print_json(&value);
            }
            return output::print(&status::devices(&understood::<Vec<Device>>(value)?));
        }
        DeviceCommand::Show { name } => {
            let value = client.get(&path(&name)).await?;
            if context.json {
                return output::print_json(&value);
            }
            return output::print(&details(&understood(value)?));
        }
        DeviceCommand::Remove { name } => {
            let message = format!("device {name} removed; its data is where it was");
            (client.delete(&path(&name)).await?, message)
        }
        DeviceCommand::Offer { name, host, mode, dry_run } => {
            let body = json!({"to": host, "mode": mode.name(), "dry_run": dry_run});
            let offered = client.post(&format!("{}/offer", path(&name)), &body).await?;
            let socket = offered.get("socket").and_then(Value::as_str).unwrap_or_default();
            let message = if dry_run {
                format!("device {name} can be offered to {host}: nothing was changed")
            } else {
                format!("device {name} is offered to {host}, which serves it at {socket}")
            };
            (offered, message)
        }
        DeviceCommand::Withdraw { name } => {
            let withdrawn = client.delete(&format!("{}/offer", path(&name))).await?;
            let message = withdrawal(&name, &withdrawn);
            (withdrawn, message)
        }
        DeviceCommand::Resize { name, size: bytes } => {
            let resize = format!("{}/resize", path(&name));
            let message = format!("device {name} has {} now", size(bytes));
            (client.post(&resize, &json!({"size_bytes": bytes})).await?, message)
        }
    };
    if context.json { output::print_json(&value) } else { output::print(&output::plain(&done)) }
}

fn withdrawal(name: &str, withdrawn: &Value) -> String {
    let text = |field: &str| withdrawn.get(field).and_then(Value::as_str);
    match (text("was_offered_to"), text("not_told")) {
        (None, _) => format!("device {name} is not offered to any host"),
        (Some(to), None) => format!("device {name} is not offered to {to} any more"),
        (Some(to), Some(why)) => {
            format!("device {name} is not offered to {to} any more; {to} could not be told: {why}")
        }
    }
}

/// Where the API has a device.
pub(super) fn path(name: &str) -> String {
    format!("/v1/devices/{}", segment(name))
}

fn add_body(args: &DeviceAddArgs) -> Result<Value, Failure> {
    let mut body = Map::new();
    body.insert("name".into(), json!(args.name));
    let path = args.path.as_deref().map(absolute).transpose()?;
    body.insert("queues".into(), json!(args.queues));
    body.insert("block_bytes".into(), json!(args.block_size.bytes()));
    body.insert("read_only".into(), json!(args.read_only));
    body.insert("direct".into(), json!(!args.buffered));
    let delay_us = args.delay.map(|delay| u64::try_from(delay.as_micros()).unwrap_or(u64::MAX));
    let mut throttle = Map::new();
    throttle.extend(args.throttle_iops.map(|limit| ("iops".to_owned(), limit.into())));
    throttle.extend(args.throttle_bandwidth.map(|limit| ("bytes_per_s".to_owned(), limit.into())));
    let driver = (args.driver != Driver::File).then(|| args.driver.name().into());
    let optional = [
        ("path", path.map(|path| json!(path))),
        ("driver", driver),
        ("throttle", (!throttle.is_empty()).then_some(Value::Object(throttle))),
        ("fault", (!args.fault.is_empty()).then(|| json!(args.fault))),
        ("size_bytes", args.size.map(Value::from)),
        ("serial", args.serial.clone().map(Value::from)),
        ("vm", args.vm.clone().map(Value::from)),
        ("delay_us", delay_us.map(Value::from)),
    ];
    body.extend(optional.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?))));
    Ok(Value::Object(body))
}

/// A device's state in few words: `remote, 41 % copied`.
pub(super) fn state_text(device: &Device) -> String {
    let mut text = device.state.clone();
    if let Some(to) = &device.offered_to {
        let offered = if text == "offered" { String::new() } else { format!("{text}, ") };
        text = format!("{offered}offered to {to}");
    }
    if let Some(exchange) = &device.exchange {
        text += &format!(", {} % copied", percent(exchange.local_bytes, exchange.total_bytes));
    }
    if let Some(reason) = &device.exchange_stopped {
        text += &format!(", copy stopped: {reason}");
    }
    if let Some(reason) = &device.exchange_waits {
        text += &format!(", its copy waits: {reason}");
    }
    if device.link_up == Some(false) {
        text += ", link down";
    }
    text
}

fn details(device: &Device) -> String {
    let or_none = |text: &Option<String>| text.clone().unwrap_or_else(|| "-".into());
    let mut facts = vec![
        ("name", device.name.clone()),
        ("id", device.id.clone()),
        ("kind", device.class.clone()),
        ("size", size(device.size_bytes)),
        ("vm", or_none(&device.vm)),
        ("attached to", or_none(&device.attached_to)),
        ("backed by", or_none(&device.backed_by)),
        ("state", state_text(device)),
    ];
    facts.extend(device.trouble.clone().map(|trouble| ("trouble", trouble)));
    facts.extend([
        ("epoch", device.epoch.to_string()),
        ("socket", or_none(&device.socket)),
        ("vmm", if device.vmm_connected { "connected" } else { "not connected" }.into()),
        (
            "requests",
            format!("{}, {} in flight, {} failed", device.requests, device.in_flight, device.errors),
        ),
        ("data", format!("{} read, {} written", size(device.read_bytes), size(device.written_bytes))),
    ]);
    if let Some(latency) = &device.latency {
        let (p50, p99, max) = (micros(latency.p50_us), micros(latency.p99_us), micros(latency.max_us));
        facts.push(("latency", format!("half within {p50}, 99 % within {p99}, longest {max}")));
    }
    if let Some(exchange) = &device.exchange {
        let text = format!(
            "{} of {} here: {} copied, {} echoed, {} skipped",
            size(exchange.local_bytes),
            size(exchange.total_bytes),
            size(exchange.copied_bytes),
            size(exchange.echoed_bytes),
            size(exchange.skipped_bytes)
        );
        facts.push(("exchange", text));
    }
    output::facts(&facts)
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::args::{Cli, Command};

    fn body(line: &str) -> Value {
        let cli = Cli::try_parse_from(line.split_whitespace()).unwrap();
        let Command::Device(DeviceCommand::Add(args)) = cli.command else { panic!("not `device add`") };
        add_body(&args).unwrap()
    }

    #[test]
    fn what_was_not_said_is_left_to_the_agent() {
        assert_eq!(
            body("belay device add d --path /d"),
            json!({"name": "d", "path": "/d", "queues": 1, "block_bytes": 512, "read_only": false, "direct": true})
        );
    }

    #[test]
    fn everything_that_was_said_is_in_the_body() {
        let line = "belay device add d --path rel.img --size 1G --queues 4 --block-size 4096 --read-only --serial S \
                    --vm web --delay 2ms --buffered";
        let here = std::env::current_dir().unwrap().join("rel.img");
        assert_eq!(
            body(line),
            json!({"name": "d", "path": here, "size_bytes": 1 << 30, "queues": 4, "block_bytes": 4096,
                "read_only": true, "serial": "S", "vm": "web", "delay_us": 2000, "direct": false})
        );
    }

    #[test]
    fn state_tells_to_whom_a_device_is_offered() {
        let state = |state: &str| {
            let device = json!({"name": "data", "state": state, "offered_to": "host-b"});
            state_text(&serde_json::from_value(device).unwrap())
        };
        let waits = json!({"name": "d", "state": "remote", "exchange_waits": "no room"});
        assert_eq!(state_text(&serde_json::from_value(waits).unwrap()), "remote, its copy waits: no room");
        assert_eq!(state("offered"), "offered to host-b");
        assert_eq!(state("parked"), "parked, offered to host-b");
    }

    #[test]
    fn withdrawal_tells_what_was_done() {
        let withdrawn = |value: Value| withdrawal("data", &value);
        assert_eq!(withdrawn(json!({"was_offered_to": null})), "device data is not offered to any host");
        let text = withdrawn(json!({"was_offered_to": "host-b", "not_told": "no answer"}));
        assert_eq!(
            text,
            "device data is not offered to host-b any more; host-b could not be told: no answer"
        );
    }

    #[test]
    fn decorators_are_in_the_body_and_a_device_without_a_file_has_no_path() {
        let line = "belay device add d --driver null --size 1M --throttle-iops 5 --throttle-bandwidth 1M --fault errno=5 \
                    --fault kind=write,errno=28,first=2";
        let body = body(line);
        assert_eq!((&body["driver"], body.get("path")), (&json!("null"), None));
        assert_eq!(body["throttle"], json!({"iops": 5, "bytes_per_s": 1 << 20}));
        assert_eq!(body["fault"], json!([{"errno": 5}, {"kind": "write", "errno": 28, "first": 2}]));
    }

    #[test]
    fn details_tell_latency_and_exchange() {
        let device: Device = serde_json::from_value(json!({
            "name": "data", "state": "remote", "size_bytes": 2048, "link_up": false,
            "latency": {"p50_us": 80, "p99_us": 1500, "max_us": 2_000_000},
            "exchange": {"total_bytes": 2048, "local_bytes": 1024, "copied_bytes": 1024},
        }))
        .unwrap();
        let text = details(&device);
        assert!(text.contains("state:       remote, 50 % copied, link down"), "{text}");
        assert!(text.contains("half within 80 µs, 99 % within 1.5 ms, longest 2.0 s"), "{text}");
        assert!(text.contains("1 KiB of 2 KiB here"), "{text}");
    }
}
