//! Receipts as this program checks them: against what it asked for, and against what it saw.
//!
//! Whether something is a receipt, and whose word, the node says ([`ask`]); what it is compared with is known here.

use crate::failure::Failure;
use serde::Serialize;
use sha2::{Digest as _, Sha256};
use vistara_api::{Client, ClientError, RunRequest, VerifiedReceipt, VerifyReceiptRequest};
use vistara_model::{Digest, Receipt};

/// What a receipt must repeat to be the one of a request.
#[derive(Debug, Clone)]
pub(crate) struct Expected {
    nonce: String,
    digest: Digest,
}

impl Expected {
    /// Gives a request a nonce of its own, and tells what its receipt must repeat.
    pub(crate) fn of(request: &mut RunRequest) -> Result<Expected, Failure> {
        let mut random = [0; 16];
        getrandom::fill(&mut random)
            .map_err(|error| Failure::because("no random numbers", error))?;
        let nonce = format!("{:032x}", u128::from_be_bytes(random));
        request.nonce = Some(nonce.clone());
        let body = serde_json::to_vec(request)
            .map_err(|error| Failure::because("cannot make the request", error))?;
        Ok(Expected {
            nonce,
            digest: sha256(&body),
        })
    }
}

/// SHA-256, in the form that receipts have.
pub(crate) fn sha256(bytes: &[u8]) -> Digest {
    Digest::from_sha256(Sha256::digest(bytes).into())
}

/// Output as it arrived.
#[derive(Debug, Clone, Default)]
pub(crate) struct Heard {
    stdout: Sha256,
    stderr: Sha256,
}

impl Heard {
    pub(crate) fn stdout(&mut self, bytes: &[u8]) {
        self.stdout.update(bytes);
    }

    pub(crate) fn stderr(&mut self, bytes: &[u8]) {
        self.stderr.update(bytes);
    }

    /// Of both streams.
    pub(crate) fn digests(&self) -> [Digest; 2] {
        [&self.stdout, &self.stderr].map(|hash| Digest::from_sha256(hash.clone().finalize().into()))
    }
}

/// One comparison.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Check {
    /// Of what.
    pub(crate) check: &'static str,
    /// How it came out.
    pub(crate) holds: bool,
    /// In words.
    pub(crate) says: String,
}

impl Check {
    pub(crate) fn new(check: &'static str, holds: bool, says: impl Into<String>) -> Check {
        Check {
            check,
            holds,
            says: says.into(),
        }
    }
}

/// Asks the node here whether this is a receipt, and whose word; `node` is who should have signed it.
pub(crate) async fn ask(
    client: &Client,
    text: &str,
    node: Option<&str>,
) -> Result<(VerifiedReceipt, Receipt), Failure> {
    let request = VerifyReceiptRequest {
        receipt: text.to_owned(),
        node: node.map(str::to_owned),
    };
    let verified = client.local().verify_receipt(&request).await?;
    let receipt =
        serde_json::from_value(verified.receipt.clone()).map_err(|error| ClientError::Broken {
            operation: "reading the receipt",
            message: error.to_string(),
        })?;
    Ok((verified, receipt))
}

/// Whose word it is.
pub(crate) fn signed_by(verified: &VerifiedReceipt) -> Check {
    let key = &verified.node;
    let says = match (&verified.known_as, verified.is_node) {
        (Some(name), _) if name == "this node" => format!("right, of this node ({key})"),
        (Some(name), _) => format!("right, of the node {name} ({key})"),
        (None, Some(true)) => format!("right, of the key that was given ({key})"),
        (None, _) => format!(
            "right, but nobody here knows the key {key}: anybody may have made it. If you know whose it is, say so: --node {key}"
        ),
    };
    let holds = verified.known_as.is_some() || verified.is_node == Some(true);
    Check::new("signature", holds, says)
}

/// What was seen of a run, to compare its receipt with.
pub(crate) struct Seen<'a> {
    /// The node that was asked, where it is another.
    pub(crate) node: Option<&'a str>,
    pub(crate) expected: &'a Expected,
    pub(crate) exit_code: Option<u8>,
    pub(crate) heard: &'a Heard,
}

/// Checks the receipt of a run that this program followed to its end. The error says what does not fit.
pub(crate) async fn check_run(
    client: &Client,
    text: &str,
    seen: &Seen<'_>,
) -> Result<Receipt, Failure> {
    let (verified, receipt) = ask(client, text, seen.node).await?;
    match misfit(&verified, &receipt, seen) {
        None => Ok(receipt),
        Some(what) => Err(Failure::new(format!(
            "the receipt does not fit the run: {what}"
        ))),
    }
}

fn misfit(verified: &VerifiedReceipt, receipt: &Receipt, seen: &Seen<'_>) -> Option<String> {
    let own = verified.known_as.as_deref() == Some("this node");
    if verified.is_node == Some(false) || (seen.node.is_none() && !own) {
        return Some(format!("it is of another node, {}", verified.node));
    }
    let request = &receipt.request;
    if request.nonce.as_ref() != Some(&seen.expected.nonce) {
        return Some("it is of another request: its nonce is not ours".to_owned());
    }
    if request.digest.as_ref() != Some(&seen.expected.digest) {
        return Some("the node speaks of another request than was sent".to_owned());
    }
    if seen.exit_code != Some(receipt.end.exit_code) {
        return Some(format!("its exit code is {}", receipt.end.exit_code));
    }
    let streams = [&receipt.output.stdout, &receipt.output.stderr];
    let names = ["standard output", "standard error"];
    for ((stream, heard), name) in streams.into_iter().zip(seen.heard.digests()).zip(names) {
        if (stream.digest.as_ref()).is_some_and(|digest| *digest != heard) {
            return Some(format!("{name} arrived otherwise than it says"));
        }
    }
    None
}
