//! The layout as others read it: every blob is what its descriptor says, and nothing else is there.

#![allow(clippy::unwrap_used, reason = "what cannot be had in a test fails it")]

use oci_client::config::ConfigFile;
use oci_client::manifest::{OciImageIndex, OciImageManifest};
use std::collections::{BTreeMap, BTreeSet};
use std::io::Read;
use std::path::Path;
use xdp_agent_image::image::{self, Half, PROGRAM, SBOM};
use xdp_agent_image::layout::{Descriptor, Layout, descriptors, digest, media_type};
use xdp_agent_image::{NAME, Release, VERSION, tag};

const EPOCH: i64 = 1_795_262_345;
const CREATED: &str = "2026-11-21T11:59:05Z";

fn half(arch: &str) -> Half {
    Half {
        arch: arch.to_owned(),
        program: format!("the program for {arch}").repeat(1000).into_bytes(),
        sbom: b"{}".to_vec(),
    }
}

fn written(directory: &Path) -> Layout {
    let release =
        Release { revision: "1a2b3c".into(), created: jiff::Timestamp::from_second(EPOCH).unwrap() };
    let layout = Layout::create(directory).unwrap();
    image::write(&layout, &release, &[half("amd64"), half("arm64")]).unwrap();
    Layout::open(directory).unwrap()
}

/// Every file below a directory, with what is in it.
fn files(directory: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut files = BTreeMap::new();
    let mut directories = vec![directory.to_path_buf()];
    while let Some(at) = directories.pop() {
        for entry in at.read_dir().unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                directories.push(path);
            } else {
                let name = path.strip_prefix(directory).unwrap().to_string_lossy().into_owned();
                files.insert(name, std::fs::read(&path).unwrap());
            }
        }
    }
    files
}

fn manifests(layout: &Layout) -> Vec<Descriptor> {
    descriptors(&layout.read_json(&layout.image().unwrap()).unwrap(), "manifests").unwrap()
}

fn part(layout: &Layout, manifest: &Descriptor, field: &str) -> Descriptor {
    let document = layout.read_json(manifest).unwrap();
    let value = if field == "layers" { &document[field][0] } else { &document[field] };
    serde_json::from_value(value.clone()).unwrap()
}

fn unpacked(bytes: &[u8]) -> Vec<u8> {
    let mut archive = Vec::new();
    flate2::read::GzDecoder::new(bytes).read_to_end(&mut archive).unwrap();
    archive
}

#[test]
fn one_release_gives_the_same_bytes_every_time() {
    let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    written(one.path());
    written(two.path());
    // Over what is there, too.
    written(two.path());
    assert_eq!(files(one.path()), files(two.path()));
}

#[test]
fn the_index_names_both_architectures_and_everything_is_reached_from_it() {
    let directory = tempfile::tempdir().unwrap();
    let layout = written(directory.path());
    let index = layout.image().unwrap();
    assert_eq!(index.media_type, media_type::INDEX);
    assert_eq!(index.annotations["org.opencontainers.image.ref.name"], tag());
    assert_eq!(index.annotations["io.containerd.image.name"], format!("{NAME}:{}", tag()));
    let mut reached = BTreeSet::from([index.digest.clone()]);
    let mut platforms = Vec::new();
    for manifest in manifests(&layout) {
        assert_eq!(manifest.media_type, media_type::MANIFEST);
        let platform = manifest.platform.clone().unwrap();
        platforms.push(format!("{}/{}", platform.os, platform.architecture));
        let config = part(&layout, &manifest, "config");
        let layer = part(&layout, &manifest, "layers");
        assert_eq!(
            (config.media_type.as_str(), layer.media_type.as_str()),
            (media_type::CONFIG, media_type::LAYER)
        );
        for descriptor in [manifest, config, layer] {
            // Fails on a wrong size or digest.
            layout.read(&descriptor).unwrap();
            reached.insert(descriptor.digest);
        }
    }
    assert_eq!(platforms, ["linux/amd64", "linux/arm64"]);
    let expected: BTreeSet<_> = reached
        .iter()
        .map(|digest| digest.replacen("sha256:", "blobs/sha256/", 1))
        .chain(["index.json".to_owned(), "oci-layout".to_owned()])
        .collect();
    assert_eq!(files(directory.path()).into_keys().collect::<BTreeSet<_>>(), expected);
}

#[test]
fn a_registrys_client_reads_every_document() {
    let directory = tempfile::tempdir().unwrap();
    let layout = written(directory.path());
    let index: OciImageIndex =
        serde_json::from_slice(&layout.read(&layout.image().unwrap()).unwrap()).unwrap();
    assert_eq!((index.schema_version, index.manifests.len()), (2, 2));
    for manifest in manifests(&layout) {
        let read: OciImageManifest = serde_json::from_slice(&layout.read(&manifest).unwrap()).unwrap();
        assert_eq!((read.schema_version, read.layers.len()), (2, 1));
        let config = part(&layout, &manifest, "config");
        let read: ConfigFile = serde_json::from_slice(&layout.read(&config).unwrap()).unwrap();
        let start = read.config.unwrap();
        assert_eq!(start.entrypoint, Some(vec![format!("/{PROGRAM}")]));
        assert_eq!(read.rootfs.diff_ids.len(), 1);
    }
}

