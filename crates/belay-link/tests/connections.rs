//! Who gets a connection, who does not, and that no byte of one is lost.

mod common;

use std::io::{Read as _, Write as _};
use std::sync::Arc;
use std::time::Duration;

use belay_link::{
    DataConnection, DialError, ListenerOptions, client_config, dial_control, dial_data, server_config,
};
use belay_wire::{ConnectionKind, Hello, Version};
use common::{Agent, Cluster, PATIENCE, any_port, host};
use proptest::prelude::*;
use rustls::RootCertStore;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;
use tokio_rustls::{TlsAcceptor, TlsConnector};

type ClientStream = tokio_rustls::client::TlsStream<TcpStream>;

async fn connect(agent: &Agent, config: Arc<rustls::ClientConfig>) -> ClientStream {
    let socket = TcpStream::connect(agent.address).await.unwrap();
    let name = ServerName::try_from("host-a").unwrap();
    TlsConnector::from(config).connect(name, socket).await.unwrap()
}

fn read_certificate(cluster: &Cluster, name: &str) -> CertificateDer<'static> {
    CertificateDer::from_pem_file(cluster.path().join(name)).unwrap()
}

fn read_key(cluster: &Cluster) -> PrivateKeyDer<'static> {
    PrivateKeyDer::from_pem_file(cluster.path().join("host.key")).unwrap()
}

fn roots_of(cluster: &Cluster) -> Arc<RootCertStore> {
    let mut roots = RootCertStore::empty();
    roots.add(read_certificate(cluster, "ca.crt")).unwrap();
    Arc::new(roots)
}

fn provider() -> Arc<rustls::crypto::CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

/// A client that trusts one cluster and shows the certificate of another, or none.
fn stranger(trusts: &Cluster, shows: Option<&Cluster>) -> Arc<rustls::ClientConfig> {
    let builder = rustls::ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(roots_of(trusts));
    Arc::new(match shows {
        Some(other) => {
            builder.with_client_auth_cert(vec![read_certificate(other, "host.crt")], read_key(other)).unwrap()
        }
        None => builder.with_no_client_auth(),
    })
}

/// Reads through a detached connection, as the data plane does, until `wanted` bytes are there.
fn read_detached(connection: &mut DataConnection, wanted: usize) -> Vec<u8> {
    connection.socket.set_nonblocking(false).unwrap();
    connection.socket.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut got = std::mem::take(&mut connection.early);
    while got.len() < wanted {
        assert_ne!(
            connection.tls.read_tls(&mut connection.socket).unwrap(),
            0,
            "closed after {} bytes",
            got.len()
        );
        let ready = connection.tls.process_new_packets().unwrap().plaintext_bytes_to_read();
        let start = got.len();
        got.resize(start + ready, 0);
        connection.tls.reader().read_exact(&mut got[start..]).unwrap();
    }
    got
}

fn write_detached(connection: &mut DataConnection, bytes: &[u8]) {
    connection.socket.set_nonblocking(false).unwrap();
    connection.tls.writer().write_all(bytes).unwrap();
    while connection.tls.wants_write() {
        connection.tls.write_tls(&mut connection.socket).unwrap();
    }
}

#[tokio::test]
async fn data_connection_keeps_the_bytes_right_behind_the_hello() {
    let a = Cluster::new("host-a");
    let mut agent = Agent::start(&a.identity).await;
    for payload_bytes in [1, 47, 16_000, 200_000] {
        let payload: Vec<u8> = (0..payload_bytes).map(|at| (at % 251) as u8).collect();
        let mut stream = connect(&agent, client_config(&a.identity)).await;
        let mut all = Hello::of(ConnectionKind::Data).encode().to_vec();
        all.extend(&payload);
        let writer = tokio::spawn(async move {
            // The hello and what follows in one go, without waiting for the answer.
            stream.write_all(&all).await.unwrap();
            stream.flush().await.unwrap();
            let mut answer = [0; 16];
            stream.read_exact(&mut answer).await.unwrap();
            assert_eq!(Hello::decode_answer(&answer), Ok(Ok(Version(1))));
            stream
        });
        let mut connection = timeout(PATIENCE, agent.data.recv()).await.unwrap().unwrap();
        assert_eq!(connection.peer, host("host-a"));
        assert!(!connection.early.is_empty(), "the test wants bytes that came early");
        let got = tokio::task::spawn_blocking(move || read_detached(&mut connection, payload_bytes));
        assert!(got.await.unwrap() == payload, "bytes were lost or changed");
        writer.await.unwrap();
    }
}

