//! Who this host is: its key, its certificate, and the authority that it trusts.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rcgen::KeyPair;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use uuid::Uuid;

use crate::certificate::Facts;
use crate::files::{self, CA_CERTIFICATE, CA_KEY, HOST_CERTIFICATE, HOST_KEY};
use crate::name::HostName;
use crate::tls;

/// Why the PKI directory can not be used.
#[derive(Debug, thiserror::Error)]
pub enum PkiError {
    /// This host has no identity yet.
    #[error(
        "this host has no identity in {}: run `belay host init` on the first host of a cluster, or `belay host join \
         TOKEN` on every other", directory.display()
    )]
    NotEnrolled {
        /// The PKI directory.
        directory: PathBuf,
    },
    /// There is an identity already; it is never overwritten.
    #[error("{} exists already: this host has an identity; to give it a new one, move the directory away first", path.display())]
    AlreadyEnrolled {
        /// The file that is there.
        path: PathBuf,
    },
    /// Only the host that made the cluster can do this.
    #[error("only the host that ran `belay host init` holds the cluster's key ({} is not here): do this there", path.display())]
    NotAuthority {
        /// Where the key would be.
        path: PathBuf,
    },
    /// Others may read a key or write to the directory.
    #[error("{} has mode {mode:o}: others could get at the keys; run `chmod {wanted:o} {}`", path.display(), path.display())]
    Permissions {
        /// The file or directory.
        path: PathBuf,
        /// Its mode.
        mode: u32,
        /// The mode it should have.
        wanted: u32,
    },
    /// The certificate is over.
    #[error(
        "the certificate {} expired on {}: run `belay host renew` on the host that made the cluster, or let this host \
         join again with a new token", path.display(), written(*not_after)
    )]
    Expired {
        /// The certificate.
        path: PathBuf,
        /// Until when it was valid.
        not_after: OffsetDateTime,
    },
    /// The certificate is not valid yet.
    #[error("the certificate {} is valid only from {}: is this host's clock right?", path.display(), written(*not_before))]
    NotYetValid {
        /// The certificate.
        path: PathBuf,
        /// From when on.
        not_before: OffsetDateTime,
    },
    /// A file that can not be what it should be.
    #[error("{} can not be used: {reason}", path.display())]
    Unusable {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The operating system said no.
    #[error("could not {action} {}: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// The error.
        source: io::Error,
    },
    /// A key or certificate could not be made.
    #[error("could not make a key or certificate: {0}")]
    Cryptography(String),
}

fn written(time: OffsetDateTime) -> String {
    time.format(&Rfc3339).unwrap_or_else(|_| time.to_string())
}

impl From<rcgen::Error> for PkiError {
    fn from(error: rcgen::Error) -> Self {
        Self::Cryptography(error.to_string())
    }
}

/// A host's identity, checked: the key belongs to the certificate, and the authority signed it.
pub struct Identity {
    facts: Facts,
    directory: PathBuf,
    pub(crate) server: Arc<rustls::ServerConfig>,
    pub(crate) client: Arc<rustls::ClientConfig>,
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Identity").field("facts", &self.facts).field("directory", &self.directory).finish()
    }
}

impl Identity {
    /// Loads the identity of this host from its PKI directory.
    ///
    /// # Errors
    /// There is none, others may read its keys, it is not valid now, or its parts do not belong together.
    pub fn load(directory: &Path) -> Result<Self, PkiError> {
        Self::load_at(directory, OffsetDateTime::now_utc())
    }

