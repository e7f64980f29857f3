//! One-time tokens, with which a host joins the cluster.
//!
//! ```text
//!   belay1.BASE64URL( secret 32 │ SHA-256 of the CA certificate 32 │ u8 len, host name │ u8 count, (u8 len, address)…
//!                     │ first 4 bytes of SHA-256 of all before )
//! ```
//! The inviting host keeps only the SHA-256 of the secret.

use std::path::Path;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ring::digest::{SHA256, digest};
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;

use crate::authority::Authority;
use crate::files::{self, CA_CERTIFICATE, DirectoryLock, INVITES};
use crate::hosts;
use crate::identity::{Identity, PkiError, read_certificate, unusable};
use crate::join::JoinRefusal;
use crate::name::HostName;
use crate::tls;

/// How long an invitation is good for unless it is said otherwise.
pub const DEFAULT_INVITE_EXPIRY: Duration = Duration::from_secs(3600);
const PREFIX: &str = "belay1.";
const SECRET_BYTES: usize = 32;
const CHECKSUM_BYTES: usize = 4;
/// More than one token with 16 addresses of 255 bytes has; a longer text is none.
const MAX_TOKEN_CHARS: usize = 8192;
const MAX_ADDRESSES: usize = 16;
/// Invitations that are used or expired are remembered this long, to say so to whoever comes with one.
const REMEMBERED_SECONDS: i64 = 30 * 24 * 3600;

/// Why a text is no token.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// It does not begin like one.
    #[error("this is no token: a token begins with `{PREFIX}`; copy all of what `belay host invite` printed")]
    Prefix,
    /// It was changed or cut on the way.
    #[error("the token is damaged: copy all of what `belay host invite` printed")]
    Damaged,
}

/// What a token says.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Token {
    pub(crate) secret: [u8; SECRET_BYTES],
    pub(crate) ca_fingerprint: [u8; 32],
    pub(crate) host: HostName,
    pub(crate) addresses: Vec<String>,
}

impl Token {
    pub(crate) fn encode(&self) -> String {
        let mut bytes = self.secret.to_vec();
        bytes.extend(self.ca_fingerprint);
        push_text(&mut bytes, self.host.as_str());
        bytes.push(self.addresses.len().min(MAX_ADDRESSES) as u8);
        for address in self.addresses.iter().take(MAX_ADDRESSES) {
            push_text(&mut bytes, address);
        }
        let checksum = digest(&SHA256, &bytes);
        bytes.extend(&checksum.as_ref()[..CHECKSUM_BYTES]);
        format!("{PREFIX}{}", URL_SAFE_NO_PAD.encode(bytes))
    }

    pub(crate) fn decode(text: &str) -> Result<Self, TokenError> {
        let text = text.trim().strip_prefix(PREFIX).ok_or(TokenError::Prefix)?;
        if text.len() > MAX_TOKEN_CHARS {
            return Err(TokenError::Damaged);
        }
        let bytes = URL_SAFE_NO_PAD.decode(text).map_err(|_| TokenError::Damaged)?;
        let (content, checksum) =
            bytes.split_at_checked(bytes.len().wrapping_sub(CHECKSUM_BYTES)).ok_or(TokenError::Damaged)?;
        if &digest(&SHA256, content).as_ref()[..CHECKSUM_BYTES] != checksum {
            return Err(TokenError::Damaged);
        }
        Self::parse(content).ok_or(TokenError::Damaged)
    }

    fn parse(mut rest: &[u8]) -> Option<Self> {
        let secret = *rest.split_off(..SECRET_BYTES)?.first_chunk()?;
        let ca_fingerprint = *rest.split_off(..32)?.first_chunk()?;
        let host = HostName::new(take_text(&mut rest)?).ok()?;
        let count = usize::from(*rest.split_off_first()?);
        if count > MAX_ADDRESSES {
            return None;
        }
        let mut addresses = Vec::with_capacity(count);
        for _ in 0..count {
            addresses.push(take_text(&mut rest)?.to_owned());
        }
        rest.is_empty().then_some(Self { secret, ca_fingerprint, host, addresses })
    }
}

fn push_text(bytes: &mut Vec<u8>, text: &str) {
    let text = &text.as_bytes()[..text.len().min(255)];
    bytes.push(text.len() as u8);
    bytes.extend(text);
}

fn take_text<'a>(rest: &mut &'a [u8]) -> Option<&'a str> {
    let length = usize::from(*rest.split_off_first()?);
    std::str::from_utf8(rest.split_off(..length)?).ok()
}