#[tokio::test]
async fn dialled_data_connection_keeps_the_bytes_right_behind_the_answer() {
    let a = Cluster::new("host-a");
    let socket = TcpListener::bind(any_port()).await.unwrap();
    let addresses = vec![socket.local_addr().unwrap().to_string()];
    let acceptor = TlsAcceptor::from(server_config(&a.identity));
    let server = tokio::spawn(async move {
        let mut stream = acceptor.accept(socket.accept().await.unwrap().0).await.unwrap();
        stream.read_exact(&mut [0; 16]).await.unwrap();
        let mut all = Hello::answer(Ok(Version(1)));
        all.extend(b"right behind the answer");
        stream.write_all(&all).await.unwrap();
        stream.flush().await.unwrap();
        stream
    });
    let mut connection = dial_data(&addresses, &host("host-a"), &a.identity, PATIENCE).await.unwrap();
    let got = tokio::task::spawn_blocking(move || read_detached(&mut connection, 23)).await.unwrap();
    assert_eq!(got, b"right behind the answer");
    server.await.unwrap();
}

#[tokio::test]
async fn detached_ends_carry_data_both_ways() {
    let a = Cluster::new("host-a");
    let mut agent = Agent::start(&a.identity).await;
    let mut dialled = dial_data(&agent.addresses(), &host("host-a"), &a.identity, PATIENCE).await.unwrap();
    let mut accepted = timeout(PATIENCE, agent.data.recv()).await.unwrap().unwrap();
    assert!(accepted.socket.nodelay().unwrap() && dialled.socket.nodelay().unwrap());
    assert_eq!(accepted.tls.protocol_version(), Some(rustls::ProtocolVersion::TLSv1_3));
    tokio::task::spawn_blocking(move || {
        write_detached(&mut dialled, b"request");
        assert_eq!(read_detached(&mut accepted, 7), b"request");
        write_detached(&mut accepted, b"reply");
        assert_eq!(read_detached(&mut dialled, 5), b"reply");
    })
    .await
    .unwrap();
}

#[tokio::test]
async fn server_of_another_cluster_is_rejected_by_the_caller() {
    let (a, other) = (Cluster::new("host-a"), Cluster::new("host-a"));
    let agent = Agent::start(&other.identity).await;
    let error = dial_control(&agent.addresses(), &host("host-a"), &a.identity, PATIENCE).await.unwrap_err();
    assert!(
        matches!(&error, DialError::CertificateRejected { reason, .. } if reason.contains("here")),
        "{error}"
    );
    agent.assert_well(&other).await;
}

#[tokio::test]
async fn caller_of_another_cluster_is_rejected_by_the_server() {
    let (a, other) = (Cluster::new("host-a"), Cluster::new("host-a"));
    let agent = Agent::start(&a.identity).await;
    let mut stream = connect(&agent, stranger(&a, Some(&other))).await;
    let _ = stream.write_all(&Hello::of(ConnectionKind::Control).encode()).await;
    let error = stream.read_exact(&mut [0; 16]).await.unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::InvalidData, "an alert was expected: {error}");
    agent.assert_well(&a).await;
}

/// A certificate of the cluster's authority whose time is over, and its key.
fn expired(cluster: &Cluster) -> (CertificateDer<'static>, PrivateKeyDer<'static>) {
    let read = |name: &str| std::fs::read_to_string(cluster.path().join(name)).unwrap();
    let authority = rcgen::KeyPair::from_pem(&read("ca.key")).unwrap();
    let issuer = rcgen::Issuer::from_ca_cert_pem(&read("ca.crt"), authority).unwrap();
    let mut params = rcgen::CertificateParams::new(vec!["host-b".to_owned()]).unwrap();
    params.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::ClientAuth];
    params.not_before = rcgen::date_time_ymd(2020, 1, 1);
    params.not_after = rcgen::date_time_ymd(2021, 1, 1);
    let key = rcgen::KeyPair::generate().unwrap();
    let certificate = params.signed_by(&key, &issuer).unwrap().der().clone();
    (certificate, PrivateKeyDer::Pkcs8(key.serialize_der().into()))
}

