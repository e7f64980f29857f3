//! Control calls: answers, refusals, and what happens when the peer goes away.

mod common;

use std::sync::Arc;
use std::time::Duration;

use belay_link::{
    CallError, ControlClient, ControlClientOptions, Heartbeat, LinkState, ListenerOptions, RpcError,
    server_config,
};
use belay_wire::{Hello, Version};
use common::{Agent, Cluster, PATIENCE, any_port, host};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;

fn refusal_code(outcome: Result<Value, CallError>) -> String {
    match outcome {
        Err(CallError::Refused { error, .. }) => error.code,
        other => panic!("not refused: {other:?}"),
    }
}

async fn wait_until_lost(client: &ControlClient) {
    let mut state = client.state();
    let lost = state.wait_for(|state| *state != LinkState::Connected);
    timeout(PATIENCE, lost).await.unwrap().unwrap();
}

#[tokio::test]
async fn many_calls_at_once_get_their_own_answers() {
    let a = Cluster::new("host-a");
    let agent = Agent::start(&a.identity).await;
    let client = agent.client("host-a", &a.identity);
    let mut calls = JoinSet::new();
    for number in 0..200_u64 {
        let client = client.clone();
        calls.spawn(async move { (number, client.call::<_, u64>("double", &number).await.unwrap()) });
    }
    while let Some(call) = calls.join_next().await {
        let (number, answer) = call.unwrap();
        assert_eq!(answer, number * 2);
    }
    let text = "x".repeat(1_000_000);
    assert!(client.call::<_, String>("echo", &text).await.unwrap() == text, "a large body was changed");
}

#[tokio::test]
async fn what_the_peer_can_not_do_is_an_error_with_a_reason() {
    let a = Cluster::new("host-a");
    let agent = Agent::start(&a.identity).await;
    let client = agent.client("host-a", &a.identity);
    let unknown = client.call::<_, Value>("no_such_call", &()).await.unwrap_err();
    assert!(
        unknown.to_string().contains("no_such_call") && unknown.to_string().contains("upgrade"),
        "{unknown}"
    );
    assert_eq!(refusal_code(Err(unknown)), RpcError::UNKNOWN_METHOD);
    assert_eq!(refusal_code(client.call("double", &json!("text")).await), RpcError::BAD_REQUEST);
    assert_eq!(refusal_code(client.call("large", &()).await), RpcError::TOO_LARGE);
    assert_eq!(refusal_code(client.call("panic", &()).await), RpcError::INTERNAL);
    let too_large = client.call::<_, Value>("echo", &"x".repeat(2 << 20)).await.unwrap_err();
    assert!(matches!(too_large, CallError::Unsendable { .. }), "{too_large}");
    let other = client.call::<_, u64>("echo", &json!("text")).await.unwrap_err();
    assert!(matches!(other, CallError::NotUnderstood { .. }), "{other}");
    let answer: u64 = client.call("double", &4).await.unwrap();
    assert_eq!(answer, 8, "the connection is still good");
}

#[tokio::test]
async fn call_without_an_answer_times_out_and_leaves_the_connection() {
    let a = Cluster::new("host-a");
    let agent = Agent::start(&a.identity).await;
    let client = agent.client("host-a", &a.identity);
    let soon = Duration::from_millis(300);
    client.call::<_, u64>("double", &1).await.unwrap();
    let error = client.call_within::<_, Value>(soon, "hang", &()).await.unwrap_err();
    assert!(matches!(error, CallError::TimedOut { .. }), "{error}");
    assert_eq!(client.call::<_, u64>("double", &2).await.unwrap(), 4);
}

#[tokio::test]
async fn client_comes_back_to_a_server_that_went_away() {
    let a = Cluster::new("host-a");
    let mut agent = Agent::start(&a.identity).await;
    let address = agent.address;
    let client = agent.client("host-a", &a.identity);
    let caller = client.clone();
    let hanging = tokio::spawn(async move { caller.call::<_, Value>("hang", &()).await });
    timeout(PATIENCE, agent.hanging.recv()).await.unwrap().unwrap();

    agent.stop().await;
    let error = timeout(PATIENCE, hanging).await.unwrap().unwrap().unwrap_err();
    assert!(matches!(error, CallError::Interrupted { .. }), "{error}");
    wait_until_lost(&client).await;
    let error = client.call_within::<_, Value>(Duration::from_millis(300), "echo", &1).await.unwrap_err();
    assert!(matches!(error, CallError::Unreachable { .. }), "{error}");

    let mut again = Agent::start_with(&a.identity, address, ListenerOptions::default()).await;
    assert_eq!(client.call::<_, u64>("double", &3).await.unwrap(), 6);
    assert_eq!(*client.state().borrow(), LinkState::Connected);
    assert!(again.hanging.try_recv().is_err(), "the interrupted call was sent again");
}

