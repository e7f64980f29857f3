//! Enrolling hosts, over real connections.

mod common;

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::sync::Arc;
use std::time::Duration;

use belay_link::{
    Authority, Identity, JoinError, JoinRefusal, PkiError, TokenError, install_certificate, invite, join,
    known_hosts, renew, renewal_request,
};
use common::{Agent, Cluster, host};

const HOUR: Duration = Duration::from_secs(3600);

fn refusal(outcome: Result<belay_link::Joined, JoinError>) -> JoinRefusal {
    match outcome {
        Err(JoinError::Refused { refusal, .. }) => refusal,
        other => panic!("not refused: {other:?}"),
    }
}

#[tokio::test]
async fn host_with_a_token_joins_and_both_call_each_other() {
    let a = Cluster::new("host-a");
    let mut agent_a = Agent::start(&a.identity).await;
    let token = invite(a.path(), &agent_a.addresses(), HOUR).unwrap();
    let b_parent = tempfile::tempdir().unwrap();
    let b_path = b_parent.path().join("pki");
    let b_addresses = vec!["10.0.0.2:7440".to_owned()];
    let joined = join(&token, &b_path, &host("host-b"), &b_addresses).await.unwrap();
    assert_eq!(joined.identity.cluster(), a.identity.cluster());
    assert_eq!(joined.hosts.len(), 1);
    assert_eq!(joined.hosts[0].name, host("host-a"));
    assert_eq!(joined.hosts[0].addresses, agent_a.addresses());
    let told = agent_a.joined.recv().await.unwrap();
    assert_eq!((told.name, told.addresses), (host("host-b"), b_addresses));
    assert_eq!(known_hosts(a.path()).unwrap().len(), 2);
    for entry in fs::read_dir(&b_path).unwrap() {
        let entry = entry.unwrap();
        assert_eq!(entry.metadata().unwrap().permissions().mode() & 0o777, 0o600, "{:?}", entry.path());
    }
    assert!(!b_path.join("ca.key").exists(), "the authority's key has left its host");

    let b = Arc::new(Identity::load(&b_path).unwrap());
    let agent_b = Agent::start(&b).await;
    let from_b: String = agent_a.client("host-a", &b).call("who", &()).await.unwrap();
    let from_a: String = agent_b.client("host-b", &a.identity).call("who", &()).await.unwrap();
    assert_eq!((from_b.as_str(), from_a.as_str()), ("host-b", "host-a"));
}

#[tokio::test]
async fn token_is_good_for_one_host_only() {
    let a = Cluster::new("host-a");
    let agent = Agent::start(&a.identity).await;
    let token = invite(a.path(), &agent.addresses(), HOUR).unwrap();
    let (b, c) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    // At the same time, so that both may have been looked at before either is answered.
    let (name_b, name_c) = (host("host-b"), host("host-c"));
    let (first, second) =
        tokio::join!(join(&token, b.path(), &name_b, &[]), join(&token, c.path(), &name_c, &[]));
    assert_ne!(first.is_ok(), second.is_ok(), "exactly one joins");
    let (loser, path) = if first.is_ok() { (second, c.path()) } else { (first, b.path()) };
    assert_eq!(refusal(loser), JoinRefusal::UsedToken);
    assert!(matches!(Identity::load(path), Err(PkiError::NotEnrolled { .. })));
    assert_eq!(known_hosts(a.path()).unwrap().len(), 2);
}

#[tokio::test]
async fn expired_token_is_refused() {
    let a = Cluster::new("host-a");
    let agent = Agent::start(&a.identity).await;
    let token = invite(a.path(), &agent.addresses(), Duration::ZERO).unwrap();
    let b = tempfile::tempdir().unwrap();
    assert_eq!(refusal(join(&token, b.path(), &host("host-b"), &[]).await), JoinRefusal::ExpiredToken);
    assert_eq!(known_hosts(a.path()).unwrap().len(), 1);
}

#[tokio::test]
async fn garbled_token_is_refused_before_anything_is_sent() {
    let b = tempfile::tempdir().unwrap();
    for (token, expected) in [("nonsense", TokenError::Prefix), ("belay1.AAAA", TokenError::Damaged)] {
        let error = join(token, b.path(), &host("host-b"), &[]).await.unwrap_err();
        assert!(matches!(error, JoinError::Token(reason) if reason == expected), "{error}");
    }
    assert_eq!(fs::read_dir(b.path()).unwrap().count(), 0);
}

#[tokio::test]
async fn token_that_was_never_made_is_refused() {
    let a = Cluster::new("host-a");
    let agent = Agent::start(&a.identity).await;
    let token = invite(a.path(), &agent.addresses(), HOUR).unwrap();
    fs::remove_file(a.path().join("invites.json")).unwrap();
    let b = tempfile::tempdir().unwrap();
    assert_eq!(refusal(join(&token, b.path(), &host("host-b"), &[]).await), JoinRefusal::UnknownToken);
}

