//! Policies as hypercore's users have them: a JSON file with rules and weights.
//!
//! Each field of that format is enforced, with the meaning that its name says. A node of which a ruled figure is not known
//! breaks the rule: what was not measured is not good. Where the format leaves a unit open it is said here.
//!
//! | field | held against |
//! |---|---|
//! | `mode` | `enforce`: who breaks a rule is not asked; `permissive`: comes behind all who keep them |
//! | `required_capabilities` | `NodeFacts::is_capable_of` |
//! | `max_latency_ms`, `max_jitter_ms`, `max_packet_loss` (percent) | what the asker measured |
//! | `max_price_per_gb` | the price of a GiB of guest memory for an hour |
//! | `min_reputation_score` | what the asker saw of the node ([`super::Seen::reputation`]), never what it says |
//! | `max_queue_depth` | machines that wait to be started there |
//! | `prefer_low_latency`, `prefer_low_price`, `prefer_high_reputation` | adds a half to that weight |

use super::Candidate;
use serde::Deserialize;
use serde_json::Value;
use std::collections::BTreeSet;

/// Longest policy file.
pub const POLICY_BYTES_MAX: usize = 64 << 10;
/// What a preference adds to a weight.
const PREFERENCE: f64 = 0.5;
/// A latency, a price and a queue that are worth nothing any more, as hypercore has them.
const LATENCY_MS_WORST: f64 = 200.0;
const PRICE_WORST: f64 = 1.0;
const QUEUE_WORST: f64 = 100.0;

