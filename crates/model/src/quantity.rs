//! Quantities with their units, and the short forms in which users type them (`512m`, `2g`, `1.5`).

use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// Why a text is not the quantity it was taken for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum QuantityError {
    /// Not a size in bytes.
    #[error("{0:?} is not a size: write a number and b, k, m, g or t, such as 512m or 2g")]
    Bytes(String),
    /// Not a number of CPUs.
    #[error("{0:?} is not a number of CPUs: write a number above 0 such as 1, 2 or 0.5")]
    Cpus(String),
}

/// A size in bytes. Suffixes are powers of 1,024, as docker's are.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, Default,
)]
#[serde(transparent)]
pub struct Bytes(pub u64);

impl Bytes {
    /// This many mebibytes.
    pub const fn mib(count: u64) -> Bytes {
        Bytes(count << 20)
    }
    /// This many gibibytes.
    pub const fn gib(count: u64) -> Bytes {
        Bytes(count << 30)
    }
    /// Whole mebibytes, rounded up.
    pub const fn to_mib_ceil(self) -> u64 {
        self.0.div_ceil(1 << 20)
    }
}

impl fmt::Display for Bytes {
    /// Three significant digits and a binary unit: `1.50 GiB`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [&str; 6] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
        let mut value = self.0 as f64;
        let mut unit = 0;
        while value >= 1024.0 && unit + 1 < UNITS.len() {
            value /= 1024.0;
            unit += 1;
        }
        match value {
            _ if unit == 0 => write!(f, "{} B", self.0),
            v if v < 10.0 => write!(f, "{v:.2} {}", UNITS[unit]),
            v if v < 100.0 => write!(f, "{v:.1} {}", UNITS[unit]),
            v => write!(f, "{v:.0} {}", UNITS[unit]),
        }
    }
}

impl FromStr for Bytes {
    type Err = QuantityError;
    fn from_str(text: &str) -> Result<Self, QuantityError> {
        let error = || QuantityError::Bytes(text.to_owned());
        let lower = text.trim().to_ascii_lowercase();
        let digits = lower
            .find(|c: char| !(c.is_ascii_digit() || c == '.'))
            .unwrap_or(lower.len());
        let (number, suffix) = lower.split_at(digits);
        let shift = match suffix.trim() {
            "" | "b" => 0,
            "k" | "kb" | "kib" => 10,
            "m" | "mb" | "mib" => 20,
            "g" | "gb" | "gib" => 30,
            "t" | "tb" | "tib" => 40,
            _ => return Err(error()),
        };
        if let Ok(whole) = number.parse::<u64>() {
            return whole.checked_mul(1 << shift).map(Bytes).ok_or_else(error);
        }
        let value = number.parse::<f64>().map_err(|_| error())? * (1u64 << shift) as f64;
        // 2^63 is far above any machine and exactly representable, so the cast below never saturates.
        if value.is_finite() && (0.0..9.2e18).contains(&value) {
            Ok(Bytes(value as u64))
        } else {
            Err(error())
        }
    }
}

/// A share of CPU time in thousandths of one CPU, as `--cpus 1.5` gives it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Cpus {
    /// Thousandths of one CPU.
    pub millis: u32,
}

impl Cpus {
    /// One CPU.
    pub const ONE: Cpus = Cpus { millis: 1000 };

    /// How many virtual CPUs a machine with this share has: the share rounded up.
    pub const fn vcpus(self) -> u32 {
        self.millis.div_ceil(1000)
    }
}

impl fmt::Display for Cpus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", f64::from(self.millis) / 1000.0)
    }
}

impl FromStr for Cpus {
    type Err = QuantityError;
    fn from_str(text: &str) -> Result<Self, QuantityError> {
        let error = || QuantityError::Cpus(text.to_owned());
        let value: f64 = text.trim().parse().map_err(|_| error())?;
        let millis = (value * 1000.0).round();
        if (1.0..=1_024_000.0).contains(&millis) {
            Ok(Cpus {
                millis: millis as u32,
            })
        } else {
            Err(error())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn sizes_are_read_as_docker_reads_them() {
        for (text, bytes) in [
            ("512m", 512 << 20),
            ("2g", 2 << 30),
            ("1.5G", 3 << 29),
            ("10", 10),
            ("4kb", 4096),
        ] {
            assert_eq!(text.parse::<Bytes>(), Ok(Bytes(bytes)), "{text}");
        }
        for bad in ["", "m", "-1", "1x", "1e3", "99999999999t", "nan"] {
            assert!(bad.parse::<Bytes>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn half_a_cpu_is_one_vcpu_with_a_quota() {
        let half: Cpus = "0.5".parse().unwrap();
        assert_eq!((half.millis, half.vcpus()), (500, 1));
        assert!("0".parse::<Cpus>().is_err());
        assert!("inf".parse::<Cpus>().is_err());
    }

    proptest! {
        #[test]
        fn no_text_makes_the_size_reader_panic(text in ".{0,24}") {
            let _ = text.parse::<Bytes>();
            let _ = text.parse::<Cpus>();
        }
    }
}
