//! `belay migrate` and `belay operation`.

use std::fmt::Write as _;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::signal::unix::{Signal, SignalKind, signal};

use super::Context;
use crate::args::MigrateArgs;
use crate::client::{segment, understood};
use crate::error::{Failure, Outcome};
use crate::model::{Operation, OperationState, Report, Status};
use crate::output;
use crate::progress::Progress;
use crate::units::{percent, size};

const POLL_INTERVAL: Duration = Duration::from_millis(200);
/// How many polls in a row may find no agent: it may be restarted while a machine moves.
const MAX_SILENT_POLLS: u32 = 50;

pub(super) async fn run(context: &Context, args: MigrateArgs) -> Result<(), Failure> {
    let mut body = json!({"to": args.host, "mode": args.mode.name(), "dry_run": args.dry_run});
    if let Some(bandwidth) = args.bandwidth {
        body["bandwidth"] = bandwidth.into();
    }
    // Kept for all of the time: a Ctrl-C while a question is under way counts, too.
    let mut interrupts = signal(SignalKind::interrupt())?;
    let at = format!("/v1/vms/{}/migrate", segment(&args.vm));
    let mut asked = std::pin::pin!(context.client.post(&at, &body));
    let (value, interrupted) = tokio::select! {
        value = &mut asked => (value?, false),
        // While it is checked there is no operation yet that could be taken back: that comes right after.
        _ = interrupts.recv() => tokio::select! {
            value = &mut asked => (value?, true),
            _ = interrupts.recv() => return Err(not_awaited("it is not known yet whether it begins", "belay status")),
        },
    };
    let operation: Operation = understood(value.clone())?;
    if args.dry_run {
        return dry_run(context, &value, &operation);
    }
    if args.no_wait {
        let text = format!("migration started; `belay operation {}` tells how it goes", operation.id);
        return tell(context, &value, &text);
    }
    if interrupted && operation.state == OperationState::Running {
        return abort(context, &operation.id, &mut interrupts).await;
    }
    follow(context, value, interrupts).await
}

/// `belay operation`.
pub(super) async fn show(context: &Context, id: &str) -> Result<(), Failure> {
    let value = context.client.get(&path(id)).await?;
    if context.json {
        return output::print_json(&value);
    }
    output::print(&details(&understood(value)?))
}

fn path(id: &str) -> String {
    format!("/v1/operations/{}", segment(id))
}

fn tell(context: &Context, value: &Value, text: &str) -> Result<(), Failure> {
    if context.json { output::print_json(value) } else { output::print(text) }
}

fn dry_run(context: &Context, value: &Value, operation: &Operation) -> Result<(), Failure> {
    tell(context, value, &checks(operation))?;
    if let Some(error) = &operation.error {
        return Err(error.clone().into());
    }
    match operation.checks.iter().filter(|check| !check.ok).count() {
        0 => Ok(()),
        failed => {
            let message =
                format!("{failed} of {} checks failed: the machine would not move", operation.checks.len());
            Err(Failure::new(Outcome::Precheck, message))
        }
    }
}

/// Follows an operation to its end; Ctrl-C takes it back if that is still possible.
async fn follow(context: &Context, first: Value, mut interrupts: Signal) -> Result<(), Failure> {
    let mut value = first;
    let mut progress = Progress::new(context.json);
    let mut silent = 0;
    loop {
        let operation: Operation = understood(value.clone())?;
        progress.operation(&operation);
        if over(&operation) {
            progress.finish();
            return ended(context, &value, operation);
        }
        tokio::select! {
            () = tokio::time::sleep(POLL_INTERVAL) => {}
            _ = interrupts.recv() => {
                progress.finish();
                return abort(context, &operation.id, &mut interrupts).await;
            }
        }
        match context.client.get(&path(&operation.id)).await {
            Ok(next) => (value, silent) = (next, 0),
            Err(failure) if failure.agent_absent && silent < MAX_SILENT_POLLS => silent += 1,
            Err(failure) => {
                progress.finish();
                return match failure.is_not_found() {
                    true => restarted(context, &value, operation).await,
                    false => Err(failure.hint(format!(
                        "when the agent is back, `belay operation {}` tells how it went",
                        operation.id
                    ))),
                };
            }
        }
    }
}

/// The agent answers, and does not know the operation: it is another one than that which began it, and found nothing
/// that was not over. Says what is known.
async fn restarted(context: &Context, value: &Value, operation: Operation) -> Result<(), Failure> {
    if operation.state == OperationState::Done {
        eprintln!(
            "the agent was restarted meanwhile; `belay status` at the destination shows how far its disks are"
        );
        return ended(context, value, operation);
    }
    let vm = operation.vm.as_deref().unwrap_or("the machine");
    let to = operation.to.as_deref().unwrap_or("the destination");
    let status: Status = understood(context.client.get("/v1/status").await?)?;
    let here = status.vms.iter().find(|known| known.name == vm);
    let (what, hint) = match here {
        Some(known) => (
            format!("VM {vm} is here, {}", known.state),
            "`belay events` tells more; the same command tries again".to_owned(),
        ),
        None => (
            format!("VM {vm} is not here any more"),
            format!("`belay status` at {to} shows whether it runs there"),
        ),
    };
    let message =
        format!("the agent was restarted meanwhile and does not know operation {}; {what}", operation.id);
    Err(Failure::failed(output::plain(&message)).hint(output::plain(&hint)))
}

/// A second Ctrl-C: nobody waits for the answer any more.
fn not_awaited(known: &str, how_to_see: &str) -> Failure {
    Failure::failed(format!("not waited for any more: {known}; it goes on in the background"))
        .hint(format!("`{how_to_see}` tells how it goes, and `belay events --follow` what happens"))
}

