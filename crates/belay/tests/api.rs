//! The command against a server: what it asks for, what it prints, how it ends.

mod common;

use axum::body::Bytes;
use axum::extract::{Path, Query};
use axum::http::StatusCode;
use axum::routing::{delete, get, patch, post};
use axum::{Json, Router};
use common::{Server, belay, json as printed, stderr, stdout};
use serde_json::{Value, json};
use tokio::sync::mpsc;

type Seen = mpsc::UnboundedReceiver<(&'static str, Value)>;

/// A device with an exchange as given; everything that changes something is written down.
fn device_routes(exchange: Value) -> (Router, Seen) {
    let (seen, log) = mpsc::unbounded_channel();
    let note = move |what: &'static str| {
        let seen = seen.clone();
        move |Json(body): Json<Value>| async move {
            seen.send((what, body.clone())).unwrap();
            Json(body)
        }
    };
    let device = json!({"name": "data", "state": "remote", "exchange": exchange});
    let shown = device.clone();
    let routes = Router::new()
        .route("/v1/devices", post(note("add")).get(|| async move { Json(json!([device])) }))
        .route("/v1/devices/data", get(|| async move { Json(shown) }))
        .route("/v1/devices/data/resize", post(note("resize")))
        .route("/v1/devices/data/exchange", post(note("exchange")))
        .route("/v1/devices/data/exchange", patch(note("limit")))
        .route("/v1/vms", post(note("run")));
    (routes, log)
}

#[tokio::test]
async fn no_agent_exit_code_1_and_a_hint() {
    let directory = tempfile::tempdir().unwrap();
    let output = belay(&directory.path().join("none.sock"), "status").await;
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("hint: is `belay agent` running?"), "{}", stderr(&output));
    assert_eq!(stdout(&output), "");
}

#[tokio::test]
async fn a_wrong_command_line_exit_code_2() {
    let output = belay("/nowhere".as_ref(), "device resize data lots").await;
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("10G"), "{}", stderr(&output));
}

#[tokio::test]
async fn each_error_of_the_api_its_exit_code_message_and_hint() {
    let answer = |Path(code): Path<String>| async move {
        let body = json!({"code": code, "message": "it is so", "device": code, "hint": "do that"});
        (StatusCode::CONFLICT, Json(body))
    };
    let server = Server::start(Router::new().route("/v1/devices/{code}", delete(answer)));
    for (code, exit) in
        [("not_found", 1), ("usage", 2), ("precheck", 3), ("cancelled", 4), ("fenced", 5), ("unreachable", 6)]
    {
        let output = server.belay(&format!("device remove {code}")).await;
        assert_eq!(output.status.code(), Some(exit), "{code}");
        assert_eq!(stderr(&output), format!("error: {code}: it is so\nhint: do that\n"));
    }
    let output = server.belay("--json device remove fenced").await;
    let body: Value = serde_json::from_str(&stderr(&output)).unwrap();
    assert_eq!((output.status.code(), &body["code"]), (Some(5), &json!("fenced")));
}

#[tokio::test]
async fn a_name_with_a_slash_stays_one_segment() {
    let answer = |Path(name): Path<String>| async move { Json(json!({"name": name, "state": "local"})) };
    let server = Server::start(Router::new().route("/v1/devices/{name}", get(answer)));
    let output = server.belay("--json device show ../a/b?c").await;
    assert_eq!(printed(&output)["name"], "../a/b?c");
}

#[tokio::test]
async fn add_resize_and_run_send_what_the_line_says() {
    let (routes, mut seen) = device_routes(Value::Null);
    let server = Server::start(routes);
    let spec = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(spec.path(), "name = \"web\"").unwrap();
    for line in [
        "device add data --path /d --size 10G",
        "device resize data 20G",
        &format!("vm run {}", spec.path().display()),
    ] {
        let output = server.belay(line).await;
        assert!(output.status.success(), "{line}: {}", stderr(&output));
    }
    let (what, body) = seen.recv().await.unwrap();
    assert_eq!((what, &body["size_bytes"]), ("add", &json!(10_u64 << 30)));
    assert_eq!(seen.recv().await.unwrap(), ("resize", json!({"size_bytes": 20_u64 << 30})));
    let folder = spec.path().parent().unwrap();
    assert_eq!(seen.recv().await.unwrap(), ("run", json!({"spec_toml": "name = \"web\"", "folder": folder})));
}

