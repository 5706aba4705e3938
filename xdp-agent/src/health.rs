//! Health-check node ports: load balancers ask there whether this node has endpoints of a Service
//! (pkg/proxy/healthcheck/service_health.go).

use std::{
    collections::{BTreeMap, BTreeSet},
    future::IntoFuture,
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    time::{Duration, Instant},
};

use axum::{
    Router,
    extract::{ConnectInfo, State},
    http::{HeaderName, StatusCode, header},
    response::{IntoResponse, Response},
};
use serde::Serialize;
use tokio::sync::oneshot;
use tracing::info;

use crate::{
    cluster::{HealthCheck, NodePortAddresses},
    objects::ObjectName,
    serve::listen::{self, EVERYWHERE},
    status::Health,
};

#[cfg(test)]
mod tests;

/// How often a port is tried again that could not be had, if nothing else happens.
const AGAIN_AFTER: Duration = Duration::from_secs(5);

const WEIGHT: HeaderName = HeaderName::from_static("x-load-balancing-endpoint-weight");

/// A port that cannot be had.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// The Service that asks for it.
    pub service: ObjectName,
    /// What is wrong, lower case, without a full stop.
    pub message: String,
}

/// Opens and closes the ports as the objects say, until the writer of the maps ends. Each failure is told once until it is
/// mended or becomes another.
pub async fn run(health: Health, addresses: NodePortAddresses, failed: impl Fn(&Failure)) {
    follow(health, addresses, AGAIN_AFTER, failed).await;
}

async fn follow(
    mut health: Health,
    addresses: NodePortAddresses,
    again_after: Duration,
    failed: impl Fn(&Failure),
) {
    let mut ports = Ports::default();
    let mut told: Vec<Failure> = Vec::new();
    loop {
        let state = health.sync.borrow_and_update().clone();
        let ips = addresses_of(&addresses, &state.own_addresses);
        let failures = ports.follow(&state.health_checks, &ips, &health).await;
        failures.iter().filter(|failure| !told.contains(failure)).for_each(&failed);
        told = failures;
        let again = async {
            match told.is_empty() {
                true => std::future::pending().await,
                false => tokio::time::sleep(again_after).await,
            }
        };
        tokio::select! {
            changed = health.sync.changed() => if changed.is_err() { return },
            () = again => {}
        }
    }
}

/// The open ports. A port stays open when it passes from one Service to another.
#[derive(Debug, Default)]
struct Ports(BTreeMap<(u16, IpAddr), OpenPort>);

/// Closes when it is dropped.
#[derive(Debug)]
struct OpenPort {
    _stop: Vec<oneshot::Sender<()>>,
}

/// What a handler reads.
#[derive(Clone, Debug)]
struct Asked {
    port: u16,
    health: Health,
}

impl Ports {
    async fn follow(&mut self, checks: &[HealthCheck], ips: &[IpAddr], health: &Health) -> Vec<Failure> {
        let mut owners: BTreeMap<u16, &ObjectName> = BTreeMap::new();
        let mut failures = Vec::new();
        for check in checks {
            let owner = *owners.entry(check.port).or_insert(&check.service);
            if *owner != check.service {
                let message =
                    format!("health-check node port {} belongs to Service {owner} already", check.port);
                failures.push(Failure { service: check.service.clone(), message });
            }
        }
        self.0.retain(|(port, ip), _| owners.contains_key(port) && ips.contains(ip));
        for (&port, &service) in &owners {
            for &ip in ips.iter().filter(|ip| !self.0.contains_key(&(port, **ip))).collect::<Vec<_>>() {
                match open(SocketAddr::new(ip, port), health).await {
                    Ok(open) => drop(self.0.insert((port, ip), open)),
                    Err(error) => {
                        let message =
                            format!("cannot listen on health-check node port {port} of {ip}: {error}");
                        failures.push(Failure { service: service.clone(), message });
                    }
                }
            }
        }
        failures
    }
}

