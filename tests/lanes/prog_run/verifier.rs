//! What the programs cost the verifier, held against the record in `cases/verifier.txt`.

use std::{
    collections::BTreeMap,
    env, fmt,
    fs::{self, File},
    os::fd::AsFd as _,
    thread,
};

use aya::{
    Ebpf, EbpfLoader, VerifierLogLevel,
    programs::{Program, ProgramError, ProgramInfo},
};
use nix::sched::{CloneFlags, unshare};

use crate::{
    programs,
    stack::{self, STACK_MAX, Used},
};

/// Where the record is written.
const RECORD: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/cases/verifier.txt");
/// The record: the machines of `cargo xtask vm` have no files of the repository.
const RECORDED: &str = include_str!("../../cases/verifier.txt");
/// Instructions that the verifier follows at most (`BPF_COMPLEXITY_LIMIT_INSNS`).
const INSTRUCTIONS_MAX: u64 = 1_000_000;
/// What a figure may grow by, in percent, before somebody has to accept it.
const GROWTH_MAX: u64 = 10;
/// Descriptors that this process may have open.
const DESCRIPTORS_MAX: u64 = 1024;

/// The figures of a program, in the order of the record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Cost([u64; 6]);

impl Cost {
    const NAMES: [&str; 6] =
        ["instructions", "total_states", "peak_states", "stack_bytes", "xlated_bytes", "jited_bytes"];

    fn instructions(self) -> u64 {
        self.0[0]
    }

    /// The figures that have grown by more than is granted since another time.
    fn grown(self, before: Self) -> Vec<String> {
        let figures = Self::NAMES.iter().zip(before.0).zip(self.0);
        let grown = figures.filter(|((_, before), now)| now * 100 > before * (100 + GROWTH_MAX));
        grown.map(|((name, before), now)| format!("{name} from {before} to {now}")).collect()
    }
}

/// The kernel that was measured on, and the figures by program.
#[derive(Debug, PartialEq, Eq)]
struct Record {
    kernel: String,
    costs: BTreeMap<String, Cost>,
}

impl fmt::Display for Record {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "# What the programs cost the verifier. A test of the lane prog-run fails when a figure grows by more than\n\
             # {GROWTH_MAX} %, on a kernel of this version and architecture; XDP_AGENT_BLESS=1 accepts it by writing this file anew.\n\
             # The stack is counted as kernels before 6.8 do: each frame of a chain of calls rounded up to 32 bytes."
        )?;
        writeln!(f, "kernel {}", self.kernel)?;
        writeln!(f, "{:<20}{}", "program", Cost::NAMES.map(|name| format!("{name:>14}")).concat())?;
        for (program, cost) in &self.costs {
            writeln!(f, "{program:<20}{}", cost.0.map(|figure| format!("{figure:>14}")).concat())?;
        }
        Ok(())
    }
}

impl Record {
    fn parse(text: &str) -> Option<Self> {
        let mut lines = text.lines().filter(|line| !line.starts_with('#'));
        let kernel = lines.next()?.strip_prefix("kernel ")?.to_owned();
        let cost = |line: &str| {
            let mut words = line.split_whitespace();
            let program = words.next()?.to_owned();
            let figures: Vec<u64> = words.map(str::parse).collect::<Result<_, _>>().ok()?;
            Some((program, Cost(figures.try_into().ok()?)))
        };
        Some(Self { kernel, costs: lines.skip(1).map(cost).collect::<Option<_>>()? })
    }
}

/// Version and architecture of the kernel: figures differ between both.
fn kernel() -> String {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").expect("the kernel has a release");
    let version: Vec<&str> = release.trim().split('.').take(2).collect();
    format!("{} {}", version.join("."), env::consts::ARCH)
}

/// Measures every XDP and tc program.
fn measure() -> BTreeMap<String, Cost> {
    let object = programs::object();
    let mut stacks = BTreeMap::new();
    for Used { program, bytes, chain, .. } in stack::used(&object).expect("the object that was just built") {
        assert!(bytes <= STACK_MAX, "{program}: {bytes} bytes of stack:\n{}", chain.join("\n"));
        stacks.insert(program, bytes);
    }
    let constants = programs::constants();
    let mut loaded = constants
        .set(EbpfLoader::new().verifier_log_level(VerifierLogLevel::STATS))
        .load_file(&object)
        .unwrap_or_else(|error| panic!("loading {}: {error}", object.display()));
    let states = states(&mut loaded);
    let mut costs = BTreeMap::new();
    for (name, program) in loaded.programs_mut() {
        let Some(info) = load(program) else { continue };
        let info = info.unwrap_or_else(|error| panic!("loading {name}: {error}"));
        let (total_states, peak_states) = states[name];
        costs.insert(
            name.to_owned(),
            Cost([
                info.verified_instruction_count().unwrap_or(0).into(),
                total_states,
                peak_states,
                stacks[name].into(),
                info.size_translated().unwrap_or(0).into(),
                info.size_jitted().into(),
            ]),
        );
    }
    costs
}