/// Nothing is to be expected any more: it has ended, and no data is on its way.
fn over(operation: &Operation) -> bool {
    let on_its_way = || {
        operation
            .devices
            .iter()
            .filter_map(|device| device.exchange.as_ref())
            .any(|exchange| exchange.local_bytes < exchange.total_bytes)
    };
    match operation.state {
        OperationState::Running => false,
        OperationState::Done => !on_its_way(),
        OperationState::Failed | OperationState::Cancelled => true,
    }
}

fn ended(context: &Context, value: &Value, operation: Operation) -> Result<(), Failure> {
    match operation.state {
        OperationState::Running | OperationState::Done => tell(context, value, &summary(&operation)),
        state => {
            if context.json {
                output::print_json(value)?;
            } else if operation.checks.iter().any(|check| !check.ok) {
                output::print(&checks(&operation))?;
            }
            Err(failure(operation, state))
        }
    }
}

fn failure(operation: Operation, state: OperationState) -> Failure {
    let cancelled = state == OperationState::Cancelled;
    match operation.error {
        Some(error) => {
            let mut failure = Failure::from(error);
            if cancelled {
                failure.outcome = Outcome::Cancelled;
            }
            failure
        }
        None if cancelled => Failure::new(Outcome::Cancelled, "the migration was cancelled"),
        None => Failure::failed("the migration failed").hint("`belay events` tells why"),
    }
}

async fn abort(context: &Context, id: &str, interrupts: &mut Signal) -> Result<(), Failure> {
    let (at, nothing) = (format!("{}/abort", path(id)), json!({}));
    let answer = tokio::select! {
        answer = context.client.post(&at, &nothing) => answer?,
        _ = interrupts.recv() => {
            let known = "the migration is being taken back, unless it is too late for that";
            return Err(not_awaited(known, &format!("belay operation {id}")));
        }
    };
    let message = answer.get("message").and_then(Value::as_str).unwrap_or_default();
    if answer.get("aborted").and_then(Value::as_bool) == Some(true) {
        let message = if message.is_empty() { "the migration was cancelled" } else { message };
        return Err(Failure::new(Outcome::Cancelled, message));
    }
    let text = format!(
        "{message}{}the migration goes on in the background; `belay operation {id}` tells how it goes, and `belay \
         events --follow` what happens",
        if message.is_empty() { "" } else { "\n" }
    );
    tell(context, &answer, &text)
}

fn checks(operation: &Operation) -> String {
    let line = |check: &crate::model::Check| {
        let mark = if check.ok { "ok    " } else { "failed" };
        format!("{mark}  {}  {}", output::plain(&check.name), output::plain(&check.message))
            .trim_end()
            .to_owned()
    };
    operation.checks.iter().map(line).collect::<Vec<_>>().join("\n")
}

fn summary(operation: &Operation) -> String {
    let vm = operation.vm.as_deref().unwrap_or("the machine");
    let to = operation.to.as_deref().unwrap_or("the destination");
    let mut text = output::plain(&format!("{vm} runs on {to}"));
    for line in operation.report.iter().flat_map(report) {
        let _ = write!(text, "\n  {line}");
    }
    text
}

fn report(report: &Report) -> Vec<String> {
    let ms = |name: &str, value: Option<f64>| value.map(|value| format!("{name} {value:.1} ms"));
    let mut lines = Vec::new();
    if let Some(migration) = &report.migration {
        lines.extend(ms("whole migration", migration.total_ms));
        lines.extend(ms("running at the destination after", migration.running_at_destination_ms));
        lines.extend(ms("machine stopped for", migration.downtime_ms));
    }
    if let Some(handover) = &report.handover {
        lines.extend(
            handover.requests_in_flight.map(|count| format!("requests in flight at the handover: {count}")),
        );
        lines.extend(ms("devices granted within", handover.grant_ms));
        lines.extend(ms("longest gap in a device's I/O", handover.gap_ms));
    }
    lines
}

fn details(operation: &Operation) -> String {
    let or_none = |text: &Option<String>| text.clone().unwrap_or_else(|| "-".into());
    let mut facts = vec![
        ("id", operation.id.clone()),
        ("kind", operation.kind.clone()),
        ("vm", or_none(&operation.vm)),
        ("to", or_none(&operation.to)),
        ("mode", or_none(&operation.mode)),
        ("state", operation.state.name().to_owned()),
        ("phase", or_none(&operation.phase)),
    ];
    if operation.state == OperationState::Running {
        facts.push(("can be taken back", if operation.abortable { "yes" } else { "no" }.into()));
    }
    if let Some(ram) = &operation.ram {
        let text =
            format!("{} sent, {} of {} left", size(ram.transferred), size(ram.remaining), size(ram.total));
        facts.push(("memory", text));
    }
    if let Some(error) = &operation.error {
        facts.push(("error", error.message.clone()));
        facts.extend(error.hint.clone().map(|hint| ("hint", hint)));
    }
    let mut text = output::facts(&facts);
    for device in &operation.devices {
        let mut state = device.state.clone();
        if let Some(exchange) = &device.exchange {
            let _ = write!(state, ", {} % copied", percent(exchange.local_bytes, exchange.total_bytes));
        }
        let _ = write!(text, "\n  {}: {}", output::plain(&device.name), output::plain(&state));
    }
    for line in operation.report.iter().flat_map(report) {
        let _ = write!(text, "\n  {line}");
    }
    text
}
