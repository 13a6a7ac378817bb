//! Following a unikernel: its output into the log book, its kernel's words beside it, and its end.

use super::super::Record;
use super::super::handle::Shared;
use super::super::prepare::{OVERLAY, Stopwatch};
use super::super::recording::record_output;
use super::super::session::News;
use super::sort::{Sorted, Sorter, signal};
use crate::fault::chain;
use crate::logbook::{LogBook, Stream};
use bytes::Bytes;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use tokio::io::AsyncReadExt;
use tokio::sync::mpsc;
use vistara_control::{Event, VmGone};
use vistara_machine::{OutputStream, Vm, VmEnd};
use vistara_model::{ExitStatus, Signal};

/// Name of the kernel's words in a machine's directory.
pub(crate) const KERNEL_LOG: &str = "kernel.log";
/// Most bytes of it: what comes later is dropped, but for the last words, which are told.
const KERNEL_LOG_MAX: u64 = 256 << 10;
/// Bytes of the kernel's last words that are kept at hand and told when it fails.
const LAST_WORDS: usize = 4 << 10;
/// Size of one read.
const READ: usize = 64 << 10;
/// How long a beginning that might become a kernel's line waits for the rest.
const FLUSH_AFTER: Duration = Duration::from_millis(50);

/// Everything that following takes.
pub(crate) struct UnikernelSession {
    pub(crate) record: Arc<Record>,
    pub(crate) dir: PathBuf,
    pub(crate) vm: Arc<dyn Vm>,
    pub(crate) log: Arc<LogBook>,
    pub(crate) shared: Arc<Shared>,
    pub(crate) news: mpsc::Sender<News>,
    /// When the request arrived, for a machine that this node launched itself.
    pub(crate) zero: Option<Instant>,
}

/// The kernel's words: the first of them in a file, the last of them at hand.
pub(super) struct KernelLog {
    file: Option<File>,
    last: Vec<u8>,
}

impl KernelLog {
    fn open(dir: &Path) -> KernelLog {
        let file = File::options()
            .append(true)
            .create(true)
            .open(dir.join(KERNEL_LOG));
        if let Err(error) = &file {
            tracing::warn!(path = %dir.display(), %error, "a unikernel's own messages cannot be kept");
        }
        KernelLog {
            file: file.ok(),
            last: Vec::new(),
        }
    }

    pub(super) fn push(&mut self, bytes: &[u8]) {
        let room = self
            .file
            .as_ref()
            .and_then(|file| file.metadata().ok())
            .is_some_and(|data| data.len() < KERNEL_LOG_MAX);
        if let (true, Some(file)) = (room, &mut self.file) {
            // They are told only to whoever asks for the console; a full disk is told by the program's output.
            let _ = file.write_all(bytes);
        }
        self.last.extend_from_slice(bytes);
        let excess = self.last.len().saturating_sub(LAST_WORDS);
        self.last.drain(..excess);
    }

    pub(super) fn text(&self) -> String {
        String::from_utf8_lossy(&self.last).into_owned()
    }
}

/// What the record on the disk in `dir` says of the program's end; nothing where it says nothing, as after an exit with 0.
/// Blocks on a file.
pub(super) fn recorded_exit(dir: &Path) -> Option<i32> {
    let mut disk = File::open(dir.join(OVERLAY)).ok()?;
    match vistara_nanos::klog::read(&mut disk) {
        Ok(record) => record.map(|record| record.exit_code),
        Err(error) => {
            tracing::warn!(path = %dir.display(), error = chain(&error), "a unikernel's record cannot be read");
            None
        }
    }
}

