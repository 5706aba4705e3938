//! From a decision to what is done: a hook does it with the fields of the flow where they lie, or with a copy of them.

use crate::{
    conntrack::rewrite,
    frame::Packet,
    net::Family,
    tables::{Flow, Tables, exit},
    verdict::{Action, Counter, Event, Hop, Verdict},
};

/// What a hook does with a decision.
pub trait Apply<A> {
    /// What comes of it.
    type Done;

    /// A packet passes, or is dropped, whatever its flow; what is to be counted of it is counted already.
    fn alone(self, action: Action) -> Self::Done;
    /// This becomes of a packet, as its flow says; it is to be counted ([`counted`]).
    fn by_flow(self, action: Action, flow: &Flow<A>) -> Self::Done;
}

/// Makes a verdict of a decision.
pub(super) struct Told<'p, F: Family, T> {
    pub(super) tables: T,
    pub(super) packet: &'p Packet<F::Addr>,
}

impl<F: Family, T: Tables<F>> Apply<F::Addr> for Told<'_, F, T> {
    type Done = Verdict<F::Addr>;

    #[inline(always)] // moves only
    fn alone(self, action: Action) -> Verdict<F::Addr> {
        Verdict { action, ..Verdict::PASS }
    }

    #[inline(always)] // moves, and what it counts
    fn by_flow(self, action: Action, flow: &Flow<F::Addr>) -> Verdict<F::Addr> {
        let Self { tables, packet } = self;
        // Counted where it is known which action it is: behind a common place, the reason that only some have would be moved
        // undefined, and the verifier refuses that.
        match action {
            Action::Pass => Verdict::PASS,
            Action::Drop(_) | Action::Reject(_) => {
                Verdict { action: counted(tables, packet, action, flow), mtu: flow.mtu, ..Verdict::PASS }
            }
            Action::Stack | Action::Transmit | Action::Redirect | Action::Tunnel => Verdict {
                action: counted(tables, packet, action, flow),
                rewrite: rewrite(flow),
                hop: Hop { dmac: flow.dmac, smac: flow.smac, ifindex: flow.ifindex },
                mtu: flow.mtu,
            },
        }
    }
}

/// Counts what becomes of a packet, and says it.
#[inline(always)] // array increments
pub fn counted<F: Family, T: Tables<F>>(
    tables: T,
    packet: &Packet<F::Addr>,
    action: Action,
    flow: &Flow<F::Addr>,
) -> Action {
    let counter = match action {
        Action::Pass => return Action::Pass,
        Action::Drop(reason) | Action::Reject(reason) => {
            tables.count(Counter::Drop(reason));
            // The station that a tunnelled packet came from is not known any more: nothing can be sent back there.
            return if packet.is_tunnelled { Action::Drop(reason) } else { action };
        }
        Action::Stack => match flow.exit {
            exit::LOCAL => Counter::Event(Event::Delivered),
            _ => Counter::Event(Event::SlowPath),
        },
        Action::Transmit => Counter::Event(Event::Transmitted),
        Action::Redirect => Counter::Event(Event::Redirected),
        Action::Tunnel => Counter::Event(Event::Tunnelled),
    };
    tables.count(counter);
    tables.account(flow.service, packet.total_len);
    action
}
