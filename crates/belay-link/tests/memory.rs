//! Connections that carry a VM's memory.

mod common;

use std::io::{Read as _, Write as _};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use belay_link::{DialError, MemoryStream, dial_memory};
use common::{Agent, Cluster, PATIENCE, host};

/// What a VMM sends at a time, and altogether.
const PIECE: usize = 64 << 10;
const PIECES: usize = 300;

/// Both ends of a connection that was let in.
async fn connected() -> (MemoryStream, MemoryStream) {
    let a = Cluster::new("host-a");
    let mut agent = Agent::start(&a.identity).await;
    let addresses = agent.addresses();
    let name = host("host-a");
    let dialled = dial_memory(&addresses, &name, &a.identity, "vm 1", PATIENCE);
    let answered = async {
        let call = agent.memory.recv().await.unwrap();
        assert_eq!((call.vm.as_str(), call.peer.as_str()), ("vm 1", "host-a"));
        call.accept().await.unwrap()
    };
    let (source, destination) = tokio::join!(dialled, answered);
    (source.unwrap(), destination)
}

#[tokio::test(flavor = "multi_thread")]
async fn bytes_go_both_ways_and_each_end_is_told() {
    let (source, destination) = connected().await;
    let (mut source_vmm, source_end) = UnixStream::pair().unwrap();
    let (mut destination_vmm, destination_end) = UnixStream::pair().unwrap();
    let source = tokio::spawn(source.carry(source_end.into()));
    let destination = tokio::spawn(destination.carry(destination_end.into()));
    let received = tokio::task::spawn_blocking(move || {
        destination_vmm.write_all(b"ready").unwrap();
        let mut all = Vec::new();
        destination_vmm.read_to_end(&mut all).unwrap();
        // The other way is open still.
        destination_vmm.write_all(b"resumed").unwrap();
        all
    });
    let answered = tokio::task::spawn_blocking(move || {
        for piece in 0..PIECES {
            source_vmm.write_all(&[piece as u8; PIECE]).unwrap();
        }
        source_vmm.shutdown(Shutdown::Write).unwrap();
        let mut all = Vec::new();
        source_vmm.read_to_end(&mut all).unwrap();
        all
    });
    let received = received.await.unwrap();
    assert_eq!(received.len(), PIECES * PIECE);
    assert!(received.chunks(PIECE).enumerate().all(|(at, piece)| piece.iter().all(|byte| *byte == at as u8)));
    assert_eq!(answered.await.unwrap(), b"readyresumed");
    let bytes = ((PIECES * PIECE) as u64, 12);
    assert_eq!(source.await.unwrap().unwrap(), bytes);
    assert_eq!(destination.await.unwrap().unwrap(), (bytes.1, bytes.0));
}

#[tokio::test(flavor = "multi_thread")]
async fn lost_connection_is_the_end_for_both_vmms() {
    let (source, destination) = connected().await;
    let (mut vmm, end) = UnixStream::pair().unwrap();
    let carried = tokio::spawn(source.carry(end.into()));
    // As when the other agent is killed.
    drop(destination);
    let end = tokio::task::spawn_blocking(move || vmm.read(&mut [0; 1]));
    assert_eq!(end.await.unwrap().unwrap(), 0);
    let _ = carried.await.unwrap();
}

#[tokio::test]
async fn refusal_comes_with_its_reason() {
    let a = Cluster::new("host-a");
    let mut agent = Agent::start(&a.identity).await;
    let addresses = agent.addresses();
    let name = host("host-a");
    let dialled = dial_memory(&addresses, &name, &a.identity, "vm", PATIENCE);
    let answered = async { agent.memory.recv().await.unwrap().refuse("it does not wait").await.unwrap() };
    let (dialled, ()) = tokio::join!(dialled, answered);
    let expected = DialError::Refused { host: name, reason: "it does not wait".to_owned() };
    assert_eq!(dialled.unwrap_err(), expected);
    agent.assert_well(&a).await;
}
