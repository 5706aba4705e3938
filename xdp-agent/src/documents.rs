//! Documents that tests write: compared with what the code says, or with `XDP_AGENT_BLESS=1` written anew.

use std::{env, fs, path::PathBuf};

const BLESS: &str = "XDP_AGENT_BLESS";

/// Compares a document of `docs/`, or the part of it between the two comments of this name, with what it should be.
pub(crate) fn check(document: &str, part: Option<&str>, expected: &str) {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../docs").join(document);
    let found = fs::read_to_string(&path).unwrap_or_default();
    let (before, inside, after) = match part {
        None => ("", found.as_str(), ""),
        Some(part) => {
            let marks = [format!("<!-- {part} -->\n"), format!("<!-- end of {part} -->")];
            let start = found.find(&marks[0]).expect("the comment before the part") + marks[0].len();
            let end = found.find(&marks[1]).expect("the comment behind the part");
            (&found[..start], &found[start..end], &found[end..])
        }
    };
    if inside == expected {
        return;
    }
    if env::var_os(BLESS).is_some() {
        return fs::write(&path, format!("{before}{expected}{after}")).expect("the document can be written");
    }
    let line = inside.lines().zip(expected.lines()).find(|(found, expected)| found != expected);
    panic!(
        "docs/{document} is not what the code says (run the tests with {BLESS}=1, and read the difference): {line:?}"
    );
}

/// Text in a cell of a table.
pub(crate) fn cell(text: &str) -> String {
    text.replace('|', "\\|")
}
