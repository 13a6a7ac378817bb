//! The templates that are there: in memory, on disk, and being made.

use super::blueprint::Blueprint;
use super::files::{self, Kept};
use super::make;
use crate::fault::chain;
use crate::machine::now_ns;
use crate::options::TemplateLimits;
use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use vistara_control::{Held, evict, unused_since};
use vistara_image::ImageStore;
use vistara_machine::{Capture, Vmm, VmmError};
use vistara_model::Digest;

/// How long a template that could not be made, or whose forks fail, is not tried again: machines boot meanwhile.
const RETRY_AFTER: Duration = Duration::from_secs(600);
/// A template that was not used for so long is removed by the next node that starts: its image is hardly run any more.
const UNUSED_MAX: Duration = Duration::from_secs(14 * 24 * 3600);

/// Most keys for which something is remembered that is no template in memory, failures above all: more than a user has
/// images and sizes, and some 100 KB. Beyond it they are forgotten, which costs another try each.
const SLOTS_MAX: usize = 1024;

/// A template in use.
#[derive(Debug)]
pub(crate) struct Template {
    pub(crate) kept: Kept,
    pub(crate) capture: Arc<Capture>,
    /// The writable disk as it was at the capture: this file, whatever becomes of its name.
    pub(crate) overlay: File,
    /// Held while its directory is written.
    writing: Arc<tokio::sync::Mutex<()>>,
    /// Whether it was removed: nothing that was forked from it before is to be given to anybody from then on.
    retired: AtomicBool,
}

impl Template {
    pub(crate) fn key(&self) -> &str {
        &self.kept.key
    }

    pub(crate) fn is_retired(&self) -> bool {
        self.retired.load(Ordering::Acquire)
    }

    fn image_id(&self) -> &Digest {
        &self.kept.image_id
    }
}

#[derive(Default)]
struct Slot {
    template: Option<Arc<Template>>,
    failed: Option<(Instant, String)>,
}

type SharedSlot = Arc<tokio::sync::Mutex<Slot>>;

#[derive(Default)]
struct Known {
    /// Locked while the template is read, made or removed: others who want it wait for it. Besides those that are at work or
    /// hold a template in memory, which the limits bound, at most [`SLOTS_MAX`].
    slots: HashMap<String, SharedSlot>,
    /// Of templates that are there.
    used_ns: HashMap<String, u64>,
}

impl Known {
    fn slot(&mut self, key: &str) -> SharedSlot {
        if let Some(slot) = self.slots.get(key) {
            return Arc::clone(slot);
        }
        if self.slots.len() >= SLOTS_MAX {
            // One that somebody else has is at work.
            self.slots.retain(|_, slot| {
                Arc::get_mut(slot).is_none_or(|slot| slot.get_mut().template.is_some())
            });
        }
        Arc::clone(self.slots.entry(key.to_owned()).or_default())
    }
}

/// A template is being read, made or removed.
#[derive(Debug)]
pub(crate) struct AtWork;

/// A template as it is listed.
#[derive(Debug, Clone)]
pub(crate) struct Listed {
    pub(crate) kept: Kept,
    /// What its directory takes.
    pub(crate) disk_bytes: u64,
    /// What it takes of the host's memory.
    pub(crate) resident_bytes: u64,
    pub(crate) used_ns: u64,
}

/// All templates of a node.
pub(crate) struct Templates {
    dir: PathBuf,
    limits: TemplateLimits,
    known: Mutex<Known>,
}

impl Templates {
    /// The templates in `dir`, none of them known yet.
    pub(crate) fn new(dir: PathBuf, limits: TemplateLimits) -> Templates {
        Templates {
            dir,
            limits,
            known: Mutex::default(),
        }
    }

