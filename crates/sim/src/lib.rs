//! The simulation: many nodes in virtual time, which decide with the code that real ones decide with.
//!
//! A run is fully decided by its [`Scenario`], the seed included. What is here is the world around the decisions (time, the
//! network, clocks that drift, deaths, machines that take time to end) and the checks of what must always hold: no memory
//! promised twice, never two live copies of one slot or two runs of an at-most-once task, nobody served without a grant,
//! everything placed again in time, a bounded load.

mod checks;
mod copies;
mod net;
mod node;
mod placing;
mod scenario;
mod traffic;
mod wire;
mod world;

pub use net::{Cut, Weather};
pub use scenario::{Fault, Report, Scenario};
pub use traffic::{Sent, Traffic};
pub use world::{EMPTY_MAX, GOSSIP_BYTES_MAX, NOTICED_WITHIN, World};
