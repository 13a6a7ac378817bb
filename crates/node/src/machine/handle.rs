//! How others reach a machine: what it is now, its output, its agent, its input, and commands to the task that owns it.

use super::Record;
use crate::fault::{Answer, Fault};
use crate::logbook::{LogBook, Offsets};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, PoisonError};
use std::time::Duration;
use tokio::sync::{Mutex, Notify, mpsc, oneshot, watch};
use vistara_guest_client::{Agent, Input, ProcessHandle, ProcessId};
use vistara_machine::Vm;
use vistara_model::{MachineId, MachineState, Payload, Signal};

/// What is asked of a machine.
#[derive(Debug)]
pub(crate) enum Command {
    /// Ask its program to end, and take it down.
    Stop {
        signal: Option<Signal>,
        grace: Duration,
    },
    /// Send its program a signal.
    Signal(Signal),
    /// Take it down at once.
    Kill,
    /// Hold its guest still.
    Pause(oneshot::Sender<Answer<()>>),
    /// Let its guest go on.
    Resume(oneshot::Sender<Answer<()>>),
    /// Note whether its guest's processes are held still for a snapshot.
    Hold(bool, oneshot::Sender<Answer<()>>),
    /// Forget it altogether: only once it has ended.
    Remove,
}

/// A machine as it was last published.
#[derive(Debug, Clone)]
pub(crate) struct Snapshot {
    pub(crate) record: Arc<Record>,
    /// What troubles it while it runs.
    pub(crate) trouble: Option<String>,
    /// Whether it is forgotten: its name is free, and only this handle is left.
    pub(crate) removed: bool,
}

/// A machine, for those who ask things of it.
pub(crate) struct Handle {
    pub(crate) id: MachineId,
    pub(crate) dir: PathBuf,
    pub(crate) log: Arc<LogBook>,
    pub(crate) shared: Arc<Shared>,
    pub(super) commands: mpsc::Sender<Command>,
    pub(crate) snapshot: watch::Receiver<Snapshot>,
}

/// What the machine's tasks and its users share.
#[derive(Default)]
pub(crate) struct Shared {
    /// The session with the agent, while there is one.
    pub(crate) agent: watch::Sender<Option<Agent>>,
    /// The program, while the session with the agent lasts.
    pub(crate) process: watch::Sender<Option<ProcessHandle>>,
    /// The monitor's machine, while there is one.
    pub(crate) vm: watch::Sender<Option<Arc<dyn Vm>>>,
    /// Whether the program has been seen to run.
    pub(crate) started: AtomicBool,
    /// The program's standard input, where it has one and nobody holds it.
    stdin: Mutex<Option<Input>>,
    /// Counts the sessions that offered an input: one of an older session writes to nobody.
    inputs: AtomicU32,
    /// Whether the guest's processes are to go on: a snapshot was cut short.
    pub(crate) to_thaw: AtomicBool,
    /// Has a session that was lost be followed by another at once.
    pub(super) reconnect: Notify,
    /// Whether the guest of a machine that goes on from another knows who it is.
    pub(super) renewed: AtomicBool,
    /// What of the program's output was another machine's.
    pub(super) printed_before: std::sync::Mutex<Offsets>,
    /// Whether a unikernel was asked to end by its power button.
    pub(super) asked_to_end: AtomicBool,
    /// The end of what a unikernel and its program have printed.
    last_words: std::sync::Mutex<Vec<u8>>,
    /// Numbers for executed processes; 0 is the program's own.
    pub(crate) next_process: AtomicU32,
}

/// Bytes of a unikernel's last words: the conclusions from its end need a few lines.
const LAST_WORDS: usize = 8 << 10;

/// The program's input, held by one client.
pub(crate) struct HeldInput {
    pub(crate) input: Input,
    number: u32,
}

impl Shared {
    /// Remembers the end of what a unikernel printed.
    pub(super) fn hear(&self, bytes: &[u8]) {
        let mut words = self
            .last_words
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        words.extend_from_slice(bytes);
        let excess = words.len().saturating_sub(LAST_WORDS);
        words.drain(..excess);
    }

    /// The end of what a unikernel printed, at most some KiB.
    pub(super) fn last_words(&self) -> String {
        let words = self
            .last_words
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        String::from_utf8_lossy(&words).into_owned()
    }

    pub(super) fn printed_before(&self) -> Offsets {
        let before = self.printed_before.lock();
        *before.unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn set_printed_before(&self, offsets: Offsets) {
        let before = self.printed_before.lock();
        *before.unwrap_or_else(PoisonError::into_inner) = offsets;
    }

    /// A new session's input.
    pub(super) async fn offer_input(&self, input: Input) {
        let mut stdin = self.stdin.lock().await;
        self.inputs.fetch_add(1, Ordering::Relaxed);
        *stdin = Some(input);
    }

    /// Takes the input, where nobody holds it.
    pub(crate) async fn take_input(&self) -> Option<HeldInput> {
        let mut stdin = self.stdin.lock().await;
        let number = self.inputs.load(Ordering::Relaxed);
        stdin.take().map(|input| HeldInput { input, number })
    }

    /// Puts the input back for the next client, unless another session has offered its own meanwhile.
    pub(crate) async fn return_input(&self, held: HeldInput) {
        let mut stdin = self.stdin.lock().await;
        if held.number == self.inputs.load(Ordering::Relaxed) {
            *stdin = Some(held.input);
        }
    }

    pub(crate) fn process_id(&self) -> ProcessId {
        ProcessId(
            self.next_process
                .fetch_add(1, Ordering::Relaxed)
                .wrapping_add(1),
        )
    }
}

/// How many commands may wait for a machine's task: more than that many clients asking at once is no use.
pub(super) const COMMANDS_MAX: usize = 64;

impl Handle {
    pub(crate) fn snapshot(&self) -> Snapshot {
        let mut snapshot = self.snapshot.borrow().clone();
        if snapshot.trouble.is_none() {
            let vm = self.shared.vm.borrow();
            snapshot.trouble = vm.as_ref().and_then(|vm| vm.trouble());
        }
        snapshot
    }

