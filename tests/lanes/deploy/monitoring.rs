//! Alerts and the dashboard, against the metrics that the agent has and the documents that explain them.

use std::collections::BTreeSet;

use serde_json::Value;
use xdp_agent::{devices::Mode, problem::ProblemKind};
use xdp_common::verdict::{Event, Reason};

use crate::files::{self, each, list, string};

const ALERTS: &str = "deploy/components/alerts/alerts.yaml";
const DASHBOARD: &str = "deploy/components/dashboard/xdp-agent.json";
/// Written from the agent's registry.
const METRICS: &str = "docs/metrics.md";
const RUNBOOK: &str = "https://github.com/xdp-agent/xdp-agent/blob/main/docs/troubleshoot.md#";

fn alerts() -> Vec<Value> {
    let documents = files::documents(ALERTS.as_ref());
    let groups = documents.iter().flat_map(|document| list(&document.content["spec"], "groups"));
    groups.flat_map(|group| list(group, "rules")).cloned().collect()
}

fn dashboard() -> Value {
    serde_json::from_str(&files::text(DASHBOARD)).expect("the dashboard is JSON")
}

/// Every query of alerts and dashboard.
fn queries() -> Vec<String> {
    let mut queries: Vec<String> = alerts().iter().map(|alert| string(alert, "expr").to_owned()).collect();
    each(&dashboard(), &mut |value| {
        queries.extend(value["expr"].as_str().map(str::to_owned));
        queries.extend(value["definition"].as_str().map(str::to_owned));
    });
    queries
}

/// Words of a text as metrics and labels are written.
fn words(text: &str) -> impl Iterator<Item = &str> {
    text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_' && c != ':').filter(|word| !word.is_empty())
}

#[test]
fn every_metric_in_a_query_is_one_that_the_agent_has() {
    let text = files::text(METRICS);
    let known: BTreeSet<&str> = words(&text).collect();
    let mut used = BTreeSet::new();
    for query in queries() {
        for word in
            words(&query).filter(|word| word.starts_with("xdp_agent_") || word.starts_with("kubeproxy_"))
        {
            let parts = ["", "_bucket", "_sum", "_count"].map(|part| word.strip_suffix(part));
            assert!(
                parts.into_iter().flatten().any(|name| known.contains(name)),
                "{METRICS} has no {word}: {query}"
            );
            used.insert(word.to_owned());
        }
    }
    assert!(used.len() > 15, "only {used:?}");
}

#[test]
fn every_label_value_in_a_query_is_one_that_the_agent_gives() {
    let reasons: Vec<&str> = Reason::ALL.iter().map(|reason| reason.label()).collect();
    let events: Vec<&str> = Event::ALL.iter().map(|event| event.label()).collect();
    let modes: Vec<&str> = Mode::ALL.iter().map(|mode| mode.label()).collect();
    let problems: Vec<&str> = ProblemKind::ALL.iter().map(|kind| kind.label()).collect();
    let mut seen = 0;
    for query in queries() {
        for (label, known) in
            [("reason", &reasons), ("event", &events), ("mode", &modes), ("kind", &problems)]
        {
            for value in matched(&query, label) {
                let is_known = match value.strip_prefix(".+") {
                    Some(end) => known.iter().any(|known| known.ends_with(end)),
                    None => known.contains(&value.as_str()),
                };
                assert!(is_known, "no {label} {value:?}: {query}");
                seen += 1;
            }
        }
    }
    assert!(seen > 20, "only {seen} values were found");
}

/// Values that a query compares a label with.
fn matched(query: &str, label: &str) -> Vec<String> {
    let mut values = Vec::new();
    for (at, _) in query.match_indices(label) {
        let is_whole = query[..at].ends_with(['{', ',', ' ']);
        let rest = query[at + label.len()..].trim_start_matches(['=', '!', '~']);
        let is_compared = rest.len() < query[at + label.len()..].len();
        if let (true, true, Some(rest)) = (is_whole, is_compared, rest.strip_prefix('"')) {
            let (alternatives, _) = rest.split_once('"').expect("a closing quote");
            values.extend(alternatives.split('|').map(str::to_owned));
        }
    }
    values
}