    pub(crate) fn load_at(directory: &Path, now: OffsetDateTime) -> Result<Self, PkiError> {
        files::check_directory(directory)?;
        let missing = || PkiError::NotEnrolled { directory: directory.to_owned() };
        let certificate_path = files::path(directory, HOST_CERTIFICATE);
        let key_path = files::path(directory, HOST_KEY);
        let ca_path = files::path(directory, CA_CERTIFICATE);
        let key = files::read_secret(&key_path)?.ok_or_else(missing)?;
        files::read_secret(&files::path(directory, CA_KEY))?;
        let certificate = read_certificate(&certificate_path)?.ok_or_else(missing)?;
        let ca = read_certificate(&ca_path)?.ok_or_else(missing)?;
        let key = PrivateKeyDer::from_pem_slice(key.as_bytes())
            .map_err(|_| unusable(&key_path, "it holds no private key"))?;
        let facts = Facts::of(&certificate).map_err(|reason| unusable(&certificate_path, reason))?;
        if now > facts.not_after {
            return Err(PkiError::Expired { path: certificate_path, not_after: facts.not_after });
        }
        if now < facts.not_before {
            return Err(PkiError::NotYetValid { path: certificate_path, not_before: facts.not_before });
        }
        tls::check_issued(&certificate, &ca, now).map_err(|reason| {
            unusable(&certificate_path, &format!("{} did not issue it: {reason}", ca_path.display()))
        })?;
        let refused = |reason: rustls::Error| unusable(&key_path, &reason.to_string());
        let server = tls::build_server_config(&certificate, &key, &ca).map_err(refused)?;
        let client = tls::build_client_config(&certificate, &key, &ca).map_err(refused)?;
        Ok(Self { facts, directory: directory.to_owned(), server, client })
    }

    /// This host's name.
    #[must_use]
    pub fn host(&self) -> &HostName {
        &self.facts.host
    }

    /// The cluster that this host belongs to.
    #[must_use]
    pub fn cluster(&self) -> Uuid {
        self.facts.cluster
    }

    /// Until when the certificate is valid.
    #[must_use]
    pub fn not_after(&self) -> OffsetDateTime {
        self.facts.not_after
    }

    /// The PKI directory that it was loaded from.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.directory
    }
}

/// Reads the first certificate of a PEM file; `None` if there is no such file.
pub(crate) fn read_certificate(path: &Path) -> Result<Option<CertificateDer<'static>>, PkiError> {
    let Some(text) = files::read(path)? else { return Ok(None) };
    CertificateDer::from_pem_slice(text.as_bytes())
        .map(Some)
        .map_err(|_| unusable(path, "it holds no certificate in PEM form"))
}

pub(crate) fn unusable(path: &Path, reason: &str) -> PkiError {
    PkiError::Unusable { path: path.to_owned(), reason: reason.to_owned() }
}

/// A request (PEM) for a new certificate for this host's key, to be signed by
/// [`Authority::sign_renewal`](crate::Authority::sign_renewal). Works with an expired certificate, too.
///
/// # Errors
/// This host has no identity, or its key can not be read.
pub fn renewal_request(directory: &Path) -> Result<String, PkiError> {
    let key_path = files::path(directory, HOST_KEY);
    let missing = || PkiError::NotEnrolled { directory: directory.to_owned() };
    let key = files::read_secret(&key_path)?.ok_or_else(missing)?;
    let key = KeyPair::from_pem(&key).map_err(|error| unusable(&key_path, &error.to_string()))?;
    certificate_request(&key)
}

/// The request (PEM) for a certificate for a key. It says nothing but the key: all else is the authority's to decide.
pub(crate) fn certificate_request(key: &KeyPair) -> Result<String, PkiError> {
    let mut params = rcgen::CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    Ok(params.serialize_request(key)?.pem()?)
}

/// Puts a renewed certificate (PEM) in the place of the old one, if it is for the same host, of the same cluster
/// and for our key; else nothing is changed.
///
/// # Errors
/// The certificate is not ours, or can not be written.
pub fn install_certificate(directory: &Path, certificate_pem: &str) -> Result<Identity, PkiError> {
    let path = files::path(directory, HOST_CERTIFICATE);
    let missing = || PkiError::NotEnrolled { directory: directory.to_owned() };
    let old = read_certificate(&path)?.ok_or_else(missing)?;
    let old = Facts::of(&old).map_err(|reason| unusable(&path, reason))?;
    let refused = |reason: &str| unusable(Path::new("the renewed certificate"), reason);
    let new = CertificateDer::from_pem_slice(certificate_pem.as_bytes())
        .map_err(|_| refused("it is no certificate in PEM form"))?;
    let facts = Facts::of(&new).map_err(refused)?;
    if (&facts.host, facts.cluster) != (&old.host, old.cluster) {
        return Err(refused("it is for another host or cluster"));
    }
    let ca = read_certificate(&files::path(directory, CA_CERTIFICATE))?.ok_or_else(missing)?;
    let key = files::read_secret(&files::path(directory, HOST_KEY))?.ok_or_else(missing)?;
    let key = PrivateKeyDer::from_pem_slice(key.as_bytes())
        .map_err(|_| unusable(&files::path(directory, HOST_KEY), "it holds no private key"))?;
    tls::check_issued(&new, &ca, OffsetDateTime::now_utc()).map_err(|reason| refused(&reason.to_string()))?;
    tls::build_client_config(&new, &key, &ca).map_err(|reason| refused(&reason.to_string()))?;
    files::write(&path, certificate_pem)?;
    Identity::load(directory)
}

