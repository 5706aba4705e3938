use std::os::unix::fs::symlink;

use super::*;
use crate::cluster::wanted::Protocol;

mod in_place;

struct Files {
    dir: tempfile::TempDir,
}

impl Files {
    fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }

    fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn write(&self, name: &str, text: &str) -> PathBuf {
        fs::write(self.at(name), text).unwrap();
        self.at(name)
    }

    fn read(&self, previous: Option<&Snapshot>) -> Snapshot {
        read(&[self.dir.path().to_owned()], previous)
    }
}

fn service(name: &str, ip: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Service\nmetadata:\n  name: {name}\n  namespace: shop\nspec:\n  clusterIP: {ip}\n"
    )
}

/// Every Service as `namespace/name clusterIP`.
fn services(snapshot: &Snapshot) -> Vec<String> {
    let ip = |service: &Service| service.cluster_ips.first().map(ToString::to_string).unwrap_or_default();
    snapshot.objects.services.iter().map(|(name, service)| format!("{name} {}", ip(service))).collect()
}

fn kinds(snapshot: &Snapshot) -> Vec<ProblemKind> {
    snapshot.problems.iter().map(|problem| problem.kind).collect()
}

#[test]
fn every_form_that_kubectl_prints_is_read() {
    let files = Files::new();
    let (a, b) = (service("a", "10.0.0.1"), service("b", "10.0.0.2"));
    files.write(
        "1.yaml",
        &format!("{a}---\n{b}---\napiVersion: apps/v1\nkind: Deployment\nmetadata: {{name: x}}\n"),
    );
    files.write(
        "2.yml",
        "apiVersion: v1\nkind: List\nitems:\n\
         - {apiVersion: v1, kind: Service, metadata: {name: c}, spec: {clusterIP: 10.0.0.3}}\n\
         - {apiVersion: v1, kind: Node, metadata: {name: n1, namespace: ignored}}\n\
         - {apiVersion: v1, kind: Pod, metadata: {name: p}}\n",
    );
    files.write(
        "3.json",
        r#"{"apiVersion": "v1", "kind": "ServiceList", "items": [{"metadata": {"name": "d"}}]}
           {"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSliceList", "items": [
              {"metadata": {"name": "s", "labels": {"kubernetes.io/service-name": "d"}}, "addressType": "IPv4",
               "endpoints": null, "ports": [{"port": 80}]}]}
           {"apiVersion": "networking.k8s.io/v1", "kind": "ServiceCIDR", "metadata": {"name": "kubernetes"},
            "spec": {"cidrs": ["10.96.0.0/16"]}}
           {"apiVersion": "v1", "kind": "NodeList", "items": [{"metadata": {"name": "n2"}}]}
           {"apiVersion": "v1", "kind": "PodList", "items": [{}, {}]}
           {"apiVersion": "v1", "kind": "ServiceList", "items": null}"#,
    );
    files.write(".hidden.yaml", "kind: [");
    files.write("notes.txt", "kind: [");
    fs::create_dir(files.at("deeper.yaml")).unwrap();
    let snapshot = files.read(None);
    assert_eq!(snapshot.problems, []);
    assert_eq!(
        services(&snapshot),
        ["default/c 10.0.0.3", "default/d ", "shop/a 10.0.0.1", "shop/b 10.0.0.2"]
    );
    assert_eq!(snapshot.objects.nodes.keys().collect::<Vec<_>>(), ["n1", "n2"]);
    assert_eq!(snapshot.objects.service_cidrs.keys().collect::<Vec<_>>(), ["kubernetes"]);
    let slice = snapshot.objects.slices.values().next().unwrap();
    assert_eq!((&*slice.ports[0].name, slice.ports[0].protocol), ("", Protocol::Tcp));
    assert_eq!(snapshot.ignored, 4);
}

