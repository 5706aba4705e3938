//! Health as kube-proxy tells it to load balancers and probes (pkg/proxy/healthcheck/proxy_health.go): whether the maps
//! keep up with the objects, and for `/healthz` whether this node should get traffic at all.

use std::{
    collections::BTreeMap,
    sync::atomic::Ordering,
    time::{Instant, SystemTime},
};

use axum::{
    Router,
    extract::State,
    http::{StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
};
use serde::Serialize;

use crate::{
    cluster::wanted::{Ip6, IpAddress},
    metrics::KubeProxy,
    status::Health,
};

/// What the handlers read and count.
#[derive(Clone, Debug)]
pub(super) struct Probes {
    pub(super) health: Health,
    pub(super) metrics: KubeProxy,
}

pub(super) fn router(probes: Probes) -> Router {
    Router::new().route("/healthz", get(healthz)).route("/livez", get(livez)).with_state(probes)
}

async fn healthz(State(probes): State<Probes>) -> Response {
    let is_eligible =
        probes.health.serves.load(Ordering::Relaxed) && probes.health.sync.borrow().node_eligible;
    let answer = Answer::new(&probes.health, Some(is_eligible));
    probes.metrics.healthz(answer.status().as_str());
    answer.into_response()
}

async fn livez(State(probes): State<Probes>) -> Response {
    let answer = Answer::new(&probes.health, None);
    probes.metrics.livez(answer.status().as_str());
    answer.into_response()
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Answer {
    last_updated: String,
    current_time: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    node_eligible: Option<bool>,
    healthy: bool,
    status: BTreeMap<&'static str, Family>,
}

/// One writer serves both families, so that they are well or ill together.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Family {
    last_updated: String,
    healthy: bool,
}

impl Answer {
    fn new(health: &Health, node_eligible: Option<bool>) -> Self {
        let healthy = health.is_good(Instant::now());
        let last_synced = timestamp(health.sync.borrow().last_synced);
        let current_time = timestamp(Some(SystemTime::now()));
        let families = [<[u8; 4]>::FAMILY, Ip6::FAMILY];
        let status =
            families.map(|family| (family, Family { last_updated: last_synced.clone(), healthy })).into();
        // What is well is up to date, even if nothing has changed for long.
        let is_well = healthy && node_eligible != Some(false);
        let last_updated = if is_well { current_time.clone() } else { last_synced };
        Self { last_updated, current_time, node_eligible, healthy, status }
    }

    fn status(&self) -> StatusCode {
        match self.healthy && self.node_eligible != Some(false) {
            true => StatusCode::OK,
            false => StatusCode::SERVICE_UNAVAILABLE,
        }
    }
}

impl IntoResponse for Answer {
    fn into_response(self) -> Response {
        let body = serde_json::to_string(&self).unwrap_or_default();
        let headers =
            [(header::CONTENT_TYPE, "application/json"), (header::X_CONTENT_TYPE_OPTIONS, "nosniff")];
        (self.status(), headers, body).into_response()
    }
}

/// RFC 3339; Go's zero time for never.
fn timestamp(time: Option<SystemTime>) -> String {
    time.map_or("0001-01-01T00:00:00Z".to_owned(), |time| humantime::format_rfc3339_nanos(time).to_string())
}