#[cfg(test)]
mod tests {
    use std::fs::{self, Permissions};
    use std::os::unix::fs::PermissionsExt as _;

    use time::Duration;

    use super::*;
    use crate::authority::{init, init_at, renew};
    use crate::{Authority, known_hosts};

    fn host(name: &str) -> HostName {
        HostName::new(name).unwrap()
    }

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().permissions().mode() & 0o777
    }

    fn set_mode(path: &Path, mode: u32) {
        fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
    }

    #[test]
    fn new_cluster_is_complete_and_private() {
        let parent = tempfile::tempdir().unwrap();
        let directory = parent.path().join("a/pki");
        let made = init(&directory, &host("host-a")).unwrap();
        let loaded = Identity::load(&directory).unwrap();
        assert_eq!(loaded.host(), &host("host-a"));
        assert_eq!(loaded.cluster(), made.cluster());
        let years = (loaded.not_after() - OffsetDateTime::now_utc()).whole_days();
        assert!((725..=731).contains(&years), "{years} days");
        assert_eq!(mode(&directory), 0o700);
        for entry in fs::read_dir(&directory).unwrap() {
            let path = entry.unwrap().path();
            assert_eq!(mode(&path), 0o600, "{}", path.display());
            assert_ne!(path.extension().unwrap_or_default(), "new", "a temporary file was left");
        }
        assert_eq!(known_hosts(&directory).unwrap()[0].name, host("host-a"));
    }

    #[test]
    fn second_init_is_refused_and_changes_nothing() {
        let directory = tempfile::tempdir().unwrap();
        init(directory.path(), &host("host-a")).unwrap();
        let before = fs::read(directory.path().join(CA_KEY)).unwrap();
        let error = init(directory.path(), &host("host-b")).unwrap_err();
        assert!(matches!(error, PkiError::AlreadyEnrolled { .. }), "{error}");
        assert_eq!(fs::read(directory.path().join(CA_KEY)).unwrap(), before);
    }

    #[test]
    fn host_without_identity_is_told_what_to_run() {
        let directory = tempfile::tempdir().unwrap();
        for path in [directory.path().to_owned(), directory.path().join("none")] {
            let error = Identity::load(&path).unwrap_err();
            assert!(matches!(error, PkiError::NotEnrolled { .. }), "{error}");
            let text = error.to_string();
            assert!(text.contains("belay host init") && text.contains("belay host join"), "{text}");
        }
    }

    #[test]
    fn keys_that_others_may_read_are_refused() {
        for name in [HOST_KEY, CA_KEY] {
            let directory = tempfile::tempdir().unwrap();
            init(directory.path(), &host("host-a")).unwrap();
            set_mode(&directory.path().join(name), 0o640);
            let error = Identity::load(directory.path()).unwrap_err();
            assert!(matches!(&error, PkiError::Permissions { mode: 0o640, wanted: 0o600, .. }), "{error}");
            assert!(error.to_string().contains("chmod 600"), "{error}");
        }
    }

    #[test]
    fn directory_that_others_may_write_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        init(directory.path(), &host("host-a")).unwrap();
        set_mode(directory.path(), 0o770);
        let error = Identity::load(directory.path()).unwrap_err();
        assert!(matches!(&error, PkiError::Permissions { mode: 0o770, .. }), "{error}");
    }

    #[test]
    fn certificate_outside_its_time_is_refused_with_the_date() {
        let directory = tempfile::tempdir().unwrap();
        let identity = init(directory.path(), &host("host-a")).unwrap();
        let end = identity.not_after();
        let error = Identity::load_at(directory.path(), end + Duration::SECOND).unwrap_err();
        assert!(matches!(error, PkiError::Expired { .. }), "{error}");
        assert!(error.to_string().contains(&end.year().to_string()), "{error}");
        let error =
            Identity::load_at(directory.path(), OffsetDateTime::now_utc() - Duration::DAY).unwrap_err();
        assert!(matches!(error, PkiError::NotYetValid { .. }), "{error}");
        Identity::load_at(directory.path(), OffsetDateTime::now_utc() - Duration::minutes(50)).unwrap();
    }

    #[test]
    fn parts_that_do_not_belong_together_are_refused() {
        for name in [HOST_KEY, HOST_CERTIFICATE, CA_CERTIFICATE] {
            let (ours, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
            init(ours.path(), &host("host-a")).unwrap();
            init(other.path(), &host("host-a")).unwrap();
            fs::copy(other.path().join(name), ours.path().join(name)).unwrap();
            let error = Identity::load(ours.path()).unwrap_err();
            assert!(matches!(error, PkiError::Unusable { .. }), "{name}: {error}");
        }
    }

    #[test]
    fn damaged_files_are_refused_by_name() {
        for name in [HOST_KEY, HOST_CERTIFICATE, CA_CERTIFICATE] {
            let directory = tempfile::tempdir().unwrap();
            init(directory.path(), &host("host-a")).unwrap();
            let path = directory.path().join(name);
            fs::write(&path, "-----BEGIN NONSENSE-----\n").unwrap();
            set_mode(&path, 0o600);
            let error = Identity::load(directory.path()).unwrap_err();
            assert!(error.to_string().contains(name), "{error}");
        }
    }

    #[test]
    fn expired_certificate_is_renewed_by_the_authority_with_the_same_key() {
        let directory = tempfile::tempdir().unwrap();
        init_at(directory.path(), &host("host-a"), OffsetDateTime::now_utc() - Duration::days(800)).unwrap();
        let key = fs::read(directory.path().join(HOST_KEY)).unwrap();
        assert!(matches!(Identity::load(directory.path()), Err(PkiError::Expired { .. })));
        let renewed = renew(directory.path()).unwrap();
        assert!(renewed.not_after() > OffsetDateTime::now_utc() + Duration::days(700));
        assert_eq!(fs::read(directory.path().join(HOST_KEY)).unwrap(), key);
    }

    #[test]
    fn renewed_certificate_of_another_host_or_key_is_not_installed() {
        let (ours, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        init(ours.path(), &host("host-a")).unwrap();
        init(other.path(), &host("host-a")).unwrap();
        let authority = Authority::open(ours.path()).unwrap();
        let request = renewal_request(ours.path()).unwrap();
        let foreign_request = renewal_request(other.path()).unwrap();
        let before = fs::read(ours.path().join(HOST_CERTIFICATE)).unwrap();
        for (name, request) in [("host-b", &request), ("host-a", &foreign_request)] {
            let certificate = authority.sign_renewal(&host(name), request).unwrap();
            assert!(install_certificate(ours.path(), &certificate).is_err());
        }
        assert!(install_certificate(ours.path(), "garbage").is_err());
        assert_eq!(fs::read(ours.path().join(HOST_CERTIFICATE)).unwrap(), before);
    }

    #[test]
    fn request_that_is_none_is_not_signed() {
        let directory = tempfile::tempdir().unwrap();
        init(directory.path(), &host("host-a")).unwrap();
        let authority = Authority::open(directory.path()).unwrap();
        let own = fs::read_to_string(directory.path().join(HOST_CERTIFICATE)).unwrap();
        for text in ["", "garbage", own.as_str()] {
            assert!(authority.sign_renewal(&host("host-b"), text).is_err(), "{text:?}");
        }
    }
}
