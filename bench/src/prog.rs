//! Nanoseconds per packet by `BPF_PROG_TEST_RUN`.
//!
//! A run does not restore the packet, so a wrapper does: it writes the template with the next source address and
//! tail-calls the program under test. The wrapper's own cost, measured with a program that only drops, is subtracted.
//! Cases take turns, because other work on the machine comes and goes; what counts of the rounds is in [`figures`].

use std::{
    collections::HashSet,
    env,
    net::{Ipv4Addr, Ipv6Addr},
    path::PathBuf,
};

use anyhow::{Context, Result, bail, ensure};
use aya::{
    Ebpf, EbpfLoader, Pod,
    maps::{Array, HashMap, MapData, PerCpuArray, ProgramArray},
    programs::{TestRun, TestRunOptions, Xdp},
};
use xdp_agent::{attach::programs::load_xdp, maps::Constants};
use xdp_agent_tests::lab::{link, netns::Namespace, stay_on};
use xdp_common::{
    conntrack::opposite,
    gate,
    net::{Address, Family, FlowKey, Plain, TCP, V4, V6},
    select,
    tables::{
        self, Backend, Config, Device, Flow, Frontend, FrontendKey, Mapped, Slot, device, direct, frontend,
    },
    verdict::{Counter, Event, Reason},
};

mod case;
mod figures;
mod traffic;

use self::{case::Case, figures::Figures, traffic::*};

/// The product's object.
const PRODUCT: &str = "xdp-ebpf";
/// Enough of them that their source ports outlast the embryonic table.
const BACKENDS: u32 = 64;
const NEW_FLOWS: u32 = 1 << 24;

/// Measures established flows (forward and reply), frames of nobody's service, new flows, and flows through tunnels.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Times that the programs and their maps are loaded: where memory falls makes a difference of some nanoseconds. The
    /// median of the loads is printed.
    #[arg(long, default_value_t = 7)]
    loads: usize,
    /// Rounds of each load, of which the fastest counts.
    #[arg(long, default_value_t = 15)]
    rounds: usize,
    /// Packets of a case in each round.
    #[arg(long, default_value_t = 100_000)]
    packets: u32,
    /// Numbers of live flows, powers of two.
    #[arg(long, value_delimiter = ',', default_value = "1,1024,65536")]
    flows: Vec<u32>,
    /// Fails when a figure is over the budget of the project.
    #[arg(long)]
    check: bool,
}

/// A plain value of the shared crate as aya wants it.
#[repr(transparent)]
#[derive(Clone, Copy)]
struct Raw<T>(T);

// SAFETY: `Plain` has proven at compile time that the type has no padding, and holds no invalid bit patterns.
unsafe impl<T: Plain> Pod for Raw<T> {}

/// A table of flows in the kernel.
type FlowMap<'a, F> =
    HashMap<&'a mut MapData, Raw<FlowKey<<F as Family>::Addr>>, Raw<Flow<<F as Family>::Addr>>>;

/// What the wrapper replays; as in the lab's object.
#[repr(C)]
#[derive(Clone, Copy)]
struct Replay {
    count: u32,
    mask: u32,
    source: u32,
    is_v6: u32,
    gap: [u8; 2],
    template: [u8; TEMPLATE_LEN],
    end: [u8; 2],
}

// SAFETY: integers and bytes, without padding (16 + 2 + 76 + 2 bytes, aligned to 4).
unsafe impl Pod for Replay {}

