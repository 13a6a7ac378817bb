//! Receipts, signed: what a node vouches for of a machine that has ended, for anybody to check who has its key.
//!
//! ```text
//! vistara-receipt-1
//! {"format":1,"node":"…",…}       one line of JSON, in one form only
//! 128 hexadecimal digits          Ed25519, of a context and that line
//! ```
//! Reading is bounded and total, and takes each receipt in the one form in which it is written: whatever it reads it
//! would write so, byte for byte. So fields that come twice, unknown ones, spaces and other ways to write a number are no
//! receipt, before anybody asks about the signature.

use crate::identity::Identity;
use iroh::{PublicKey, Signature};
use vistara_model::{Receipt, ReceiptFault};

/// What is signed begins with this.
const CONTEXT: &[u8] = b"vistara 2026-11 receipt of a node\0";
/// The first line. Another version has another.
const HEAD: &str = "vistara-receipt-1";
/// What every version's first line begins with.
const HEAD_OF_ANY: &str = "vistara-receipt-";
/// Longest receipt, in bytes: a command of 4 KiB, each letter of it as JSON writes the worst (six for one), and a few KiB
/// of names.
pub const RECEIPT_BYTES_MAX: usize = 48 << 10;
const SIGNATURE_BYTES: usize = 64;

/// Why something is no receipt, or none to be believed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReceiptError {
    /// It is longer than any.
    #[error("it is longer than any receipt: {0} bytes")]
    Length(usize),
    /// It is none.
    #[error("it is no receipt: {0}")]
    Malformed(&'static str),
    /// It is one of a version that this program does not know.
    #[error("it is a receipt of a version that this program does not know: {0:?}")]
    Version(String),
    /// Its signature is not that of the node that it names.
    #[error(
        "its signature is not that of the node that it names: somebody has changed it, or made it up"
    )]
    Signature,
    /// It says what none may.
    #[error("it says what no receipt may")]
    Receipt(#[from] ReceiptFault),
}

fn signed(body: &[u8]) -> Vec<u8> {
    [CONTEXT, body].concat()
}

fn body(receipt: &Receipt) -> Result<String, ReceiptError> {
    receipt.check()?;
    serde_json::to_string(receipt).map_err(|_| ReceiptError::Malformed("it cannot be written"))
}

/// Signs what this node states of a machine.
///
/// # Errors
/// [`ReceiptError`] where it is another node's word, or says what none may.
pub fn sign(identity: &Identity, receipt: &Receipt) -> Result<String, ReceiptError> {
    if receipt.node != identity.id() {
        return Err(ReceiptError::Signature);
    }
    let body = body(receipt)?;
    let signature = identity.secret().sign(&signed(body.as_bytes())).to_bytes();
    let mut text = format!("{HEAD}\n{body}\n");
    for byte in signature {
        text.push_str(&format!("{byte:02x}"));
    }
    text.push('\n');
    match text.len() {
        length if length > RECEIPT_BYTES_MAX => Err(ReceiptError::Length(length)),
        _ => Ok(text),
    }
}

/// Reads a receipt, whoever it came from, and checks that the node that it names has signed it. Whether that node is
/// anybody's to trust is another question.
///
/// # Errors
/// [`ReceiptError`].
pub fn read(bytes: &[u8]) -> Result<Receipt, ReceiptError> {
    if bytes.len() > RECEIPT_BYTES_MAX {
        return Err(ReceiptError::Length(bytes.len()));
    }
    let text = std::str::from_utf8(bytes).map_err(|_| ReceiptError::Malformed("it is no text"))?;
    let lines = text
        .strip_suffix('\n')
        .ok_or(ReceiptError::Malformed("its last line has no end"))?;
    let mut lines = lines.split('\n');
    let head = lines.next().unwrap_or_default();
    if head != HEAD {
        return Err(match head.strip_prefix(HEAD_OF_ANY) {
            Some(version) => ReceiptError::Version(version.chars().take(20).collect()),
            None => ReceiptError::Malformed("it does not begin as one"),
        });
    }
    let (Some(line), Some(digits), None) = (lines.next(), lines.next(), lines.next()) else {
        return Err(ReceiptError::Malformed(
            "it has three lines, no less or more",
        ));
    };
    let signature =
        unhex(digits).ok_or(ReceiptError::Malformed("its last line is no signature"))?;
    let receipt: Receipt = serde_json::from_str(line)
        .map_err(|_| ReceiptError::Malformed("its second line has other fields than one"))?;
    if body(&receipt)? != line {
        return Err(ReceiptError::Malformed(
            "its second line is not in the form in which nodes write it",
        ));
    }
    let key =
        PublicKey::from_bytes(receipt.node.as_bytes()).map_err(|_| ReceiptError::Signature)?;
    key.verify(&signed(line.as_bytes()), &Signature::from_bytes(&signature))
        .map_err(|_| ReceiptError::Signature)?;
    Ok(receipt)
}

fn unhex(digits: &str) -> Option<[u8; SIGNATURE_BYTES]> {
    let lower = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
    let mut signature = [0; SIGNATURE_BYTES];
    if digits.len() != 2 * SIGNATURE_BYTES || !digits.bytes().all(lower) {
        return None;
    }
    for (byte, pair) in signature.iter_mut().zip(digits.as_bytes().chunks(2)) {
        *byte = u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()?;
    }
    Some(signature)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
