//! `demo`: sets up, builds, and becomes the demo, which makes its own world of namespaces.

use crate::build;
use crate::host;
use crate::process;
use crate::workspace::Workspace;
use anyhow::Result;

pub(crate) fn verb(workspace: &Workspace, args: &[String]) -> Result<()> {
    host::can_become_root("demo")?;
    let agent = build::release_agent(workspace)?;
    let demo = build::binary(workspace, "demo")?;
    let mut command = host::as_root(std::path::Path::new("env"));
    command
        .arg(variable("XDP_AGENT_BIN", &agent))
        .arg(variable("XDP_AGENT_BPF_DIR", &workspace.bpf_objects()));
    process::become_process(command.arg(demo).args(args))
}

fn variable(name: &str, path: &std::path::Path) -> std::ffi::OsString {
    let mut word = std::ffi::OsString::from(name);
    word.push("=");
    word.push(path);
    word
}
