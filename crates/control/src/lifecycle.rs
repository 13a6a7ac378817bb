//! The life of one machine: events in, the next state and what to do out.
//!
//! ```text
//!              Launched          ProgramStarted        ProgramExited
//! preparing ────────────► booting ────────────► running ────────────► stopping ──► ended
//!     │                      │                     │  StopAsked ─────────▲           ▲
//!     └──────────────────────┴──── a failure, a kill, the VM's own end ──────────────┘
//! running ◄── Paused, Resumed ──► paused: who asks a paused program to end has it go on first
//! ```
//! Rules that hold whatever the order of events (the property test at the end checks them):
//! - the first reason for an end stays; later ones never replace it;
//! - once `ended`, nothing changes and nothing more is asked for;
//! - a machine with a VMM ends only when the VMM is gone, and is asked to take it down exactly as often as needed.

use std::time::Duration;
use vistara_model::{EndReason, ExitStatus, MachineState, Signal};

/// How long a program has to end by itself when its time limit is reached.
const TIMEOUT_GRACE: Duration = Duration::from_secs(2);

/// How a virtual machine came to an end, in the monitor's words.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VmGone {
    /// The guest switched itself off or rebooted.
    GuestOff,
    /// Its kernel panicked.
    GuestPanic(String),
    /// We killed it.
    Killed,
    /// The monitor died.
    Crashed(String),
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// The VMM runs.
    Launched,
    /// Preparing or launching failed; no VMM exists.
    PrepareFailed(String),
    /// The agent did not answer within its bound.
    BootTimedOut {
        /// The bound.
        after: Duration,
    },
    /// The agent refused the machine's configuration.
    ConfigureFailed(String),
    /// The program runs.
    ProgramStarted,
    /// The program could not be started.
    ProgramFailed {
        /// 125, 126 or 127.
        code: u8,
        /// Why.
        message: String,
    },
    /// The program has ended and all its output is recorded.
    ProgramExited {
        /// How.
        status: ExitStatus,
        /// Whether the guest's kernel killed something for want of memory.
        out_of_memory: bool,
    },
    /// Somebody asks it to end.
    StopAsked {
        /// With this signal.
        signal: Signal,
        /// Within this time.
        grace: Duration,
    },
    /// Somebody wants it gone now.
    KillAsked,
    /// It may not go on, for this reason, which is nobody's wish: how its program ends is not known.
    Forbidden(String),
    /// Its time limit is reached.
    TimeLimit,
    /// The time to end by itself is over.
    GraceOver,
    /// The VMM holds the guest still.
    Paused,
    /// The guest goes on.
    Resumed,
    /// The VMM is gone.
    VmGone(VmGone),
    /// An earlier node's machine is ours now; its VMM runs.
    Adopted {
        /// The signal that asks its program to end, should that have been under way.
        signal: Signal,
        /// How long the program has then.
        grace: Duration,
    },
    /// It was running when the host or the node went down and is not there any more.
    Lost(String),
}

/// What is to be done now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Effect {
    /// Send the program a signal.
    SignalProgram(Signal),
    /// Send [`Event::GraceOver`] after this time.
    ArmGrace(Duration),
    /// Let the paused guest go on.
    ResumeVm,
    /// Let the guest write back what it holds, then take the VMM down.
    TakeDown,
    /// Take the VMM down at once.
    KillVm,
}

/// A machine's life so far.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lifecycle {
    state: MachineState,
    end: Option<EndReason>,
    /// Why it is being asked to end, until it does.
    asked: Option<Asked>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Asked {
    Stop,
    TimeLimit,
}

/// A program that was asked to end before it ran: its end is what the signal would have made of it.
fn before_it_ran(signal: Signal) -> EndReason {
    EndReason::Stopped {
        status: Some(ExitStatus::Signal(signal.0)),
    }
}

impl Default for Lifecycle {
    fn default() -> Self {
        Lifecycle {
            state: MachineState::Preparing,
            end: None,
            asked: None,
        }
    }
}

