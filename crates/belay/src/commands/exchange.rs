//! `belay exchange`.

use std::time::Duration;

use serde_json::{Map, Value, json};

use super::{Context, absolute, device};
use crate::args::ExchangeArgs;
use crate::client::understood;
use crate::error::Failure;
use crate::model::Device;
use crate::output;
use crate::progress::Progress;

const POLL_INTERVAL: Duration = Duration::from_millis(200);
/// How many polls an exchange may take until the device shows it.
const POLLS_TO_BEGIN: u32 = 25;
/// What a device is called whose data is at another host.
const REMOTE: &str = "remote";
/// And one whose data is here, and stays.
const LOCAL: &str = "local";

pub(super) async fn run(context: &Context, args: ExchangeArgs) -> Result<(), Failure> {
    let client = &context.client;
    let at = format!("{}/exchange", device::path(&args.device));
    if args.cancel {
        let value = client.delete(&at).await?;
        return tell(
            context,
            &value,
            &format!("{}: exchange ended; its data stays where it was", args.device),
        );
    }
    let now = context.client.get(&device::path(&args.device)).await?;
    let shown: Device = understood(now.clone())?;
    if shown.state == LOCAL && args.path.is_none() {
        return tell(context, &now, &format!("{}: all data is here already", args.device));
    }
    let running = args.bandwidth.is_some() && args.path.is_none() && shown.exchange.is_some();
    let (value, message) = if running {
        let value = client.patch(&at, &json!({"bandwidth": args.bandwidth})).await?;
        (value, format!("{}: the running exchange has a new limit", args.device))
    } else {
        let value = client.post(&at, &body(&args)?).await?;
        (value, format!("{}: exchange started; `belay status --watch` shows how far it is", args.device))
    };
    if args.wait { wait(context, &args.device).await } else { tell(context, &value, &message) }
}

fn tell(context: &Context, value: &Value, text: &str) -> Result<(), Failure> {
    if context.json { output::print_json(value) } else { output::print(&output::plain(text)) }
}

fn body(args: &ExchangeArgs) -> Result<Value, Failure> {
    let mut body = Map::new();
    if let Some(bandwidth) = args.bandwidth {
        body.insert("bandwidth".into(), bandwidth.into());
    }
    if let Some(path) = &args.path {
        body.insert("path".into(), json!(absolute(path)?));
    }
    Ok(Value::Object(body))
}

/// What a look at the device says about its exchange.
#[derive(Debug, PartialEq, Eq)]
enum Step {
    /// It runs, or has yet to begin.
    Going,
    /// All data is here.
    Done,
    /// It is over, and the data is not here.
    Stopped,
}

fn step(device: &Device, begun: bool, polls: u32) -> Step {
    match (&device.exchange, device.state.starts_with(REMOTE)) {
        (Some(_), _) => Step::Going,
        (None, false) => Step::Done,
        (None, true) if begun || polls >= POLLS_TO_BEGIN => Step::Stopped,
        (None, true) => Step::Going,
    }
}

fn stopped(name: &str, device: &Device) -> Failure {
    match &device.exchange_waits {
        Some(reason) => Failure::failed(format!("{name}: not all data is here, its copy waits: {reason}"))
            .hint(format!("mend that: it goes on by itself; or `belay exchange {name} --cancel`")),
        None => Failure::failed(format!("{name}: the exchange ended before all data was here"))
            .hint("`belay events` tells why"),
    }
}

async fn wait(context: &Context, name: &str) -> Result<(), Failure> {
    let mut progress = Progress::new(context.json);
    let (mut begun, mut polls) = (false, 0);
    loop {
        let value = context.client.get(&device::path(name)).await?;
        let device: Device = understood(value.clone())?;
        if let Some(exchange) = &device.exchange {
            begun = true;
            progress.exchange(name, exchange);
        }
        match step(&device, begun, polls) {
            Step::Going => tokio::time::sleep(POLL_INTERVAL).await,
            Step::Done => {
                progress.finish();
                return tell(context, &value, &format!("{name}: all data is here"));
            }
            Step::Stopped => {
                progress.finish();
                return Err(stopped(name, &device));
            }
        }
        polls += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(state: &str, exchange: Option<u64>) -> Device {
        let exchange = exchange.map(|local| json!({"total_bytes": 10, "local_bytes": local}));
        serde_json::from_value(json!({"name": "d", "state": state, "exchange": exchange})).unwrap()
    }

    #[test]
    fn an_exchange_is_done_when_the_device_is_no_longer_remote() {
        assert_eq!(step(&device("remote", Some(3)), true, 0), Step::Going);
        assert_eq!(step(&device("local", None), true, 0), Step::Done);
        assert_eq!(step(&device("local", None), false, 0), Step::Done);
    }

    #[test]
    fn an_exchange_that_vanishes_from_a_remote_device_was_stopped() {
        assert_eq!(step(&device("remote", None), true, 0), Step::Stopped);
    }

    #[test]
    fn an_exchange_that_is_tried_again_is_not_said_to_have_ended() {
        let mut waiting = device("remote", None);
        assert!(stopped("d", &waiting).message.contains("ended"));
        waiting.exchange_waits = Some("no room".into());
        let failure = stopped("d", &waiting);
        assert!(failure.message.contains("its copy waits: no room"), "{}", failure.message);
        assert!(failure.hint.is_some_and(|hint| hint.contains("by itself")));
    }

    #[test]
    fn an_exchange_has_time_to_begin_but_not_for_ever() {
        assert_eq!(step(&device("remote", None), false, 0), Step::Going);
        assert_eq!(step(&device("remote", None), false, POLLS_TO_BEGIN), Step::Stopped);
    }
}
