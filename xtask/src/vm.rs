//! `vm`: the lanes on other kernels and architectures, each in a machine of its own, emulated.

mod container;
mod initramfs;
mod kernel;
mod machine;
mod packages;
mod payload;
mod record;
mod results;

use crate::arch::Arch;
use crate::workspace::{Profile, Workspace};
use anyhow::{Context, Result, bail};
use initramfs::Initramfs;
use kernel::Kernel;
use results::Outcome;
use std::path::PathBuf;

/// The first process of a guest.
const INIT: &str = include_str!("vm/init.sh");

/// What is run when nothing else is asked for: the ends of what is supported, what many run, and what comes.
const KERNELS: [&str; 4] = ["5.10", "6.1", "6.12", kernel::NEWEST];

/// What a guest's processor and pages are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Architecture {
    /// x86-64.
    X86,
    /// arm64 with pages of 4 KiB.
    Arm,
    /// arm64 with pages of 16 KiB.
    Arm16k,
}

impl Architecture {
    const ALL: [Self; 3] = [Self::X86, Self::Arm, Self::Arm16k];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::X86 => "x86_64",
            Self::Arm => "arm64",
            Self::Arm16k => "arm64-16k",
        }
    }

    /// The architecture of its programs.
    pub(crate) fn arch(self) -> Arch {
        match self {
            Self::X86 => Arch::Amd64,
            Self::Arm | Self::Arm16k => Arch::Arm64,
        }
    }

    /// The end of the names of its kernels.
    pub(crate) fn flavour(self) -> &'static str {
        match self {
            Self::X86 => "amd64",
            Self::Arm => "arm64",
            Self::Arm16k => "arm64-16k",
        }
    }
}

/// A lane that runs in guests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lane {
    /// What the agent's `doctor --try` finds: whether the kernel takes the programs, and the mode of each driver.
    Doctor,
    /// Frames through the programs.
    ProgRun,
    /// Traffic between namespaces.
    Netns,
    /// Traffic over cards of every driver there is.
    Devices,
    /// The container image as the DaemonSet describes it.
    Image,
}

impl Lane {
    const ALL: [Self; 5] = [Self::Doctor, Self::ProgRun, Self::Netns, Self::Devices, Self::Image];

    /// The word on the command line, which is the feature too.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Doctor => "doctor",
            Self::ProgRun => "prog-run",
            Self::Netns => "netns",
            Self::Devices => "devices",
            Self::Image => "image",
        }
    }

    /// The test target, where the lane is one.
    pub(crate) fn target(self) -> Option<&'static str> {
        match self {
            Self::Doctor => None,
            Self::ProgRun => Some("prog_run"),
            Self::Netns => Some("netns"),
            Self::Devices => Some("devices"),
            Self::Image => Some("image"),
        }
    }

    /// A few tests that meet every program, every way out of a node, and everything the agent does with the kernel.
    fn quick(self) -> &'static [&'static str] {
        match self {
            Self::ProgRun => &[
                "forwarding::packets_of_every_form",
                "forwarding::long_frames_in_several_buffers",
                "here::answers_of_every_form",
                "answers::a_service_without_endpoints_refuses_at_once",
                "answers::tc_answers_frames_whose_checksum_is_left_to_the_device",
                "checksums::tc_delivers_to_a_backend_on_this_node_what_xdp_has_deferred",
                "checksums::tc_finishes_answers_that_xdp_has_deferred",
                "full_tables::a_flood_disturbs_no_established_flow",
                "tunnel::",
            ],
            Self::Netns => &[
                "clean_host::killing_starting_and_stopping_leaves_the_host_as_it_was::native",
                "direct::backends_see_their_clients_and_answer_past_the_node_of_entry",
                "ipv6::services_answer_over_ipv6::native_with_tx",
                "ipv6::services_answer_over_ipv6::generic_with_tx",
                "slow_path::a_second_node_behind_a_peer_without_a_program_is_served::native_with_tx",
                "sockets::pods_and_the_node_reach_every_frontend_and_see_its_address",
                "sockets_v6::",
                "traffic::http_bodies_arrive_intact::native_with_complete",
                "traffic::http_bodies_arrive_intact::generic_with_tx",
            ],
            Self::Devices => &[
                "cards::virtio_with_many_queues_runs_natively",
                "cards::virtio_that_merges_frames_for_the_guest_falls_back_and_serves",
                "cards::e1000_falls_back_and_serves",
                "cards::igb_with_frames_longer_than_its_buffers_falls_back_and_serves",
                "software::a_program_of_somebody_else_is_never_replaced",
                "software::a_veth_of_long_frames_runs_with_several_buffers_where_the_kernel_can",
                "software::a_veth_with_fewer_queues_than_its_peer_falls_back_and_serves",
            ],
            Self::Doctor | Self::Image => &[],
        }
    }

    /// How many tests run at a time: an emulated processor keeps no deadlines with more.
    fn threads(self) -> u32 {
        match self {
            Self::ProgRun => 2,
            Self::Doctor | Self::Netns | Self::Devices | Self::Image => 1,
        }
    }
}

