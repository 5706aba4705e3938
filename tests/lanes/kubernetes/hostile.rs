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
    let hostile = [malformed, zero, long];
    for object in &hostile {
        site.server.put(object.clone());
    }
    for number in 0..1_000 {
        site.server.put(json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
            "metadata": {
                "name": format!("marker-{number}"), "namespace": NAMESPACE,
                "labels": {"kubernetes.io/service-name": "marker"}
            },
            "addressType": "IPv4", "ports": [{"name": "at", "protocol": "TCP", "port": 80}],
            "endpoints": [{"addresses": ["10.244.2.11"]}, {"addresses": ["10.244.2.11"]}, {"addresses": ["127.0.0.1"]}]
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
    let log = agent.log();
    let named = log.lines().filter(|line| line.contains(&format!("{NAMESPACE}/malformed"))).count();
    ensure!(named == 1, "named {named} times:\n{log}");
    ensure!(log.lines().all(|line| line.len() < 2_000), "a line for people is short");
    ensure!(agent.metric("watch_bad_objects", "service")? >= 2.0, "bad objects are counted");
    agent.stop()
}