async fn open(address: SocketAddr, health: &Health) -> io::Result<OpenPort> {
    let mut port = OpenPort { _stop: Vec::new() };
    for listener in listen::listen(address).await? {
        let asked = Asked { port: listener.local_addr()?.port(), health: health.clone() };
        let router = Router::new().fallback(answer).with_state(asked);
        let (stop, stopped) = oneshot::channel::<()>();
        let service = router.into_make_service_with_connect_info::<SocketAddr>();
        let serve = axum::serve(listener, service).with_graceful_shutdown(async {
            // An error is the sender's end, which is what is waited for.
            let _ = stopped.await;
        });
        tokio::spawn(serve.into_future());
        port._stop.push(stop);
    }
    info!(%address, "health-check node port is open");
    Ok(port)
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Answer<'a> {
    service: Name<'a>,
    local_endpoints: u32,
    service_proxy_healthy: bool,
}

#[derive(Debug, Serialize)]
struct Name<'a> {
    namespace: &'a str,
    name: &'a str,
}

async fn answer(State(asked): State<Asked>, ConnectInfo(client): ConnectInfo<SocketAddr>) -> Response {
    let is_healthy = asked.health.is_good(Instant::now());
    let state = asked.health.sync.borrow();
    // The port is about to close when nobody asks for it.
    let Some(check) = state.health_checks.iter().find(|check| check.port == asked.port) else {
        return StatusCode::SERVICE_UNAVAILABLE.into_response();
    };
    let endpoints = match client.ip().to_canonical() {
        IpAddr::V4(_) => check.local_endpoints_v4,
        IpAddr::V6(_) => check.local_endpoints_v6,
    };
    let status = match endpoints > 0 && is_healthy {
        true => StatusCode::OK,
        false => StatusCode::SERVICE_UNAVAILABLE,
    };
    let headers = [
        (header::CONTENT_TYPE, "application/json".to_owned()),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff".to_owned()),
        (WEIGHT, endpoints.to_string()),
    ];
    let service = Name { namespace: &check.service.namespace, name: &check.service.name };
    let answer = Answer { service, local_endpoints: endpoints, service_proxy_healthy: is_healthy };
    (status, headers, tabbed(&answer)).into_response()
}

/// JSON as kube-proxy indents it: by tabs, without a line's end at the end.
fn tabbed(answer: &Answer<'_>) -> Vec<u8> {
    let mut text = Vec::new();
    let formatter = serde_json::ser::PrettyFormatter::with_indent(b"\t");
    // Writing plain data into memory does not fail.
    let _ = answer.serialize(&mut serde_json::Serializer::with_formatter(&mut text, formatter));
    text
}

/// Where ports are opened: everywhere, unless `--nodeport-addresses` names networks.
fn addresses_of(rule: &NodePortAddresses, own: &BTreeSet<IpAddr>) -> Vec<IpAddr> {
    let NodePortAddresses::Cidrs(networks) = rule else { return vec![EVERYWHERE] };
    let of_family = |is_ipv4: bool| networks.iter().filter(move |(ip, _)| ip.is_ipv4() == is_ipv4);
    let is_all = |is_ipv4: bool| {
        of_family(is_ipv4).all(|(_, len)| *len == 0) || of_family(is_ipv4).any(|(_, len)| *len == 0)
    };
    let is_all = [is_all(true), is_all(false)];
    if is_all == [true, true] {
        return vec![EVERYWHERE];
    }
    // A socket for all of IPv6 would take IPv4 too, so that its addresses are taken one by one.
    let mut addresses: Vec<IpAddr> = if is_all[0] { vec![Ipv4Addr::UNSPECIFIED.into()] } else { Vec::new() };
    addresses.extend(own.iter().filter(|ip| match ip {
        IpAddr::V4(_) => !is_all[0] && of_family(true).any(|network| contains(*network, **ip)),
        // A link-local address is not an address without its link.
        IpAddr::V6(v6) if v6.is_unicast_link_local() => false,
        IpAddr::V6(_) => is_all[1] || of_family(false).any(|network| contains(*network, **ip)),
    }));
    addresses
}

fn contains((network, len): (IpAddr, u8), ip: IpAddr) -> bool {
    let bits = |ip: IpAddr| match ip {
        IpAddr::V4(ip) => u128::from(ip.to_bits()) << 96,
        IpAddr::V6(ip) => ip.to_bits(),
    };
    let differing = bits(network) ^ bits(ip);
    network.is_ipv4() == ip.is_ipv4() && differing.leading_zeros() >= u32::from(len)
}
