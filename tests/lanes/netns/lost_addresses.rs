//! Addresses of the node that go while flows come from them.

use std::{net::IpAddr, time::Duration};

use anyhow::{Context, Result, ensure};
use xdp_agent_tests::lab::wait_for;

use crate::{
    dual,
    setup::Setup,
    two_backends::{Place, TwoBackends, VIP, at},
};

/// The agent looks every ten seconds.
const LIMIT: Duration = Duration::from_secs(25);
const ANSWER_TIMEOUT: Duration = Duration::from_millis(200);

each_mode!(flows_of_udp_begin_anew_when_the_node_has_their_address_no_more, false);
fn flows_of_udp_begin_anew_when_the_node_has_their_address_no_more(setup: Setup) -> Result<()> {
    let world = TwoBackends::build(setup, Place::Elsewhere)?;
    world.publish(&[0])?;
    let agent = world.start_agent(&[])?;
    let [v4, v6] = dual::each(VIP).map(|to| dual::socket(&world.client, to, ANSWER_TIMEOUT));
    let sockets = [v4?, v6?];
    let ask = |number: usize| -> Result<()> {
        sockets[number].send(b"?")?;
        sockets[number].recv(&mut [0]).map(drop).with_context(|| format!("no answer to socket {number}"))
    };
    for number in [0, 1, 0, 1] {
        ask(number)?;
    }
    // The network has another address for the node; backends know it without a gateway.
    let (before, after) = (at(0, 1), at(0, 9));
    for (old, new, prefix) in
        [(IpAddr::from(before.0), IpAddr::from(after.0), 24), (before.1.into(), after.1.into(), 64)]
    {
        world.node.forget_address("in0", old)?;
        world.node.address("in0", new, prefix)?;
    }
    // Sooner or later they ask who has the old one.
    world.backends[0].flush_neighbours()?;
    for number in [0, 1] {
        // The client does not pause.
        wait_for("the flow to begin anew", LIMIT, || ask(number))?;
        for _ in 0..3 {
            ask(number)?;
        }
    }
    ensure!(agent.metric("xdp_agent_events_total", r#"event="flow_renewed""#)? >= 2.0);
    agent.stop()
}
