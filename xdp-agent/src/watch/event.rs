//! Events that the agent leaves on objects, as kube-proxy does.

use std::time::Duration;

use k8s_openapi::{
    api::{core::v1::ObjectReference, events::v1},
    apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta},
    jiff::Timestamp,
};
use tracing::debug;

use super::client::{Access, Connection};
use crate::objects::ObjectName;

/// Longest time for an event to be taken.
const TIMEOUT: Duration = Duration::from_secs(10);
/// Who reports.
const COMPONENT: &str = "xdp-agent";
/// The API server refuses longer notes.
const NOTE_BYTES_MAX: usize = 1024;

/// Something worth an event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Notice {
    /// The agent of this node has started.
    Starting,
    /// The health-check node port of a Service cannot be served, and why.
    HealthCheckPort {
        /// The Service.
        service: ObjectName,
        /// What went wrong.
        message: String,
    },
}

/// Posts an event. One that the API server does not take is forgotten: nothing depends on it.
pub async fn event(access: &Access, node: &str, notice: &Notice) {
    if let Err(error) = post(access, node, notice).await {
        debug!(error = format!("{error:#}"), ?notice, "the event is not taken");
    }
}

async fn post(access: &Access, node: &str, notice: &Notice) -> anyhow::Result<()> {
    let connection = Connection::open(access.clone()).await?;
    let event = made(node, notice, Timestamp::now());
    let namespace = event.metadata.namespace.as_deref().unwrap_or_default();
    let path = format!("/apis/events.k8s.io/v1/namespaces/{namespace}/events");
    connection.create(path, serde_json::to_vec(&event)?, TIMEOUT).await?;
    Ok(())
}

fn made(node: &str, notice: &Notice, now: Timestamp) -> v1::Event {
    let (type_, reason, action, note, regarding) = match notice {
        // kube-proxy gives the names as UIDs too; `kubectl describe` finds the events of a Node by that.
        Notice::Starting => ("Normal", "Starting", "StartKubeProxy", "", reference("Node", "", node, node)),
        Notice::HealthCheckPort { service, message } => (
            "Warning",
            "FailedToStartServiceHealthcheck",
            "Listen",
            message.as_str(),
            reference("Service", &service.namespace, &service.name, &service.to_string()),
        ),
    };
    let namespace = regarding.namespace.clone().unwrap_or_else(|| "default".to_owned());
    let name = regarding.name.as_deref().unwrap_or_default();
    v1::Event {
        metadata: ObjectMeta {
            name: Some(format!("{name}.{:x}", now.as_nanosecond())),
            namespace: Some(namespace),
            ..ObjectMeta::default()
        },
        type_: Some(type_.to_owned()),
        reason: Some(reason.to_owned()),
        action: Some(action.to_owned()),
        note: Some(note[..note.floor_char_boundary(NOTE_BYTES_MAX)].to_owned()),
        regarding: Some(regarding),
        reporting_controller: Some(COMPONENT.to_owned()),
        reporting_instance: Some(format!("{COMPONENT}-{node}")),
        event_time: Some(MicroTime(now)),
        ..v1::Event::default()
    }
}

fn reference(kind: &str, namespace: &str, name: &str, uid: &str) -> ObjectReference {
    ObjectReference {
        api_version: Some("v1".to_owned()),
        kind: Some(kind.to_owned()),
        namespace: Some(namespace.to_owned()).filter(|namespace| !namespace.is_empty()),
        name: Some(name.to_owned()),
        uid: Some(uid.to_owned()),
        ..ObjectReference::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_say_what_those_of_kube_proxy_say() {
        let now: Timestamp = "2026-11-20T12:22:50.123456789Z".parse().expect("a time");
        let start = serde_json::to_value(made("node-a", &Notice::Starting, now)).expect("plain data");
        assert_eq!(start["reason"], "Starting");
        assert_eq!(start["action"], "StartKubeProxy");
        assert_eq!(start["type"], "Normal");
        assert_eq!(start["regarding"]["kind"], "Node");
        assert_eq!(start["regarding"]["uid"], "node-a");
        assert_eq!(start["metadata"]["namespace"], "default");
        assert_eq!(start["reportingInstance"], "xdp-agent-node-a");
        assert_eq!(start["eventTime"], "2026-11-20T12:22:50.123456Z");
        let service = ObjectName { namespace: "shop".to_owned(), name: "web".to_owned() };
        let notice = Notice::HealthCheckPort { service, message: "é".repeat(1024) };
        let warning = serde_json::to_value(made("node-a", &notice, now)).expect("plain data");
        assert_eq!(warning["reason"], "FailedToStartServiceHealthcheck");
        assert_eq!(warning["metadata"]["namespace"], "shop");
        assert_eq!(warning["regarding"]["name"], "web");
        assert_eq!(warning["note"].as_str().map(str::len), Some(1024));
    }
}
