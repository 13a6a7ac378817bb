//! A provisional run: its output is held back until it has ended, and what its kernel tells is watched.
//!
//! A run stands from the moment on at which the file with its end and its output is in its machine's directory under its
//! name: a node that dies before has never shown anything of it, and the next one undoes it; one that dies later leaves all
//! that the next one needs to show it, once.

use super::session::{UnikernelSession, outcome, recorded_exit};
use super::sort::Sorter;
use crate::logbook::{LogBook, Stream};
use crate::machine::recording::until_room;
use crate::machine::session::News;
use bytes::Bytes;
use std::io::{self, Write};
use std::path::Path;
use std::sync::atomic::Ordering;
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};
use tokio::io::AsyncReadExt;
use vistara_control::{
    Event, HELD_BYTES_MAX, PROVISIONAL_END, ProvisionalRun, Verdict, provisional_calls,
    provisional_max,
};
use vistara_machine::{OutputStream, VmEnd};
use vistara_model::{ExitStatus, Signal};
use vistara_nanos::calls::Told;

/// Name of the file that makes a run stand: a line with its end, then its output.
const HELD: &str = "held";
/// Size of one read.
const READ: usize = 64 << 10;
/// How long a beginning that might become a kernel's line waits for the rest.
const FLUSH_AFTER: Duration = Duration::from_millis(50);

/// How often it is looked whether somebody wants the run ended.
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// The calls that the kernel is to tell of.
pub(super) static CALLS: LazyLock<Vec<&'static str>> = LazyLock::new(provisional_calls);

/// What a run has shown so far, to nobody but us.
struct Watch {
    run: ProvisionalRun,
    told: Told<'static>,
    output: Vec<u8>,
    /// How much it had printed when its end was told.
    ended_at: Option<usize>,
}

impl Watch {
    fn program(&mut self, bytes: &[u8]) {
        for call in self.told.push(bytes, &mut self.output) {
            self.run.call(&call.name, call.result.as_deref());
            if call.name == PROVISIONAL_END {
                self.ended_at = Some(call.at);
            }
        }
        if self.told.is_unclear() {
            self.run.unclear();
        }
        if self.output.len() + self.told.waiting() > HELD_BYTES_MAX {
            self.run.printed_too_much();
        }
    }
}

impl UnikernelSession {
    /// Follows a provisional run until its machine is gone, and shows it or sees to it that it never was.
    pub(super) async fn run_provisionally(
        self,
        mut output: OutputStream,
        mut kernel: super::session::KernelLog,
    ) {
        let mut watch = Watch {
            run: ProvisionalRun::default(),
            told: Told::new(&CALLS),
            output: Vec::new(),
            ended_at: None,
        };
        // Only the node that began a run has all of its output.
        let mut learned = self.zero.is_some();
        if !learned {
            watch.run.lost_its_node();
        }
        let longest = provisional_max(self.record.backend.accelerator);
        let deadline = tokio::time::Instant::now() + longest;
        let mut sorter = Sorter::default();
        let mut buffer = vec![0; READ];
        let (mut over, mut broken) = (false, false);
        // The kernel with its module does not pass the power button's signal on to a program that sleeps (Nanos of 2026), so
        // that a run that somebody wants ended is ended at once. What the program would do about it could not be seen.
        let asked = || self.shared.asked_to_end.load(Ordering::Relaxed);
        while !over && !asked() && watch.run.sign().is_none() {
            let pause = match sorter.holds() {
                true => FLUSH_AFTER,
                false => LOOK_AGAIN,
            };
            let bound = deadline.min(tokio::time::Instant::now() + pause);
            let sorted = match tokio::time::timeout_at(bound, output.read(&mut buffer)).await {
                Err(_) if tokio::time::Instant::now() >= deadline => {
                    watch.run.took_too_long(longest);
                    continue;
                }
                Err(_) if sorter.holds() => sorter.flush(),
                Err(_) => continue,
                Ok(Ok(count)) if count > 0 => {
                    self.shared.hear(&buffer[..count]);
                    sorter.push(&buffer[..count])
                }
                Ok(ended) => {
                    if let Err(error) = ended {
                        tracing::warn!(machine = %self.record.id, %error, "a unikernel's output broke off");
                        broken = true;
                    }
                    over = true;
                    sorter.flush()
                }
            };
            if !sorted.kernel.is_empty() {
                watch
                    .run
                    .kernel_said(&String::from_utf8_lossy(&sorted.kernel));
                kernel.push(&sorted.kernel);
            }
            watch.program(&sorted.program);
        }
        watch.told.finish(&mut watch.output);
        if (watch.ended_at).is_some_and(|at| watch.output.len() > at) {
            // A program that has ended prints nothing: what was taken for its end was its own words.
            watch.run.unclear();
        }
        let seen = watch.run.sign().map(str::to_owned);
        let ended_for_others = !over && seen.is_none();
        if !over && let Err(error) = self.vm.kill().await {
            tracing::error!(machine = %self.record.id, error = crate::fault::chain(&error), "a unikernel that is undone could not be ended");
        }
        let end = self.vm.wait().await;
        if over && matches!(end, VmEnd::Killed | VmEnd::Crashed { .. }) {
            // Not our doing, and the host's rather than the command's: want of memory, or a fault of the monitor.
            learned = false;
        }
        let dir = self.dir.clone();
        let recorded = tokio::task::spawn_blocking(move || recorded_exit(&dir)).await;
        let event = outcome(end, recorded.ok().flatten(), &kernel.text(), asked());
        let status = match &event {
            _ if ended_for_others => Some(ExitStatus::Signal(Signal::TERM.0)),
            Some(Event::ProgramExited { status, .. }) if seen.is_none() => Some(*status),
            Some(_) | None => None,
        };
        // What somebody has ended is not begun again, so that what it printed is all there will be.
        let verdict = match (asked(), seen) {
            (true, None) => Verdict::Stands,
            _ => {
                let text = String::from_utf8_lossy(&watch.output);
                watch.run.judge(status, &text)
            }
        };
        match verdict {
            Verdict::Stands => {
                if ended_for_others || broken {
                    self.tell_cut().await;
                }
                if let Some(ExitStatus::Signal(_)) = status {
                    cut_last_word(&mut watch.output);
                }
                self.stand(status, watch.output.into()).await;
            }
            Verdict::Undone(seen) => {
                // The machine's task outlives its session.
                let _ = self.news.send(News::Undone { seen, learned }).await;
            }
        }
    }

