//! `/init` of a Linux guest.

use std::process::ExitCode;

fn main() -> ExitCode {
    if rustix::process::getpid() == rustix::process::Pid::INIT {
        vistara_guest_agent::init::run();
    }
    eprintln!(
        "vistara-guest-agent {} is PID 1 of a guest and nothing else",
        env!("CARGO_PKG_VERSION")
    );
    ExitCode::FAILURE
}
