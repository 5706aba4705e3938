//! The semantics as a whole: objects in, the decision's answers and the maps out.

use std::{net::IpAddr, sync::Arc};

use serde_json::Value;

use super::*;
use crate::objects::{ObjectName, Service, Slice};

mod answers;
mod cleanup;
mod flows;
mod golden;

/// What kube-proxy's own unit tests expect.
const TABLES: &str = include_str!("../cluster/testdata/kubeproxy_flows.json");

/// An output that fails.
struct Broken(io::ErrorKind);

impl Write for Broken {
    fn write(&mut self, _: &[u8]) -> io::Result<usize> {
        Err(self.0.into())
    }

    fn flush(&mut self) -> io::Result<()> {
        Err(self.0.into())
    }
}

#[test]
fn an_output_that_nobody_reads_any_more_ends_it_quietly() {
    let respondent = Respondent::World(Box::new(World::new(Options::default())));
    for line in ["{\"from\": \"10.0.0.2\", \"to\": \"10.96.0.10:80\"}\n", "nonsense\n"] {
        let answer = |kind| unless_closed(answer_all(line.as_bytes(), &respondent, &mut Broken(kind)));
        assert!(answer(io::ErrorKind::BrokenPipe).expect("quiet"), "{line}");
        assert!(answer(io::ErrorKind::StorageFull).is_err(), "{line}");
    }
}

fn service(value: &Value) -> Change {
    let object = serde_json::from_value(value.clone()).expect("a Service");
    Change::Service(name(value), Some(Arc::new(Service::read(&object))))
}

fn slice(value: &Value) -> Change {
    let object = serde_json::from_value(value.clone()).expect("an EndpointSlice");
    Change::Slice(name(value), Some(Arc::new(Slice::read(&object))))
}

fn name(value: &Value) -> ObjectName {
    let text = |field: &str| value["metadata"][field].as_str().unwrap_or_default().to_owned();
    ObjectName { namespace: text("namespace"), name: text("name") }
}

/// The change that takes back another.
fn removal(change: &Change) -> Change {
    match change {
        Change::Service(name, _) => Change::Service(name.clone(), None),
        Change::Slice(name, _) => Change::Slice(name.clone(), None),
        Change::Node(name, _) => Change::Node(name.clone(), None),
        Change::ServiceCidr(name, _) => Change::ServiceCidr(name.clone(), None),
    }
}
