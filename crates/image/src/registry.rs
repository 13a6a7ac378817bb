//! The client of the OCI distribution protocol: manifests and blobs, by GET, whole or from an offset.
//!
//! Everything a registry sends into memory is bounded; blobs are streamed. Content is judged by its digest elsewhere; this
//! module only speaks. No URL of a manifest is ever followed, and credentials go to no realm without TLS unless the
//! registry itself is spoken to without.

use crate::credentials::Credential;
use crate::{ImageError, PullOptions};
use reqwest::header::{ACCEPT, CONTENT_TYPE, HeaderMap, RANGE, WWW_AUTHENTICATE};
use reqwest::{Client, Response, StatusCode, Url};
use serde::Deserialize;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Mutex;
use vistara_model::ImageRef;

/// A registry that cannot be reached is noticed within this.
const CONNECT_TIME_MAX: Duration = Duration::from_secs(20);
/// A stream that says nothing for so long is dead, and is taken up again.
const SILENCE_MAX: Duration = Duration::from_secs(45);
/// Docker's hub and its mirrors redirect once or twice.
const REDIRECTS_MAX: usize = 5;
/// Bytes of a token answer; real ones are below 8 KiB.
const TOKEN_BYTES_MAX: usize = 256 << 10;
/// Bytes of an error answer that are read for its message.
const MESSAGE_BYTES_MAX: usize = 4096;

/// One repository of one registry.
pub(crate) struct Registry {
    client: Client,
    base: Url,
    /// As the user knows it.
    host: String,
    repository: String,
    plain: bool,
    credential: Option<Credential>,
    authorization: Mutex<Option<Authorization>>,
}

#[derive(Clone)]
enum Authorization {
    Basic(String, String),
    Bearer(String),
}

/// A manifest as it came.
pub(crate) struct RawManifest {
    pub(crate) bytes: Vec<u8>,
    pub(crate) content_type: Option<String>,
}

#[derive(Debug, PartialEq, Eq)]
enum Challenge {
    Basic,
    Bearer {
        realm: String,
        service: Option<String>,
        scope: Option<String>,
    },
}

#[derive(Deserialize)]
struct Token {
    token: Option<String>,
    access_token: Option<String>,
}

