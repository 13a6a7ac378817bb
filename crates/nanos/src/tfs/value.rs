//! Values as the manifest has them.

/// A value in a root tuple.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Value {
    /// Bytes. The kernel reads numbers from decimal text too.
    Text(Vec<u8>),
    /// A number. Negative ones are kept as their sign and magnitude on the disk.
    Integer(i128),
    /// Keys with values, in order.
    Tuple(Vec<(Vec<u8>, Value)>),
    /// Values in order.
    Vector(Vec<Value>),
    /// Present without content (one NUL byte on the disk).
    Null,
}

impl Value {
    /// Text.
    pub fn text(bytes: impl AsRef<[u8]>) -> Value {
        Value::Text(bytes.as_ref().to_vec())
    }

    /// What stands at `key`, if this is a tuple that has it.
    pub fn get(&self, key: &[u8]) -> Option<&Value> {
        match self {
            Value::Tuple(entries) => entries
                .iter()
                .find(|(name, _)| name == key)
                .map(|(_, value)| value),
            Value::Text(_) | Value::Integer(_) | Value::Vector(_) | Value::Null => None,
        }
    }
}