/// Why a policy is not taken.
#[derive(Debug, thiserror::Error)]
pub enum PolicyError {
    /// Too long.
    #[error("the policy is longer than {POLICY_BYTES_MAX} bytes")]
    TooLong,
    /// It is not JSON of that form.
    #[error("the policy cannot be read")]
    Json(#[from] serde_json::Error),
    /// It is JSON, and no policy.
    #[error("the policy cannot be read: it is not a JSON object")]
    NoObject,
    /// A field has a value that makes no sense.
    #[error("the policy's {field} is {value}: it takes {takes}")]
    Value {
        /// Which.
        field: &'static str,
        /// What stands there.
        value: String,
        /// What could.
        takes: &'static str,
    },
}

/// How much each property counts.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize, Default)]
#[serde(default)]
pub struct Weights {
    /// A short way.
    #[serde(rename = "latency_weight")]
    pub latency: f64,
    /// A low price.
    #[serde(rename = "price_weight")]
    pub price: f64,
    /// A good name.
    #[serde(rename = "reputation_weight")]
    pub reputation: f64,
    /// A short queue.
    #[serde(rename = "queue_weight")]
    pub queue: f64,
}

/// A policy by rules and weights. Absent limits limit nothing.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Rules {
    /// Its name.
    pub name: String,
    /// Whether rules exclude; else they only put behind.
    pub enforce: bool,
    /// What a node must be capable of.
    pub capabilities: BTreeSet<String>,
    /// Longest way there and back, milliseconds.
    pub latency_ms_max: Option<f64>,
    /// Highest price of a GiB for an hour.
    pub price_max: Option<f64>,
    /// Least reputation, 0 to 1.
    pub reputation_min: Option<f64>,
    /// Longest queue.
    pub queue_max: Option<u32>,
    /// Most loss, percent.
    pub loss_percent_max: Option<f64>,
    /// Most variation of the way, milliseconds.
    pub jitter_ms_max: Option<f64>,
    /// How much each property counts.
    pub weights: Weights,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct RawPolicy {
    name: String,
    mode: String,
    rules: RawRules,
    scoring: Weights,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct RawRules {
    required_capabilities: Vec<String>,
    max_latency_ms: f64,
    max_price_per_gb: f64,
    min_reputation_score: f64,
    max_queue_depth: u32,
    max_packet_loss: f64,
    max_jitter_ms: f64,
    prefer_low_latency: bool,
    prefer_low_price: bool,
    prefer_high_reputation: bool,
}

const FIELDS: [&str; 5] = ["name", "description", "mode", "rules", "scoring"];
const RULE_FIELDS: [&str; 10] = [
    "required_capabilities",
    "max_latency_ms",
    "max_price_per_gb",
    "min_reputation_score",
    "max_queue_depth",
    "max_packet_loss",
    "max_jitter_ms",
    "prefer_low_latency",
    "prefer_low_price",
    "prefer_high_reputation",
];
const WEIGHT_FIELDS: [&str; 4] = [
    "latency_weight",
    "price_weight",
    "reputation_weight",
    "queue_weight",
];

/// Reads a policy, and names each field of the file that means nothing here.
///
/// # Errors
/// [`PolicyError`].
pub fn read_policy(text: &[u8]) -> Result<(Rules, Vec<String>), PolicyError> {
    if text.len() > POLICY_BYTES_MAX {
        return Err(PolicyError::TooLong);
    }
    let value: Value = serde_json::from_slice(text)?;
    if !value.is_object() {
        return Err(PolicyError::NoObject);
    }
    let mut unknown = unknown_fields(&value, "", &FIELDS);
    unknown.extend(unknown_fields(&value["rules"], "rules.", &RULE_FIELDS));
    unknown.extend(unknown_fields(
        &value["scoring"],
        "scoring.",
        &WEIGHT_FIELDS,
    ));
    let raw: RawPolicy = serde_json::from_value(value)?;
    Ok((check(raw)?, unknown))
}

fn unknown_fields(value: &Value, prefix: &str, known: &[&str]) -> Vec<String> {
    let fields = value.as_object().into_iter().flat_map(|map| map.keys());
    fields
        .filter(|field| !known.contains(&field.as_str()))
        .map(|field| format!("{prefix}{field}"))
        .collect()
}

fn check(raw: RawPolicy) -> Result<Rules, PolicyError> {
    let enforce = match raw.mode.as_str() {
        "enforce" => true,
        "permissive" => false,
        other => {
            return Err(PolicyError::Value {
                field: "mode",
                value: format!("{other:?}"),
                takes: "\"enforce\" or \"permissive\"",
            });
        }
    };
    if raw.name.is_empty() {
        return Err(PolicyError::Value {
            field: "name",
            value: "empty".to_owned(),
            takes: "a name",
        });
    }
    // Zero and absent are the same in that format: no limit.
    let limit = |field, value: f64, most: f64, takes| match value {
        0.0 => Ok(None),
        value if value > 0.0 && value <= most => Ok(Some(value)),
        value => Err(PolicyError::Value {
            field,
            value: value.to_string(),
            takes,
        }),
    };
    const POSITIVE: &str = "0 (no limit) or more";
    let rules = raw.rules;
    let mut weights = raw.scoring;
    for (field, weight) in [
        ("latency_weight", weights.latency),
        ("price_weight", weights.price),
        ("reputation_weight", weights.reputation),
        ("queue_weight", weights.queue),
    ] {
        limit(field, weight, 100.0, "0 to 100")?;
    }
    weights.latency += PREFERENCE * f64::from(rules.prefer_low_latency);
    weights.price += PREFERENCE * f64::from(rules.prefer_low_price);
    weights.reputation += PREFERENCE * f64::from(rules.prefer_high_reputation);
    if weights == Weights::default() {
        let (latency, price, reputation, queue) = (0.25, 0.25, 0.25, 0.25);
        weights = Weights {
            latency,
            price,
            reputation,
            queue,
        };
    }
    Ok(Rules {
        name: raw.name,
        enforce,
        capabilities: rules.required_capabilities.into_iter().collect(),
        latency_ms_max: limit("max_latency_ms", rules.max_latency_ms, f64::MAX, POSITIVE)?,
        price_max: limit(
            "max_price_per_gb",
            rules.max_price_per_gb,
            f64::MAX,
            POSITIVE,
        )?,
        reputation_min: limit(
            "min_reputation_score",
            rules.min_reputation_score,
            1.0,
            "0 to 1",
        )?,
        queue_max: (rules.max_queue_depth > 0).then_some(rules.max_queue_depth),
        loss_percent_max: limit("max_packet_loss", rules.max_packet_loss, 100.0, "0 to 100")?,
        jitter_ms_max: limit("max_jitter_ms", rules.max_jitter_ms, f64::MAX, POSITIVE)?,
        weights,
    })
}

impl Rules {
    /// The first rule that a node breaks, in words.
    pub fn broken_by(&self, candidate: &Candidate) -> Option<String> {
        let Candidate { facts, seen } = candidate;
        if let Some(missing) = (self.capabilities.iter()).find(|one| !facts.is_capable_of(one)) {
            return Some(format!("it is not capable of {missing:?}"));
        }
        let ms = |time: std::time::Duration| time.as_secs_f64() * 1e3;
        let ruled = [
            ("latency", seen.rtt.map(ms), self.latency_ms_max, " ms"),
            ("jitter", seen.jitter.map(ms), self.jitter_ms_max, " ms"),
            (
                "loss",
                seen.loss.map(|share| share * 100.0),
                self.loss_percent_max,
                " %",
            ),
            (
                "price",
                Some(facts.price_micros as f64 / 1e6),
                self.price_max,
                "",
            ),
            (
                "queue",
                Some(f64::from(facts.queue_depth)),
                self.queue_max.map(f64::from),
                "",
            ),
        ];
        for (what, value, limit, unit) in ruled {
            match (value, limit) {
                (_, None) => {}
                (None, Some(_)) => return Some(format!("its {what} is not known")),
                (Some(value), Some(limit)) if value > limit => {
                    return Some(format!(
                        "its {what} is {value:.3}{unit}, above {limit}{unit}"
                    ));
                }
                (Some(_), Some(_)) => {}
            }
        }
        let reputation = seen.reputation();
        match self.reputation_min {
            Some(least) if reputation < least => {
                Some(format!("its reputation is {reputation:.2}, below {least}"))
            }
            _ => None,
        }
    }

    /// How good a node is, more is better: the weighted sum of its properties, each 0 to 1. What is not known counts 0.
    pub fn score(&self, candidate: &Candidate, price_micros: u64) -> f64 {
        let Candidate { facts, seen } = candidate;
        let good = |value: f64, worst: f64| (1.0 - value / worst).max(0.0);
        let latency = (seen.rtt).map_or(0.0, |rtt| good(rtt.as_secs_f64() * 1e3, LATENCY_MS_WORST));
        let price = good(price_micros as f64 / 1e6, PRICE_WORST);
        let queue = good(f64::from(facts.queue_depth), QUEUE_WORST);
        let weights = &self.weights;
        weights.latency * latency
            + weights.price * price
            + weights.reputation * seen.reputation()
            + weights.queue * queue
    }
}
