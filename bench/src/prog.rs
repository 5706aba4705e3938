//! Nanoseconds per packet by `BPF_PROG_TEST_RUN`.
//!
//! A run does not restore the packet, so a wrapper does: it writes the template with the next source address and
//! tail-calls the program under test. The wrapper's own cost, measured with a program that only drops, is subtracted.
//! Cases take turns for several rounds and the median counts, because other work on the machine comes and goes.

use std::{env, path::PathBuf};

use anyhow::{Context, Result, bail, ensure};
use aya::{
    Ebpf, EbpfLoader, Pod,
    maps::{Array, HashMap, MapData, PerCpuArray, ProgramArray},
    programs::{TestRun, TestRunOptions, Xdp},
};
use xdp_agent_tests::lab::{link, netns::Namespace};
use xdp_common::{
    conntrack::{mirror, opposite, translate},
    gate,
    net::{FlowKey, Plain, TCP},
    select::known_bit,
    tables::{self, Backend, Config, Device, Flow, Frontend, FrontendKey, device, exit, frontend, kind},
    verdict::{Counter, Event, Reason},
};

type Addr = [u8; 4];
type Key = FlowKey<Addr>;

const CLIENT: u32 = 0xc633_0000; // 198.51.0.0
const FRONTEND: Addr = [203, 0, 113, 10];
const NODE: Addr = [192, 168, 50, 10];
const BACKEND: u32 = 0x0a40_0000; // 10.64.0.0
const STRANGER: Addr = [192, 168, 50, 10];
const GATEWAY: Addr = [192, 168, 50, 1];
const GATEWAY_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const PORT: [u8; 2] = [0, 80];
const CLIENT_PORT: [u8; 2] = [0xc0, 0x01];
const SNAT_PORT: [u8; 2] = [0x20, 0x01];
/// Enough of them that their source ports outlast the embryonic table.
const BACKENDS: u32 = 64;
const NEW_FLOWS: u32 = 1 << 24;
const FRAME_LEN: usize = 64;

/// Measures established flows (forward and reply), frames of nobody's service, and new flows.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Rounds; the median of each case is printed.
    #[arg(long, default_value_t = 7)]
    rounds: usize,
    /// Packets of a case in each round.
    #[arg(long, default_value_t = 1_000_000)]
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

/// What the wrapper replays; as in the lab's object.
#[repr(C)]
#[derive(Clone, Copy)]
struct Replay {
    count: u32,
    mask: u32,
    source: u32,
    template: [u8; 56],
}

// SAFETY: integers and bytes, without padding (12 + 56 bytes, aligned to 4).
unsafe impl Pod for Replay {}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Case {
    Drop,
    Limit,
    Forward,
    Reply,
    Stranger,
    NewFlow,
}

impl Case {
    const ALL: [Self; 6] =
        [Self::Drop, Self::Limit, Self::Forward, Self::Reply, Self::Stranger, Self::NewFlow];

    fn label(self) -> &'static str {
        match self {
            Self::Drop => "drop",
            Self::Limit => "limit",
            Self::Forward => "established, forward",
            Self::Reply => "established, reply",
            Self::Stranger => "not ours",
            Self::NewFlow => "new flow",
        }
    }

    /// The budget in nanoseconds over `drop`, given the limit.
    fn budget(self, limit: f64) -> Option<f64> {
        match self {
            Self::Drop | Self::Limit => None,
            Self::Forward | Self::Reply => Some(1.5 * limit),
            Self::Stranger => Some(25.0),
            Self::NewFlow => Some(600.0),
        }
    }

    /// What the program must answer, so that a case cannot measure a path it does not mean.
    fn answer(self) -> u32 {
        const XDP_DROP: u32 = 1;
        const XDP_PASS: u32 = 2;
        const XDP_TX: u32 = 3;
        match self {
            Self::Drop => XDP_DROP,
            Self::Limit | Self::Forward | Self::Reply | Self::NewFlow => XDP_TX,
            Self::Stranger => XDP_PASS,
        }
    }
}

