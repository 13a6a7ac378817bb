//! The guard of a machine that is a copy of a service: there before the machine is, and as long as it is.

use super::Actor;
use crate::fence;
use std::sync::Arc;
use std::time::Duration;
use vistara_control::Event;

/// Before a guard that is gone is replaced.
const PAUSE: Duration = Duration::from_millis(50);

impl Actor {
    /// Sets a guard on it, if it is one that needs it; `lease` is its first.
    pub(super) async fn set_guard(&mut self, lease: Option<Duration>) -> Result<(), String> {
        if self.record.copy_of.is_none() {
            return Ok(());
        }
        let program = self.node.options.guard.clone();
        let (dir, shared) = (self.dir.clone(), Arc::clone(&self.shared));
        let posted = tokio::task::spawn_blocking(move || {
            match lease {
                Some(until) => fence::renew(&dir, until)?,
                // Whoever has no lease has none any more.
                None if !fence::has_lease(&dir) => fence::renew(&dir, Duration::ZERO)?,
                None => {}
            }
            fence::post(program.as_ref(), &dir, &shared)
        });
        let posted = match posted.await {
            Ok(posted) => posted.map_err(|error| error.to_string()),
            Err(error) => Err(error.to_string()),
        };
        self.guard =
            Some(posted.map_err(|error| format!("nobody can guard the copy's lease: {error}"))?);
        Ok(())
    }

    /// The guard is gone, and the machine is not.
    pub(super) async fn replace_guard(&mut self) {
        // Who is killed again and again is not started in each moment.
        tokio::time::sleep(PAUSE).await;
        if let Err(message) = self.set_guard(None).await {
            self.end_unguarded(message).await;
        }
    }

    /// Ends a copy that nobody guards.
    pub(super) async fn end_unguarded(&mut self, message: String) {
        tracing::error!(machine = %self.record.id, message, "a copy of a service is ended");
        self.on(Event::Forbidden(message)).await;
    }

    /// It has ended.
    pub(super) async fn lift_guard(&mut self) {
        if self.record.copy_of.is_none() {
            return;
        }
        let dir = self.dir.clone();
        // First the lease: a guard that is not there is set anew as long as there is one.
        let lifted = tokio::task::spawn_blocking(move || fence::lift(&dir)).await;
        if let Err(error) = lifted {
            tracing::error!(machine = %self.record.id, %error, "the lifting task failed");
        }
        if let Some(guard) = self.guard.take() {
            guard.dismiss();
            // It is our child, or an earlier node's.
            tokio::spawn(async move { guard.gone().await });
        }
    }
}
