//! Bodies of Firecracker's requests and answers, as its OpenAPI document has them (checked against 1.16.1; what was added
//! after 1.7 says since when). What is optional there and not set here is left out, so that older versions hear nothing new.

use serde::{Deserialize, Serialize};

/// `PUT /machine-config`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct MachineConfig {
    pub(super) vcpu_count: u32,
    pub(super) mem_size_mib: u64,
    pub(super) smt: bool,
    pub(super) track_dirty_pages: bool,
    /// `2M` for huge pages.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) huge_pages: Option<&'static str>,
}

/// `PUT /boot-source`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct BootSource {
    pub(super) kernel_image_path: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) initrd_path: Option<String>,
    pub(super) boot_args: String,
}

/// So many tokens (bytes or operations) in so many milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub(super) struct TokenBucket {
    pub(super) size: u64,
    pub(super) refill_time: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) one_time_burst: Option<u64>,
}

/// Bounds of a device's traffic.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub(super) struct RateLimiter {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) bandwidth: Option<TokenBucket>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) ops: Option<TokenBucket>,
}

/// `PUT /drives/{id}`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Drive {
    pub(super) drive_id: String,
    pub(super) path_on_host: String,
    pub(super) is_root_device: bool,
    pub(super) is_read_only: bool,
    /// `Unsafe` ignores the guest's flushes, `Writeback` obeys them.
    pub(super) cache_type: &'static str,
    /// `Sync` or `Async` (io_uring).
    pub(super) io_engine: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) rate_limiter: Option<RateLimiter>,
}

/// `PUT /network-interfaces/{id}`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct NetworkInterface {
    pub(super) iface_id: String,
    /// The tap's name in the monitor's network namespace.
    pub(super) host_dev_name: String,
    pub(super) guest_mac: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) rx_rate_limiter: Option<RateLimiter>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) tx_rate_limiter: Option<RateLimiter>,
}

/// `PUT /vsock`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Vsock {
    pub(super) guest_cid: u32,
    pub(super) uds_path: String,
}

/// `PUT /balloon`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Balloon {
    pub(super) amount_mib: u64,
    pub(super) deflate_on_oom: bool,
    pub(super) stats_polling_interval_s: u32,
}

/// What `GET /balloon/statistics` answers, as far as it is used. What the guest has not told is left out.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(super) struct BalloonStatistics {
    pub(super) target_mib: u64,
    pub(super) actual_mib: u64,
    pub(super) free_memory: Option<u64>,
    pub(super) available_memory: Option<u64>,
    pub(super) disk_caches: Option<u64>,
    pub(super) major_faults: Option<u64>,
}

/// `PUT /entropy`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Entropy {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) rate_limiter: Option<RateLimiter>,
}

/// `PUT /serial` (since 1.14; the limiter since 1.16).
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Serial {
    pub(super) rate_limiter: TokenBucket,
}

/// `PUT /actions`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Action {
    pub(super) action_type: &'static str,
}

/// `PATCH /vm`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct VmState {
    pub(super) state: &'static str,
}

/// `PUT /snapshot/create`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct SnapshotCreate {
    pub(super) snapshot_type: &'static str,
    pub(super) snapshot_path: String,
    pub(super) mem_file_path: String,
}

/// Where a restored guest's memory comes from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct MemoryBackend {
    pub(super) backend_type: &'static str,
    pub(super) backend_path: String,
}

/// `PUT /snapshot/load`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct SnapshotLoad {
    pub(super) snapshot_path: String,
    pub(super) mem_backend: MemoryBackend,
    pub(super) resume_vm: bool,
}

/// What every refusal carries.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(super) struct Fault {
    pub(super) fault_message: String,
}