    pub(crate) fn record(&self) -> Arc<Record> {
        Arc::clone(&self.snapshot.borrow().record)
    }

    pub(crate) fn state(&self) -> MachineState {
        self.snapshot.borrow().record.state
    }

    pub(crate) async fn send(&self, command: Command) {
        // The task is gone only when the machine is; then there is nothing left to ask for.
        let _ = self.commands.send(command).await;
    }

    /// Asks for something that is answered.
    pub(crate) async fn ask<T>(
        &self,
        command: impl FnOnce(oneshot::Sender<Answer<T>>) -> Command,
    ) -> Answer<T> {
        let (sender, answer) = oneshot::channel();
        self.send(command(sender)).await;
        answer.await.unwrap_or_else(|_| {
            let name = &self.record().name;
            Err(Fault::conflict(format!("machine {name} has ended"))
                .hint(format!("see what became of it: vistara inspect {name}")))
        })
    }

    /// Holds the guest still.
    pub(crate) async fn pause(&self) -> Answer<()> {
        let record = self.record();
        if record.backend.payload == Payload::Linux && self.state() != MachineState::Paused {
            // A guest that is held before it has answered would pass for one that never does.
            self.agent().await?;
        }
        self.ask(Command::Pause).await
    }

    /// Waits until the machine is as wanted, and gives what it is then. Also ends when nothing will change any more.
    pub(crate) async fn wait_until(&self, wanted: impl Fn(&Snapshot) -> bool) -> Snapshot {
        let mut snapshot = self.snapshot.clone();
        loop {
            let now = snapshot.borrow_and_update().clone();
            if wanted(&now) || snapshot.changed().await.is_err() {
                return now;
            }
        }
    }

    /// Waits until its program runs, or it is over.
    pub(crate) async fn wait_started(&self) -> Snapshot {
        self.wait_until(|snapshot| {
            !matches!(
                snapshot.record.state,
                MachineState::Preparing | MachineState::Booting
            )
        })
        .await
    }

    pub(crate) async fn wait_end(&self) -> Snapshot {
        self.wait_until(|snapshot| snapshot.record.state == MachineState::Ended)
            .await
    }

    /// The session with the agent of a machine whose program runs.
    pub(crate) async fn agent(&self) -> Answer<Agent> {
        /// How long a lost session may take to come back before a request gives up.
        const BOUND: Duration = Duration::from_secs(10);
        /// How long it may take to be seen whether a program that is tried as a unikernel goes to Linux.
        const TRIED: Duration = Duration::from_secs(10);
        let decided = |s: &Snapshot| !s.record.provisional || s.record.state == MachineState::Ended;
        if !decided(&self.snapshot()) {
            let seen = tokio::time::timeout(TRIED, self.wait_until(decided)).await;
            if seen.is_err() {
                let name = &self.record().name;
                return Err(Fault::conflict(format!(
                    "machine {name} is being tried as a unikernel, and may yet begin anew on Linux"
                ))
                .hint("try again in a few seconds"));
            }
        }
        let record = self.record();
        let name = record.name.clone();
        if record.backend.payload == Payload::Nanos {
            return Err(Fault::conflict(format!(
                "machine {name} is a unikernel: one program and nothing else, so that no command, shell or file transfer can reach into it"
            ))
            .hint("run the image with --hypervisor firecracker (or qemu) for a machine that can"));
        }
        match self.state() {
            MachineState::Running | MachineState::Stopping => {}
            MachineState::Preparing | MachineState::Booting => {
                self.wait_until(|s| {
                    !matches!(
                        s.record.state,
                        MachineState::Preparing | MachineState::Booting
                    )
                })
                .await;
            }
            MachineState::Paused => {
                return Err(Fault::conflict(format!("machine {name} is paused"))
                    .hint(format!("vistara resume {name}")));
            }
            MachineState::Ended => {}
        }
        if self.state() == MachineState::Ended {
            return Err(Fault::conflict(format!("machine {name} is not running"))
                .hint(format!("see what became of it: vistara inspect {name}")));
        }
        let mut agent = self.shared.agent.subscribe();
        let found = tokio::time::timeout(BOUND, agent.wait_for(Option::is_some)).await;
        match found {
            Ok(Ok(agent)) => agent
                .clone()
                .ok_or_else(|| Fault::conflict("the guest's agent is not connected")),
            Ok(Err(_)) | Err(_) => Err(Fault::conflict(format!(
                "the agent in machine {name} does not answer"
            ))
            .hint(format!("see its console: vistara logs --console {name}"))),
        }
    }
}
