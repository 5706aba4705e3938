//! The bill of materials of a binary, in CycloneDX 1.5: the crates that are linked into the agent and into the BPF programs
//! in it, from what cargo resolves, and the libraries that the toolchain adds.

use crate::{NAME, Release, VERSION, tag};
use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};

/// How [`document`] wants a tree: each crate on a line, after the number of crates it stands below.
pub const TREE_ARGUMENTS: [&str; 7] =
    ["--edges", "normal,no-proc-macro", "--prefix", "depth", "--format", "{p}|{l}|{r}", "--locked"];

/// A library that does not come by cargo.
#[derive(Clone, Debug)]
pub struct Library {
    /// As vulnerability databases name it.
    pub name: String,
    /// Of what was linked.
    pub version: String,
    /// An SPDX expression.
    pub licence: String,
}

/// One crate, with what it needs.
#[derive(Debug, Default)]
struct Package {
    licence: String,
    repository: String,
    is_ours: bool,
    needs: BTreeSet<Id>,
}

/// Name and version.
type Id = (String, String);

/// The document for one binary.
///
/// # Errors
/// If cargo's output or the lock file are of an unknown form.
pub fn document(
    release: &Release,
    arch: &str,
    trees: &[&str],
    lock: &str,
    added: &[Library],
) -> Result<Value> {
    let mut packages = BTreeMap::new();
    let mut roots = BTreeSet::new();
    for tree in trees {
        roots.insert(read_tree(tree, &mut packages)?);
    }
    let hashes = hashes(lock);
    let mut components = Vec::new();
    let mut dependencies = Vec::new();
    for (id, package) in &packages {
        components.push(component(id, package, hashes.get(id))?);
        let needs: Vec<_> = package.needs.iter().map(purl).collect();
        dependencies.push(json!({ "ref": purl(id), "dependsOn": needs }));
    }
    for library in added {
        components.push(json!({
            "type": "library",
            "bom-ref": generic(library),
            "name": library.name,
            "version": library.version,
            "purl": generic(library),
            "licenses": [{ "expression": library.licence }],
        }));
    }
    let whole = format!("{NAME}:{}/{arch}", tag());
    let parts: Vec<_> = roots.iter().map(purl).chain(added.iter().map(generic)).collect();
    dependencies.push(json!({ "ref": whole, "dependsOn": parts }));
    Ok(json!({
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "version": 1,
        "metadata": {
            "timestamp": release.created.to_string(),
            "component": {
                "type": "application",
                "bom-ref": whole,
                "name": "xdp-agent",
                "version": VERSION,
                "licenses": [{ "expression": env!("CARGO_PKG_LICENSE") }],
                "properties": [
                    { "name": "architecture", "value": arch },
                    { "name": "revision", "value": release.revision },
                ],
            },
        },
        "components": components,
        "dependencies": dependencies,
    }))
}

fn component(id: &Id, package: &Package, hash: Option<&String>) -> Result<Value> {
    let mut component = json!({
        "type": "library",
        "bom-ref": purl(id),
        "name": id.0,
        "version": id.1,
        "purl": purl(id),
        // Cargo's older form has a slash where SPDX has a word.
        "licenses": [{ "expression": package.licence.replace('/', " OR ") }],
    });
    if !package.repository.is_empty() {
        component["externalReferences"] = json!([{ "type": "vcs", "url": package.repository }]);
    }
    match hash {
        Some(hash) => component["hashes"] = json!([{ "alg": "SHA-256", "content": hash }]),
        None if package.is_ours => {}
        None => bail!("Cargo.lock has no checksum for {} {}", id.0, id.1),
    }
    Ok(component)
}

/// Adds the crates of one tree; returns the one at its root.
fn read_tree(tree: &str, packages: &mut BTreeMap<Id, Package>) -> Result<Id> {
    let mut above: Vec<Id> = Vec::new();
    for line in tree.lines().filter(|line| !line.is_empty()) {
        let unknown = || format!("`cargo tree` prints a line of unknown form: {line}");
        let name_at = line.find(|c: char| !c.is_ascii_digit()).with_context(unknown)?;
        let (depth, rest) = line.split_at(name_at);
        let depth: usize = depth.parse().with_context(unknown)?;
        let mut fields = rest.split('|');
        let (Some(package), Some(licence), Some(repository)) = (fields.next(), fields.next(), fields.next())
        else {
            bail!(unknown());
        };
        let mut words = package.split_whitespace();
        let (Some(name), Some(version)) =
            (words.next(), words.next().and_then(|word| word.strip_prefix('v')))
        else {
            bail!(unknown());
        };
        if depth > above.len() {
            bail!(unknown());
        }
        let id: Id = (name.to_owned(), version.to_owned());
        above.truncate(depth);
        if let Some(parent) = above.last().and_then(|parent| packages.get_mut(parent)) {
            parent.needs.insert(id.clone());
        }
        let package = packages.entry(id.clone()).or_default();
        package.licence = licence.to_owned();
        // The mark of a crate whose own tree is above.
        package.repository = repository.trim_end_matches("(*)").trim().to_owned();
        package.is_ours |= words.next().is_some_and(|place| place.starts_with("(/"));
        above.push(id);
    }
    above.into_iter().next().context("`cargo tree` has printed nothing")
}