#[test]
fn one_bad_document_does_not_stop_the_good_ones_and_keeps_its_object() {
    let files = Files::new();
    let (a, b, c) = (service("a", "10.0.0.1"), service("b", "10.0.0.2"), service("c", "10.0.0.3"));
    files.write("1.yaml", &[a.as_str(), &b, &c].join("---\n"));
    let first = files.read(None);
    let changed =
        [service("a", "10.0.9.1"), format!("{b}  ports: [\n"), service("c", "10.0.9.3")].join("---\n");
    files.write("1.yaml", &changed);
    let second = files.read(Some(&first));
    assert_eq!(services(&second), ["shop/a 10.0.9.1", "shop/b 10.0.0.2", "shop/c 10.0.9.3"]);
    let problem = &second.problems[0];
    assert_eq!((second.problems.len(), problem.kind), (1, ProblemKind::Syntax));
    assert_eq!(problem.object.as_deref(), Some("Service shop/b"));
    let place = problem.place.as_ref().unwrap();
    assert!(place.document == 2 && (9..=17).contains(&place.line.unwrap()), "{problem}");
    // It stays through another read, and goes when the document goes.
    let third = files.read(Some(&second));
    assert_eq!(services(&third).len(), 3);
    files.write("1.yaml", &service("a", "10.0.9.1"));
    assert_eq!(services(&files.read(Some(&third))), ["shop/a 10.0.9.1"]);
}

#[test]
fn a_field_that_does_not_fit_is_named_and_keeps_the_object() {
    let files = Files::new();
    files.write("1.yaml", &service("a", "10.0.0.1"));
    let first = files.read(None);
    files.write("1.yaml", &format!("{}  ports:\n  - port: http\n", service("a", "10.0.9.1")));
    let second = files.read(Some(&first));
    assert_eq!(services(&second), ["shop/a 10.0.0.1"]);
    let text = second.problems[0].to_string();
    assert!(text.contains("Service shop/a: spec.ports[0].port: invalid type"), "{text}");
    assert!(text.contains("1.yaml:1 (document 1)"), "{text}");
}

#[test]
fn what_cannot_be_recognised_keeps_everything_of_its_file() {
    let files = Files::new();
    let list = "apiVersion: v1\nkind: List\nitems:\n\
                - {apiVersion: v1, kind: Service, metadata: {name: a}, spec: {clusterIP: 10.0.0.1}}\n\
                - {apiVersion: v1, kind: Service, metadata: {name: b}, spec: {clusterIP: 10.0.0.2}}\n";
    files.write("1.yaml", list);
    files.write("2.yaml", &service("c", "10.0.0.3"));
    let first = files.read(None);
    for broken in [format!("{list}- {{\n"), "{{{".to_owned(), "just text\n".to_owned(), "- 1\n".to_owned()] {
        files.write("1.yaml", &broken);
        fs::remove_file(files.at("2.yaml")).ok();
        let second = files.read(Some(&first));
        assert_eq!(services(&second), ["default/a 10.0.0.1", "default/b 10.0.0.2"], "{broken}");
        assert_eq!(second.problems.len(), 1, "{broken}");
    }
    let item = list.replace("name: b", "name: 7");
    files.write("1.yaml", &item);
    assert_eq!(services(&files.read(Some(&first))).len(), 2);
}

#[test]
fn files_that_cannot_be_read_keep_their_objects() {
    let files = Files::new();
    let one = files.write("1.yaml", &service("a", "10.0.0.1"));
    let paths = [one.clone()];
    let first = read(&paths, None);
    fs::remove_file(&one).unwrap();
    let gone = read(&paths, Some(&first));
    assert_eq!((services(&gone), kinds(&gone)), (services(&first), vec![ProblemKind::Unreadable]));
    fs::write(&one, [0xff, 0xfe, 0x00]).unwrap();
    let binary = read(&paths, Some(&gone));
    assert_eq!((services(&binary), kinds(&binary)), (services(&first), vec![ProblemKind::Unreadable]));
    fs::File::create(&one).unwrap().set_len(FILE_BYTES_MAX + 1).unwrap();
    let large = read(&paths, Some(&binary));
    assert_eq!(services(&large), services(&first));
    assert!(large.problems[0].message.contains("larger than 64 MiB"));
    fs::write(&one, "").unwrap();
    let empty = read(&paths, Some(&large));
    assert_eq!((services(&empty).len(), empty.problems.len()), (0, 0));
}