/// The end of a program that no session saw to the last: from the monitor's own end and what the files in `dir` tell, with
/// the kernel's last words. Blocks on files.
pub(crate) fn unseen_end(dir: &Path, gone: &Event) -> Option<(Event, Vec<u8>)> {
    let end = match gone {
        Event::VmGone(VmGone::GuestOff) => VmEnd::GuestOff,
        Event::VmGone(VmGone::GuestPanic(message)) => VmEnd::GuestPanic {
            message: message.clone(),
        },
        _ => VmEnd::Killed,
    };
    let words = std::fs::read(dir.join(KERNEL_LOG)).unwrap_or_default();
    let last = words[words.len().saturating_sub(LAST_WORDS)..].to_vec();
    let exited = outcome(
        end,
        recorded_exit(dir),
        &String::from_utf8_lossy(&last),
        false,
    )?;
    Some((exited, last))
}

impl UnikernelSession {
    /// Follows the machine until it is gone and all it printed is recorded.
    pub(crate) async fn run(self) {
        let output = match self.vm.open_output() {
            Ok(output) => output,
            Err(error) => {
                let message = format!("its output cannot be read: {}", chain(&error));
                return self.tell(Event::ConfigureFailed(message)).await;
            }
        };
        // The kernel says nothing of the moment; it takes about a tenth of a second.
        self.shared.started.store(true, Ordering::Relaxed);
        self.tell(Event::ProgramStarted).await;
        let mut kernel = KernelLog::open(&self.dir);
        if self.record.provisional {
            return self.run_provisionally(output, kernel).await;
        }
        self.follow(output, &mut kernel).await;
        let end = self.vm.wait().await;
        let dir = self.dir.clone();
        let recorded = tokio::task::spawn_blocking(move || recorded_exit(&dir)).await;
        let words = kernel.text();
        let asked = self.shared.asked_to_end.load(Ordering::Relaxed);
        if let Some(event) = outcome(end, recorded.ok().flatten(), &words, asked) {
            self.tell(event).await;
        }
    }

    pub(super) async fn tell(&self, event: Event) {
        // The machine's task outlives its session.
        let _ = self.news.send(News::Event(event)).await;
    }

    /// Somebody must not be told that this is all it printed.
    pub(super) async fn tell_cut(&self) {
        let _ = self.news.send(News::Cut).await;
    }

    async fn follow(&self, mut output: OutputStream, kernel: &mut KernelLog) {
        let mut sorter = Sorter::default();
        let mut first = self.zero;
        let mut buffer = vec![0; READ];
        loop {
            self.log.wait_for_readers().await;
            let read = output.read(&mut buffer);
            let got = match sorter.holds() {
                true => tokio::time::timeout(FLUSH_AFTER, read).await,
                false => Ok(read.await),
            };
            let (sorted, over) = match got {
                Err(_) => (sorter.flush(), false),
                Ok(Ok(0)) => (sorter.flush(), true),
                Ok(Ok(count)) => {
                    self.shared.hear(&buffer[..count]);
                    (sorter.push(&buffer[..count]), false)
                }
                Ok(Err(error)) => {
                    tracing::warn!(machine = %self.record.id, %error, "a unikernel's output broke off");
                    self.tell_cut().await;
                    (sorter.flush(), true)
                }
            };
            let Sorted {
                program,
                kernel: words,
            } = sorted;
            if !words.is_empty() {
                kernel.push(&words);
            }
            if !program.is_empty() {
                let offset = self.log.offsets().stdout;
                self.record_held(offset, program.into()).await;
                if let Some(zero) = first.take() {
                    self.first_output(zero, Instant::now()).await;
                }
            }
            if over {
                return;
            }
        }
    }

    pub(super) async fn record_held(&self, offset: u64, bytes: Bytes) {
        record_output(&self.log, &self.news, Stream::Stdout, offset, bytes).await;
    }

    pub(super) async fn first_output(&self, zero: Instant, begin: Instant) {
        let mut watch = Stopwatch::new(zero);
        watch.note("first output", begin);
        let _ = self.news.send(News::Steps(watch.into_steps())).await;
    }
}

