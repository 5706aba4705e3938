//! Flags and files, and what they resolve to.

use std::{ffi::OsString, io::Write as _, time::Duration};

use super::*;

fn read(words: &[&str]) -> Result<(Args, Vec<Note>), clap::Error> {
    let words = ["xdp-agent", "run"].iter().chain(words).map(OsString::from);
    let (cli, notes) = Cli::read(words)?;
    let Command::Run(args) = cli.command else { panic!("not run") };
    Ok((*args, notes))
}

fn args(words: &[&str]) -> Args {
    read(words).expect("valid").0
}

fn config(words: &[&str]) -> anyhow::Result<Config> {
    let given = ["--iface", "eth0,eth1", "--node", "n"];
    Config::resolve(args(&[&given, words].concat()))
}

fn refusal(words: &[&str]) -> String {
    read(words).map(|_| ()).expect_err("refused").to_string()
}

fn file(text: &str) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().expect("a file");
    let header = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n";
    write!(file, "{header}{text}").expect("room");
    file
}

#[test]
fn the_command_line_is_consistent() {
    Cli::command().debug_assert();
}

#[test]
fn every_flag_has_an_environment_variable_of_its_name() {
    let cli = Cli::command();
    let run = cli.find_subcommand("run").expect("run exists");
    for arg in run.get_arguments().filter(|arg| arg.get_id() != "help" && !arg.is_hide_set()) {
        let env = arg.get_env().map(|env| env.to_string_lossy().into_owned());
        let name = arg.get_id().as_str().to_uppercase();
        assert_eq!(env, Some(format!("XDP_AGENT_{name}")));
        assert!(arg.get_help_heading().is_some(), "{name} is under a heading");
    }
}

#[test]
fn interfaces_are_a_list_without_repetitions() {
    assert_eq!(config(&["--iface", "eth1"]).expect("valid").interfaces, ["eth0", "eth1"]);
}

#[test]
fn times_are_written_for_people_or_for_go() {
    let args = args(&["--udp-timeout", "90s", "--conntrack-tcp-timeout-established=2h0m0s"]);
    assert_eq!(args.timeouts.udp_timeout, Duration::from_secs(90));
    assert_eq!(args.timeouts.tcp_established_timeout, Duration::from_secs(7_200));
}

#[test]
fn bad_values_are_refused_with_a_hint() {
    for (flag, value, hint) in [
        ("--udp-timeout", "10ms", "at least 1s"),
        ("--udp-timeout", "soon", "3m"),
        ("--max-backends", "3", "64.."),
        ("--snat-ports", "9-1", "MIN-MAX"),
        ("--mode", "fast", "generic"),
        ("--metrics-address", "here", "IP:PORT"),
        ("--cluster-cidr", "10.0.0.0", "ADDRESS/LENGTH"),
        ("--nodeport-addresses", "secondary", "primary"),
        ("--detect-local-mode", "Magic", "NodeCIDR"),
        ("--masquerade-everything", "true", "unexpected argument"),
        ("--write-config-to", "file", "/configz"),
        ("--proxy-mode", "bogus", "iptables, ipvs, nftables"),
        ("--proxy-mode", "kernelspace", "iptables, ipvs, nftables"),
        ("--logging-format", "xml", "text, json"),
        ("--bind-address", "here", "not an IP address"),
        ("--node-ip", "10.0.0", "not an IP address"),
    ] {
        let message = refusal(&[flag, value]);
        assert!(message.contains(hint), "{flag} {value}: {message}");
    }
}

#[test]
fn files_and_the_api_are_not_asked_both() {
    let message = refusal(&["--services", "a.yaml", "--kubeconfig", "k"]);
    assert!(message.contains("--services") && message.contains("--kubeconfig"), "{message}");
    let whole = std::path::absolute("a.yaml").expect("a working directory");
    assert_eq!(config(&["--services", "a.yaml"]).expect("valid").source, ObjectSource::Files(vec![whole]));
    let kubernetes = ObjectSource::Kubernetes { kubeconfig: None, master: None };
    assert_eq!(config(&[]).expect("valid").source, kubernetes);
}

