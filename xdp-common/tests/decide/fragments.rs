//! What becomes of fragments, by what has been before them.

use xdp_common::{
    fragment::{FragmentKey, FragmentPorts, FragmentTables, SECONDS_MAX, Side, Step, first, step},
    frame::Packet,
    net::{FlowKey, UDP, V4},
    verdict::Event,
};

use crate::model::*;

fn node() -> Model {
    let model = Model::new();
    let id = model.backend(REMOTE, UDP, false);
    model.frontend(VIP, UDP, &[id], 0);
    model
}

fn key(src: Addr, dst: Addr) -> FragmentKey<Addr> {
    FragmentKey { src, dst, id: [1, 2, 0, 0], proto: UDP, zero: [0; 3] }
}

/// A fragment, the first with these ports.
fn fragment(key: &FragmentKey<Addr>, ports: Option<([u8; 2], [u8; 2])>) -> Packet<Addr> {
    let (sport, dport) = ports.unwrap_or_default();
    let key = FlowKey { src: key.src, dst: key.dst, sport, dport, proto: UDP, zero: [0; 3] };
    Packet { key, l4_offset: if ports.is_some() { 34 } else { 0 }, ..Packet::ZERO }
}

#[test]
fn a_later_fragment_gets_the_ports_of_the_first_for_as_long_as_they_are_good() {
    let (model, key) = (node(), key(CLIENT, VIP));
    let mut later = fragment(&key, None);
    for _ in 0..2 {
        assert_eq!(step::<V4, _>(&model, &mut later, &key, Side::Ingress), Step::Hold);
    }
    let mut first = fragment(&key, Some(([9, 9], HTTP)));
    assert_eq!(step::<V4, _>(&model, &mut first, &key, Side::Ingress), Step::Tell, "one waits for it");
    assert_eq!(step::<V4, _>(&model, &mut first, &key, Side::Ingress), Step::Decide, "none does");
    assert_eq!(step::<V4, _>(&model, &mut later, &key, Side::Ingress), Step::Decide);
    assert_eq!((later.key.sport, later.key.dport), ([9, 9], HTTP));
    assert_eq!(model.events(Event::Fragment), 3);
    let mut config = model.config.get();
    config.clock += SECONDS_MAX + 1;
    model.config.set(config);
    assert_eq!(step::<V4, _>(&model, &mut later, &key, Side::Ingress), Step::Hold);
    assert_eq!(step::<V4, _>(&model, &mut first, &key, Side::Ingress), Step::Tell, "of another packet");
}

#[test]
fn a_fragment_whose_first_was_given_up_passes_and_is_counted() {
    let (model, key) = (node(), key(CLIENT, VIP));
    let seen = model.config.get().clock;
    (&model).set_ports(&key, &FragmentPorts::without(first::GIVEN_UP, seen));
    assert_eq!(step::<V4, _>(&model, &mut fragment(&key, None), &key, Side::Ingress), Step::Pass);
    assert_eq!(model.events(Event::FragmentLost), 1);
}

#[test]
fn fragments_that_cannot_be_ours_leave_nothing_behind() {
    let (model, key) = (node(), key(CLIENT, [203, 0, 113, 99]));
    for ports in [Some(([9, 9], HTTP)), None] {
        assert_eq!(step::<V4, _>(&model, &mut fragment(&key, ports), &key, Side::Ingress), Step::Pass);
        assert_eq!(step::<V4, _>(&model, &mut fragment(&key, ports), &key, Side::Egress), Step::Pass);
    }
    assert!(model.fragments.borrow().is_empty());
}

#[test]
fn at_egress_the_ports_say_whose_a_packet_is_and_nothing_is_held() {
    let (model, key) = (node(), key(REMOTE, CLIENT));
    let mut later = fragment(&key, None);
    assert_eq!(step::<V4, _>(&model, &mut later, &key, Side::Egress), Step::Pass);
    let mut other = fragment(&key, Some(([0, 22], [9, 9])));
    assert_eq!(step::<V4, _>(&model, &mut other, &key, Side::Egress), Step::Pass);
    let mut first = fragment(&key, Some((TARGET, [9, 9])));
    assert_eq!(step::<V4, _>(&model, &mut first, &key, Side::Egress), Step::Decide);
    assert_eq!(step::<V4, _>(&model, &mut later, &key, Side::Egress), Step::Decide);
    assert_eq!((later.key.sport, later.key.dport), (TARGET, [9, 9]));
}
