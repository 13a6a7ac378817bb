//! Standard input on its way to the program: a thread that reads, and a task that sends.
//!
//! The thread cannot be woken from a read of a terminal; it is left behind at the end and goes with the process.

use crate::session::writer::wait_for;
use bytes::Bytes;
use rustix::event::PollFlags;
use rustix::io::Errno;
use std::os::fd::AsFd;
use tokio::sync::mpsc;
use vistara_api::client::StreamsInput;
use vistara_api::stream::ClientSignal;

/// Pieces that may wait: what a program does not read stays with us, then in the pipe.
const PIECES_MAX: usize = 4;
/// Bytes of one read; the interface takes up to 64 KiB in a message.
const READ_BYTES: usize = 64 << 10;
/// Signals and sizes that may wait behind a program that does not read: a person cannot type more.
pub(crate) const CONTROLS_MAX: usize = 16;

/// Starts the reading thread. The channel closes at the end of input (a failed read is one).
pub(crate) fn read_stdin() -> std::io::Result<mpsc::Receiver<Bytes>> {
    let (sender, receiver) = mpsc::channel(PIECES_MAX);
    std::thread::Builder::new()
        .name("input".to_owned())
        .spawn(move || {
            let stdin = std::io::stdin();
            let mut buffer = vec![0u8; READ_BYTES];
            loop {
                match rustix::io::read(stdin.as_fd(), &mut buffer[..]) {
                    Ok(0) => return,
                    Ok(count) => {
                        let data = Bytes::copy_from_slice(buffer.get(..count).unwrap_or_default());
                        if sender.blocking_send(data).is_err() {
                            return;
                        }
                    }
                    Err(Errno::INTR) => {}
                    Err(Errno::AGAIN) => wait_for(stdin.as_fd(), PollFlags::IN),
                    Err(_) => return,
                }
            }
        })?;
    Ok(receiver)
}

/// Sends input and signals until both channels are closed or the stream is gone. Signals go first.
pub(crate) async fn send(
    mut stream: StreamsInput,
    mut input: mpsc::Receiver<Bytes>,
    mut controls: mpsc::Receiver<ClientSignal>,
) {
    let mut input_open = true;
    loop {
        let sent = tokio::select! {
            biased;
            control = controls.recv() => match control {
                Some(control) => stream.signal(&control).await,
                None => return,
            },
            data = input.recv(), if input_open => match data {
                Some(data) => stream.write(data).await,
                None => {
                    input_open = false;
                    stream.signal(&ClientSignal::CloseStdin).await
                }
            },
        };
        if sent.is_err() {
            // The reading side of the stream says why.
            return;
        }
    }
}
