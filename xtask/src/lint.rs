//! `lint`: everything that judges the sources without running them.

use crate::process;
use crate::tidy;
use crate::tool::CARGO_DENY;
use crate::workspace::Workspace;
use anyhow::{Result, bail};
use std::process::Command;

pub(crate) fn verb(workspace: &Workspace, args: &[String]) -> Result<()> {
    let advisories = match args {
        [] => false,
        [flag] if flag == "--advisories" => true,
        other => bail!("`lint` takes --advisories only, and `{}` was given", other.join(" ")),
    };
    // Each judges by itself: one run shows all there is to do.
    let verdicts = [
        ("tidy", tidy::check(workspace)),
        ("fmt", fmt(workspace)),
        ("clippy", clippy(workspace)),
        ("rustdoc", rustdoc(workspace)),
        ("cargo-deny", deny(workspace, advisories)),
    ];
    let mut failed = Vec::new();
    for (name, verdict) in verdicts {
        if let Err(error) = verdict {
            eprintln!("lint: {name}: {error:#}");
            failed.push(name);
        }
    }
    if !failed.is_empty() {
        bail!("lint failed: {}", failed.join(", "));
    }
    println!("lint: clean");
    Ok(())
}

fn fmt(workspace: &Workspace) -> Result<()> {
    ensure_component(workspace, "fmt", "rustfmt")?;
    process::run(process::cargo(workspace).args(["fmt", "--all", "--check"]))
}

fn clippy(workspace: &Workspace) -> Result<()> {
    ensure_component(workspace, "clippy", "clippy")?;
    process::run(
        process::cargo_compile(workspace)
            .args(["clippy", "--workspace", "--all-targets", "--all-features", "--quiet"])
            .args(["--", "-D", "warnings"]),
    )
}

fn rustdoc(workspace: &Workspace) -> Result<()> {
    process::run(process::cargo_compile(workspace).env("RUSTDOCFLAGS", "-D warnings").args([
        "doc",
        "--workspace",
        "--no-deps",
        "--quiet",
    ]))
}

/// Advisories come from a database that is fetched when asked for: a build must not fail because of what was published
/// since, nor need that network.
fn deny(workspace: &Workspace, advisories: bool) -> Result<()> {
    let program = CARGO_DENY.ensure()?;
    let mut command = Command::new(program);
    command.current_dir(&workspace.root).args([
        "--all-features",
        "check",
        "--hide-inclusion-graph",
        "bans",
        "licenses",
        "sources",
    ]);
    if advisories {
        command.arg("advisories");
    } else {
        eprintln!(
            "lint: advisories are not checked here; `cargo xtask lint --advisories` does, and fetches them"
        );
    }
    process::run(&mut command)
}

fn ensure_component(workspace: &Workspace, subcommand: &str, component: &str) -> Result<()> {
    if process::output(process::cargo(workspace).args([subcommand, "--version"])).is_some() {
        return Ok(());
    }
    if process::on_path("rustup").is_none() {
        bail!("`cargo {subcommand}` is missing: install {component} with the packages of your Rust");
    }
    eprintln!("lint: adding the component {component}");
    process::run(Command::new("rustup").args(["component", "add", component]))
}