#[tokio::test]
async fn call_made_while_the_peer_is_away_is_carried_out_when_it_comes() {
    let a = Cluster::new("host-a");
    let agent = Agent::start(&a.identity).await;
    let address = agent.address;
    let client = agent.client("host-a", &a.identity);
    agent.stop().await;
    let mut state = client.state();
    let failing = state.wait_for(|state| matches!(state, LinkState::Failing(_)));
    timeout(PATIENCE, failing).await.unwrap().unwrap();
    let call = tokio::spawn(async move { client.call::<_, u64>("double", &5).await });
    let _agent = Agent::start_with(&a.identity, address, ListenerOptions::default()).await;
    assert_eq!(timeout(PATIENCE, call).await.unwrap().unwrap().unwrap(), 10);
}

#[tokio::test]
async fn new_address_of_the_peer_is_used() {
    let a = Cluster::new("host-a");
    let agent = Agent::start(&a.identity).await;
    let client = ControlClient::new(
        host("host-a"),
        Vec::new(),
        Arc::clone(&a.identity),
        ControlClientOptions::default(),
    );
    let soon = Duration::from_millis(50);
    let error = client.call_within::<_, Value>(soon, "echo", &1).await.unwrap_err();
    assert!(matches!(error, CallError::Unreachable { .. }), "{error}");
    client.set_addresses(agent.addresses());
    assert_eq!(client.call_within::<_, u64>(PATIENCE, "double", &6).await.unwrap(), 12);
}

/// A peer that greets, and then reads everything and never says a word again: as a host that hangs.
#[tokio::test]
async fn silent_peer_is_found_dead_by_its_heartbeat() {
    let a = Cluster::new("host-a");
    let socket = TcpListener::bind(any_port()).await.unwrap();
    let address = socket.local_addr().unwrap();
    let acceptor = TlsAcceptor::from(server_config(&a.identity));
    let server = tokio::spawn(async move {
        let mut stream = acceptor.accept(socket.accept().await.unwrap().0).await.unwrap();
        stream.read_exact(&mut [0; 16]).await.unwrap();
        stream.write_all(&Hello::answer(Ok(Version(1)))).await.unwrap();
        stream.flush().await.unwrap();
        let mut heard = Vec::new();
        let _ = stream.read_to_end(&mut heard).await;
        heard
    });
    let heartbeat = Heartbeat { every: Duration::from_millis(50), dead_after: Duration::from_millis(500) };
    let options =
        ControlClientOptions { heartbeat, call_timeout: PATIENCE, ..ControlClientOptions::default() };
    let client =
        ControlClient::new(host("host-a"), vec![address.to_string()], Arc::clone(&a.identity), options);
    let error = timeout(PATIENCE, client.call::<_, Value>("echo", &1)).await.unwrap().unwrap_err();
    assert!(matches!(error, CallError::Interrupted { .. }), "{error}");
    let heard = timeout(PATIENCE, server).await.unwrap().unwrap();
    assert!(heard.windows(13).any(|window| window[..4] == [9, 0, 0, 0] && window[12] == 4), "no ping came");
}

#[tokio::test]
async fn idle_connection_is_kept_alive_by_its_heartbeat() {
    let a = Cluster::new("host-a");
    let agent = Agent::start(&a.identity).await;
    // Without the peer's answers to the pings the connection would be taken for dead within the time watched.
    let heartbeat = Heartbeat { every: Duration::from_millis(20), dead_after: Duration::from_secs(2) };
    let options =
        ControlClientOptions { heartbeat, call_timeout: PATIENCE, ..ControlClientOptions::default() };
    let client = ControlClient::new(host("host-a"), agent.addresses(), Arc::clone(&a.identity), options);
    client.call::<_, u64>("double", &1).await.unwrap();
    let mut state = client.state();
    state.mark_unchanged();
    assert!(timeout(Duration::from_secs(3), state.changed()).await.is_err(), "the connection was lost");
}