    /// Makes the run stand, and shows it.
    async fn stand(&self, status: Option<ExitStatus>, output: Bytes) {
        if let Some(status) = status
            && !self.keep(status, &output).await
        {
            return;
        }
        if !output.is_empty() {
            let offset = self.record.log_base.stdout;
            self.record_held(offset, output).await;
        }
        if let Some(zero) = self.zero {
            self.first_output(zero, Instant::now()).await;
        }
        if let Some(status) = status {
            self.tell(Event::ProgramExited {
                status,
                out_of_memory: false,
            })
            .await;
        }
    }

    /// Sets the end and the output aside, however long the disk takes to have room for them: should the node die while they are
    /// shown, the next one would take the run for undone. False where the runtime ends first.
    async fn keep(&self, status: ExitStatus, output: &Bytes) -> bool {
        let trouble = |error: &io::Error| {
            format!(
                "its output cannot be set aside and waits until it can ({error}); free some disk space"
            )
        };
        until_room(&self.news, trouble, || {
            let (dir, output) = (self.dir.clone(), output.clone());
            move || keep(&dir, status, &output)
        })
        .await
    }
}

fn keep(dir: &Path, status: ExitStatus, output: &[u8]) -> io::Result<()> {
    let fresh = dir.join("held.new");
    let mut file = std::fs::File::create(&fresh)?;
    serde_json::to_writer(&mut file, &status)?;
    file.write_all(b"\n")?;
    file.write_all(output)?;
    drop(file);
    std::fs::rename(fresh, dir.join(HELD))
}

/// The end of a run that stands, whose node died before that was told; its output is in the log then, all of it, once.
/// `begin` is the place of its first byte there. Blocks on files.
pub(crate) fn take_up_held(
    dir: &Path,
    log: &Arc<LogBook>,
    begin: u64,
    now_ns: u64,
) -> io::Result<Option<ExitStatus>> {
    let content = match std::fs::read(dir.join(HELD)) {
        Ok(content) => content,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let end = content.iter().position(|byte| *byte == b'\n');
    let (status, output) = content.split_at(end.unwrap_or(content.len()));
    let status = serde_json::from_slice(status)?;
    // What is recorded already is skipped.
    log.append(
        Stream::Stdout,
        begin,
        now_ns,
        output.get(1..).unwrap_or_default(),
    )?;
    Ok(Some(status))
}

/// Clears away what held a run's output.
pub(crate) fn clear_held(dir: &Path) {
    for name in [HELD, "held.new"] {
        // Mostly there is none; what stays is small, and goes with the machine.
        let _ = std::fs::remove_file(dir.join(name));
    }
}

/// What the kernel prints of a program that a signal ends, without beginning a line of its own for it. It may be cut short,
/// since the monitor ends at the same moment.
const LAST_WORDS: [&[u8]; 3] = [b"   terminate\n", b"   core dump\n", b"   stop\n"];
/// Fewer bytes of them may be the program's.
const LAST_WORD_MIN: usize = 4;

/// Takes the kernel's last word from the end of what a program that a signal ended has printed.
fn cut_last_word(output: &mut Vec<u8>) {
    let cut = LAST_WORDS.iter().find_map(|word| {
        let begins = (LAST_WORD_MIN..=word.len()).rev();
        begins
            .map(|length| &word[..length])
            .find(|begin| output.ends_with(begin))
            .map(<[u8]>::len)
    });
    output.truncate(output.len() - cut.unwrap_or(0));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::logbook::Limits;

    #[test]
    fn what_stands_is_shown_once_however_much_of_it_was_shown_before() {
        let scratch = tempfile::tempdir().unwrap();
        let dir = scratch.path();
        let log = LogBook::open(&dir.join("log"), Limits::default()).unwrap();
        assert_eq!(take_up_held(dir, &log, 0, 1).unwrap(), None);
        keep(dir, ExitStatus::Code(7), b"line\nrest").unwrap();
        log.append(Stream::Stdout, 0, 1, b"lin").unwrap();
        for _ in 0..2 {
            let status = take_up_held(dir, &log, 0, 2).unwrap();
            assert_eq!(status, Some(ExitStatus::Code(7)));
            assert_eq!(log.offsets().stdout, 9);
        }
        clear_held(dir);
        assert_eq!(take_up_held(dir, &log, 0, 3).unwrap(), None);
    }

    #[test]
    fn the_kernels_last_word_is_not_the_programs() {
        let cut = |text: &str| {
            let mut output = text.as_bytes().to_vec();
            cut_last_word(&mut output);
            String::from_utf8(output).unwrap()
        };
        assert_eq!(cut("begin 0 1    terminate\n"), "begin 0 1 ");
        assert_eq!(cut("begin\n   term"), "begin\n");
        assert_eq!(cut("all is\n   core dump"), "all is\n");
        assert_eq!(cut("to terminate\n"), "to terminate\n");
        assert_eq!(cut("   "), "   ");
    }
}
