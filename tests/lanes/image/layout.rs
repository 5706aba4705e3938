//! The half of the image that runs on this machine, taken out of its layout.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use tempfile::TempDir;

/// An unpacked image.
pub(crate) struct Image {
    /// How it is started, and what it says about itself.
    pub(crate) config: Value,
    root: TempDir,
}

impl Image {
    /// Unpacks what `XDP_AGENT_IMAGE` names.
    pub(crate) fn open() -> Result<Self> {
        let Some(layout) = std::env::var_os("XDP_AGENT_IMAGE").map(PathBuf::from) else {
            bail!("XDP_AGENT_IMAGE names no image layout: run `cargo xtask test image`, which makes one");
        };
        let arch = if cfg!(target_arch = "x86_64") { "amd64" } else { "arm64" };
        let image = &read(&layout.join("index.json"))?["manifests"][0];
        let index = read(&blob(&layout, image)?)?;
        let manifests = index["manifests"].as_array().context("the index names no manifests")?;
        let manifest = manifests.iter().find(|manifest| manifest["platform"]["architecture"] == arch);
        let manifest = read(&blob(&layout, manifest.with_context(|| format!("no image for {arch}"))?)?)?;
        let config = read(&blob(&layout, &manifest["config"])?)?;
        let root = tempfile::tempdir()?;
        for layer in manifest["layers"].as_array().context("the manifest names no layers")? {
            let mut tar = Command::new("tar");
            tar.arg("--extract").arg("--gzip").arg("--file").arg(blob(&layout, layer)?);
            let status = tar.arg("--directory").arg(root.path()).status().context("cannot start tar")?;
            ensure!(status.success(), "tar cannot unpack the layer");
        }
        Ok(Self { config, root })
    }

    /// The directory that becomes the container's root.
    pub(crate) fn root(&self) -> &Path {
        self.root.path()
    }

    /// One of the labels that every image has.
    pub(crate) fn label(&self, name: &str) -> Result<&str> {
        let label = &self.config["config"]["Labels"][format!("org.opencontainers.image.{name}")];
        label.as_str().with_context(|| format!("the image has no label {name}"))
    }

    /// Every file, by its path from the root, sorted.
    pub(crate) fn files(&self) -> Result<Vec<String>> {
        let mut files = Vec::new();
        let mut directories = vec![self.root.path().to_path_buf()];
        while let Some(directory) = directories.pop() {
            for entry in directory.read_dir()? {
                let path = entry?.path();
                if path.is_dir() {
                    directories.push(path);
                } else {
                    files.push(path.strip_prefix(self.root.path())?.to_string_lossy().into_owned());
                }
            }
        }
        files.sort();
        Ok(files)
    }
}

fn blob(layout: &Path, descriptor: &Value) -> Result<PathBuf> {
    let digest = descriptor["digest"].as_str().with_context(|| format!("no digest in {descriptor}"))?;
    Ok(layout.join("blobs").join(digest.replacen(':', "/", 1)))
}

fn read(path: &Path) -> Result<Value> {
    let text = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    serde_json::from_slice(&text).with_context(|| format!("{} is no JSON", path.display()))
}
