//! Counts for Prometheus, in its text format.

use super::{App, since};
use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::response::IntoResponse;
use std::collections::BTreeMap;
use std::fmt::Write;

/// The node's counts, in Prometheus' text format.
#[utoipa::path(get, path = "/metrics", responses((status = 200, content_type = "text/plain", body = String)))]
pub(super) async fn metrics(State(app): State<App>) -> impl IntoResponse {
    let mut by_state: BTreeMap<String, u64> = BTreeMap::new();
    let mut resident = 0;
    for handle in app.node.all() {
        *by_state.entry(handle.state().to_string()).or_default() += 1;
        resident += handle
            .shared
            .vm
            .borrow()
            .as_ref()
            .map_or(0, |vm| vm.usage().resident_bytes);
    }
    let mut text = String::new();
    // Writing to a string cannot fail.
    let _ = writeln!(
        text,
        "# HELP vistara_machines Machines by state.\n# TYPE vistara_machines gauge"
    );
    for (state, count) in by_state {
        let _ = writeln!(text, "vistara_machines{{state=\"{state}\"}} {count}");
    }
    let _ = writeln!(
        text,
        "# HELP vistara_machines_warm Machines that are kept ready for requests to come.\n\
         # TYPE vistara_machines_warm gauge\n\
         vistara_machines_warm {}\n\
         # HELP vistara_monitors_resident_bytes Memory of all monitors with their guests.\n\
         # TYPE vistara_monitors_resident_bytes gauge\n\
         vistara_monitors_resident_bytes {resident}\n\
         # HELP vistara_node_uptime_seconds Time since the node started.\n\
         # TYPE vistara_node_uptime_seconds counter\n\
         vistara_node_uptime_seconds {}",
        app.node.stock().count(),
        since(app.node.started_ns).as_secs()
    );
    ([(CONTENT_TYPE, "text/plain; version=0.0.4")], text)
}
