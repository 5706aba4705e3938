//! ICMP as the host decides on it: errors about flows, which are translated, and echo requests, which are answered. The bytes
//! are computed another way than the programs do: a checksum by what has changed of all that it covers.

use xdp_common::{
    decide::{Hook as Decider, related},
    frame::Packet,
    icmp::{self, Found, Message, Translation},
    net::{Address as _, TCP, UDP},
    tunnel::{Tunnel, relay},
    verdict::{Action, Counter, Event, Verdict},
};

use crate::{
    applied::{addrs_at, around, ip_check, pair, replace, send, set_ttl},
    errors::Icmp,
    family::{Family, Hosts},
    frames::{ETHERNET, words_sum},
    model::Model,
    node::{self, Hook},
    twins::{Expected, Sort, action},
};

/// Length of an ICMP header, and where its checksum is in it (RFC 792).
const HEADER: usize = 8;
const CHECK: usize = 2;
/// Time to live of what is sent here (RFC 1700).
const TTL: u8 = 64;

/// What the host makes of a frame that is neither TCP, UDP nor SCTP.
pub(crate) fn expected<F: Hosts + Tunnel>(model: &Model<F>, hook: Hook, from: u32, frame: &[u8]) -> Expected {
    let mut message = Message::ZERO;
    let is_ingress = match hook {
        Hook::Xdp | Hook::XdpFrags => true,
        Hook::TcEgress => false,
        // What has come in has met XDP.
        Hook::TcIngress => return Expected::left(frame),
    };
    match icmp::parse::<F, _>(frame, from, &mut message) {
        Found::Error => error::<F>(model, hook, frame, &message),
        Found::Echo if is_ingress => echo::<F>(model, frame, &message),
        Found::Other if is_ingress && icmp::addressed::<F, _>(frame, from, &mut message) => {
            unserved(model, frame, &message)
        }
        Found::Around if is_ingress => relayed::<F>(model, from, frame),
        Found::Around | Found::Echo | Found::Other => Expected::left(frame),
    }
}

/// A packet that no service takes.
fn unserved<F: Hosts + Tunnel>(model: &Model<F>, frame: &[u8], message: &Message<F::Addr>) -> Expected {
    match related::unserved::<F, _>(model, &message.packet) {
        None => Expected::left(frame),
        Some(reason) => Expected {
            action: node::Action::Drop,
            counts: vec![Counter::Drop(reason)],
            decided: Some((Sort::Unserved, Action::Drop(reason))),
            ..Expected::left(frame)
        },
    }
}

/// An error that quotes a packet.
fn error<F: Hosts + Tunnel>(
    model: &Model<F>,
    hook: Hook,
    frame: &[u8],
    message: &Message<F::Addr>,
) -> Expected {
    let Verdict { rewrite, hop, .. } = Verdict::PASS;
    let mut out = Translation { source: F::Addr::UNSPECIFIED, quote: rewrite, hop };
    let (sort, decided) = match hook {
        Hook::TcEgress => (Sort::ErrorOut, related::egress::<F, _>(model, message, &mut out)),
        Hook::Xdp | Hook::XdpFrags | Hook::TcIngress => {
            (Sort::ErrorIn, related::ingress::<F, _>(model, message, Decider::Xdp, &mut out))
        }
    };
    let verdict = Verdict { action: decided, rewrite: out.quote, hop: out.hop, mtu: 0 };
    let packet = &message.packet;
    let after = match decided {
        Action::Pass | Action::Drop(_) | Action::Reject(_) => frame.to_vec(),
        Action::Tunnel => around::<F>(hook, frame, packet, &verdict),
        Action::Stack => translated::<F>(frame, message, &out),
        Action::Transmit | Action::Redirect => {
            let mut after = translated::<F>(frame, message, &out);
            send::<F>(&mut after, packet.ttl, &verdict.hop);
            after
        }
    };
    Expected {
        action: action(hook, packet.ifindex, &verdict, false),
        frame: after,
        checks: checks::<F>(message),
        decided: Some((sort, decided)),
        ..Expected::left(&[])
    }
}