/// Runs the cases and prints the table.
pub(crate) fn run(args: &Args) -> Result<()> {
    xdp_agent_tests::lab::require_root()?;
    let node = Namespace::new("bench-node")?;
    let peer = Namespace::new("bench-peer")?;
    link::veth(&node, "eth0", &peer, "eth0")?;
    node.address("eth0", NODE, 24)?;
    node.route_via([0, 0, 0, 0].into(), 0, GATEWAY.into())?;
    node.static_neighbour("eth0", GATEWAY.into(), GATEWAY_MAC)?;
    node.sysctl("net/ipv4/ip_forward", "1")?;
    let (ifindex, mac) = (node.index("eth0")?, node.mac("eth0")?);
    node.run(|| {
        // One core for all cases; moves between cores would show up as noise.
        let mut cpus = nix::sched::CpuSet::new();
        cpus.set(0)?;
        nix::sched::sched_setaffinity(nix::unistd::Pid::from_raw(0), &cpus)?;
        let mut failed = Vec::new();
        for &flows in &args.flows {
            ensure!(flows.is_power_of_two(), "--flows takes powers of two, not {flows}");
            let mut bench = Bench::new(ifindex, mac, flows)?;
            failed.extend(bench.measure(args, flows)?);
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
    fn new(ifindex: u32, mac: [u8; 6], flows: u32) -> Result<Self> {
        let mut product = load("xdp-ebpf", &["xdp_ingress"])?;
        let mut lab = load("xdp-lab", &["replay", "limit", "xdp_drop"])?;
        let mut established: HashMap<_, Raw<Key>, Raw<Flow<Addr>>> = map(&mut product, "ESTABLISHED_V4")?;
        let mut limit: HashMap<_, Raw<Key>, Raw<Flow<Addr>>> = map(&mut lab, "LIMIT")?;
        let mut known = vec![0u64; tables::KNOWN_WORDS as usize];
        for index in 0..flows {
            let (key, flow) = forward(index, ifindex, mac);
            let mut reply = Flow::ZERO;
            mirror(&key, &flow, kind::REPLY_REMOTE, exit::KERNEL, &mut reply);
            for (key, flow) in [(key, flow), (opposite(&key, &flow), reply)] {
                let bit = known_bit(&key);
                known[(bit / 64) as usize] |= 1 << (bit % 64);
                established.insert(Raw(key), Raw(flow), 0).context("filling the established table")?;
                limit.insert(Raw(key), Raw(flow), 0).context("filling the table of the limit")?;
            }
        }
        let mut words: Array<_, u64> = array(&mut product, "KNOWN_V4")?;
        for (at, word) in (0..).zip(known) {
            words.set(at, word, 0).context("filling the table of known keys")?;
        }
        configure(&mut product, ifindex, mac)?;
        Ok(Self { ifindex, mac, product, lab, sent: 0 })
    }

    fn measure(&mut self, args: &Args, flows: u32) -> Result<Vec<String>> {
        let mut samples = vec![Vec::new(); Case::ALL.len()];
        for round in 0..=args.rounds {
            for (case, samples) in Case::ALL.iter().zip(&mut samples) {
                let nanoseconds = self.case(*case, flows, args.packets)?;
                // The first round warms caches, frequency and next hops.
                if round > 0 {
                    samples.push(nanoseconds);
                }
            }
        }
        let medians: Vec<f64> = samples.iter_mut().map(|samples| median(samples)).collect();
        let (wrapper, limit) = (medians[0], medians[1] - medians[0]);
        println!("\n{flows} flows (median of {} rounds of {} packets)", args.rounds, args.packets);
        println!("{:<24}{:>10}{:>12}{:>12}{:>12}", "path", "ns", "over drop", "x limit", "budget");
        let mut failed = Vec::new();
        for (case, total) in Case::ALL.iter().zip(&medians) {
            let over = total - wrapper;
            let budget = case.budget(limit);
            let note = match budget {
                None => String::from("-"),
                Some(budget) => format!("{budget:.0} {}", if over <= budget { "ok" } else { "OVER" }),
            };
            println!("{:<24}{total:>10.1}{over:>12.1}{:>12.2}{note:>12}", case.label(), over / limit);
            if budget.is_some_and(|budget| over > budget) {
                failed.push(format!("{} at {flows} flows: {over:.0} ns", case.label()));
            }
        }
        Ok(failed)
    }

    /// Nanoseconds per packet of a case, the wrapper included.
    fn case(&mut self, case: Case, flows: u32, packets: u32) -> Result<f64> {
        let (object, name) = match case {
            Case::Drop => (&mut self.lab, "xdp_drop"),
            Case::Limit => (&mut self.lab, "limit"),
            Case::Forward | Case::Reply | Case::Stranger | Case::NewFlow => {
                (&mut self.product, "xdp_ingress")
            }
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
    let reply = || opposite(&forward(0, 0, mac).0, &forward(0, 0, mac).1);
    let (key, source, mask) = match case {
        Case::Drop | Case::Limit | Case::Forward => (forward(0, 0, mac).0, CLIENT, flows - 1),
        Case::Reply => (reply(), BACKEND, flows - 1),
        Case::Stranger => (Key { dst: STRANGER, dport: [0, 22], ..forward(0, 0, mac).0 }, CLIENT, flows - 1),
        // A range of its own, and on from where the last round stopped, so that no flow is met twice.
        Case::NewFlow => (forward(0, 0, mac).0, 0x0100_0000, NEW_FLOWS - 1),
    };
    const SYN: u8 = 0x02;
    const ACK: u8 = 0x10;
    let flags = if case == Case::NewFlow { SYN } else { ACK };
    Replay { count: sent, mask, source, template: frame(&key, mac, flags) }
}

/// Headers of a TCP segment without payload; its checksum is not what an offloading sender leaves.
fn frame(key: &Key, mac: [u8; 6], tcp_flags: u8) -> [u8; 56] {
    let mut frame = [0u8; 56];
    frame[0..6].copy_from_slice(&mac);
    frame[6..12].copy_from_slice(&GATEWAY_MAC);
    frame[12..14].copy_from_slice(&[0x08, 0x00]);
    frame[14..34].copy_from_slice(&[0x45, 0, 0, 40, 0, 1, 0x40, 0, 64, TCP, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    frame[26..30].copy_from_slice(&key.src);
    frame[30..34].copy_from_slice(&key.dst);
    frame[34..36].copy_from_slice(&key.sport);
    frame[36..38].copy_from_slice(&key.dport);
    frame[46..48].copy_from_slice(&[0x50, tcp_flags]);
    frame[50..52].copy_from_slice(&[0x12, 0x34]);
    frame
}

/// The forward half of a flow toward a backend elsewhere; each has a client and a backend of its own.
fn forward(index: u32, ifindex: u32, mac: [u8; 6]) -> (Key, Flow<Addr>) {
    let key = Key {
        src: (CLIENT + index).to_be_bytes(),
        dst: FRONTEND,
        sport: CLIENT_PORT,
        dport: PORT,
        proto: TCP,
        zero: [0; 3],
    };
    let after = Key { src: NODE, dst: (BACKEND + index).to_be_bytes(), sport: SNAT_PORT, dport: PORT, ..key };
    let mut flow = Flow {
        dmac: GATEWAY_MAC,
        smac: mac,
        ifindex,
        backend: 1,
        generation: 1,
        service: 1,
        mtu: 1500,
        kind: kind::FORWARD,
        exit: exit::TRANSMIT,
        ..Flow::ZERO
    };
    translate(&mut flow, &key, &after);
    (key, flow)
}

/// One service with backends elsewhere, behind the gateway.
fn configure(product: &mut Ebpf, ifindex: u32, mac: [u8; 6]) -> Result<()> {
    let config = Config {
        epoch: 1,
        clock: 1,
        snat_port_min: 1024,
        snat_port_max: 29_999,
        embryonic_buckets: tables::TAGS_V4.entries,
        masquerade_wire: 1,
        policy_routing: 0,
        echo: 1,
    };
    array(product, tables::CONFIG.name)?.set(0, Raw(config), 0)?;
    let device = Device {
        snat: NODE,
        flags: device::TRANSMIT | device::REDIRECT | device::ETHERNET,
        mtu: 1500,
        mac,
        zero: [0; 2],
    };
    let mut devices: HashMap<_, u32, Raw<Device<Addr>>> = map(product, tables::DEVICES_V4.name)?;
    devices.insert(ifindex, Raw(device), 0)?;
    for id in 1..=BACKENDS {
        let addr = (BACKEND + 0x0001_0000 + id).to_be_bytes();
        let backend = Backend { addr, port: PORT, proto: TCP, flags: 0, generation: 1, service: 1 };
        array(product, tables::BACKENDS_V4.name)?.set(id, Raw(backend), 0)?;
        array(product, tables::RINGS_V4.name)?.set(id - 1, id, 0)?;
    }
    let mut frontends: HashMap<_, Raw<FrontendKey<Addr>>, Raw<Frontend>> =
        map(product, tables::FRONTENDS_V4.name)?;
    let key = FrontendKey { addr: FRONTEND, port: PORT, proto: TCP, zero: 0 };
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
    for bit in [gate::frontend_bit(FRONTEND, PORT, TCP), gate::snat_bit(NODE)] {
        let mut gate: Array<&mut MapData, u64> = array(product, tables::GATE_INGRESS_V4.name)?;
        let word = gate.get(&(bit / 64), 0)?;
        gate.set(bit / 64, word | 1 << (bit % 64), 0)?;
    }
    Ok(())
}

fn load(object: &str, programs: &[&str]) -> Result<Ebpf> {
    let directory =
        env::var_os("XDP_AGENT_BPF_DIR").map_or_else(|| PathBuf::from("target/bpf"), PathBuf::from);
    let path = directory.join(object);
    let mut loaded = EbpfLoader::new()
        .load_file(&path)
        .with_context(|| format!("loading {}: run `cargo xtask build` first", path.display()))?;
    for name in programs {
        program(&mut loaded, name)?.load().with_context(|| format!("loading the program {name}"))?;
    }
    Ok(loaded)
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

fn median(samples: &mut [f64]) -> f64 {
    samples.sort_by(f64::total_cmp);
    samples[samples.len() / 2]
}
