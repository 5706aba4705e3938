//! The servers, asked over the loopback.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    time::SystemTime,
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    sync::watch,
};

use super::*;
use crate::status::{Heartbeat, SyncState};

struct Agent {
    healthz: SocketAddr,
    metrics: SocketAddr,
    state: watch::Sender<SyncState>,
    shared: Arc<Shared>,
    serves: Arc<AtomicBool>,
}

async fn start() -> Agent {
    let any = Some("127.0.0.1:0".parse().expect("an address"));
    let servers =
        Servers::open(&Listen { healthz: any, metrics: any, is_hard_fail: true }).await.expect("ports");
    let (registries, _, metrics) = Registries::new();
    let (state, sync) = watch::channel(SyncState::default());
    let shared = Shared::new(Status { node: "node-a".to_owned(), ..Status::default() });
    let serves = Arc::new(AtomicBool::new(true));
    let sources = Sources {
        registries: Arc::new(registries),
        metrics,
        shared: Arc::clone(&shared),
        health: Health { sync, heartbeat: Heartbeat::new(Instant::now()), serves: Arc::clone(&serves) },
        watch: None,
        config: Arc::new(json!({ "masquerade-all": true, "pin-dir": "/pins" })),
        names: (ServiceNames::default(), ServiceNames::default()),
        slis: Slis::default(),
    };
    let address = |socket: &Socket| socket.listeners[0].local_addr().expect("bound");
    let (healthz, metrics) = (address(&servers.healthz), address(&servers.metrics));
    tokio::spawn(servers.run(sources));
    Agent { healthz, metrics, state, shared, serves }
}

async fn get(address: SocketAddr, path: &str) -> (u16, String) {
    let mut stream = TcpStream::connect(address).await.expect("a connection");
    let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.expect("sent");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.expect("an answer");
    let (head, body) = answer.split_once("\r\n\r\n").expect("a head");
    (head[9..12].parse().expect("a status"), body.to_owned())
}

async fn get_json(address: SocketAddr, path: &str) -> (u16, Value) {
    let (status, body) = get(address, path).await;
    (status, serde_json::from_str(&body).unwrap_or_else(|error| panic!("{body}: {error}")))
}

#[tokio::test]
async fn a_healthy_node_is_up_to_date_by_kube_proxys_fields() {
    let agent = start().await;
    let (status, body) = get(agent.healthz, "/healthz").await;
    let order = [
        "\"lastUpdated\"",
        "\"currentTime\"",
        "\"nodeEligible\"",
        "\"healthy\"",
        "\"status\":{\"IPv4\"",
        "\"IPv6\"",
    ];
    let places: Vec<_> = order.iter().map(|field| body.find(field).expect(field)).collect();
    assert!(status == 200 && places.is_sorted(), "{body}");
    let json: Value = serde_json::from_str(&body).expect("JSON");
    assert_eq!(json["lastUpdated"], json["currentTime"]);
    assert_eq!(json["status"]["IPv6"], json!({ "lastUpdated": "0001-01-01T00:00:00Z", "healthy": true }));
    let synced = SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000);
    agent.state.send_modify(|state| state.last_synced = Some(synced));
    let (_, json) = get_json(agent.healthz, "/livez").await;
    assert_eq!(json["status"]["IPv4"]["lastUpdated"], "2023-11-14T22:13:20.000000000Z");
    assert!(json.get("nodeEligible").is_none(), "{json}");
}

#[tokio::test]
async fn an_agent_that_starts_is_alive_and_gets_no_traffic_until_something_serves() {
    let agent = start().await;
    agent.serves.store(false, Ordering::Relaxed);
    let (status, json) = get_json(agent.healthz, "/healthz").await;
    assert_eq!((status, &json["nodeEligible"], &json["healthy"]), (503, &json!(false), &json!(true)));
    assert_eq!(get(agent.healthz, "/livez").await.0, 200);
    agent.serves.store(true, Ordering::Relaxed);
    assert_eq!(get(agent.healthz, "/healthz").await.0, 200);
}

#[tokio::test]
async fn a_node_that_leaves_is_alive_but_gets_no_traffic() {
    let agent = start().await;
    agent.state.send_modify(|state| state.node_eligible = false);
    let (status, json) = get_json(agent.healthz, "/healthz").await;
    assert_eq!((status, &json["nodeEligible"], &json["healthy"]), (503, &json!(false), &json!(true)));
    assert_eq!(json["lastUpdated"], "0001-01-01T00:00:00Z");
    assert_eq!(get(agent.healthz, "/livez").await.0, 200);
    let (_, text) = get(agent.metrics, "/metrics").await;
    for line in
        ["kubeproxy_proxy_healthz_total{code=\"503\"} 1", "kubeproxy_proxy_livez_total{code=\"200\"} 1"]
    {
        assert!(text.lines().any(|found| found == line), "{line} is not in\n{text}");
    }
}

