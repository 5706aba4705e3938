//! Measurements; see the README of this directory for method and traps.

mod prog;
mod sockets;
mod sync;

use clap::{Parser, Subcommand};

/// Measures, always beside its references in the same run.
#[derive(Parser)]
struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// Nanoseconds per packet of the XDP program, by BPF_PROG_TEST_RUN.
    Prog(prog::Args),
    /// Pods' connections to Services, beside direct ones and kube-proxy's rules.
    Sockets(sockets::Args),
    /// Services into the kernel: start-up, one change, memory, beside kube-proxy's rules.
    Sync(sync::Args),
}

fn main() -> anyhow::Result<()> {
    match Args::parse().what {
        What::Prog(args) => prog::run(&args),
        What::Sockets(args) => sockets::run(&args),
        What::Sync(args) => sync::run(&args),
    }
}