#[tokio::test]
async fn joining_host_does_not_trust_another_cluster_at_the_address() {
    // The same host name, but an authority of its own: an impostor.
    let (a, impostor) = (Cluster::new("host-a"), Cluster::new("host-a"));
    let agent = Agent::start(&impostor.identity).await;
    let token = invite(a.path(), &agent.addresses(), HOUR).unwrap();
    let b = tempfile::tempdir().unwrap();
    let error = join(&token, b.path(), &host("host-b"), &[]).await.unwrap_err();
    assert!(matches!(error, JoinError::WrongCluster { .. }), "{error}");
    assert!(matches!(Identity::load(b.path()), Err(PkiError::NotEnrolled { .. })));
    agent.assert_well(&impostor).await;
}

#[tokio::test]
async fn taken_name_is_refused_and_the_token_stays_good() {
    let a = Cluster::new("host-a");
    let agent = Agent::start(&a.identity).await;
    let token = invite(a.path(), &agent.addresses(), HOUR).unwrap();
    let b = tempfile::tempdir().unwrap();
    let refused = refusal(join(&token, b.path(), &host("host-a"), &[]).await);
    assert_eq!(refused, JoinRefusal::NameTaken(host("host-a")));
    join(&token, b.path(), &host("host-b"), &[]).await.unwrap();

    let again = invite(a.path(), &agent.addresses(), HOUR).unwrap();
    let error = join(&again, b.path(), &host("host-c"), &[]).await.unwrap_err();
    assert!(matches!(error, JoinError::Pki(PkiError::AlreadyEnrolled { .. })), "{error}");

    assert!(belay_link::forget(a.path(), &host("host-b")).unwrap());
    let c = tempfile::tempdir().unwrap();
    join(&again, c.path(), &host("host-b"), &[]).await.unwrap();
    // The one that was removed stays out, the new one is in.
    let call = async |directory: &std::path::Path| -> Result<u64, belay_link::CallError> {
        let identity = std::sync::Arc::new(Identity::load(directory).unwrap());
        let client = agent.client("host-a", &identity);
        client.call_within(std::time::Duration::from_secs(2), "double", &21_u64).await
    };
    let refused = call(b.path()).await.unwrap_err().to_string();
    assert!(refused.contains("was removed here"), "{refused}");
    assert_eq!(call(c.path()).await.unwrap(), 42);
}

#[tokio::test]
async fn host_without_the_authority_can_not_invite_or_renew_but_is_renewed_by_it() {
    let a = Cluster::new("host-a");
    let agent = Agent::start(&a.identity).await;
    let token = invite(a.path(), &agent.addresses(), HOUR).unwrap();
    let b = tempfile::tempdir().unwrap();
    let joined = join(&token, b.path(), &host("host-b"), &[]).await.unwrap();
    let error = invite(b.path(), &agent.addresses(), HOUR).unwrap_err();
    assert!(matches!(error, PkiError::NotAuthority { .. }), "{error}");
    assert!(matches!(renew(b.path()), Err(PkiError::NotAuthority { .. })));

    let authority = Authority::open(a.path()).unwrap();
    let certificate = authority.sign_renewal(&host("host-b"), &renewal_request(b.path()).unwrap()).unwrap();
    let renewed = install_certificate(b.path(), &certificate).unwrap();
    assert!(renewed.not_after() >= joined.identity.not_after());
    let who: String = agent.client("host-a", &Arc::new(renewed)).call("who", &()).await.unwrap();
    assert_eq!(who, "host-b");
}

#[tokio::test]
async fn inviting_agent_without_the_key_says_so() {
    let a = Cluster::new("host-a");
    let agent = Agent::start(&a.identity).await;
    let token = invite(a.path(), &agent.addresses(), HOUR).unwrap();
    fs::remove_file(a.path().join("ca.key")).unwrap();
    let b = tempfile::tempdir().unwrap();
    assert_eq!(refusal(join(&token, b.path(), &host("host-b"), &[]).await), JoinRefusal::NotAuthority);
}

#[tokio::test]
async fn absent_inviting_host_is_named() {
    let a = Cluster::new("host-a");
    let agent = Agent::start(&a.identity).await;
    let token = invite(a.path(), &agent.addresses(), HOUR).unwrap();
    let address = agent.address.to_string();
    agent.stop().await;
    let b = tempfile::tempdir().unwrap();
    let error = join(&token, b.path(), &host("host-b"), &[]).await.unwrap_err();
    assert!(matches!(error, JoinError::Unreachable { .. }), "{error}");
    assert!(error.to_string().contains(&address), "{error}");
}

#[test]
fn invitation_to_no_address_is_refused() {
    let a = Cluster::new("host-a");
    for addresses in [&[][..], &["host-a".to_owned()], &["a b:1".to_owned()]] {
        assert!(invite(a.path(), addresses, HOUR).is_err(), "{addresses:?}");
    }
}
