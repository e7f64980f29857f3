//! `belay host`: works on this host's PKI directory; no agent is asked.

use std::path::Path;

use belay_link::{Authority, HostName, Identity, KnownHost, PkiError};
use serde_json::{Value, json};

use super::Context;
use crate::args::HostCommand;
use crate::error::{Failure, Outcome};
use crate::output::{self, Table};

pub(super) async fn run(context: &Context, command: HostCommand) -> Result<(), Failure> {
    let (value, text) = match command {
        HostCommand::Init { name, pki } => {
            let (identity, made) = init(&pki.directory, &HostName::new(&name)?)?;
            let text = format!(
                "cluster {} {made}; {}\nnext: start `belay agent`, and let other hosts join with `belay host invite`",
                identity.cluster(),
                described(&identity)
            );
            (identity_json(&identity), text)
        }
        HostCommand::Join { token, name, addresses, pki } => {
            let name = HostName::new(&name)?;
            let joined = belay_link::join(&token, &pki.directory, &name, &addresses).await?;
            let mut value = identity_json(&joined.identity);
            value["hosts"] = hosts_json(&joined.hosts);
            let text = format!(
                "joined cluster {}; {}\nnext: start `belay agent`",
                joined.identity.cluster(),
                described(&joined.identity)
            );
            (value, text)
        }
        HostCommand::Invite { addresses, expires, pki } => {
            let token = belay_link::invite(&pki.directory, &addresses, expires)?;
            let value = json!({"token": token, "expires_seconds": expires.as_secs()});
            (value, token)
        }
        HostCommand::List { pki } => {
            let hosts = belay_link::known_hosts(&pki.directory)?;
            (hosts_json(&hosts), table(&hosts, &pki.directory))
        }
        HostCommand::Remove { name, pki } => {
            let name = HostName::new(&name)?;
            let known = belay_link::forget(&pki.directory, &name)?;
            let was = if known { "removed" } else { "was not known here" };
            let text = format!(
                "host {name} {was}: its certificate is refused on this host from now on\n\
                 next: the same on every other host; a restart of the agent ends connections that stand"
            );
            (json!({"removed": name.as_str(), "was_known": known}), text)
        }
        HostCommand::Renew { pki } => {
            let identity = belay_link::renew(&pki.directory)?;
            (identity_json(&identity), format!("certificate renewed; {}", described(&identity)))
        }
    };
    if context.json { output::print_json(&value) } else { output::print(&text) }
}

/// Makes a cluster. The same again changes nothing, and says that it is there.
fn init(directory: &Path, name: &HostName) -> Result<(Identity, &'static str), Failure> {
    let refused = match belay_link::init(directory, name) {
        Ok(identity) => return Ok((identity, "made")),
        Err(error @ PkiError::AlreadyEnrolled { .. }) => error,
        Err(error) => return Err(error.into()),
    };
    match Identity::load(directory) {
        // One that has only joined a cluster has made none.
        Ok(identity) if identity.host() == name && Authority::open(directory).is_ok() => {
            Ok((identity, "is there already"))
        }
        Ok(identity) => Err(Failure::new(Outcome::Precheck, refused.to_string()).hint(format!(
            "this host is {} of cluster {}",
            identity.host(),
            identity.cluster()
        ))),
        Err(_) => Err(refused.into()),
    }
}

fn described(identity: &Identity) -> String {
    format!(
        "this host is {}, its certificate is valid until {}",
        identity.host(),
        identity.not_after().date()
    )
}

fn identity_json(identity: &Identity) -> Value {
    json!({
        "host": identity.host().as_str(),
        "cluster": identity.cluster().to_string(),
        "not_after_unix_seconds": identity.not_after().unix_timestamp(),
        "pki": identity.directory(),
    })
}

fn hosts_json(hosts: &[KnownHost]) -> Value {
    hosts.iter().map(|host| json!({"name": host.name.as_str(), "addresses": host.addresses})).collect()
}

fn table(hosts: &[KnownHost], directory: &Path) -> String {
    if hosts.is_empty() {
        return format!(
            "no hosts in {}: `belay host init` makes a cluster, `belay host join` joins one, `--pki` names another place",
            directory.display()
        );
    }
    let mut table = Table::new(&["HOST", "ADDRESSES"]);
    for host in hosts {
        table.row([host.name.as_str(), &host.addresses.join(", ")]);
    }
    table.text()
}