/// Loads a program, if it is one for packets.
fn load(program: &mut Program) -> Option<Result<ProgramInfo, ProgramError>> {
    if let Program::Xdp(program) = program {
        Some(program.load().and_then(|()| program.info()))
    } else if let Program::SchedClassifier(program) = program {
        Some(program.load().and_then(|()| program.info()))
    } else {
        None
    }
}

/// The states of each program, in total and at most at once.
///
/// The verifier says so in its log alone, which the loader keeps only when a load fails. So it fails, at its very last
/// step: on a thread that has no descriptor left for the program.
fn states(object: &mut Ebpf) -> BTreeMap<String, (u64, u64)> {
    let limit = libc::rlimit { rlim_cur: DESCRIPTORS_MAX, rlim_max: DESCRIPTORS_MAX };
    let work = || {
        unshare(CloneFlags::CLONE_FILES).expect("a thread may have descriptors of its own");
        // SAFETY: the structure is initialised; the limit is more than any test of this lane needs.
        let result = unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &limit) };
        assert_eq!(result, 0, "a limit may be lowered");
        let null = File::open("/dev/null").expect("every machine has it");
        let mut taken = Vec::new();
        while let Ok(descriptor) = null.as_fd().try_clone_to_owned() {
            taken.push(descriptor);
        }
        let mut states = BTreeMap::new();
        for (name, program) in object.programs_mut() {
            let Some(result) = load(program) else { continue };
            let Err(ProgramError::LoadError { verifier_log, .. }) = result else {
                panic!("{name}: it was loaded without a descriptor, or not at all: {result:?}");
            };
            let log = verifier_log.to_string();
            let number = |name: &str| {
                let mut words = log.split_whitespace();
                words.find(|word| *word == name);
                words.next().and_then(|word| word.parse().ok())
            };
            let (Some(total), Some(peak)) = (number("total_states"), number("peak_states")) else {
                panic!("{name}: the verifier says nothing of states:\n{log}");
            };
            states.insert(name.to_owned(), (total, peak));
        }
        states
    };
    thread::scope(|scope| scope.spawn(work).join()).expect("the thread says itself what is wrong")
}

#[test]
fn the_programs_cost_the_verifier_no_more_than_is_recorded() {
    let now = Record { kernel: kernel(), costs: measure() };
    for (program, cost) in &now.costs {
        let instructions = cost.instructions();
        assert!(instructions < INSTRUCTIONS_MAX, "{program}: {instructions} instructions");
    }
    if env::var_os("XDP_AGENT_BLESS").is_some() {
        fs::write(RECORD, now.to_string()).expect("the record can be written");
        return;
    }
    let before = Record::parse(RECORDED).unwrap_or_else(|| panic!("{RECORD} is not as it is written"));
    if now.kernel != before.kernel {
        // Another verifier; the limits above hold for it all the same.
        println!("measured on {}, not {}: not compared with the record\n{now}", now.kernel, before.kernel);
        return;
    }
    let names = |record: &Record| record.costs.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(&now), names(&before), "other programs: XDP_AGENT_BLESS=1 writes the record anew");
    for (program, cost) in &now.costs {
        let grown = cost.grown(before.costs[program]);
        assert!(
            grown.is_empty(),
            "{program} costs more than {GROWTH_MAX} % more than is recorded: {}; XDP_AGENT_BLESS=1 accepts it",
            grown.join(", ")
        );
    }
}

/// What the agent tells programs only spares them something: without it, as on a processor that reorders reads, the verifier follows
/// other ways, and takes them too. What they do then, the same lane shows on arm64.
#[test]
fn the_programs_are_taken_without_being_told_of_the_machine() {
    let object = programs::object();
    let mut loaded = EbpfLoader::new()
        .load_file(&object)
        .unwrap_or_else(|error| panic!("loading {}: {error}", object.display()));
    for (name, program) in loaded.programs_mut() {
        if let Some(Err(error)) = load(program) {
            panic!("loading {name}: {error}");
        }
    }
}

/// An indirect jump costs a packet 8 ns where the kernel guards them.
#[test]
fn every_tail_call_names_its_slot() {
    for Used { program, loose_tail_calls, .. } in
        stack::used(&programs::object()).expect("the object was built")
    {
        assert_eq!(loose_tail_calls, 0, "{program} has tail calls with the slot in a register");
    }
}

#[test]
fn a_record_reads_as_it_is_written_and_growth_counts_from_eleven_percent() {
    let cost = Cost([1_000, 100, 10, 512, 4_096, 8_192]);
    let record = Record { kernel: "6.18 x86_64".into(), costs: BTreeMap::from([("xdp".into(), cost)]) };
    assert_eq!(Record::parse(&record.to_string()), Some(record));
    let mut more = cost;
    more.0[0] = 1_100;
    assert_eq!(more.grown(cost), Vec::<String>::new());
    more.0[0] = 1_101;
    assert_eq!(more.grown(cost), ["instructions from 1000 to 1101"]);
}
