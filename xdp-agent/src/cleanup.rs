//! `--cleanup`: what an agent leaves behind goes, and with it every flow.

use std::path::Path;

use tracing::info;

use crate::{attach, pins::PinDir, preflight};

/// Takes the programs of earlier agents off and removes what they have pinned under `pin_dir`.
///
/// # Errors
/// When an agent runs there, or something cannot be removed.
pub async fn run(pin_dir: &Path) -> anyhow::Result<()> {
    if !pin_dir.exists() {
        info!(pin_dir = %pin_dir.display(), "there is nothing to remove");
        return Ok(());
    }
    preflight::check_privileges()?;
    attach::remove_leftovers(&PinDir::open(pin_dir)?).await?;
    info!(pin_dir = %pin_dir.display(), "programs are off and pins are removed");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_node_without_leftovers_is_clean() {
        let directory = tempfile::tempdir().expect("a directory");
        run(&directory.path().join("never-made")).await.expect("nothing to do");
    }
}
