//! Linux signals by name and number.

/// Names of the signals 1 to 31 on Linux, at their number less one. The same on x86-64 and arm64.
const NAMES: [&str; 31] = [
    "HUP", "INT", "QUIT", "ILL", "TRAP", "ABRT", "BUS", "FPE", "KILL", "USR1", "SEGV", "USR2",
    "PIPE", "ALRM", "TERM", "STKFLT", "CHLD", "CONT", "STOP", "TSTP", "TTIN", "TTOU", "URG",
    "XCPU", "XFSZ", "VTALRM", "PROF", "WINCH", "IO", "PWR", "SYS",
];

/// The largest signal number, a real-time one.
const NUMBER_MAX: u8 = 64;

/// A signal's number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(transparent)]
pub struct Signal(pub u8);

impl Signal {
    /// Asks a program to end.
    pub const TERM: Signal = Signal(15);
    /// Ends a program at once.
    pub const KILL: Signal = Signal(9);
    /// What Ctrl-C sends.
    pub const INT: Signal = Signal(2);
    /// What a closed terminal sends.
    pub const HUP: Signal = Signal(1);
}

/// A text that names no signal.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a signal: write a name such as TERM or SIGTERM, or a number from 1 to 64")]
pub struct SignalError(pub String);

impl std::str::FromStr for Signal {
    type Err = SignalError;
    fn from_str(text: &str) -> Result<Self, SignalError> {
        let upper = text.trim().to_ascii_uppercase();
        if let Ok(number) = upper.parse::<u8>() {
            return if (1..=NUMBER_MAX).contains(&number) {
                Ok(Signal(number))
            } else {
                Err(SignalError(text.to_owned()))
            };
        }
        let name = upper.strip_prefix("SIG").unwrap_or(&upper);
        (1u8..)
            .zip(NAMES)
            .find(|(_, known)| *known == name)
            .map(|(number, _)| Signal(number))
            .ok_or_else(|| SignalError(text.to_owned()))
    }
}

impl std::fmt::Display for Signal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match NAMES.get(usize::from(self.0).wrapping_sub(1)) {
            Some(name) => write!(f, "SIG{name}"),
            None => write!(f, "{}", self.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_numbers_mean_the_same_signal() {
        for text in ["15", "TERM", "SIGTERM", "sigterm"] {
            assert_eq!(text.parse::<Signal>(), Ok(Signal::TERM), "{text}");
        }
        assert_eq!("SYS".parse::<Signal>(), Ok(Signal(31)));
        for bad in ["0", "65", "SIG", "FOO", "-1", ""] {
            assert!(bad.parse::<Signal>().is_err(), "{bad:?}");
        }
        assert_eq!(Signal(34).to_string(), "34");
    }
}
