//! Measurements of the datapath; see the README of this directory for method and traps.

mod prog;

use clap::{Parser, Subcommand};

/// Measures the datapath, always beside its references in the same run.
#[derive(Parser)]
struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// Nanoseconds per packet of the XDP program, by BPF_PROG_TEST_RUN.
    Prog(prog::Args),
}

fn main() -> anyhow::Result<()> {
    match Args::parse().what {
        What::Prog(args) => prog::run(&args),
    }
}
