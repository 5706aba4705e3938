//! What holds whatever comes.

use std::collections::HashMap;

use proptest::prelude::*;
use xdp_common::{
    frame::{Packet, tcp},
    net::{TCP, UDP},
    tables::Route,
    verdict::Action,
};

use crate::model::*;

/// A node with local and remote backends behind two frontends, TCP and UDP.
fn busy_node() -> Model {
    let model = Model::new();
    for proto in [TCP, UDP] {
        let ids = [
            model.backend(LOCAL, proto, true),
            model.backend(REMOTE, proto, false),
            model.backend(REMOTE_TOO, proto, false),
        ];
        model.frontend(VIP, proto, &ids, 0);
        model.frontend(VIP_TOO, proto, &[ids[1], ids[0]], 0);
    }
    model
}

#[derive(Clone, Debug)]
enum Step {
    Send { client: u8, port: u8, vip: bool, udp: bool, flags: u8 },
    Answer { nth: usize, flags: u8 },
    Ring { vip: bool, udp: bool, rotate: u8 },
    Neighbour(bool),
    Epoch,
    Evict { nth: usize },
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let flags =
        prop::sample::select(vec![tcp::SYN, tcp::ACK, tcp::ACK, tcp::ACK, tcp::FIN | tcp::ACK, tcp::RST]);
    let step = prop_oneof![
        6 => (0..3u8, 0..4u8, any::<bool>(), any::<bool>(), flags.clone())
            .prop_map(|(client, port, vip, udp, flags)| Step::Send { client, port, vip, udp, flags }),
        6 => (any::<usize>(), flags).prop_map(|(nth, flags)| Step::Answer { nth, flags }),
        1 => (any::<bool>(), any::<bool>(), any::<u8>()).prop_map(|(vip, udp, rotate)| Step::Ring { vip, udp, rotate }),
        1 => any::<bool>().prop_map(Step::Neighbour),
        1 => Just(Step::Epoch),
        1 => any::<usize>().prop_map(|nth| Step::Evict { nth }),
    ];
    prop::collection::vec(step, 1..120)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(5_000))]

    /// Whatever happens to rings, neighbours and tables: an answer to what a backend has seen reaches the client who
    /// sent it, from the frontend it was sent to, or nobody.
    #[test]
    fn answers_reach_whom_they_are_for_or_nobody(steps in steps()) {
        let model = busy_node();
        // What backends have seen last under each key, and the packet that the client had sent.
        let mut seen: HashMap<Key, (Packet<Addr>, Key)> = HashMap::new();
        for step in steps {
            match step {
                Step::Send { client, port, vip, udp, flags } => {
                    let src = [198, 51, 100, 2 + client];
                    let dst = if vip { VIP } else { VIP_TOO };
                    let sport = 40_000 + port as u16;
                    let packet = if udp { datagram(src, sport, dst, HTTP) } else { segment(src, sport, dst, HTTP, flags) };
                    let arrived = model.through(&packet);
                    seen.insert(arrived.key, (arrived, packet.key));
                }
                Step::Answer { nth, flags } => {
                    let mut keys: Vec<_> = seen.keys().copied().collect();
                    keys.sort();
                    let Some(key) = keys.get(nth % keys.len().max(1)) else { continue };
                    let (arrived, sent) = &seen[key];
                    let reply = answer(arrived, if arrived.key.proto == UDP { 0 } else { flags });
                    let verdict = if arrived.key.dst == LOCAL { model.egress(&reply) } else { model.xdp(&reply) };
                    let mut back = rewritten(&reply, &verdict);
                    if verdict.action == Action::Stack && arrived.key.dst != LOCAL {
                        back = rewritten(&back, &model.egress(&back));
                    }
                    prop_assert!(
                        back.key == sent.reversed() || (verdict.action == Action::Pass && back.key == reply.key),
                        "{:?} answered as {:?} to {:?}", arrived.key, back.key, sent
                    );
                }
                Step::Ring { vip, udp, rotate } => {
                    let proto = if udp { UDP } else { TCP };
                    let mut ids: Vec<u32> = if udp { vec![4, 5, 6] } else { vec![1, 2, 3] };
                    ids.rotate_left(rotate as usize % 3);
                    ids.truncate(1 + rotate as usize % 2);
                    model.frontend(if vip { VIP } else { VIP_TOO }, proto, &ids, 0);
                }
                Step::Neighbour(known) => {
                    model.route.set(if known { gateway() } else { Route::NoNeighbour { ifindex: UPLINK } });
                }
                Step::Epoch => {
                    let mut config = model.config.get();
                    config.epoch += 1;
                    model.config.set(config);
                }
                Step::Evict { nth } => {
                    let mut keys: Vec<_> = model.embryonic.borrow().keys().copied().collect();
                    keys.sort();
                    if let Some(key) = keys.get(nth % keys.len().max(1)) {
                        model.embryonic.borrow_mut().remove(key);
                    }
                }
            }
        }
    }

    /// What is addressed to nobody we know is neither touched nor remembered.
    #[test]
    fn strangers_pass_untouched(
        src: [u8; 4], dst: [u8; 4], sport: u16, dport: u16, flags: u8, udp: bool, egress: bool,
    ) {
        let model = busy_node();
        let dport = dport.to_be_bytes();
        let packet =
            if udp { datagram(src, sport, dst, dport) } else { segment(src, sport, dst, dport, flags) };
        prop_assume!(dport != HTTP || (dst != VIP && dst != VIP_TOO));
        let verdict = if egress { model.egress(&packet) } else { model.xdp(&packet) };
        prop_assert_eq!(verdict.action, Action::Pass);
        prop_assert!(model.embryonic.borrow().is_empty() && model.established.borrow().is_empty());
        prop_assert_eq!(model.all_drops(), 0);
    }
}
