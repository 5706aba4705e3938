//! Kustomizations: what they name exists, and nothing lies about that none names.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
};

use serde_json::Value;

use crate::files::{self, Document, list, string, strings};

/// Files that are for people or for nodes without a cluster.
const ELSEWHERE: [&str; 2] = ["deploy/README.md", "deploy/systemd/"];

/// What a kustomization may hold here: what the tests below look at.
const FIELDS: [&str; 8] =
    ["apiVersion", "kind", "namespace", "resources", "components", "patches", "images", "configMapGenerator"];

#[test]
fn every_file_is_named_by_its_kustomization_and_every_name_is_a_file() {
    let mut named = BTreeSet::new();
    for kustomization in files::kustomizations() {
        let file = kustomization.file.display();
        let fields = kustomization.content.as_object().expect("an object");
        for field in fields.keys() {
            assert!(FIELDS.contains(&field.as_str()), "{file}: these tests know nothing of {field}");
        }
        named.insert(kustomization.file.clone());
        for path in names(&kustomization) {
            let whole = files::root().join(&path);
            if path.extension().is_some() {
                assert!(whole.is_file(), "{file} names {}, which is no file", path.display());
            } else {
                let inside = whole.join("kustomization.yaml");
                assert!(inside.is_file(), "{file} names {}, which is no kustomization", path.display());
            }
            named.insert(path);
        }
    }
    let stray: Vec<PathBuf> = files::below("deploy")
        .into_iter()
        .filter(|path| {
            !named.contains(path) && !ELSEWHERE.iter().any(|elsewhere| starts_with(path, elsewhere))
        })
        .collect();
    assert!(stray.is_empty(), "no kustomization names these: {stray:?}");
}

fn starts_with(path: &Path, prefix: &str) -> bool {
    path.to_str().is_some_and(|path| path.starts_with(prefix))
}

fn names(kustomization: &Document) -> Vec<PathBuf> {
    let content = &kustomization.content;
    let mut names: Vec<String> =
        strings(content, "resources").chain(strings(content, "components")).collect();
    names.extend(list(content, "patches").iter().map(|patch| string(patch, "path").to_owned()));
    for generator in list(content, "configMapGenerator") {
        names.extend(strings(generator, "files").chain(strings(generator, "envs")));
    }
    names.iter().map(|name| kustomization.beside(name)).collect()
}

#[test]
fn kustomizations_are_of_the_kind_that_their_place_says() {
    for kustomization in files::kustomizations() {
        let is_component = starts_with(&kustomization.file, "deploy/components/");
        let (kind, version) =
            if is_component { ("Component", "v1alpha1") } else { ("Kustomization", "v1beta1") };
        assert_eq!(kustomization.kind(), kind, "{}", kustomization.file.display());
        let api = format!("kustomize.config.k8s.io/{version}");
        assert_eq!(kustomization.content["apiVersion"], api, "{}", kustomization.file.display());
    }
}

#[test]
fn patches_and_merged_settings_meet_something_in_the_base() {
    let base: Vec<Document> =
        files::objects().into_iter().filter(|object| starts_with(&object.file, "deploy/base/")).collect();
    let patches = files::patches();
    assert!(!patches.is_empty());
    for patch in patches {
        let file = patch.file.display().to_string();
        let object =
            base.iter().find(|object| (object.kind(), object.name()) == (patch.kind(), patch.name()));
        let object = object.unwrap_or_else(|| panic!("{file}: the base has no such object"));
        assert_eq!(object.content["apiVersion"], patch.content["apiVersion"], "{file}");
        let containers = |document: &Document| -> Vec<String> {
            let pod = &document.content["spec"]["template"]["spec"];
            list(pod, "containers").iter().map(|container| string(container, "name").to_owned()).collect()
        };
        let known = containers(object);
        for container in containers(&patch) {
            assert!(known.contains(&container), "{file}: the base has no container {container}");
        }
    }
    let generated = generated("deploy/base/kustomization.yaml");
    for kustomization in files::kustomizations() {
        for generator in list(&kustomization.content, "configMapGenerator") {
            if generator["behavior"] == "merge" {
                // A component sees the objects of the base with their namespace.
                assert_eq!(generator["namespace"], "kube-system", "{}", kustomization.file.display());
                let name = string(generator, "name");
                assert!(generated.contains(name), "{}: {name}", kustomization.file.display());
            }
        }
    }
}

fn generated(path: &str) -> BTreeSet<String> {
    let documents = files::documents(Path::new(path));
    let generators = documents.iter().flat_map(|document| list(&document.content, "configMapGenerator"));
    generators.map(|generator| string(generator, "name").to_owned()).collect()
}

#[test]
fn one_image_of_this_version_serves_every_architecture() {
    let (mut images, mut tags) = (BTreeSet::new(), BTreeSet::new());
    for object in files::objects() {
        files::each(&object.content, &mut |value| {
            images.extend(value["image"].as_str().map(str::to_owned));
        });
    }
    for kustomization in files::kustomizations() {
        for image in list(&kustomization.content, "images") {
            assert!(
                images.contains(string(image, "name")),
                "{}: nothing has this image",
                kustomization.file.display()
            );
            tags.insert(string(image, "newTag").to_owned());
        }
    }
    let ours: Vec<&String> = images.iter().filter(|image| image.contains("xdp-agent")).collect();
    assert_eq!(ours, ["ghcr.io/xdp-agent/xdp-agent"], "one name, and its tag is the kustomizations'");
    assert_eq!(tags, [format!("v{}", env!("CARGO_PKG_VERSION"))].into());
    for path in files::below("deploy") {
        let text = format!("{}\n{}", path.display(), files::text(&path)).to_lowercase();
        for word in ["amd64", "x86_64", "x86-64", "arm64", "aarch64", "kubernetes.io/arch"] {
            assert!(!text.contains(word), "{}: {word}", path.display());
        }
    }
}

#[test]
fn settings_that_are_merged_are_literals() {
    for kustomization in files::kustomizations() {
        for generator in list(&kustomization.content, "configMapGenerator") {
            let fields: Vec<&String> =
                generator.as_object().into_iter().flatten().map(|(field, _)| field).collect();
            let known = ["name", "namespace", "behavior", "literals", "envs", "files", "options"];
            assert!(fields.iter().all(|field| known.contains(&field.as_str())), "{fields:?}");
            for literal in list(generator, "literals").iter().filter_map(Value::as_str) {
                assert!(literal.contains('='), "{}: {literal}", kustomization.file.display());
            }
        }
    }
}