/// Runs the cases and prints the table.
pub(crate) fn run(args: &Args) -> Result<()> {
    xdp_agent_tests::lab::require_root()?;
    ensure!(args.loads > 0 && args.rounds > 0, "--loads and --rounds begin at 1");
    let node = Namespace::new("bench-node")?;
    let peer = Namespace::new("bench-peer")?;
    link::veth(&node, "eth0", &peer, "eth0")?;
    node.sysctl("net/ipv6/conf/eth0/disable_ipv6", "0")?;
    let v6 = |host| Ipv6Addr::from(V6::addr(host).octets());
    node.address("eth0", Ipv4Addr::from(NODE), 24)?;
    node.address("eth0", v6(NODE), 120)?;
    node.route_via(Ipv4Addr::UNSPECIFIED, 0, GATEWAY.into())?;
    node.default_route_v6(v6(GATEWAY))?;
    node.static_neighbour("eth0", Ipv4Addr::from(GATEWAY).into(), GATEWAY_MAC)?;
    node.static_neighbour("eth0", v6(GATEWAY).into(), GATEWAY_MAC)?;
    node.sysctl("net/ipv4/ip_forward", "1")?;
    node.sysctl("net/ipv6/conf/all/forwarding", "1")?;
    let (ifindex, mac) = (node.index("eth0")?, node.mac("eth0")?);
    node.run(|| {
        // One core for all cases; moves between cores would show up as noise.
        stay_on(0)?;
        let mut failed = Vec::new();
        for &flows in &args.flows {
            ensure!(flows.is_power_of_two(), "--flows takes powers of two, not {flows}");
            for sort in [Sort::Translated, Sort::Tunnelled] {
                let mut figures = Figures::new(match sort {
                    Sort::Translated => &Case::TRANSLATED,
                    Sort::Tunnelled => &Case::DIRECT,
                });
                for _ in 0..args.loads {
                    let mut bench = Bench::new(ifindex, mac, flows, sort)?;
                    figures.add(&bench.rounds(figures.cases(), flows, args)?);
                }
                let Args { loads, rounds, packets, .. } = args;
                println!("\n{flows} flows (median of {loads} loads, fastest of {rounds} rounds of {packets} packets)");
                println!("{figures}");
                failed.extend(figures.over_budget().map(|what| format!("{what} at {flows} flows")));
            }
        }
        ensure!(!args.check || failed.is_empty(), "over budget: {}", failed.join("; "));
        Ok(())
    })
}

struct Bench {
    ifindex: u32,
    mac: [u8; 6],
    product: Ebpf,
    lab: Ebpf,
    /// Packets replayed so far, where the next case goes on.
    sent: u32,
}

impl Bench {
    fn new(ifindex: u32, mac: [u8; 6], flows: u32, sort: Sort) -> Result<Self> {
        let mut product = load(PRODUCT)?;
        load_xdp(&mut product, "xdp_ingress")?;
        let mut lab = load("xdp-lab")?;
        for name in ["replay", "limit", "limit_v6", "xdp_drop", "limit_tunnel", "move_head"] {
            program(&mut lab, name)?.load().with_context(|| format!("loading the program {name}"))?;
        }
        let (entries, _) = traffic::flows::<V4>(flows, ifindex, mac, sort);
        fill::<V4>(&mut lab, "LIMIT", entries)?;
        let (entries, _) = traffic::flows::<V6>(flows, ifindex, mac, sort);
        fill::<V6>(&mut lab, "LIMIT_V6", entries)?;
        configure::<V4>(&mut product, flows, ifindex, mac, sort)?;
        configure::<V6>(&mut product, flows, ifindex, mac, sort)?;
        Ok(Self { ifindex, mac, product, lab, sent: 0 })
    }

    /// Nanoseconds per packet of every case, the wrapper included, by rounds.
    fn rounds(&mut self, cases: &[Case], flows: u32, args: &Args) -> Result<Vec<Vec<f64>>> {
        // The first round warms caches, frequency and next hops.
        for case in cases {
            self.case(*case, flows, args.packets)?;
        }
        (0..args.rounds)
            .map(|_| cases.iter().map(|case| self.case(*case, flows, args.packets)).collect())
            .collect()
    }

    /// Nanoseconds per packet of a case, the wrapper included.
    fn case(&mut self, case: Case, flows: u32, packets: u32) -> Result<f64> {
        let (object, name) = match case {
            Case::Drop => (&mut self.lab, "xdp_drop"),
            Case::Limit => (&mut self.lab, "limit"),
            Case::LimitV6 => (&mut self.lab, "limit_v6"),
            Case::MoveHead => (&mut self.lab, "move_head"),
            Case::TunnelLimit => (&mut self.lab, "limit_tunnel"),
            Case::Forward
            | Case::Reply
            | Case::Stranger
            | Case::NewFlow
            | Case::ForwardV6
            | Case::ReplyV6
            | Case::StrangerV6
            | Case::NewFlowV6
            | Case::Tunnel => (&mut self.product, "xdp_ingress"),
        };
        let target = program(object, name)?.fd()?.try_clone()?;
        let mut targets: ProgramArray<&mut MapData> =
            ProgramArray::try_from(self.lab.map_mut("TARGET").context("no map TARGET")?)?;
        targets.set(0, &target, 0)?;
        let mut replay: Array<&mut MapData, Replay> =
            Array::try_from(self.lab.map_mut("REPLAY").context("no map REPLAY")?)?;
        self.sent = self.sent.wrapping_add(packets);
        replay.set(0, replay_of(case, flows, self.sent, self.mac), 0)?;
        let frame = [0u8; FRAME_LEN];
        let context = context(self.ifindex);
        let mut options = TestRunOptions::new();
        options.data_in = Some(&frame);
        options.ctx_in = Some(&context);
        options.repeat = packets;
        let result = program(&mut self.lab, "replay")?.test_run(options).context("BPF_PROG_TEST_RUN")?;
        let (answer, expected) = (result.return_value, case.answer());
        if answer != expected {
            let counts = self.counts()?;
            bail!("{}: the program answered {answer}, not {expected}; it counted {counts}", case.label());
        }
        Ok(result.duration.as_nanos() as f64)
    }
}

