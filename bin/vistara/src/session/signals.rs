//! Signals to us, and what each is answered with.

use tokio::signal::unix::{Signal, SignalKind, signal};

/// The signals of a session.
#[derive(Debug)]
pub(crate) struct Signals {
    ending: Vec<(&'static str, u8, Signal)>,
    passing: Vec<(&'static str, Signal)>,
    resize: Signal,
}

/// A signal that came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Came {
    /// One that asks us to end: its name and number.
    End(&'static str, u8),
    /// One that means something to the program alone.
    Pass(&'static str),
    /// The terminal has a new size.
    Resize,
}

impl Signals {
    /// From here on these signals come here instead of ending us.
    pub(crate) fn install() -> std::io::Result<Signals> {
        Ok(Signals {
            ending: vec![
                ("INT", 2, signal(SignalKind::interrupt())?),
                ("TERM", 15, signal(SignalKind::terminate())?),
                ("HUP", 1, signal(SignalKind::hangup())?),
                ("QUIT", 3, signal(SignalKind::quit())?),
            ],
            passing: vec![
                ("USR1", signal(SignalKind::user_defined1())?),
                ("USR2", signal(SignalKind::user_defined2())?),
            ],
            resize: signal(SignalKind::window_change())?,
        })
    }

    /// The next signal. May be cancelled.
    pub(crate) async fn next(&mut self) -> Came {
        std::future::poll_fn(|context| {
            for (name, number, signal) in &mut self.ending {
                if signal.poll_recv(context).is_ready() {
                    return std::task::Poll::Ready(Came::End(name, *number));
                }
            }
            for (name, signal) in &mut self.passing {
                if signal.poll_recv(context).is_ready() {
                    return std::task::Poll::Ready(Came::Pass(name));
                }
            }
            self.resize.poll_recv(context).map(|_| Came::Resize)
        })
        .await
    }

    /// The next one that asks us to end: its name and number.
    pub(crate) async fn end(&mut self) -> (&'static str, u8) {
        loop {
            if let Came::End(name, number) = self.next().await {
                return (name, number);
            }
        }
    }
}

/// What a signal that asks us to end is answered with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Answer {
    /// The program gets the same signal.
    Forward,
    /// The machine is stopped: its program is asked to end, with little time.
    Stop,
    /// The machine is killed.
    Kill,
    /// We leave at once.
    Leave,
}

/// The answer to the `count`th signal (from 1). Where the program does not run yet there is nobody to forward it to.
pub(crate) fn answer(count: u32, started: bool) -> Answer {
    match (count, started) {
        (0 | 1, true) => Answer::Forward,
        (0 | 1, false) | (2, _) => Answer::Stop,
        (3, _) => Answer::Kill,
        (_, _) => Answer::Leave,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_ctrl_c_insists_more_than_the_last() {
        let of = |started| [1, 2, 3, 4].map(|count| answer(count, started));
        assert_eq!(
            of(true),
            [Answer::Forward, Answer::Stop, Answer::Kill, Answer::Leave]
        );
        assert_eq!(
            of(false),
            [Answer::Stop, Answer::Stop, Answer::Kill, Answer::Leave]
        );
    }
}
