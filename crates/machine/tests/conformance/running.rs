//! A machine that runs the suite's guest, for tests that ask things of it.

use super::{Lines, Subject, launch, soon};
use vistara_machine::{LaunchPlan, Vm};

/// A running machine with its lines.
pub(crate) struct Running {
    pub(crate) vm: Box<dyn Vm>,
    pub(crate) lines: Lines,
    pub(crate) dir: tempfile::TempDir,
}

/// One that has answered, from a plan that the test has changed; `None` where the subject cannot run here.
pub(crate) async fn run(
    subject: &dyn Subject,
    change: impl FnOnce(&mut LaunchPlan),
) -> Option<Running> {
    let vmm = subject.vmm().await?;
    let dir = tempfile::tempdir().unwrap();
    let mut plan = subject.plan(dir.path());
    change(&mut plan);
    let vm = launch(&*vmm, &plan).await;
    let mut lines = Lines::open(&*vm).await;
    lines.echo("up").await;
    Some(Running { vm, lines, dir })
}

impl Running {
    /// What a command prints in the guest.
    pub(crate) async fn sh(&mut self, command: &str) -> String {
        self.lines.say(&format!("sh {command}")).await;
        let mut printed = String::new();
        loop {
            let line = self.lines.hear().await;
            if line.starts_with("done ") {
                return printed.trim_end().to_owned();
            }
            printed.push_str(&line);
            printed.push('\n');
        }
    }

    pub(crate) async fn load_drivers(&mut self) {
        self.lines.say("load").await;
        assert_eq!(self.lines.hear().await, "loaded");
    }

    /// Ends it; nothing may be left.
    pub(crate) async fn end_of(self, subject: &dyn Subject) {
        let left = subject.leftovers(&*self.vm);
        soon("killing", self.vm.kill()).await.unwrap();
        assert_eq!(left(), [] as [&str; 0]);
    }
}
