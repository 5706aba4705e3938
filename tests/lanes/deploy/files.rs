//! The files, and what is in them.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use serde_json::Value;

/// A YAML document.
#[derive(Clone, Debug)]
pub(super) struct Document {
    /// File, from the root of the repository.
    pub(super) file: PathBuf,
    pub(super) content: Value,
}

/// Root of the repository.
pub(super) fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("the tests are a member of the workspace")
        .to_owned()
}

/// Text of a file of the repository.
pub(super) fn text(path: impl AsRef<Path>) -> String {
    let path = path.as_ref();
    fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Every file below a directory of the repository, named from its root.
pub(super) fn below(directory: &str) -> Vec<PathBuf> {
    let root = root();
    let mut files = Vec::new();
    let mut directories = vec![root.join(directory)];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(&directory).expect("a directory") {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                directories.push(path);
            } else {
                files.push(path.strip_prefix(&root).expect("below the root").to_owned());
            }
        }
    }
    assert!(!files.is_empty(), "{directory} is empty");
    files.sort();
    files
}

/// The documents of a YAML file.
pub(super) fn documents(path: &Path) -> Vec<Document> {
    let text = text(path);
    let parts =
        text.split("\n---\n").filter(|part| part.lines().any(|line| !line.trim_start().starts_with('#')));
    let read = |part| {
        let content: Value =
            serde_saphyr::from_str(part).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        assert!(content.is_object(), "{}: a document is no object", path.display());
        Document { file: path.to_owned(), content }
    };
    parts.map(read).collect()
}

/// Every YAML document of `deploy/` that is an object for the cluster: neither a kustomization nor a patch.
pub(super) fn objects() -> Vec<Document> {
    let kustomizations = kustomizations();
    let resources = kustomizations.iter().flat_map(|kustomization| {
        strings(&kustomization.content, "resources")
            .map(|name| kustomization.beside(&name))
            .collect::<Vec<_>>()
    });
    resources.filter(|path| path.extension().is_some()).flat_map(|path| documents(&path)).collect()
}

/// Every kustomization of `deploy/`.
pub(super) fn kustomizations() -> Vec<Document> {
    let files = below("deploy").into_iter().filter(|path| path.ends_with("kustomization.yaml"));
    files.flat_map(|path| documents(&path)).collect()
}

/// The patches of all kustomizations.
pub(super) fn patches() -> Vec<Document> {
    let kustomizations = kustomizations();
    let patches = kustomizations.iter().flat_map(|kustomization| {
        let patches = list(&kustomization.content, "patches").iter();
        patches.map(|patch| kustomization.beside(string(patch, "path"))).collect::<Vec<_>>()
    });
    patches.flat_map(|path| documents(&path)).collect()
}

impl Document {
    pub(super) fn kind(&self) -> &str {
        string(&self.content, "kind")
    }

    pub(super) fn name(&self) -> &str {
        string(&self.content["metadata"], "name")
    }

    /// A path that is named in this document's file.
    pub(super) fn beside(&self, name: &str) -> PathBuf {
        beside(&self.file, name)
    }
}

/// A path that is named in a file.
pub(super) fn beside(file: &Path, name: &str) -> PathBuf {
    let mut path = file.parent().expect("a file is in a directory").to_owned();
    for part in Path::new(name) {
        if part == ".." {
            assert!(path.pop(), "{}: {name} leads out of the repository", file.display());
        } else {
            path.push(part);
        }
    }
    path
}

/// The headings of a Markdown file, as links name them.
pub(super) fn headings(path: &str) -> BTreeSet<String> {
    let text = text(path);
    let mut is_code = false;
    let mut headings = BTreeSet::new();
    for line in text.lines() {
        is_code ^= line.starts_with("```");
        if let (false, Some(heading)) = (is_code, line.strip_prefix('#')) {
            let heading = heading.trim_start_matches('#').trim().to_lowercase().replace(' ', "-");
            headings.insert(heading.chars().filter(|c| c.is_alphanumeric() || "-_".contains(*c)).collect());
        }
    }
    headings
}

/// A field that has to be a string.
#[track_caller]
pub(super) fn string<'a>(value: &'a Value, field: &str) -> &'a str {
    value[field].as_str().unwrap_or_else(|| panic!("{field} is no string in {value}"))
}

/// A field that is a list, or is not there.
#[track_caller]
pub(super) fn list<'a>(value: &'a Value, field: &str) -> &'a [Value] {
    let value = &value[field];
    if value.is_null() {
        return &[];
    }
    value.as_array().unwrap_or_else(|| panic!("{field} is no list but {value}"))
}

/// A field that is a list of strings, or is not there.
#[track_caller]
pub(super) fn strings(value: &Value, field: &str) -> impl Iterator<Item = String> {
    let items = list(value, field).iter();
    items.map(|item| item.as_str().expect("a string").to_owned()).collect::<Vec<_>>().into_iter()
}

/// Everything below a value, with itself.
pub(super) fn each<'a>(value: &'a Value, visit: &mut impl FnMut(&'a Value)) {
    visit(value);
    match value {
        Value::Array(items) => items.iter().for_each(|item| each(item, visit)),
        Value::Object(fields) => fields.values().for_each(|field| each(field, visit)),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}