/// The checksums in a lock file.
fn hashes(lock: &str) -> BTreeMap<Id, String> {
    let quoted = |line: &str, field: &str| {
        let value = line.strip_prefix(field)?.strip_prefix(" = \"")?.strip_suffix('"')?;
        Some(value.to_owned())
    };
    let packages = lock.split("[[package]]").filter_map(|package| {
        let find = |field| package.lines().find_map(|line| quoted(line, field));
        Some(((find("name")?, find("version")?), find("checksum")?))
    });
    packages.collect()
}

fn purl(id: &Id) -> String {
    // Of what a version may hold, a package URL encodes only this.
    format!("pkg:cargo/{}@{}", id.0, id.1.replace('+', "%2B"))
}

fn generic(library: &Library) -> String {
    format!("pkg:generic/{}@{}", library.name, library.version.replace('+', "%2B"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const AGENT: &str = "\
0xdp-agent v0.1.0 (/src/xdp-agent)|Apache-2.0 OR MIT|https://example.org/xdp
1axum v0.8.9|MIT|https://example.org/axum
2bytes v1.12.1|MIT|
1bytes v1.12.1|MIT| (*)
1ring v0.17.14+a|Apache-2.0/ISC|
";
    const PROGRAMS: &str = "\
0xdp-ebpf v0.1.0 (/src/xdp-ebpf)|Apache-2.0 OR MIT|https://example.org/xdp
1num2 v0.2.0|MIT|
";
    const LOCK: &str = "\
version = 4

[[package]]
name = \"axum\"
version = \"0.8.9\"
checksum = \"aa\"

[[package]]
name = \"bytes\"
version = \"1.12.1\"
checksum = \"bb\"

[[package]]
name = \"ring\"
version = \"0.17.14+a\"
checksum = \"cc\"

[[package]]
name = \"num2\"
version = \"0.2.0\"
checksum = \"dd\"
";

    fn made(lock: &str) -> Result<Value> {
        let release = Release { revision: "abc".into(), created: jiff::Timestamp::UNIX_EPOCH };
        let glibc =
            Library { name: "glibc".into(), version: "2.36".into(), licence: "LGPL-2.1-or-later".into() };
        document(&release, "arm64", &[AGENT, PROGRAMS], lock, &[glibc])
    }

    #[test]
    fn every_crate_is_listed_once_with_licence_and_checksum() {
        let document = made(LOCK).unwrap();
        let components = document["components"].as_array().unwrap();
        let purls: Vec<_> = components.iter().map(|component| component["purl"].as_str().unwrap()).collect();
        assert_eq!(
            purls,
            [
                "pkg:cargo/axum@0.8.9",
                "pkg:cargo/bytes@1.12.1",
                "pkg:cargo/num2@0.2.0",
                "pkg:cargo/ring@0.17.14%2Ba",
                "pkg:cargo/xdp-agent@0.1.0",
                "pkg:cargo/xdp-ebpf@0.1.0",
                "pkg:generic/glibc@2.36",
            ]
        );
        assert_eq!(components[0]["hashes"][0]["content"], "aa");
        assert_eq!(components[3]["licenses"][0]["expression"], "Apache-2.0 OR ISC");
    }

    #[test]
    fn what_needs_what_is_as_in_the_trees() {
        let document = made(LOCK).unwrap();
        let needs = |name: &str| {
            let all = document["dependencies"].as_array().unwrap();
            all.iter().find(|one| one["ref"] == name).unwrap()["dependsOn"].clone()
        };
        assert_eq!(needs("pkg:cargo/axum@0.8.9"), json!(["pkg:cargo/bytes@1.12.1"]));
        assert_eq!(
            needs("pkg:cargo/xdp-agent@0.1.0"),
            json!(["pkg:cargo/axum@0.8.9", "pkg:cargo/bytes@1.12.1", "pkg:cargo/ring@0.17.14%2Ba"])
        );
        assert_eq!(
            needs(&format!("{NAME}:{}/arm64", tag())),
            json!(["pkg:cargo/xdp-agent@0.1.0", "pkg:cargo/xdp-ebpf@0.1.0", "pkg:generic/glibc@2.36"])
        );
    }

    #[test]
    fn a_crate_of_unknown_origin_and_a_line_of_unknown_form_are_refused() {
        assert!(made("").unwrap_err().to_string().contains("no checksum for axum"));
        for tree in ["", "axum v1|MIT|", "0axum|MIT|", "1axum v1.0.0|MIT|", "0axum v1.0.0"] {
            assert!(read_tree(tree, &mut BTreeMap::new()).is_err(), "{tree}");
        }
    }
}