#[test]
fn a_directory_that_vanishes_keeps_its_objects_and_a_file_that_vanishes_does_not() {
    let files = Files::new();
    let sub = files.at("sub");
    fs::create_dir(&sub).unwrap();
    files.write("sub/1.yaml", &service("a", "10.0.0.1"));
    files.write("sub/2.yaml", &service("b", "10.0.0.2"));
    let paths = [sub.clone()];
    let first = read(&paths, None);
    fs::remove_file(files.at("sub/2.yaml")).unwrap();
    let second = read(&paths, Some(&first));
    assert_eq!((services(&second), second.problems.len()), (vec!["shop/a 10.0.0.1".to_owned()], 0));
    fs::remove_dir_all(&sub).unwrap();
    let third = read(&paths, Some(&second));
    assert_eq!((services(&third), kinds(&third)), (services(&second), vec![ProblemKind::Unreadable]));
}

#[test]
fn an_object_in_two_places_counts_once_and_is_reported() {
    let files = Files::new();
    files.write("1.yaml", &service("a", "10.0.0.1"));
    files.write("2.yaml", &service("a", "10.0.0.2"));
    let snapshot = files.read(None);
    assert_eq!(services(&snapshot), ["shop/a 10.0.0.1"]);
    assert_eq!(kinds(&snapshot), [ProblemKind::DuplicateObject]);
    let twice = read(&[files.at("1.yaml"), files.at("1.yaml")], None);
    assert_eq!(twice.problems, []);
}

#[test]
fn objects_of_another_version_and_without_a_name_are_problems() {
    let files = Files::new();
    files.write("1.yaml", &service("a", "10.0.0.1").replace("apiVersion: v1", "apiVersion: v2"));
    files.write("2.yaml", "apiVersion: v1\nkind: Service\nmetadata: {}\n");
    files.write("3.yaml", "apiVersion: discovery.k8s.io/v1beta1\nkind: EndpointSlice\nmetadata: {name: x}\n");
    files.write("4.yaml", "apiVersion: v1\nkind: ServiceList\nitems: {}\n");
    let snapshot = files.read(None);
    assert_eq!(kinds(&snapshot), [ProblemKind::Invalid; 4]);
    assert!(services(&snapshot).is_empty());
}

#[test]
fn links_are_followed_as_in_a_mounted_config_map() {
    let files = Files::new();
    fs::create_dir(files.at("..2026")).unwrap();
    files.write("..2026/web.yaml", &service("a", "10.0.0.1"));
    symlink("..2026", files.at("..data")).unwrap();
    symlink("..data/web.yaml", files.at("web.yaml")).unwrap();
    symlink("nowhere", files.at("dangling.yaml")).unwrap();
    let snapshot = files.read(None);
    assert_eq!(
        (services(&snapshot), kinds(&snapshot)),
        (vec!["shop/a 10.0.0.1".to_owned()], vec![ProblemKind::Unreadable])
    );
}

#[test]
fn a_byte_that_is_not_utf8_costs_no_object() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("all.yaml");
    let service = |name: &str, note: &[u8]| {
        let head = format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: shop, annotations: {{x: \""
        );
        let tail = b"\"}}\nspec: {clusterIP: 10.96.0.1, ports: [{port: 80}]}\n";
        [head.as_bytes(), note, tail].concat()
    };
    fs::write(&file, [service("one", b"\xff\xfe"), service("two", b"plain")].join(&b"---\n"[..])).unwrap();
    let snapshot = read(&[file], None);
    assert_eq!(snapshot.objects.services.len(), 2);
    let problems: Vec<String> = snapshot.problems.iter().map(ToString::to_string).collect();
    assert!(
        matches!(&problems[..], [only] if only.contains("document 1") && only.contains("UTF-8")),
        "{problems:?}"
    );
}
