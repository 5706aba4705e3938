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

/// The middle of some figures, the higher one of two; not a number where there are none.
fn median(values: &[f64]) -> f64 {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_a_value_that_was_measured() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert!(median(&[]).is_nan());
    }
}