/// Whether a registry's host is this machine itself.
fn is_loopback(registry: &str) -> bool {
    let host = match registry.rsplit_once(':') {
        Some((host, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => host,
        _ => registry,
    };
    let address = host.trim_start_matches('[').trim_end_matches(']');
    host == "localhost"
        || address
            .parse::<IpAddr>()
            .is_ok_and(|address| address.is_loopback())
}

impl Registry {
    pub(crate) fn new(
        name: &ImageRef,
        options: &PullOptions,
        credential: Option<Credential>,
    ) -> Result<Registry, ImageError> {
        let loopback = is_loopback(&name.registry);
        let plain = loopback || options.insecure_registries.contains(&name.registry);
        let host = match name.registry.as_str() {
            "docker.io" => "registry-1.docker.io",
            other => other,
        };
        let scheme = if plain { "http" } else { "https" };
        let setup = |why: String| ImageError::Registry {
            registry: name.registry.clone(),
            doing: "read",
            why,
            source: None,
        };
        let base = Url::parse(&format!("{scheme}://{host}/v2/"))
            .map_err(|error| setup(error.to_string()))?;
        let mut builder = Client::builder()
            .user_agent(concat!("vistara/", env!("CARGO_PKG_VERSION")))
            .tls_backend_preconfigured(tls().map_err(setup)?)
            .connect_timeout(CONNECT_TIME_MAX)
            .read_timeout(SILENCE_MAX)
            .redirect(reqwest::redirect::Policy::limited(REDIRECTS_MAX));
        if loopback {
            builder = builder.no_proxy();
        }
        let client = builder.build().map_err(|error| setup(error.to_string()))?;
        Ok(Registry {
            client,
            base,
            host: name.registry.clone(),
            repository: name.repository.clone(),
            plain,
            credential,
            authorization: Mutex::new(None),
        })
    }

    /// Reads a manifest or index by tag or digest.
    pub(crate) async fn manifest(
        &self,
        reference: &str,
        bytes_max: u64,
    ) -> Result<RawManifest, ImageError> {
        let accept = crate::manifest::ACCEPT;
        let path = format!("{}/manifests/{reference}", self.repository);
        let response = self
            .get(&path, Some(accept), None, "read the manifest")
            .await?;
        let content_type = response
            .headers()
            .get(CONTENT_TYPE)
            .and_then(|value| value.to_str().ok())
            .map(str::to_owned);
        let bytes = self.bounded(response, bytes_max, reference).await?;
        Ok(RawManifest {
            bytes,
            content_type,
        })
    }

    /// Reads a small blob whole.
    pub(crate) async fn small_blob(
        &self,
        digest: &str,
        bytes_max: u64,
    ) -> Result<Vec<u8>, ImageError> {
        let path = format!("{}/blobs/{digest}", self.repository);
        let response = self
            .get(&path, None, None, "read the configuration")
            .await?;
        self.bounded(response, bytes_max, digest).await
    }

    /// Starts to read a blob from an offset. The answer may begin at 0 all the same: its status tells.
    pub(crate) async fn blob(&self, digest: &str, offset: u64) -> Result<Response, ImageError> {
        let path = format!("{}/blobs/{digest}", self.repository);
        let offset = Some(offset).filter(|offset| *offset > 0);
        self.get(&path, None, offset, "fetch a layer").await
    }

    /// An error of the way, or of what came over it.
    pub(crate) fn failed(&self, doing: &'static str, error: reqwest::Error) -> ImageError {
        let why = if error.is_connect() {
            "it cannot be reached"
        } else if error.is_timeout() {
            "it does not answer"
        } else {
            "the connection failed"
        };
        ImageError::Registry {
            registry: self.host.clone(),
            doing,
            why: why.to_owned(),
            // Tokens may stand in the URLs that registries redirect to.
            source: Some(Arc::new(error.without_url())),
        }
    }

    pub(crate) fn odd(&self, doing: &'static str, why: impl Into<String>) -> ImageError {
        ImageError::Registry {
            registry: self.host.clone(),
            doing,
            why: why.into(),
            source: None,
        }
    }

    async fn bounded(
        &self,
        mut response: Response,
        bytes_max: u64,
        subject: &str,
    ) -> Result<Vec<u8>, ImageError> {
        let mut bytes = Vec::new();
        loop {
            let chunk = response.chunk().await;
            let Some(chunk) = chunk.map_err(|error| self.failed("read the manifest", error))?
            else {
                return Ok(bytes);
            };
            bytes.extend_from_slice(&chunk);
            if bytes.len() as u64 > bytes_max {
                let why = crate::Refusal::Limit {
                    what: "bytes in one document",
                    limit: bytes_max,
                };
                let subject = format!("{}/{}: {subject}", self.host, self.repository);
                return Err(ImageError::refused(subject, why));
            }
        }
    }

    async fn get(
        &self,
        path: &str,
        accept: Option<&str>,
        offset: Option<u64>,
        doing: &'static str,
    ) -> Result<Response, ImageError> {
        let url = self
            .base
            .join(path)
            .map_err(|error| self.odd(doing, error.to_string()))?;
        let mut fresh = false;
        loop {
            let authorization = self.authorization.lock().await.clone();
            let mut request = self.client.get(url.clone());
            if let Some(accept) = accept {
                request = request.header(ACCEPT, accept);
            }
            if let Some(offset) = offset {
                request = request.header(RANGE, format!("bytes={offset}-"));
            }
            request = match &authorization {
                Some(Authorization::Basic(user, password)) => {
                    request.basic_auth(user, Some(password))
                }
                Some(Authorization::Bearer(token)) => request.bearer_auth(token),
                None => request,
            };
            let sent = request.send().await;
            let response = sent.map_err(|error| self.failed(doing, error))?;
            match response.status() {
                StatusCode::OK
                | StatusCode::PARTIAL_CONTENT
                | StatusCode::RANGE_NOT_SATISFIABLE => {
                    return Ok(response);
                }
                // A token may have run out during a long pull: once each time, ask for a new one.
                StatusCode::UNAUTHORIZED if !fresh => {
                    let authorization = self.authorize(response.headers(), doing).await?;
                    *self.authorization.lock().await = Some(authorization);
                    fresh = true;
                }
                StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => return Err(self.denied()),
                StatusCode::NOT_FOUND => {
                    return Err(ImageError::NotInRegistry {
                        registry: self.host.clone(),
                        name: path
                            .replacen("/manifests/", ":", 1)
                            .replacen("/blobs/", "@", 1)
                            .replacen(":sha256:", "@sha256:", 1),
                    });
                }
                StatusCode::TOO_MANY_REQUESTS => {
                    return Err(self.odd(doing, "it allows no more requests for now (429)"));
                }
                status => {
                    let message = message(response).await;
                    return Err(self.odd(doing, format!("it answered {status}{message}")));
                }
            }
        }
    }

    fn denied(&self) -> ImageError {
        ImageError::Denied {
            registry: self.host.clone(),
            name: self.repository.clone(),
            anonymous: self.credential.is_none(),
        }
    }

    async fn authorize(
        &self,
        headers: &HeaderMap,
        doing: &'static str,
    ) -> Result<Authorization, ImageError> {
        let challenges: Vec<Challenge> = headers
            .get_all(WWW_AUTHENTICATE)
            .iter()
            .filter_map(|value| parse_challenge(value.to_str().ok()?))
            .collect();
        let bearer = challenges.iter().find_map(|challenge| match challenge {
            Challenge::Bearer {
                realm,
                service,
                scope,
            } => Some((realm, service, scope)),
            Challenge::Basic => None,
        });
        let Some((realm, service, scope)) = bearer else {
            return match (&self.credential, challenges.first()) {
                (Some(Credential::Password(user, password)), Some(Challenge::Basic)) => {
                    Ok(Authorization::Basic(user.clone(), password.clone()))
                }
                _ => Err(self.denied()),
            };
        };
        let realm = Url::parse(realm).map_err(|error| self.odd(doing, error.to_string()))?;
        if realm.scheme() != "https" && !(self.plain && realm.scheme() == "http") {
            return Err(self.odd(doing, "it sends us for a token to a place without TLS"));
        }
        let pull = format!("repository:{}:pull", self.repository);
        let scope = scope.as_ref().unwrap_or(&pull);
        let service = service.as_deref().unwrap_or(&self.host);
        let request = match &self.credential {
            Some(Credential::Identity(token)) => self.client.post(realm).form(&[
                ("grant_type", "refresh_token"),
                ("refresh_token", token),
                ("service", service),
                ("scope", scope),
                ("client_id", "vistara"),
            ]),
            Some(Credential::Password(user, password)) => self
                .client
                .get(realm)
                .query(&[("service", service), ("scope", scope), ("account", user)])
                .basic_auth(user, Some(password)),
            None => self
                .client
                .get(realm)
                .query(&[("service", service), ("scope", scope)]),
        };
        let sent = request.send().await;
        let response = sent.map_err(|error| self.failed("get a token", error))?;
        match response.status() {
            StatusCode::OK => {}
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => return Err(self.denied()),
            status => {
                let message = message(response).await;
                return Err(self.odd("get a token", format!("it answered {status}{message}")));
            }
        }
        let bytes = self
            .bounded(response, TOKEN_BYTES_MAX as u64, "token")
            .await?;
        let token: Token = serde_json::from_slice(&bytes)
            .map_err(|_| self.odd("get a token", "its answer is no token"))?;
        match token.token.or(token.access_token) {
            Some(token) if !token.is_empty() => Ok(Authorization::Bearer(token)),
            _ => Err(self.odd("get a token", "its answer is no token")),
        }
    }
}

/// The first message of a registry's error answer, as `: message`.
async fn message(mut response: Response) -> String {
    #[derive(Deserialize)]
    struct Errors {
        errors: Vec<Message>,
    }
    #[derive(Deserialize)]
    struct Message {
        message: String,
    }
    let mut bytes = Vec::new();
    while let Ok(Some(chunk)) = response.chunk().await {
        bytes.extend_from_slice(&chunk);
        if bytes.len() > MESSAGE_BYTES_MAX {
            break;
        }
    }
    let errors: Option<Errors> = serde_json::from_slice(&bytes).ok();
    match errors.and_then(|errors| errors.errors.into_iter().next()) {
        Some(first) => {
            // Only printable text of bounded length reaches a terminal.
            let printable = first.message.chars().filter(|c| !c.is_control());
            format!(": {}", printable.take(300).collect::<String>())
        }
        None => String::new(),
    }
}

/// TLS with the host's own roots, and no process-wide state.
fn tls() -> Result<rustls::ClientConfig, String> {
    let mut roots = rustls::RootCertStore::empty();
    let found = rustls_native_certs::load_native_certs();
    roots.add_parsable_certificates(found.certs);
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| error.to_string())?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(config)
}

/// Reads one `WWW-Authenticate` header: a scheme, then `key="value"` pairs. Unknown schemes are nothing.
fn parse_challenge(text: &str) -> Option<Challenge> {
    let (scheme, mut rest) = text.trim().split_once(' ').unwrap_or((text.trim(), ""));
    if scheme.eq_ignore_ascii_case("basic") {
        return Some(Challenge::Basic);
    }
    if !scheme.eq_ignore_ascii_case("bearer") {
        return None;
    }
    let (mut realm, mut service, mut scope) = (None, None, None);
    loop {
        rest = rest.trim_start_matches([' ', ',']);
        let Some((key, after)) = rest.split_once('=') else {
            break;
        };
        let value = if let Some(quoted) = after.strip_prefix('"') {
            let (value, tail) = quoted.split_once('"')?;
            rest = tail;
            value
        } else {
            let end = after.find(',').unwrap_or(after.len());
            rest = &after[end..];
            &after[..end]
        };
        match key.trim() {
            "realm" => realm = Some(value.to_owned()),
            "service" => service = Some(value.to_owned()),
            "scope" => scope = Some(value.to_owned()),
            _ => {}
        }
    }
    Some(Challenge::Bearer {
        realm: realm?,
        service,
        scope,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn only_this_machine_is_spoken_to_without_tls_unasked() {
        for yes in [
            "localhost",
            "localhost:5000",
            "127.0.0.1:5000",
            "[::1]:5000",
            "127.1.2.3",
        ] {
            assert!(is_loopback(yes), "{yes}");
        }
        for no in [
            "docker.io",
            "localhost.example.org:5000",
            "10.0.0.1:5000",
            "127.0.0.1.nip.io",
        ] {
            assert!(!is_loopback(no), "{no}");
        }
    }

    #[test]
    fn a_bearer_challenge_is_read_with_commas_in_its_scope() {
        let text = r#"Bearer realm="https://auth.docker.io/token",service="registry.docker.io",scope="repository:a/b:pull,push""#;
        let Some(Challenge::Bearer {
            realm,
            service,
            scope,
        }) = parse_challenge(text)
        else {
            panic!("not read");
        };
        assert_eq!(realm, "https://auth.docker.io/token");
        assert_eq!(service.as_deref(), Some("registry.docker.io"));
        assert_eq!(scope.as_deref(), Some("repository:a/b:pull,push"));
        assert_eq!(parse_challenge("Basic realm=\"x\""), Some(Challenge::Basic));
        assert_eq!(parse_challenge("Negotiate"), None);
    }

    proptest! {
        #[test]
        fn no_challenge_makes_the_reader_panic(text in ".{0,80}") {
            let _ = parse_challenge(&text);
            let _ = parse_challenge(&format!("Bearer {text}"));
        }
    }
}
