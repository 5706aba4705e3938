//! The agent's command line.

use std::{io::IsTerminal, process::ExitCode};

use clap::Parser;
use tracing::info;
use tracing_subscriber::EnvFilter;
use xdp_agent::{
    app,
    config::{Args, Cli, Command, Config, LogFormat},
};

fn main() -> ExitCode {
    let Command::Run(args) = Cli::parse().command;
    if let Err(message) = start_logging(&args) {
        eprintln!("xdp-agent: {message}");
        return ExitCode::from(2);
    }
    match run(*args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xdp-agent: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: Args) -> anyhow::Result<()> {
    let config = Config::resolve(args)?;
    info!(version = env!("CARGO_PKG_VERSION"), ?config, "starting");
    tokio::runtime::Builder::new_multi_thread().enable_all().build()?.block_on(app::run(config))
}

fn start_logging(args: &Args) -> Result<(), String> {
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