impl Lifecycle {
    /// A life taken up again from its record: `ended` where it has a reason, else where it was.
    pub fn resumed(state: MachineState, end: Option<EndReason>) -> Lifecycle {
        Lifecycle {
            state,
            end,
            asked: None,
        }
    }

    /// Where it is.
    pub fn state(&self) -> MachineState {
        self.state
    }

    /// Why it ended or is about to.
    pub fn end(&self) -> Option<&EndReason> {
        self.end.as_ref()
    }

    fn because(&mut self, reason: EndReason) {
        self.end.get_or_insert(reason);
    }

    /// Takes one event in.
    pub fn on(&mut self, event: Event) -> Vec<Effect> {
        match self.state {
            MachineState::Ended => Vec::new(),
            MachineState::Preparing => self.while_preparing(event),
            MachineState::Booting
            | MachineState::Running
            | MachineState::Paused
            | MachineState::Stopping => self.with_vm(event),
        }
    }

    fn while_preparing(&mut self, event: Event) -> Vec<Effect> {
        match event {
            Event::Launched if self.end.is_some() => {
                // It was cancelled while the VMM came up.
                self.state = MachineState::Stopping;
                vec![Effect::KillVm]
            }
            Event::Launched => {
                self.state = MachineState::Booting;
                Vec::new()
            }
            Event::PrepareFailed(message) => {
                self.because(EndReason::PrepareFailed { message });
                self.state = MachineState::Ended;
                Vec::new()
            }
            Event::Lost(message) => {
                self.because(EndReason::Lost { message });
                self.state = MachineState::Ended;
                Vec::new()
            }
            Event::StopAsked { signal, .. } => {
                self.because(before_it_ran(signal));
                Vec::new()
            }
            Event::KillAsked => {
                self.because(EndReason::Stopped { status: None });
                Vec::new()
            }
            Event::Forbidden(message) => {
                self.because(EndReason::PrepareFailed { message });
                Vec::new()
            }
            Event::TimeLimit => {
                self.because(EndReason::TimedOut);
                Vec::new()
            }
            Event::BootTimedOut { .. }
            | Event::ConfigureFailed(_)
            | Event::ProgramStarted
            | Event::ProgramFailed { .. }
            | Event::ProgramExited { .. }
            | Event::GraceOver
            | Event::Adopted { .. }
            | Event::Paused
            | Event::Resumed
            | Event::VmGone(_) => Vec::new(),
        }
    }

