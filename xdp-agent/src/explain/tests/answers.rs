//! Questions as people and programs put them.

use std::path::PathBuf;

use clap::Parser;

use super::*;

fn args(words: &[&str]) -> Result<ExplainArgs, clap::Error> {
    ExplainArgs::try_parse_from(["explain"].iter().chain(words))
}

/// The flags of a golden case with a node, pods and endpoints.
fn flags(case: &str) -> Vec<String> {
    let file = format!("{}/../tests/cases/{case}.yaml", env!("CARGO_MANIFEST_DIR"));
    let flags = "--node here --node-ip 192.168.0.2 --cluster-cidr 10.0.0.0/16".split(' ').map(str::to_owned);
    ["--services".to_owned(), file].into_iter().chain(flags).collect()
}

fn respondent(case: &str) -> Respondent {
    let words: Vec<String> = flags(case).into_iter().chain(["--maps".to_owned()]).collect();
    let args = args(&words.iter().map(String::as_str).collect::<Vec<_>>()).expect("flags");
    let mut world = World::new(args.cluster.options().expect("options"));
    read(&args, &mut world).expect("the case");
    Respondent::World(Box::new(world))
}

#[test]
fn every_line_of_a_batch_has_its_answer_in_order() {
    let respondent = respondent("external_local");
    let lines: &[(&str, &str)] = &[
        (
            r#"{"from": "203.0.113.2", "to": "192.168.0.2:30080", "proto": "tcp"}"#,
            r#"{"verdict":"forward","frontend":"NodePort","service":"shop/web:http","source":"external","endpoints":[{"address":"10.0.0.1:8080","local":true,"snat":false}],"reason":null}"#,
        ),
        ("{", r#"{"error":"EOF while parsing an object at line 1 column 1"}"#),
        ("", r#"{"error":"EOF while parsing a value at line 1 column 0"}"#),
        (
            r#"{"from": "192.168.0.2:999", "to": "5.6.7.8:80", "proto": "tcp"}"#,
            r#"{"verdict":"forward","frontend":"LoadBalancer","service":"shop/web:http","source":"host","endpoints":[{"address":"10.0.0.1:8080","local":true,"snat":false},{"address":"10.0.1.1:8080","local":false,"snat":true}],"reason":null}"#,
        ),
        (
            r#"{"from": "10.0.0.1", "to": "010.096.00.10:80", "proto": "tcp"}"#,
            r#"{"verdict":"forward","frontend":"ClusterIP","service":"shop/web:http","source":"pod","endpoints":[{"address":"10.0.0.1:8080","local":true,"snat":true},{"address":"10.0.1.1:8080","local":false,"snat":false}],"reason":null}"#,
        ),
        (
            r#"{"from": "203.0.113.2", "to": "10.96.0.10:81", "proto": "tcp"}"#,
            r#"{"verdict":"reject","frontend":null,"service":null,"source":"external","endpoints":[],"reason":"A port of a ClusterIP that no service has."}"#,
        ),
        (
            r#"{"from": "203.0.113.2", "to": "192.168.0.2:30000", "proto": "tcp"}"#,
            r#"{"verdict":"pass","frontend":"HealthCheckNodePort","service":"shop/web","source":"external","endpoints":[],"reason":"The node itself answers load balancers that ask for endpoints of this Service."}"#,
        ),
        (
            r#"{"from": "2001:db8::7", "to": "[2001:db8::1]:30080", "proto": "tcp"}"#,
            r#"{"verdict":"pass","frontend":null,"service":null,"source":"external","endpoints":[],"reason":"No Service has this address and port; the kernel goes on with it."}"#,
        ),
    ];
    let questions = lines.iter().map(|(question, _)| *question).collect::<Vec<_>>().join("\n");
    let mut out = Vec::new();
    let is_sound = answer_all(questions.as_bytes(), &respondent, &mut out).expect("answers");
    assert!(!is_sound, "two lines have no answer");
    let answers = String::from_utf8(out).expect("text");
    assert_eq!(
        answers.lines().collect::<Vec<_>>(),
        lines.iter().map(|(_, answer)| *answer).collect::<Vec<_>>()
    );
    let sound = format!("{}\n", lines[0].0);
    assert!(answer_all(sound.as_bytes(), &respondent, &mut Vec::new()).expect("answers"));
    assert!(!answer_all(&b"\xff\xfe"[..], &respondent, &mut Vec::new()).expect("answers"), "not even text");
}

#[test]
fn what_is_dropped_or_has_no_endpoints_says_so() {
    let ask = |case: &str, from: &str, to: &str| {
        let line = serde_json::json!({ "from": from, "to": to, "proto": "tcp" }).to_string();
        let answer = respondent(case).ask(&Question::from_json(&line).expect("a question"));
        (answer.verdict, answer.frontend, answer.service, answer.reason.unwrap_or_default())
    };
    for (case, to, verdict, frontend, hint) in [
        (
            "external_local_elsewhere",
            "192.168.0.2:30080",
            Verdict::Drop,
            Frontend::NodePort,
            "policy is Local",
        ),
        ("source_ranges", "5.6.7.8:80", Verdict::Drop, Frontend::LoadBalancer, "loadBalancerSourceRanges"),
        ("no_endpoints", "10.96.0.10:80", Verdict::Reject, Frontend::ClusterIp, "no usable endpoint"),
        ("no_endpoints", "203.0.113.250:80", Verdict::Reject, Frontend::ExternalIp, "no usable endpoint"),
        (
            "no_endpoints",
            "192.168.0.2:30080",
            Verdict::Reject,
            Frontend::NodePort,
            "the node's own kernel refuses",
        ),
    ] {
        let (found, whose, service, reason) = ask(case, "198.51.100.7", to);
        assert_eq!(
            (found, whose, service.as_deref()),
            (verdict, Some(frontend), Some("shop/web:http")),
            "{case} {to}"
        );
        assert!(reason.contains(hint), "{case} {to}: {reason}");
    }
    let (verdict, frontend, service, reason) = ask("service_cidrs", "198.51.100.7", "10.96.0.9:80");
    assert_eq!((verdict, frontend, service), (Verdict::Drop, None, None));
    assert!(reason.contains("ServiceCIDR"), "{reason}");
}

#[test]
fn flags_ask_for_one_thing_of_one_source() {
    let question = ["--from", "10.0.0.2", "--to", "10.96.0.10:80"];
    let given = |more: &[&str]| args(&[&["--node", "n"], more].concat());
    assert!(given(&[&["--services", "a", "b,c"], &question[..]].concat()).is_ok());
    assert!(given(&[&["--live"], &question[..]].concat()).is_ok());
    assert!(given(&["--services", "a", "--batch", "-"]).is_ok());
    for wrong in [
        &["--services", "a"][..],
        &["--services", "a", "--to", "10.96.0.10:80"],
        &["--services", "a", "--from", "10.0.0.2"],
        &["--services", "a", "--from", "10.0.0.2", "--to", "10.96.0.10"],
        &["--services", "a", "--from", "10.0.0.2", "--to", "10.96.0.10:80", "--proto", "icmp"],
        &["--services", "a", "--from", "10.0.0.2", "--to", "10.96.0.10:80", "--batch", "-"],
        &question,
    ] {
        assert!(given(wrong).is_err(), "{wrong:?}");
    }
    let files = given(&[&["--services", "a", "b,c"], &question[..]].concat()).expect("flags").services;
    assert_eq!(files, ["a", "b", "c"].map(PathBuf::from));
}

#[test]
fn files_that_cannot_be_read_end_it() {
    let args = args(&["--services", "/nonexistent", "--maps", "--node", "n"]).expect("flags");
    let error = run(&args).expect_err("refused");
    assert!(error.to_string().contains("--services"), "{error}");
    let args = ExplainArgs { services: Vec::new(), live: true, pin_dir: "/nonexistent".into(), ..args };
    let error = run(&args).expect_err("refused");
    assert!(error.to_string().contains("no agent of this version has its maps in /nonexistent"), "{error}");
}

#[test]
fn pods_that_an_address_cannot_tell_are_not_guessed() {
    let mode = ["--detect-local-mode", "BridgeInterface", "--pod-bridge-interface", "cni0"];
    let words: Vec<String> = flags("cluster_ip").into_iter().chain(["--maps".to_owned()]).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).chain(mode).collect();
    let error = run(&args(&words).expect("flags")).expect_err("refused");
    assert!(error.to_string().contains("--cluster-cidr"), "{error}");
}