/// An error that quotes a packet around a client's.
fn relayed<F: Hosts + Tunnel>(model: &Model<F>, from: u32, frame: &[u8]) -> Expected {
    let mut packet = Packet::ZERO;
    let Some(said) = relay::parse::<F, _>(frame, from, &mut packet) else { return Expected::left(frame) };
    let mut hop = Verdict::<F::Addr>::PASS.hop;
    let decided = related::relay::<F, _>(model, &packet, &said, &mut hop);
    if decided == Action::Pass {
        return Expected::left(frame);
    }
    let mac = |at: usize| *frame[at..].first_chunk().expect("a frame has a header");
    let (to, by) = if decided == Action::Stack { (mac(0), mac(6)) } else { (hop.dmac, hop.smac) };
    let quote = &frame[relay::inner::<F>()..][..usize::from(F::HEADER_LEN) + 16];
    let [high, low] = said.mtu.to_be_bytes();
    let what = match (said.mtu, F::FAMILY) {
        (0, Family::V4) => [3, 1],
        (0, Family::V6) => [1, 3],
        (_, Family::V4) => [3, 4],
        (_, Family::V6) => [2, 0],
    };
    let (client, service) =
        frame[addrs_at::<F>(relay::inner::<F>())..][..2 * F::Addr::LEN].split_at(F::Addr::LEN);
    let told = Icmp {
        mac: (by, to),
        from: service.to_vec(),
        to: client.to_vec(),
        ttl: TTL,
        options: 0,
        kind: what,
        body: [&[0, 0, high, low], quote].concat(),
    };
    let verdict = Verdict { action: decided, hop, ..Verdict::<F::Addr>::PASS };
    Expected {
        action: action(Hook::Xdp, from, &verdict, false),
        frame: told.bytes(),
        decided: Some((Sort::ErrorAround, decided)),
        ..Expected::left(&[])
    }
}

/// Offset of the quote in a frame.
fn quote_at<A>(message: &Message<A>) -> usize {
    usize::from(message.packet.l4_offset) + HEADER
}

/// Offset of the checksum of the quoted TCP or UDP header, if the quote has one.
fn quoted_check<A>(message: &Message<A>) -> Option<usize> {
    (message.check_at != 0).then_some(usize::from(message.check_at))
}

/// Every checksum behind the first IP header whose zero has two forms.
fn checks<F: Hosts>(message: &Message<F::Addr>) -> Vec<usize> {
    let own = usize::from(message.packet.l4_offset) + CHECK;
    let of_tcp = quoted_check(message).filter(|_| message.packet.key.proto == TCP);
    [Some(own), ip_check::<F>(quote_at(message)), of_tcp].into_iter().flatten().collect()
}

/// The error with the quote of another packet in it, each checksum as right or wrong as it was.
fn translated<F: Hosts>(frame: &[u8], message: &Message<F::Addr>, to: &Translation<F::Addr>) -> Vec<u8> {
    let (mut out, quote) = (frame.to_vec(), quote_at(message));
    let of_l4 = quoted_check(message);
    let of_quote: Vec<usize> = of_l4.into_iter().chain(ip_check::<F>(quote)).collect();
    let outer = ip_check::<F>(ETHERNET);
    replace(&mut out, addrs_at::<F>(ETHERNET), &pair::<F>(to.source, to.quote.src), outer.as_slice());
    replace(&mut out, addrs_at::<F>(quote), &pair::<F>(to.quote.src, to.quote.dst), &of_quote);
    let ports = [to.quote.sport, to.quote.dport].concat();
    replace(&mut out, message.ports_at.into(), &ports, of_l4.as_slice());
    if let Some(at) = of_l4.filter(|at| message.packet.key.proto == UDP && out[*at..at + 2] == [0, 0]) {
        out[at..at + 2].fill(0xff);
    }
    let at = usize::from(message.packet.l4_offset);
    let end = at + usize::from(message.packet.l4_len);
    let (before, after) = (covered::<F>(frame, at, end), covered::<F>(&out, at, end));
    let check = u16::from_be_bytes([frame[at + CHECK], frame[at + CHECK + 1]]);
    let check = !words_sum(&[!check, !before, after].map(u16::to_be_bytes).concat());
    out[at + CHECK..at + CHECK + 2].copy_from_slice(&check.to_be_bytes());
    out
}

/// The sum of what the checksum of an ICMP message covers: the message, and of IPv6 the addresses too.
fn covered<F: Hosts>(frame: &[u8], at: usize, end: usize) -> u16 {
    let addrs = addrs_at::<F>(ETHERNET);
    let addrs = match F::FAMILY {
        Family::V4 => addrs..addrs,
        Family::V6 => addrs..addrs + 2 * F::Addr::LEN,
    };
    words_sum(&[&frame[addrs], &frame[at..end]].concat())
}

/// An echo request.
fn echo<F: Hosts + Tunnel>(model: &Model<F>, frame: &[u8], message: &Message<F::Addr>) -> Expected {
    if !related::echoes::<F, _>(model, &message.packet) {
        return unserved(model, frame, message);
    }
    let mut reply = frame.to_vec();
    let (addrs, len) = (addrs_at::<F>(ETHERNET), F::Addr::LEN);
    reply[..12].rotate_left(6);
    reply[addrs..addrs + 2 * len].rotate_left(len);
    set_ttl::<F>(&mut reply, TTL);
    let at = usize::from(message.packet.l4_offset);
    replace(&mut reply, at, &[F::ECHO_REPLY], &[at + CHECK]);
    Expected {
        action: node::Action::Transmit,
        frame: reply,
        checks: vec![at + CHECK],
        counts: vec![Counter::Event(Event::EchoAnswered)],
        is_limited: true,
        held: None,
        decided: Some((Sort::Echo, Action::Transmit)),
    }
}
