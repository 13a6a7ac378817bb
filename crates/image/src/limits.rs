//! How much an image may ask for. Every bound has a name here and the reason for its number.

use vistara_model::Bytes;

/// Bounds on what a registry, an archive or a layer may make this host do.
///
/// The defaults admit every image that is known to be in real use; tests lower them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of all layers of one image, uncompressed. The largest public images (machine learning) are below 40 GiB.
    pub image_bytes_max: Bytes,
    /// Files and directories of one image, all layers counted, directories that are only implied included. The index takes
    /// about 200 bytes for each, so that this bounds memory to some hundreds of MiB.
    pub entries_max: u64,
    /// Layers of one image. Docker's own bound is 127.
    pub layers_max: usize,
    /// Bytes of one path or link target: the kernel's PATH_MAX.
    pub path_bytes_max: usize,
    /// Components of one path. Deep `node_modules` trees stay below 60.
    pub path_depth_max: usize,
    /// Bytes of one extended attribute's value: the kernel's XATTR_SIZE_MAX.
    pub xattr_bytes_max: usize,
    /// Bytes of all extended attributes of one image; they are held in memory.
    pub xattrs_bytes_max: Bytes,
    /// Bytes that the names, link targets and extended attributes of all entries of one image take in memory, whatever
    /// becomes of them. An image at [`Limits::entries_max`] with paths of 80 bytes, more than real ones have on average,
    /// needs 160 MB; without this bound a hundred compressed megabytes ask for more memory than a host has.
    pub names_bytes_max: Bytes,
    /// Bytes of one tar extended header (PAX or GNU long name); it is held in memory. Must hold the largest attribute.
    pub tar_header_bytes_max: usize,
    /// Device nodes of one image. A device node is never data, and base images carry at most some twenty.
    pub devices_max: u64,
    /// Bytes of a manifest, an index or a config; they are held in memory. Registries themselves refuse above 4 MiB.
    pub manifest_bytes_max: Bytes,
    /// Indexes that may be nested before a manifest is reached.
    pub index_depth_max: usize,
    /// How many times larger than its compressed form a layer may be, beyond [`Limits::bomb_floor_bytes`]. Gzip can reach
    /// 1,032 and zstd far more on zeros; real layers stay below 50.
    pub bomb_ratio_max: u64,
    /// Below this size no layer counts as a bomb, whatever its ratio.
    pub bomb_floor_bytes: Bytes,
    /// Layers that are fetched at once: enough to fill a line, few enough not to be throttled.
    pub parallel_downloads: usize,
    /// Times that a broken download is taken up again before the pull fails.
    pub download_attempts: u32,
    /// Processors that the packing of a root disk may use; 0 means all.
    pub disk_processors: u32,
    /// Memory that the packing of a root disk may use for its queues.
    pub disk_memory: Bytes,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            image_bytes_max: Bytes::gib(64),
            entries_max: 2_000_000,
            layers_max: 256,
            path_bytes_max: 4096,
            path_depth_max: 256,
            xattr_bytes_max: 65_536,
            xattrs_bytes_max: Bytes::mib(64),
            names_bytes_max: Bytes::mib(256),
            tar_header_bytes_max: 1 << 20,
            devices_max: 4096,
            manifest_bytes_max: Bytes::mib(4),
            index_depth_max: 3,
            bomb_ratio_max: 200,
            bomb_floor_bytes: Bytes::mib(256),
            parallel_downloads: 3,
            download_attempts: 5,
            disk_processors: 0,
            disk_memory: Bytes::mib(256),
        }
    }
}
