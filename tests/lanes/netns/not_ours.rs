//! What is not addressed to a frontend passes byte for byte, in and out, and is answered as without the agent.

use std::collections::HashSet;
use std::net::Ipv4Addr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket};
use xdp_agent_tests::lab::capture::{Capture, Captured, PacketSocket};
use xdp_agent_tests::lab::clients::{ANSWER_TIMEOUT, tcp};
use xdp_agent_tests::lab::packets::{EXPERIMENTAL, Ends, without_ip_id};
use xdp_agent_tests::lab::servers::pattern_of;
use xdp_agent_tests::lab::world::{EXTERNAL_IP, NODE, World, WorldOptions};
use xdp_agent_tests::lab::{block_on, runtime, wait_for, within};

use crate::setup::Setup;

const SSH_PORT: u16 = 22;
const BANNER: &[u8] = b"SSH-2.0-lab\r\n";
/// A host on the segment that exists only as frames.
const STRANGER: Ipv4Addr = Ipv4Addr::new(192, 168, 50, 77);
const STRANGER_MAC: [u8; 6] = [0x02, 0, 0, 0, 0, 0x77];
const SEEN_TIMEOUT: Duration = Duration::from_secs(5);

each_mode!(strange_frames_pass_unchanged_and_are_answered_as_without_the_agent);
fn strange_frames_pass_unchanged_and_are_answered_as_without_the_agent(setup: Setup) -> Result<()> {
    let world = setup.world(WorldOptions::default())?;
    // The node knows the stranger, so that its answers do not wait for ARP.
    world.node.static_neighbour("eth0", STRANGER.into(), STRANGER_MAC)?;
    // Rate limits would make the kernel's answers depend on what was sent before.
    world.node.sysctl("net/ipv4/icmp_ratelimit", "0")?;
    world.node.sysctl("net/ipv4/conf/all/send_redirects", "0")?;
    world.node.sysctl("net/ipv4/conf/eth0/send_redirects", "0")?;
    let without = exchange(&world)?;
    let agent = world.start_agent(setup.mode)?;
    let with = exchange(&world)?;
    ensure!(
        without.arrived == without.sent && without.left == without.sent_out,
        "the lab itself changed a frame"
    );
    let (arrived, sent) = (&with.arrived, &with.sent);
    ensure!(arrived == sent, "a frame arrived changed, or not at all: {arrived:x?}\nof {sent:x?}");
    let (left, sent) = (&with.left, &with.sent_out);
    ensure!(left == sent, "a frame of the node left changed, or not at all: {left:x?}\nof {sent:x?}");
    for (one, other, name) in [(&without, &with, "without"), (&with, &without, "with")] {
        let only: Vec<_> = one.answers.iter().filter(|answer| !other.answers.contains(answer)).collect();
        ensure!(only.is_empty(), "only {name} the agent the node answers {only:x?}");
    }
    ensure!(without.answers.len() == with.answers.len());
    ensure!(without.answers.len() >= 4, "too few answers to compare: {:x?}", without.answers);
    agent.stop()
}

each_mode_and_offload!(a_connection_to_the_node_itself_is_the_same_on_the_wire_and_in_the_node);
fn a_connection_to_the_node_itself_is_the_same_on_the_wire_and_in_the_node(setup: Setup) -> Result<()> {
    let running = setup.start()?;
    let world = &running.world;
    let server = serve_ssh(world)?;
    let (wire, inside) = (Capture::start(&world.router, "node0")?, Capture::start(&world.node, "eth0")?);
    let conversation = block_on(within("the conversation", ANSWER_TIMEOUT * 3, converse(world)));
    let (wire, inside) = (wire.stop(), inside.stop());
    server.abort();
    conversation?;
    // What leaves the router's port enters the node, and the other way round.
    for (direction, outgoing) in [("towards the node", true), ("from the node", false)] {
        let (wire, inside) = (ssh_frames(&wire, outgoing), ssh_frames(&inside, !outgoing));
        ensure!(wire.len() > 20, "{direction}: only {} frames", wire.len());
        ensure!(
            wire == inside,
            "{direction}: {} frames on the wire, {} in the node",
            wire.len(),
            inside.len()
        );
    }
    Ok(())
}

struct Exchange {
    sent: Vec<Vec<u8>>,
    arrived: Vec<Vec<u8>>,
    sent_out: Vec<Vec<u8>>,
    left: Vec<Vec<u8>>,
    answers: Vec<Vec<u8>>,
}

