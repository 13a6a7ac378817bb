//! Receipts on the wire.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// `POST /v1/receipts/verify`: is this a receipt, and whose word is it?
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct VerifyReceiptRequest {
    /// The receipt as it was given, whole.
    pub receipt: String,
    /// The node that should have signed it: its key, a name or a beginning of an id among the joined nodes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
}

/// It is one: in form, and signed by the node that it names.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct VerifiedReceipt {
    /// What the node stated; its fields are described with the form of receipts.
    #[schema(value_type = Object)]
    pub receipt: serde_json::Value,
    /// The key that signed it.
    pub node: String,
    /// What this node calls that one: the name under which it was joined or the beginning of its id, or `this node`.
    /// Absent where nobody here knows the key: then anybody may have made it.
    pub known_as: Option<String>,
    /// Whether it is the node that was asked for; absent where none was.
    pub is_node: Option<bool>,
}
