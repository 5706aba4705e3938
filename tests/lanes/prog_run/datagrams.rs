//! Fragments for the long sequences, in any order and among others, and what the host makes of one.

use xdp_common::{
    decide,
    fragment::{self, FragmentKey, FragmentPorts, HELD_LEN_MAX, SECONDS_MAX, Side, Step, first},
    frame::Packet,
    net::{TCP, UDP},
    tunnel::Tunnel,
    verdict::{Action, Counter, Event},
};

use crate::{
    dice::Dice,
    family::{Family, Hosts},
    frames::*,
    model::Model,
    mutation,
    node::{self, *},
    twins::{Expected, Sort, Twins},
};

/// Fragments that are on their way at a time.
const PIECES_MAX: usize = 24;
/// The identifications of all packets, few enough to meet again.
const IDS: [u8; 3] = [1, 2, 3];
/// Number of the extension header of a fragment (RFC 8200).
const FRAGMENT: u8 = 44;
const MORE: u16 = 0x2000;

/// A fragment on its way.
#[derive(Clone)]
pub(crate) struct Piece {
    bytes: Vec<u8>,
    way: Way,
}

/// Where a packet is met.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    In,
    /// By the second interface.
    Beside,
    Out,
}

/// What the host makes of a fragment of TCP or UDP.
pub(crate) fn expected<F: Hosts + Tunnel>(model: &Model<F>, hook: Hook, from: u32, frame: &[u8]) -> Expected {
    let side = match hook {
        // For tc ingress.
        Hook::Xdp | Hook::XdpFrags => return Expected::left(frame),
        Hook::TcIngress => Side::Ingress,
        Hook::TcEgress => Side::Egress,
    };
    let (mut packet, mut key) = (Packet::ZERO, FragmentKey::ZERO);
    if !F::parse_fragment(frame, from, &mut packet, &mut key) {
        return Expected::left(frame);
    }
    let step = fragment::step::<F, _>(model, &mut packet, &key, side);
    let sort = match (packet.is_later_fragment(), side) {
        (false, Side::Ingress) if step == Step::Tell => Sort::AwaitedIn,
        (false, Side::Ingress) => Sort::FirstIn,
        (false, Side::Egress) => Sort::FirstOut,
        (true, Side::Ingress) => Sort::LaterIn,
        (true, Side::Egress) => Sort::LaterOut,
    };
    let handed_over = |ifindex| (frame.len() <= HELD_LEN_MAX).then(|| (ifindex, frame.to_vec()));
    let verdict = match (step, side) {
        (Step::Pass, _) | (Step::Hold, Side::Egress) => {
            return Expected { decided: Some((sort, Action::Pass)), ..Expected::left(frame) };
        }
        (Step::Hold, Side::Ingress) => return kept(frame, handed_over(from)),
        (Step::Decide | Step::Tell, Side::Ingress) => {
            decide::ingress::<F, _>(model, &packet, decide::Hook::Fragment)
        }
        (Step::Decide | Step::Tell, Side::Egress) => decide::egress::<F, _>(model, &packet),
    };
    let held = if step == Step::Tell { handed_over(0) } else { None };
    let decided = Some((sort, verdict.action));
    Expected { held, decided, ..Expected::of::<F>(hook, from, frame, &packet, &verdict) }
}

/// An early fragment, which the agent gets unless it is too long.
fn kept(frame: &[u8], held: Option<(u32, Vec<u8>)>) -> Expected {
    let (action, event) = match held {
        Some(_) => (node::Action::Drop, Event::FragmentHeld),
        None => (node::Action::Pass, Event::FragmentLost),
    };
    let (counts, decided) = (vec![Counter::Event(event)], Some((Sort::LaterIn, Action::Pass)));
    Expected { action, held, counts, decided, ..Expected::left(frame) }
}

/// A fragment comes or leaves, or what is known of others changes.
pub(crate) fn happen<F: Hosts + Tunnel>(twins: &mut Twins<F>) {
    match twins.dice.below(400) {
        0 => {
            // As long as ports are good, or a second longer.
            let seconds = SECONDS_MAX + twins.dice.below(2) as u32;
            twins.configure(|config| config.clock += seconds);
        }
        1..8 => give_up(twins),
        _ => {}
    }
    if twins.pieces.is_empty() || (twins.pieces.len() < PIECES_MAX && twins.dice.once_in(4)) {
        send(twins);
    }
    let at = twins.dice.below(twins.pieces.len());
    let Piece { bytes, way } = twins.pieces[at].clone();
    // Others come once more: what was kept, and what somebody sends twice.
    if !twins.dice.once_in(3) {
        twins.pieces.swap_remove(at);
    }
    match way {
        Way::In if twins.dice.once_in(60) => {
            let longer = [&bytes[..], &[0xee; HELD_LEN_MAX]].concat();
            let len = HELD_LEN_MAX + twins.dice.below(2);
            twins.agree(Hook::TcIngress, &longer[..len]);
        }
        Way::In if twins.dice.once_in(3) => {
            let sent_on = twins.tunnelled(&bytes, ip_len(F::FAMILY, &bytes), 0);
            twins.comes_in(&sent_on);
        }
        Way::In => twins.comes_in(&bytes),
        Way::Beside => twins.comes_in_beside(&bytes),
        Way::Out => twins.goes_out(&bytes),
    }
}

