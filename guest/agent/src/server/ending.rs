//! How a guest ends: the main program is asked, then everything is killed, then the host is told.

use super::Server;
use crate::sys;
use std::time::{Duration, Instant};
use vistara_guest_protocol::{ProcessId, ToHost};

/// How long killed programs and a host that has not acknowledged their output may take.
const SETTLE: Duration = Duration::from_secs(1);

/// How often it is looked whether they have settled.
const SETTLE_LOOK: Duration = Duration::from_millis(5);

/// How long a host may take to hear that the guest is off.
const LINGER: Duration = Duration::from_millis(500);

/// Longest grace: a year is as good as for ever.
const GRACE_MAX: Duration = Duration::from_secs(365 * 86_400);

/// Where the guest stands on its way off.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ending {
    /// Nobody has asked.
    No,
    /// The main program was asked, and has until then.
    Asked(Instant),
    /// Everything was killed; output may still be on its way until then.
    Killed(Instant),
    /// The host was told, and may answer until then.
    Told(Instant),
    /// The guest may be switched off.
    Done,
}

impl Ending {
    /// When to look again though nothing happens.
    pub(super) fn wake_at(self, now: Instant) -> Option<Instant> {
        match self {
            Self::No | Self::Done => None,
            Self::Asked(until) | Self::Told(until) => Some(until),
            Self::Killed(until) => Some(until.min(now + SETTLE_LOOK)),
        }
    }
}

impl Server {
    /// The host wants the guest off. A later request may only shorten the grace.
    pub(super) fn shutdown(&mut self, grace: Duration, signal: i32) {
        let until = Instant::now() + grace.min(GRACE_MAX);
        match self.ending {
            Ending::No => {
                let main = self.processes.get(&ProcessId::MAIN.0);
                // A signal that does not exist asks nobody; the grace ends all the same.
                let asked = main.is_some_and(|main| main.signal(signal).unwrap_or(false));
                self.ending = Ending::Asked(if asked { until } else { Instant::now() });
            }
            Ending::Asked(before) => self.ending = Ending::Asked(before.min(until)),
            Ending::Killed(_) | Ending::Told(_) | Ending::Done => {}
        }
    }

    /// The host has heard that the guest is off.
    pub(super) fn bye_seen(&mut self) {
        if matches!(self.ending, Ending::Told(_)) {
            self.ending = Ending::Done;
        }
    }

    /// Goes as far on the way off as can be gone now.
    pub(super) fn step_ending(&mut self, now: Instant) {
        if let Ending::Asked(until) = self.ending {
            let main_runs = self
                .processes
                .get(&ProcessId::MAIN.0)
                .is_some_and(|main| main.runs());
            if !main_runs || now >= until {
                self.kill_all();
                self.ending = Ending::Killed(now + SETTLE);
            }
        }
        if let Ending::Killed(until) = self.ending {
            let host = self.session.is_some();
            let settled = self.processes.values().all(|process| {
                let heard = process.exit_told && process.all_acknowledged();
                process.end().is_some() && (heard || !process.flowing || !host)
            });
            if settled || now >= until {
                if let Some(machine) = &mut self.machine {
                    machine.leave();
                }
                self.fill();
                self.say(&ToHost::Bye);
                self.ending = if host {
                    Ending::Told(now + LINGER)
                } else {
                    Ending::Done
                };
            }
        }
        if let Ending::Told(until) = self.ending
            && (self.session.is_none() || now >= until)
        {
            self.ending = Ending::Done;
        }
    }

    fn kill_all(&self) {
        if self.machine.is_some() {
            // From PID 1 this reaches every process but itself. There may be none.
            let _ = sys::kill(-1, libc::SIGKILL);
            return;
        }
        for process in self.processes.values().filter(|process| process.runs()) {
            let _ = sys::kill(-process.pid.as_raw_nonzero().get(), libc::SIGKILL);
        }
    }
}