#[tokio::test]
async fn caller_with_an_expired_certificate_is_rejected_by_the_server() {
    let a = Cluster::new("host-a");
    let agent = Agent::start(&a.identity).await;
    let (certificate, key) = expired(&a);
    let config = rustls::ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(roots_of(&a))
        .with_client_auth_cert(vec![certificate], key)
        .unwrap();
    let mut stream = connect(&agent, Arc::new(config)).await;
    let _ = stream.write_all(&Hello::of(ConnectionKind::Control).encode()).await;
    let error = stream.read_exact(&mut [0; 16]).await.unwrap_err();
    assert!(error.to_string().contains("CertificateExpired"), "{error}");
    agent.assert_well(&a).await;
}

#[tokio::test]
async fn caller_learns_that_its_certificate_was_rejected() {
    let (a, other) = (Cluster::new("host-a"), Cluster::new("host-b"));
    // host-a's server, but it trusts only the other cluster.
    let verifier = rustls::server::WebPkiClientVerifier::builder_with_provider(roots_of(&other), provider());
    let config = rustls::ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_client_cert_verifier(verifier.build().unwrap())
        .with_single_cert(vec![read_certificate(&a, "host.crt")], read_key(&a))
        .unwrap();
    let socket = TcpListener::bind(any_port()).await.unwrap();
    let addresses = vec![socket.local_addr().unwrap().to_string()];
    let server = tokio::spawn(async move {
        let stream = socket.accept().await.unwrap().0;
        TlsAcceptor::from(Arc::new(config)).accept(stream).await.map(drop).unwrap_err()
    });
    let error = dial_control(&addresses, &host("host-a"), &a.identity, PATIENCE).await.unwrap_err();
    assert!(
        matches!(&error, DialError::CertificateRejected { reason, .. } if reason.contains("there")),
        "{error}"
    );
    server.await.unwrap();
}

#[tokio::test]
async fn other_host_at_the_address_is_not_taken_for_the_one_wanted() {
    let a = Cluster::new("host-a");
    let agent = Agent::start(&a.identity).await;
    let error = dial_control(&agent.addresses(), &host("host-b"), &a.identity, PATIENCE).await.unwrap_err();
    let expected = DialError::WrongHost { expected: host("host-b"), address: agent.address };
    assert_eq!(error, expected);
}

#[tokio::test]
async fn caller_without_certificate_is_refused_with_the_reason() {
    let a = Cluster::new("host-a");
    let agent = Agent::start(&a.identity).await;
    for kind in [ConnectionKind::Control, ConnectionKind::Data] {
        let mut stream = connect(&agent, stranger(&a, None)).await;
        stream.write_all(&Hello::of(kind).encode()).await.unwrap();
        let reason = read_refusal(&mut stream).await;
        assert!(reason.contains("belay host join"), "{reason}");
    }
    agent.assert_well(&a).await;
}

async fn read_refusal(stream: &mut ClientStream) -> String {
    let mut fixed = [0; 16];
    stream.read_exact(&mut fixed).await.unwrap();
    let reason_bytes = Hello::decode_answer(&fixed).unwrap().expect_err("a refusal was expected");
    let mut reason = vec![0; reason_bytes];
    stream.read_exact(&mut reason).await.unwrap();
    assert_eq!(stream.read(&mut [0; 1]).await.unwrap(), 0, "a refused connection ends");
    String::from_utf8(reason).unwrap()
}