/// A machine that is about to run.
pub(crate) struct Guest {
    pub(crate) name: String,
    pub(crate) architecture: Architecture,
    pub(crate) kernel: PathBuf,
    pub(crate) initrd: PathBuf,
    pub(crate) has_cards: bool,
    pub(crate) log: PathBuf,
}

/// What was asked for.
pub(crate) struct Request {
    kernels: Vec<String>,
    architectures: Vec<Architecture>,
    lanes: Vec<Lane>,
    profile: Profile,
    /// Parts of the names of tests that are run; all of them without.
    tests: Vec<String>,
    is_quick: bool,
    /// Whether docs/compatibility.md is to say what was found.
    is_recorded: bool,
}

impl Request {
    /// What the test program of a lane is told to run.
    pub(crate) fn tests(&self, lane: Lane) -> Vec<String> {
        let quick = lane.quick().iter().filter(|_| self.is_quick).map(|&test| test.to_owned());
        self.tests.iter().cloned().chain(quick).collect()
    }

    /// Whether the agent is built without optimisation.
    pub(crate) fn is_debug(&self) -> bool {
        matches!(self.profile, Profile::Debug)
    }

    /// What is said of a lane of which not all tests are run.
    pub(crate) fn amount(&self, lane: Lane) -> &'static str {
        if lane.target().is_none() || self.tests(lane).is_empty() {
            ""
        } else if self.is_quick {
            ", quick"
        } else {
            ", some"
        }
    }
}

pub(crate) fn verb(workspace: &Workspace, args: &[String]) -> Result<()> {
    let request = parse(args)?;
    let mark = request.is_recorded.then(|| record::mark(workspace)).transpose()?;
    let mut rows = Vec::new();
    for &architecture in &request.architectures {
        let payload = payload::pack(workspace, architecture.arch(), &request)?;
        for version in &request.kernels {
            let outcome =
                boot(workspace, architecture, version, &payload, &request.lanes).unwrap_or_else(|error| {
                    Outcome { problems: vec![format!("{error:#}")], ..Outcome::default() }
                });
            for problem in &outcome.problems {
                eprintln!("vm: {} {version}: {problem}", architecture.name());
            }
            let row = (architecture, version.clone(), outcome);
            if let Some(mark) = &mark {
                // At once: what is measured takes long, and may be broken off.
                record::write(workspace, mark, &row, &request)?;
            }
            rows.push(row);
        }
    }
    println!("{}", table(&rows, &request.lanes));
    let bad = rows.iter().filter(|(_, _, outcome)| !outcome.is_good()).count();
    if bad > 0 {
        bail!(
            "{bad} of {} machines failed; their consoles are in {}",
            rows.len(),
            machine::logs(&workspace.target)?.display()
        );
    }
    Ok(())
}

