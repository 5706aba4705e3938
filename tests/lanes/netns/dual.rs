//! What worlds of both address families are made of: links, a Service named `web`, its endpoints and sockets to it.

use std::{
    io::{Read, Write},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket},
    thread,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use xdp_agent_tests::lab::{link::veth, netns::Namespace, patient};

/// An address in each family.
pub(crate) type Both = (Ipv4Addr, Ipv6Addr);

/// The usual address of the Service.
pub(crate) const VIP: Both =
    (Ipv4Addr::new(10, 96, 0, 10), Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, 0x10));
/// Port of the Service, and its NodePort.
pub(crate) const PORT: u16 = 30_080;
/// Port of its endpoints.
pub(crate) const TARGET: u16 = 8080;
/// How long a connection may take; openers wait for neighbours to be found.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Both addresses of a host.
pub(crate) fn each((v4, v6): Both) -> [IpAddr; 2] {
    [v4.into(), v6.into()]
}

/// Makes `eth0` of a host a link to a device of its gateway; there, and on `eth0` or a bridge over it, are the addresses.
pub(crate) fn link(
    host: &Namespace,
    uplink: &str,
    own: Both,
    gateway: &Namespace,
    device: &str,
    its: Both,
    tx_offload: bool,
) -> Result<()> {
    veth(host, "eth0", gateway, device)?;
    if uplink != "eth0" {
        host.bridge(uplink)?;
        host.enslave("eth0", uplink)?;
        host.tx_offload("eth0", tx_offload)?;
    }
    for (namespace, device, (v4, v6)) in [(host, uplink, own), (gateway, device, its)] {
        namespace.enable_v6(device)?;
        namespace.up(device)?;
        namespace.address(device, v4, 24)?;
        namespace.address(device, v6, 64)?;
        namespace.tx_offload(device, tx_offload)?;
    }
    host.route_via(Ipv4Addr::UNSPECIFIED, 0, its.0)?;
    host.default_route_v6(its.1)
}

/// Lets a namespace forward packets of both families.
pub(crate) fn forward(namespace: &Namespace) -> Result<()> {
    namespace.sysctl("net/ipv4/ip_forward", "1")?;
    namespace.sysctl("net/ipv6/conf/all/forwarding", "1")
}

/// The Service, with external IPs if it has any.
pub(crate) fn service(cluster_ip: Both, external_ips: &[Both]) -> String {
    let (v4, v6) = cluster_ip;
    let external_ips: Vec<String> = external_ips.iter().flat_map(|&ips| each(ips)).map(quoted).collect();
    let port = |protocol: &str| {
        let name = protocol.to_lowercase();
        format!("  - {{name: {name}, port: {PORT}, nodePort: {PORT}, protocol: {protocol}}}\n")
    };
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: web, namespace: shop}}\nspec:\n  type: NodePort\n  clusterIP: \
         {v4}\n  clusterIPs: [{v4}, \"{v6}\"]\n  externalIPs: [{}]\n  ipFamilies: [IPv4, IPv6]\n  ports:\n{}",
        external_ips.join(", "),
        ["TCP", "UDP", "SCTP"].map(port).concat()
    )
}

/// Its EndpointSlices: hosts with the names of their nodes.
pub(crate) fn slices(endpoints: &[(Both, &str)]) -> [String; 2] {
    [("IPv4", 0), ("IPv6", 1)].map(|(family, index)| {
        let entry = |&(addresses, node): &(Both, &str)| {
            let address = quoted(each(addresses)[index]);
            format!("- {{addresses: [{address}], nodeName: {node}, conditions: {{ready: true}}}}\n")
        };
        let endpoints: String = endpoints.iter().map(entry).collect();
        format!(
            "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{name: web-{}, namespace: shop, labels: \
             {{kubernetes.io/service-name: web}}}}\naddressType: {family}\nports:\n- {{name: tcp, port: {TARGET}, protocol: \
             TCP}}\n- {{name: udp, port: {TARGET}, protocol: UDP}}\n- {{name: sctp, port: {TARGET}, protocol: \
             SCTP}}\nendpoints:{}",
            family.to_lowercase(),
            if endpoints.is_empty() { " []\n".into() } else { format!("\n{endpoints}") }
        )
    })
}

fn quoted(address: IpAddr) -> String {
    format!("\"{address}\"")
}

/// Has a host serve until the process ends: each connection, and each datagram with an answer.
pub(crate) fn serve(
    host: &Namespace,
    stream: impl Fn(TcpStream) -> std::io::Result<()> + Clone + Send + 'static,
    answer: impl Fn(SocketAddr, &[u8]) -> Vec<u8> + Send + 'static,
) -> Result<()> {
    let any = (Ipv6Addr::UNSPECIFIED, TARGET);
    let listener = host.run(|| TcpListener::bind(any))?;
    let socket = host.run(|| UdpSocket::bind(any))?;
    thread::spawn(move || {
        for connection in listener.incoming().flatten() {
            let stream = stream.clone();
            thread::spawn(move || stream(connection));
        }
    });
    thread::spawn(move || {
        let mut question = vec![0; 1 << 16];
        while let Ok((len, peer)) = socket.recv_from(&mut question) {
            // A client that goes away early is the client's to report.
            let _ = socket.send_to(&answer(peer, &question[..len]), peer);
        }
    });
    Ok(())
}

/// Connects to the Service; what is read and written after may wait so long.
pub(crate) fn connect(client: &Namespace, to: IpAddr, timeout: Duration) -> Result<TcpStream> {
    let to = SocketAddr::new(to, PORT);
    let stream = client.run(|| TcpStream::connect_timeout(&to, patient(CONNECT_TIMEOUT)));
    let stream = stream.with_context(|| format!("connecting to {to}"))?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(patient(timeout)))?;
    stream.set_write_timeout(Some(patient(timeout)))?;
    Ok(stream)
}

/// Opens a UDP socket to the Service, on which answers may take so long.
pub(crate) fn socket(client: &Namespace, to: IpAddr, timeout: Duration) -> Result<UdpSocket> {
    let any: IpAddr = if to.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    socket_from(client, any, to, timeout)
}

/// The same from an address of the client.
pub(crate) fn socket_from(
    client: &Namespace,
    from: IpAddr,
    to: IpAddr,
    timeout: Duration,
) -> Result<UdpSocket> {
    let socket = client.run(|| {
        UdpSocket::bind((from, 0)).and_then(|socket| {
            socket.connect((to, PORT))?;
            Ok(socket)
        })
    })?;
    socket.set_read_timeout(Some(patient(timeout)))?;
    Ok(socket)
}

/// Gives back all that comes by a connection, once its client has said everything.
pub(crate) fn give_back(mut stream: TcpStream) -> std::io::Result<()> {
    let mut all = Vec::new();
    stream.read_to_end(&mut all)?;
    stream.write_all(&all)
}

/// Says so much to the Service, and hears it from there.
pub(crate) fn get_back(client: &Namespace, to: IpAddr, len: usize, timeout: Duration) -> Result<()> {
    let said: Vec<u8> = (0..len).map(|at| (at % 251) as u8).collect();
    let mut stream = connect(client, to, timeout)?;
    stream.write_all(&said)?;
    stream.shutdown(Shutdown::Write)?;
    let mut heard = Vec::new();
    stream.read_to_end(&mut heard)?;
    ensure!(heard == said, "{} of {len} bytes came back", heard.len());
    Ok(())
}
