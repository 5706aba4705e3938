//! What is wrong with the input or does not fit: one list of kinds for the log, the metrics and `status`.

use std::{fmt, path::PathBuf};

/// Longest name of an object; those that the API server takes have 253 bytes, beside a namespace and a kind.
const NAME_CHARS_MAX: usize = 400;

/// What sort of problem it is; the metric label.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ProblemKind {
    /// A file or directory cannot be read; its objects stay as they were.
    Unreadable,
    /// A document is neither YAML nor JSON; its objects stay as they were.
    Syntax,
    /// An object does not have the form of its kind, or holds a value that cannot be used.
    Invalid,
    /// Two objects of the same kind, namespace and name.
    DuplicateObject,
    /// Two Services claim the same address, port and protocol.
    DuplicateFrontend,
    /// An object asks for something that this version does not do.
    Unsupported,
    /// The map of frontends is full.
    FrontendsFull,
    /// The map of backends is full.
    BackendsFull,
    /// The map of rings is full.
    RingsFull,
    /// The map of rings is so full that rings are smaller than they should be.
    RingsReduced,
    /// The map of networks is full.
    NetworksFull,
    /// There are Services of an address family of which no interface has an address.
    NoAddress,
}

impl ProblemKind {
    /// Every one of them, for metrics that start at zero.
    pub const ALL: [Self; 12] = [
        Self::Unreadable,
        Self::Syntax,
        Self::Invalid,
        Self::DuplicateObject,
        Self::DuplicateFrontend,
        Self::Unsupported,
        Self::FrontendsFull,
        Self::BackendsFull,
        Self::RingsFull,
        Self::RingsReduced,
        Self::NetworksFull,
        Self::NoAddress,
    ];

    /// The metric label.
    pub const fn label(self) -> &'static str {
        match self {
            Self::Unreadable => "unreadable",
            Self::Syntax => "syntax",
            Self::Invalid => "invalid",
            Self::DuplicateObject => "duplicate_object",
            Self::DuplicateFrontend => "duplicate_frontend",
            Self::Unsupported => "unsupported",
            Self::FrontendsFull => "frontends_full",
            Self::BackendsFull => "backends_full",
            Self::RingsFull => "rings_full",
            Self::RingsReduced => "rings_reduced",
            Self::NetworksFull => "networks_full",
            Self::NoAddress => "no_address",
        }
    }
}

/// Where in the input a problem is.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Place {
    /// File or directory.
    pub file: PathBuf,
    /// Which document of the file, counted from 1; 0 when it is the file as a whole.
    pub document: usize,
    /// Line of the file, counted from 1, when it is known.
    pub line: Option<usize>,
}

/// One thing that an operator has to mend; everything else goes on meanwhile.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Problem {
    /// What sort of problem.
    pub kind: ProblemKind,
    /// Where in the input, when it came from a file.
    pub place: Option<Place>,
    /// The object, as `Kind namespace/name`, when it is known.
    pub object: Option<String>,
    /// What is wrong and what to do, lower case, without a full stop.
    pub message: String,
}

impl Problem {
    /// A problem of an object.
    pub fn of(kind: ProblemKind, object: impl fmt::Display, message: impl Into<String>) -> Self {
        Self { kind, place: None, object: Some(shortened(object.to_string())), message: message.into() }
    }

    /// A problem of no single object.
    pub fn general(kind: ProblemKind, message: impl Into<String>) -> Self {
        Self { kind, place: None, object: None, message: message.into() }
    }

    /// A problem of a place in the input.
    pub fn at(kind: ProblemKind, place: Place, message: impl Into<String>) -> Self {
        Self { kind, place: Some(place), object: None, message: message.into() }
    }

    /// The same problem, with the object it concerns.
    pub fn with_object(self, object: Option<String>) -> Self {
        Self { object: object.map(shortened), ..self }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.file.display())?;
        if let Some(line) = self.line {
            write!(f, ":{line}")?;
        }
        if self.document > 0 {
            write!(f, " (document {})", self.document)?;
        }
        Ok(())
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(place) = &self.place {
            write!(f, "{place}: ")?;
        }
        if let Some(object) = &self.object {
            write!(f, "{object}: ")?;
        }
        f.write_str(&self.message)
    }
}

/// The name of an object for people, who need not see all of one that is thousands of letters long.
fn shortened(name: String) -> String {
    match name.char_indices().nth(NAME_CHARS_MAX) {
        Some((end, _)) => format!("{}… ({} bytes)", &name[..end], name.len()),
        None => name,
    }
}

/// The message of an error of `serde_json` without the place that it appends, which nobody sees where there are no lines,
/// and which differs for the same mistake.
pub(crate) fn without_place(error: &serde_json::Error) -> String {
    let place = format!(" at line {} column {}", error.line(), error.column());
    error.to_string().replace(&place, "")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_problem_reads_like_a_compiler_message() {
        let place = Place { file: "web.yaml".into(), document: 2, line: Some(14) };
        let problem = Problem::at(ProblemKind::Syntax, place, "unclosed bracket")
            .with_object(Some("Service shop/web".to_owned()));
        assert_eq!(problem.to_string(), "web.yaml:14 (document 2): Service shop/web: unclosed bracket");
    }

    #[test]
    fn labels_are_all_different() {
        let labels: std::collections::HashSet<_> = ProblemKind::ALL.iter().map(|kind| kind.label()).collect();
        assert_eq!(labels.len(), ProblemKind::ALL.len());
    }
}
