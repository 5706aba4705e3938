use super::*;
use xdp_common::{
    conntrack::{mirror, translate},
    net::UDP,
    tables::closing,
};

type Key = FlowKey<[u8; 4]>;
type Entry = Flow<[u8; 4]>;
type Look = super::Look<[u8; 4]>;

const CLIENT: [u8; 4] = [198, 51, 100, 7];
const FRONTEND: [u8; 4] = [10, 96, 0, 1];
const BACKEND: [u8; 4] = [10, 244, 1, 5];
const SNAT: [u8; 4] = [192, 0, 2, 1];

fn key(src: [u8; 4], dst: [u8; 4], sport: u16, dport: u16) -> Key {
    FlowKey { src, dst, sport: sport.to_be_bytes(), dport: dport.to_be_bytes(), proto: TCP, zero: [0; 3] }
}

fn flow(before: &Key, after: &Key, exit: u8, seen: u32) -> Entry {
    let mut flow = Flow {
        src: [0; 4],
        dst: [0; 4],
        sport: [0; 2],
        dport: [0; 2],
        addr_delta: 0,
        l4_delta: 0,
        dmac: [2, 0, 0, 0, 0, 9],
        smac: [0; 6],
        ifindex: 0,
        routing: 0,
        seen,
        backend: 5,
        generation: 1,
        service: 1,
        mtu: 1500,
        kind: kind::FORWARD,
        exit,
        closing: 0,
        replied: 1,
        pseudo_sum: 0,
        zero: [0; 4],
    };
    translate(&mut flow, before, after);
    flow
}

#[test]
fn either_half_of_a_flow_names_the_same_needs() {
    let before = key(CLIENT, FRONTEND, 40_000, 80);
    for (exit, after, reply_kind) in [
        (exit::TRANSMIT, key(SNAT, BACKEND, 2000, 8080), kind::REPLY_REMOTE),
        (exit::LOCAL, key(CLIENT, BACKEND, 40_000, 8080), kind::REPLY_LOCAL),
    ] {
        let forward = flow(&before, &after, exit, 0);
        let reply_key = opposite(&before, &forward);
        let mut reply = forward;
        mirror(&before, &forward, reply_kind, exit::LOCAL, &mut reply);
        let (mut of_forward, mut of_reply) = (Look::default(), Look::default());
        of_forward.need(&before, &forward);
        of_reply.need(&reply_key, &reply);
        assert_eq!(of_forward.in_use.ingress_bits, of_reply.in_use.ingress_bits);
        assert_eq!(of_forward.in_use.egress_bits, of_reply.in_use.egress_bits);
        assert_eq!(of_forward.in_use.backends, HashSet::from([5]));
        // Of another node too, which may have sent it on.
        for addr in [FRONTEND, [0; 4]] {
            assert!(of_forward.in_use.ingress_bits.contains(&gate::frontend_bit(addr, [0, 80], TCP)));
        }
    }
}

#[test]
fn only_idle_entries_are_suspects_and_only_busy_neighbours_are_kept() {
    let timeouts = Timeouts::default();
    let before = key(CLIENT, FRONTEND, 40_000, 80);
    let after = key(SNAT, BACKEND, 2000, 8080);
    let mut look = Look::default();
    look.visit(Place::Established, &before, &flow(&before, &after, exit::TRANSMIT, 1000), 1005, &timeouts);
    assert!(look.suspects.is_empty());
    assert_eq!(look.macs.len(), 1);
    assert_eq!((look.counts.tcp, look.counts.established_entries), (1, 1));
    let mut look = Look::default();
    look.visit(Place::Established, &before, &flow(&before, &after, exit::TRANSMIT, 1000), 2000, &timeouts);
    assert_eq!(look.suspects.len(), 1);
    assert!(look.macs.is_empty());
    let mut look = Look::default();
    // Newer than the look at the clock.
    look.visit(Place::Established, &before, &flow(&before, &after, exit::TRANSMIT, 1001), 1000, &timeouts);
    assert!(look.suspects.is_empty());
}

