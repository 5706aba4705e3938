//! `run`: sets up, builds, and becomes the agent in the foreground.

use crate::build;
use crate::host;
use crate::process;
use crate::workspace::Workspace;
use anyhow::Result;
use std::process::Command;

pub(crate) fn verb(workspace: &Workspace, args: &[String]) -> Result<()> {
    // `cargo xtask run -- ARGS` and `cargo xtask run ARGS` mean the same.
    let args = args.strip_prefix(&["--".to_owned()]).unwrap_or(args);
    let args = args.strip_prefix(&["--release".to_owned()]).unwrap_or(args);
    let args = args.strip_prefix(&["--".to_owned()]).unwrap_or(args);
    if args.iter().any(|arg| arg == "--help" || arg == "-h") {
        let agent = build::release_agent(workspace)?;
        return process::become_process(Command::new(agent).arg("run").args(args));
    }
    host::can_become_root("run")?;
    let agent = build::release_agent(workspace)?;
    host::mount_bpffs()?;
    process::become_process(host::as_root(&agent).arg("run").args(args))
}