    fn with_vm(&mut self, event: Event) -> Vec<Effect> {
        match event {
            Event::Launched | Event::PrepareFailed(_) => Vec::new(),
            // A guest that is held still does not answer.
            Event::BootTimedOut { .. } if self.state == MachineState::Paused => Vec::new(),
            Event::BootTimedOut { after } => {
                let message = format!(
                    "the guest did not answer within {} s; see its console with `vistara logs --console`",
                    after.as_secs()
                );
                self.finish(EndReason::BootFailed { message }, Effect::KillVm)
            }
            Event::ConfigureFailed(message) => {
                self.finish(EndReason::BootFailed { message }, Effect::KillVm)
            }
            Event::ProgramStarted => {
                if self.state == MachineState::Booting {
                    self.state = MachineState::Running;
                }
                Vec::new()
            }
            Event::ProgramFailed { code, message } => {
                self.finish(EndReason::StartFailed { code, message }, Effect::KillVm)
            }
            Event::ProgramExited {
                status,
                out_of_memory,
            } => {
                let reason = match self.asked {
                    None => EndReason::Exited {
                        status,
                        out_of_memory,
                    },
                    Some(Asked::Stop) => EndReason::Stopped {
                        status: Some(status),
                    },
                    Some(Asked::TimeLimit) => EndReason::TimedOut,
                };
                let paused = self.state == MachineState::Paused;
                let mut effects = self.finish(reason, Effect::TakeDown);
                if paused && !effects.is_empty() {
                    // It has something to write back.
                    effects.insert(0, Effect::ResumeVm);
                }
                effects
            }
            Event::StopAsked { signal, grace } => match self.state {
                MachineState::Booting => self.finish(before_it_ran(signal), Effect::KillVm),
                _ if self.end.is_some() => Vec::new(),
                _ => self.ask(Asked::Stop, signal, grace),
            },
            Event::TimeLimit => match self.state {
                MachineState::Booting => self.finish(EndReason::TimedOut, Effect::KillVm),
                _ if self.end.is_some() || self.asked.is_some() => Vec::new(),
                _ => self.ask(Asked::TimeLimit, Signal::TERM, TIMEOUT_GRACE),
            },
            Event::GraceOver => match self.asked {
                None => Vec::new(),
                Some(Asked::Stop) => {
                    self.finish(EndReason::Stopped { status: None }, Effect::KillVm)
                }
                Some(Asked::TimeLimit) => self.finish(EndReason::TimedOut, Effect::KillVm),
            },
            // The node died in the middle of an end: it is taken up where it was.
            Event::Adopted { .. } if self.end.is_some() => vec![Effect::KillVm],
            Event::Adopted { signal, grace } if self.state == MachineState::Stopping => {
                self.ask(Asked::Stop, signal, grace)
            }
            Event::Adopted { .. } => Vec::new(),
            Event::Paused => {
                if self.state == MachineState::Running {
                    self.state = MachineState::Paused;
                }
                Vec::new()
            }
            Event::Resumed => {
                if self.state == MachineState::Paused {
                    self.state = MachineState::Running;
                }
                Vec::new()
            }
            Event::KillAsked => {
                self.because(EndReason::Stopped { status: None });
                self.state = MachineState::Stopping;
                vec![Effect::KillVm]
            }
            Event::Forbidden(message) => {
                self.because(EndReason::Lost { message });
                self.state = MachineState::Stopping;
                vec![Effect::KillVm]
            }
            Event::VmGone(gone) => {
                self.because(match gone {
                    VmGone::GuestOff => EndReason::Lost {
                        message: "the guest switched itself off before its program's end was known"
                            .to_owned(),
                    },
                    VmGone::GuestPanic(message) => EndReason::GuestPanic { message },
                    VmGone::Killed => EndReason::Stopped { status: None },
                    VmGone::Crashed(message) => EndReason::VmmFailed { message },
                });
                self.state = MachineState::Ended;
                Vec::new()
            }
            Event::Lost(message) => {
                self.because(EndReason::Lost { message });
                self.state = MachineState::Ended;
                Vec::new()
            }
        }
    }

    fn ask(&mut self, asked: Asked, signal: Signal, grace: Duration) -> Vec<Effect> {
        self.asked = Some(asked);
        let paused = self.state == MachineState::Paused;
        self.state = MachineState::Stopping;
        // A program that is held still hears no signal.
        let resume = paused.then_some(Effect::ResumeVm);
        let ask = [Effect::SignalProgram(signal), Effect::ArmGrace(grace)];
        resume.into_iter().chain(ask).collect()
    }

