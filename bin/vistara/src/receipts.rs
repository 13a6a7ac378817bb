//! Receipts as this program checks them: against what it asked for, and against what it saw.
//!
//! Whether something is a receipt, and whose word, the node says ([`ask`]); what it is compared with is known here.

use crate::failure::Failure;
use serde::Serialize;
use sha2::{Digest as _, Sha256};
use vistara_api::{Client, ClientError, RunRequest, VerifiedReceipt, VerifyReceiptRequest};
use vistara_model::{Digest, Receipt, ReceiptHow, ReceiptRequest};

/// What a receipt must repeat to be the one of a request.
#[derive(Debug, Clone)]
pub(crate) struct Expected {
    nonce: String,
    digest: Digest,
    /// The image, where it was asked for by its whole id.
    image: Option<Digest>,
    /// What is to run instead of the image's program, where that was said.
    entrypoint: Option<Vec<String>>,
    /// The command line's last words.
    command: Vec<String>,
}

impl Expected {
    /// What does not fit of the command that a receipt tells. The image's own part of it is not known here.
    fn command_misfit(&self, told: &ReceiptRequest) -> Option<String> {
        let fits = match (&self.entrypoint, &told.command) {
            (Some(first), _) => {
                let words = [first.as_slice(), &self.command].concat();
                // Without any the image's own would run, of which the node knows.
                words.is_empty() || command_digest(&words) == told.command_digest
            }
            (None, Some(words)) => {
                words.ends_with(&self.command) && command_digest(words) == told.command_digest
            }
            // A long one, with the image's words before it.
            (None, None) => true,
        };
        (!fits).then(|| "another command ran than was asked for".to_owned())
    }

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
            image: request.image.parse().ok(),
            entrypoint: request.entrypoint.clone(),
            command: request.command.clone(),
        })
    }
}

/// SHA-256, in the form that receipts have.
pub(crate) fn sha256(bytes: &[u8]) -> Digest {
    Digest::from_sha256(Sha256::digest(bytes).into())
}

/// SHA-256 of a command, as receipts have it: its words, each followed by a zero byte.
fn command_digest(words: &[String]) -> Digest {
    let ended = |word: &String| [word.as_bytes(), &[0]].concat();
    sha256(&words.iter().map(ended).collect::<Vec<_>>().concat())
}

/// Output as it arrived.
#[derive(Debug, Clone, Default)]
pub(crate) struct Heard {
    stdout: Stream,
    stderr: Stream,
}

#[derive(Debug, Clone, Default)]
struct Stream {
    hash: Sha256,
    bytes: u64,
}

impl Stream {
    fn push(&mut self, bytes: &[u8]) {
        self.hash.update(bytes);
        self.bytes = self.bytes.saturating_add(bytes.len() as u64);
    }

    fn digest(&self) -> Digest {
        Digest::from_sha256(self.hash.clone().finalize().into())
    }
}

impl Heard {
    pub(crate) fn stdout(&mut self, bytes: &[u8]) {
        self.stdout.push(bytes);
    }

    pub(crate) fn stderr(&mut self, bytes: &[u8]) {
        self.stderr.push(bytes);
    }

    /// Of standard output.
    pub(crate) fn stdout_digest(&self) -> Digest {
        self.stdout.digest()
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
    let own = client.local().mesh().await?.id;
    match misfit(&verified, &receipt, &own, seen) {
        None => Ok(receipt),
        Some(what) => Err(Failure::new(format!(
            "the receipt does not fit the run: {what}"
        ))),
    }
}

/// What of a receipt is not as it was seen; `own` is the key of the node here.
fn misfit(
    verified: &VerifiedReceipt,
    receipt: &Receipt,
    own: &str,
    seen: &Seen<'_>,
) -> Option<String> {
    let here = verified.node == own;
    let right = match seen.node {
        Some(_) => verified.is_node == Some(true),
        None => here,
    };
    if !right {
        return Some(format!("it is of another node, {}", verified.node));
    }
    let request = &receipt.request;
    if request.nonce.as_ref() != Some(&seen.expected.nonce) {
        return Some("it is of another request: its nonce is not ours".to_owned());
    }
    if request.digest.as_ref() != Some(&seen.expected.digest) {
        return Some("the node speaks of another request than was sent".to_owned());
    }
    let caller = request.caller.map(|caller| caller.to_string());
    if !here && caller.as_deref() != Some(own) {
        return Some("by its word somebody else asked for it".to_owned());
    }
    if (seen.expected.image.as_ref()).is_some_and(|image| *image != request.image_id) {
        return Some(format!("another image ran, {}", request.image_id));
    }
    if let Some(what) = seen.expected.command_misfit(request) {
        return Some(what);
    }
    if seen.exit_code != Some(receipt.end.exit_code) {
        return Some(format!("its exit code is {}", receipt.end.exit_code));
    }
    let streams = [&receipt.output.stdout, &receipt.output.stderr];
    let names = ["standard output", "standard error"];
    let heard = [&seen.heard.stdout, &seen.heard.stderr];
    for ((stream, heard), name) in streams.into_iter().zip(heard).zip(names) {
        // A node that lost count vouches for nothing that was printed.
        let Some(digest) = &stream.digest else {
            return Some(format!("it does not say what {name} was"));
        };
        if *digest != heard.digest() || stream.bytes != heard.bytes {
            return Some(format!("{name} arrived otherwise than it says"));
        }
    }
    None
}

/// Whether a program is said to have ended by itself, and yet not all of its output to be known.
pub(crate) fn is_partial(receipt: &Receipt) -> bool {
    receipt.end.how == ReceiptHow::Exited && !receipt.output.complete
}

#[cfg(test)]
mod tests;