#[test]
fn the_layer_has_the_agent_and_its_bill_of_materials_and_nothing_else() {
    let directory = tempfile::tempdir().unwrap();
    let layout = written(directory.path());
    for manifest in manifests(&layout) {
        let arch = manifest.platform.clone().unwrap().architecture;
        let archive = unpacked(&layout.read(&part(&layout, &manifest, "layers")).unwrap());
        let config = layout.read_json(&part(&layout, &manifest, "config")).unwrap();
        assert_eq!(config["architecture"], arch.as_str());
        assert_eq!(config["rootfs"]["diff_ids"][0], digest(&archive));
        let mut found = BTreeMap::new();
        for entry in tar::Archive::new(&archive[..]).entries().unwrap() {
            let mut entry = entry.unwrap();
            let header = entry.header().clone();
            assert_eq!((header.uid().unwrap(), header.gid().unwrap()), (0, 0));
            assert_eq!(header.mtime().unwrap(), u64::try_from(EPOCH).unwrap());
            let mut content = Vec::new();
            entry.read_to_end(&mut content).unwrap();
            let path = entry.path().unwrap().to_string_lossy().into_owned();
            found.insert(path, (header.mode().unwrap(), content));
        }
        let half = half(&arch);
        let directories = ["usr/", "usr/bin/", "usr/share/", "usr/share/doc/", "usr/share/doc/xdp-agent/"];
        let expected: BTreeMap<String, (u32, Vec<u8>)> = directories
            .map(|path| (path.to_owned(), (0o755, Vec::new())))
            .into_iter()
            .chain([(PROGRAM.to_owned(), (0o755, half.program)), (SBOM.to_owned(), (0o644, half.sbom))])
            .collect();
        assert_eq!(found, expected);
    }
}

#[test]
fn version_and_revision_are_in_the_labels_and_in_the_annotations() {
    let directory = tempfile::tempdir().unwrap();
    let layout = written(directory.path());
    let index = layout.read_json(&layout.image().unwrap()).unwrap();
    let mut all = vec![index["annotations"].clone()];
    for manifest in manifests(&layout) {
        all.push(layout.read_json(&manifest).unwrap()["annotations"].clone());
        all.push(layout.read_json(&part(&layout, &manifest, "config")).unwrap()["config"]["Labels"].clone());
    }
    assert_eq!(all.len(), 5);
    for labels in all {
        assert_eq!(labels["org.opencontainers.image.version"], VERSION);
        assert_eq!(labels["org.opencontainers.image.revision"], "1a2b3c");
        assert_eq!(labels["org.opencontainers.image.created"], CREATED);
        assert_eq!(labels["org.opencontainers.image.licenses"], "Apache-2.0 OR MIT");
    }
}

/// A file of the repository.
fn text(path: &str) -> String {
    std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(path)).unwrap()
}

#[test]
fn the_manifests_refer_to_the_image_by_its_one_name() {
    for kustomization in ["deploy/base/kustomization.yaml", "deploy/cleanup/kustomization.yaml"] {
        let text = text(kustomization);
        let wanted = format!("- name: {NAME}\n  newTag: {}\n", tag());
        assert!(text.contains(&wanted), "{kustomization} lacks\n{wanted}");
    }
    for manifest in ["deploy/base/daemonset.yaml", "deploy/cleanup/daemonset.yaml"] {
        assert!(text(manifest).contains(&format!("image: {NAME}\n")), "{manifest}");
    }
}

#[test]
fn the_containerfile_makes_the_same_image() {
    let text = text("Containerfile");
    for line in [
        "FROM scratch".to_owned(),
        format!("COPY --chmod=0755 xdp-agent-linux-$TARGETARCH /{PROGRAM}"),
        format!("COPY --chmod=0644 xdp-agent-linux-$TARGETARCH.cdx.json /{SBOM}"),
        "ENV PATH=/usr/bin".to_owned(),
        "USER 0:0".to_owned(),
        format!("ENTRYPOINT [\"/{PROGRAM}\"]"),
    ] {
        assert!(text.lines().any(|has| has == line), "no line `{line}`");
    }
    let release = Release { revision: String::new(), created: jiff::Timestamp::UNIX_EPOCH };
    for (label, value) in image::labels(&release) {
        // Of one build; given on the command line there.
        let varies = ["created", "revision"].iter().any(|name| label.ends_with(name));
        assert!(varies || text.contains(&format!("{label}=\"{value}\"")), "no label {label}=\"{value}\"");
    }
}
