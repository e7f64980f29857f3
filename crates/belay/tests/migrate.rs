//! `belay migrate`: followed to its end, checked only, interrupted.

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use axum::routing::{get, post};
use axum::{Json, Router};
use common::{Server, json as printed, spawn, stderr, stdout};
use serde_json::{Value, json};
use tokio::sync::Notify;

fn operation(state: &str, phase: &str) -> Value {
    json!({"id": "op1", "kind": "migrate", "vm": "web", "to": "host-b", "mode": "follow", "state": state,
        "phase": phase, "abortable": true, "checks": [], "devices": []})
}

fn with(mut operation: Value, field: &str, value: Value) -> Value {
    operation[field] = value;
    operation
}

fn exchanged(local: u64) -> Value {
    json!([{"name": "data", "state": "remote", "exchange": {"total_bytes": 100, "local_bytes": local}}])
}

/// A migration that goes through these states, one per question, and stays at the last.
fn migration(states: Vec<Value>) -> (Router, Arc<AtomicUsize>) {
    let asked = Arc::new(AtomicUsize::new(0));
    let (first, count) = (states[0].clone(), asked.clone());
    let next = move || async move {
        let at = count.fetch_add(1, Ordering::SeqCst) + 1;
        Json(states[at.min(states.len() - 1)].clone())
    };
    let routes = Router::new()
        .route("/v1/vms/web/migrate", post(|| async { Json(first) }))
        .route("/v1/operations/op1", get(next));
    (routes, asked)
}

#[tokio::test]
async fn migrate_waits_until_the_data_is_there_and_tells_the_report() {
    let report = json!({"migration": {"total_ms": 900, "downtime_ms": 12.25, "running_at_destination_ms": 850},
        "handover": {"requests_in_flight": 16, "grant_ms": 1.5, "gap_ms": 8.0}});
    let done = |local| {
        with(with(operation("done", "exchange"), "devices", exchanged(local)), "report", report.clone())
    };
    let (routes, asked) = migration(vec![operation("running", "memory"), done(40), done(100)]);
    let server = Server::start(routes);
    let output = server.belay("migrate web host-b").await;
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert_eq!(asked.load(Ordering::SeqCst), 2);
    let text = stdout(&output);
    assert!(text.starts_with("web runs on host-b\n"), "{text}");
    assert!(text.contains("machine stopped for 12.2 ms"), "{text}");
    assert!(text.contains("requests in flight at the handover: 16"), "{text}");
    assert_eq!(stderr(&output), "memory\nexchange\n");
}

#[tokio::test]
async fn json_prints_the_last_state_and_nothing_else() {
    let (routes, _) = migration(vec![operation("running", "memory"), operation("done", "done")]);
    let output = Server::start(routes).belay("migrate web host-b --json").await;
    assert_eq!(printed(&output)["state"], "done");
    assert_eq!(stderr(&output), "");
}

#[tokio::test]
async fn no_wait_asks_no_more() {
    let (routes, asked) = migration(vec![operation("running", "memory")]);
    let output = Server::start(routes).belay("migrate web host-b --no-wait").await;
    assert_eq!(output.status.code(), Some(0));
    assert_eq!(asked.load(Ordering::SeqCst), 0);
    assert!(stdout(&output).contains("belay operation op1"));
}

#[tokio::test]
async fn a_failed_migration_ends_with_the_code_of_its_error() {
    let error = json!({"code": "unreachable", "message": "host-b is gone", "hint": "look there"});
    let failed = with(operation("failed", "memory"), "error", error);
    let (routes, _) = migration(vec![operation("running", "memory"), failed]);
    let output = Server::start(routes).belay("migrate web host-b").await;
    assert_eq!(output.status.code(), Some(6));
    assert!(stderr(&output).ends_with("error: host-b is gone\nhint: look there\n"), "{}", stderr(&output));
}

#[tokio::test]
async fn a_migration_cancelled_from_elsewhere_exit_code_4() {
    let (routes, _) = migration(vec![operation("running", "memory"), operation("cancelled", "memory")]);
    assert_eq!(Server::start(routes).belay("migrate web host-b").await.status.code(), Some(4));
}

#[tokio::test]
async fn dry_run_shows_all_checks_and_ends_with_3_if_one_failed() {
    let checks = |ok: bool| {
        json!([{"name": "link", "ok": true, "message": "host-b answers"},
            {"name": "space", "ok": ok, "message": "2 GiB are missing"}])
    };
    for (ok, exit) in [(true, 0), (false, 3)] {
        let (routes, asked) = migration(vec![with(operation("done", "checks"), "checks", checks(ok))]);
        let output = Server::start(routes).belay("migrate web host-b --dry-run").await;
        assert_eq!(output.status.code(), Some(exit));
        assert_eq!(stdout(&output).lines().count(), 2);
        assert_eq!(stdout(&output).contains("failed  space"), !ok);
        assert_eq!(asked.load(Ordering::SeqCst), 0);
    }
}