#[test]
fn new_flows_are_given_up_sooner_than_established_ones_and_unanswered_ones_first() {
    let before = key(CLIENT, FRONTEND, 40_000, 80);
    let idle = flow(&before, &key(SNAT, BACKEND, 2000, 8080), exit::TRANSMIT, 1000);
    let timeouts = Timeouts::default();
    let is_over =
        |proto, is_answered, clock| expired(&idle, None, proto, clock, &embryonic(&timeouts, is_answered));
    for proto in [TCP, UDP] {
        assert!(!is_over(proto, false, 1030) && is_over(proto, false, 1031), "protocol {proto}");
        assert!(!is_over(proto, true, 1060) && is_over(proto, true, 1061), "protocol {proto}");
    }
    let reset = Entry { closing: closing::RST, ..idle };
    assert!(expired(&reset, None, TCP, 1011, &embryonic(&timeouts, true)));
    assert!(!is_over(SCTP, true, 1060) && is_over(SCTP, true, 1061));
    let short = Timeouts { udp: 5, tcp_closed: 2, ..timeouts };
    let limits = embryonic(&short, false);
    assert_eq!((limits.udp, limits.tcp_closed), (5, 2), "shorter settings count");
}

#[test]
fn a_look_is_full_once_it_has_removed_all_that_it_may() {
    let look = |removed| Look { counts: FlowCounts { removed, ..FlowCounts::default() }, ..Look::default() };
    assert!(!look(REMOVALS_MAX as u32 - 1).is_full() && look(REMOVALS_MAX as u32).is_full());
}

/// Entries into which a packet comes at the moment when one of them is taken.
#[derive(Default)]
struct Raced {
    entries: HashMap<Key, Entry>,
    comes_for: Option<(Key, u32)>,
}

impl Entries<[u8; 4]> for Raced {
    fn get(&self, key: &Key) -> io::Result<Option<Entry>> {
        Ok(self.entries.get(key).copied())
    }

    fn take(&mut self, key: &Key) -> io::Result<Option<Entry>> {
        let found = self.entries.remove(key);
        Ok(found.map(|flow| match self.comes_for {
            Some((raced, seen)) if raced == *key => Entry { seen, ..flow },
            Some(_) | None => flow,
        }))
    }

    fn put_back(&mut self, key: &Key, flow: &Entry) -> io::Result<()> {
        self.entries.entry(*key).or_insert(*flow);
        Ok(())
    }
}

#[test]
fn a_flow_that_goes_on_while_it_is_removed_is_put_back_whole() {
    let forward_key = Key { proto: UDP, ..key(CLIENT, FRONTEND, 40_000, 80) };
    let forward =
        flow(&forward_key, &Key { proto: UDP, ..key(SNAT, BACKEND, 2000, 8080) }, exit::TRANSMIT, 1000);
    let reply_key = opposite(&forward_key, &forward);
    let mut reply = forward;
    mirror(&forward_key, &forward, kind::REPLY_REMOTE, exit::TRANSMIT, &mut reply);
    let timeouts = Timeouts::default();
    let (entries, clock) =
        (HashMap::from([(forward_key, forward), (reply_key, reply)]), 1000 + timeouts.udp + 1);
    for (comes_for, removed) in [(None, 2), (Some(forward_key), 0), (Some(reply_key), 0)] {
        let comes_for = comes_for.map(|key| (key, clock));
        let mut raced = Raced { entries: entries.clone(), comes_for };
        let answer = judge(&mut raced, &forward_key, &forward, clock, &timeouts).expect("no kernel refuses");
        assert_eq!((answer, raced.entries.len()), (removed, 2 - removed as usize), "{comes_for:?}");
        if let Some((key, seen)) = comes_for {
            assert_eq!(raced.entries[&key].seen, seen, "as it was when the packet had come");
        }
        let mut again = Raced { entries: entries.clone(), comes_for: None };
        assert_eq!(
            judge(&mut again, &reply_key, &reply, clock, &timeouts).expect("as above"),
            0,
            "judged once"
        );
    }
}
