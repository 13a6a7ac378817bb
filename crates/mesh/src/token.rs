//! Grants as tokens (biscuit): made and checked by the node that gives them, narrowed by whoever holds them, offline.
//!
//! **Form.** The first block is signed with a key that is derived from the node's own and used for nothing else. It names
//! the grant, the node, the holder, the rights, the end and the limits; and it checks that the caller, whose key the
//! connection has proven, is the holder, or somebody to whom the holder has passed it on in a block signed with the holder's key.
//! A token is therefore no secret: to anybody else it is worth nothing. Later blocks can only add checks.
//!
//! **Reading.** The terms are read from the first block alone; every check of every block must hold against what the
//! caller does now ([`Ambient`]). A check on something unknown fails. Evaluation is bounded in time, facts and rounds.

use crate::frame::TOKEN_BYTES_MAX;
use crate::identity::Identity;
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use biscuit_auth::builder::{Algorithm, AuthorizerBuilder, BlockBuilder};
use biscuit_auth::{AuthorizerLimits, Biscuit, KeyPair, PrivateKey, PublicKey, UnverifiedBiscuit};
use std::collections::BTreeSet;
use std::fmt::{self, Write};
use std::str::FromStr;
use std::time::Duration;
use vistara_model::{Bytes, GrantId, GrantLimits, GrantTerms, NodeId, Right};

/// What a token's text begins with, so that it is known for what it is wherever it turns up.
const PREFIX: &str = "vistara-grant-";
/// For what the key that signs grants is derived.
const KEY_CONTEXT: &str = "vistara 2026-11 grants: root key of a node's tokens";
/// Blocks of one token: each costs a signature to check.
const BLOCKS_MAX: usize = 8;
/// A token of ours needs a dozen facts and no rule; what holders add is bounded by this.
const FACTS_MAX: u64 = 500;
const ROUNDS_MAX: u64 = 50;
/// Enough on a busy host, and short enough for a hostile token.
const TIME_MAX: Duration = Duration::from_millis(200);

/// Why a token is worth nothing.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    /// The text is none.
    #[error("this is not a grant: it begins with {PREFIX:?} and is written in one word")]
    Text,
    /// It is larger than any, or has more blocks.
    #[error("the grant is larger than any that is accepted")]
    TooLarge,
    /// It is not signed by this node.
    #[error("the grant was not given by this node, or it is damaged")]
    Signature,
    /// The first block is not what a node writes.
    #[error("the grant does not say what it is for")]
    Terms,
    /// A check failed.
    #[error("the grant does not allow this to this caller now: {0}")]
    Check(String),
    /// Making it failed.
    #[error("the grant could not be made: {0}")]
    Make(String),
}

fn making(error: impl fmt::Display) -> TokenError {
    TokenError::Make(error.to_string())
}

/// A token, not looked into.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Token(Vec<u8>);

impl Token {
    /// The token with these bytes.
    ///
    /// # Errors
    /// [`TokenError::TooLarge`].
    pub fn from_bytes(bytes: Vec<u8>) -> Result<Token, TokenError> {
        if bytes.len() > TOKEN_BYTES_MAX {
            return Err(TokenError::TooLarge);
        }
        Ok(Token(bytes))
    }

    /// Its bytes.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// What its first block says, **not checked**: to tell its holder what it is for.
    ///
    /// # Errors
    /// [`TokenError`] where it is no grant of ours.
    pub fn unchecked_terms(&self) -> Result<GrantTerms, TokenError> {
        let token = self.parse()?;
        read_terms(&token.print_block_source(0).map_err(|_| TokenError::Terms)?)
    }

    /// Whether its holder has passed it on to another, **not checked**.
    pub fn is_passed_on(&self) -> bool {
        self.parse()
            .is_ok_and(|token| token.external_public_keys().iter().any(Option::is_some))
    }

    fn parse(&self) -> Result<UnverifiedBiscuit, TokenError> {
        let token = UnverifiedBiscuit::from(&self.0).map_err(|_| TokenError::Text)?;
        if token.block_count() > BLOCKS_MAX {
            return Err(TokenError::TooLarge);
        }
        Ok(token)
    }

