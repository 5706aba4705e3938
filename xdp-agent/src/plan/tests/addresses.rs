use super::*;

/// A service port with one frontend of a kind at an address that all share.
fn at_one_address(n: u8, kind: FrontendKind) -> ServicePort<V4> {
    let mut port = simple(n, &[n]);
    let frontend = &mut port.frontends[0];
    (frontend.kind, frontend.addr, frontend.port) = (kind, [192, 0, 2, 1], u16::from(n));
    port
}

/// What stands for the address as such, whether its network is watched for refusals, and whether it is for echo.
fn address(plan: &Plan<V4>) -> (Option<u32>, bool, bool) {
    let addr = [192, 0, 2, 1];
    let flags = plan.frontends().find(|(key, _)| key.proto == 0).map(|(_, value)| value.flags);
    let is_set = |bit: u32| plan.ingress_gate()[bit as usize / 64] >> (bit % 64) & 1 == 1;
    (flags, is_set(service_network_bit(addr.network())), is_set(frontend_bit(addr, [0; 2], 0)))
}

#[test]
fn an_external_address_is_answered_for_and_a_cluster_ip_refused_too() {
    let [cluster_ip, external] = [FrontendKind::ClusterIp, FrontendKind::LoadBalancer];
    for order in [[1, 2], [2, 1]] {
        let kinds = |n| if n == 1 { cluster_ip } else { external };
        let mut node = Node::new(LIMITS);
        node.wish([at_one_address(2, external)], 0);
        assert_eq!(address(&node.plan), (Some(frontend::ECHO), false, true), "of a load balancer alone");
        let mut node = Node::new(LIMITS);
        for wished in [&order[..1], &order] {
            node.wish(wished.iter().map(|n| at_one_address(*n, kinds(*n))), 0);
        }
        let (flags, is_refused, _) = address(&node.plan);
        assert_eq!((flags, is_refused), (Some(frontend::ADDRESS), true), "of both, {order:?}");
        node.wish([at_one_address(2, external)], 10);
        let (flags, _, is_answered) = address(&node.plan);
        assert_eq!((flags, is_answered), (Some(frontend::ECHO), true), "without the ClusterIP");
        node.wish([], 20);
        assert_eq!(address(&node.plan).0, None, "without either");
        node.wish([], 30);
        node.plan.collect(&in_use(10_000), 10_000);
        assert_eq!(address(&node.plan), (None, false, false), "its bits go once nothing uses them");
    }
}

#[test]
fn addresses_of_the_node_are_left_to_the_kernel() {
    let mut own = at_one_address(1, FrontendKind::LoadBalancer);
    own.frontends[0].is_node_address = true;
    let mut node = Node::new(LIMITS);
    node.wish([own, at_one_address(2, FrontendKind::NodePort)], 0);
    assert_eq!(address(&node.plan), (None, false, false));
}