fn boot(
    workspace: &Workspace,
    architecture: Architecture,
    version: &str,
    payload: &[u8],
    lanes: &[Lane],
) -> Result<Outcome> {
    let kernel = Kernel::find(architecture, version)?;
    let mut base = Initramfs::default();
    base.copy("bin/busybox", &kernel::busybox(architecture)?)?;
    base.file("init", INIT.as_bytes());
    // The kernel opens it before anything is mounted.
    base.device("dev/console", 5, 1);
    for directory in ["proc", "sys", "tmp", "run"] {
        base.directory(directory);
    }
    base.symlink("etc/mtab", "/proc/self/mounts");
    let mut initrd = base.finish();
    initrd.extend_from_slice(payload);
    let kernel_is_too_old = kernel.is_too_old(architecture.arch());
    let lanes = if kernel_is_too_old {
        // What is unpacked later replaces what is there.
        initrd.extend_from_slice(&payload::refusal());
        &[]
    } else {
        initrd.extend_from_slice(&kernel.modules()?);
        lanes
    };
    let directory = machine::logs(&workspace.target)?;
    let name = format!("{}-{}", architecture.name(), kernel.release);
    let guest = Guest {
        initrd: directory.join(format!("{name}.initrd")),
        log: directory.join(format!("{name}.log")),
        kernel: kernel.image,
        has_cards: lanes.contains(&Lane::Devices) || lanes.contains(&Lane::Doctor),
        architecture,
        name,
    };
    std::fs::write(&guest.initrd, initrd)
        .with_context(|| format!("cannot write {}", guest.initrd.display()))?;
    let (console, problem) = machine::run(&guest)?;
    std::fs::remove_file(&guest.initrd)?;
    let mut outcome = Outcome::read(&console, lanes);
    outcome.problems.extend(problem);
    if kernel_is_too_old && outcome.refusal.is_none() {
        outcome.problems.push("the agent has not refused this kernel".to_owned());
    }
    Ok(outcome)
}

fn table(rows: &[(Architecture, String, Outcome)], lanes: &[Lane]) -> String {
    let mut text = String::from("| architecture | kernel |");
    let mut line = String::from("|---|---|");
    for lane in lanes {
        text.push_str(&format!(" {} |", lane.name()));
        line.push_str("---|");
    }
    text.push_str(&format!("\n{line}\n"));
    for (architecture, version, outcome) in rows {
        let kernel = outcome.kernel.as_ref().unwrap_or(version);
        text.push_str(&format!("| {} | {kernel} |", architecture.name()));
        for lane in lanes {
            text.push_str(&format!(" {} |", outcome.cell(*lane)));
        }
        text.push('\n');
    }
    text
}

fn parse(args: &[String]) -> Result<Request> {
    let mut request = Request {
        kernels: KERNELS.map(str::to_owned).to_vec(),
        architectures: vec![Architecture::X86, Architecture::Arm],
        lanes: Lane::ALL.to_vec(),
        profile: Profile::Release,
        tests: Vec::new(),
        is_quick: false,
        is_recorded: false,
    };
    let mut args = args.iter();
    while let Some(arg) = args.next() {
        let mut value = || args.next().with_context(|| format!("`{arg}` needs a value"));
        match arg.as_str() {
            "--kernel" => request.kernels = value()?.split(',').map(str::to_owned).collect(),
            "--arch" => request.architectures = all(value()?, &Architecture::ALL, Architecture::name)?,
            "--lane" => request.lanes = all(value()?, &Lane::ALL, Lane::name)?,
            "--test" => request.tests.extend(value()?.split(',').map(str::to_owned)),
            "--quick" => request.is_quick = true,
            "--record" => request.is_recorded = true,
            "--debug" => request.profile = Profile::Debug,
            other => bail!(
                "`vm` does not know `{other}`; it takes --kernel LIST, --arch LIST, --lane LIST, --test LIST, --quick, \
                 --record and --debug"
            ),
        }
    }
    Ok(request)
}

/// The members of a list of words.
fn all<T: Copy>(list: &str, known: &[T], name: fn(T) -> &'static str) -> Result<Vec<T>> {
    let one = |word: &str| {
        let found = known.iter().copied().find(|&one| name(one) == word);
        let names: Vec<_> = known.iter().map(|&one| name(one)).collect();
        found.with_context(|| format!("no `{word}`; there are {}", names.join(", ")))
    };
    list.split(',').map(one).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_names_what_there_is() {
        let words = |line: &str| line.split(' ').map(str::to_owned).collect::<Vec<_>>();
        let request = parse(&words("--kernel 6.1,newest --arch arm64-16k --lane netns")).unwrap();
        assert_eq!(request.kernels, ["6.1", "newest"]);
        assert_eq!((request.architectures, request.lanes), (vec![Architecture::Arm16k], vec![Lane::Netns]));
        let error = parse(&words("--arch mips")).err().map(|error| error.to_string());
        assert!(error.is_some_and(|error| error.contains("x86_64, arm64")));
        for (line, amount) in [("--kernel 6.1", ""), ("--quick", ", quick"), ("--test here::", ", some")] {
            assert_eq!(parse(&words(line)).unwrap().amount(Lane::ProgRun), amount, "{line}");
        }
    }
}
