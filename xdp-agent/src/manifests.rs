//! Services, EndpointSlices, Nodes and ServiceCIDRs from files, as `kubectl get -o yaml|json` prints them.
//!
//! Bad input loses nothing: a document, file or directory that cannot be read keeps the objects that it had before, as does
//! a file that is being written, and everything else is read as usual.

use std::{
    collections::BTreeMap,
    fs,
    io::{self, Read},
    path::{Path, PathBuf},
    sync::Arc,
    time::Instant,
};

use k8s_openapi::api::{core::v1, discovery::v1 as discovery, networking::v1 as networking};
use serde_json::Value;

use self::{
    document::{Document, documents, label},
    in_place::{Caution, Held, Stamp, Verdict, Written},
};
pub use crate::problem::{Place, Problem, ProblemKind};
use crate::{
    objects::{Change, Node, ObjectName, Objects, Service, ServiceCidr, Slice},
    source::Kind,
};

mod document;
pub mod in_place;
#[cfg(test)]
mod tests;
pub mod watcher;

/// Largest file that is read, in bytes; a larger one is a problem and changes nothing.
pub const FILE_BYTES_MAX: u64 = 64 << 20;

/// The objects of a set of files, and what was wrong with them.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    /// Every object, also those kept from the previous read because their document is broken now.
    pub objects: Objects,
    /// What could not be read.
    pub problems: Vec<Problem>,
    /// Objects of kinds that do not matter here.
    pub ignored: usize,
    /// When files that are being written may be whole, the first of them.
    pub again_at: Option<Instant>,
    /// What came from which file.
    files: BTreeMap<PathBuf, Held>,
}

/// Reads files, and the `*.yaml`, `*.yml` and `*.json` of directories (not recursive, hidden files left out); what
/// cannot be read keeps the objects that it had in `previous`.
pub fn read(paths: &[PathBuf], previous: Option<&Snapshot>) -> Snapshot {
    read_all(paths, previous, None)
}

/// Reads files again that may be written at the time: those stand for what they held before, until [`Snapshot::again_at`] at
/// most if they rest from now on.
pub fn read_again(paths: &[PathBuf], previous: &Snapshot, written: &Written, now: Instant) -> Snapshot {
    let mut snapshot = read_all(paths, Some(previous), Some(Caution { written, now }));
    written.retain(snapshot.files.values());
    snapshot.again_at = snapshot.files.values().filter_map(Held::rested_at).min();
    snapshot
}

fn read_all(paths: &[PathBuf], previous: Option<&Snapshot>, caution: Option<Caution<'_>>) -> Snapshot {
    let mut reader = Reader { now: Snapshot::default(), previous, caution, kept: Vec::new() };
    for path in paths {
        match fs::metadata(path) {
            Ok(meta) if meta.is_dir() => reader.directory(path),
            Ok(_) => reader.file(path),
            Err(error) => {
                let known = previous.is_some_and(|previous| previous.files.contains_key(path));
                reader.unreadable(path, &error);
                if known { reader.keep_file(path) } else { reader.keep_directory(path) }
            }
        }
    }
    reader.finish()
}

/// The files that [`read`] would open: every file named, and the files of every directory named.
pub(crate) fn files(paths: &[PathBuf]) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for path in paths {
        match fs::metadata(path) {
            Ok(meta) if meta.is_dir() => files.extend(listing(path).unwrap_or_default()),
            Ok(_) | Err(_) => files.push(path.clone()),
        }
    }
    files
}

fn listing(directory: &Path) -> io::Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        let hidden = path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"."));
        let wanted = matches!(path.extension().and_then(|ext| ext.to_str()), Some("yaml" | "yml" | "json"));
        if wanted && !hidden && !path.is_dir() {
            files.push(path);
        }
    }
    files.sort_unstable();
    Ok(files)
}

/// One read in progress.
struct Reader<'a> {
    now: Snapshot,
    previous: Option<&'a Snapshot>,
    /// How to judge files that have changed; without it they are taken as they are.
    caution: Option<Caution<'a>>,
    /// Objects of the previous read to keep, unless they are found elsewhere.
    kept: Vec<(PathBuf, Kind, ObjectName)>,
}

