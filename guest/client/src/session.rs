//! The two tasks of a session, one for each direction, and what all handles share.

use crate::AgentError;
use crate::state::{GARBAGE_MAX, Reply, State};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::{Notify, oneshot, watch};
use tokio::task::AbortHandle;
use vistara_guest_protocol::{Decoder, ToGuest};

/// Size of one read.
const READ_LEN: usize = 64 * 1024;

/// How long what was said last may take to be written once nobody holds the session any more.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// What the tasks and the handles share.
pub(crate) struct Shared {
    state: Mutex<State>,
    /// There is something to write.
    pub(crate) to_write: Notify,
    /// Something was written.
    pub(crate) written: Notify,
    /// Whether the guest has said goodbye, and whether the session has failed.
    over: watch::Sender<(bool, bool)>,
}

/// A session; its tasks end with it.
pub(crate) struct Session {
    pub(crate) shared: Arc<Shared>,
    reader: AbortHandle,
}

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Session").finish_non_exhaustive()
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.reader.abort();
        self.shared.lock().closing = true;
        self.shared.to_write.notify_one();
    }
}

impl Shared {
    /// The state. A thread that panicked left it as whole as any: each change is one step.
    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends the session.
    fn fail(&self, error: AgentError) {
        self.lock().fail(error);
        self.over.send_replace((true, true));
        self.to_write.notify_one();
        self.written.notify_waiters();
    }

    /// Why the session is over, for those whom its end has woken.
    pub(crate) fn failure(&self) -> AgentError {
        self.lock().failure.clone().unwrap_or(AgentError::Closed)
    }

    /// Waits until data may be framed.
    pub(crate) async fn room(&self) -> Result<(), AgentError> {
        loop {
            let written = self.written.notified();
            tokio::pin!(written);
            written.as_mut().enable();
            {
                let state = self.lock();
                if let Some(failure) = &state.failure {
                    return Err(failure.clone());
                }
                if state.has_room() {
                    return Ok(());
                }
            }
            written.await;
        }
    }

    /// Waits until the guest has said goodbye, or the session has failed.
    pub(crate) async fn over(&self) {
        let mut over = self.over.subscribe();
        // The sender lives as long as this.
        let _ = over.wait_for(|(bye, _)| *bye).await;
    }

    /// Waits until the session has failed, and says why.
    pub(crate) async fn failed(&self) -> AgentError {
        let mut over = self.over.subscribe();
        let _ = over.wait_for(|(_, failed)| *failed).await;
        self.failure()
    }
}

impl Session {
    pub(crate) fn start(
        stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
        state: State,
    ) -> Self {
        let (reader, writer) = tokio::io::split(stream);
        let shared = Arc::new(Shared {
            state: Mutex::new(state),
            to_write: Notify::new(),
            written: Notify::new(),
            over: watch::Sender::new((false, false)),
        });
        let reading = Arc::clone(&shared);
        let reader = tokio::spawn(async move {
            let error = read(&reading, reader).await;
            reading.fail(error);
        });
        let writing = Arc::clone(&shared);
        tokio::spawn(async move {
            if let Err(error) = write(&writing, writer).await {
                writing.fail(AgentError::Io(error.to_string()));
            }
            // A failure that came with something said is told to everybody here.
            let failure = writing.lock().failure.clone();
            if let Some(failure) = failure {
                writing.fail(failure);
            }
        });
        Self {
            shared,
            reader: reader.abort_handle(),
        }
    }

    /// Asks the agent for something and waits for the answer.
    pub(crate) async fn ask(
        &self,
        message: impl FnOnce(u32) -> ToGuest,
    ) -> Result<Reply, AgentError> {
        let (sender, answer) = oneshot::channel();
        let number = {
            let mut state = self.shared.lock();
            let number = state.number();
            state.say(&message(number))?;
            state.requests.insert(number, sender);
            number
        };
        let asked = Asked {
            shared: &self.shared,
            number,
        };
        self.shared.to_write.notify_one();
        let answer = answer.await;
        drop(asked);
        match answer {
            Ok(answer) => answer.map_err(AgentError::Refused),
            Err(_) => Err(self.shared.failure()),
        }
    }
}

/// A request; one that nobody waits for any more is forgotten.
struct Asked<'a> {
    shared: &'a Shared,
    number: u32,
}

impl Drop for Asked<'_> {
    fn drop(&mut self) {
        self.shared.lock().requests.remove(&self.number);
    }
}

/// Reads until the session is over, and says why it is.
async fn read(shared: &Shared, mut reader: impl AsyncRead + Unpin) -> AgentError {
    let mut decoder = Decoder::distrustful();
    let mut buffer = vec![0; READ_LEN];
    loop {
        let count = match reader.read(&mut buffer).await {
            Ok(0) => return AgentError::Closed,
            Ok(count) => count,
            Err(error) => return AgentError::Io(error.to_string()),
        };
        decoder.push(&buffer[..count]);
        while let Some(frame) = decoder.next_frame() {
            let mut state = shared.lock();
            if let Some(failure) = &state.failure {
                return failure.clone();
            }
            if let Err(error) = state.frame(&frame) {
                return error;
            }
            if state.bye {
                drop(state);
                shared.over.send_modify(|over| over.0 = true);
                shared.to_write.notify_one();
            }
        }
        if decoder.skipped() > GARBAGE_MAX || decoder.has_given_up() {
            return AgentError::Broken("it sends what is no frame".to_owned());
        }
    }
}

/// Writes what is said, until the session is over.
async fn write(shared: &Shared, mut writer: impl AsyncWrite + Unpin) -> std::io::Result<()> {
    loop {
        let (out, closing) = {
            let mut state = shared.lock();
            (state.take_out(), state.closing || state.failure.is_some())
        };
        if !out.is_empty() {
            let written = async {
                writer.write_all(&out).await?;
                writer.flush().await
            };
            if closing {
                let _ = tokio::time::timeout(LAST_WORDS, written).await;
            } else {
                tokio::select! {
                    result = written => result?,
                    () = closes(shared) => {}
                }
            }
            shared.written.notify_waiters();
            continue;
        }
        if closing {
            // The other end may be gone already.
            let _ = writer.shutdown().await;
            return Ok(());
        }
        shared.to_write.notified().await;
    }
}

/// Waits until nobody holds the session, and then for as long as last words may take: a guest that does not read
/// must not keep the task alive.
async fn closes(shared: &Shared) {
    loop {
        tokio::time::sleep(LAST_WORDS).await;
        let state = shared.lock();
        if state.closing || state.failure.is_some() {
            return;
        }
    }
}
