//! The container image of a release: what is in it, as an OCI image layout, and its way to a registry.
//!
//! No container daemon and no root take part: [`image`] puts a binary and its [`sbom`] into one layer for each
//! architecture, [`layout`] writes them with an index over all of them, [`push`] copies that to a registry. The same input
//! gives the same bytes, down to the digest of the index.

pub mod elf;
pub mod image;
pub mod layout;
pub mod push;
pub mod sbom;

/// The name under which the image is published, and the manifests in `deploy/` refer to it: no architecture in it.
pub const NAME: &str = "ghcr.io/xdp-agent/xdp-agent";

/// The version that is released; its image has the tag `v` and this.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

/// What a release is built from.
#[derive(Clone, Debug)]
pub struct Release {
    /// The commit, with a mark where the tree differed from it.
    pub revision: String,
    /// The time of that commit: of everything in the image that bears a time.
    pub created: jiff::Timestamp,
}

/// The tag of a version.
pub fn tag() -> String {
    format!("v{VERSION}")
}