    /// The reason is known; `how` takes the VMM down. Says nothing where that is under way already.
    fn finish(&mut self, reason: EndReason, how: Effect) -> Vec<Effect> {
        if self.end.is_some() {
            return Vec::new();
        }
        self.because(reason);
        self.state = MachineState::Stopping;
        vec![how]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn running() -> Lifecycle {
        let mut life = Lifecycle::default();
        assert_eq!(life.on(Event::Launched), vec![]);
        assert_eq!(life.on(Event::ProgramStarted), vec![]);
        assert_eq!(life.state(), MachineState::Running);
        life
    }

    const STOP: Event = Event::StopAsked {
        signal: Signal::TERM,
        grace: Duration::from_secs(10),
    };

    fn exited(code: u8) -> Event {
        Event::ProgramExited {
            status: ExitStatus::Code(code),
            out_of_memory: false,
        }
    }

    #[test]
    fn a_program_that_ends_takes_its_machine_with_it() {
        let mut life = running();
        assert_eq!(life.on(exited(7)), vec![Effect::TakeDown]);
        assert_eq!(life.on(Event::VmGone(VmGone::Killed)), vec![]);
        assert_eq!(
            (life.state(), life.end().unwrap().exit_code()),
            (MachineState::Ended, 7)
        );
    }

    #[test]
    fn a_stopped_program_keeps_its_own_exit_code() {
        let mut life = running();
        assert_eq!(
            life.on(STOP),
            vec![
                Effect::SignalProgram(Signal::TERM),
                Effect::ArmGrace(Duration::from_secs(10))
            ]
        );
        assert_eq!(life.on(exited(3)), vec![Effect::TakeDown]);
        life.on(Event::VmGone(VmGone::Killed));
        assert_eq!(
            life.end(),
            Some(&EndReason::Stopped {
                status: Some(ExitStatus::Code(3))
            })
        );
    }

    #[test]
    fn a_program_that_ignores_the_signal_is_killed_and_reports_137() {
        let mut life = running();
        life.on(STOP);
        assert_eq!(life.on(Event::GraceOver), vec![Effect::KillVm]);
        life.on(Event::VmGone(VmGone::Killed));
        assert_eq!(life.end().unwrap().exit_code(), 137);
    }

    #[test]
    fn a_time_limit_reports_124_even_if_the_program_ends_by_itself_then() {
        let mut life = running();
        life.on(Event::TimeLimit);
        life.on(exited(0));
        life.on(Event::VmGone(VmGone::Killed));
        assert_eq!(life.end().unwrap().exit_code(), 124);
    }

    #[test]
    fn a_machine_cancelled_while_preparing_never_reaches_booting() {
        let mut life = Lifecycle::default();
        assert_eq!(life.on(Event::KillAsked), vec![]);
        assert_eq!(life.on(Event::Launched), vec![Effect::KillVm]);
        assert_eq!(life.state(), MachineState::Stopping);
        life.on(Event::VmGone(VmGone::Killed));
        assert_eq!(life.end(), Some(&EndReason::Stopped { status: None }));
    }

    #[test]
    fn a_machine_stopped_while_booting_reports_the_signal() {
        let mut life = Lifecycle::default();
        life.on(Event::Launched);
        let interrupt = Event::StopAsked {
            signal: Signal::INT,
            grace: Duration::ZERO,
        };
        assert_eq!(life.on(interrupt), vec![Effect::KillVm]);
        life.on(Event::VmGone(VmGone::Killed));
        assert_eq!(life.end().unwrap().exit_code(), 130);
    }

    #[test]
    fn a_panic_is_told_apart_from_a_monitor_that_died() {
        let mut life = running();
        life.on(Event::VmGone(VmGone::GuestPanic("sysrq".into())));
        assert!(matches!(life.end(), Some(EndReason::GuestPanic { .. })));
        let mut life = running();
        life.on(Event::VmGone(VmGone::Crashed("signal 9".into())));
        assert!(matches!(life.end(), Some(EndReason::VmmFailed { .. })));
    }

    #[test]
    fn a_paused_program_goes_on_to_be_asked_to_end_and_its_silence_is_no_failure() {
        let mut life = running();
        assert_eq!(life.on(Event::Paused), vec![]);
        assert_eq!(life.state(), MachineState::Paused);
        let silent = Event::BootTimedOut {
            after: Duration::from_secs(60),
        };
        assert_eq!(life.on(silent), vec![]);
        assert_eq!(life.on(Event::Resumed), vec![]);
        assert_eq!(life.state(), MachineState::Running);
        life.on(Event::Paused);
        assert_eq!(
            life.on(STOP),
            vec![
                Effect::ResumeVm,
                Effect::SignalProgram(Signal::TERM),
                Effect::ArmGrace(Duration::from_secs(10))
            ]
        );
        // One that is ending cannot be held any more.
        assert_eq!(life.on(Event::Paused), vec![]);
        assert_eq!(life.state(), MachineState::Stopping);
        let mut life = running();
        life.on(Event::Paused);
        assert_eq!(life.on(Event::KillAsked), vec![Effect::KillVm]);
    }

    #[test]
    fn a_machine_that_may_not_go_on_was_stopped_by_nobody() {
        let mut life = running();
        let forbidden = Event::Forbidden("nobody guards it".into());
        assert_eq!(life.on(forbidden), vec![Effect::KillVm]);
        life.on(Event::VmGone(VmGone::Killed));
        let message = "nobody guards it".into();
        assert_eq!(life.end(), Some(&EndReason::Lost { message }));
    }

    const ADOPTED: Event = Event::Adopted {
        signal: Signal::TERM,
        grace: Duration::from_secs(10),
    };

    #[test]
    fn an_end_that_a_dead_node_had_begun_is_carried_on_by_the_next() {
        let told = Some(EndReason::Exited {
            status: ExitStatus::Code(3),
            out_of_memory: false,
        });
        let mut life = Lifecycle::resumed(MachineState::Stopping, told.clone());
        assert_eq!(life.on(ADOPTED), vec![Effect::KillVm]);
        life.on(Event::VmGone(VmGone::Killed));
        assert_eq!(
            (life.state(), life.end().cloned()),
            (MachineState::Ended, told)
        );

        let mut life = Lifecycle::resumed(MachineState::Stopping, None);
        assert_eq!(
            life.on(ADOPTED),
            vec![
                Effect::SignalProgram(Signal::TERM),
                Effect::ArmGrace(Duration::from_secs(10))
            ]
        );
        assert_eq!(life.on(Event::GraceOver), vec![Effect::KillVm]);

        let mut life = Lifecycle::resumed(MachineState::Running, None);
        assert_eq!(life.on(ADOPTED), vec![]);
    }

    fn any_event() -> impl Strategy<Value = Event> {
        prop_oneof![
            Just(Event::Launched),
            Just(Event::PrepareFailed("p".into())),
            Just(Event::BootTimedOut {
                after: Duration::from_secs(1)
            }),
            Just(Event::ConfigureFailed("c".into())),
            Just(Event::ProgramStarted),
            Just(Event::ProgramFailed {
                code: 127,
                message: "m".into()
            }),
            Just(exited(1)),
            Just(STOP),
            Just(Event::KillAsked),
            Just(ADOPTED),
            Just(Event::TimeLimit),
            Just(Event::GraceOver),
            Just(Event::Paused),
            Just(Event::Resumed),
            Just(Event::VmGone(VmGone::Killed)),
            Just(Event::VmGone(VmGone::GuestPanic("g".into()))),
            Just(Event::Lost("l".into())),
        ]
    }

    proptest! {
        #[test]
        fn the_first_reason_stays_and_an_ended_machine_asks_for_nothing(events in prop::collection::vec(any_event(), 0..24)) {
            let mut life = Lifecycle::default();
            let mut first = None;
            let mut launched = false;
            for event in events {
                let before = life.state();
                launched |= before == MachineState::Preparing && event == Event::Launched;
                let effects = life.on(event);
                if before == MachineState::Ended {
                    prop_assert!(effects.is_empty());
                }
                if !launched {
                    prop_assert!(!effects.contains(&Effect::KillVm) && !effects.contains(&Effect::TakeDown));
                }
                if first.is_none() {
                    first = life.end().cloned();
                } else {
                    prop_assert_eq!(life.end(), first.as_ref());
                }
                prop_assert_eq!(life.state() == MachineState::Ended && life.end().is_none(), false);
            }
        }
    }
}