#[tokio::test]
async fn maps_that_are_late_are_neither_healthy_nor_alive() {
    let agent = start().await;
    let late = Instant::now().checked_sub(STUCK_AFTER).expect("the machine runs for longer");
    agent.state.send_modify(|state| state.queued_since = Some(late));
    for (address, path) in [(agent.healthz, "/healthz"), (agent.healthz, "/livez"), (agent.metrics, "/livez")]
    {
        assert_eq!(get(address, path).await.0, 503, "{path}");
    }
    let (_, json) = get_json(agent.healthz, "/livez").await;
    assert_eq!((&json["healthy"], &json["status"]["IPv6"]["healthy"]), (&json!(false), &json!(false)));
}

#[tokio::test]
async fn the_metrics_server_has_the_paths_of_kube_proxy_and_ours() {
    let agent = start().await;
    let image = agent.shared.wait_for("image");
    assert_eq!(get(agent.metrics, "/healthz").await, (200, "ok".to_owned()));
    assert_eq!(get(agent.metrics, "/livez").await.0, 200);
    assert_eq!(get(agent.metrics, "/proxyMode").await, (200, "xdp".to_owned()));
    assert_eq!(get_json(agent.metrics, "/configz").await.1["xdp-agent"]["masquerade-all"], true);
    assert_eq!(get(agent.metrics, "/readyz").await, (503, "waiting for: image\n".to_owned()));
    drop(image);
    assert_eq!(get(agent.metrics, "/readyz").await.0, 200);
    assert_eq!(get_json(agent.metrics, "/status").await.1["node"], "node-a");
    assert_eq!(
        get_json(agent.metrics, "/services").await.1,
        json!({ "pin-dir": "/pins", "IPv4": {}, "IPv6": {} })
    );
    assert!(get(agent.metrics, "/metrics").await.1.ends_with("# EOF\n"));
    assert_eq!(get(agent.healthz, "/metrics").await.0, 404, "metrics are not for load balancers");
}

#[tokio::test]
async fn what_health_checks_have_said_is_counted_as_kubernetes_does() {
    let agent = start().await;
    assert_eq!(get(agent.metrics, "/metrics/slis").await, (200, "# EOF\n".to_owned()));
    let image = agent.shared.wait_for("image");
    for path in ["/healthz", "/healthz", "/livez", "/readyz"] {
        get(agent.metrics, path).await;
    }
    drop(image);
    get(agent.metrics, "/readyz").await;
    let (status, text) = get(agent.metrics, "/metrics/slis").await;
    assert_eq!(status, 200);
    for line in [
        "# TYPE kubernetes_healthcheck gauge",
        "# TYPE kubernetes_healthchecks counter",
        "kubernetes_healthcheck{name=\"ping\",type=\"healthz\"} 1",
        "kubernetes_healthcheck{name=\"start\",type=\"readyz\"} 1",
        "kubernetes_healthchecks_total{name=\"ping\",status=\"success\",type=\"healthz\"} 2",
        "kubernetes_healthchecks_total{name=\"maps\",status=\"success\",type=\"livez\"} 1",
        "kubernetes_healthchecks_total{name=\"start\",status=\"error\",type=\"readyz\"} 1",
        "kubernetes_healthchecks_total{name=\"start\",status=\"success\",type=\"readyz\"} 1",
    ] {
        assert!(text.lines().any(|found| found == line), "{line} is not in\n{text}");
    }
}

#[tokio::test]
async fn an_address_that_is_taken_ends_the_start_only_when_asked() {
    let taken = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let listen = |is_hard_fail| Listen {
        healthz: None,
        metrics: Some(taken.local_addr().expect("bound")),
        is_hard_fail,
    };
    let error = Servers::open(&listen(true)).await.expect_err("refused").to_string();
    assert!(error.contains("--metrics-bind-address") && error.contains("stop what does"), "{error}");
    let servers = Servers::open(&listen(false)).await.expect("it goes on");
    assert!(servers.metrics.listeners.is_empty() && servers.healthz.listeners.is_empty());
}
