//! Metrics, health and status over HTTP.

use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use axum::{
    Json, Router,
    extract::State,
    http::{StatusCode, header},
    response::IntoResponse,
    routing::get,
};
use prometheus_client::registry::Registry;
use tokio::net::TcpListener;
use tracing::warn;

use crate::{
    metrics,
    status::{Heartbeat, Shared, Status},
};

/// A writer that has not moved for this long is stuck.
const STUCK_AFTER: Duration = Duration::from_secs(60);

const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// What the handlers read.
#[derive(Clone, Debug)]
pub struct Sources {
    /// Metrics.
    pub registry: Arc<Registry>,
    /// Status and readiness.
    pub shared: Arc<Shared>,
    /// When the writer of the maps last moved.
    pub heartbeat: Heartbeat,
}

/// Takes the address, before anything else is touched.
///
/// # Errors
/// When it cannot be had.
pub async fn bind(address: SocketAddr) -> anyhow::Result<TcpListener> {
    TcpListener::bind(address).await.map_err(|error| {
        let remedy = if error.kind() == std::io::ErrorKind::AddrInUse {
            "stop what listens there, or choose another --metrics-address"
        } else {
            "choose another --metrics-address (is the loopback up?)"
        };
        anyhow::anyhow!("cannot listen on {address} for metrics and health ({error}); {remedy}")
    })
}

/// Answers until the process ends.
pub async fn serve(listener: TcpListener, sources: Sources) {
    if let Err(error) = axum::serve(listener, router(sources)).await {
        warn!(%error, "metrics and health are not served any more");
    }
}

fn router(sources: Sources) -> Router {
    Router::new()
        .route("/metrics", get(serve_metrics))
        .route("/healthz", get(livez))
        .route("/livez", get(livez))
        .route("/readyz", get(readyz))
        .route("/status", get(status))
        .with_state(sources)
}

async fn serve_metrics(State(sources): State<Sources>) -> impl IntoResponse {
    match metrics::encode(&sources.registry) {
        Ok(text) => (StatusCode::OK, [(header::CONTENT_TYPE, OPEN_METRICS)], text),
        Err(error) => {
            (StatusCode::INTERNAL_SERVER_ERROR, [(header::CONTENT_TYPE, "text/plain")], format!("{error}\n"))
        }
    }
}

async fn livez(State(sources): State<Sources>) -> (StatusCode, String) {
    match sources.heartbeat.age(Instant::now()) {
        age if age < STUCK_AFTER => (StatusCode::OK, "ok\n".to_owned()),
        age => {
            (StatusCode::SERVICE_UNAVAILABLE, format!("the writer of the maps has not moved for {age:?}\n"))
        }
    }
}

async fn readyz(State(sources): State<Sources>) -> (StatusCode, String) {
    match sources.shared.pending() {
        pending if pending.is_empty() => (StatusCode::OK, "ok\n".to_owned()),
        pending => (StatusCode::SERVICE_UNAVAILABLE, format!("waiting for: {}\n", pending.join(", "))),
    }
}

async fn status(State(sources): State<Sources>) -> Json<Status> {
    Json(sources.shared.status())
}