#[test]
fn compared_label_values_are_found() {
    let query = r#"sum by (reason) (rate(x{node="a",reason=~"one|two"}[5m])) + y{reason!="three"}"#;
    assert_eq!(matched(query, "reason"), ["one", "two", "three"]);
    assert_eq!(matched(query, "event"), [""; 0]);
}

#[test]
fn every_alert_says_what_is_wrong_and_where_to_read_on() {
    let alerts = alerts();
    let headings = files::headings("docs/troubleshoot.md");
    let mut names = BTreeSet::new();
    assert!(alerts.len() > 10);
    for alert in &alerts {
        let name = string(alert, "alert");
        assert!(names.insert(name), "{name} is there twice");
        assert!(["critical", "warning", "info"].contains(&string(&alert["labels"], "severity")), "{name}");
        let annotations = &alert["annotations"];
        assert!(string(annotations, "summary").ends_with('.'), "{name}: the summary is a sentence");
        assert!(string(annotations, "description").ends_with('.'), "{name}: the description is a sentence");
        let runbook = string(annotations, "runbook_url");
        let heading = runbook.strip_prefix(RUNBOOK).unwrap_or_else(|| panic!("{name}: {runbook}"));
        assert!(headings.contains(heading), "{name}: docs/troubleshoot.md has no heading #{heading}");
    }
}

#[test]
fn every_reason_and_every_kind_of_problem_has_its_section() {
    let headings = files::headings("docs/troubleshoot.md");
    let reasons = Reason::ALL.iter().map(|reason| reason.label());
    for label in reasons.chain(ProblemKind::ALL.iter().map(|kind| kind.label())) {
        assert!(headings.contains(label), "docs/troubleshoot.md has no heading `{label}`");
    }
}

#[test]
fn the_dashboard_is_whole() {
    let dashboard = dashboard();
    let variables: Vec<&str> =
        list(&dashboard["templating"], "list").iter().map(|variable| string(variable, "name")).collect();
    assert_eq!(variables, ["datasource", "node"]);
    let panels = list(&dashboard, "panels");
    let (mut ids, mut titles, mut cells) = (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
    for panel in panels {
        let title = string(panel, "title");
        assert!(titles.insert(title), "two panels are called {title}");
        assert!(ids.insert(panel["id"].as_u64().expect("an id")), "{title}: its id is taken");
        let place = |field: &str| panel["gridPos"][field].as_u64().expect("a number");
        assert!(place("x") + place("w") <= 24, "{title} is too wide");
        for x in place("x")..place("x") + place("w") {
            for y in place("y")..place("y") + place("h") {
                assert!(cells.insert((x, y)), "{title} lies over another panel");
            }
        }
        if panel["type"] != "row" {
            assert_eq!(panel["datasource"]["uid"], "${datasource}", "{title}");
            let targets = list(panel, "targets");
            assert!(!targets.is_empty(), "{title} shows nothing");
            for target in targets {
                assert_eq!(target["datasource"]["uid"], "${datasource}", "{title}");
                assert!(
                    string(target, "expr").contains("node=~\"$node\""),
                    "{title} is not about the chosen nodes"
                );
            }
        }
    }
}

#[test]
fn prometheus_finds_the_agent_and_names_it_as_the_alerts_do() {
    let monitors = files::documents("deploy/components/pod-monitor/pod-monitor.yaml".as_ref());
    let monitor = &monitors[0];
    let job = format!("job=\"{}/{}\"", string(&monitor.content["metadata"], "namespace"), monitor.name());
    assert!(alerts().iter().any(|alert| string(alert, "expr").contains(&job)), "no alert is about {job}");
    let objects = files::objects();
    let agent = objects.iter().find(|object| object.kind() == "DaemonSet" && object.name() == "xdp-agent");
    let template = &agent.expect("the agent").content["spec"]["template"];
    let wanted = monitor.content["spec"]["selector"]["matchLabels"].as_object().expect("labels");
    assert!(wanted.iter().all(|(key, value)| template["metadata"]["labels"][key] == *value));
    for endpoint in list(&monitor.content["spec"], "podMetricsEndpoints") {
        let ports = list(&list(&template["spec"], "containers")[0], "ports");
        assert!(ports.iter().any(|port| port["name"] == endpoint["port"]), "no port {}", endpoint["port"]);
        assert!(
            list(endpoint, "relabelings").iter().any(|rule| rule["targetLabel"] == "node"),
            "alerts name nodes"
        );
    }
}
