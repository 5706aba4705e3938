//! `bench`: builds the measurements and becomes them.

use crate::build;
use crate::host;
use crate::process;
use crate::workspace::Workspace;
use anyhow::Result;

pub(crate) fn verb(workspace: &Workspace, args: &[String]) -> Result<()> {
    host::can_become_root("bench")?;
    build::release_agent(workspace)?;
    let bench = build::binary(workspace, "xdp-agent-bench")?;
    process::become_process(host::as_root(&bench).args(args))
}