/// Sends every kind of strange frame to the node and out of it, and collects what either side saw.
fn exchange(world: &World) -> Result<Exchange> {
    let inwards = Ends { mac: (STRANGER_MAC, world.node.mac("eth0")?), ip: (STRANGER, NODE) };
    let outwards = Ends { mac: (world.node.mac("eth0")?, STRANGER_MAC), ip: (NODE, STRANGER) };
    let (sent, sent_out) = (strange_frames(&inwards), strange_frames(&outwards));
    let (wire, inside) =
        (PacketSocket::open(&world.router, "node0")?, PacketSocket::open(&world.node, "eth0")?);
    let (wire_seen, inside_seen) =
        (Capture::start(&world.router, "node0")?, Capture::start(&world.node, "eth0")?);
    sent.iter().try_for_each(|frame| wire.send(frame))?;
    sent_out.iter().try_for_each(|frame| inside.send(frame))?;
    // The last frame out is the last thing the router sees once everything before it was handled.
    let last = sent_out.last().context("there are frames")?;
    wait_for("the last frame", SEEN_TIMEOUT, || {
        let seen = wire.receive().context("nothing yet")?;
        ensure!(&seen.frame == last, "not the last one");
        Ok(())
    })?;
    let (wire_seen, inside_seen) = (wire_seen.stop(), inside_seen.stop());
    let mut arrived = frames(&inside_seen, |seen| !seen.outgoing && seen.frame[6..12] == STRANGER_MAC);
    // A fragment waits a second for its first, and comes in once more.
    let mut known = HashSet::new();
    arrived.retain(|frame| known.insert(frame.clone()));
    let from_node = frames(&wire_seen, |seen| !seen.outgoing && seen.frame[6..12] == outwards.mac.0);
    let (left, rest): (Vec<_>, Vec<_>) = from_node.into_iter().partition(|frame| sent_out.contains(frame));
    let answers = rest.iter().filter(|frame| frame[0..6] == STRANGER_MAC);
    let mut answers: Vec<_> = answers.map(|frame| without_ip_id(frame)).collect();
    // Answers to different questions may overtake each other.
    answers.sort();
    Ok(Exchange { sent, arrived, sent_out, left, answers })
}

fn strange_frames(ends: &Ends) -> Vec<Vec<u8>> {
    let beside = Ends { ip: (ends.ip.0, EXTERNAL_IP), ..*ends };
    vec![
        ends.arp_request(),
        ends.ping(7, 1, b"ping"),
        ends.ping(7, 2, &pattern_of(1_400)),
        // Closed ports: the kernel answers with a reset and an ICMP error that quotes the packet.
        ends.tcp((40_000, 23), 0, b""),
        ends.tcp((40_000, 23), 77, b"stray segment"),
        ends.udp((40_000, 7), b"closed"),
        ends.udp((40_000, 7), b""),
        ends.other_protocol(47, b"not quite GRE"),
        ends.other_protocol(132, &pattern_of(40)),
        ends.later_fragment(b"a fragment whose first part never came"),
        // The address of a Service, but a port that is none of its frontends.
        beside.udp((40_000, 9), b"no such frontend"),
        ends.ipv6_udp((1_000, 2_000), b"over IPv6"),
        ends.ethertype(EXPERIMENTAL, &pattern_of(60)),
        ends.ethertype(0x88cc, &pattern_of(100)),
        // An IPv4 frame that ends in the middle of its header, and one whose header says nonsense.
        ends.ethertype(0x0800, &[0x45, 0, 0, 60, 0, 0]),
        ends.ethertype(0x0800, &[0xff; 46]),
        ends.ethertype(EXPERIMENTAL, b"the last one, padded to the minimum of Ethernet......."),
    ]
}

fn frames(seen: &[Captured], keep: impl Fn(&Captured) -> bool) -> Vec<Vec<u8>> {
    seen.iter().filter(|seen| keep(seen)).map(|seen| seen.frame.clone()).collect()
}

/// Returns the TCP frames of the SSH connection in one direction.
fn ssh_frames(seen: &[Captured], outgoing: bool) -> Vec<Vec<u8>> {
    let port = SSH_PORT.to_be_bytes();
    let is_ssh = |frame: &[u8]| {
        frame.get(12..14) == Some(&[0x08, 0])
            && (frame.get(34..36) == Some(&port) || frame.get(36..38) == Some(&port))
    };
    frames(seen, |seen| seen.outgoing == outgoing && is_ssh(&seen.frame))
}

/// Answers like an SSH server: a banner first, then every packet echoed.
fn serve_ssh(world: &World) -> Result<tokio::task::JoinHandle<()>> {
    let listener = world.node.run(|| -> std::io::Result<TcpListener> {
        let socket = TcpSocket::new_v4()?;
        socket.bind((NODE, SSH_PORT).into())?;
        let _context = runtime().enter();
        socket.listen(16)
    })?;
    Ok(runtime().spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            // A client that leaves early ends its own conversation only.
            let _ = async {
                stream.set_nodelay(true)?;
                stream.write_all(BANNER).await?;
                let mut buffer = [0; 4_096];
                loop {
                    let length = stream.read(&mut buffer).await?;
                    if length == 0 {
                        return std::io::Result::Ok(());
                    }
                    stream.write_all(&buffer[..length]).await?;
                }
            }
            .await;
        }
    }))
}

/// Speaks one packet at a time, so that receive offload has nothing to merge and frames compare one to one.
async fn converse(world: &World) -> Result<()> {
    let mut stream = tcp(&world.client, (NODE, SSH_PORT), 0).await?;
    let mut banner = vec![0; BANNER.len()];
    stream.read_exact(&mut banner).await?;
    ensure!(banner == BANNER);
    for length in (1..1_400).step_by(47) {
        let packet = pattern_of(length);
        stream.write_all(&packet).await?;
        let mut echo = vec![0; length];
        stream.read_exact(&mut echo).await?;
        ensure!(echo == packet, "{length} bytes came back changed");
    }
    Ok(())
}
