//! Metrics, health and status over HTTP, on the ports and paths of kube-proxy.

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
use serde_json::{Value, json};
use tokio::{net::TcpListener, sync::watch};
use tracing::{info, warn};

use crate::{
    cluster::wanted::{Ip6, IpAddress},
    config::Listen,
    metrics::{KubeProxy, Registries, Slis, slis::Check},
    reconcile::ServiceNames,
    status::{Health, STUCK_AFTER, Shared, Status},
    watch::SourceHealth,
};

pub(crate) mod listen;
mod proxy;
#[cfg(test)]
mod tests;

/// How often an address is tried again that cannot be had, as kube-proxy does.
const AGAIN_AFTER: Duration = Duration::from_secs(5);

const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// What `/proxyMode` says where kube-proxy says `iptables` or `nftables`.
const PROXY_MODE: &str = "xdp";

/// What the handlers read.
#[derive(Clone, Debug)]
pub struct Sources {
    /// Metrics.
    pub registries: Arc<Registries>,
    /// Those that the handlers count in.
    pub metrics: KubeProxy,
    /// Status and readiness.
    pub shared: Arc<Shared>,
    /// Whether the writer of the maps does its work.
    pub health: Health,
    /// How watching the API server goes, where objects come from there.
    pub watch: Option<watch::Receiver<SourceHealth>>,
    /// The resolved configuration.
    pub config: Arc<Value>,
    /// Names of service ports by their ids, of IPv4 and of IPv6.
    pub names: (ServiceNames, ServiceNames),
    /// What health checks have been told.
    pub slis: Slis,
}

/// The addresses, as far as they can be had.
#[derive(Debug)]
pub struct Servers {
    healthz: Socket,
    metrics: Socket,
}

/// Where one server listens.
#[derive(Debug)]
struct Socket {
    flag: &'static str,
    address: Option<SocketAddr>,
    /// Empty while the address cannot be had.
    listeners: Vec<TcpListener>,
}

impl Servers {
    /// Takes the addresses, before anything else is touched.
    ///
    /// # Errors
    /// When one cannot be had, if that is to end the start.
    pub async fn open(listen: &Listen) -> anyhow::Result<Self> {
        let healthz = Socket::open("--healthz-bind-address", listen.healthz, listen.is_hard_fail).await?;
        let metrics = Socket::open("--metrics-bind-address", listen.metrics, listen.is_hard_fail).await?;
        Ok(Self { healthz, metrics })
    }

    /// Answers until the process ends; addresses that could not be had are tried again meanwhile.
    pub async fn run(self, sources: Sources) {
        let probes = proxy::Probes { health: sources.health.clone(), metrics: sources.metrics.clone() };
        tokio::join!(self.healthz.run(proxy::router(probes)), self.metrics.run(router(sources)));
    }
}

impl Socket {
    async fn open(
        flag: &'static str,
        address: Option<SocketAddr>,
        is_hard_fail: bool,
    ) -> anyhow::Result<Self> {
        let mut socket = Self { flag, address: address.map(everywhere), listeners: Vec::new() };
        match socket.listen().await {
            Ok(()) => {}
            Err(error) if is_hard_fail => return Err(error),
            Err(error) => warn!("{error}; trying again every {AGAIN_AFTER:?}"),
        }
        Ok(socket)
    }

    async fn listen(&mut self) -> anyhow::Result<()> {
        let Some(address) = self.address else { return Ok(()) };
        self.listeners = listen::listen(address).await.map_err(|error| {
            anyhow::anyhow!(
                "cannot listen on {address} ({error}); stop what does, or choose another {}",
                self.flag
            )
        })?;
        Ok(())
    }

    async fn run(mut self, router: Router) {
        while self.address.is_some() && self.listeners.is_empty() {
            tokio::time::sleep(AGAIN_AFTER).await;
            if self.listen().await.is_ok() {
                info!(flag = self.flag, "the address is free now");
            }
        }
        let mut servers = tokio::task::JoinSet::new();
        for listener in self.listeners {
            servers.spawn(axum::serve(listener, router.clone()).into_future());
        }
        while let Some(ended) = servers.join_next().await {
            warn!(flag = self.flag, ?ended, "nothing is answered there any more");
        }
    }
}

/// All of IPv4 means all of both families, as in Go.
fn everywhere(address: SocketAddr) -> SocketAddr {
    match address.ip().is_unspecified() {
        true => SocketAddr::new(listen::EVERYWHERE, address.port()),
        false => address,
    }
}

fn router(sources: Sources) -> Router {
    Router::new()
        .route("/metrics", get(metrics))
        .route("/metrics/slis", get(slis))
        .route("/healthz", get(healthz))
        .route("/livez", get(livez))
        .route("/readyz", get(readyz))
        .route("/proxyMode", get(async || PROXY_MODE))
        .route("/configz", get(configz))
        .route("/status", get(status))
        .route("/services", get(services))
        .with_state(sources)
}

async fn metrics(State(sources): State<Sources>) -> impl IntoResponse {
    in_text(sources.registries.encode())
}

async fn slis(State(sources): State<Sources>) -> impl IntoResponse {
    in_text(sources.slis.encode())
}

fn in_text(encoded: Result<String, std::fmt::Error>) -> impl IntoResponse {
    match encoded {
        Ok(text) => (StatusCode::OK, [(header::CONTENT_TYPE, OPEN_METRICS)], text),
        Err(error) => {
            (StatusCode::INTERNAL_SERVER_ERROR, [(header::CONTENT_TYPE, "text/plain")], format!("{error}\n"))
        }
    }
}

async fn healthz(State(sources): State<Sources>) -> &'static str {
    sources.slis.observe(Check::Healthz, true);
    "ok"
}

async fn livez(State(sources): State<Sources>) -> (StatusCode, String) {
    let is_good = sources.health.is_good(Instant::now());
    sources.slis.observe(Check::Livez, is_good);
    if is_good {
        return (StatusCode::OK, "ok\n".to_owned());
    }
    let message = format!("for {STUCK_AFTER:?} the maps have not been what the objects ask\n");
    (StatusCode::SERVICE_UNAVAILABLE, message)
}

async fn readyz(State(sources): State<Sources>) -> (StatusCode, String) {
    let pending = sources.shared.pending();
    sources.slis.observe(Check::Readyz, pending.is_empty());
    match pending {
        pending if pending.is_empty() => (StatusCode::OK, "ok\n".to_owned()),
        pending => (StatusCode::SERVICE_UNAVAILABLE, format!("waiting for: {}\n", pending.join(", "))),
    }
}

async fn configz(State(sources): State<Sources>) -> Json<Value> {
    Json(json!({ "xdp-agent": *sources.config }))
}

async fn status(State(sources): State<Sources>) -> Json<Status> {
    let api_server = sources.watch.map_or_else(Vec::new, |health| health.borrow().status(Instant::now()));
    Json(Status { api_server, ..sources.shared.status() })
}

/// The service ports of the maps by their ids, and which maps those are.
async fn services(State(sources): State<Sources>) -> Json<Value> {
    Json(
        json!({ "pin-dir": sources.config["pin-dir"], <[u8; 4]>::FAMILY: sources.names.0.by_id(), Ip6::FAMILY: sources.names.1.by_id() }),
    )
}