    /// Looks at what an earlier node left: notes what is whole, and sweeps away what is half made, what nobody has used for
    /// long, and what belongs to an image that is gone.
    pub(crate) async fn survey(
        &self,
        vmms: &[Arc<dyn Vmm>],
        image_is_there: impl Fn(&Digest) -> bool,
    ) {
        let mut held = Vec::new();
        for (key, dir) in files::directories(&self.dir) {
            if let Some(kept) = files::read_about(&dir) {
                if image_is_there(&kept.image_id) {
                    let used_ns = files::used_ns(&dir).unwrap_or(kept.created_ns);
                    self.known().used_ns.insert(key.clone(), used_ns);
                    held.push(Held {
                        key,
                        bytes: 0,
                        used_ns,
                    });
                } else {
                    tracing::info!(template = key, "a template whose image is gone is removed");
                    files::remove(&dir);
                }
                continue;
            }
            if let Err(message) = make::end_earlier(vmms, &dir).await {
                tracing::error!(
                    template = key,
                    message,
                    "a machine that was to be captured could not be ended; it is tried again later"
                );
                continue;
            }
            tracing::info!(
                template = key,
                "a template that was not finished is removed"
            );
            files::remove(&dir);
        }
        let longest = u64::try_from(UNUSED_MAX.as_nanos()).unwrap_or(u64::MAX);
        for key in unused_since(&held, now_ns().saturating_sub(longest)) {
            tracing::info!(
                template = key,
                "a template that was not used for long is removed"
            );
            self.remove(&key).await;
        }
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn slot(&self, key: &str) -> SharedSlot {
        self.known().slot(key)
    }

    fn slots(&self) -> Vec<(String, SharedSlot)> {
        let known = self.known();
        let slots = known.slots.iter();
        slots
            .map(|(key, slot)| (key.clone(), Arc::clone(slot)))
            .collect()
    }

    /// The templates that can be used, on disk or in memory only, newest first.
    pub(crate) async fn list(&self) -> Vec<Listed> {
        let parent = self.dir.clone();
        let on_disk = tokio::task::spawn_blocking(move || {
            let dirs = files::directories(&parent);
            let whole = dirs
                .into_iter()
                .filter_map(|(_, dir)| Some((files::read_about(&dir)?, files::size_on_disk(&dir))));
            whole.collect::<Vec<_>>()
        });
        let mut all: BTreeMap<String, Listed> = BTreeMap::new();
        for (kept, disk_bytes) in on_disk.await.unwrap_or_default() {
            let listed = Listed {
                disk_bytes,
                resident_bytes: 0,
                used_ns: kept.created_ns,
                kept,
            };
            all.insert(listed.kept.key.clone(), listed);
        }
        for (key, slot) in self.slots() {
            // One that is being made is none yet.
            if let Ok(slot) = slot.try_lock()
                && let Some(template) = &slot.template
            {
                let listed = all.entry(key).or_insert_with(|| Listed {
                    kept: template.kept.clone(),
                    disk_bytes: 0,
                    resident_bytes: 0,
                    used_ns: template.kept.created_ns,
                });
                listed.resident_bytes = template.capture.resident_bytes();
            }
        }
        let known = self.known();
        let mut all: Vec<Listed> = all.into_values().collect();
        for listed in &mut all {
            if let Some(used) = known.used_ns.get(&listed.kept.key) {
                listed.used_ns = *used;
            }
        }
        drop(known);
        all.sort_by_key(|listed| std::cmp::Reverse(listed.kept.created_ns));
        all
    }

    /// The template of this key, where it is in memory; an error where somebody is at work on it, for which nobody waits here.
    pub(crate) fn in_memory(&self, key: &str) -> Result<Option<Arc<Template>>, AtWork> {
        let slot = self.slot(key);
        let slot = slot.try_lock().map_err(|_| AtWork)?;
        Ok(slot.template.clone())
    }

    /// Notes that a template was of use, without anybody having asked for it here.
    pub(crate) fn was_used(&self, key: &str) {
        self.known().used_ns.insert(key.to_owned(), now_ns());
        let dir = self.dir.join(key);
        // Nobody waits for it, and nobody misses it.
        tokio::task::spawn_blocking(move || files::note_use(&dir));
    }

    /// The template of this blueprint: the one in memory, the one on disk, or a new one, for which whoever asks first waits
    /// as long as a boot takes. `None` where it cannot be had now; why is logged, and the machine should boot.
    pub(crate) async fn get_or_make(
        self: &Arc<Self>,
        blueprint: Blueprint,
    ) -> Option<Arc<Template>> {
        let found = self.in_a_task(blueprint, false).await;
        found.ok().map(|(template, _)| template)
    }

    /// As [`Templates::get_or_make`], also where it could not be made a moment ago, with the reason where it cannot be had,
    /// and whether it was made for this request.
    pub(crate) async fn make_now(
        self: &Arc<Self>,
        blueprint: Blueprint,
    ) -> Result<(Arc<Template>, bool), String> {
        self.in_a_task(blueprint, true).await
    }

    async fn in_a_task(
        self: &Arc<Self>,
        blueprint: Blueprint,
        insist: bool,
    ) -> Result<(Arc<Template>, bool), String> {
        let templates = Arc::clone(self);
        // A request that is taken back must not leave half a template.
        let task = tokio::spawn(async move { templates.find_or_make(blueprint, insist).await });
        task.await
            .unwrap_or_else(|error| Err(format!("a task of the node failed: {error}")))
    }

    async fn find_or_make(
        self: Arc<Self>,
        blueprint: Blueprint,
        insist: bool,
    ) -> Result<(Arc<Template>, bool), String> {
        let key = blueprint.key();
        let slot = self.slot(&key);
        let mut slot = slot.lock().await;
        if let Some((at, reason)) = &slot.failed
            && !insist
            && at.elapsed() < RETRY_AFTER
        {
            return Err(reason.clone());
        }
        let dir = self.dir.join(&key);
        if let Some(template) = &slot.template {
            self.was_used(&key);
            return Ok((Arc::clone(template), false));
        }
        if let Err(message) =
            make::end_earlier(std::slice::from_ref(&blueprint.parts.vmm), &dir).await
        {
            let message = format!("the machine of an earlier try could not be ended: {message}");
            tracing::warn!(
                template = key,
                message,
                "no template is made while another may be in the making; machines boot without it"
            );
            slot.failed = Some((Instant::now(), message.clone()));
            return Err(message);
        }
        let found = {
            let dir = dir.clone();
            tokio::task::spawn_blocking(move || files::read(&dir))
                .await
                .map_err(|error| error.to_string())?
        };
        let (template, made) = match found {
            Some((kept, capture, overlay)) => {
                let template = Arc::new(Template {
                    kept,
                    capture: Arc::new(capture),
                    overlay,
                    writing: Arc::default(),
                    retired: AtomicBool::new(false),
                });
                (template, false)
            }
            None => match self.make(&blueprint, &key, &dir).await {
                Ok(template) => (template, true),
                Err(message) => {
                    tracing::warn!(
                        template = key,
                        message,
                        "a template could not be made; machines boot without it"
                    );
                    slot.failed = Some((Instant::now(), message.clone()));
                    self.known().used_ns.remove(&key);
                    let _ = tokio::task::spawn_blocking(move || files::remove(&dir)).await;
                    return Err(message);
                }
            },
        };
        slot.failed = None;
        let images = blueprint.parts.images.clone();
        if made && image_is_gone(&images, template.image_id()).await {
            self.clear(&mut slot, &key).await;
            return Err("its image was removed meanwhile".to_owned());
        }
        self.known().used_ns.insert(key, now_ns());
        slot.template = Some(Arc::clone(&template));
        // From before anybody can have it removed: whoever removes it waits until it is written.
        let writing = match made {
            true => Some(Arc::clone(&template.writing).lock_owned().await),
            false => None,
        };
        let (templates, fresh) = (Arc::clone(&self), Arc::clone(&template));
        tokio::spawn(async move {
            if let Some(writing) = writing {
                write(&fresh, dir, writing).await;
            }
            // Again now that those who remove an image find its template: until here they may have missed it.
            if image_is_gone(&images, fresh.image_id()).await {
                templates.remove(fresh.key()).await;
            }
            templates.keep_to_limits(fresh.key()).await;
        });
        Ok((template, made))
    }

    async fn make(
        &self,
        blueprint: &Blueprint,
        key: &str,
        dir: &Path,
    ) -> Result<Arc<Template>, String> {
        let begin = Instant::now();
        let blocking = |error: tokio::task::JoinError| error.to_string();
        let at = dir.to_owned();
        tokio::task::spawn_blocking(move || files::begin(&at))
            .await
            .map_err(blocking)?
            .map_err(|error| format!("its directory cannot be made: {error}"))?;
        let capture = make::capture(blueprint, dir).await?;
        let at = dir.to_owned();
        let (overlay, overlay_blake3) =
            tokio::task::spawn_blocking(move || files::open_overlay(&at))
                .await
                .map_err(blocking)?
                .map_err(|error| format!("its disk cannot be read: {error}"))?;
        let kept = Kept {
            format: files::FORMAT,
            key: key.to_owned(),
            image_id: blueprint.image_id.clone(),
            image: blueprint.image.clone(),
            kernel: blueprint.kernel.clone(),
            vmm: format!("{} {}", capture.info().kind, capture.info().version),
            vcpus: blueprint.vcpus,
            memory_bytes: blueprint.memory.0,
            disk_bytes: blueprint.disk.0,
            network: blueprint.network,
            created_ns: now_ns(),
            making_us: u64::try_from(begin.elapsed().as_micros()).unwrap_or(u64::MAX),
            overlay_blake3,
        };
        tracing::info!(template = key, image = kept.image, took = ?begin.elapsed(), "a template was made");
        Ok(Arc::new(Template {
            kept,
            capture: Arc::new(capture),
            overlay,
            writing: Arc::default(),
            retired: AtomicBool::new(false),
        }))
    }

    /// Forgets a template; says whether there was one. Running forks are not touched.
    pub(crate) async fn remove(&self, key: &str) -> bool {
        let slot = self.slot(key);
        let mut held = slot.lock().await;
        let there = self.clear(&mut held, key).await;
        drop(held);
        let mut known = self.known();
        // Ours and the map's: nobody waits for it. Who does makes it anew.
        if Arc::strong_count(&slot) == 2 {
            known.slots.remove(key);
        }
        there
    }

    /// Forgets a template whose fork failed, unless another has taken its place. Where it does not suit this host any more
    /// the next machine makes another; otherwise nobody does for a while.
    pub(crate) async fn give_up(&self, template: &Arc<Template>, error: &VmmError) {
        let slot = self.slot(template.key());
        let mut held = slot.lock().await;
        let current = (held.template.as_ref()).is_some_and(|held| Arc::ptr_eq(held, template));
        if current {
            self.clear(&mut held, template.key()).await;
            if !matches!(error, VmmError::Unsupported { .. }) {
                held.failed = Some((Instant::now(), chain(error)));
            }
        }
    }

    async fn clear(&self, slot: &mut Slot, key: &str) -> bool {
        let template = slot.template.take();
        if let Some(template) = &template {
            template.retired.store(true, Ordering::Release);
        }
        slot.failed = None;
        self.known().used_ns.remove(key);
        let writing = match &template {
            Some(template) => Some(template.writing.lock().await),
            None => None,
        };
        let dir = self.dir.join(key);
        let on_disk = tokio::task::spawn_blocking(move || {
            let there = dir.is_dir();
            files::remove(&dir);
            there && !dir.exists()
        });
        let on_disk = on_disk.await.unwrap_or(false);
        drop(writing);
        template.is_some() || on_disk
    }

    /// Forgets the templates of an image.
    pub(crate) async fn remove_of_image(&self, image: &Digest) {
        for listed in self.list().await {
            if listed.kept.image_id == *image {
                self.remove(&listed.kept.key).await;
            }
        }
    }

    /// Removes what was used longest ago beyond the limits; `fresh` stays, whatever it takes.
    async fn keep_to_limits(&self, fresh: &str) {
        let all = self.list().await;
        let held = |bytes: fn(&Listed) -> u64| {
            let held = all.iter().map(|listed| Held {
                key: listed.kept.key.clone(),
                bytes: bytes(listed),
                used_ns: listed.used_ns,
            });
            held.collect::<Vec<_>>()
        };
        let on_disk = held(|listed| listed.disk_bytes);
        for key in evict(on_disk, self.limits.disk_bytes, Some(fresh)) {
            tracing::info!(
                template = key,
                "a template is removed to save room on the disk"
            );
            self.remove(&key).await;
        }
        let in_memory = held(|listed| listed.resident_bytes);
        let in_memory = in_memory.into_iter().filter(|held| held.bytes > 0);
        for key in evict(in_memory.collect(), self.limits.memory_bytes, Some(fresh)) {
            let slot = self.slot(&key);
            let mut held = slot.lock().await;
            // One that is being written stays: who asks for it would find half of it, and make another under the writer, who
            // sees to these limits himself once he is done.
            let written = (held.template.as_ref())
                .is_some_and(|template| template.writing.try_lock().is_ok());
            if written {
                tracing::info!(template = key, "a template is dropped from memory");
                // What is on disk is read again when it is wanted. Its stock goes, too: whoever removes the files now would
                // not find it.
                if let Some(template) = held.template.take() {
                    template.retired.store(true, Ordering::Release);
                }
            }
        }
    }
}

/// Whether an image was removed; where that cannot be told, it was not.
async fn image_is_gone(images: &ImageStore, image: &Digest) -> bool {
    let (images, image) = (images.clone(), image.clone());
    let looked =
        tokio::task::spawn_blocking(move || matches!(images.find(image.as_ref()), Ok(None)));
    looked.await.unwrap_or(false)
}

/// Writes a new template to disk. Where that fails it serves from memory as long as this node lives, and nothing of it stays
/// on the disk, which may be full.
async fn write(template: &Arc<Template>, dir: PathBuf, writing: tokio::sync::OwnedMutexGuard<()>) {
    let template = Arc::clone(template);
    let written = tokio::task::spawn_blocking(move || {
        if let Err(error) = files::write(&template.capture, &template.kept, &dir) {
            tracing::warn!(
                template = template.key(),
                error = chain(&error),
                "a template could not be kept on disk"
            );
            files::remove(&dir);
        }
        drop(writing);
    });
    if let Err(error) = written.await {
        tracing::error!(%error, "writing a template failed");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_is_remembered_of_failures_is_bounded_and_nobody_at_work_is_forgotten() {
        let dir = tempfile::tempdir().unwrap();
        let limits = TemplateLimits {
            memory_bytes: 0,
            disk_bytes: 0,
        };
        let templates = Templates::new(dir.path().to_owned(), limits);
        let at_work = templates.slot("at work");
        let working = at_work.lock().await;
        for number in 0..3 * SLOTS_MAX {
            let slot = templates.slot(&number.to_string());
            slot.lock().await.failed = Some((Instant::now(), "on purpose".to_owned()));
        }
        let count = templates.known().slots.len();
        assert!(count <= SLOTS_MAX, "{count}");
        assert!(Arc::ptr_eq(&templates.slot("at work"), &at_work));
        // The last failure is still known.
        let last = templates.slot(&(3 * SLOTS_MAX - 1).to_string());
        assert!(last.lock().await.failed.is_some());
        drop(working);
    }
}
