//! The templates that are there: in memory, on disk, and being made.

use super::budget::{Held, Limits, beyond};
use super::make::{self, Blueprint};
use crate::fault::chain;
use crate::machine::now_ns;
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use vistara_machine::{Capture, CaptureError, Vmm};
use vistara_model::{Digest, MachineId};

/// Version of `template.json`.
const FORMAT: u32 = 1;
const ABOUT: &str = "template.json";
const MAKING: &str = "making.json";
const OVERLAY: &str = "overlay.img";
/// How long a template that could not be made is not tried again: machines boot meanwhile.
const RETRY_AFTER: Duration = Duration::from_secs(600);

/// What `template.json` says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Kept {
    format: u32,
    pub(crate) key: String,
    pub(crate) image_id: Digest,
    pub(crate) image: String,
    pub(crate) kernel: String,
    pub(crate) vmm: String,
    pub(crate) vcpus: u32,
    pub(crate) memory_bytes: u64,
    pub(crate) disk_bytes: u64,
    pub(crate) network: bool,
    pub(crate) created_ns: u64,
    /// How long its first machine took to boot and to be captured.
    pub(crate) making_us: u64,
}

/// A template in use.
#[derive(Debug)]
pub(crate) struct Template {
    pub(crate) key: String,
    pub(crate) capture: Arc<Capture>,
    pub(crate) overlay: PathBuf,
}

#[derive(Default)]
struct Slot {
    template: Option<Arc<Template>>,
    failed: Option<Instant>,
}

#[derive(Default)]
struct Known {
    /// Locked while the template is read or made: others who want it wait for it.
    slots: HashMap<String, Arc<tokio::sync::Mutex<Slot>>>,
    used_ns: HashMap<String, u64>,
}

/// All templates of a node.
pub(crate) struct Templates {
    dir: PathBuf,
    limits: Limits,
    known: Mutex<Known>,
}

#[derive(Serialize, Deserialize)]
struct Making {
    id: MachineId,
}

/// Notes which machine is captured in `dir`.
pub(super) fn note_making(dir: &Path, id: &MachineId) -> io::Result<()> {
    let bytes = serde_json::to_vec(&Making { id: id.clone() }).map_err(io::Error::other)?;
    std::fs::write(dir.join(MAKING), bytes)
}

pub(super) fn overlay_in(dir: &Path) -> PathBuf {
    dir.join(OVERLAY)
}

fn read_kept(dir: &Path) -> Option<Kept> {
    let bytes = std::fs::read(dir.join(ABOUT)).ok()?;
    let kept: Kept = serde_json::from_slice(&bytes).ok()?;
    (kept.format == FORMAT).then_some(kept)
}

/// Bytes that a directory's files really take.
fn size_on_disk(dir: &Path) -> u64 {
    let Ok(entries) = std::fs::read_dir(dir) else {
        return 0;
    };
    let sizes = entries
        .flatten()
        .filter_map(|entry| entry.metadata().ok().map(|data| data.blocks() * 512));
    sizes.sum()
}

impl Templates {
    /// The templates in `dir`, none of them known yet.
    pub(crate) fn new(dir: PathBuf) -> Templates {
        Templates {
            dir,
            limits: Limits::of_this_host(),
            known: Mutex::default(),
        }
    }

