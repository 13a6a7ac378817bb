//! What a host may ask for, and the answers.

use super::Server;
use crate::flow::InflowNews;
use crate::process::Process;
use crate::transfer::Job;
use crate::{files, spawn, stats};
use rustix::process::{PidfdFlags, pidfd_open};
use std::path::PathBuf;
use std::time::Duration;
use vistara_guest_protocol::{
    Configured, GuestConfig, PROCESSES_MAX, ProcessId, ProcessSpec, Refusal, RefusalKind,
    SpawnFailed, Stage, ToGuest, ToHost,
};

fn refused(kind: RefusalKind, message: impl Into<String>) -> Refusal {
    Refusal {
        kind,
        message: message.into(),
    }
}

fn unknown(id: ProcessId) -> Refusal {
    refused(
        RefusalKind::NotFound,
        format!("there is no process number {id}"),
    )
}

impl Server {
    /// Does what a host asks.
    pub(super) fn message(&mut self, message: ToGuest) {
        match message {
            ToGuest::Configure { request, config } => {
                let answer = match self.configure(config) {
                    Ok(configured) => ToHost::Configured {
                        request,
                        configured,
                    },
                    Err(refusal) => ToHost::Refused { request, refusal },
                };
                self.say(&answer);
            }
            ToGuest::Prepare {
                request,
                read_ahead,
                likely,
            } => {
                if let (Some(machine), false) = (&mut self.machine, self.configured) {
                    machine.prepare_for_capture(&read_ahead, &likely);
                }
                self.answer(request, Ok(()));
            }
            ToGuest::SetClock {
                request,
                wall_clock_ns,
            } => {
                // One that is no machine's own has its host's clock.
                let result = match self.machine {
                    Some(_) => crate::init::set_clock(wall_clock_ns)
                        .map_err(|error| files::refusal("setting the clock", &error)),
                    None => Ok(()),
                };
                self.answer(request, result);
            }
            ToGuest::Freeze { request } => {
                let result = match &mut self.machine {
                    Some(machine) => machine.freeze().map_err(|error| {
                        files::refusal("holding the guest's processes still", &error)
                    }),
                    None => Ok(()),
                };
                self.answer(request, result);
            }
            ToGuest::Thaw { request } => {
                if let Some(machine) = &mut self.machine {
                    machine.thaw();
                }
                self.answer(request, Ok(()));
            }
            ToGuest::Renew { request, config } => {
                let answer = match self.renew(&config) {
                    Ok(configured) => ToHost::Configured {
                        request,
                        configured,
                    },
                    Err(refusal) => ToHost::Refused { request, refusal },
                };
                self.say(&answer);
            }
            ToGuest::Spawn { id, spec } => {
                let answer = match self.spawn(id, &spec) {
                    Ok((pid, at_us)) => ToHost::Spawned { id, pid, at_us },
                    Err(failed) => ToHost::SpawnFailed { id, failed },
                };
                self.say(&answer);
                self.settle = true;
            }
            ToGuest::Resume { request, id, from } => {
                let Some(process) = self.processes.get_mut(&id.0) else {
                    return self.answer(request, Err(unknown(id)));
                };
                if !process.resume(from) {
                    let message = "the output from these offsets on is not kept";
                    return self.answer(request, Err(refused(RefusalKind::Invalid, message)));
                }
                let news = match process.stdin.news_for_newcomer() {
                    InflowNews::Credit(upto) => ToHost::StdinCredit { id, upto },
                    InflowNews::Closed => ToHost::StdinClosed { id },
                };
                self.answer(request, Ok(()));
                self.say(&news);
            }
            ToGuest::Ack { id, stream, upto } => {
                let process = self.processes.get_mut(&id.0);
                if process.is_some_and(|process| !process.output(stream).acknowledge(upto)) {
                    self.broken("more output was acknowledged than was sent");
                }
            }
            ToGuest::StdinEnd { id } => {
                if let Some(process) = self.processes.get_mut(&id.0) {
                    process.end_input();
                }
            }
            ToGuest::Signal {
                request,
                id,
                number,
            } => {
                let result = self.with_process(id, |process| match process.signal(number) {
                    Ok(true) => Ok(()),
                    Ok(false) => Err(refused(RefusalKind::NotFound, "the process has ended")),
                    Err(error) => Err(files::refusal(&format!("signal {number}"), &error)),
                });
                self.answer(request, result);
            }
            ToGuest::Resize { request, id, size } => {
                let result = self.with_process(id, |process| match &process.terminal {
                    Some(terminal) => spawn::resize(terminal, size)
                        .map_err(|error| files::refusal("resizing the terminal", &error)),
                    None => Err(refused(RefusalKind::Invalid, "the process has no terminal")),
                });
                self.answer(request, result);
            }
            ToGuest::Forget { request, id } => {
                let result = self.with_process(id, |process| match process.end() {
                    Some(_) => Ok(()),
                    None => Err(refused(RefusalKind::Busy, "the process still runs")),
                });
                if result.is_ok() {
                    self.processes.remove(&id.0);
                }
                self.answer(request, result);
            }
            ToGuest::Stat {
                request,
                path,
                follow,
            } => {
                let answer = match files::stat(&path, follow) {
                    Ok(stat) => ToHost::Stat { request, stat },
                    Err(refusal) => ToHost::Refused { request, refusal },
                };
                self.say(&answer);
            }
            ToGuest::Pack {
                transfer,
                path,
                follow,
            } => {
                self.transfer(
                    transfer,
                    Job::Pack {
                        path: PathBuf::from(path),
                        follow,
                    },
                );
            }
            ToGuest::Unpack {
                transfer,
                path,
                options,
            } => {
                self.transfer(
                    transfer,
                    Job::Unpack {
                        path: PathBuf::from(path),
                        options,
                    },
                );
            }
            ToGuest::TransferAck { transfer, upto } => {
                let transfer = self.transfers.get_mut(&transfer);
                if transfer.is_some_and(|transfer| !transfer.out.acknowledge(upto)) {
                    self.broken("more of a transfer was acknowledged than was sent");
                }
            }
            ToGuest::TransferEnd { transfer } => {
                if let Some(transfer) = self.transfers.get_mut(&transfer) {
                    transfer.input.end();
                }
            }
            ToGuest::TransferCancel { transfer } => drop(self.transfers.remove(&transfer)),
            ToGuest::Stats { request } => self.say(&ToHost::Stats {
                request,
                stats: stats::read(),
            }),
            ToGuest::Shutdown { grace_ms, signal } => {
                self.shutdown(Duration::from_millis(u64::from(grace_ms)), signal);
            }
            ToGuest::ByeSeen => self.bye_seen(),
            ToGuest::Ping { request } => self.answer(request, Ok(())),
        }
    }

