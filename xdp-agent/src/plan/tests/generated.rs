//! Generated histories of a cluster, applied to the model.

use proptest::prelude::*;

use super::*;

#[derive(Clone, Debug)]
enum Event {
    /// A service has these endpoints; a bit mask each for chosen, on this node, and still serving.
    Set {
        service: u8,
        policies: u8,
        chosen: u8,
        local: u8,
        serving: u8,
        address: u8,
    },
    Remove {
        service: u8,
    },
    Connect {
        choice: u32,
    },
    Disconnect {
        choice: u32,
    },
    Collect,
    Restart,
    Wait {
        ms: u64,
    },
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        6 => (0u8..5, 0u8..4, any::<u8>(), any::<u8>(), any::<u8>(), 0u8..8).prop_map(
            |(service, policies, chosen, local, serving, address)|
            Event::Set { service, policies, chosen: chosen & 0x3f, local, serving, address }),
        2 => (0u8..5).prop_map(|service| Event::Remove { service }),
        3 => any::<u32>().prop_map(|choice| Event::Connect { choice }),
        2 => any::<u32>().prop_map(|choice| Event::Disconnect { choice }),
        2 => Just(Event::Collect),
        1 => Just(Event::Restart),
        2 => (0u64..2_500).prop_map(|ms| Event::Wait { ms }),
    ]
}

fn service_port(service: u8, policies: u8, chosen: u8, local: u8, serving: u8, address: u8) -> ServicePort {
    let endpoints = |mask: u8| -> Vec<Endpoint> {
        let bits = (0..8).filter(move |bit| mask >> bit & 1 == 1);
        bits.map(|bit| Endpoint { local: local >> bit & 1 == 1, ..endpoint(bit) }).collect()
    };
    let policies: &[Policy] = match policies {
        0 => &[Policy::Cluster],
        1 => &[Policy::Local],
        2 => &[Policy::Cluster, Policy::Local],
        _ => &[Policy::Cluster, Policy::Local, Policy::Cluster],
    };
    let mut port = port(service, policies, &endpoints(chosen), &endpoints(chosen & local));
    port.serving = endpoints(serving);
    // Some addresses are claimed by several services in turn; whoever has one also has the service's number elsewhere.
    for frontend in &mut port.frontends {
        frontend.addr[3] = address;
    }
    port
}

/// Keeps every address with the service that comes first, as `cluster` does.
fn settle(services: &HashMap<u8, ServicePort>) -> Desired {
    let mut ports: Vec<_> = services.values().cloned().collect();
    ports.sort_by(|a, b| a.name.cmp(&b.name));
    let mut taken = HashSet::new();
    for port in &mut ports {
        port.frontends.retain(|frontend| taken.insert((frontend.addr, frontend.port)));
    }
    ports.retain(|port| !port.frontends.is_empty());
    wish(ports)
}

fn run(limits: Limits, events: Vec<Event>) {
    let (mut plan, mut model) = (Plan::new(limits), Model::new(limits));
    let mut services: HashMap<u8, ServicePort> = HashMap::new();
    let mut before = wish([]);
    let mut now = 0;
    for event in events {
        now += 7;
        match event {
            Event::Set { service, policies, chosen, local, serving, address } => {
                services.insert(service, service_port(service, policies, chosen, local, serving, address));
            }
            Event::Remove { service } => {
                services.remove(&service);
            }
            Event::Connect { choice } => model.connect(choice),
            Event::Disconnect { choice } => {
                if !model.flows.is_empty() {
                    model.flows.swap_remove(choice as usize % model.flows.len());
                }
            }
            Event::Collect => {
                let in_use = model.in_use(now);
                now += 3;
                model.apply_all(&plan.collect(&in_use, now), &before, &before, now);
            }
            Event::Restart => {
                plan = Plan::adopt(limits, model.adopted());
                model.outlive_programs();
            }
            Event::Wait { ms } => now += ms,
        }
        let after = settle(&services);
        let update = plan.update(&after, &[[192, 0, 2, 1]], now);
        model.apply_all(&update, &before, &after, now);
        if update.problems.is_empty() {
            assert!(model.is_like(&plan), "the maps are what the plan says");
            let served: usize = after.services.iter().map(|port| port.frontends.len()).sum();
            assert_eq!(model.frontends.len(), served);
        }
        before = after;
    }
    empty(plan, model, &before, now);
}

/// After everything is gone and collected nothing is left.
fn empty(mut plan: Plan, mut model: Model, before: &Desired, now: u64) {
    model.flows.clear();
    model.apply_all(&plan.update(&wish([]), &[], now), before, &wish([]), now);
    for step in 1..4 {
        let now = now + step * 2 * QUARANTINE_MS;
        let update = plan.collect(&model.in_use(now), now);
        model.apply_all(&update, &wish([]), &wish([]), now);
    }
    assert_eq!(plan.fill(), Fill::default());
    assert!(model.is_empty());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 192, ..ProptestConfig::default() })]

    #[test]
    fn no_packet_ever_meets_half_a_service(events in proptest::collection::vec(event(), 1..40)) {
        run(LIMITS, events);
    }

    #[test]
    fn full_maps_never_break_what_works(events in proptest::collection::vec(event(), 1..40)) {
        run(Limits { frontends: 6, backends: 7, ring_slots: 1_500 }, events);
    }
}