impl Bench {
    /// The drops and events counted so far, for messages.
    fn counts(&mut self) -> Result<String> {
        let counters: PerCpuArray<&mut MapData, u64> =
            self.product.map_mut(tables::COUNTERS.name).context("no map COUNTERS")?.try_into()?;
        let drops = Reason::ALL.iter().map(|&reason| (reason.label(), Counter::Drop(reason)));
        let events = Event::ALL.iter().map(|&event| (event.label(), Counter::Event(event)));
        let mut counts = Vec::new();
        for (label, counter) in drops.chain(events) {
            let count: u64 = counters.get(&counter.index(), 0)?.iter().sum();
            if count > 0 {
                counts.push(format!("{label}={count}"));
            }
        }
        Ok(counts.join(" "))
    }
}

/// A `struct xdp_md` for a frame that has come in by an interface.
fn context(ifindex: u32) -> [u8; 24] {
    let mut context = [0u8; 24];
    context[4..8].copy_from_slice(&(FRAME_LEN as u32).to_ne_bytes());
    context[12..16].copy_from_slice(&ifindex.to_ne_bytes());
    context
}

fn replay_of(case: Case, flows: u32, sent: u32, mac: [u8; 6]) -> Replay {
    match case {
        Case::Drop | Case::Limit | Case::Forward | Case::MoveHead | Case::TunnelLimit | Case::Tunnel => {
            replay::<V4>(Way::Forward, flows, sent, mac)
        }
        Case::Reply => replay::<V4>(Way::Reply, flows, sent, mac),
        Case::Stranger => replay::<V4>(Way::Stranger, flows, sent, mac),
        Case::NewFlow => replay::<V4>(Way::NewFlow, flows, sent, mac),
        Case::LimitV6 | Case::ForwardV6 => replay::<V6>(Way::Forward, flows, sent, mac),
        Case::ReplyV6 => replay::<V6>(Way::Reply, flows, sent, mac),
        Case::StrangerV6 => replay::<V6>(Way::Stranger, flows, sent, mac),
        Case::NewFlowV6 => replay::<V6>(Way::NewFlow, flows, sent, mac),
    }
}

/// Which packets of a family.
#[derive(Clone, Copy)]
enum Way {
    Forward,
    Reply,
    Stranger,
    NewFlow,
}

fn replay<F: Traffic>(way: Way, flows: u32, sent: u32, mac: [u8; 6]) -> Replay {
    const SYN: u8 = 0x02;
    const ACK: u8 = 0x10;
    let (key, flow) = forward::<F>(0, 0, mac);
    let (key, source, mask, flags) = match way {
        Way::Forward => (key, CLIENT, flows - 1, ACK),
        Way::Reply => (opposite(&key, &flow), BACKEND, flows - 1, ACK),
        Way::Stranger => (FlowKey { dst: F::addr(NODE), dport: [0, 22], ..key }, CLIENT, flows - 1, ACK),
        // A range of its own, and on from where the last round stopped, so that no flow is met twice.
        Way::NewFlow => (key, 0x0100_0000, NEW_FLOWS - 1, SYN),
    };
    let template = frame::<F>(&key, mac, flags);
    Replay { count: sent, mask, source, is_v6: F::IS_V6, gap: [0; 2], template, end: [0; 2] }
}

/// Writes flows to a table.
fn fill<F: Traffic>(
    object: &mut Ebpf,
    table: &str,
    entries: impl IntoIterator<Item = (FlowKey<F::Addr>, Flow<F::Addr>)>,
) -> Result<()> {
    let mut table: FlowMap<'_, F> = map(object, table)?;
    for (key, flow) in entries {
        table.insert(Raw(key), Raw(flow), 0).context("filling a table of flows")?;
    }
    Ok(())
}

/// Writes flows to the established table of the product, each into the first of its places that is free, or else into the hash.
fn establish<F: Traffic>(product: &mut Ebpf, entries: FlowTable<F::Addr>) -> Result<()> {
    let maps = F::Addr::MAPS;
    let mut slots: Array<_, Raw<Slot<F::Addr>>> = array(product, maps.established.name)?;
    let mut taken = HashSet::new();
    let mut others = Vec::new();
    for (key, flow) in entries {
        match select::places(&key, maps.established.entries).find(|place| taken.insert(*place)) {
            Some(place) => {
                slots.set(place, Raw(Slot { key, flow }), 0).context("filling the table of flows")?
            }
            None => others.push((key, flow)),
        }
    }
    fill::<F>(product, maps.overflow.name, others)
}