    /// Looks at what an earlier node left: notes what is whole, and sweeps away what is half made.
    pub(crate) async fn take_stock(&self, vmms: &[Arc<dyn Vmm>]) {
        for (key, dir) in self.directories() {
            if let Some(kept) = read_kept(&dir) {
                let used = std::fs::metadata(dir.join(ABOUT))
                    .and_then(|data| data.modified())
                    .ok()
                    .and_then(|time| time.duration_since(std::time::UNIX_EPOCH).ok())
                    .and_then(|since| u64::try_from(since.as_nanos()).ok());
                let used = used.unwrap_or(kept.created_ns);
                self.known().used_ns.insert(key, used);
                continue;
            }
            let making = std::fs::read(dir.join(MAKING)).ok();
            let making = making.and_then(|bytes| serde_json::from_slice::<Making>(&bytes).ok());
            if let Some(Making { id }) = making {
                for vmm in vmms {
                    if let Err(error) = vmm.sweep(&id, &dir).await {
                        tracing::error!(
                            template = key,
                            error = chain(&error),
                            "a machine that was to be captured could not be ended"
                        );
                    }
                }
            }
            tracing::info!(
                template = key,
                "a template that was not finished is removed"
            );
            remove_dir(&dir);
        }
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn directories(&self) -> Vec<(String, PathBuf)> {
        let Ok(entries) = std::fs::read_dir(&self.dir) else {
            return Vec::new();
        };
        let named = entries.flatten().filter_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            Some((name, entry.path()))
        });
        named.collect()
    }

    /// The templates on disk, newest first. Blocks on files.
    pub(crate) fn list(&self) -> Vec<(Kept, u64, Option<u64>)> {
        let mut all: Vec<_> = self
            .directories()
            .into_iter()
            .filter_map(|(key, dir)| {
                let kept = read_kept(&dir)?;
                let used = self.known().used_ns.get(&key).copied();
                Some((kept, size_on_disk(&dir), used))
            })
            .collect();
        all.sort_by_key(|(kept, ..)| std::cmp::Reverse(kept.created_ns));
        all
    }

    fn slot(&self, key: &str) -> Arc<tokio::sync::Mutex<Slot>> {
        let mut known = self.known();
        Arc::clone(known.slots.entry(key.to_owned()).or_default())
    }

    /// The template of this blueprint: the one in memory, the one on disk, or a new one, for which whoever asks first waits
    /// as long as a boot takes. `None` where it cannot be had now; why is logged, and the machine should boot.
    pub(crate) async fn get_or_make(
        self: &Arc<Self>,
        blueprint: Blueprint,
    ) -> Option<Arc<Template>> {
        let templates = Arc::clone(self);
        // In a task of its own: a request that is taken back must not leave half a template.
        let task = tokio::spawn(async move { templates.find_or_make(blueprint).await });
        task.await.unwrap_or_else(|error| {
            tracing::error!(%error, "making a template failed");
            None
        })
    }

    async fn find_or_make(self: Arc<Self>, blueprint: Blueprint) -> Option<Arc<Template>> {
        let key = blueprint.key();
        let slot = self.slot(&key);
        let mut slot = slot.lock().await;
        if slot.failed.is_some_and(|at| at.elapsed() < RETRY_AFTER) {
            return None;
        }
        self.known().used_ns.insert(key.clone(), now_ns());
        if let Some(template) = &slot.template {
            return Some(Arc::clone(template));
        }
        let dir = self.dir.join(&key);
        let found = {
            let dir = dir.clone();
            tokio::task::spawn_blocking(move || read(&dir)).await.ok()?
        };
        let template = match found {
            Some(capture) => Arc::new(Template {
                overlay: overlay_in(&dir),
                capture: Arc::new(capture),
                key: key.clone(),
            }),
            None => match self.make(&blueprint, &key, &dir).await {
                Ok(template) => template,
                Err(message) => {
                    tracing::warn!(
                        template = key,
                        message,
                        "a template could not be made; machines boot without it"
                    );
                    slot.failed = Some(Instant::now());
                    remove_dir(&dir);
                    return None;
                }
            },
        };
        slot.template = Some(Arc::clone(&template));
        Some(template)
    }

    async fn make(
        self: &Arc<Self>,
        blueprint: &Blueprint,
        key: &str,
        dir: &Path,
    ) -> Result<Arc<Template>, String> {
        let begin = Instant::now();
        std::fs::DirBuilder::new()
            .mode(0o700)
            .recursive(true)
            .create(dir)
            .map_err(|error| error.to_string())?;
        let capture = make::capture(blueprint, dir).await?;
        let making_us = u64::try_from(begin.elapsed().as_micros()).unwrap_or(u64::MAX);
        let template = Arc::new(Template {
            key: key.to_owned(),
            capture: Arc::new(capture),
            overlay: overlay_in(dir),
        });
        let kept = Kept {
            format: FORMAT,
            key: key.to_owned(),
            image_id: blueprint.image_id.clone(),
            image: blueprint.image.clone(),
            kernel: blueprint.kernel.clone(),
            vmm: format!(
                "{} {}",
                template.capture.info().kind,
                template.capture.info().version
            ),
            vcpus: blueprint.plan.vcpus,
            memory_bytes: blueprint.plan.memory.0,
            disk_bytes: blueprint.disk.0,
            network: blueprint.plan.nic.is_some(),
            created_ns: now_ns(),
            making_us,
        };
        tracing::info!(template = key, image = kept.image, took = ?begin.elapsed(), "a template was made");
        let (templates, written, dir) = (Arc::clone(self), Arc::clone(&template), dir.to_owned());
        tokio::task::spawn_blocking(move || {
            if let Err(error) = write(&written, &kept, &dir) {
                // It serves from memory as long as this node lives.
                tracing::warn!(
                    template = kept.key,
                    error = chain(&error),
                    "a template could not be kept on disk"
                );
            }
            templates.keep_to_limits(Some(&kept.key));
        });
        Ok(template)
    }

    /// Forgets a template that does not work, or is not wanted any more. Running forks are not touched. Blocks on files.
    pub(crate) fn remove(&self, key: &str) -> bool {
        let mut known = self.known();
        let in_memory = known.slots.remove(key).is_some();
        known.used_ns.remove(key);
        drop(known);
        let dir = self.dir.join(key);
        let on_disk = dir.is_dir();
        if on_disk {
            remove_dir(&dir);
        }
        in_memory || on_disk
    }

    /// Forgets the templates of an image. Blocks on files.
    pub(crate) fn remove_of_image(&self, image: &Digest) {
        for (kept, ..) in self.list() {
            if kept.image_id == *image {
                self.remove(&kept.key);
            }
        }
    }

    /// Removes what was used longest ago beyond the limits; `fresh` stays, whatever it takes.
    fn keep_to_limits(&self, fresh: Option<&str>) {
        let used: HashMap<String, u64> = self.known().used_ns.clone();
        let on_disk: Vec<Held> = self
            .directories()
            .into_iter()
            .filter(|(_, dir)| read_kept(dir).is_some())
            .map(|(key, dir)| Held {
                used_ns: used.get(&key).copied().unwrap_or(0),
                bytes: size_on_disk(&dir),
                key,
            })
            .collect();
        for key in beyond(on_disk, self.limits.disk_bytes, fresh) {
            tracing::info!(
                template = key,
                "a template is removed to save room on the disk"
            );
            self.remove(&key);
        }
        let slots: Vec<_> = {
            let known = self.known();
            let slots = known.slots.iter();
            slots
                .map(|(key, slot)| (key.clone(), Arc::clone(slot)))
                .collect()
        };
        let mut in_memory = Vec::new();
        for (key, slot) in &slots {
            // One that is being made has no size yet.
            if let Ok(slot) = slot.try_lock()
                && let Some(template) = &slot.template
            {
                in_memory.push(Held {
                    used_ns: used.get(key).copied().unwrap_or(0),
                    bytes: template.capture.resident_bytes(),
                    key: key.clone(),
                });
            }
        }
        for key in beyond(in_memory, self.limits.memory_bytes, fresh) {
            tracing::info!(template = key, "a template is dropped from memory");
            if let Some((_, slot)) = slots.iter().find(|(name, _)| *name == key)
                && let Ok(mut slot) = slot.try_lock()
            {
                slot.template = None;
            }
        }
    }
}

