//! The socket hooks over IPv6: the node calls a Service whose endpoint is on one of its own addresses.

use std::net::{Ipv6Addr, SocketAddr, TcpListener, UdpSocket};
use std::time::Duration;

use anyhow::{Result, ensure};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::task::JoinHandle;
use xdp_agent_tests::lab::netns::Namespace;
use xdp_agent_tests::lab::world::{World, WorldOptions};
use xdp_agent_tests::lab::{block_on, runtime, wait_for};

use crate::callers::{Place, counted_call};

const BIND_TIMEOUT: Duration = Duration::from_secs(5);
const ENDPOINT: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x244, 0, 0, 0, 0, 0, 0x11);
const CLUSTER_IP: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x96, 0, 0, 0, 0, 0, 0x10);
const EMPTY: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x96, 0, 0, 0, 0, 0, 0x20);

#[test]
fn the_node_reaches_services_of_ipv6_and_sees_their_address() -> Result<()> {
    let world = World::build(WorldOptions { local: 1, remote: 0, ..WorldOptions::default() })?;
    for device in ["all", "lo"] {
        world.node.enable_v6(device)?;
    }
    let lo = world.node.index("lo")?;
    block_on(world.node.netlink().address().add(lo, ENDPOINT.into(), 128).execute())?;
    let server = Server::start(&world.node, ENDPOINT, "six")?;
    world.manifests.write("six.yaml", &objects())?;
    let mut place = Place::serve(world, &[], &[])?;
    let (http, echo): (SocketAddr, SocketAddr) = ((CLUSTER_IP, 80).into(), (CLUSTER_IP, 5000).into());
    let answer = place.node.http(http)??;
    ensure!(answer.backend == "six" && answer.from == http, "{answer:?}");
    let answer = place.node.udp(echo)??;
    ensure!(answer.backend == "six" && answer.from == echo, "{answer:?}");
    place.node.open("socket", true)?;
    for _ in 0..3 {
        let answer = place.node.ask_at("socket", echo)??;
        ensure!(answer.backend == "six" && answer.from == echo, "{answer:?}");
    }
    for call in ["tcp_connect", "udp_connect", "udp_send"] {
        counted_call(&place.agent, call, "translated")?;
    }
    let refused = place.node.http((EMPTY, 80).into())?;
    ensure!(refused.as_ref().is_err_and(|failed| failed.errno == libc::ECONNREFUSED), "{refused:?}");
    let refused = place.node.http((CLUSTER_IP, 81).into())?;
    ensure!(refused.as_ref().is_err_and(|failed| failed.errno == libc::ECONNREFUSED), "{refused:?}");
    place.stop()?;
    drop(server);
    Ok(())
}

/// A Service with an endpoint, and one without.
fn objects() -> [String; 3] {
    let service = |name: &str, ip: Ipv6Addr| {
        format!(
            "apiVersion: v1\nkind: Service\nmetadata:\n  name: {name}\n  namespace: default\nspec:\n  clusterIP: \
             {ip}\n  clusterIPs: [\"{ip}\"]\n  ipFamilies: [IPv6]\n  ports:\n  - name: http\n    port: 80\n    \
             protocol: TCP\n  - name: echo\n    port: 5000\n    protocol: UDP\n  type: ClusterIP\n"
        )
    };
    let slice = format!(
        "addressType: IPv6\napiVersion: discovery.k8s.io/v1\nendpoints:\n- addresses: [\"{ENDPOINT}\"]\n  conditions:\n    \
         ready: true\n  nodeName: node\nkind: EndpointSlice\nmetadata:\n  labels:\n    kubernetes.io/service-name: \
         six\n  name: six-abcde\n  namespace: default\nports:\n- name: http\n  port: 8080\n  protocol: TCP\n- name: \
         echo\n  port: 9000\n  protocol: UDP\n"
    );
    [service("six", CLUSTER_IP), service("empty", EMPTY), slice]
}

/// Answers as the lab's servers do, over IPv6; it ends with this value.
pub(crate) struct Server([JoinHandle<()>; 2]);

impl Server {
    pub(crate) fn start(namespace: &Namespace, address: Ipv6Addr, name: &'static str) -> Result<Self> {
        // A new address is tentative for a moment.
        wait_for("the address to be bound", BIND_TIMEOUT, || {
            Ok(namespace.run(|| UdpSocket::bind((address, 0)).map(drop))?)
        })?;
        let (listener, socket) = namespace.run(|| -> std::io::Result<_> {
            let listener = TcpListener::bind((address, 8080))?;
            let socket = UdpSocket::bind((address, 9000))?;
            listener.set_nonblocking(true)?;
            socket.set_nonblocking(true)?;
            let _context = runtime().enter();
            Ok((tokio::net::TcpListener::from_std(listener)?, tokio::net::UdpSocket::from_std(socket)?))
        })?;
        let http = runtime().spawn(async move {
            while let Ok((mut stream, peer)) = listener.accept().await {
                let mut request = [0; 1024];
                // A caller that is gone shows in its own answer.
                let _ = stream.read(&mut request).await;
                let body = format!("{{\"backend\":\"{name}\",\"peer\":\"{peer}\"}}");
                let answer = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}", body.len());
                let _ = stream.write_all(answer.as_bytes()).await;
            }
        });
        let echo = runtime().spawn(async move {
            let mut buffer = [0; 1024];
            while let Ok((_, peer)) = socket.recv_from(&mut buffer).await {
                let _ = socket.send_to(format!("{name} {peer}").as_bytes(), peer).await;
            }
        });
        Ok(Self([http, echo]))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.0.iter().for_each(JoinHandle::abort);
    }
}