#[derive(Debug, Default, Serialize, Deserialize)]
struct InvitesFile {
    invites: Vec<Invite>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Invite {
    secret_sha256: String,
    expires_unix_s: i64,
    used_by: Option<HostName>,
}

/// Makes a one-time token with which one host can join. `addresses` (`host:port`) are where this host's agent is
/// reached.
///
/// # Errors
/// This host does not hold the cluster's key, an address is not usable, or a file can not be written.
pub fn invite(directory: &Path, addresses: &[String], expires_in: Duration) -> Result<String, PkiError> {
    let bad = |address: &&String| {
        address.len() > 255 || !address.contains(':') || address.contains(char::is_whitespace)
    };
    if let Some(address) = addresses.iter().find(bad) {
        let reason = format!("`{}` is no `host:port`", address.escape_debug());
        return Err(unusable(Path::new("the address for the invitation"), &reason));
    }
    if addresses.is_empty() || addresses.len() > MAX_ADDRESSES {
        let reason = format!("1 to {MAX_ADDRESSES} addresses are needed");
        return Err(unusable(Path::new("the invitation"), &reason));
    }
    Authority::open(directory)?;
    let identity = Identity::load(directory)?;
    let ca_path = files::path(directory, CA_CERTIFICATE);
    let ca = read_certificate(&ca_path)?.ok_or_else(|| unusable(&ca_path, "it is gone"))?;
    let token = Token {
        secret: rand::random(),
        ca_fingerprint: tls::fingerprint(&ca),
        host: identity.host().clone(),
        addresses: addresses.to_vec(),
    };
    let expires_in = i64::try_from(expires_in.as_secs()).unwrap_or(i64::MAX);
    let expires_unix_s = OffsetDateTime::now_utc().unix_timestamp().saturating_add(expires_in);
    let _lock = DirectoryLock::acquire(directory)?;
    let mut file = read(directory)?;
    file.invites.push(Invite { secret_sha256: hash(&token.secret), expires_unix_s, used_by: None });
    write(directory, &file)?;
    hosts::record(directory, identity.host(), addresses)?;
    Ok(token.encode())
}

/// Whether the secret is of an invitation that still holds. The caller holds the lock of the directory.
pub(crate) fn check(directory: &Path, secret: &[u8], now: OffsetDateTime) -> Result<(), JoinRefusal> {
    let file = read(directory).map_err(|error| JoinRefusal::Failed(error.to_string()))?;
    let invite = find(&file, secret).ok_or(JoinRefusal::UnknownToken)?;
    if invite.used_by.is_some() {
        return Err(JoinRefusal::UsedToken);
    }
    if now.unix_timestamp() >= invite.expires_unix_s {
        return Err(JoinRefusal::ExpiredToken);
    }
    Ok(())
}

/// Marks the invitation as used, durably. The caller holds the lock of the directory, and has checked it.
pub(crate) fn consume(
    directory: &Path,
    secret: &[u8],
    host: &HostName,
    now: OffsetDateTime,
) -> Result<(), PkiError> {
    let mut file = read(directory)?;
    let wanted = hash(secret);
    for invite in file.invites.iter_mut().filter(|invite| invite.secret_sha256 == wanted) {
        invite.used_by = Some(host.clone());
    }
    let oldest = now.unix_timestamp().saturating_sub(REMEMBERED_SECONDS);
    file.invites.retain(|invite| invite.expires_unix_s >= oldest);
    write(directory, &file)
}

/// Secrets are found by their hash. How long the comparison takes tells nothing useful: whoever asks can not choose
/// the hash of a secret that he does not know.
fn find<'a>(file: &'a InvitesFile, secret: &[u8]) -> Option<&'a Invite> {
    let wanted = hash(secret);
    file.invites.iter().find(|invite| invite.secret_sha256 == wanted)
}

fn hash(secret: &[u8]) -> String {
    URL_SAFE_NO_PAD.encode(digest(&SHA256, secret))
}

fn read(directory: &Path) -> Result<InvitesFile, PkiError> {
    let path = files::path(directory, INVITES);
    let Some(text) = files::read_secret(&path)? else { return Ok(InvitesFile::default()) };
    serde_json::from_str(&text).map_err(|error| unusable(&path, &error.to_string()))
}

fn write(directory: &Path, file: &InvitesFile) -> Result<(), PkiError> {
    let path = files::path(directory, INVITES);
    let text = serde_json::to_string_pretty(file).map_err(|error| unusable(&path, &error.to_string()))?;
    files::write(&path, &text)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn token() -> Token {
        Token {
            secret: [7; 32],
            ca_fingerprint: [9; 32],
            host: HostName::new("host-a").unwrap(),
            addresses: vec!["10.0.0.1:7440".to_owned(), "[fd00::1]:7440".to_owned()],
        }
    }

    #[test]
    fn token_survives_being_written_down() {
        let text = token().encode();
        assert!(text.starts_with("belay1."));
        assert!(Token::decode(&format!("  {text}\n")).unwrap() == token());
    }

    #[test]
    fn token_with_any_character_changed_or_missing_is_damaged() {
        let text = token().encode();
        for at in PREFIX.len()..text.len() {
            let mut changed = text.clone().into_bytes();
            changed[at] = if changed[at] == b'A' { b'B' } else { b'A' };
            let changed = String::from_utf8(changed).unwrap();
            assert_eq!(Token::decode(&changed).err(), Some(TokenError::Damaged), "at {at}");
            assert_eq!(Token::decode(&text[..at]).err(), Some(TokenError::Damaged), "cut at {at}");
        }
        assert_eq!(Token::decode("hello").err(), Some(TokenError::Prefix));
    }

    proptest! {
        #[test]
        fn any_bytes_behind_the_prefix_are_refused_without_harm(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let mut text = PREFIX.to_owned();
            text.push_str(&URL_SAFE_NO_PAD.encode(&bytes));
            prop_assert!(Token::decode(&text).is_err());
            let mut whole = bytes.clone();
            whole.extend(&digest(&SHA256, &bytes).as_ref()[..CHECKSUM_BYTES]);
            let text = format!("{PREFIX}{}", URL_SAFE_NO_PAD.encode(&whole));
            if let Ok(token) = Token::decode(&text) {
                prop_assert_eq!(token.encode(), text);
            }
        }
    }
}
