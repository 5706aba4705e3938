//! Objects that should not be.

use anyhow::{Result, ensure};
use serde_json::json;
use xdp_agent_tests::lab::wait_for;

use crate::objects::{NAMESPACE, marker, web};
use crate::setup::{APPLY_TIMEOUT, Site};

#[test]
fn hostile_objects_neither_crash_nor_stall_and_each_is_named_once() -> Result<()> {
    let site = Site::without_pods()?;
    let mut malformed = web();
    malformed["metadata"]["name"] = json!("malformed");
    malformed["spec"]["ports"] = json!("eighty");
    let mut zero = marker(0);
    zero["metadata"]["name"] = json!("zero");
    let mut long = marker(7);
    long["metadata"]["name"] = json!("n".repeat(64 << 10));
    long["spec"]["clusterIP"] = json!("no address");
    long["spec"]["clusterIPs"] = json!(["no address"]);
    let mut unknown = marker(6);
    unknown["metadata"]["name"] = json!("unknown");
    unknown["spec"]["internalTrafficPolicy"] = json!("Sideways");
    let mut hostile = vec![malformed, zero, long, unknown];
    for (name, kind, number, address) in [
        ("every-port", "IPv4", json!(null), "10.244.2.11"),
        ("no-port", "IPv4", json!(0), "10.244.2.11"),
        ("host-name", "FQDN", json!(80), "web.example.org"),
        ("loopback", "IPv4", json!(80), "127.0.0.1"),
        ("cluster-ip", "IPv4", json!(80), "10.96.2.1"),
    ] {
        hostile.push(json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
            "metadata": {
                "name": name, "namespace": NAMESPACE, "labels": {"kubernetes.io/service-name": "nobody"}
            },
            "addressType": kind, "ports": [{"name": "at", "protocol": "TCP", "port": number}],
            "endpoints": [{"addresses": [address]}]
        }));
    }
    for object in &hostile {
        site.server.put(object.clone());
    }
    for number in 0..1_000 {
        let times = if number % 10 == 9 { 2 } else { 1 };
        let endpoints = vec![json!({"addresses": ["10.244.2.11"]}); times];
        site.server.put(json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
            "metadata": {
                "name": format!("marker-{number}"), "namespace": NAMESPACE,
                "labels": {"kubernetes.io/service-name": "marker"}
            },
            "addressType": "IPv4", "ports": [{"name": "at", "protocol": "TCP", "port": 80}],
            "endpoints": endpoints
        }));
    }
    let agent = site.start_agent()?;
    for object in &hostile {
        site.server.put(object.clone());
    }
    site.server.put(marker(8));
    wait_for("the good object", APPLY_TIMEOUT, || {
        let image = site.image()?;
        let served = image.frontends.iter().find(|((at, _), _)| at.port() == 8);
        let Some((_, served)) = served else { anyhow::bail!("{image:?}") };
        ensure!(served.outer.len() == 1, "a thousand slices name one endpoint: {served:?}");
        Ok(())
    })?;
    let slices = ["every-port", "no-port", "host-name", "loopback", "cluster-ip"].map(str::to_owned);
    let twice = (9..1_000).step_by(10).map(|number| format!("marker-{number}"));
    let services = ["malformed", "zero", "nnnn", "unknown"].map(str::to_owned);
    let names: Vec<String> = services.into_iter().chain(slices).chain(twice).collect();
    // They have their turn in the log, so many a second.
    let log = wait_for("each to be named", APPLY_TIMEOUT, || {
        let log = agent.log();
        for name in &names {
            ensure!(lines_about(&log, name) > 0, "{name} is not named");
        }
        Ok(log)
    })?;
    for name in &names {
        let named = lines_about(&log, name);
        ensure!(named == 1, "{name} is named {named} times:\n{log}");
    }
    for (kind, least) in [("invalid", 106.0), ("unsupported", 2.0)] {
        let counted = agent.metric("problems", kind)?;
        ensure!(counted >= least, "{counted} problems are {kind}");
    }
    ensure!(log.lines().all(|line| line.len() < 2_000), "a line for people is short");
    ensure!(agent.metric("watch_bad_objects", "service")? >= 2.0, "bad objects are counted");
    agent.stop()
}

/// How many lines of a log have the name of an object, and not of one with a further digit.
fn lines_about(log: &str, name: &str) -> usize {
    let object = format!("{NAMESPACE}/{name}");
    let is_about = |line: &&str| {
        line.split(&object).skip(1).any(|rest| !rest.starts_with(|next: char| next.is_ascii_digit()))
    };
    log.lines().filter(is_about).count()
}