    fn answer(&mut self, request: u32, result: Result<(), Refusal>) {
        let answer = match result {
            Ok(()) => ToHost::Done { request },
            Err(refusal) => ToHost::Refused { request, refusal },
        };
        self.say(&answer);
    }

    fn with_process(
        &mut self,
        id: ProcessId,
        act: impl FnOnce(&mut Process) -> Result<(), Refusal>,
    ) -> Result<(), Refusal> {
        self.processes
            .get_mut(&id.0)
            .map_or_else(|| Err(unknown(id)), act)
    }

    fn configure(&mut self, config: GuestConfig) -> Result<Configured, Refusal> {
        if self.configured {
            return Err(refused(
                RefusalKind::Busy,
                "the guest is configured already",
            ));
        }
        self.around.rlimits = spawn::parse_rlimits(&config.rlimits)
            .map_err(|message| refused(RefusalKind::Invalid, message))?;
        // Half a configuration is not undone: the guest is of no use after that, and is not asked again.
        self.configured = true;
        self.link.be_patient();
        let warnings = match &mut self.machine {
            Some(machine) => machine.configure(&config)?,
            None => Vec::new(),
        };
        self.around.hostname = config.hostname;
        self.mark(Stage::Configured);
        Ok(Configured {
            timings: self.timings.clone(),
            warnings,
        })
    }

    fn renew(&mut self, config: &GuestConfig) -> Result<Configured, Refusal> {
        if !self.configured {
            return Err(refused(
                RefusalKind::Invalid,
                "the guest was never configured",
            ));
        }
        let warnings = match &mut self.machine {
            Some(machine) => machine.renew(config)?,
            None => Vec::new(),
        };
        self.around.hostname.clone_from(&config.hostname);
        if let Some(machine) = &mut self.machine {
            machine.thaw();
        }
        Ok(Configured {
            timings: self.timings.clone(),
            warnings,
        })
    }

    fn spawn(&mut self, id: ProcessId, spec: &ProcessSpec) -> Result<(u32, u64), SpawnFailed> {
        let refuse = |message: String| Err(SpawnFailed { code: 125, message });
        if self.processes.contains_key(&id.0) {
            return refuse(format!("process number {id} is taken"));
        }
        if self.processes.len() >= PROCESSES_MAX {
            return refuse(format!(
                "the guest runs {PROCESSES_MAX} processes for its host already"
            ));
        }
        if self.machine.is_some() && !self.processes.is_empty() {
            self.oom_kills = stats::oom_kills();
        }
        let started = spawn::spawn(spec, &self.around)?;
        let pidfd = match self.children {
            Some(_) => None,
            None => match pidfd_open(started.pid, PidfdFlags::empty()) {
                Ok(pidfd) => Some(pidfd),
                Err(error) => return refuse(format!("watching the process: {error}")),
            },
        };
        if id == ProcessId::MAIN {
            self.mark(Stage::Spawned);
        }
        let at_us = crate::init::since_boot_us();
        let process = Process::new(id, started, pidfd, self.oom_kills);
        let pid = process.state().pid;
        self.processes.insert(id.0, process);
        Ok((pid, at_us))
    }

    fn transfer(&mut self, number: u32, job: Job) {
        let refusal = if self.transfers.contains_key(&number) {
            refused(RefusalKind::Invalid, "the transfer's number is taken")
        } else {
            match self.workers.start(job) {
                Ok(Some(transfer)) => {
                    self.transfers.insert(number, transfer);
                    return;
                }
                Ok(None) => refused(RefusalKind::Busy, "too many transfers are under way"),
                Err(error) => files::refusal("starting the transfer", &error),
            }
        };
        self.say(&ToHost::TransferEnded {
            transfer: number,
            refusal: Some(refusal),
        });
    }
}
