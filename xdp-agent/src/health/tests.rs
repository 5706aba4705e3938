use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::{mpsc, watch},
};

use super::*;
use crate::status::{Heartbeat, STUCK_AFTER, SyncState};

fn name(name: &str) -> ObjectName {
    ObjectName { namespace: "shop".to_owned(), name: name.to_owned() }
}

fn check(service: &str, port: u16, endpoints: [u32; 2]) -> HealthCheck {
    let [local_endpoints_v4, local_endpoints_v6] = endpoints;
    HealthCheck { service: name(service), port, local_endpoints_v4, local_endpoints_v6 }
}

fn loopback() -> NodePortAddresses {
    NodePortAddresses::Cidrs(vec![
        ("127.0.0.0".parse().expect("IPv4"), 8),
        ("::1".parse().expect("IPv6"), 128),
    ])
}

/// A port that nothing listens on.
async fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    listener.local_addr().expect("bound").port()
}

/// The writer's side, and what is told of failures.
struct Ports {
    state: watch::Sender<SyncState>,
    failures: mpsc::UnboundedReceiver<Failure>,
}

fn start(checks: Vec<HealthCheck>) -> Ports {
    let own_addresses = ["127.0.0.1", "192.0.2.1"].map(|ip| ip.parse().expect("an address")).into();
    let (state, sync) =
        watch::channel(SyncState { health_checks: checks, own_addresses, ..SyncState::default() });
    let (told, failures) = mpsc::unbounded_channel();
    let health =
        Health { sync, heartbeat: Heartbeat::new(Instant::now()), serves: std::sync::Arc::default() };
    let tell = move |failure: &Failure| told.send(failure.clone()).expect("the test waits");
    tokio::spawn(follow(health, loopback(), Duration::from_millis(20), tell));
    Ports { state, failures }
}

/// Asks until there is an answer that will do.
async fn ask(port: u16, will_do: impl Fn(&Option<String>) -> bool) -> Option<String> {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let answer = ask_once(port).await.ok();
        if will_do(&answer) {
            return answer;
        }
        assert!(Instant::now() < deadline, "port {port} answers {answer:?}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

async fn ask_once(port: u16) -> io::Result<String> {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).await?;
    stream.write_all(b"HEAD_OR_SO /any/path HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").await?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    Ok(answer)
}

#[tokio::test]
async fn the_answer_is_kube_proxys_to_the_byte() {
    let port = free_port().await;
    let ports = start(vec![check("web", port, [2, 7])]);
    let answer = ask(port, Option::is_some).await.expect("an answer");
    let (head, body) = answer.split_once("\r\n\r\n").expect("a head");
    let head = head.to_lowercase();
    assert!(head.starts_with("http/1.1 200 ok\r\n"), "{head}");
    for line in [
        "content-type: application/json",
        "x-content-type-options: nosniff",
        "x-load-balancing-endpoint-weight: 2",
    ] {
        assert!(head.lines().any(|found| found == line), "{line} is not in {head}");
    }
    let expected = "{\n\t\"service\": {\n\t\t\"namespace\": \"shop\",\n\t\t\"name\": \"web\"\n\t},\n\t\
                    \"localEndpoints\": 2,\n\t\"serviceProxyHealthy\": true\n}";
    assert_eq!(body, expected);
    drop(ports);
}

#[tokio::test]
async fn without_endpoints_or_with_late_maps_load_balancers_are_sent_away() {
    let port = free_port().await;
    let ports = start(vec![check("web", port, [0, 7])]);
    let answer = ask(port, Option::is_some).await.expect("an answer");
    assert!(answer.starts_with("HTTP/1.1 503 ") && answer.contains("\"localEndpoints\": 0"), "{answer}");
    let late = Instant::now().checked_sub(STUCK_AFTER).expect("the machine runs for longer");
    ports.state.send_modify(|state| {
        state.health_checks[0].local_endpoints_v4 = 1;
        state.queued_since = Some(late);
    });
    let answer = ask_once(port).await.expect("an answer");
    assert!(answer.starts_with("HTTP/1.1 503 "), "{answer}");
    assert!(answer.contains("\"localEndpoints\": 1") && answer.contains("\"serviceProxyHealthy\": false"));
}

#[tokio::test]
async fn ports_open_move_and_close_with_the_objects() {
    let (first, second) = (free_port().await, free_port().await);
    let ports = start(Vec::new());
    ports.state.send_modify(|state| state.health_checks = vec![check("web", first, [1, 0])]);
    ask(first, Option::is_some).await;
    ports.state.send_modify(|state| state.health_checks = vec![check("web", second, [1, 0])]);
    ask(second, Option::is_some).await;
    ask(first, Option::is_none).await;
    ports.state.send_modify(|state| state.health_checks = vec![check("api", second, [1, 0])]);
    let answer = ask_once(second).await.expect("it has stayed open");
    assert!(answer.contains("\"api\""), "{answer}");
    ports.state.send_modify(|state| state.health_checks.clear());
    ask(second, Option::is_none).await;
}

#[tokio::test]
async fn a_port_that_is_taken_is_told_once_and_tried_again() {
    let taken = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let port = taken.local_addr().expect("bound").port();
    let mut ports = start(vec![check("web", port, [1, 0]), check("web2", port, [1, 0])]);
    let mut failures = Vec::new();
    failures.push(ports.failures.recv().await.expect("a failure"));
    failures.push(ports.failures.recv().await.expect("another"));
    assert_eq!(failures[0].service, name("web2"));
    assert!(failures[0].message.contains("belongs to Service shop/web"), "{failures:?}");
    assert_eq!(failures[1].service, name("web"));
    assert!(failures[1].message.contains(&format!("port {port} of 127.0.0.1")), "{failures:?}");
    drop(taken);
    // Nothing else has changed.
    let answer = ask(port, Option::is_some).await.expect("an answer");
    assert!(answer.contains("\"localEndpoints\": 1"), "{answer}");
    assert!(ports.failures.try_recv().is_err(), "nothing is told twice");
}

#[test]
fn ports_are_opened_where_node_ports_are_served() {
    let own =
        ["192.0.2.1", "10.0.0.7", "2001:db8::1", "fe80::1"].map(|ip| ip.parse().expect("an address")).into();
    let addresses = |rule: NodePortAddresses| -> Vec<String> {
        addresses_of(&rule, &own).iter().map(ToString::to_string).collect()
    };
    let cidrs = |networks: &[(&str, u8)]| {
        NodePortAddresses::Cidrs(
            networks.iter().map(|(ip, len)| (ip.parse().expect("an address"), *len)).collect(),
        )
    };
    assert_eq!(addresses(NodePortAddresses::Primary), ["::"]);
    assert_eq!(addresses(cidrs(&[("0.0.0.0", 0), ("::", 0)])), ["::"]);
    assert_eq!(addresses(cidrs(&[("10.0.0.0", 8), ("2001:db8::", 32)])), ["10.0.0.7", "2001:db8::1"]);
    assert_eq!(
        addresses(cidrs(&[("10.0.0.0", 8)])),
        ["10.0.0.7", "2001:db8::1"],
        "no network means all of a family"
    );
    assert_eq!(addresses(cidrs(&[("2001:db8:1::", 48)])), ["0.0.0.0"]);
    assert_eq!(addresses(cidrs(&[("203.0.113.0", 24), ("2001:db8:1::", 48)])), [""; 0]);
}
