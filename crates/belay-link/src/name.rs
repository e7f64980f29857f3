//! The name of a host: what its certificate says, and what commands call it.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use rustls::pki_types::ServerName;
use serde::{Deserialize, Serialize};

/// The longest host name, in bytes: what Linux allows for a node name (`HOST_NAME_MAX`).
const MAX_HOST_NAME_BYTES: usize = 64;

/// A valid host name: letters a–z, digits, `-` and `.`, as in DNS, in lower case. Cheap to clone.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct HostName(Arc<str>);

/// Why a text is no host name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{given}` is not a usable host name: {reason}; use 1 to {MAX_HOST_NAME_BYTES} lower-case letters, digits, \
     `-` and `.`, for example `host-a`"
)]
pub struct HostNameError {
    given: String,
    reason: &'static str,
}

impl HostName {
    /// Checks a name.
    ///
    /// # Errors
    /// Not a DNS name in lower case.
    pub fn new(name: &str) -> Result<Self, HostNameError> {
        let refuse = |reason| {
            let given: String =
                name.chars().take(MAX_HOST_NAME_BYTES).flat_map(char::escape_default).collect();
            Err(HostNameError { given, reason })
        };
        if name.is_empty() {
            return refuse("it is empty");
        }
        if name.len() > MAX_HOST_NAME_BYTES {
            return refuse("it is too long");
        }
        if name.bytes().any(|byte| byte.is_ascii_uppercase()) {
            return refuse("it has capital letters");
        }
        if !name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'.') {
            return refuse("it has other characters");
        }
        let label_ok = |label: &str| !label.is_empty() && !label.starts_with('-') && !label.ends_with('-');
        if !name.split('.').all(label_ok) {
            return refuse("a part of it is empty, or begins or ends with `-`");
        }
        match ServerName::try_from(name) {
            Ok(ServerName::DnsName(_)) => Ok(Self(name.into())),
            _ => refuse("it is an address or a number, not a name"),
        }
    }

    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for HostName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for HostName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", &*self.0)
    }
}

impl FromStr for HostName {
    type Err = HostNameError;
    fn from_str(name: &str) -> Result<Self, Self::Err> {
        Self::new(name)
    }
}

impl TryFrom<String> for HostName {
    type Error = HostNameError;
    fn try_from(name: String) -> Result<Self, Self::Error> {
        Self::new(&name)
    }
}

impl From<HostName> for String {
    fn from(name: HostName) -> Self {
        name.as_str().to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ordinary_names_are_taken() {
        for name in ["a", "host-a", "node1.rack2.example.org", "10g-host"] {
            assert_eq!(HostName::new(name).unwrap().as_str(), name);
        }
    }

    #[test]
    fn names_that_are_none_are_refused() {
        let long = "a".repeat(65);
        for name in [
            "", "Host", "a b", "a/b", "-a", "a-", "a..b", ".a", "10.0.0.1", "7", "::1", "a_b", "ä", "a\n",
            &long,
        ] {
            assert!(HostName::new(name).is_err(), "{name:?} was taken");
        }
    }
}
