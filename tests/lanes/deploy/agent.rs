//! Arguments and settings, against the flags that the agent has.

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::OsString,
};

use clap::{CommandFactory, Parser};
use serde_json::Value;
use xdp_agent::config::Cli;

use crate::files::{self, Document, each, list, string, strings};

/// Settings by the names of environment variables.
type Settings = BTreeMap<String, String>;

/// Fails when the agent does not take a command line. What it gets from Kubernetes is put in first.
#[track_caller]
fn parse(args: &[String]) {
    let words = args.iter().map(|arg| arg.replace("$(NODE_NAME)", "node-a"));
    let words: Vec<String> = ["xdp-agent".to_owned()].into_iter().chain(words).collect();
    if let Err(error) = Cli::try_parse_from(&words) {
        panic!("{words:?}: {error}");
    }
}

/// The flags of `run`, by their environment variables.
fn flags() -> BTreeMap<String, String> {
    let command = Cli::command();
    let run = command.find_subcommand("run").expect("there is `run`");
    let flag = |arg: &clap::Arg| {
        let variable = arg.get_env()?.to_str()?.to_owned();
        Some((variable, format!("--{}", arg.get_long()?)))
    };
    run.get_arguments().filter_map(flag).collect()
}

/// Arguments of every container that runs the agent, of objects and of patches.
fn command_lines() -> Vec<Vec<String>> {
    let mut lines = Vec::new();
    for document in files::objects().into_iter().chain(files::patches()) {
        each(&document.content, &mut |value| {
            let is_ours = value["image"].as_str().is_none_or(|image| image.contains("xdp-agent"));
            if is_ours && value["args"].is_array() {
                lines.push(strings(value, "args").collect());
            }
        });
    }
    lines
}

/// What a kustomization's ConfigMap of settings holds.
fn settings(kustomization: &Document) -> Settings {
    let mut settings = Settings::new();
    let mut put = |line: &str| {
        let (name, value) = line.split_once('=').unwrap_or_else(|| panic!("{line} is no setting"));
        settings.insert(name.to_owned(), value.to_owned());
    };
    for generator in list(&kustomization.content, "configMapGenerator") {
        for file in strings(generator, "envs") {
            let text = files::text(kustomization.beside(&file));
            text.lines()
                .map(str::trim)
                .filter(|line| !line.is_empty() && !line.starts_with('#'))
                .for_each(&mut put);
        }
        strings(generator, "literals").for_each(|line| put(&line));
    }
    settings
}

fn kustomization(path: &str) -> Document {
    files::documents(path.as_ref()).swap_remove(0)
}

#[test]
fn the_agent_takes_every_command_line() {
    let lines = command_lines();
    assert_eq!(lines.len(), 3, "of the agent, of the clean-up, and of the overlay for kubeadm");
    lines.iter().for_each(|line| parse(line));
}

#[test]
fn the_overlay_for_kubeadm_understands_what_kubeadm_writes() {
    let written = files::root().join("xdp-agent/src/config/testdata/kubeadm.yaml");
    let line = command_lines().into_iter().find(|line| line.iter().any(|arg| arg.starts_with("--config=")));
    let words = line.expect("a command line with a configuration file").into_iter().map(|arg| {
        if arg.starts_with("--config=") { format!("--config={}", written.display()) } else { arg }
    });
    let words = ["xdp-agent".to_owned()].into_iter().chain(words).map(OsString::from);
    let (cli, ignored) = Cli::read(words).unwrap_or_else(|error| panic!("{error}"));
    // Where the overlay mounts the ConfigMap.
    assert!(format!("{cli:?}").contains("\"/var/lib/kube-proxy/kubeconfig.conf\""), "{cli:?}");
    assert_eq!(ignored, [], "kubeadm asks for nothing that is not there");
}

#[test]
fn every_setting_is_a_flag_that_takes_its_value() {
    let flags = flags();
    let mut seen = 0;
    for kustomization in files::kustomizations() {
        let file = kustomization.file.display();
        for (name, value) in settings(&kustomization) {
            // What the Kubernetes client reads in a pod.
            if ["KUBERNETES_SERVICE_HOST", "KUBERNETES_SERVICE_PORT"].contains(&name.as_str()) {
                continue;
            }
            let flag = flags.get(&name).unwrap_or_else(|| panic!("{file}: no flag has the variable {name}"));
            parse(&["run".to_owned(), "--services=.".to_owned(), format!("{flag}={value}")]);
            seen += 1;
        }
    }
    assert!(seen > 5, "only {seen} settings were found");
}

#[test]
fn settings_that_are_shown_as_comments_are_flags_too() {
    let flags = flags();
    let text = files::text("deploy/base/xdp-agent.env");
    let shown = text.lines().filter_map(|line| line.strip_prefix("# XDP_AGENT_")?.split_once('='));
    let shown: Vec<(String, &str)> =
        shown.map(|(name, value)| (format!("XDP_AGENT_{name}"), value)).collect();
    assert!(!shown.is_empty());
    for (name, value) in shown {
        let flag = flags.get(&name).unwrap_or_else(|| panic!("no flag has the variable {name}"));
        parse(&["run".to_owned(), "--services=.".to_owned(), format!("{flag}={value}")]);
    }
}