#[tokio::test]
async fn caller_without_a_common_version_or_known_kind_is_refused_with_the_reason() {
    let a = Cluster::new("host-a");
    let agent = Agent::start(&a.identity).await;
    let newer = Hello { min: Version(8), max: Version(9), kind: ConnectionKind::Control };
    let mut unknown_kind = Hello::of(ConnectionKind::Control).encode();
    unknown_kind[12] = 77;
    for (hello, expected) in [(newer.encode(), "8 to 9"), (unknown_kind, "kind 77")] {
        let mut stream = connect(&agent, client_config(&a.identity)).await;
        stream.write_all(&hello).await.unwrap();
        let reason = read_refusal(&mut stream).await;
        assert!(reason.contains(expected), "{reason}");
    }
    agent.assert_well(&a).await;
}

#[tokio::test]
async fn refusal_of_the_version_reaches_the_one_who_dialled() {
    let a = Cluster::new("host-a");
    let socket = TcpListener::bind(any_port()).await.unwrap();
    let addresses = vec![socket.local_addr().unwrap().to_string()];
    let acceptor = TlsAcceptor::from(server_config(&a.identity));
    let server = tokio::spawn(async move {
        let mut stream = acceptor.accept(socket.accept().await.unwrap().0).await.unwrap();
        stream.read_exact(&mut [0; 16]).await.unwrap();
        stream.write_all(&Hello::answer(Err("too old for me"))).await.unwrap();
        stream.shutdown().await.unwrap();
    });
    let error = dial_control(&addresses, &host("host-a"), &a.identity, PATIENCE).await.unwrap_err();
    let expected = DialError::Refused { host: host("host-a"), reason: "too old for me".to_owned() };
    assert_eq!(error, expected);
    server.await.unwrap();
}

#[tokio::test]
async fn address_that_answers_wins_over_those_that_do_not() {
    let a = Cluster::new("host-a");
    let agent = Agent::start(&a.identity).await;
    // One that takes connections and says nothing, and one where nobody is.
    let silent = TcpListener::bind(any_port()).await.unwrap();
    let closed = TcpListener::bind(any_port()).await.unwrap().local_addr().unwrap();
    let addresses = [silent.local_addr().unwrap(), closed, agent.address].map(|address| address.to_string());
    let connection = dial_control(&addresses, &host("host-a"), &a.identity, PATIENCE).await.unwrap();
    assert_eq!(connection.address, agent.address);
}

#[tokio::test]
async fn host_that_is_nowhere_is_unreachable() {
    let a = Cluster::new("host-a");
    let closed = TcpListener::bind(any_port()).await.unwrap().local_addr().unwrap().to_string();
    for addresses in [vec![closed], vec![]] {
        let error = dial_control(&addresses, &host("host-a"), &a.identity, PATIENCE).await.unwrap_err();
        assert!(matches!(error, DialError::Unreachable { .. }), "{error}");
    }
    let silent = TcpListener::bind(any_port()).await.unwrap();
    let addresses = vec![silent.local_addr().unwrap().to_string()];
    let soon = Duration::from_millis(600);
    let error = dial_control(&addresses, &host("host-a"), &a.identity, soon).await.unwrap_err();
    assert!(matches!(error, DialError::Unreachable { .. }), "{error}");
}

/// A ClientHello without `supported_versions`: TLS 1.2 is the newest that this client speaks.
fn tls12_client_hello() -> Vec<u8> {
    let extensions: &[u8] = &[
        0, 10, 0, 6, 0, 4, 0, 29, 0, 23, // groups: x25519, P-256
        0, 11, 0, 2, 1, 0, // uncompressed points
        0, 13, 0, 6, 0, 4, 4, 3, 8, 4, // signatures: ECDSA P-256 with SHA-256, RSA-PSS
    ];
    let mut body = vec![3, 3];
    body.extend([0x5a; 32]);
    body.push(0);
    body.extend([0, 4, 0xc0, 0x2b, 0xc0, 0x2c, 1, 0]);
    body.extend((extensions.len() as u16).to_be_bytes());
    body.extend(extensions);
    let mut handshake = vec![1, 0];
    handshake.extend((body.len() as u16).to_be_bytes());
    handshake.extend(body);
    let mut record = vec![22, 3, 1];
    record.extend((handshake.len() as u16).to_be_bytes());
    record.extend(handshake);
    record
}

