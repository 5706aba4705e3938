//! `explain` says of the running agent's maps what it says of the objects that the agent follows.

use std::collections::BTreeSet;

use anyhow::{Context, Result, ensure};
use serde_json::{Map, Value, json};
use xdp_agent_tests::lab::agent::{METRICS, PIN_DIR, agent_binary};
use xdp_agent_tests::lab::block_on;
use xdp_agent_tests::lab::clients::whoami_once;
use xdp_agent_tests::lab::world::{CLIENT, NODE, World, http_frontends, udp_frontends};

use crate::setup::Setup;

/// With two of four backends on this node, 60 connections miss one by luck about once in 10^7.
const CONNECTIONS: usize = 60;

each_mode!(the_maps_of_the_agent_answer_as_its_objects_do);
fn the_maps_of_the_agent_answer_as_its_objects_do(setup: Setup) -> Result<()> {
    let running = setup.start()?;
    let world = &running.world;
    let questions = world.manifests.directory().join("questions.jsonl");
    let mut text = String::new();
    for from in [CLIENT, NODE] {
        for (targets, proto) in [(http_frontends(), "tcp"), (udp_frontends(), "udp")] {
            for (_, to) in targets {
                text += &format!(
                    "{}\n",
                    json!({ "from": from.to_string(), "to": to.to_string(), "proto": proto })
                );
            }
        }
    }
    std::fs::write(&questions, &text)?;
    let batch = questions.to_string_lossy();
    let directory = world.manifests.directory();
    let directory = directory.to_string_lossy();
    let of_files = explain(world, &["--services", &directory, "--batch", &batch])?;
    let live = ["--live", "--pin-dir", PIN_DIR, "--batch", &batch];
    let of_maps = explain(world, &[&live[..], &["--services", &directory]].concat())?;
    ensure!(of_files == of_maps, "{of_files}\nis not\n{of_maps}");
    // Without objects the agent tells the names; what sort of address each has is in the objects alone.
    let named = explain(world, &[&live[..], &["--metrics-bind-address", &METRICS.to_string()]].concat())?;
    let without_kind = |answers: &str| -> Result<Vec<Value>> {
        answers.lines().map(|line| Ok(Value::from_iter(fields(line)?))).collect()
    };
    ensure!(without_kind(&of_files)? == without_kind(&named)?, "{of_files}\nis not\n{named}");
    ensure!(of_files.lines().count() == text.lines().count());
    for answer in of_files.lines() {
        let answer: Value = serde_json::from_str(answer)?;
        let endpoints = answer["endpoints"].as_array().context("endpoints")?;
        ensure!(answer["verdict"] == "forward" && endpoints.len() == world.pods.len(), "{answer}");
    }
    // Not the ClusterIP: without a detector its clients are not masqueraded, and answers from afar would bypass the node.
    let (_, target) = http_frontends()[1];
    let met = (0..CONNECTIONS).map(|_| Ok(block_on(whoami_once(&world.client, target))?.backend));
    let met = met.collect::<Result<BTreeSet<_>>>()?;
    ensure!(met.len() == world.pods.len(), "explain names all pods, traffic meets {met:?}");
    Ok(())
}

/// The fields of an answer but for the kind of its frontend.
fn fields(answer: &str) -> Result<impl Iterator<Item = (String, Value)>> {
    let fields: Map<String, Value> = serde_json::from_str(answer)?;
    Ok(fields.into_iter().filter(|(name, _)| name != "frontend"))
}

fn explain(world: &World, words: &[&str]) -> Result<String> {
    let mut command = world.bpffs.command(&world.node, agent_binary()?);
    let output = command.args(["explain", "--node", "node"]).args(words).output()?;
    let error = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success() && error.is_empty(), "explain {words:?}: {error}");
    Ok(String::from_utf8(output.stdout)?)
}