#[test]
fn probes_and_scrapes_go_where_the_agent_listens() {
    let base = files::objects()
        .into_iter()
        .find(|object| object.name() == "xdp-agent" && object.kind() == "DaemonSet");
    let base = base.expect("the agent's DaemonSet");
    let trial = files::patches().into_iter().find(|patch| patch.file.starts_with("deploy/overlays/trial"));
    let trial = trial.expect("the patch of the trial");
    let of_base = ports(&base.content);
    assert_eq!(
        of_base,
        [("healthz".to_owned(), 10256), ("metrics".to_owned(), 10249)].into(),
        "kube-proxy's ports"
    );
    let settings = settings(&kustomization("deploy/overlays/trial/kustomization.yaml"));
    let listens = |name: &str| {
        let address = &settings[name];
        address.rsplit_once(':').and_then(|(_, port)| port.parse::<u64>().ok()).expect("a port")
    };
    let of_trial = [
        ("healthz".to_owned(), listens("XDP_AGENT_HEALTHZ_BIND_ADDRESS")),
        ("metrics".to_owned(), listens("XDP_AGENT_METRICS_BIND_ADDRESS")),
    ];
    assert_eq!(ports(&trial.content), of_trial.into());
    assert!(ports(&trial.content).values().all(|port| !of_base.values().any(|taken| taken == port)));
}

/// Named ports of the first container.
fn ports(set: &Value) -> BTreeMap<String, u64> {
    let container = &list(&set["spec"]["template"]["spec"], "containers")[0];
    let named = list(container, "ports").iter().filter(|port| port["name"].is_string());
    named
        .map(|port| (string(port, "name").to_owned(), port["containerPort"].as_u64().expect("a port")))
        .collect()
}

#[test]
fn pins_are_where_the_bpf_file_system_is_mounted() {
    let mounts = |document: &Document| {
        let mut paths = BTreeSet::new();
        each(&document.content, &mut |value| {
            if value["name"] == "bpffs" {
                paths.extend(value["mountPath"].as_str().map(str::to_owned));
            }
        });
        paths
    };
    let paths: BTreeSet<String> = files::objects().iter().flat_map(mounts).collect();
    let [path] = &Vec::from_iter(paths)[..] else { panic!("one place in every pod") };
    let mut pods = 0;
    for document in files::objects() {
        each(&document.content, &mut |value| {
            let mounts = value["volumeMounts"].as_array().into_iter().flatten();
            if !mounts.into_iter().any(|mount| mount["name"] == "bpffs") {
                return;
            }
            pods += 1;
            let of_variable = value["env"].as_array().into_iter().flatten();
            let by_variable = of_variable
                .into_iter()
                .any(|set| set["name"] == "XDP_AGENT_PIN_DIR" && set["value"] == path.as_str());
            let argument = format!("--pin-dir={path}");
            let by_argument =
                value["args"].as_array().into_iter().flatten().any(|arg| *arg == argument.as_str());
            assert!(by_variable || by_argument, "{} pins elsewhere than {path}", value["name"]);
        });
    }
    assert_eq!(pods, 2, "the agent, and what cleans up after it");
}

#[test]
fn what_the_pods_mounts_decide_stands_in_variables_that_no_overlay_takes_away() {
    // An overlay's arguments take the place of the base's, and so had lost `--cgroup` once.
    for line in command_lines().into_iter().filter(|line| !line.iter().any(|arg| arg == "--cleanup")) {
        assert!(
            !line.iter().any(|arg| arg.starts_with("--pin-dir") || arg.starts_with("--cgroup")),
            "{line:?}"
        );
    }
    let mut set = Settings::new();
    for document in files::objects() {
        each(&document.content, &mut |value| {
            if let (Some(name), Some(place)) = (value["name"].as_str(), value["value"].as_str()) {
                set.insert(name.to_owned(), place.to_owned());
            }
            if value["name"] == "cgroup"
                && let Some(place) = value["mountPath"].as_str()
            {
                set.insert("mounted".to_owned(), place.to_owned());
            }
        });
    }
    assert!(set.contains_key("mounted") && set.get("XDP_AGENT_CGROUP") == set.get("mounted"), "{set:?}");
}

#[test]
fn the_unit_of_systemd_has_a_command_line_that_the_agent_takes_and_the_capabilities_of_the_pod() {
    let unit = files::text("deploy/systemd/xdp-agent.service");
    let value = |key: &str| {
        let line = unit.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='));
        line.unwrap_or_else(|| panic!("no {key}=")).to_owned()
    };
    let words: Vec<String> = value("ExecStart").split(' ').map(str::to_owned).collect();
    parse(&words[1..]);
    assert_eq!(
        value("CapabilityBoundingSet"),
        "CAP_BPF CAP_NET_ADMIN CAP_PERFMON CAP_SYS_ADMIN CAP_SYS_PTRACE"
    );
}
