//! Flows whose backend goes: UDP leaves it at once, TCP stays, whether or not an agent ran when it went.

use std::{io::ErrorKind, time::Duration};

use anyhow::{Context, Result, ensure};
use xdp_agent_tests::lab::wait_for;

use crate::{
    dual::each,
    setup::Setup,
    two_backends::{Place, Talk, TwoBackends, VIP},
};

/// How long the agent may take to see a change of a file and to apply it.
const APPLIED_TIMEOUT: Duration = Duration::from_secs(5);
/// Datagrams that make a flow an established one, and then some.
const DATAGRAMS: usize = 5;

/// What talks to the first backend when that goes.
struct Flows {
    udp: Vec<Talk>,
    tcp: Vec<Talk>,
}

impl Flows {
    /// Opens flows in both families while the first backend serves alone, each established.
    fn open(world: &TwoBackends) -> Result<Self> {
        let [mut udp, mut tcp] = [Vec::new(), Vec::new()];
        for vip in each(VIP) {
            udp.push(Talk::udp(&world.client, vip)?);
            tcp.push(Talk::tcp(&world.client, vip)?);
        }
        let mut flows = Self { udp, tcp };
        for talk in flows.udp.iter_mut().chain(&mut flows.tcp) {
            for _ in 0..DATAGRAMS {
                ensure!(talk.ask()? == 0, "only the first backend serves");
            }
        }
        Ok(flows)
    }

    /// Fails unless every UDP flow goes to the second backend now, and every TCP connection on to the first.
    fn have_parted(&mut self) -> Result<()> {
        for udp in &mut self.udp {
            // The first backend would answer still: nothing but the agent keeps a datagram from it.
            wait_for("UDP to leave the backend that is gone", APPLIED_TIMEOUT, || {
                ensure!(udp.ask()? == 1, "the first backend answers");
                Ok(())
            })?;
            for _ in 0..DATAGRAMS {
                ensure!(udp.ask()? == 1, "a datagram went back to the first backend");
            }
        }
        self.tcp_goes_on()
    }

    /// Fails unless every TCP connection is still answered by the first backend.
    fn tcp_goes_on(&mut self) -> Result<()> {
        for tcp in &mut self.tcp {
            ensure!(tcp.ask().context("a connection to a backend that is gone")? == 0);
        }
        Ok(())
    }
}

each_mode!(udp_leaves_a_backend_that_goes_and_tcp_stays);
fn udp_leaves_a_backend_that_goes_and_tcp_stays(setup: Setup) -> Result<()> {
    for place in [Place::Elsewhere, Place::Here] {
        let world = TwoBackends::build(setup, place)?;
        world.publish(&[0])?;
        let agent = world.start_agent(&[])?;
        let mut flows = Flows::open(&world)?;
        world.publish(&[1])?;
        flows.have_parted().with_context(|| format!("{place:?}"))?;
        // No endpoint at all: who connects is refused, and so is who has talked before.
        world.publish(&[])?;
        for udp in &mut flows.udp {
            wait_for("UDP without an endpoint to be refused", APPLIED_TIMEOUT, || {
                let answer = udp.ask();
                let is_refused =
                    answer.as_ref().is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused);
                ensure!(is_refused, "{answer:?}");
                Ok(())
            })?;
        }
        flows.tcp_goes_on()?;
        world.publish(&[1])?;
        flows.have_parted().context("with an endpoint again")?;
        // No Service at all: nothing answers under its address.
        world.unpublish()?;
        for udp in &mut flows.udp {
            wait_for("UDP to leave a Service that is gone", APPLIED_TIMEOUT, || {
                ensure!(udp.ask().is_err(), "the second backend answers");
                Ok(())
            })?;
        }
        flows.tcp_goes_on()?;
        agent.stop()?;
    }
    Ok(())
}

each_mode!(udp_leaves_a_backend_that_went_while_no_agent_ran_and_tcp_stays);
fn udp_leaves_a_backend_that_went_while_no_agent_ran_and_tcp_stays(setup: Setup) -> Result<()> {
    for place in [Place::Elsewhere, Place::Here] {
        let world = TwoBackends::build(setup, place)?;
        world.publish(&[0])?;
        let agent = world.start_agent(&[])?;
        let mut flows = Flows::open(&world)?;
        agent.kill()?;
        world.publish(&[1])?;
        for udp in &mut flows.udp {
            ensure!(udp.ask()? == 0, "nobody is there to say that the first backend is gone");
        }
        let agent = world.start_agent(&[])?;
        flows.have_parted().with_context(|| format!("{place:?}"))?;
        agent.stop()?;
    }
    Ok(())
}

each_mode!(a_connection_to_a_backend_that_goes_is_reset_where_that_is_asked_for);
fn a_connection_to_a_backend_that_goes_is_reset_where_that_is_asked_for(setup: Setup) -> Result<()> {
    const RESET: [&str; 1] = ["--reset-on-endpoint-removal"];
    for place in [Place::Elsewhere, Place::Here] {
        let world = TwoBackends::build(setup, place)?;
        world.publish(&[0])?;
        let agent = world.start_agent(&RESET)?;
        let (first, second) = (Flows::open(&world)?, Flows::open(&world)?);
        world.publish(&[1])?;
        are_reset(first.tcp)?;
        ensure!(agent.metric("xdp_agent_drops_total", r#"reason="endpoint_removed""#)? >= 2.0);
        // What goes on without an agent is found by the next.
        agent.kill()?;
        let agent = world.start_agent(&RESET)?;
        are_reset(second.tcp)?;
        let mut others =
            each(VIP).map(|vip| Talk::tcp(&world.client, vip)).into_iter().collect::<Result<Vec<_>>>()?;
        for _ in 0..DATAGRAMS {
            for other in &mut others {
                ensure!(other.ask().context("a connection to the backend that serves")? == 1);
            }
        }
        agent.stop()?;
    }
    Ok(())
}

/// Fails unless every connection is reset before long.
fn are_reset(connections: Vec<Talk>) -> Result<()> {
    for mut tcp in connections {
        wait_for("a connection to be reset", APPLIED_TIMEOUT, || {
            let answer = tcp.ask();
            let is_reset = answer.as_ref().is_err_and(|error| error.kind() == ErrorKind::ConnectionReset);
            ensure!(is_reset, "{answer:?}");
            Ok(())
        })?;
    }
    Ok(())
}
