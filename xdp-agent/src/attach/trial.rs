//! Programs that are loaded to see whether they can be, and attached for a moment to see how; nothing is pinned.

use anyhow::{Context, ensure};
use aya::{EbpfLoader, VerifierLogLevel};

use super::{Programs, ensure_free, pods, sockets, xdp};
use crate::{
    config::ModeChoice,
    devices::Mode,
    host::Link,
    maps::{self, Constants},
};

/// Entries of a map that only proves that there can be one.
const ENTRIES_MAX: u32 = 64;

/// Programs that the kernel has taken.
#[derive(Debug)]
pub struct Trial(Programs);

impl Trial {
    /// Loads all that a start may need, with small maps of its own: the socket hooks where there are cgroups for them.
    ///
    /// # Errors
    /// When the kernel lacks something, in its own words.
    pub fn load(has_cgroups: bool) -> anyhow::Result<Self> {
        ensure!(
            !maps::OBJECT.is_empty(),
            "built without the BPF object: run `cargo xtask build` and build the agent again"
        );
        let mut loader = EbpfLoader::new();
        loader.verifier_log_level(VerifierLogLevel::DEBUG);
        for spec in maps::specs() {
            loader.map_max_entries(spec.name, spec.entries.min(ENTRIES_MAX));
        }
        let constants = Constants::of_this_machine()?;
        let ebpf = constants.set(&mut loader).load(maps::OBJECT).context("the kernel refuses a map")?;
        let mut programs = Programs::new(ebpf);
        programs.load()?;
        if has_cgroups {
            sockets::load(&mut programs)?;
        }
        programs.classifier("tc_host")?;
        pods::load(&mut programs)?;
        Ok(Self(programs))
    }

    /// Why the kernel does not take the programs of frames in several buffers, if it does not.
    pub fn refused_frags(&mut self) -> Option<String> {
        self.0.xdp(xdp::FRAGS).err().map(|error| format!("{error:#}"))
    }

    /// Attaches to an interface and takes off again: how it went on, and why so.
    ///
    /// The programs have no configuration and pass every frame; drivers may restart their queues.
    ///
    /// # Errors
    /// When no allowed mode is taken.
    pub fn attach(&mut self, link: &Link, choice: ModeChoice) -> anyhow::Result<(Mode, String)> {
        ensure_free(link)?;
        let (made, mode, reason) = xdp::create(&mut self.0, link, choice)?;
        made.detach().context("cannot take the trial program off")?;
        Ok((mode, reason))
    }
}
