//! What is in the image: one layer for each architecture, how it starts, and what it says about itself.

use crate::layout::{Descriptor, Layout, Platform, media_type};
use crate::{NAME, Release, VERSION, tag};
use anyhow::{Context, Result};
use flate2::{Compression, GzBuilder};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::io::Write;

/// Where the agent is, which `kubectl exec … -- xdp-agent` finds by the image's `PATH`.
pub const PROGRAM: &str = "usr/bin/xdp-agent";

/// Where scanners of images look for documents of this form, by the ending of their names.
pub const SBOM: &str = "usr/share/doc/xdp-agent/xdp-agent.cdx.json";

/// The most that one architecture may take in a registry.
pub const COMPRESSED_BYTES_MAX: u64 = 15 << 20;

/// What differs by architecture.
#[derive(Clone, Debug)]
pub struct Half {
    /// As OCI names it.
    pub arch: String,
    /// The agent, linked statically.
    pub program: Vec<u8>,
    /// What is in it.
    pub sbom: Vec<u8>,
}

/// Writes the image of all the architectures into an empty layout; returns the descriptor of its index.
///
/// The layer has the agent, its bill of materials, and nothing else. No certificates of public authorities: the agent
/// trusts the authority that its service account or its kubeconfig brings along. No users and groups: the pod names its
/// user by number. No directories to mount into: runtimes make them.
pub fn write(layout: &Layout, release: &Release, halves: &[Half]) -> Result<Descriptor> {
    let mut manifests = Vec::new();
    for half in halves {
        let mut manifest = manifest(layout, release, half)
            .with_context(|| format!("cannot make the image for {}", half.arch))?;
        manifest.platform = Some(Platform { architecture: half.arch.clone(), os: "linux".to_owned() });
        manifests.push(manifest);
    }
    let index = json!({
        "schemaVersion": 2,
        "mediaType": media_type::INDEX,
        "manifests": manifests,
        "annotations": labels(release),
    });
    let mut index = layout.put_json(media_type::INDEX, &index)?;
    // The tag alone by the specification; containerd's own annotation has the name to import it under.
    index.annotations = BTreeMap::from([
        ("io.containerd.image.name".to_owned(), format!("{NAME}:{}", tag())),
        ("org.opencontainers.image.ref.name".to_owned(), tag()),
    ]);
    layout.finish(&index)?;
    Ok(index)
}

/// What the image says about itself, in the words of the Image Specification.
pub fn labels(release: &Release) -> BTreeMap<String, String> {
    let repository = env!("CARGO_PKG_REPOSITORY");
    let labels = [
        ("created", release.created.to_string()),
        ("description", "A kube-proxy replacement in eBPF/XDP: the agent of a node".to_owned()),
        ("documentation", format!("{repository}/blob/{}/docs/install.md", tag())),
        ("licenses", env!("CARGO_PKG_LICENSE").to_owned()),
        ("revision", release.revision.clone()),
        ("source", repository.to_owned()),
        ("title", "xdp-agent".to_owned()),
        ("url", repository.to_owned()),
        ("version", VERSION.to_owned()),
    ];
    labels.map(|(name, value)| (format!("org.opencontainers.image.{name}"), value)).into()
}

fn manifest(layout: &Layout, release: &Release, half: &Half) -> Result<Descriptor> {
    let files = archive(release, &[(PROGRAM, 0o755, &half.program), (SBOM, 0o644, &half.sbom)])?;
    let layer = layout.put(media_type::LAYER, &compressed(&files)?)?;
    let config =
        layout.put_json(media_type::CONFIG, &config(release, half, &crate::layout::digest(&files)))?;
    layout.put_json(
        media_type::MANIFEST,
        &json!({
            "schemaVersion": 2,
            "mediaType": media_type::MANIFEST,
            "config": config,
            "layers": [layer],
            "annotations": labels(release),
        }),
    )
}

fn config(release: &Release, half: &Half, diff_id: &str) -> Value {
    json!({
        "architecture": half.arch,
        "os": "linux",
        "created": release.created.to_string(),
        "config": {
            "User": "0:0",
            "Env": ["PATH=/usr/bin"],
            "Entrypoint": [format!("/{PROGRAM}")],
            "WorkingDir": "/",
            "Labels": labels(release),
        },
        "rootfs": { "type": "layers", "diff_ids": [diff_id] },
        "history": [{ "created": release.created.to_string(), "created_by": "cargo xtask image" }],
    })
}

/// A tar archive of files and of the directories above them, all root's and of the release's time.
fn archive(release: &Release, files: &[(&str, u32, &[u8])]) -> Result<Vec<u8>> {
    let mut entries: BTreeMap<String, Option<(u32, &[u8])>> = BTreeMap::new();
    for (path, mode, content) in files {
        for (at, _) in path.match_indices('/') {
            entries.insert(format!("{}/", &path[..at]), None);
        }
        entries.insert((*path).to_owned(), Some((*mode, *content)));
    }
    let mut archive = tar::Builder::new(Vec::new());
    for (path, file) in entries {
        let mut header = tar::Header::new_ustar();
        header.set_mtime(u64::try_from(release.created.as_second())?);
        header.set_uid(0);
        header.set_gid(0);
        let (kind, mode, content) = match file {
            Some((mode, content)) => (tar::EntryType::Regular, mode, content),
            None => (tar::EntryType::Directory, 0o755, &[][..]),
        };
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_size(u64::try_from(content.len())?);
        archive.append_data(&mut header, path, content)?;
    }
    Ok(archive.into_inner()?)
}

/// By gzip, without a time and without a name of the system it is made on.
fn compressed(bytes: &[u8]) -> Result<Vec<u8>> {
    /// "Unknown", by RFC 1952.
    const OPERATING_SYSTEM: u8 = 255;
    let mut gzip = GzBuilder::new().operating_system(OPERATING_SYSTEM).write(Vec::new(), Compression::best());
    gzip.write_all(bytes)?;
    Ok(gzip.finish()?)
}
