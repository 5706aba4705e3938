//! `fuzz`: the comparison of the loaded programs with the host's decision, for longer than a test run has time.

use crate::build;
use crate::host;
use crate::process;
use crate::test;
use crate::workspace::Workspace;
use anyhow::{Context, Result, bail};

/// Mutated frames, pairs of a random state and a packet, frames with ICMP about the others among them, and such with fragments
/// among them, when nothing else is asked for.
const FRAMES: u64 = 10_000_000;
const PAIRS: u64 = 1_000_000;
const ERRORS: u64 = 3_000_000;
const FRAGMENTS: u64 = 3_000_000;

#[derive(Debug, PartialEq, Eq)]
struct Asked {
    frames: u64,
    pairs: u64,
    errors: u64,
    fragments: u64,
    /// That of the tests, or another one.
    seed: Option<u64>,
}

pub(crate) fn verb(workspace: &Workspace, args: &[String]) -> Result<()> {
    let asked = parse(args)?;
    host::can_become_root("fuzz")?;
    build::release_agent(workspace)?;
    let mut command = process::cargo(workspace);
    // The tests ask the host for every decision, by code that is compiled with them.
    command.args(["test", "--release", "--config", "profile.release.package.xdp-agent-tests.opt-level=3"]);
    command.args(test::PROG_RUN).args(["--", "--nocapture", "agreement::"]);
    command.env("XDP_AGENT_FUZZ_FRAMES", asked.frames.to_string());
    command.env("XDP_AGENT_FUZZ_PAIRS", asked.pairs.to_string());
    command.env("XDP_AGENT_FUZZ_ERRORS", asked.errors.to_string());
    command.env("XDP_AGENT_FUZZ_FRAGMENTS", asked.fragments.to_string());
    if let Some(seed) = asked.seed {
        command.env("XDP_AGENT_FUZZ_SEED", seed.to_string());
    }
    process::run(&mut command)
}

fn parse(args: &[String]) -> Result<Asked> {
    let mut asked = Asked { frames: FRAMES, pairs: PAIRS, errors: ERRORS, fragments: FRAGMENTS, seed: None };
    let mut args = args.iter();
    while let Some(arg) = args.next() {
        let mut number = || -> Result<u64> {
            let value = args.next().with_context(|| format!("`{arg}` needs a number"))?;
            value.parse().with_context(|| format!("`{arg} {value}`"))
        };
        match arg.as_str() {
            "--frames" => asked.frames = number()?,
            "--pairs" => asked.pairs = number()?,
            "--errors" => asked.errors = number()?,
            "--fragments" => asked.fragments = number()?,
            "--seed" => asked.seed = Some(number()?),
            other => {
                bail!(
                    "`fuzz` does not know `{other}`; it takes --frames, --pairs, --errors and --seed, each with N"
                )
            }
        }
    }
    Ok(asked)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_taken_and_everything_else_is_refused() {
        let parse = |args: &[&str]| parse(&args.iter().map(|&arg| arg.to_owned()).collect::<Vec<_>>());
        let all = Asked { frames: FRAMES, pairs: PAIRS, errors: ERRORS, fragments: FRAGMENTS, seed: None };
        assert_eq!(parse(&[]).unwrap(), all);
        let words = "--seed 7 --frames 100 --pairs 5 --errors 3 --fragments 4";
        let asked = parse(&words.split(' ').collect::<Vec<_>>()).unwrap();
        assert_eq!(asked, Asked { frames: 100, pairs: 5, errors: 3, fragments: 4, seed: Some(7) });
        for wrong in [&["--frames"][..], &["--frames", "many"], &["100"]] {
            assert!(parse(wrong).is_err(), "{wrong:?}");
        }
    }
}