/// What became of the program: from the monitor's word, the record on the disk, the kernel's last words, and whether it was
/// asked to end. Nothing where the monitor's word says it all.
pub(super) fn outcome(
    end: VmEnd,
    recorded: Option<i32>,
    words: &str,
    asked: bool,
) -> Option<Event> {
    let exited = |status| {
        Some(Event::ProgramExited {
            status,
            out_of_memory: false,
        })
    };
    let byte = |code: i32| u8::try_from(code & 0xff).unwrap_or(u8::MAX);
    match (recorded, end) {
        // The kernel gives no account of a program that the power button's signal has ended.
        (Some(code), _) if asked && code == i32::from(Signal::TERM.0) => {
            exited(ExitStatus::Signal(Signal::TERM.0))
        }
        (Some(code), _) => exited(match signal(words) {
            // The kernel tells a signal's number as the code.
            Some(number) if i32::from(number) == code => ExitStatus::Signal(number),
            _ => ExitStatus::Code(byte(code)),
        }),
        (None, VmEnd::GuestOff) => exited(ExitStatus::Code(0)),
        (None, VmEnd::GuestPanic { message }) => {
            let words = words.trim();
            let told = match words.is_empty() {
                true => message,
                false => format!("{message}: {words}"),
            };
            Some(Event::VmGone(VmGone::GuestPanic(told)))
        }
        (None, VmEnd::Killed | VmEnd::Crashed { .. }) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(end: VmEnd, recorded: Option<i32>, words: &str) -> Option<ExitStatus> {
        match outcome(end, recorded, words, false) {
            Some(Event::ProgramExited { status, .. }) => Some(status),
            _ => None,
        }
    }

    #[test]
    fn codes_come_from_the_record_and_0_from_its_absence() {
        for code in [1, 127, 128, 255] {
            assert_eq!(
                status(VmEnd::GuestOff, Some(code), ""),
                Some(ExitStatus::Code(u8::try_from(code).unwrap()))
            );
        }
        assert_eq!(status(VmEnd::GuestOff, None, ""), Some(ExitStatus::Code(0)));
        assert_eq!(
            status(VmEnd::GuestOff, Some(-1), ""),
            Some(ExitStatus::Code(255))
        );
    }

    #[test]
    fn a_signal_is_told_from_a_code_by_the_kernels_account() {
        let words = "*** signal 6 received by tid 2, errno 0, code -6\n";
        assert_eq!(
            status(VmEnd::GuestOff, Some(6), words),
            Some(ExitStatus::Signal(6))
        );
        assert_eq!(
            status(VmEnd::GuestOff, Some(6), ""),
            Some(ExitStatus::Code(6))
        );
        assert_eq!(
            status(VmEnd::GuestOff, Some(7), words),
            Some(ExitStatus::Code(7))
        );
    }

    #[test]
    fn a_program_that_was_asked_to_end_ends_by_that_signal_unless_it_says_otherwise() {
        let told = |code, asked| outcome(VmEnd::GuestOff, Some(code), "", asked);
        let exited = |status| {
            Some(Event::ProgramExited {
                status,
                out_of_memory: false,
            })
        };
        assert_eq!(told(15, true), exited(ExitStatus::Signal(15)));
        assert_eq!(told(15, false), exited(ExitStatus::Code(15)));
        assert_eq!(told(9, true), exited(ExitStatus::Code(9)));
    }

    #[test]
    fn a_kernel_that_failed_is_never_an_exit_with_0() {
        let failed = VmEnd::GuestPanic {
            message: "it failed".to_owned(),
        };
        let event = outcome(failed.clone(), None, "cpu 0, vector 14\n", false);
        let expected = VmGone::GuestPanic("it failed: cpu 0, vector 14".to_owned());
        assert_eq!(event, Some(Event::VmGone(expected)));
        // A program's own 126 has its record.
        assert_eq!(status(failed, Some(126), ""), Some(ExitStatus::Code(126)));
        let crashed = VmEnd::Crashed {
            message: "killed".to_owned(),
        };
        assert_eq!(outcome(crashed, None, "", false), None);
        assert_eq!(outcome(VmEnd::Killed, None, "", false), None);
    }
}