    /// The same with less in it. Needs nobody's leave but that of whoever has it; `own` signs where it is passed on.
    ///
    /// # Errors
    /// [`TokenError::Make`] where `own` is not its holder and it is to be passed on; others where it is no token.
    pub fn narrow(&self, narrowing: &Narrowing, own: &Identity) -> Result<Token, TokenError> {
        let token = self.parse()?;
        let mut code = String::new();
        if let Some(rights) = &narrowing.rights {
            let list: Vec<String> = rights
                .iter()
                .map(|right| format!("uses(\"{right}\")"))
                .collect();
            // Nothing at all is a check that always fails.
            let list = if list.is_empty() {
                "false".to_owned()
            } else {
                list.join(" or ")
            };
            let _ = writeln!(code, "check if {list};");
        }
        if let Some(until) = narrowing.until_s {
            let _ = writeln!(code, "check if time_s($t), $t <= {};", whole(until));
        }
        if let Some(memory) = narrowing.limits.memory_max {
            let _ = writeln!(code, "check if memory($m), $m <= {};", whole(memory.0));
        }
        if let Some(machines) = narrowing.limits.machines_max {
            let _ = writeln!(code, "check if machines($n), $n <= {};", whole(machines));
        }
        if let Some(disk) = narrowing.limits.disk_max {
            let _ = writeln!(code, "check if disk($d), $d <= {};", whole(disk.0));
        }
        let narrowed = match narrowing.to {
            None => {
                let block = BlockBuilder::new().code(&code).map_err(making)?;
                token.append(block).map_err(making)?
            }
            Some(to) => {
                let holder = self.unchecked_terms()?.holder;
                if holder != own.id() {
                    return Err(TokenError::Make(format!(
                        "only its holder, {}, can pass it on",
                        holder.short()
                    )));
                }
                // Not for the holder itself any more: what is passed on is meant for one caller.
                let _ = writeln!(code, "delegate(\"{to}\");\ncheck if caller(\"{to}\");");
                let block = BlockBuilder::new().code(&code).map_err(making)?;
                let request = token.third_party_request().map_err(making)?;
                let signed = request
                    .create_block(&private(&own.secret().to_bytes())?, block)
                    .and_then(|block| block.serialize())
                    .map_err(making)?;
                token.append_third_party(&signed).map_err(making)?
            }
        };
        if narrowed.block_count() > BLOCKS_MAX {
            return Err(TokenError::TooLarge);
        }
        Token::from_bytes(narrowed.to_vec().map_err(making)?)
    }
}

impl fmt::Display for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{PREFIX}{}", URL_SAFE_NO_PAD.encode(&self.0))
    }
}

impl FromStr for Token {
    type Err = TokenError;
    fn from_str(text: &str) -> Result<Token, TokenError> {
        let text = text.trim().strip_prefix(PREFIX).ok_or(TokenError::Text)?;
        if text.len() > TOKEN_BYTES_MAX * 4 / 3 + 4 {
            return Err(TokenError::TooLarge);
        }
        let token = Token::from_bytes(URL_SAFE_NO_PAD.decode(text).map_err(|_| TokenError::Text)?)?;
        token.parse()?;
        Ok(token)
    }
}

/// How a token is made narrower. What is absent stays as it is; nothing can be made wider.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Narrowing {
    /// For these only.
    pub rights: Option<BTreeSet<Right>>,
    /// Void after this, in seconds since 1970.
    pub until_s: Option<u64>,
    /// At most this much.
    pub limits: GrantLimits,
    /// For this caller instead of its holder.
    pub to: Option<NodeId>,
}

/// What a caller does now.
#[derive(Debug, Clone, Copy)]
pub struct Ambient {
    /// The caller, as the connection has proven.
    pub caller: NodeId,
    /// The time in seconds since 1970.
    pub now_s: u64,
    /// The right that it needs for this; absent where any will do.
    pub right: Option<Right>,
    /// Guest memory of all machines under this grant afterwards; zero where the request takes none.
    pub memory: Bytes,
    /// Machines under this grant afterwards; zero where the request starts none.
    pub machines: u64,
    /// Bytes of images brought in under this grant afterwards; zero where the request brings none.
    pub disk: Bytes,
}

/// A token that this node has signed; whether it allows something is another question.
#[derive(Debug, Clone)]
pub struct Verified {
    terms: GrantTerms,
    token: Biscuit,
}

impl Verified {
    /// What was promised.
    pub fn terms(&self) -> &GrantTerms {
        &self.terms
    }

    /// Whether every check of every block holds.
    ///
    /// # Errors
    /// [`TokenError::Check`].
    pub fn permits(&self, ambient: &Ambient) -> Result<(), TokenError> {
        let rights = match ambient.right {
            Some(right) => vec![right],
            None => Right::ALL.to_vec(),
        };
        let uses: String = rights
            .iter()
            .map(|right| format!("uses(\"{right}\"); "))
            .collect();
        let code = format!(
            "time_s({}); caller(\"{}\"); at(\"{}\"); {uses}memory({}); machines({}); disk({}); allow if true;",
            whole(ambient.now_s),
            ambient.caller,
            self.terms.node,
            whole(ambient.memory.0),
            whole(ambient.machines),
            whole(ambient.disk.0),
        );
        let limits = AuthorizerLimits {
            max_facts: FACTS_MAX,
            max_iterations: ROUNDS_MAX,
            max_time: TIME_MAX,
        };
        let failed = |error: biscuit_auth::error::Token| TokenError::Check(error.to_string());
        let mut authorizer = AuthorizerBuilder::new()
            .code(code)
            .map_err(failed)?
            .set_limits(limits)
            .build(&self.token)
            .map_err(failed)?;
        authorizer.authorize().map(|_| ()).map_err(failed)
    }
}