/// A value on its way to be an object, with where it is.
struct Item<'a> {
    value: Value,
    /// The kind that the list around it implies.
    kind: Option<&'a str>,
    api_version: Option<String>,
}

impl Reader<'_> {
    fn directory(&mut self, path: &Path) {
        match listing(path) {
            Ok(files) => files.iter().for_each(|file| self.file(file)),
            Err(error) => {
                self.unreadable(path, &error);
                self.keep_directory(path);
            }
        }
    }

    fn file(&mut self, path: &Path) {
        if self.now.files.contains_key(path) {
            return; // named twice
        }
        self.file_in(path, Stamp::of(path));
    }

    /// Reads a file that was in this state a moment ago.
    fn file_in(&mut self, path: &Path, stamp: Option<Stamp>) {
        let held = self.previous.and_then(|previous| previous.files.get(path));
        let known = self.caution.zip(held);
        let judge = |stamp| known.map_or(Verdict::Take, |(caution, held)| caution.judge(held, stamp));
        let verdict = judge(stamp);
        if let Verdict::Hold(wait) = verdict {
            return self.hold(path, Held::waiting(stamp, wait));
        }
        let before = (self.now.problems.len(), self.kept.len(), self.now.ignored);
        self.now.files.insert(path.to_owned(), Held::taken(stamp));
        self.content(path);
        let is_whole = self.now.problems.len() == before.0 && !self.is_something_missing(path);
        // Writers do not wait for readers: what was read may be of a state after that one.
        let then = Stamp::of(path);
        let is_same = then == stamp;
        match if is_same { verdict } else { judge(then) } {
            Verdict::Take => {}
            Verdict::TakeIfWhole(_) if is_same && is_whole => {}
            Verdict::TakeIfWhole(wait) | Verdict::Hold(wait) => {
                self.take_back(path);
                self.now.problems.truncate(before.0);
                self.kept.truncate(before.1);
                self.now.ignored = before.2;
                self.hold(path, Held::waiting(then, wait));
            }
        }
    }

    /// Whether a file has not all the objects any more that it had before.
    fn is_something_missing(&self, path: &Path) -> bool {
        let before = self.previous.and_then(|previous| previous.files.get(path));
        let now = self.now.files.get(path);
        before.zip(now).is_some_and(|(before, now)| !before.objects.is_subset(&now.objects))
    }

    /// Undoes what was read of a file.
    fn take_back(&mut self, path: &Path) {
        let objects = self.now.files.remove(path).map(|held| held.objects);
        for (kind, name) in objects.into_iter().flatten() {
            self.now.objects.apply(kind.gone(name));
        }
    }

    /// Leaves everything about a file as it was.
    fn hold(&mut self, path: &Path, held: Held) {
        self.now.files.insert(path.to_owned(), held);
        self.keep_file(path);
        let problems = self.previous.into_iter().flat_map(|previous| &previous.problems);
        let is_of_file = |problem: &&Problem| problem.place.as_ref().is_some_and(|place| place.file == path);
        self.now.problems.extend(problems.filter(is_of_file).cloned());
    }

    fn content(&mut self, path: &Path) {
        let (text, is_utf8) = match content(path) {
            Ok(content) => content,
            Err(error) => {
                self.unreadable(path, &error);
                self.keep_file(path);
                return;
            }
        };
        let is_json = path.extension().is_some_and(|ext| ext == "json");
        for (at, document) in documents(&text, is_json).into_iter().enumerate() {
            if !is_utf8 && document.text.contains(char::REPLACEMENT_CHARACTER) {
                let place = Place { file: path.to_owned(), document: at + 1, line: Some(document.line) };
                let message = "holds bytes that are not UTF-8, which are read as U+FFFD; write it as UTF-8";
                self.report(Problem::at(ProblemKind::Syntax, place, message));
            }
            self.document(path, at + 1, document);
        }
    }

    fn document(&mut self, path: &Path, number: usize, document: Document<'_>) {
        let mut place = Place { file: path.to_owned(), document: number, line: Some(document.line) };
        match document.content {
            Ok(value) => self.value(path, &place, Item { value, kind: None, api_version: None }),
            Err(broken) => {
                place.line = Some(broken.line);
                let found = label(document.text);
                let kind = found.as_ref().and_then(|label| Kind::parse(&label.kind));
                let object = found.as_ref().map(|label| match &label.namespace {
                    Some(namespace) => format!("{} {namespace}/{}", label.kind, label.name),
                    None => format!("{} {}", label.kind, label.name),
                });
                self.report(Problem::at(ProblemKind::Syntax, place, broken.message).with_object(object));
                match (found, kind) {
                    (Some(label), Some(kind)) => {
                        let name =
                            kind.object_name(label.namespace.as_deref().unwrap_or_default(), &label.name);
                        self.kept.push((path.to_owned(), kind, name));
                    }
                    // An object of another kind is no loss; a list or something unknown may have held anything.
                    (Some(label), None) if !label.kind.ends_with("List") => {}
                    (Some(_) | None, _) => self.keep_file(path),
                }
            }
        }
    }

    fn value(&mut self, path: &Path, place: &Place, mut item: Item<'_>) {
        let text = |field: &str| item.value.get(field).and_then(Value::as_str).map(str::to_owned);
        let kind = text("kind").or(item.kind.map(str::to_owned));
        let api_version = text("apiVersion").or(item.api_version);
        let (Some(kind), Some(api_version)) = (kind, api_version) else {
            let message = "not a Kubernetes object: it has no apiVersion and kind";
            self.report(Problem::at(ProblemKind::Invalid, place.clone(), message));
            self.keep_file(path);
            return;
        };
        if let Some(inner) = kind.strip_suffix("List") {
            let items = item.value.get_mut("items").map(Value::take);
            self.list(path, place, items, inner, &api_version);
            return;
        }
        match Kind::parse(&kind) {
            Some(kind) => self.object(path, place, kind, &api_version, item.value),
            None => self.now.ignored += 1,
        }
    }

    fn list(&mut self, path: &Path, place: &Place, items: Option<Value>, inner: &str, api_version: &str) {
        let items = match items {
            Some(Value::Array(items)) => items,
            None | Some(Value::Null) => Vec::new(),
            Some(_) => {
                let message = format!("items of the {inner}List is not a list");
                self.report(Problem::at(ProblemKind::Invalid, place.clone(), message));
                self.keep_file(path);
                return;
            }
        };
        if !inner.is_empty() && Kind::parse(inner).is_none() {
            self.now.ignored += items.len();
            return;
        }
        for value in items {
            let (kind, version) =
                if inner.is_empty() { (None, None) } else { (Some(inner), Some(api_version)) };
            self.value(path, place, Item { value, kind, api_version: version.map(str::to_owned) });
        }
    }

    fn object(&mut self, path: &Path, place: &Place, kind: Kind, api_version: &str, value: Value) {
        let text = |pointer: &str| value.pointer(pointer).and_then(Value::as_str).unwrap_or_default();
        let named = kind.object_name(text("/metadata/namespace"), text("/metadata/name"));
        let object = format!("{} {named}", kind.name());
        let result = if named.name.is_empty() {
            Err("metadata.name is missing".to_owned())
        } else if api_version != kind.api_version() {
            Err(format!("apiVersion {api_version} is not known; write it as {}", kind.api_version()))
        } else if self.now.objects.get(kind, &named).is_some() {
            let message =
                "the object was already read from another place, which counts; remove one of the two";
            let problem = Problem::at(ProblemKind::DuplicateObject, place.clone(), message);
            self.report(problem.with_object(Some(object)));
            return;
        } else {
            read_object(kind, &named, value).map(|change| self.now.objects.apply(change))
        };
        match result {
            Ok(()) => {
                self.now.files.entry(path.to_owned()).or_default().objects.insert((kind, named));
            }
            Err(message) => {
                let problem = Problem::at(ProblemKind::Invalid, place.clone(), message);
                if named.name.is_empty() {
                    self.report(problem.with_object(Some(kind.name().to_owned())));
                    self.keep_file(path);
                } else {
                    self.report(problem.with_object(Some(object)));
                    self.kept.push((path.to_owned(), kind, named));
                }
            }
        }
    }

    fn unreadable(&mut self, path: &Path, error: &io::Error) {
        let place = Place { file: path.to_owned(), document: 0, line: None };
        self.report(Problem::at(ProblemKind::Unreadable, place, format!("cannot be read: {error}")));
    }

    fn report(&mut self, problem: Problem) {
        self.now.problems.push(problem);
    }

    fn keep_file(&mut self, path: &Path) {
        let objects = self.previous.and_then(|previous| previous.files.get(path));
        for (kind, name) in objects.into_iter().flat_map(|held| &held.objects) {
            self.kept.push((path.to_owned(), *kind, name.clone()));
        }
    }

    fn keep_directory(&mut self, path: &Path) {
        let Some(previous) = self.previous else { return };
        previous
            .files
            .keys()
            .filter(|file| file.parent() == Some(path))
            .for_each(|file| self.keep_file(file));
    }

    fn finish(mut self) -> Snapshot {
        let Some(previous) = self.previous else { return self.now };
        for (path, kind, name) in self.kept {
            let was_there =
                previous.files.get(&path).is_some_and(|file| file.objects.contains(&(kind, name.clone())));
            if !was_there || self.now.objects.get(kind, &name).is_some() {
                continue;
            }
            if let Some(object) = previous.objects.get(kind, &name) {
                self.now.objects.apply(object);
                self.now.files.entry(path).or_default().objects.insert((kind, name));
            }
        }
        self.now
    }
}

