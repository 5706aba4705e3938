//! Selectors of fields and labels, as far as an agent uses them.

use anyhow::{Result, bail};
use serde_json::Value;

/// Which objects are wanted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Selector {
    terms: Vec<Term>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Term {
    FieldIs(&'static str, String),
    FieldIsNot(&'static str, String),
    Label(String),
    NoLabel(String),
    LabelIs(String, String),
    LabelIsNot(String, String),
}

/// Fields that can be selected by; kube-apiserver refuses others too.
const FIELDS: [(&str, &str); 3] = [
    ("metadata.name", "/metadata/name"),
    ("metadata.namespace", "/metadata/namespace"),
    ("spec.clusterIP", "/spec/clusterIP"),
];

impl Selector {
    pub(super) fn parse(fields: Option<&str>, labels: Option<&str>) -> Result<Self> {
        let mut terms = Vec::new();
        for term in parts(fields) {
            terms.push(match operator(term) {
                Some((name, true, value)) => Term::FieldIs(field(name)?, value),
                Some((name, false, value)) => Term::FieldIsNot(field(name)?, value),
                None => bail!("{term} is no field selector"),
            });
        }
        for term in parts(labels) {
            terms.push(match (operator(term), term.strip_prefix('!')) {
                (Some((key, true, value)), _) => Term::LabelIs(key.to_string(), value),
                (Some((key, false, value)), _) => Term::LabelIsNot(key.to_string(), value),
                (None, Some(key)) => Term::NoLabel(key.to_string()),
                (None, None) => Term::Label(term.to_string()),
            });
        }
        Ok(Self { terms })
    }

    pub(super) fn takes(&self, object: &Value) -> bool {
        let field = |pointer: &str| object.pointer(pointer).and_then(Value::as_str).unwrap_or_default();
        let label = |key: &str| object["metadata"]["labels"].get(key).and_then(Value::as_str);
        self.terms.iter().all(|term| match term {
            Term::FieldIs(pointer, value) => field(pointer) == value,
            Term::FieldIsNot(pointer, value) => field(pointer) != value,
            Term::Label(key) => label(key).is_some(),
            Term::NoLabel(key) => label(key).is_none(),
            Term::LabelIs(key, value) => label(key) == Some(value),
            Term::LabelIsNot(key, value) => label(key) != Some(value),
        })
    }
}

fn parts(text: Option<&str>) -> impl Iterator<Item = &str> {
    text.unwrap_or_default().split(',').filter(|part| !part.is_empty())
}

/// Name, whether it is to be equal, and value.
fn operator(term: &str) -> Option<(&str, bool, String)> {
    if let Some((name, value)) = term.split_once("!=") {
        return Some((name, false, value.to_string()));
    }
    let (name, value) = term.split_once("==").or_else(|| term.split_once('='))?;
    Some((name, true, value.to_string()))
}

fn field(name: &str) -> Result<&'static str> {
    match FIELDS.iter().find(|(known, _)| *known == name) {
        Some((_, pointer)) => Ok(pointer),
        None => bail!("field label not supported: {name}"),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn objects_are_selected_as_kubernetes_does() {
        let object = json!({
            "metadata": {"name": "a", "labels": {"app": "web", "empty": ""}}, "spec": {"clusterIP": "None"}
        });
        for (fields, labels, taken) in [
            ("", "", true),
            ("metadata.name=a", "app=web", true),
            ("metadata.name==b", "", false),
            ("spec.clusterIP!=None", "", false),
            ("spec.clusterIP!=", "app", true),
            ("", "!empty", false),
            ("", "!other,empty", true),
            ("", "app!=web", false),
            ("", "other!=web", true),
        ] {
            let selector = Selector::parse(Some(fields), Some(labels)).unwrap();
            assert_eq!(selector.takes(&object), taken, "{fields} {labels}");
        }
        assert!(Selector::parse(Some("spec.type=NodePort"), None).is_err());
    }
}