/// Datalog's numbers are signed: what does not fit is as good as the largest.
fn whole(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

fn private(bytes: &[u8]) -> Result<PrivateKey, TokenError> {
    PrivateKey::from_bytes(bytes, Algorithm::Ed25519).map_err(making)
}

/// What gives a node's grants and knows them again.
pub struct Authority {
    node: NodeId,
    root: KeyPair,
}

impl fmt::Debug for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Authority({})", self.node.short())
    }
}

impl Authority {
    /// The authority of the node with this key.
    ///
    /// # Errors
    /// [`TokenError::Make`] where the key cannot be used, which would be a fault of the library.
    pub fn new(identity: &Identity) -> Result<Authority, TokenError> {
        let seed = blake3::derive_key(KEY_CONTEXT, &identity.secret().to_bytes());
        Ok(Authority {
            node: identity.id(),
            root: KeyPair::from(&private(&seed)?),
        })
    }

    /// Writes a token with these terms.
    ///
    /// # Errors
    /// [`TokenError::Make`].
    pub fn give(&self, terms: &GrantTerms) -> Result<Token, TokenError> {
        let holder = &terms.holder;
        let mut code = format!(
            "grant(\"{}\");\nnode(\"{}\");\nholder(\"{holder}\");\n",
            terms.id, terms.node
        );
        for right in &terms.rights {
            let _ = writeln!(code, "right(\"{right}\");");
        }
        let until = whole(terms.until_s);
        let _ = writeln!(code, "until({until});");
        if let Some(memory) = terms.limits.memory_max {
            let _ = writeln!(code, "memory_max({});", whole(memory.0));
        }
        if let Some(machines) = terms.limits.machines_max {
            let _ = writeln!(code, "machines_max({});", whole(machines));
        }
        if let Some(disk) = terms.limits.disk_max {
            let _ = writeln!(code, "disk_max({});", whole(disk.0));
        }
        let _ = write!(
            code,
            "check if time_s($t), $t <= {until};\n\
             check if at(\"{}\");\n\
             check if uses($r), right($r) or right(\"admin\");\n\
             check if caller(\"{holder}\") or caller($c), delegate($c) trusting authority, ed25519/{holder};\n",
            terms.node
        );
        let token = Biscuit::builder()
            .code(&code)
            .and_then(|builder| builder.build(&self.root))
            .and_then(|token| token.to_vec())
            .map_err(making)?;
        Token::from_bytes(token)
    }

    /// Checks that this node gave a token.
    ///
    /// # Errors
    /// [`TokenError`].
    pub fn verify(&self, token: &Token) -> Result<Verified, TokenError> {
        let parsed = token.parse()?;
        let root: PublicKey = self.root.public();
        let token = parsed.verify(root).map_err(|_| TokenError::Signature)?;
        let terms = read_terms(&token.print_block_source(0).map_err(|_| TokenError::Terms)?)?;
        if terms.node != self.node {
            return Err(TokenError::Signature);
        }
        Ok(Verified { terms, token })
    }
}

/// Reads the facts of a first block as [`Authority::give`] writes them, one a line.
fn read_terms(source: &str) -> Result<GrantTerms, TokenError> {
    fn text<T: FromStr>(value: &str) -> Result<T, TokenError> {
        let value = value
            .strip_prefix('"')
            .and_then(|value| value.strip_suffix('"'));
        value
            .and_then(|value| value.parse().ok())
            .ok_or(TokenError::Terms)
    }
    fn once<T>(place: &mut Option<T>, value: T) -> Result<(), TokenError> {
        match place.replace(value) {
            None => Ok(()),
            Some(_) => Err(TokenError::Terms),
        }
    }
    fn number(value: &str) -> Result<u64, TokenError> {
        value.parse().map_err(|_| TokenError::Terms)
    }
    let (mut id, mut node, mut holder, mut until) = (None, None, None, None);
    let (mut memory, mut machines, mut disk) = (None, None, None);
    let mut rights = BTreeSet::new();
    for line in source.lines() {
        let fact = line
            .trim()
            .strip_suffix(';')
            .and_then(|line| line.strip_suffix(')'));
        let Some((name, value)) = fact.and_then(|fact| fact.split_once('(')) else {
            continue;
        };
        match name {
            "grant" => once(&mut id, text::<GrantId>(value)?)?,
            "node" => once(&mut node, text::<NodeId>(value)?)?,
            "holder" => once(&mut holder, text::<NodeId>(value)?)?,
            "until" => once(&mut until, number(value)?)?,
            "memory_max" => once(&mut memory, Bytes(number(value)?))?,
            "machines_max" => once(&mut machines, number(value)?)?,
            "disk_max" => once(&mut disk, Bytes(number(value)?))?,
            "right" => {
                rights.insert(text::<Right>(value)?);
            }
            // A check; those are evaluated, not read.
            _ => {}
        }
    }
    Ok(GrantTerms {
        id: id.ok_or(TokenError::Terms)?,
        node: node.ok_or(TokenError::Terms)?,
        holder: holder.ok_or(TokenError::Terms)?,
        rights,
        until_s: until.ok_or(TokenError::Terms)?,
        limits: GrantLimits {
            memory_max: memory,
            machines_max: machines,
            disk_max: disk,
        },
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