/// Reads a regular file of bounded size.
fn content(path: &Path) -> io::Result<(String, bool)> {
    // Before it is opened: opening a pipe waits for its writer.
    let meta = fs::metadata(path)?;
    if !meta.is_file() {
        return Err(io::Error::other("not a regular file"));
    }
    let file = fs::File::open(path)?;
    let too_large = || io::Error::other(format!("larger than {} MiB; split it", FILE_BYTES_MAX >> 20));
    if meta.len() > FILE_BYTES_MAX {
        return Err(too_large());
    }
    let mut bytes = Vec::new();
    // It may grow while it is read.
    if file.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes)? as u64 > FILE_BYTES_MAX {
        return Err(too_large());
    }
    text(bytes)
}

/// The text of a file, in which bytes that are not UTF-8 become U+FFFD: one of them, in an annotation perhaps, must not cost
/// the other objects of the file. A file that is mostly such bytes is no text.
fn text(bytes: Vec<u8>) -> io::Result<(String, bool)> {
    let bytes = match String::from_utf8(bytes) {
        Ok(text) => return Ok((text, true)),
        Err(error) => error.into_bytes(),
    };
    let text = String::from_utf8_lossy(&bytes).into_owned();
    let replaced = text.chars().filter(|char| *char == char::REPLACEMENT_CHARACTER).count();
    if 2 * replaced >= text.chars().count() || text.contains('\0') {
        return Err(io::Error::other("not UTF-8 text"));
    }
    Ok((text, false))
}

/// Reads an object, of which the name is known, and keeps what matters of it.
fn read_object(kind: Kind, name: &ObjectName, value: Value) -> Result<Change, String> {
    match kind {
        Kind::Service => {
            let service: v1::Service = document::object(value)?;
            Ok(Change::Service(name.clone(), Some(Arc::new(Service::read(&service)))))
        }
        Kind::EndpointSlice => {
            let mut slice: discovery::EndpointSlice = document::object(value)?;
            for port in slice.ports.iter_mut().flatten() {
                // What the API server fills in before anybody sees the object.
                port.name.get_or_insert_default();
            }
            Ok(Change::Slice(name.clone(), Some(Arc::new(Slice::read(&slice)))))
        }
        Kind::Node => {
            let node: v1::Node = document::object(value)?;
            Ok(Change::Node(name.name.clone(), Some(Arc::new(Node::read(&node)))))
        }
        Kind::ServiceCidr => {
            let cidr: networking::ServiceCIDR = document::object(value)?;
            Ok(Change::ServiceCidr(name.name.clone(), Some(Arc::new(ServiceCidr::read(&cidr)))))
        }
    }
}
