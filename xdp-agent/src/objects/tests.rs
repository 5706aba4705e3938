//! What reading keeps of objects, beyond what `cluster` shows of it.

use serde_json::{Value, json};

use super::*;
use crate::cluster::wanted::Ip6;

fn slice(object: Value) -> Slice {
    Slice::read(&serde_json::from_value(object).unwrap())
}

#[test]
fn a_slice_keeps_each_name_once() {
    let endpoint = |ip: &str, node: &str, zones: &[&str]| {
        let zones: Vec<Value> = zones.iter().map(|zone| json!({"name": zone})).collect();
        json!({"addresses": [ip], "nodeName": node, "hints": {"forZones": zones}})
    };
    let slice = slice(json!({
        "metadata": {"labels": {"kubernetes.io/service-name": "web"}},
        "addressType": "IPv4",
        "endpoints": [
            endpoint("10.0.0.1", "node-1", &["a", "b"]), endpoint("10.0.0.2", "node-2", &["b"]),
            endpoint("10.0.0.3", "node-1", &["a", "b"]), {"addresses": ["10.0.0.4"]},
        ],
    }));
    let names = ["node-1", "a", "b", "node-2"].map(|name| slice.name(name).unwrap());
    let nodes: Vec<NameId> = slice.v4.iter().map(|endpoint| endpoint.node).collect();
    assert_eq!(nodes, [names[0], names[3], names[0], NameId::default()]);
    let zones: Vec<_> = slice.v4.iter().map(|endpoint| slice.hints(endpoint.zone_hints)).collect();
    assert_eq!(zones, [&[names[1], names[2]][..], &[names[2]], &[names[1], names[2]], &[]]);
    assert_eq!(slice.v4[0].zone_hints, slice.v4[2].zone_hints);
    for absent in ["", "node", "node-", "1a", "c", "node-1a"] {
        assert_eq!(slice.name(absent), None, "{absent:?}");
    }
}

#[test]
fn an_endpoint_is_small() {
    assert_eq!(size_of::<SliceEndpoint<[u8; 4]>>(), 20);
    assert_eq!(size_of::<SliceEndpoint<Ip6>>(), 32);
}

#[test]
fn a_slice_says_when_what_it_tells_happened() {
    let trigger = |text: &str| {
        slice(json!({
            "metadata": {
                "labels": {"kubernetes.io/service-name": "web"},
                "annotations": {"endpoints.kubernetes.io/last-change-trigger-time": text},
            },
            "addressType": "IPv4",
            "endpoints": [],
        }))
        .trigger_ms
    };
    assert_eq!(trigger("2026-01-01T00:00:00Z"), Some(1_767_225_600_000));
    assert_eq!(trigger("2026-01-01T01:00:00.25+01:00"), Some(1_767_225_600_250));
    assert_eq!(trigger("yesterday"), None);
}

#[test]
fn names_of_objects_read_as_kubernetes_writes_them() {
    assert_eq!(ObjectName::new("shop", "web").to_string(), "shop/web");
    assert_eq!(ObjectName::new("", "here").to_string(), "here");
}

#[test]
fn a_quoted_text_is_no_longer_than_a_line() {
    assert_eq!(quoted("a\nb"), "\"a\\nb\"");
    assert_eq!(quoted(&"ä".repeat(81)), format!("\"{}\" and so on", "ä".repeat(80)));
}
