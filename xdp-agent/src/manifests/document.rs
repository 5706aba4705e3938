//! Takes the text of a file apart, so that what is broken in one document stays in that document.

use serde_json::Value;

use crate::problem::without_place;

/// How deep YAML may nest; Kubernetes' own objects stay far below.
const DEPTH_MAX: usize = 64;
/// How many aliases YAML may use; `kubectl` prints none.
const ALIASES_MAX: usize = 1024;

/// A document of a file.
#[derive(Debug)]
pub(super) struct Document<'a> {
    /// Line of the file in which it begins, counted from 1.
    pub(super) line: usize,
    pub(super) text: &'a str,
    pub(super) content: Result<Value, Broken>,
}

/// Why a document cannot be read.
#[derive(Debug)]
pub(super) struct Broken {
    /// Line of the file, counted from 1.
    pub(super) line: usize,
    pub(super) message: String,
}

/// What a broken document says of itself, as far as lines can tell.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Label {
    pub(super) kind: String,
    pub(super) namespace: Option<String>,
    pub(super) name: String,
}

/// Splits a file into its documents and reads each; empty ones are left out.
pub(super) fn documents(text: &str, is_json: bool) -> Vec<Document<'_>> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    if is_json || text.trim_start().starts_with('{') {
        let whole = json(text, 1);
        if whole.iter().all(|document| document.content.is_ok()) {
            return whole;
        }
        if !text.lines().any(is_separator) {
            return chunks(text, |line| line.starts_with('{'))
                .flat_map(|(line, text)| json(text, line))
                .collect();
        }
    }
    let parts = chunks(text, |line| is_separator(line) || line.trim_end() == "...");
    parts.filter(|(_, text)| !is_blank(text)).map(|(line, text)| yaml(text, line)).collect()
}

/// Whether a line begins a YAML document (YAML 1.2, section 9.1.1).
fn is_separator(line: &str) -> bool {
    line.strip_prefix("---").is_some_and(|rest| rest.is_empty() || rest.starts_with([' ', '\t', '\r']))
}

/// Whether a part of a file says nothing: comments, directives and markers only.
fn is_blank(text: &str) -> bool {
    text.lines().all(|line| {
        let line = if is_separator(line) { &line[3..] } else { line.strip_prefix("...").unwrap_or(line) };
        let line = line.trim();
        line.is_empty() || line.starts_with(['#', '%'])
    })
}

/// Parts of a text that begin where `starts` says so, each with its first line.
fn chunks(text: &str, starts: fn(&str) -> bool) -> impl Iterator<Item = (usize, &str)> {
    let (mut rest, mut line) = (text, 1);
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let mut end = 0;
        let mut lines = 0;
        for part in rest.split_inclusive('\n') {
            if end > 0 && starts(part.trim_end_matches(['\n', '\r'])) {
                break;
            }
            end += part.len();
            lines += 1;
        }
        let (chunk, tail) = rest.split_at(end);
        let first = line;
        (rest, line) = (tail, line + lines);
        Some((first, chunk))
    })
}

fn yaml(text: &str, line: usize) -> Document<'_> {
    let room = text.len().saturating_add(4096); // a node takes at least a byte, unless aliases multiply it
    let options = serde_saphyr::options! {
        budget: serde_saphyr::budget! {
            max_events: room.saturating_mul(2),
            max_nodes: room,
            max_depth: DEPTH_MAX,
            max_aliases: ALIASES_MAX,
            max_total_scalar_bytes: room,
        },
        with_snippet: false,
    };
    let content = serde_saphyr::from_str_with_options(text, options).map_err(|error| {
        let mut message = error.without_snippet().to_string();
        let place = error.location().map(|place| (place.line() as usize, place.column()));
        if let Some((line, column)) = place {
            message = message.replace(&format!(" at line {line}, column {column}"), "");
        }
        Broken { line: line + place.map_or(1, |(line, _)| line.max(1)) - 1, message }
    });
    Document { line, text, content }
}

fn json(text: &str, first: usize) -> Vec<Document<'_>> {
    let mut stream = serde_json::Deserializer::from_str(text).into_iter::<Value>();
    let mut documents = Vec::new();
    let (mut start, mut line) = (0, first);
    loop {
        // Skip to the document itself, so that its line is where it begins.
        let gap = text[start..].len() - text[start..].trim_start().len();
        line += newlines(&text[start..start + gap]);
        start += gap;
        let content = match stream.next() {
            None => return documents,
            Some(Ok(value)) => Ok(value),
            Some(Err(error)) => {
                let message = without_place(&error);
                Err(Broken { line: first + error.line().max(1) - 1, message })
            }
        };
        let end = if content.is_ok() { stream.byte_offset() } else { text.len() };
        let broken = content.is_err();
        documents.push(Document { line, text: &text[start..end], content });
        if broken {
            return documents;
        }
        line += newlines(&text[start..end]);
        start = end;
    }
}

fn newlines(text: &str) -> usize {
    text.bytes().filter(|&byte| byte == b'\n').count()
}

/// Reads an object, naming the field that does not fit.
pub(super) fn object<T: serde::de::DeserializeOwned>(value: Value) -> Result<T, String> {
    if !value.is_object() {
        return Err("not an object".to_owned());
    }
    serde_path_to_error::deserialize(value).map_err(|error| {
        let path = error.path().to_string();
        let message = without_place(error.inner());
        if path == "." { message } else { format!("{path}: {message}") }
    })
}