fn interrupt(child: &tokio::process::Child) {
    let pid = rustix::process::Pid::from_raw(i32::try_from(child.id().unwrap()).unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
}

/// Follows a migration without end, presses Ctrl-C once it is being followed, and answers the abort.
async fn interrupted(answer: Value) -> std::process::Output {
    let followed = Arc::new(Notify::new());
    let notify = followed.clone();
    let running = move || async move {
        notify.notify_one();
        Json(operation("running", "memory"))
    };
    let routes = Router::new()
        .route("/v1/vms/web/migrate", post(|| async { Json(operation("running", "memory")) }))
        .route("/v1/operations/op1", get(running))
        .route("/v1/operations/op1/abort", post(|| async { Json(answer) }));
    let server = Server::start(routes);
    let child = spawn(&server.socket(), "migrate web host-b");
    followed.notified().await;
    interrupt(&child);
    child.wait_with_output().await.unwrap()
}

#[tokio::test]
async fn ctrl_c_in_time_cancels_exit_code_4() {
    let output = interrupted(json!({"aborted": true, "message": "web stays here"})).await;
    assert_eq!(output.status.code(), Some(4), "{}", stderr(&output));
    assert!(stderr(&output).contains("error: web stays here"));
}

#[tokio::test]
async fn ctrl_c_too_late_tells_that_it_goes_on() {
    let output = interrupted(json!({"aborted": false, "message": "web runs on host-b already"})).await;
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert!(stdout(&output).starts_with("web runs on host-b already\n"));
    assert!(stdout(&output).contains("belay operation op1"));
}

/// Presses Ctrl-C until the command ends: the first one's answer never comes.
#[tokio::test]
async fn second_ctrl_c_ends_the_command_while_the_abort_is_pending() {
    let (followed, asked) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let (notify, notify_asked) = (followed.clone(), asked.clone());
    let running = move || async move {
        notify.notify_one();
        Json(operation("running", "memory"))
    };
    let never = move || async move {
        notify_asked.notify_one();
        std::future::pending::<Json<Value>>().await
    };
    let routes = Router::new()
        .route("/v1/vms/web/migrate", post(|| async { Json(operation("running", "memory")) }))
        .route("/v1/operations/op1", get(running))
        .route("/v1/operations/op1/abort", post(never));
    let server = Server::start(routes);
    let child = spawn(&server.socket(), "migrate web host-b");
    followed.notified().await;
    interrupt(&child);
    asked.notified().await;
    interrupt(&child);
    let output = child.wait_with_output().await.unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    for word in ["is being taken back", "in the background", "belay operation op1"] {
        assert!(stderr(&output).contains(word), "{}", stderr(&output));
    }
}

/// An agent that answers the first question, and was restarted before the second.
async fn restarted(first: Value, vms: Value) -> std::process::Output {
    let gone = || async {
        let error = json!({"code": "not_found", "message": "there is no operation op1"});
        (axum::http::StatusCode::NOT_FOUND, Json(error))
    };
    let status =
        json!({"host": "host-a", "version": "1", "devices": [], "vms": vms, "hosts": [], "operations": []});
    let routes = Router::new()
        .route("/v1/vms/web/migrate", post(|| async { Json(first) }))
        .route("/v1/operations/op1", get(gone))
        .route("/v1/status", get(|| async { Json(status) }));
    Server::start(routes).belay("migrate web host-b").await
}

#[tokio::test]
async fn restarted_agent_that_does_not_know_the_operation_is_asked_where_the_vm_is() {
    let here = json!([{"name": "web", "state": "running", "pid": 1, "qmp": "", "devices": []}]);
    for (vms, what) in [(here, "VM web is here, running"), (json!([]), "VM web is not here any more")] {
        let output = restarted(operation("running", "memory"), vms).await;
        assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
        assert!(stderr(&output).contains("the agent was restarted meanwhile"), "{}", stderr(&output));
        assert!(stderr(&output).contains(what), "{}", stderr(&output));
    }
}

#[tokio::test]
async fn migration_that_was_done_before_the_agent_was_restarted_is_a_success() {
    let done = with(operation("done", "exchange"), "devices", exchanged(40));
    let output = restarted(done, json!([])).await;
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert!(stdout(&output).starts_with("web runs on host-b\n"), "{}", stdout(&output));
    assert!(stderr(&output).contains("the agent was restarted meanwhile"), "{}", stderr(&output));
}
