//! `/init` of a Linux guest.

use std::process::ExitCode;

fn main() -> ExitCode {
    if rustix::process::getpid() == rustix::process::Pid::INIT {
        vistara_guest_agent::init::run();
    }
    if std::env::args().nth(1).as_deref() == Some("--rehearse") {
        // Started by the agent itself, so that a guest has done it once.
        return ExitCode::SUCCESS;
    }
    eprintln!(
        "vistara-guest-agent {} is PID 1 of a guest and nothing else",
        env!("CARGO_PKG_VERSION")
    );
    ExitCode::FAILURE
}