/// Live flows, and one service with backends elsewhere, behind the gateway.
fn configure<F: Traffic>(
    product: &mut Ebpf,
    flows: u32,
    ifindex: u32,
    mac: [u8; 6],
    sort: Sort,
) -> Result<()> {
    let maps = F::Addr::MAPS;
    let config = Config {
        epoch: 1,
        clock: 1,
        snat_port_min: 1024,
        snat_port_max: 29_999,
        embryonic_buckets: maps.tags.entries,
        established_homes: select::homes(maps.established.entries),
        masquerade_wire: 1,
        policy_routing: 0,
        echo: 1,
        direct: if sort == Sort::Tunnelled { direct::TCP } else { 0 },
    };
    array(product, tables::CONFIG.name)?.set(0, Raw(config), 0)?;
    let (entries, known) = traffic::flows::<F>(flows, ifindex, mac, sort);
    establish::<F>(product, entries)?;
    let mut words: Array<_, u64> = array(product, maps.known.name)?;
    for (at, word) in (0..).zip(known) {
        words.set(at, word, 0).context("filling the table of known keys")?;
    }
    let device = Device {
        snat: F::addr(NODE),
        flags: device::TRANSMIT | device::REDIRECT | device::ETHERNET,
        mtu: 1500,
        mac,
        zero: [0; 2],
    };
    let mut devices: HashMap<_, u32, Raw<Device<F::Addr>>> = map(product, maps.devices.name)?;
    devices.insert(ifindex, Raw(device), 0)?;
    for id in 1..=BACKENDS {
        let addr = F::addr(BACKEND + 0x0001_0000 + id);
        let backend = Backend {
            addr,
            port: PORT,
            proto: TCP,
            flags: 0,
            generation: 1,
            service: 1,
            node: Address::UNSPECIFIED,
        };
        array(product, maps.backends.name)?.set(id, Raw(backend), 0)?;
        array(product, maps.rings.name)?.set(id - 1, id, 0)?;
    }
    let mut frontends: HashMap<_, Raw<FrontendKey<F::Addr>>, Raw<Frontend>> =
        map(product, maps.frontends.name)?;
    let addr = F::addr(FRONTEND);
    let key = FrontendKey { addr, port: PORT, proto: TCP, zero: 0 };
    let frontend = Frontend {
        service: 1,
        ring: 0,
        slots: BACKENDS,
        inner_ring: 0,
        inner_slots: BACKENDS,
        flags: frontend::MASQUERADE_EXTERNAL,
        affinity_seconds: 0,
    };
    frontends.insert(Raw(key), Raw(frontend), 0)?;
    for bit in [gate::frontend_bit(addr, PORT, TCP), gate::snat_bit(device.snat)] {
        let mut gate: Array<&mut MapData, u64> = array(product, maps.gate_ingress.name)?;
        let word = gate.get(&(bit / 64), 0)?;
        gate.set(bit / 64, word | 1 << (bit % 64), 0)?;
    }
    Ok(())
}

fn load(object: &str) -> Result<Ebpf> {
    let directory =
        env::var_os("XDP_AGENT_BPF_DIR").map_or_else(|| PathBuf::from("target/bpf"), PathBuf::from);
    let path = directory.join(object);
    let constants = Constants::of_this_machine()?;
    let mut loader = EbpfLoader::new();
    if object == PRODUCT {
        constants.set(&mut loader);
    }
    loader
        .load_file(&path)
        .with_context(|| format!("loading {}: run `cargo xtask build` first", path.display()))
}

fn program<'a>(object: &'a mut Ebpf, name: &str) -> Result<&'a mut Xdp> {
    let program = object.program_mut(name).with_context(|| format!("the object has no program {name}"))?;
    Ok(program.try_into()?)
}

fn map<'a, K: Pod, V: Pod>(object: &'a mut Ebpf, name: &str) -> Result<HashMap<&'a mut MapData, K, V>> {
    Ok(object.map_mut(name).with_context(|| format!("the object has no map {name}"))?.try_into()?)
}

fn array<'a, V: Pod>(object: &'a mut Ebpf, name: &str) -> Result<Array<&'a mut MapData, V>> {
    Ok(object.map_mut(name).with_context(|| format!("the object has no map {name}"))?.try_into()?)
}
