//! A thousand changes, and whatever an API server may do meanwhile.

use std::net::{Ipv4Addr, SocketAddrV4};

use anyhow::{Result, ensure};
use xdp_agent_tests::lab::api_server::{Gone, Injection, Resource};
use xdp_agent_tests::lab::wait_for;

use crate::image::Image;
use crate::objects::{Random, marker, node, node2, step};
use crate::setup::{APPLY_TIMEOUT, Site};

/// Changes in all, and between two looks at the maps.
const CHANGES: usize = 1_000;
const CHUNK: usize = 10;

/// What a fresh agent makes of the objects of a server.
fn fresh_image(site: &Site) -> Result<Image> {
    let fresh = Site::without_pods()?;
    fresh.server.delete_all();
    for resource in Resource::ALL {
        for object in site.server.objects(resource) {
            fresh.server.put(object);
        }
    }
    let agent = fresh.start_agent()?;
    let image = fresh.image()?;
    agent.stop()?;
    Ok(image)
}

/// Does one of the things that a server may do at any time.
fn disturb(site: &mut Site, random: &mut Random) -> Result<()> {
    let server = &mut site.server;
    let resource = Resource::ALL[random.below(4) as usize];
    match random.below(8) {
        0 => server.inject(None, Injection::Disconnect),
        1 => server.inject(Some(resource), Injection::End),
        2 => {
            server.inject(Some(resource), Injection::Bytes(br#"{"type":"ADDED","obj"#.to_vec()));
            server.inject(Some(resource), Injection::Disconnect);
        }
        3 => {
            server.forget(Gone::Event);
            server.inject(None, Injection::End);
        }
        4 => {
            server.forget(Gone::Status);
            server.inject(Some(resource), Injection::End);
        }
        5 => server.inject(Some(resource), Injection::Error(410)),
        6 => server.inject(Some(resource), Injection::Bytes(b"no event\n".to_vec())),
        _ => {
            server.go()?;
            server.back()?;
        }
    }
    Ok(())
}

/// Waits until what happened so far is in the maps, but for kinds that are held back.
fn settle(site: &Site, round: usize) -> Result<()> {
    let at = SocketAddrV4::new(Ipv4Addr::new(10, 96, 2, 1), 1 + round as u16);
    site.server.put(marker(at.port()));
    wait_for("the marker in the maps", APPLY_TIMEOUT, || {
        ensure!(Image::has(&site.world.bpffs, at, 6)?, "{at} is not served");
        Ok(())
    })
}

/// Changes, disturbances and held kinds in an order of their own; whether it disturbs is the caller's choice.
fn churn(seed: u64, disturbs: bool) -> Result<()> {
    let mut site = Site::without_pods()?;
    let mut random = Random::new(seed);
    let agent = site.start_agent()?;
    let empty = site.image()?;
    for round in 0..CHANGES / CHUNK {
        // Kinds come in any order: one of them late, or none.
        let held = Resource::ALL[random.below(4) as usize];
        site.server.hold(held, random.percent(50));
        for _ in 0..CHUNK {
            site.apply(step(&mut random));
            if disturbs && random.percent(2) {
                disturb(&mut site, &mut random)?;
            }
        }
        if held != Resource::Services && random.percent(40) {
            settle(&site, round)?;
        }
        site.server.hold(held, false);
    }
    let fresh = fresh_image(&site)?;
    ensure!(fresh.frontends.len() > 30, "the changes leave too little to compare: {fresh:?}");
    let wanted = fresh.clone().for_new_flows();
    wait_for("the maps to be as a fresh agent has them", APPLY_TIMEOUT, || {
        let image = site.image()?;
        ensure!(image.takes_what(&fresh), "the gates do not take everything");
        let image = image.for_new_flows();
        ensure!(image == wanted, "they are not:\n{}", image.difference(&wanted));
        Ok(())
    })?;
    site.server.delete_all();
    site.server.put(node(""));
    site.server.put(node2());
    // Also of what was kept for flows, once the agent has found that there are none. It is asked first: images cost more.
    wait_for("no backends to be left", APPLY_TIMEOUT, || {
        let left = agent.metric("table_entries", "\"backends\"")?;
        ensure!(left == 0.0, "{left} are");
        Ok(())
    })?;
    wait_for("the maps to be empty again", APPLY_TIMEOUT, || {
        let image = site.image()?;
        ensure!(image == empty, "they are not:\n{}", image.difference(&empty));
        Ok(())
    })?;
    agent.stop()
}

#[test]
fn a_thousand_changes_end_where_a_fresh_agent_begins() -> Result<()> {
    churn(1, false)
}

#[test]
fn a_thousand_changes_between_disconnects_and_new_lists_end_where_a_fresh_agent_begins() -> Result<()> {
    churn(2, true)?;
    churn(3, true)
}
