//! `doctor`: whether `run` would work here, in which mode each interface would run, and what would make it better.
//!
//! It asks what `run` asks, by the same code, and changes nothing: programs are loaded, with small maps, and dropped. With
//! `--try` they are put on the interfaces for a moment, which is the only way to know what a driver says.

use std::{io::Write, path::PathBuf};

use clap::Parser;

pub use self::{
    checks::{Check, Health},
    interface::InterfaceReport,
    report::Report,
};
use crate::{
    attach::trial::Trial,
    cgroup::Cgroup,
    config::{self, ModeChoice},
    explain::Output,
    neighbours, pins,
};

mod checks;
mod features;
mod interface;
mod report;

/// Whether `run` would work here; changes nothing unless `--try` is given.
#[derive(Clone, Debug, Parser)]
pub struct DoctorArgs {
    /// Interface as for `run`; repeat it or separate names by commas [default: the interfaces of the default routes].
    #[arg(long, env = "XDP_AGENT_IFACE", value_name = "IFACE", value_delimiter = ',')]
    pub iface: Vec<String>,

    /// How XDP may run, as for `run`.
    #[arg(long, env = "XDP_AGENT_MODE", value_enum, default_value_t = ModeChoice::Auto)]
    pub mode: ModeChoice,

    /// Directory of pins, as for `run`.
    #[arg(long, env = "XDP_AGENT_PIN_DIR", value_name = "DIR", default_value = "/sys/fs/bpf/xdp-agent")]
    pub pin_dir: PathBuf,

    /// Attach to each interface that carries no program, for a moment, and report what its driver says; some drivers
    /// lose packets while they start their queues anew.
    #[arg(long = "try")]
    pub is_trial: bool,

    /// How the report looks.
    #[arg(long, value_enum, default_value_t = Output::Text)]
    pub output: Output,
}

/// Prints the report on the standard output; whether `run` would work.
///
/// # Errors
/// When the interfaces cannot be read, or the output is closed.
pub fn run(args: &DoctorArgs) -> anyhow::Result<bool> {
    let report = examine(args)?;
    let out = &mut std::io::stdout().lock();
    match args.output {
        Output::Text => write!(out, "{report}")?,
        Output::Json => writeln!(out, "{}", serde_json::to_string(&report)?)?,
    }
    Ok(report.works)
}

/// Looks at everything.
fn examine(args: &DoctorArgs) -> anyhow::Result<Report> {
    let host = neighbours::read_host()?;
    let mut checks = checks::system(&args.pin_dir);
    // A kernel or a process that lacks the first of these lacks the programs too, and says it in fewer words.
    let mut trial = None;
    if !checks.iter().any(|check| check.health == Health::Bad) {
        let has_cgroups = matches!(Cgroup::find(None), Ok(Some(_)));
        let loaded = Trial::load(has_cgroups);
        checks.push(checks::programs(loaded.as_ref().err()));
        trial = loaded.ok();
        checks.extend(features::of_kernel());
        checks.extend(trial.as_mut().map(|trial| features::frags(trial.refused_frags().as_deref())));
    }
    let names = match config::interfaces(&args.iface) {
        Ok(names) => names,
        Err(error) => {
            checks.push(Check::bad("interfaces", "none", format!("{error:#}")));
            Vec::new()
        }
    };
    checks.extend(checks::network(&names, &host));
    checks.extend(checks::overlays(&names, &host));
    let mut interfaces = Vec::new();
    for name in &names {
        let Some(link) = host.link(name) else { continue };
        let tried = match &mut trial {
            Some(trial) if args.is_trial && link.xdp.program == 0 => Some(trial.attach(link, args.mode)),
            Some(_) | None => None,
        };
        interfaces.push(InterfaceReport::new(link, &host, args.mode, tried));
    }
    Ok(Report::new(checks, interfaces, pins::is_held(&args.pin_dir)))
}