#[tokio::test]
async fn a_limit_alone_changes_a_running_exchange() {
    let (routes, mut seen) = device_routes(json!({"total_bytes": 10, "local_bytes": 1}));
    let server = Server::start(routes);
    assert!(server.belay("exchange data --bandwidth 1M").await.status.success());
    assert_eq!(seen.recv().await.unwrap(), ("limit", json!({"bandwidth": 1 << 20})));
}

#[tokio::test]
async fn a_limit_starts_an_exchange_if_none_runs() {
    let (routes, mut seen) = device_routes(Value::Null);
    let server = Server::start(routes);
    assert!(server.belay("exchange data --bandwidth 1M").await.status.success());
    assert_eq!(seen.recv().await.unwrap(), ("exchange", json!({"bandwidth": 1 << 20})));
}

#[tokio::test]
async fn events_are_read_line_by_line_to_the_end_of_the_stream() {
    let events = |Query(query): Query<Value>| async move {
        assert_eq!(query["follow"], "true");
        let line = |seq: u64| json!({"seq": seq, "time": "now", "kind": "k", "message": format!("m{seq}")});
        // Three lines in two pieces that do not end with them; the last has no line break.
        let text = format!("{}\n{}\n\n{}", line(1), line(2), line(3));
        let (first, second) = text.split_at(text.len() / 2);
        let (mut sender, body) = http_body_util::channel::Channel::<Bytes>::new(1);
        let parts = [Bytes::from(first.to_owned()), Bytes::from(second.to_owned())];
        tokio::spawn(async move {
            for part in parts {
                sender.send_data(part).await.unwrap();
            }
        });
        axum::body::Body::new(body)
    };
    let server = Server::start(Router::new().route("/v1/events", get(events)));
    let output = server.belay("events --follow").await;
    assert_eq!(stdout(&output), "now  k  m1\nnow  k  m2\nnow  k  m3\n", "{}", stderr(&output));
    let output = server.belay("events --follow --json").await;
    assert_eq!(stdout(&output).lines().count(), 3);
}

#[tokio::test]
async fn api_and_metrics_are_printed_as_they_are() {
    let routes = Router::new()
        .route("/metrics", get(|| async { "belay_devices 2\n" }))
        .route("/openapi.json", get(|| async { Json(json!({"openapi": "3.1.0"})) }));
    let server = Server::start(routes);
    assert_eq!(stdout(&server.belay("metrics").await), "belay_devices 2\n");
    assert_eq!(printed(&server.belay("api").await)["openapi"], "3.1.0");
}

#[tokio::test]
async fn an_answer_of_something_else_is_told_not_guessed() {
    let server = Server::start(Router::new().route("/v1/status", get(|| async { Json(json!(["what"])) })));
    let output = server.belay("status").await;
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("not understood"), "{}", stderr(&output));
}

#[tokio::test]
async fn hosts_are_managed_without_an_agent() {
    let directory = tempfile::tempdir().unwrap();
    let (socket, pki) = (directory.path().join("none.sock"), directory.path().join("pki"));
    let run = |line: &str| {
        let line = format!("--json host {line} --pki {}", pki.display());
        let socket = socket.clone();
        async move { belay(&socket, &line).await }
    };
    let output = run("init --name host-a").await;
    assert_eq!(printed(&output)["host"], "host-a", "{}", stderr(&output));
    let again = run("init --name host-a").await;
    assert_eq!(printed(&again), printed(&output), "{}", stderr(&again));
    assert_eq!(run("init --name host-b").await.status.code(), Some(3));
    assert_eq!(run("init --name Host_A").await.status.code(), Some(2));
    let token = printed(&run("invite --address 127.0.0.1:7411").await)["token"].clone();
    assert!(token.as_str().unwrap().starts_with("belay1."));
    assert_eq!(printed(&run("list").await)[0]["name"], "host-a");
    assert_eq!(printed(&run("remove host-b").await)["was_known"], false);
    assert_eq!(printed(&run("renew").await)["host"], "host-a");
    let other = directory.path().join("other");
    let join =
        |token: &str| format!("host join {token} --name host-b --address b:1 --pki {}", other.display());
    assert_eq!(belay(&socket, &join("nonsense")).await.status.code(), Some(2));
}

#[tokio::test]
async fn agent_without_a_usable_configuration_ends_with_2_and_says_what_to_do() {
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("agent.toml");
    let run = async || {
        belay(std::path::Path::new("/nowhere"), &format!("agent --config {}", config.display())).await
    };
    let output = run().await;
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("an empty file will do"), "{}", stderr(&output));
    std::fs::write(&config, "state_dri = \"/x\"\n").unwrap();
    let output = run().await;
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("did you mean `state_dir`?"), "{}", stderr(&output));
}
