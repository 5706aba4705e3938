//! Connections that are marked because their endpoint is gone.

use xdp_common::{
    frame::tcp,
    net::TCP,
    tables::{Flow, Table, Tables, closing, exit, kind},
    verdict::{Action, Event, Reason},
};

use crate::model::*;

/// Opens a connection by a hook, has it established, and marks it.
fn marked(model: &Model, send: impl Fn(u8) -> xdp_common::verdict::Verdict<Addr>, src: Addr, is_local: bool) {
    for flags in [tcp::SYN, tcp::ACK] {
        let sent = segment(src, 40_000, VIP, HTTP, flags);
        let seen = rewritten(&sent, &send(flags));
        let reply = answer(&seen, tcp::SYN | tcp::ACK);
        let _ = if is_local { model.egress(&reply) } else { model.xdp(&reply) };
    }
    for entry in model.established.borrow().values().filter(|entry| entry.get().kind == kind::FORWARD) {
        entry.set(Flow { exit: entry.get().exit | exit::RESET, ..entry.get() });
    }
}

#[test]
fn a_marked_connection_is_reset_whichever_way_it_went() {
    // At XDP to a backend elsewhere and here, and by the node's own way out to both.
    for (is_local, is_own) in [(false, false), (true, false), (false, true), (true, true)] {
        let model = Model::new();
        let id = model.backend(if is_local { LOCAL } else { REMOTE }, TCP, is_local);
        model.frontend(VIP, TCP, &[id], 0);
        let src = if is_own { NODE } else { CLIENT };
        let send = |flags| {
            let packet = segment(src, 40_000, VIP, HTTP, flags);
            if is_own { model.out(&packet) } else { model.xdp(&packet) }
        };
        marked(&model, send, src, is_local);
        let name = format!("local {is_local}, own {is_own}");
        let key = segment(src, 40_000, VIP, HTTP, 0).key;
        let exit_before = model.flow(Table::Established, &key).map(|flow| flow.exit).unwrap();
        assert_ne!(exit_before & exit::RESET, 0, "{name}: there is a mark");
        assert_eq!(send(tcp::ACK).action, Action::Reject(Reason::EndpointRemoved), "{name}");
        assert_eq!(model.drops(Reason::EndpointRemoved), 1, "{name}");
        assert_eq!(model.events(Event::FlowRenewed), 0, "{name}");
        for flow in model.established.borrow().values() {
            assert_ne!(flow.get().closing & closing::RST, 0, "{name}: both halves are over soon");
        }
        let last = send(tcp::RST | tcp::ACK).action;
        let is_refused = matches!(last, Action::Drop(_) | Action::Reject(_) | Action::Pass);
        assert!(!is_refused, "{name}: a reset is translated, not {last:?}");
        assert_eq!(model.all_drops(), 1, "{name}");
    }
}
