//! What happens when a map is full.

use super::*;

#[test]
fn a_full_map_stops_one_service_and_names_the_flag() {
    let fits = [simple::<V4>(1, &[1]), simple(2, &[2])];
    let mut restricted = simple(5, &[1]);
    restricted.sources =
        vec![Network { addr: [192, 0, 2, 0], len: 24 }, Network { addr: [198, 51, 100, 0], len: 24 }];
    let cases = [
        (Limits { frontends: 2, ..LIMITS }, simple(5, &[1]), ProblemKind::FrontendsFull, "--max-frontends"),
        (Limits { backends: 4, ..LIMITS }, simple(5, &[3, 4]), ProblemKind::BackendsFull, "--max-backends"),
        (Limits { ring_slots: 4, ..LIMITS }, simple(5, &[1, 2]), ProblemKind::RingsFull, "--max-ring-slots"),
        (Limits { networks: 1, ..LIMITS }, restricted, ProblemKind::NetworksFull, "--max-networks"),
    ];
    for (limits, too_much, kind, flag) in cases {
        let mut node = Node::new(limits);
        let all = || fits.iter().cloned().chain([too_much.clone()]);
        node.wish(all(), 0);
        let problems = node.plan.problems();
        assert_eq!((problems.len(), problems[0].kind), (1, kind));
        assert!(problems[0].message.contains(flag), "{}", problems[0]);
        assert_eq!(node.plan.fill(), Fill { frontends: 2, backends: 2, ring_slots: 2, networks: 0 });
        assert_eq!(node.wish(all(), 10).changes, [], "nothing half done, nothing repeated");
        node.wish([simple(9, &[1])], 20);
        assert_eq!(node.plan.problems(), []);
        node.wish([too_much], 9_000);
        assert!(
            limits.frontends == 2 || node.plan.problems().len() == 1,
            "it is tried again and still too much"
        );
    }
}

#[test]
fn room_of_frontends_that_go_serves_those_that_come_in_the_same_update() {
    let mut node = Node::<V4>::new(Limits { frontends: 2, ..LIMITS });
    node.wish([simple(1, &[1]), simple(2, &[2])], 0);
    node.wish([simple(3, &[1]), simple(4, &[2])], 10);
    assert_eq!((node.plan.problems(), node.plan.fill().frontends), (vec![], 2));
}

#[test]
fn a_service_that_waits_for_resting_slots_is_planned_when_they_are_free() {
    let mut node = Node::<V4>::new(Limits { ring_slots: 40, ..LIMITS });
    node.wish([simple(1, &[1, 2])], 0);
    let update = node.wish([simple(1, &[1, 2, 3])], 10);
    assert_eq!(node.plan.problems()[0].kind, ProblemKind::RingsFull);
    assert_eq!(update.retry_in_ms, None, "its own ring stands in the way for ever");
    let update = node.wish([simple(2, &[1, 3])], 20);
    assert_eq!((node.plan.problems().len(), update.retry_in_ms), (1, Some(QUARANTINE_MS)));
    let nothing = Delta::default();
    node.plan.update(&nothing, true, &[], 1_020);
    assert_eq!(node.plan.services(), 0);
    let update = node.plan.update(&nothing, true, &[], 2_020);
    assert_eq!((update.retry_in_ms, node.plan.services()), (None, 1));
    assert_eq!(node.plan.problems()[0].kind, ProblemKind::RingsReduced);
}

#[test]
fn collecting_says_when_a_service_that_waits_for_backends_may_fit() {
    let mut node = Node::<V4>::new(Limits { backends: 2, ..LIMITS });
    node.wish([simple(1, &[1])], 0);
    node.wish([simple(1, &[2])], 10);
    assert_eq!(node.plan.problems()[0].kind, ProblemKind::BackendsFull);
    node.wish([simple(2, &[2])], 20);
    assert_eq!(node.plan.problems().len(), 1);
    assert_eq!(node.plan.collect(&in_use(25), 30).retry_in_ms, None);
    assert_eq!(node.plan.collect(&in_use(1_030), 1_040).retry_in_ms, Some(0));
    assert_eq!(
        node.plan.update(&Delta::default(), true, &[], 1_050).changes.len(),
        7,
        "gates, backend, ring, frontend"
    );
    assert_eq!((node.plan.problems(), node.plan.services()), (vec![], 1));
}

