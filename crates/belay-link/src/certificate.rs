//! What our certificates say, and reading it back.

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    KeyUsagePurpose, SanType,
};
use rustls::pki_types::CertificateDer;
use time::{Duration, OffsetDateTime};
use uuid::Uuid;
use x509_parser::prelude::{FromDer as _, GeneralName, X509Certificate};

use crate::name::HostName;

/// How long a host's certificate is valid.
const HOST_VALIDITY: Duration = Duration::days(2 * 365);
/// How long a cluster's certificate authority is valid.
const CA_VALIDITY: Duration = Duration::days(20 * 365);
/// Certificates begin to be valid this much before they are made, because clocks differ.
const BACKDATING: Duration = Duration::hours(1);
const SCHEME: &str = "belay://";

/// What a host's certificate says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Facts {
    pub(crate) host: HostName,
    pub(crate) cluster: Uuid,
    pub(crate) not_before: OffsetDateTime,
    pub(crate) not_after: OffsetDateTime,
}

/// The certificate authority of a cluster.
pub(crate) fn authority_params(cluster: Uuid, now: OffsetDateTime) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = name(&format!("Belay cluster {cluster}"));
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.not_before = now - BACKDATING;
    params.not_after = now + CA_VALIDITY;
    params
}

/// The certificate of a host.
pub(crate) fn host_params(
    host: &HostName,
    cluster: Uuid,
    now: OffsetDateTime,
) -> Result<CertificateParams, rcgen::Error> {
    let uri = format!("{SCHEME}{cluster}/host/{host}");
    let mut params = CertificateParams::default();
    params.distinguished_name = name(host.as_str());
    params.subject_alt_names =
        vec![SanType::DnsName(host.as_str().try_into()?), SanType::URI(uri.as_str().try_into()?)];
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages =
        vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    params.use_authority_key_identifier_extension = true;
    params.not_before = now - BACKDATING;
    params.not_after = now + HOST_VALIDITY;
    Ok(params)
}

fn name(common_name: &str) -> DistinguishedName {
    let mut name = DistinguishedName::new();
    name.push(DnType::CommonName, common_name);
    name
}

impl Facts {
    /// When it was made.
    pub(crate) fn issued(&self) -> OffsetDateTime {
        self.not_before + BACKDATING
    }

    /// Reads what a certificate says. Whether to believe it is decided by whoever verified its chain.
    pub(crate) fn of(certificate: &CertificateDer<'_>) -> Result<Self, &'static str> {
        let (_, parsed) = X509Certificate::from_der(certificate).map_err(|_| "it is no X.509 certificate")?;
        let names = parsed
            .subject_alternative_name()
            .map_err(|_| "its alternative names can not be read")?
            .ok_or("it has no alternative names")?;
        let mut uris = names.value.general_names.iter().filter_map(|name| match name {
            GeneralName::URI(uri) => uri.strip_prefix(SCHEME),
            _ => None,
        });
        let uri = uris.next().ok_or("it is not of a Belay cluster")?;
        let (cluster, host) = uri.split_once("/host/").ok_or("it is not of a Belay host")?;
        let cluster = Uuid::try_parse(cluster).map_err(|_| "its cluster id can not be read")?;
        let host = HostName::new(host).map_err(|_| "its host name is not usable")?;
        let dns_agrees = names
            .value
            .general_names
            .iter()
            .all(|name| !matches!(name, GeneralName::DNSName(dns) if *dns != host.as_str()));
        if !dns_agrees || uris.next().is_some() {
            return Err("it names more than one host");
        }
        let validity = parsed.validity();
        Ok(Self {
            host,
            cluster,
            not_before: validity.not_before.to_datetime(),
            not_after: validity.not_after.to_datetime(),
        })
    }
}
