//! Credentials from docker's own configuration: `config.json`, credential stores and credential helpers.

use crate::{ImageError, PullOptions};
use docker_credential::{CredentialRetrievalError, DockerCredential};
use std::fs::File;
use std::io::BufReader;
use std::path::PathBuf;
use std::time::Duration;

/// A helper may ask a key ring, which may ask its user; longer than this it only hangs.
const HELPER_TIME_MAX: Duration = Duration::from_secs(60);

/// What to show a registry.
#[derive(Clone)]
pub(crate) enum Credential {
    /// A user's name and password, or whatever stands for it.
    Password(String, String),
    /// A token to be exchanged for others.
    Identity(String),
}

/// The name by which docker files a registry's credentials.
fn server(registry: &str) -> &str {
    match registry {
        "docker.io" => "https://index.docker.io/v1/",
        other => other,
    }
}

fn config_file(options: &PullOptions) -> Option<PathBuf> {
    let directory = match &options.docker_config {
        Some(directory) => Some(directory.clone()),
        None => std::env::var_os("DOCKER_CONFIG")
            .map(PathBuf::from)
            .or_else(|| std::env::home_dir().map(|home| home.join(".docker"))),
    };
    directory.map(|directory| directory.join("config.json"))
}

/// The credentials for this registry; none where nothing is configured.
pub(crate) async fn find(
    registry: &str,
    options: &PullOptions,
) -> Result<Option<Credential>, ImageError> {
    if options.anonymous {
        return Ok(None);
    }
    let Some(path) = config_file(options).filter(|path| path.exists()) else {
        return Ok(None);
    };
    let failed = |why: String| ImageError::Credentials {
        registry: registry.to_owned(),
        why,
    };
    let key = server(registry).to_owned();
    let looked_at = path.clone();
    let lookup = tokio::task::spawn_blocking(move || {
        let file = File::open(&looked_at).map_err(|error| error.to_string())?;
        match docker_credential::get_credential_from_reader(BufReader::new(file), &key) {
            Ok(credential) => Ok(Some(credential)),
            Err(CredentialRetrievalError::NoCredentialConfigured) => Ok(None),
            // What docker's helpers say, on the standard output, when they have nothing for a registry.
            Err(CredentialRetrievalError::HelperFailure { stdout, stderr, .. })
                if format!("{stdout}{stderr}").contains("credentials not found") =>
            {
                Ok(None)
            }
            // The helper's standard output may hold a secret, so that only its complaint is shown.
            Err(CredentialRetrievalError::HelperFailure { helper, stderr, .. }) => Err(format!(
                "{helper} failed: {}",
                stderr.trim().chars().take(300).collect::<String>()
            )),
            Err(CredentialRetrievalError::HelperCommunicationError) => {
                Err("its credential helper cannot be run; it must be in the PATH".to_owned())
            }
            Err(error) => Err(error.to_string()),
        }
    });
    let found = tokio::time::timeout(HELPER_TIME_MAX, lookup)
        .await
        .map_err(|_| failed("its credential helper does not answer".to_owned()))?
        .map_err(|error| ImageError::Internal(error.to_string()))?
        .map_err(|why| failed(format!("{}: {why}", path.display())))?;
    Ok(found.map(|credential| match credential {
        DockerCredential::IdentityToken(token) => Credential::Identity(token),
        DockerCredential::UsernamePassword(user, password) => Credential::Password(user, password),
    }))
}
