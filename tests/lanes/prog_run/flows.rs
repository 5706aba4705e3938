//! A flow to a backend elsewhere, driven from both ends; every frame of it is checked.

use xdp_common::verdict::{
    Counter::{self, Event, SnatAttempt},
    Event as E,
};

use crate::{
    frames::{ACK, Frame, Mac, SYN, Socket, source_port},
    node::{Action, Addr, BESIDE_MAC, GATEWAY_MAC, NODE, NODE_TOO, Node, SNAT_PORTS, TARGET},
};

/// How frames toward a backend leave the node.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Way {
    pub(crate) action: Action,
    /// What counts it.
    pub(crate) event: E,
    pub(crate) mac: (Mac, Mac),
    /// Address of the node as the backend sees it.
    pub(crate) snat: Addr,
}

/// The opener of a flow, as the client sends it and as the backend sees it.
#[derive(Clone, Debug)]
pub(crate) struct Remote {
    pub(crate) opener: Frame,
    pub(crate) seen: Frame,
    pub(crate) way: Way,
}

impl Node {
    /// Out of the interface that clients come in by, to the gateway.
    pub(crate) fn uplink(&self) -> Way {
        Way { action: Action::Transmit, event: E::Transmitted, mac: (self.mac, GATEWAY_MAC), snat: NODE }
    }

    /// Out of the second interface, to the neighbour there.
    pub(crate) fn beside(&self) -> Way {
        Way {
            action: Action::Redirect,
            event: E::Redirected,
            mac: (self.mac_too, BESIDE_MAC),
            snat: NODE_TOO,
        }
    }

    /// Opens a flow by the gateway and finds a source port at the first attempt.
    pub(crate) fn open(&self, name: &str, opener: &Frame, backend: Addr) -> Remote {
        self.open_by(name, opener, backend, self.uplink(), 0)
    }

    /// Opens a flow and finds a source port at this attempt.
    pub(crate) fn open_by(
        &self,
        name: &str,
        opener: &Frame,
        backend: Addr,
        way: Way,
        attempt: u32,
    ) -> Remote {
        let sent = opener.bytes();
        let before = self.maps.established_entries();
        // The port is the program's choice within the range; it is read from the frame, and everything else is known.
        let outcome = self.run(self.entry, &sent);
        let port = source_port(&outcome.frame);
        assert!((SNAT_PORTS.0..=SNAT_PORTS.1).contains(&port), "{name}: source port {port}");
        let own = opener.src.1;
        assert!(
            attempt != 0 || !(SNAT_PORTS.0..=SNAT_PORTS.1).contains(&own) || port == own,
            "{name}: the client's own port {own} became {port}"
        );
        let flow =
            Remote { seen: toward(opener, (way.snat, port), backend, way), opener: opener.clone(), way };
        let counts = [Event(E::FlowNew), SnatAttempt(attempt), Event(way.event)];
        outcome.check(name, way.action, &flow.seen.bytes(), &counts);
        assert_eq!(self.maps.established_entries(), before, "{name}: a new flow is in the evicting table");
        flow
    }

    /// Takes a flow that was opened through its handshake.
    pub(crate) fn establish(&self, name: &str, flow: &Remote) {
        flow.answers(self, &format!("{name}: the answer"), SYN | ACK, &[]);
        flow.sends(self, &format!("{name}: the handshake's end"), ACK, &[Event(E::FlowEstablished)]);
    }

    /// Opens and establishes a flow by the gateway.
    pub(crate) fn connect(&self, name: &str, opener: &Frame, backend: Addr) -> Remote {
        let flow = self.open(name, opener, backend);
        self.establish(name, &flow);
        flow
    }
}

impl Remote {
    /// Checks a packet of the client; its own event is counted besides those given.
    pub(crate) fn sends(&self, node: &Node, name: &str, flags: u8, counts: &[Counter]) {
        let sent = self.opener.flags(flags);
        self.forwards(node, name, &sent, counts);
    }

    /// Checks any packet of the client.
    pub(crate) fn forwards(&self, node: &Node, name: &str, sent: &Frame, counts: &[Counter]) {
        let expected = toward(sent, self.seen.src, self.seen.dst.0, self.way);
        let counts = [counts, &[Event(self.way.event)]].concat();
        node.check(name, node.entry, &sent.bytes(), self.way.action, &expected.bytes(), &counts);
    }

    /// Checks a packet of the backend.
    pub(crate) fn answers(&self, node: &Node, name: &str, flags: u8, counts: &[Counter]) {
        let sent = self.answer(node).flags(flags);
        self.returns(node, name, &sent, counts);
    }

    /// Checks any packet of the backend.
    pub(crate) fn returns(&self, node: &Node, name: &str, sent: &Frame, counts: &[Counter]) {
        let expected = sent.with(|frame| {
            frame.mac = (node.mac, GATEWAY_MAC);
            frame.ttl -= 1;
            (frame.src, frame.dst) = (self.opener.dst, self.opener.src);
        });
        let (action, event) = if node.from == node.ifindex {
            (Action::Transmit, E::Transmitted)
        } else {
            (Action::Redirect, E::Redirected)
        };
        let counts = [counts, &[Event(event)]].concat();
        node.check(name, node.entry, &sent.bytes(), action, &expected.bytes(), &counts);
    }

    /// What the backend answers to the opener.
    pub(crate) fn answer(&self, node: &Node) -> Frame {
        let station = if node.from == node.ifindex { node.mac } else { node.mac_too };
        self.opener.with(|frame| {
            frame.mac = (GATEWAY_MAC, station);
            (frame.src, frame.dst) = (self.seen.dst, self.seen.src);
        })
    }
}

/// A packet of the client as the backend sees it.
fn toward(sent: &Frame, src: Socket, backend: Addr, way: Way) -> Frame {
    sent.with(|frame| {
        frame.mac = way.mac;
        frame.ttl -= 1;
        (frame.src, frame.dst) = (src, (backend, TARGET));
    })
}