/// Recognises the kind and name in a text that does not parse, from lines in the form in which people and `kubectl`
/// write them.
pub(super) fn label(text: &str) -> Option<Label> {
    let lines: Vec<(usize, &str, &str)> = text.lines().filter_map(field).collect();
    let &(top, _, kind) =
        lines.iter().filter(|(_, key, _)| *key == "kind").min_by_key(|(indent, ..)| *indent)?;
    let metadata = lines.iter().position(|&(indent, key, _)| indent == top && key == "metadata")?;
    let mut children = lines[metadata + 1..].iter().take_while(|(indent, ..)| *indent > top).peekable();
    let inner = children.peek()?.0;
    let mut found = Label { kind: kind.to_owned(), ..Label::default() };
    for (_, key, value) in children.filter(|(indent, ..)| *indent == inner) {
        match *key {
            "name" => found.name = (*value).to_owned(),
            "namespace" => found.namespace = Some((*value).to_owned()),
            _ => {}
        }
    }
    (!found.name.is_empty() && !found.kind.is_empty()).then_some(found)
}

/// A line `key: value` with its indentation, in YAML or pretty-printed JSON.
fn field(line: &str) -> Option<(usize, &str, &str)> {
    let body = line.trim_start();
    let (key, value) = body.split_once(':')?;
    let quotes = ['"', '\''];
    let value = value.trim().trim_end_matches(',').trim_matches(quotes);
    Some((line.len() - body.len(), key.trim().trim_matches(quotes), value))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn lines(text: &str, is_json: bool) -> Vec<(usize, bool)> {
        documents(text, is_json).iter().map(|document| (document.line, document.content.is_ok())).collect()
    }

    #[test]
    fn documents_are_split_where_yaml_says() {
        let text = "# head\n%YAML 1.2\n---\na: 1\n--- # next\nb: |\n  ---\n  x\n...\n# between\n---\n---\nc: [1\n---\nd: 1\n";
        assert_eq!(lines(text, false), [(3, true), (5, true), (12, false), (14, true)]);
        let documents = documents(text, false);
        assert_eq!(documents[1].content.as_ref().unwrap()["b"], "---\nx\n");
        assert_eq!(documents[2].content.as_ref().unwrap_err().line, 13);
    }

    #[test]
    fn line_endings_and_byte_order_marks_of_other_systems_are_read() {
        assert_eq!(lines("\u{feff}a: 1\r\n---\r\nb: 2\r\n", false), [(1, true), (2, true)]);
    }

    #[test]
    fn objects_of_json_may_follow_each_other_and_a_broken_one_stays_alone() {
        assert_eq!(lines("{\"a\": 1}\n{\"b\":\n 2} {\"c\": 3}\n", true), [(1, true), (2, true), (3, true)]);
        let text = "{\n  \"a\": 1\n}\n{\n  \"b\": ,\n}\n{\"c\": 3}\n";
        assert_eq!(lines(text, true), [(1, true), (4, false), (7, true)]);
        assert_eq!(documents(text, true)[1].content.as_ref().unwrap_err().line, 5);
    }

    #[test]
    fn json_between_yaml_separators_is_read() {
        assert_eq!(
            lines("{\"a\": 1}\n---\n{\"b\": 2}\n---\nc: 3\n", false),
            [(1, true), (2, true), (4, true)]
        );
    }

    #[test]
    fn aliases_that_multiply_are_refused() {
        let mut text = "a: &a [x, x, x, x, x, x, x, x, x]\n".to_owned();
        for (from, to) in ["ab", "bc", "cd", "de", "ef", "fg", "gh", "hi"].iter().map(|pair| pair.split_at(1))
        {
            let refs = vec![format!("*{from}"); 9].join(", ");
            text.push_str(&format!("{to}: &{to} [{refs}]\n"));
        }
        assert_eq!(lines(&text, false), [(1, false)]);
    }

    #[test]
    fn long_lists_are_read() {
        let text = format!("items:\n{}", "- a: 1\n  b: [1, 2, 3]\n".repeat(100_000));
        assert_eq!(lines(&text, false), [(1, true)]);
    }

    #[test]
    fn a_broken_document_is_recognised_by_its_lines() {
        let expected = Label { kind: "Service".into(), namespace: Some("shop".into()), name: "web".into() };
        for text in [
            "apiVersion: v1\nkind: Service\nmetadata:\n  labels:\n    name: other\n  name: web\n  namespace: shop\nspec: [\n",
            "metadata:\n    name: 'web'\n    namespace: \"shop\"\nspec:\n  kind: x\n\tbad\nkind: Service\n",
            "{\n    \"kind\": \"Service\",\n    \"metadata\": {\n        \"name\": \"web\",\n        \"namespace\": \"shop\"\n    },\n    \"spec\": ,\n",
        ] {
            assert_eq!(label(text).as_ref(), Some(&expected), "{text}");
        }
        assert_eq!(label("kind: List\nitems:\n- kind: Service\n  metadata:\n    name: a\n"), None);
        assert_eq!(label("kind: Service\n"), None);
    }

    proptest! {
        #[test]
        fn no_text_makes_it_panic(text in "[-a:{}\\[\\]\"'&*#%.,| \n\r\t0é]{0,80}", is_json: bool) {
            for document in documents(&text, is_json) {
                prop_assert!(document.line >= 1);
                let _ = label(document.text);
            }
        }
    }
}
