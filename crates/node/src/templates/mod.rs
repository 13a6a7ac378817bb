//! Templates: machines that were captured when their guest was ready and had run nothing yet, kept for others to be forked
//! from.
//!
//! A template is made of an image, a kernel, an agent and a monitor, and of nothing that a user said or ran: whoever may
//! use the image may be forked from it. Its key is a digest of all these, so that none is used once one of them changes.
//!
//! ```text
//! templates/<key>/          made by the first machine that needs it, which then is its first fork
//!   making.json             the machine being captured, for a later node to end if this one dies; while it is there the
//!                           directory stays, and no other machine is captured in it
//!   overlay.img             the writable disk as it was at the capture; each fork gets a copy
//!   memory, state, capture.json   written behind the first fork's back
//!   template.json           what it is of; written last: a directory without one is swept away by the next node
//! ```

mod blueprint;
mod files;
mod make;
mod store;

pub(crate) use blueprint::{Blueprint, Parts, Shape};
pub(crate) use store::{Listed, Template, Templates};
