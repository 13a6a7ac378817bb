//! What can go wrong when a file system is written or read.

use std::io;

/// Why a file system could not be written. After [`WriteError::Io`] the output is useless; every other error refuses one
/// entry and leaves the rest as it was.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// The output failed.
    #[error("the disk cannot be written")]
    Io(#[source] io::Error),
    /// The content's source failed.
    #[error("the content of {name:?} cannot be read")]
    Source {
        /// The file's name.
        name: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The content ended before the length that was announced.
    #[error("the content of {name:?} ends after {found} of {wanted} bytes")]
    ShortContent {
        /// The file's name.
        name: String,
        /// Bytes announced.
        wanted: u64,
        /// Bytes that came.
        found: u64,
    },
    /// The name cannot stand in a directory.
    #[error("{name:?} is no name for a file: {reason}")]
    Name {
        /// The name.
        name: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// The directory has an entry of this name already.
    #[error("there are two entries named {name:?} in one directory")]
    Duplicate {
        /// The name.
        name: String,
    },
    /// More directories below one another than [`super::DEPTH_MAX`].
    #[error("{name:?} lies deeper than {} directories", super::DEPTH_MAX)]
    TooDeep {
        /// The name.
        name: String,
    },
    /// A symbolic link's target is empty, has a NUL, or is longer than [`super::TARGET_BYTES_MAX`].
    #[error("the target of the symbolic link {name:?} is empty, too long or has a NUL")]
    Target {
        /// The link's name.
        name: String,
    },
    /// The file system would need more sectors than can be counted.
    #[error("the file system is too large")]
    TooLarge,
}

/// Why a file system could not be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The input failed.
    #[error("the disk cannot be read")]
    Io(#[source] io::Error),
    /// There is no TFS here.
    #[error("there is no TFS file system here")]
    NotTfs,
    /// A TFS of another version.
    #[error("this is TFS version {0}, and version 5 alone is known")]
    Version(u64),
    /// Something lies outside the disk.
    #[error("{what} lies outside the file system")]
    Outside {
        /// What does.
        what: &'static str,
    },
    /// The log contradicts itself.
    #[error("the log is damaged in the piece at sector {sector}, near byte {offset}")]
    Damaged {
        /// The piece's first sector.
        sector: u64,
        /// Bytes from the piece's start.
        offset: u64,
        /// What is wrong there.
        #[source]
        damage: Damage,
    },
    /// The tree is not one.
    #[error("the tree is damaged: {0}")]
    Tree(&'static str),
    /// More than the reader was allowed to take.
    #[error("the file system has more {0} than the reader may take")]
    Limit(&'static str),
}

/// What is wrong with one place in a log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Damage {
    /// It ends in the middle.
    #[error("it ends in the middle of a record")]
    CutShort,
    /// A number of more than 64 bits.
    #[error("a number has more than 64 bits")]
    Number,
    /// An unknown kind of value.
    #[error("there is no kind of value {0}")]
    Kind(u8),
    /// An unknown kind of frame.
    #[error("there is no kind of frame {0}")]
    Frame(u8),
    /// A reference to what is not in the dictionary, or is something else there.
    #[error("it refers to entry {0}, which is not there or of another kind")]
    Reference(u64),
    /// A value of a kind that cannot stand there.
    #[error("a value of another kind was expected")]
    Unexpected,
    /// A record's parts do not add up to its length.
    #[error("a record's length and its parts disagree")]
    Length,
    /// A piece that does not begin as one does.
    #[error("it does not begin as a piece of a log does")]
    PieceHeader,
    /// A piece of a length that no log has.
    #[error("a piece of {0} sectors is none")]
    PieceLength(u64),
    /// A piece that was read before.
    #[error("the log leads back to a piece that was read before")]
    Loop,
    /// The label does not end.
    #[error("the label does not end")]
    Label,
    /// More than the reader may take.
    #[error("it has more {0} than the reader may take")]
    Limit(&'static str),
}