#[test]
fn a_command_line_of_kube_proxy_works_and_is_explained() {
    let words = [
        "--proxy-mode=iptables",
        "--hostname-override= Node-A ",
        "--masquerade-all",
        "--iptables-localhost-nodeports=false",
        "--conntrack-tcp-be-liberal",
        "--oom-score-adj",
        "-998",
        "--cluster-cidr=10.244.0.0/16,fd00:10:244::/56",
        "-v=2",
    ];
    let (args, notes) = read(&words).expect("valid");
    let notes: Vec<&str> = notes.iter().map(|note| note.what.as_str()).collect();
    assert_eq!(
        notes,
        [
            "--proxy-mode",
            "--iptables-localhost-nodeports",
            "--oom-score-adj",
            "--conntrack-tcp-be-liberal",
            "--v"
        ]
    );
    let config =
        Config::resolve(Args { programs: self::args(&["--iface", "eth0"]).programs, ..args }).expect("valid");
    assert_eq!(config.cluster.node, "node-a");
    assert!(config.cluster.masquerade_all);
    let networks = [("10.244.0.0", 16), ("fd00:10:244::", 56)];
    let networks = networks.map(|(addr, len)| (addr.parse().expect("an address"), len)).to_vec();
    assert_eq!(config.cluster.detect_local, DetectLocal::ClusterCidr(networks));
}

#[test]
fn flags_are_named_with_underscores_too() {
    let (args, notes) = read(&[
        "--hostname_override=my_node",
        "--detect_local-mode",
        "NodeCIDR",
        "--proxy_mode=",
        "--masquerade_all",
    ])
    .expect("valid");
    assert_eq!(args.cluster.node.as_deref(), Some("my_node"));
    assert_eq!(args.cluster.detect_local_mode, DetectLocalMode::NodeCidr);
    assert!(args.cluster.masquerade_all);
    assert_eq!(notes.len(), 1);
}

#[test]
fn leading_zeros_of_addresses_are_decimal() {
    let config = config(&[
        "--node-ip",
        "010.000.000.012",
        "--cluster-cidr=010.244.0.0/16",
        "--bind-address=0.0.0.000",
    ]);
    let cluster = config.expect("valid").cluster;
    assert_eq!(cluster.node_ips, [IpAddr::from([10, 0, 0, 12])]);
    assert_eq!(cluster.detect_local, DetectLocal::ClusterCidr(vec![([10, 244, 0, 0].into(), 16)]));
}

#[test]
fn switches_without_effect_are_switches_all_the_same() {
    assert!(refusal(&["--profiling=maybe"]).contains("true or false"));
    assert_eq!(read(&["--profiling=false", "--ipvs-strict-arp"]).expect("valid").1.len(), 2);
    assert_eq!(args(&["--detect-local-mode="]).cluster.detect_local_mode, DetectLocalMode::ClusterCidr);
}

#[test]
fn switches_are_written_as_in_go_and_empty_values_say_nothing() {
    assert!(!args(&["--masquerade-all=false"]).cluster.masquerade_all);
    assert!(args(&["--keep", "--fresh=true"]).programs.keep);
    let config = config(&["--cluster-cidr=", "--nodeport-addresses=", "--service-cidr="]).expect("valid");
    assert_eq!(config.cluster.detect_local, DetectLocal::None);
    assert_eq!(config.cluster.nodeport_addresses, NodePortAddresses::Primary);
    assert_eq!(config.cluster.service_cidrs, []);
}

#[test]
fn an_empty_name_of_the_node_is_the_hostname() {
    let of_host = Config::resolve(args(&["--iface", "eth0"])).expect("valid").cluster.node;
    let empty =
        Config::resolve(args(&["--iface", "eth0", "--hostname-override="])).expect("valid").cluster.node;
    assert!(!of_host.is_empty() && empty == of_host);
}

#[test]
fn modes_that_need_a_name_say_so() {
    for (mode, needs) in [
        ("BridgeInterface", "--pod-bridge-interface"),
        ("InterfaceNamePrefix", "--pod-interface-name-prefix"),
    ] {
        let error = config(&["--detect-local-mode", mode]).expect_err("refused").to_string();
        assert!(error.contains(needs), "{error}");
        let config = config(&["--detect-local-mode", mode, needs, "cni"]).expect("valid");
        assert_ne!(config.cluster.detect_local, DetectLocal::None);
    }
    let all = config(&["--nodeport-addresses", "all"]).expect("valid").cluster.nodeport_addresses;
    assert_eq!(
        all,
        config(&["--nodeport-addresses", "0.0.0.0/0,::/0"]).expect("valid").cluster.nodeport_addresses
    );
    let both = config(&["--nodeport-addresses", "primary,10.0.0.0/8"]).expect_err("refused").to_string();
    assert!(both.contains("stands alone"), "{both}");
}

