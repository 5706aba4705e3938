//! The agent's command line.

use std::{io::IsTerminal, process::ExitCode};

use tracing::{info, warn};
use tracing_subscriber::EnvFilter;
use xdp_agent::{
    app, cleanup,
    config::{Args, Cli, Command, Config, LogFormat, Note, flags::LogArgs},
    doctor::{self, DoctorArgs},
    explain::{self, ExplainArgs},
    names,
};

fn main() -> ExitCode {
    abort_on_panic();
    names::look_up_by_files_and_dns();
    let (cli, notes) = Cli::read(std::env::args_os()).unwrap_or_else(|error| error.exit());
    let args = match cli.command {
        Command::Run(args) => args,
        Command::Explain(args) => return explain(&args),
        Command::Doctor(args) => return doctor(&args),
    };
    if let Err(message) = start_logging(&args.logs) {
        eprintln!("xdp-agent: {message}");
        return ExitCode::from(2);
    }
    match run(*args, &notes) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xdp-agent: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Lets no part of the agent go on without another: the dataplane does, and whoever watches over the agent starts it again.
fn abort_on_panic() {
    let say = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        say(panic);
        std::process::abort();
    }));
}

fn explain(args: &ExplainArgs) -> ExitCode {
    answered(explain::run(args))
}

fn doctor(args: &DoctorArgs) -> ExitCode {
    answered(doctor::run(args))
}

/// The exit status of a question that has been answered well, or not well, or not at all.
fn answered(result: anyhow::Result<bool>) -> ExitCode {
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("xdp-agent: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: Args, notes: &[Note]) -> anyhow::Result<()> {
    for Note { what, why } in notes {
        warn!(%what, why, "has no effect here");
    }
    if args.instead.init_only {
        info!("nothing to prepare");
        return Ok(());
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    if args.instead.cleanup {
        return runtime.block_on(cleanup::run(&args.programs.pin_dir));
    }
    let config = Config::resolve(args)?;
    info!(version = xdp_agent::VERSION, ?config, "starting");
    runtime.block_on(app::run(config))
}

fn start_logging(args: &LogArgs) -> Result<(), String> {
    let filter = EnvFilter::try_new(&args.log).map_err(|error| format!("--log {}: {error}", args.log))?;
    let logger = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal());
    match args.log_format {
        LogFormat::Text => logger.with_target(false).init(),
        LogFormat::Json => logger.json().flatten_event(true).init(),
    }
    Ok(())
}
