//! The nouns of Vistara: ids, quantities, what a user asks for, and the states a machine passes through.
//!
//! Pure data with validation at construction. Nothing here reads a clock, a file or a socket, and nothing here decides:
//! decisions live in `vistara-control`.

mod authority;
mod exit;
mod facts;
mod host;
mod ids;
mod image;
mod machine;
mod placing;
mod quantity;
mod receipt;
mod signal;
mod spec;

pub use authority::{AuthorityError, GrantId, GrantLimits, GrantTerms, NodeId, Right};
pub use exit::{EndReason, ExitStatus};
pub use facts::{
    Confidence, Correction, Evidence, ImageFacts, Library, Linkage, MayCreate, ProcessFacts,
    ProgramFacts, ProgramKind, Runtime,
};
pub use host::{Accelerator, HostFacts, KvmVerdict, Need, NeedState, VmmKind};
pub use ids::{Digest, Generation, IdError, MachineId, MachineName};
pub use image::{Architecture, ImageConfig, ImageRef, ImageRefError};
pub use machine::MachineState;
pub use placing::{
    Constraints, FactsError, ImageMark, LABEL_BYTES_MAX, LABELS_MAX, MARKS_MAX, NodeFacts,
    OwnerTerms, Stock, Wanted,
};
pub use quantity::{Bytes, Cpus, QuantityError};
pub use receipt::{
    COMMAND_BYTES_MAX, COMMAND_WORDS_MAX, RECEIPT_FORMAT, Receipt, ReceiptEnd, ReceiptFault,
    ReceiptHow, ReceiptOutput, ReceiptRan, ReceiptRequest, ReceiptStream, ReceiptTimes,
    ReceiptUsage, TEXT_BYTES_MAX, is_nonce, is_short,
};
pub use signal::{Signal, SignalError};
pub use spec::{
    Backend, EnvVar, Hypervisor, MachineSpec, NamedVolume, Network, Payload, PortMapping, Protocol,
    Rates, SpecError, TtySize, VolumeMount,
};
