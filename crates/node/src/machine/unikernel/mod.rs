//! A machine whose guest is a unikernel: its disk, what it prints, and how it ended. There is no agent in it: it learns all
//! from its disk and tells all by its output, by a record on its disk, and by ending.

mod again;
mod disk;
mod launch;
mod provisional;
mod session;
mod sort;

pub(crate) use again::{Again, Undone, after, undone};
pub(crate) use launch::launch;
pub(crate) use provisional::{clear_held, take_up_held};
pub(crate) use session::{KERNEL_LOG, UnikernelSession, unseen_end};