#[tokio::test]
async fn client_of_tls_1_2_is_refused() {
    let a = Cluster::new("host-a");
    let agent = Agent::start(&a.identity).await;
    let mut socket = TcpStream::connect(agent.address).await.unwrap();
    socket.write_all(&tls12_client_hello()).await.unwrap();
    let mut alert = [0; 7];
    timeout(PATIENCE, socket.read_exact(&mut alert)).await.unwrap().unwrap();
    assert_eq!((alert[0], alert[5], alert[6]), (21, 2, 70), "a fatal alert, protocol_version");
    agent.assert_well(&a).await;
}

#[tokio::test]
async fn hello_in_plaintext_gets_no_answer_in_plaintext() {
    let a = Cluster::new("host-a");
    let agent = Agent::start(&a.identity).await;
    let mut socket = TcpStream::connect(agent.address).await.unwrap();
    socket.write_all(&Hello::of(ConnectionKind::Control).encode()).await.unwrap();
    let mut answer = Vec::new();
    let _ = timeout(PATIENCE, socket.read_to_end(&mut answer)).await.unwrap();
    assert!(!answer.windows(8).any(|window| window == b"BELAYHLO"), "{answer:?}");
    agent.assert_well(&a).await;
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn garbage_on_the_socket_leaves_the_listener_working(
        garbage in prop::collection::vec(any::<u8>(), 0..2000),
        like_tls in any::<bool>(),
        inside_tls in any::<bool>(),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let a = Cluster::new("host-a");
            let agent = Agent::start(&a.identity).await;
            let mut rest = Vec::new();
            if inside_tls {
                let mut stream = connect(&agent, client_config(&a.identity)).await;
                if like_tls {
                    stream.write_all(&Hello::of(ConnectionKind::Control).encode()).await.unwrap();
                }
                let _ = stream.write_all(&garbage).await;
                let _ = stream.shutdown().await;
                let _ = timeout(PATIENCE, stream.read_to_end(&mut rest)).await.expect("it ends");
            } else {
                let mut socket = TcpStream::connect(agent.address).await.unwrap();
                if like_tls {
                    let _ = socket.write_all(&[22, 3, 1, 2, 0, 1, 0, 1, 252]).await;
                }
                let _ = socket.write_all(&garbage).await;
                let _ = socket.shutdown().await;
                let _ = timeout(PATIENCE, socket.read_to_end(&mut rest)).await.expect("it ends");
            }
            agent.assert_well(&a).await;
        });
    }
}

#[tokio::test]
async fn callers_that_say_nothing_are_dropped_and_make_room() {
    let a = Cluster::new("host-a");
    let options = ListenerOptions { handshake_timeout: Duration::from_millis(300), max_handshakes: 2 };
    let agent = Agent::start_with(&a.identity, any_port(), options).await;
    let mut silent = Vec::new();
    for _ in 0..4 {
        silent.push(TcpStream::connect(agent.address).await.unwrap());
    }
    agent.assert_well(&a).await;
    let ended = timeout(PATIENCE, silent[0].read(&mut [0; 1])).await.unwrap();
    assert!(matches!(ended, Ok(0) | Err(_)), "the connection ends");
}

#[tokio::test]
async fn callers_that_say_nothing_do_not_keep_others_out() {
    let a = Cluster::new("host-a");
    // Nobody is given up for being slow.
    let options = ListenerOptions { handshake_timeout: Duration::from_secs(3600), max_handshakes: 8 };
    let mut agent = Agent::start_with(&a.identity, any_port(), options).await;
    let mut silent = Vec::new();
    for _ in 0..3 {
        for _ in 0..8 {
            silent.push(TcpStream::connect(agent.address).await.unwrap());
        }
        let addresses = [agent.address.to_string()];
        dial_data(&addresses, &host("host-a"), &a.identity, PATIENCE).await.unwrap();
        timeout(PATIENCE, agent.data.recv()).await.unwrap().unwrap();
    }
    // The first ones have been closed.
    assert_eq!(timeout(PATIENCE, silent[0].read(&mut [0])).await.unwrap().unwrap_or(0), 0);
}