fn write(template: &Template, kept: &Kept, dir: &Path) -> Result<(), CaptureError> {
    template.capture.write(dir)?;
    let io = |source: io::Error| CaptureError::Io {
        operation: "write",
        path: dir.join(ABOUT),
        source,
    };
    // Only the capture's own machine needed it, which is gone.
    let _ = std::fs::remove_file(dir.join(MAKING));
    let fresh = dir.join("template.json.new");
    let bytes = serde_json::to_vec_pretty(kept).map_err(|error| io(error.into()))?;
    std::fs::write(&fresh, bytes).map_err(io)?;
    std::fs::rename(&fresh, dir.join(ABOUT)).map_err(io)
}

/// The capture in `dir`, checked whole; a damaged one is removed. `None` where there is none to use.
fn read(dir: &Path) -> Option<Capture> {
    read_kept(dir)?;
    match Capture::read(dir) {
        Ok(capture) => {
            // Its time of use, for the next node. That it cannot be noted makes it look old.
            if let Ok(file) = std::fs::File::options().write(true).open(dir.join(ABOUT)) {
                let _ = file.set_modified(std::time::SystemTime::now());
            }
            Some(capture)
        }
        Err(error) => {
            tracing::warn!(path = %dir.display(), error = chain(&error), "a template cannot be used and is removed");
            remove_dir(dir);
            None
        }
    }
}

fn remove_dir(dir: &Path) {
    match std::fs::remove_dir_all(dir) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::warn!(path = %dir.display(), %error, "a template's directory could not be removed");
        }
        _ => {}
    }
}
