//! The way to a registry: blobs, then the manifests that name them, then the index under its tag.

use crate::layout::{Descriptor, Layout, descriptors};
use anyhow::{Context, Result, bail};
use docker_credential::{CredentialRetrievalError, DockerCredential};
use http::HeaderValue;
use oci_client::client::{ClientConfig, ClientProtocol};
use oci_client::secrets::RegistryAuth;
use oci_client::{Client, Reference};
use std::fs::File;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

/// The key under which `docker login` keeps what is for Docker Hub.
const DOCKER_HUB: (&str, &str) = ("docker.io", "https://index.docker.io/v1/");

/// A registry that says nothing for so long is given up.
const SILENCE_MAX: Duration = Duration::from_secs(60);

/// Copies the image of a layout to `REGISTRY/NAME:TAG`; returns the digest of its index there.
///
/// What the registry has already is not sent again. The tag is written last: until then nobody sees anything of it.
///
/// # Errors
/// If the reference has no tag, the layout is damaged, or the registry refuses.
pub async fn push(layout: &Layout, to: &str, auth: &RegistryAuth) -> Result<String> {
    let tagged: Reference = to.parse().with_context(|| format!("`{to}` does not name an image"))?;
    let Some(tag) = tagged.tag().filter(|tag| to.ends_with(&format!(":{tag}"))) else {
        bail!("`{to}` has no tag: name one, as in {}:{}", crate::NAME, crate::tag());
    };
    let client = client(&tagged);
    client.store_auth_if_needed(tagged.resolve_registry(), auth).await;
    let index = layout.image()?;
    for manifest in descriptors(&layout.read_json(&index)?, "manifests")? {
        let document = layout.read_json(&manifest)?;
        let config: Descriptor = serde_json::from_value(document["config"].clone())?;
        for blob in std::iter::once(config).chain(descriptors(&document, "layers")?) {
            push_blob(&client, layout, &tagged, &blob).await?;
        }
        let by_digest = tagged.clone_with_digest(manifest.digest.clone());
        push_manifest(&client, layout, &by_digest, &manifest).await?;
    }
    push_manifest(&client, layout, &tagged, &index)
        .await
        .with_context(|| format!("cannot write the tag {tag}"))?;
    Ok(index.digest)
}

/// What `docker login` or `podman login` have left for a registry; nobody in particular without it.
pub fn credentials(to: &str) -> Result<RegistryAuth> {
    let image: Reference = to.parse().with_context(|| format!("`{to}` does not name an image"))?;
    let registry = image.registry();
    let server = if registry == DOCKER_HUB.0 { DOCKER_HUB.1 } else { registry };
    for path in credential_files() {
        let Ok(file) = File::open(&path) else { continue };
        match docker_credential::get_credential_from_reader(file, server) {
            Ok(DockerCredential::UsernamePassword(user, password)) => {
                return Ok(RegistryAuth::Basic(user, password));
            }
            Ok(DockerCredential::IdentityToken(_)) => {
                bail!(
                    "{} has an identity token for {registry}: log in with a password or an access token",
                    path.display()
                )
            }
            Err(CredentialRetrievalError::NoCredentialConfigured) => {}
            Err(error) => bail!("cannot use {} for {registry}: {error}", path.display()),
        }
    }
    Ok(RegistryAuth::Anonymous)
}

/// In the order in which containers-auth.json(5) looks at them.
fn credential_files() -> Vec<PathBuf> {
    let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    if let Some(named) = variable("REGISTRY_AUTH_FILE") {
        return vec![named];
    }
    let docker = variable("DOCKER_CONFIG").or_else(|| variable("HOME").map(|home| home.join(".docker")));
    let podman = variable("XDG_RUNTIME_DIR").map(|directory| directory.join("containers/auth.json"));
    podman.into_iter().chain(docker.map(|directory| directory.join("config.json"))).collect()
}

fn client(image: &Reference) -> Client {
    // The library's TLS takes the process's provider; a second call changes nothing.
    drop(rustls::crypto::ring::default_provider().install_default());
    let host = image.resolve_registry();
    let host = host.rsplit_once(':').map_or(host, |(host, _)| host).trim_matches(['[', ']']);
    let is_here = host == "localhost" || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback());
    Client::new(ClientConfig {
        // As the usual tools: a registry on this machine is spoken to without TLS.
        protocol: if is_here { ClientProtocol::Http } else { ClientProtocol::Https },
        // In one request: pieces are a way that some registries do not know, and layers here are small.
        use_monolithic_push: true,
        connect_timeout: Some(SILENCE_MAX),
        read_timeout: Some(SILENCE_MAX),
        ..ClientConfig::default()
    })
}

async fn push_blob(client: &Client, layout: &Layout, image: &Reference, blob: &Descriptor) -> Result<()> {
    let bytes = layout.read(blob)?;
    let refused = || format!("{} refuses the blob {}", image.registry(), blob.digest);
    if client.blob_exists(image, &blob.digest).await.with_context(refused)? {
        return Ok(());
    }
    client.push_blob(image, bytes, &blob.digest).await.with_context(refused)?;
    Ok(())
}

/// Sends the very bytes: digests are of bytes, not of documents.
async fn push_manifest(
    client: &Client,
    layout: &Layout,
    image: &Reference,
    manifest: &Descriptor,
) -> Result<()> {
    let media_type = HeaderValue::from_str(&manifest.media_type)?;
    client
        .push_manifest_raw(image, layout.read(manifest)?, media_type)
        .await
        .with_context(|| format!("{} refuses the manifest {}", image.registry(), manifest.digest))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_image_without_a_tag_is_not_sent_anywhere() {
        let directory = tempfile::tempdir().unwrap();
        let layout = Layout::create(directory.path()).unwrap();
        for to in ["registry.example.org/xdp-agent", "registry.example.org:5000/xdp-agent"] {
            let error = push(&layout, to, &RegistryAuth::Anonymous).await.unwrap_err().to_string();
            assert!(error.contains("has no tag"), "{error}");
        }
    }
}
