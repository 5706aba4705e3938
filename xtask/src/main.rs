//! The verbs of this repository, as `cargo xtask VERB`. One file per verb; the rest is what they share.

mod arch;
mod bench;
mod build;
mod compiler;
mod cross;
mod demo;
mod dist;
mod fuzz;
mod host;
mod image;
mod lint;
mod process;
mod remap;
mod run;
mod setup;
mod stack;
mod test;
mod tidy;
mod tool;
mod vm;
mod workspace;

use anyhow::{Result, bail};
use workspace::Workspace;

const HELP: &str = "\
cargo xtask VERB [ARGS]

  setup [--cross]                       find or install the eBPF toolchain, say what was found; the release's too
  build [--debug] [--features LIST]     the BPF objects, then the agent (feature: trace)
  run ARGS                              set-up, build, then `xdp-agent run ARGS` (`run --help` shows its flags)
  demo [ARGS]                           a small world of namespaces with real traffic through the agent
  test [LANE...]                        lanes: host, prog-run, netns, kubernetes, image by default; emulated
  fuzz [--frames N] [--pairs N] [--errors N] [--fragments N] [--seed N]
                                        mutated frames, random states and packets, ICMP about them, and fragments,
                                        through programs and host
  lint [--advisories]                   fmt, clippy, rustdoc, cargo-deny, tidy
  tidy                                  the rules of the source tree that a program can check
  dist [--arch NAME] [--check]          static binaries for amd64 and arm64, with checksums, into target/dist;
                                        or two builds of the commit at different places, compared
  image [--arch NAME] [--push REF]      the OCI image of both, into target/dist/image and to REGISTRY/NAME:TAG
  vm [--kernel LIST] [--arch LIST]      lanes in emulated machines: 5.10, 6.1, 6.12, newest; x86_64, arm64, arm64-16k
  bench NAME [ARGS]                     measurements, each beside its references (`bench prog`)

CARGO_TARGET_DIR is honoured. XDP_AGENT_BPF_RUSTC names the compiler for the BPF programs when the one that is
found by itself is not the one wanted.";

fn main() {
    let mut args = std::env::args().skip(1);
    let verb = args.next();
    let rest: Vec<String> = args.collect();
    if let Err(error) = dispatch(verb.as_deref(), &rest) {
        eprintln!("error: {error:#}");
        std::process::exit(1);
    }
}

fn dispatch(verb: Option<&str>, args: &[String]) -> Result<()> {
    let workspace = Workspace::find()?;
    match verb {
        Some("setup") => setup::verb(&workspace, args),
        Some("build") => build::verb(&workspace, args),
        Some("run") => run::verb(&workspace, args),
        Some("demo") => demo::verb(&workspace, args),
        Some("test") => test::verb(&workspace, args),
        Some("fuzz") => fuzz::verb(&workspace, args),
        Some("lint") => lint::verb(&workspace, args),
        Some("tidy") => tidy::verb(&workspace, args),
        Some("dist") => dist::verb(&workspace, args),
        Some("image") => image::verb(&workspace, args),
        Some("vm") => vm::verb(&workspace, args),
        Some("bench") => bench::verb(&workspace, args),
        None | Some("help" | "--help" | "-h") => {
            println!("{HELP}");
            Ok(())
        }
        Some(other) => bail!("no verb `{other}`; `cargo xtask --help` lists them"),
    }
}
