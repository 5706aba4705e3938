//! The product's object, and runs of its programs.

use std::{cell::RefCell, env, path::PathBuf};

use aya::{
    Ebpf, EbpfLoader,
    programs::{ProgramError, SchedClassifier, TestRun, TestRunOptions, Xdp},
};
use xdp_agent::{attach::programs::load_xdp, maps::Constants};
use xdp_agent_tests::lab::{self, netns::Namespace};
use xdp_common::{
    answer::AnswerFrame,
    net::{Family, V4, V6},
    tables::{Mapped, OVERFLOW_SHARE, WAYS},
};

use crate::spare::Spare;

/// Where `cargo xtask build` puts the object when it is told nothing else.
const BUILT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../target/bpf");
/// Slots of the rings, far fewer than the product has: an array is allocated whole.
const RING_SLOTS: u32 = 1 << 13;
const BACKENDS_MAX: u32 = 256;

/// One of the programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Hook {
    Xdp,
    XdpFrags,
    TcIngress,
    TcEgress,
}

impl Hook {
    fn name(self) -> &'static str {
        match self {
            Self::Xdp => "xdp_ingress",
            Self::XdpFrags => "xdp_ingress_frags",
            Self::TcIngress => "tc_ingress",
            Self::TcEgress => "tc_egress",
        }
    }
}

/// What a program said about a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    /// On up the stack at XDP, on to the next program at tc.
    Pass,
    Drop,
    Transmit,
    Redirect,
}

impl Action {
    /// From `enum xdp_action` and the `TC_ACT_*` numbers of `linux/pkt_cls.h`.
    fn of(hook: Hook, value: u32) -> Self {
        match (hook, value as i32) {
            (Hook::Xdp | Hook::XdpFrags, 1) | (Hook::TcIngress | Hook::TcEgress, 2) => Self::Drop,
            (Hook::Xdp | Hook::XdpFrags, 2) | (Hook::TcIngress | Hook::TcEgress, -1) => Self::Pass,
            (Hook::Xdp | Hook::XdpFrags, 3) => Self::Transmit,
            (Hook::Xdp | Hook::XdpFrags, 4) | (Hook::TcIngress | Hook::TcEgress, 7) => Self::Redirect,
            (hook, value) => panic!("{hook:?} answered {value}"),
        }
    }
}

/// Sizes of the flow tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Sizes {
    pub(crate) established: u32,
    pub(crate) buckets: u32,
}

impl Sizes {
    /// Entries of the hash behind the slots of the established table, as the agent makes it.
    pub(crate) fn overflow(self) -> u32 {
        (self.established / OVERFLOW_SHARE).max(1)
    }
}

impl Default for Sizes {
    fn default() -> Self {
        Self { established: 1 << 12, buckets: 1 << 10 }
    }
}

/// Where the object is; fails with one sentence that says what to do when there is none, or no right to load it.
pub(crate) fn object() -> PathBuf {
    if let Err(error) = lab::require_root() {
        panic!("{error}");
    }
    let directory = env::var_os("XDP_AGENT_BPF_DIR").map_or_else(|| PathBuf::from(BUILT), PathBuf::from);
    let path = directory.join("xdp-ebpf");
    assert!(
        path.is_file(),
        "there is no BPF object {}: run `cargo xtask test prog-run`, or `cargo xtask build` and set XDP_AGENT_BPF_DIR",
        path.display()
    );
    path
}

/// The object with maps of its own; a program is loaded when it is first run.
pub(crate) struct Programs(RefCell<Spare>);

impl Programs {
    /// Opens the object, or takes over what an earlier test has left.
    pub(crate) fn open(sizes: Sizes) -> Self {
        Self(RefCell::new(Spare::take(sizes).unwrap_or_else(|| Spare::new(sizes, load(sizes)))))
    }

    /// The object, for its maps.
    pub(crate) fn object(&mut self) -> &Ebpf {
        self.0.get_mut()
    }

    /// Runs a frame through a program in a namespace; fails when the kernel accepts no such frame.
    pub(crate) fn run(
        &self,
        hook: Hook,
        namespace: &Namespace,
        frame: &[u8],
        context: &[u8],
    ) -> Result<(Action, Vec<u8>), ProgramError> {
        let object = &mut *self.0.borrow_mut();
        namespace.run(|| run(object, hook, frame, context))
    }

    /// The same on a thread that is in the namespace already.
    pub(crate) fn run_here(
        &self,
        hook: Hook,
        frame: &[u8],
        context: &[u8],
    ) -> Result<(Action, Vec<u8>), ProgramError> {
        run(&mut self.0.borrow_mut(), hook, frame, context)
    }
}

/// What the agent tells the programs of this machine.
pub(crate) fn constants() -> Constants {
    Constants::of_this_machine().expect("the version of this kernel")
}

fn load(sizes: Sizes) -> Ebpf {
    let path = object();
    let constants = constants();
    let mut loader = EbpfLoader::new();
    constants.set(&mut loader);
    for maps in [<V4 as Family>::Addr::MAPS, <V6 as Family>::Addr::MAPS] {
        loader
            .map_max_entries(maps.established.name, sizes.established)
            .map_max_entries(maps.overflow.name, sizes.overflow())
            .map_max_entries(maps.embryonic.name, sizes.buckets * WAYS)
            .map_max_entries(maps.tags.name, sizes.buckets)
            .map_max_entries(maps.rings.name, RING_SLOTS)
            .map_max_entries(maps.backends.name, BACKENDS_MAX);
    }
    loader.load_file(&path).unwrap_or_else(|error| panic!("loading {}: {error}", path.display()))
}

fn run(
    object: &mut Ebpf,
    hook: Hook,
    frame: &[u8],
    context: &[u8],
) -> Result<(Action, Vec<u8>), ProgramError> {
    // An answer may be longer than what it answers.
    let mut out = vec![0u8; frame.len() + size_of::<AnswerFrame>()];
    let options = TestRunOptions {
        data_in: Some(frame),
        data_out: Some(&mut out),
        ctx_in: Some(context),
        ..TestRunOptions::default()
    };
    let result = match hook {
        Hook::Xdp | Hook::XdpFrags => {
            load_xdp(object, hook.name())
                .unwrap_or_else(|error| panic!("loading {}: {error:#}", hook.name()));
            let program: &mut Xdp = program(object, hook);
            program.test_run(options)
        }
        Hook::TcIngress | Hook::TcEgress => {
            let program: &mut SchedClassifier = program(object, hook);
            if program.fd().is_err() {
                program.load().unwrap_or_else(|error| panic!("loading {}: {error}", hook.name()));
            }
            program.test_run(options)
        }
    }?;
    out.truncate(result.data_size_out as usize);
    Ok((Action::of(hook, result.return_value), out))
}

fn program<'a, P>(object: &'a mut Ebpf, hook: Hook) -> &'a mut P
where
    &'a mut P: TryFrom<&'a mut aya::programs::Program, Error = ProgramError>,
{
    let program =
        object.program_mut(hook.name()).unwrap_or_else(|| panic!("the object has no {}", hook.name()));
    program.try_into().unwrap_or_else(|error| panic!("{} is another kind of program: {error}", hook.name()))
}
