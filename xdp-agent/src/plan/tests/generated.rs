//! Generated histories of a cluster, applied to the model.

use proptest::prelude::*;

use super::*;

#[derive(Clone, Copy, Debug)]
struct Shape {
    service: u8,
    /// Which frontends it has.
    frontends: u8,
    /// A bit mask each for endpoints that are chosen, on this node, and still serving.
    chosen: u8,
    local: u8,
    serving: u8,
    /// Where it is; some are claimed by several services.
    address: u8,
    port: u8,
    /// A bit mask of source ranges.
    sources: u8,
}

#[derive(Clone, Debug)]
enum Event {
    Set(Shape),
    Remove {
        service: u8,
    },
    /// Bit masks of the networks of pods and of services, and of the node's own addresses.
    Networks {
        pods: u8,
        services: u8,
        own: u8,
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
    let mask = any::<u8>;
    let shape = (0u8..5, 0u8..6, mask(), mask(), mask(), 0u8..4, 0u8..2, 0u8..8);
    prop_oneof![
        6 => shape.prop_map(|(service, frontends, chosen, local, serving, address, port, sources)| {
            let chosen = chosen & 0x3f;
            Event::Set(Shape { service, frontends, chosen, local, serving, address, port, sources })
        }),
        2 => (0u8..5).prop_map(|service| Event::Remove { service }),
        1 => (0u8..4, 0u8..4, 0u8..4).prop_map(|(pods, services, own)| Event::Networks { pods, services, own }),
        3 => any::<u32>().prop_map(|choice| Event::Connect { choice }),
        2 => any::<u32>().prop_map(|choice| Event::Disconnect { choice }),
        2 => Just(Event::Collect),
        1 => Just(Event::Restart),
        2 => (0u64..2_500).prop_map(|ms| Event::Wait { ms }),
    ]
}

fn bits(mask: u8) -> impl Iterator<Item = u8> {
    (0..8).filter(move |bit| mask >> bit & 1 == 1)
}

fn service_port<A: TestAddress>(shape: Shape) -> ServicePort<A> {
    use Policy::{Cluster, Local};
    let Shape { service, frontends, chosen, local, serving, address, port: number, sources } = shape;
    let endpoints = |mask: u8| -> Vec<Endpoint<A>> {
        bits(mask)
            .map(|bit| {
                let is_local = local >> bit & 1 == 1;
                let node = if is_local { A::UNSPECIFIED } else { A::at(7, 7, number) };
                Endpoint { local: is_local, node, ..endpoint(bit) }
            })
            .collect()
    };
    let policies: &[(Policy, Policy)] = match frontends {
        0 => &[(Cluster, Cluster)],
        1 => &[(Local, Local)],
        2 => &[(Cluster, Cluster), (Local, Cluster)],
        3 => &[(Cluster, Local), (Local, Cluster), (Cluster, Cluster)],
        4 => &[(Local, Cluster)],
        _ => &[],
    };
    let outer: Vec<Policy> = policies.iter().map(|(outer, _)| *outer).collect();
    let mut port = port(service, &outer, &endpoints(chosen), &endpoints(chosen & local));
    port.serving = endpoints(serving);
    for (at, (frontend, (_, inner))) in port.frontends.iter_mut().zip(policies).enumerate() {
        frontend.addr = A::at(96, at as u8, address);
        frontend.port = 80 + u16::from(number);
        frontend.internal = *inner;
        frontend.kind = if at == 0 { FrontendKind::ClusterIp } else { FrontendKind::LoadBalancer };
        frontend.is_restricted = at > 0 && sources > 0;
        frontend.masquerade = Masquerade { external: true, pod: false, host: true };
    }
    let is_restricted = port.frontends.iter().any(|frontend| frontend.is_restricted);
    port.sources = bits(if is_restricted { sources } else { 0 }).map(|b| network(100 + b)).collect();
    port
}

fn network<A: TestAddress>(n: u8) -> Network<A> {
    Network { addr: A::at(n, 0, 0), len: 16 }
}

/// Keeps every address with the service that comes first, as `cluster` does.
fn settle<A: IpAddress>(services: &HashMap<u8, ServicePort<A>>) -> Ports<A> {
    let mut ports: Vec<_> = services.values().cloned().collect();
    ports.sort_by(|a, b| a.name.cmp(&b.name));
    let mut taken = HashSet::new();
    for port in &mut ports {
        port.frontends.retain(|frontend| taken.insert((frontend.addr, frontend.port)));
    }
    ports.retain(|port| !port.frontends.is_empty());
    wish(ports)
}

fn run<A: TestAddress>(limits: Limits, events: Vec<Event>) {
    let (mut plan, mut model) = (Plan::<A>::new(limits), Model::new(limits));
    let mut services: HashMap<u8, ServicePort<A>> = HashMap::new();
    let mut networks = Networks::default();
    let mut before = Ports::new();
    let mut now = 0;
    for event in events {
        now += 7;
        let mut delta = Delta::default();
        match event {
            Event::Set(shape) => {
                services.insert(shape.service, service_port(shape));
            }
            Event::Remove { service } => {
                services.remove(&service);
            }
            Event::Networks { pods, services, own } => {
                networks = Networks {
                    pods: bits(pods).map(|n| network(n + 1)).collect(),
                    services: bits(services).map(|n| network(96 + n)).collect(),
                    own: bits(own).map(|n| A::at(96 + n, 9, 9)).collect(),
                    nodes: bits(own).map(|n| A::at(n, 8, 8)).collect(),
                    this: bits(pods).map(|n| A::at(n, 7, 7)).collect(),
                };
                delta.networks = Some(networks.clone());
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
        delta.ports = super::delta(&before, &after).ports;
        if matches!(event, Event::Restart) {
            delta = Delta { networks: Some(networks.clone()), ..super::delta(&Ports::new(), &after) };
        }
        let update = plan.update(&delta, true, &[A::at(192, 0, 1)], now);
        model.apply_all(&update, &before, &after, now);
        model.check_own(&networks.own);
        assert!(model.is_like(&plan), "the maps are what the plan says");
        if plan.refused.len() == 0 {
            model.check_complete(&after);
        }
        before = after;
    }
    empty(plan, model, &before, now);
}

/// After everything is gone and collected nothing is left.
fn empty<A: TestAddress>(mut plan: Plan<A>, mut model: Model<A>, before: &Ports<A>, now: u64) {
    model.flows.clear();
    let nothing = Delta { networks: Some(Networks::default()), ..delta(before, &Ports::new()) };
    model.apply_all(&plan.update(&nothing, true, &[], now), before, &Ports::new(), now);
    for step in 1..4 {
        let now = now + step * 2 * QUARANTINE_MS;
        let update = plan.collect(&model.in_use(now), now);
        model.apply_all(&update, &Ports::new(), &Ports::new(), now);
    }
    assert_eq!(plan.fill(), Fill::default());
    assert_eq!((plan.services(), plan.problems()), (0, vec![]));
    assert!(model.is_empty());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn no_packet_ever_meets_half_a_service(events in proptest::collection::vec(event(), 1..40)) {
        run::<V4>(LIMITS, events);
    }

    #[test]
    fn no_packet_of_ipv6_ever_meets_half_a_service(events in proptest::collection::vec(event(), 1..40)) {
        run::<V6>(LIMITS, events);
    }

    #[test]
    fn full_maps_never_break_what_works(events in proptest::collection::vec(event(), 1..40)) {
        run::<V4>(Limits { frontends: 8, backends: 9, ring_slots: 600, networks: 5 }, events);
    }
}