/// How long the IP packet in a frame says it is, as far as the frame goes.
fn ip_len(family: Family, frame: &[u8]) -> usize {
    let field = |at: usize| usize::from(u16::from_be_bytes([frame[at], frame[at + 1]]));
    let len = match family {
        Family::V4 => field(ETHERNET + 2),
        Family::V6 => 40 + field(ETHERNET + 4),
    };
    len.min(frame.len() - ETHERNET)
}

/// Somebody sends a packet in fragments.
fn send<F: Hosts + Tunnel>(twins: &mut Twins<F>) {
    let proto = twins.dice.of(&[UDP, UDP, UDP, TCP]);
    let answer = if twins.dice.once_in(2) { twins.backend_frame() } else { None };
    let (mut frame, way) = match answer {
        Some(answer) if answer.src.0 == LOCAL => (answer, Way::Out),
        Some(answer) if answer.src.0 == BESIDE => {
            (answer.with(|frame| frame.mac = (BESIDE_MAC, twins.node.mac_too)), Way::Beside)
        }
        Some(answer) => (answer, Way::In),
        None => (twins.client_frame(proto), Way::In),
    };
    frame.payload = vec![0x5a; 16 + twins.dice.below(120)];
    for bytes in cut(&mut twins.dice, frame) {
        twins.pieces.push(Piece { bytes, way });
    }
}

/// The fragments of a packet, first to last, as frames that are not too short.
fn cut(dice: &mut Dice, mut frame: Frame) -> Vec<Vec<u8>> {
    let id = dice.of(&IDS);
    if frame.family == Family::V6 {
        frame.options.clear();
        if dice.once_in(8) {
            frame.extensions.push((dice.of(&[0, 60]), vec![0; 7]));
        }
        frame.extensions.push((FRAGMENT, vec![0, 0, 0, 0, 0, 0, id]));
    }
    let (bytes, end) = (frame.bytes(), ETHERNET + frame.total_len());
    let l4 = end - frame.payload.len() - l4_header_len(frame.proto);
    // A first one without a whole header of TCP is no packet of ours.
    let part = 8 * (dice.of(&[3, 3, 3, 3, 1]) + dice.below(4));
    let last = (end - l4 - 1) / part;
    let mut pieces = Vec::new();
    for (number, body) in bytes[l4..end].chunks(part).enumerate() {
        let field = (number * part / 8) as u16 | if number < last { MORE } else { 0 };
        let mut piece = [&bytes[..l4], body].concat();
        mark(frame.family, l4, field, id, &mut piece);
        if dice.once_in(25) {
            mutation::mutate(dice, frame.family, l4, &mut piece);
        }
        piece.resize(piece.len().max(SKB_MIN), 0xee);
        pieces.push(piece);
    }
    pieces
}

/// Makes the headers of a packet those of a fragment: length, offset and flags as of IPv4, identification.
fn mark(family: Family, l4: usize, field: u16, id: u8, piece: &mut [u8]) {
    let len = (piece.len() - ETHERNET) as u16;
    match family {
        Family::V4 => {
            mutation::put(piece, ETHERNET + 2, &len.to_be_bytes());
            mutation::put(piece, ETHERNET + 4, &[0, id]);
            mutation::put(piece, ETHERNET + 6, &field.to_be_bytes());
            mutation::repair(piece);
        }
        Family::V6 => {
            let more = u16::from(field & MORE != 0);
            mutation::put(piece, ETHERNET + 4, &(len - 40).to_be_bytes());
            mutation::put(piece, l4 - 6, &((field & !MORE) << 3 | more).to_be_bytes());
        }
    }
}

/// The agent has waited long enough for the first fragment of a packet.
fn give_up<F: Hosts + Tunnel>(twins: &mut Twins<F>) {
    let Some(last) = twins.pieces.len().checked_sub(1) else { return };
    let piece = &twins.pieces[twins.dice.below(last + 1)];
    let (mut packet, mut key) = (Packet::ZERO, FragmentKey::ZERO);
    if piece.way != Way::In || !F::parse_fragment(&piece.bytes[..], 0, &mut packet, &mut key) {
        return;
    }
    let name = |addr| twins.names.get(&addr).copied();
    let (Some(src), Some(dst)) = (name(key.src), name(key.dst)) else { return };
    let ports = FragmentPorts::without(first::GIVEN_UP, twins.model.config.get().clock);
    twins.model.fragments.borrow_mut().insert(key, ports);
    let FragmentKey { id, proto, zero, .. } = key;
    twins.node.maps.note_fragment(FragmentKey { src, dst, id, proto, zero }, ports);
}
