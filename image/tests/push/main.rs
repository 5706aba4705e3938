//! The way to a registry that asks who is there, checks what it is given, and wants things in their order.

#![allow(clippy::unwrap_used, reason = "what cannot be had in a test fails it")]

mod registry;

use oci_client::client::{ClientConfig, ClientProtocol};
use oci_client::secrets::RegistryAuth;
use oci_client::{Client, Reference};
use registry::{PASSWORD, Registry, USER};
use xdp_agent_image::Release;
use xdp_agent_image::image::{self, Half};
use xdp_agent_image::layout::Layout;
use xdp_agent_image::push::push;

fn layout(directory: &std::path::Path) -> Layout {
    let release = Release { revision: "1a2b3c".into(), created: jiff::Timestamp::UNIX_EPOCH };
    let half = |arch: &str| Half {
        arch: arch.to_owned(),
        program: format!("the program for {arch}").into_bytes(),
        sbom: b"{}".to_vec(),
    };
    let layout = Layout::create(directory).unwrap();
    image::write(&layout, &release, &[half("amd64"), half("arm64")]).unwrap();
    layout
}

fn known() -> RegistryAuth {
    RegistryAuth::Basic(USER.to_owned(), PASSWORD.to_owned())
}

#[tokio::test]
async fn an_image_arrives_whole_and_under_its_tag() {
    let directory = tempfile::tempdir().unwrap();
    let layout = layout(directory.path());
    let registry = Registry::start().await;
    let to = format!("{}/team/xdp-agent:v1", registry.address);
    let digest = push(&layout, &to, &known()).await.unwrap();
    assert_eq!(digest, layout.image().unwrap().digest);
    // Two configurations, two layers; two manifests, and the index by its tag.
    {
        // Given back at once: the registry wants it for every request.
        let kept = registry.kept();
        assert_eq!((kept.blobs.len(), kept.manifests.len()), (4, 4));
        assert_eq!(kept.manifests["team/xdp-agent:v1"], layout.read(&layout.image().unwrap()).unwrap());
    }
    for arch in ["amd64", "arm64"] {
        let client = puller(arch);
        let image: Reference = to.parse().unwrap();
        let (manifest, _) = client.pull_image_manifest(&image, &known()).await.unwrap();
        let mut bytes = Vec::new();
        client.pull_blob(&image, &manifest.layers[0], &mut bytes).await.unwrap();
        assert_eq!(xdp_agent_image::layout::digest(&bytes), manifest.layers[0].digest);
    }
}

/// Another's client, which takes one architecture.
fn puller(arch: &'static str) -> Client {
    drop(rustls::crypto::ring::default_provider().install_default());
    Client::new(ClientConfig {
        protocol: ClientProtocol::Http,
        platform_resolver: Some(Box::new(move |manifests| {
            let of_arch =
                |platform: &oci_client::manifest::Platform| platform.architecture.to_string() == arch;
            manifests
                .iter()
                .find(|one| one.platform.as_ref().is_some_and(of_arch))
                .map(|one| one.digest.clone())
        })),
        ..ClientConfig::default()
    })
}

#[tokio::test]
async fn what_the_registry_has_is_not_sent_again() {
    let directory = tempfile::tempdir().unwrap();
    let layout = layout(directory.path());
    let registry = Registry::start().await;
    for tag in ["v1", "v2"] {
        push(&layout, &format!("{}/xdp-agent:{tag}", registry.address), &known()).await.unwrap();
    }
    assert_eq!(registry.kept().uploads, 4);
    assert!(registry.kept().manifests.contains_key("xdp-agent:v2"));
}

#[tokio::test]
async fn nothing_is_written_for_one_whom_the_registry_does_not_know() {
    let directory = tempfile::tempdir().unwrap();
    let layout = layout(directory.path());
    let registry = Registry::start().await;
    let to = format!("{}/xdp-agent:v1", registry.address);
    for auth in [RegistryAuth::Anonymous, RegistryAuth::Basic(USER.to_owned(), "guess".to_owned())] {
        let error = format!("{:#}", push(&layout, &to, &auth).await.unwrap_err());
        assert!(error.contains("refuses the blob") && error.contains("401"), "{error}");
    }
    let kept = registry.kept();
    assert_eq!((kept.blobs.len(), kept.manifests.len()), (0, 0));
}

#[tokio::test]
async fn a_damaged_layout_never_gets_a_tag() {
    let directory = tempfile::tempdir().unwrap();
    let layout = layout(directory.path());
    let index = layout.read_json(&layout.image().unwrap()).unwrap();
    let last = index["manifests"][1]["digest"].as_str().unwrap().replacen("sha256:", "blobs/sha256/", 1);
    std::fs::write(directory.path().join(last), "{}").unwrap();
    let registry = Registry::start().await;
    let error = push(&layout, &format!("{}/xdp-agent:v1", registry.address), &known()).await.unwrap_err();
    assert!(error.to_string().contains("not what its descriptor says"), "{error:#}");
    assert!(!registry.kept().manifests.contains_key("xdp-agent:v1"));
}
