//! One client address that has nearly as many connections to one backend as there are ports.

use std::{
    net::SocketAddr,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, ensure};
use xdp_agent_tests::lab::{agent::Mode, caller::Caller, netns::Namespace, wait_for};

use crate::{
    dual::{PORT, TARGET},
    setup::Setup,
    two_backends::{Place, TwoBackends, VIP, at},
};

/// Processes at either end: none of them may have descriptors for all connections.
const PROCESSES: usize = 4;

#[test]
fn a_client_has_40_000_connections_to_one_backend_here() -> Result<()> {
    // Its own ports are kept, so it has as many as it has.
    hold(Place::Here, 40_000, 10_000)
}

#[test]
fn a_client_has_20_000_connections_to_one_backend_elsewhere() -> Result<()> {
    // They share the 28,976 ports of the node, none of which are the client's.
    hold(Place::Elsewhere, 20_000, 32_768)
}

fn hold(place: Place, connections: usize, first_port: usize) -> Result<()> {
    let world = TwoBackends::without_servers(Setup { mode: Mode::Native, tx_offload: false }, place)?;
    world.publish(&[0])?;
    let agent = world.start_agent(&[])?;
    let mut servers = callers(&world.backends[0])?;
    for server in &mut servers {
        server.crowd_serve((at(0, 2).0, TARGET).into())?;
    }
    let mut clients = callers(&world.client)?;
    let (to, began) = (SocketAddr::from((VIP.0, PORT)), Instant::now());
    let each = connections / PROCESSES;
    at_once(&mut clients, |number, client| client.crowd_open(to, first_port + number * each, each))?;
    println!("{connections} connections in {:?}", began.elapsed());
    wait_for("all of them to be counted", Duration::from_secs(30), || {
        let flows = agent.metric("xdp_agent_flows", r#"state="tcp""#)?;
        ensure!(flows as usize == connections, "{flows} of {connections}");
        Ok(())
    })?;
    // What each client sends comes back by the same connection.
    let asked = at_once(&mut clients, |_, client| client.crowd_ask());
    let drops: Vec<_> =
        agent.metrics()?.into_iter().filter(|(key, value)| key.contains("drop") && *value > 0.0).collect();
    let asked: usize = asked.with_context(|| format!("{drops:?}"))?.into_iter().sum();
    let echoed: usize = at_once(&mut servers, |_, server| server.crowd_echoed())?.into_iter().sum();
    ensure!((asked, echoed) == (connections, connections), "{asked} and {echoed} of {connections}");
    agent.stop()
}

fn callers(namespace: &Namespace) -> Result<Vec<Caller>> {
    let binary = Path::new(env!("CARGO_BIN_EXE_caller"));
    (0..PROCESSES).map(|_| Caller::start_beside(binary, namespace)).collect()
}

/// Has all callers do something side by side.
fn at_once<T: Send>(
    callers: &mut [Caller],
    work: impl Fn(usize, &mut Caller) -> Result<T> + Sync,
) -> Result<Vec<T>> {
    thread::scope(|scope| {
        let work = &work;
        let started: Vec<_> = callers
            .iter_mut()
            .enumerate()
            .map(|(number, caller)| scope.spawn(move || work(number, caller)))
            .collect();
        let done = started.into_iter().map(|done| done.join().map_err(|_| anyhow!("a thread panicked"))?);
        done.collect::<Result<Vec<T>>>().context("one of the callers")
    })
}
