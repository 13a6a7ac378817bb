//! How the library finds and trusts a relay: by its name alone, which holds its address and its key.

use super::Relay;
use iroh::dns::{BoxIter, DnsError, DnsResolver, Resolver, TxtRecordData};
use iroh_relay::tls::CaTlsConfig;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls13_signature_with_raw_key};
use rustls::pki_types::{CertificateDer, ServerName, SubjectPublicKeyInfoDer, UnixTime, alg_id};
use rustls::{CertificateError, DigitallySignedStruct, PeerIncompatible, SignatureScheme};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::pin::Pin;
use std::sync::Arc;
use vistara_model::NodeId;

/// A key as TLS has it.
pub(super) fn spki(key: &NodeId) -> SubjectPublicKeyInfoDer<'static> {
    rustls::sign::public_key_to_spki(&alg_id::ED25519, key.as_bytes())
}

/// Reads addresses out of relays' names. It asks nobody: no other name has an address.
#[derive(Debug, Clone, Copy)]
struct Names;

type Answer<T> = Pin<Box<dyn Future<Output = Result<BoxIter<T>, DnsError>> + Send>>;

fn answer<T: Send + 'static>(found: Option<T>) -> Answer<T> {
    let found: BoxIter<T> = Box::new(found.into_iter());
    Box::pin(std::future::ready(Ok(found)))
}

impl Resolver for Names {
    fn lookup_ipv4(&self, host: String) -> Answer<Ipv4Addr> {
        answer(match Relay::of_name(&host) {
            Some((_, IpAddr::V4(ip))) => Some(ip),
            Some((_, IpAddr::V6(_))) | None => None,
        })
    }

    fn lookup_ipv6(&self, host: String) -> Answer<Ipv6Addr> {
        answer(match Relay::of_name(&host) {
            Some((_, IpAddr::V6(ip))) => Some(ip),
            Some((_, IpAddr::V4(_))) | None => None,
        })
    }

    fn lookup_txt(&self, _host: String) -> Answer<TxtRecordData> {
        answer(None)
    }

    fn clear_cache(&self) {}

    fn reset(&self) -> Box<dyn Resolver> {
        Box::new(Names)
    }
}

/// The endpoint's resolver of names.
pub(crate) fn names() -> DnsResolver {
    DnsResolver::custom(Names)
}

/// Trusts whoever proves the key that the server's name holds.
#[derive(Debug)]
struct ByName(Arc<CryptoProvider>);

impl ServerCertVerifier for ByName {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let ServerName::DnsName(name) = server_name else {
            return Err(CertificateError::NotValidForName.into());
        };
        let (key, _) = Relay::of_name(name.as_ref()).ok_or(CertificateError::NotValidForName)?;
        if !intermediates.is_empty() || spki(&key).as_ref() != end_entity.as_ref() {
            return Err(CertificateError::UnknownIssuer.into());
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(PeerIncompatible::Tls12NotOffered.into())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let key = SubjectPublicKeyInfoDer::from(cert.as_ref());
        let algorithms = &self.0.signature_verification_algorithms;
        verify_tls13_signature_with_raw_key(message, &key, dss, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ED25519]
    }

    fn requires_raw_public_keys(&self) -> bool {
        true
    }
}

/// Whom the endpoint trusts beside nodes: relays, by their keys, and nobody's certificates.
pub(crate) fn by_name() -> CaTlsConfig {
    CaTlsConfig::custom_server_cert_verifier(Arc::new(|provider| Ok(Arc::new(ByName(provider)))))
}
