//! The OCI image layout: blobs under their digests, and an index that names the image.
//!
//! Image Layout Specification 1.1: `oci-layout`, `index.json`, `blobs/sha256/…`.

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Media types of the specification, as far as they occur here.
pub mod media_type {
    /// The index over all architectures.
    pub const INDEX: &str = "application/vnd.oci.image.index.v1+json";
    /// The manifest of one architecture.
    pub const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
    /// How its container is started.
    pub const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
    /// Its files.
    pub const LAYER: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
}

const LAYOUT_FILE: &str = "oci-layout";
const INDEX_FILE: &str = "index.json";

/// Names a blob, and says what it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Descriptor {
    /// What the bytes mean.
    pub media_type: String,
    /// `sha256:` and the hash of the bytes.
    pub digest: String,
    /// How many there are.
    pub size: u64,
    /// Where it runs; of manifests in an index.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub platform: Option<Platform>,
    /// What else is known.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
}

/// Where an image runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Platform {
    /// As Go has it: `amd64`, `arm64`.
    pub architecture: String,
    /// Always `linux`.
    pub os: String,
}

/// A layout on disk.
#[derive(Debug)]
pub struct Layout {
    directory: PathBuf,
}

impl Layout {
    /// Begins an empty layout, in place of one that is there.
    ///
    /// # Errors
    /// If the directory holds something else, which is left alone.
    pub fn create(directory: &Path) -> Result<Self> {
        if directory.join(LAYOUT_FILE).is_file() {
            std::fs::remove_dir_all(directory)
                .with_context(|| format!("cannot replace {}", directory.display()))?;
        } else if directory.read_dir().is_ok_and(|mut entries| entries.next().is_some()) {
            bail!("{} is neither empty nor an image layout: name another directory", directory.display());
        }
        let layout = Self { directory: directory.to_path_buf() };
        let blobs = layout.blobs();
        std::fs::create_dir_all(&blobs).with_context(|| format!("cannot create {}", blobs.display()))?;
        Ok(layout)
    }

    /// Opens a layout that has been written.
    pub fn open(directory: &Path) -> Result<Self> {
        let layout = Self { directory: directory.to_path_buf() };
        let marker = layout.json(&directory.join(LAYOUT_FILE))?;
        if marker["imageLayoutVersion"] != "1.0.0" {
            bail!("{} is of an unknown version: {marker}", directory.display());
        }
        Ok(layout)
    }

    /// Stores bytes under their digest.
    pub fn put(&self, media_type: &str, bytes: &[u8]) -> Result<Descriptor> {
        let digest = digest(bytes);
        let path = self.path(&digest)?;
        std::fs::write(&path, bytes).with_context(|| format!("cannot write {}", path.display()))?;
        Ok(Descriptor {
            media_type: media_type.to_owned(),
            digest,
            size: u64::try_from(bytes.len())?,
            platform: None,
            annotations: BTreeMap::new(),
        })
    }

    /// Stores a document; its fields are in the order of their names.
    pub fn put_json(&self, media_type: &str, document: &Value) -> Result<Descriptor> {
        self.put(media_type, &serde_json::to_vec(document)?)
    }

    /// Makes a blob the one image of this layout: the last thing that is written.
    pub fn finish(&self, image: &Descriptor) -> Result<()> {
        let index = json!({ "schemaVersion": 2, "mediaType": media_type::INDEX, "manifests": [image] });
        let files = [(INDEX_FILE, index), (LAYOUT_FILE, json!({ "imageLayoutVersion": "1.0.0" }))];
        for (name, document) in files {
            let path = self.directory.join(name);
            std::fs::write(&path, serde_json::to_vec(&document)?)
                .with_context(|| format!("cannot write {}", path.display()))?;
        }
        Ok(())
    }

    /// The one image of this layout.
    pub fn image(&self) -> Result<Descriptor> {
        let path = self.directory.join(INDEX_FILE);
        let index = self.json(&path)?;
        let [image] = index["manifests"].as_array().map_or(&[][..], Vec::as_slice) else {
            bail!("{} does not name exactly one image", path.display());
        };
        Ok(serde_json::from_value(image.clone())?)
    }

    /// The bytes that a descriptor names, of the size and the digest it says.
    pub fn read(&self, descriptor: &Descriptor) -> Result<Vec<u8>> {
        let path = self.path(&descriptor.digest)?;
        let bytes = std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        if digest(&bytes) != descriptor.digest || u64::try_from(bytes.len())? != descriptor.size {
            bail!("{} is not what its descriptor says: build the image again", path.display());
        }
        Ok(bytes)
    }

    /// As [`Layout::read`], of a document.
    pub fn read_json(&self, descriptor: &Descriptor) -> Result<Value> {
        serde_json::from_slice(&self.read(descriptor)?)
            .with_context(|| format!("{} is no JSON", descriptor.digest))
    }

    fn json(&self, path: &Path) -> Result<Value> {
        let text = std::fs::read(path)
            .with_context(|| format!("cannot read {}: is this an image layout?", path.display()))?;
        serde_json::from_slice(&text).with_context(|| format!("{} is no JSON", path.display()))
    }

    fn blobs(&self) -> PathBuf {
        self.directory.join("blobs/sha256")
    }

    fn path(&self, digest: &str) -> Result<PathBuf> {
        match digest.strip_prefix("sha256:") {
            Some(hash) if hash.len() == 64 && hash.bytes().all(|b| b.is_ascii_hexdigit()) => {
                Ok(self.blobs().join(hash))
            }
            Some(_) | None => bail!("`{digest}` is not a SHA-256 digest"),
        }
    }
}

/// The descriptors in a field of a document.
pub fn descriptors(document: &Value, field: &str) -> Result<Vec<Descriptor>> {
    serde_json::from_value(document[field].clone()).with_context(|| format!("no descriptors in `{field}`"))
}

/// `sha256:` and the hash.
pub fn digest(bytes: &[u8]) -> String {
    let hash = Sha256::digest(bytes);
    let hex: String = hash.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256:{hex}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_put_is_read_again_and_what_was_changed_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let layout = Layout::create(directory.path()).unwrap();
        let blob = layout.put(media_type::LAYER, b"abc").unwrap();
        // FIPS 180-2, appendix B.1.
        assert_eq!(blob.digest, "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
        assert_eq!(layout.read(&blob).unwrap(), b"abc");
        std::fs::write(layout.path(&blob.digest).unwrap(), b"abd").unwrap();
        assert!(layout.read(&blob).unwrap_err().to_string().contains("not what its descriptor says"));
    }

    #[test]
    fn a_directory_with_something_else_in_it_is_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("thesis.txt"), "the only copy").unwrap();
        let error = Layout::create(directory.path()).unwrap_err().to_string();
        assert!(error.contains("neither empty nor an image layout"), "{error}");
        assert!(directory.path().join("thesis.txt").is_file());
    }

    #[test]
    fn a_digest_does_not_lead_out_of_the_layout() {
        let directory = tempfile::tempdir().unwrap();
        let layout = Layout::create(directory.path()).unwrap();
        for digest in ["sha256:../../../etc/passwd", "md5:abc", ""] {
            assert!(layout.path(digest).is_err(), "{digest}");
        }
    }
}