#[test]
fn where_slots_are_scarce_every_service_gets_smaller_rings_and_one_problem_says_so() {
    let ten: Vec<u8> = (1..=10).collect();
    // Twelve backends' room a service: 1,201 slots at 100 each, 131 at ten each.
    for (services, ring_slots, per_service, is_reduced) in
        [(4, 16_384, 1_201, false), (10, 16_384, 601, true), (20, 16_384, 307, true), (50, 16_384, 127, true)]
    {
        let mut node = Node::<V4>::new(Limits { ring_slots, frontends: 128, backends: 1024, networks: 8 });
        node.wish((0..services).map(|n| simple(n, &ten)), 0);
        assert_eq!(node.plan.services(), usize::from(services));
        assert_eq!(node.plan.fill().ring_slots, u32::from(services) * per_service, "{services} services");
        let problems = node.plan.problems();
        assert_eq!(problems.len(), usize::from(is_reduced), "{problems:?}");
        if let [problem] = &problems[..] {
            assert_eq!(problem.kind, ProblemKind::RingsReduced);
            assert!(problem.message.starts_with(&format!("{services} service ports")), "{problem}");
            assert!(problem.message.contains("--max-ring-slots"));
        }
    }
}

#[test]
fn rings_of_thirty_thousand_services_of_ten_endpoints_fit_by_default() {
    let least = maglev::slots(10, *maglev::SCARCE_SLOTS_PER_BACKEND.last().unwrap());
    assert!(30_000 * least <= xdp_common::tables::RINGS_V4.entries);
    // Ten thousand of them get more than the least, as they do where the array is a hundred times smaller.
    let limits = Limits {
        ring_slots: xdp_common::tables::RINGS_V4.entries / 100,
        frontends: 256,
        backends: 2048,
        networks: 8,
    };
    let ten: Vec<u8> = (1..=10).collect();
    let mut node = Node::<V4>::new(limits);
    node.wish((0..100).map(|n| simple(n, &ten)), 0);
    assert_eq!(node.plan.fill().ring_slots, 100 * maglev::slots(10, 25));
}

#[test]
fn a_small_ring_grows_when_its_list_changes_and_there_is_room() {
    let ten: Vec<u8> = (1..=10).collect();
    let limits = Limits { ring_slots: 16_384, frontends: 128, backends: 1024, networks: 8 };
    let mut node = Node::<V4>::new(limits);
    node.wish((0..50).map(|n| simple(n, &ten)), 0);
    node.wish([simple(0, &ten)], 10);
    assert_eq!(node.plan.problems().len(), 1, "it stays as it is until it changes");
    let lines = node.lines([simple(0, &ten[1..])], 20);
    assert!(lines.iter().any(|line| line.starts_with("ring ") && line.ends_with("+1201")), "{lines:?}");
    assert_eq!(node.plan.problems(), []);
}

#[test]
fn an_update_touches_what_changed_and_what_waits_for_room_that_came() {
    let limits = Limits { frontends: 10, ..LIMITS };
    let mut node = Node::<V4>::new(limits);
    let all = |but: u8| (0..40).filter(move |n| *n != but).map(|n| simple(n, &[n]));
    node.wish(all(99), 0);
    assert_eq!((node.plan.services(), node.plan.refused.len()), (10, 30));
    assert_eq!(node.plan.problems().len(), 30);
    // One goes, one of those that wait comes; nothing else is written.
    let served = node.plan.services.values().next().unwrap().port.name.service[1..].parse().unwrap();
    let lines = node.lines(all(served), 10);
    let of = |start: &str| lines.iter().filter(|line| line.starts_with(start)).count();
    assert_eq!((of("remove"), of("frontend"), of("backend"), of("ring ")), (1, 1, 2, 1), "{lines:?}");
    assert_eq!((node.plan.services(), node.plan.refused.len()), (10, 29));
}
