//! An endpoint behind a managed interface reaches itself by its own Service, and sees the node.

use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::{
    dual,
    setup::Setup,
    two_backends::{Place, Talk, TwoBackends, VIP},
};

const LONG: usize = 3_000;
const PATIENCE: Duration = Duration::from_secs(5);

each_mode_and_offload!(an_endpoint_reaches_itself_by_a_managed_interface);
fn an_endpoint_reaches_itself_by_a_managed_interface(setup: Setup) -> Result<()> {
    for place in [Place::Here, Place::Elsewhere] {
        let world = TwoBackends::build(setup, place)?;
        world.publish(&[0])?;
        let agent = world.start_agent(&[])?;
        let endpoint = &world.backends[0];
        for vip in dual::each(VIP) {
            for _ in 0..3 {
                for mut talk in [Talk::tcp(endpoint, vip)?, Talk::udp(endpoint, vip)?] {
                    for _ in 0..3 {
                        let answered = talk.ask().with_context(|| format!("{vip}, {place:?}"))?;
                        ensure!(answered == 0);
                    }
                }
            }
            let socket = dual::socket(endpoint, vip, PATIENCE)?;
            socket.send(&[7; LONG])?;
            let length =
                socket.recv(&mut [0; 16]).with_context(|| format!("{LONG} bytes to {vip}, {place:?}"))?;
            ensure!(length == 1);
        }
        agent.stop()?;
    }
    Ok(())
}