#[test]
fn the_bind_address_is_the_primary_one_of_its_family_unless_another_is_given() {
    let ips = |words: &[&str]| {
        config(words).expect("valid").cluster.node_ips.iter().map(ToString::to_string).collect::<Vec<_>>()
    };
    assert_eq!(ips(&["--bind-address", "0.0.0.0"]), [""; 0]);
    assert_eq!(ips(&["--bind-address", "192.0.2.1"]), ["192.0.2.1"]);
    assert_eq!(
        ips(&["--bind-address", "192.0.2.1", "--node-ip", "192.0.2.7,2001:db8::7"]),
        ["192.0.2.7", "2001:db8::7"]
    );
    assert_eq!(
        ips(&["--bind-address", "192.0.2.1", "--node-ip", "2001:db8::7"]),
        ["2001:db8::7", "192.0.2.1"]
    );
}

#[test]
fn servers_listen_where_kube_proxy_does() {
    let listen = |words: &[&str]| {
        let listen = config(words).expect("valid").listen;
        [listen.healthz, listen.metrics]
            .map(|address| address.map(|address| address.to_string()).unwrap_or_default())
    };
    assert_eq!(listen(&[]), ["0.0.0.0:10256", "127.0.0.1:10249"]);
    assert_eq!(listen(&["--bind-address", "::"]), ["[::]:10256", "[::1]:10249"]);
    assert_eq!(
        listen(&["--healthz-bind-address=", "--metrics-bind-address", "0.0.0.0"]),
        ["", "0.0.0.0:10249"]
    );
    assert_eq!(listen(&["--metrics-address", "127.0.0.1:9400"])[1], "127.0.0.1:9400");
}

#[test]
fn flags_win_over_the_file() {
    let file = file(
        "hostnameOverride: of-file\nconntrack: {udpStreamTimeout: 5m}\nclientConnection: {kubeconfig: /k}\n",
    );
    let path = file.path().to_str().expect("text");
    let config = config(&["--config", path]).expect("valid");
    assert_eq!(config.cluster.node, "n", "the flag of every case here");
    assert_eq!(config.timeouts.udp, 300);
    let (from_file, _) = read(&["--config", path]).expect("valid");
    assert_eq!(from_file.cluster.node.as_deref(), Some("of-file"));
    assert_eq!(from_file.objects.kubeconfig, Some("/k".into()));
    let (both, _) =
        read(&["--config", path, "--services", "a.yaml"]).expect("a flag in place of the file's field");
    assert!(matches!(source(both.objects), Ok(ObjectSource::Files(_))));
}

#[test]
fn a_bad_file_is_refused_by_field_and_line() {
    for (text, says) in [
        ("conntrack: {udpStreamTimeout: soon}\n", "conntrack.udpStreamTimeout: invalid value \"soon\""),
        ("detectLocalMode: Magic\n", "detectLocalMode: invalid value \"Magic\""),
        ("nodePortAddresses: [10.0.0.0]\n", "nodePortAddresses: invalid value"),
        ("clusterCidr: 10.0.0.0/8\n", "line 3: clusterCidr"),
    ] {
        let file = file(text);
        let message = refusal(&["--config", file.path().to_str().expect("text")]);
        assert!(
            message.contains(says) && message.contains(&file.path().display().to_string()),
            "{text}: {message}"
        );
    }
    assert!(refusal(&["--config", "/missing.yaml"]).contains("/missing.yaml: "));
}

#[test]
fn fields_of_the_file_without_effect_are_noted() {
    let file = file("mode: ipvs\nclusterCIDR: 10.0.0.0/8\n");
    let (_, notes) = read(&["--config", file.path().to_str().expect("text")]).expect("valid");
    assert_eq!(notes.iter().map(|note| note.what.as_str()).collect::<Vec<_>>(), ["mode"]);
}

#[test]
fn fields_stand_for_flags_that_exist() {
    let cli = Cli::command();
    let run = cli.find_subcommand("run").expect("run exists");
    for (field, fate) in file::FIELDS {
        if let file::Fate::Flag(flag) = fate {
            assert!(run.get_arguments().any(|arg| arg.get_id() == flag), "{field}: there is no flag {flag}");
        }
    }
}

#[test]
fn the_resolved_configuration_is_shown_under_the_names_of_the_flags() {
    let json = config(&["--services", "/a.yaml", "--cluster-cidr", "10.0.0.0/8"]).expect("valid").to_json();
    assert_eq!(json["detect-local-mode"]["ClusterCIDR"][0], "10.0.0.0/8");
    let cli = Cli::command();
    let run = cli.find_subcommand("run").expect("run exists");
    for name in json.as_object().expect("an object").keys() {
        assert!(run.get_arguments().any(|arg| arg.get_long() == Some(name)), "{name} is no flag");
    }
}
