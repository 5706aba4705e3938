//! Rules over single source files.

use super::File;
use super::source::{code_only, lines_with_word};

/// A file longer than this wants to be two.
const FILE_LINES_MAX: usize = 500;

/// The kernel crate's files that may hold unsafe code: frames, maps, sockets and the tables made of arrays, and the lab's programs,
/// which are no part of the product.
const UNSAFE_FILES: [&str; 12] = [
    "xdp-ebpf/src/packet.rs",
    "xdp-ebpf/src/packet/bytes.rs",
    "xdp-ebpf/src/skb.rs",
    "xdp-ebpf/src/maps.rs",
    "xdp-ebpf/src/routes.rs",
    "xdp-ebpf/src/atomic.rs",
    "xdp-ebpf/src/embryonic.rs",
    "xdp-ebpf/src/established.rs",
    "xdp-ebpf/src/socket.rs",
    "xdp-ebpf/src/tcp_sockets.rs",
    "xdp-ebpf/src/fragments.rs",
    "xdp-ebpf/src/lab.rs",
];

/// The agent's files, by how their names begin, that may name aya: they load, attach and write.
const AYA_FILES: [&str; 3] = ["attach", "maps", "reconcile"];

/// The agent's files that may name the Kubernetes client.
const KUBE_FILES: [&str; 1] = ["watch"];

pub(super) fn findings(file: &File) -> Vec<String> {
    let mut findings = length(file);
    findings.extend(machine_places(file));
    if file.path.ends_with(".rs") {
        let code = code_only(&file.text);
        findings.extend(module_files(file));
        findings.extend(unfinished(file, &code));
        findings.extend(sleeps(file, &code));
        findings.extend(unsafe_places(file, &code));
        findings.extend(client_places(file, &code));
        findings.extend(common_crate(file, &code));
    }
    findings
}

fn at(file: &File, lines: &[usize], what: &str) -> Vec<String> {
    lines.iter().map(|line| format!("{}:{line}: {what}", file.path)).collect()
}

fn length(file: &File) -> Vec<String> {
    let lines = file.text.lines().count();
    if !file.path.ends_with(".rs") || lines <= FILE_LINES_MAX {
        return Vec::new();
    }
    vec![format!("{}: {lines} lines; over {FILE_LINES_MAX} a file wants to be two", file.path)]
}

fn module_files(file: &File) -> Vec<String> {
    if !file.path.ends_with("/mod.rs") {
        return Vec::new();
    }
    vec![format!("{}: a module `foo` is `foo.rs` beside `foo/`, never `foo/mod.rs`", file.path)]
}

fn unfinished(file: &File, code: &str) -> Vec<String> {
    let mut findings = Vec::new();
    for word in ["todo!", "unimplemented!", "dbg!"] {
        findings.extend(at(file, &lines_with_word(code, word), &format!("`{word}` is unfinished work")));
    }
    // An attribute may carry a reason, so the bracket is left open; a test that does not run proves nothing.
    let ignored = code.lines().enumerate().filter(|(_, line)| line.trim_start().starts_with("#[ignore"));
    let ignored: Vec<_> = ignored.map(|(index, _)| index + 1).collect();
    findings.extend(at(file, &ignored, "a test is run or removed, never ignored"));
    findings
}

/// A sleep in a lane is either too short somewhere or too long everywhere.
fn sleeps(file: &File, code: &str) -> Vec<String> {
    if !file.path.starts_with("tests/lanes/") {
        return Vec::new();
    }
    ["thread::sleep", "time::sleep"]
        .into_iter()
        .flat_map(|word| {
            at(file, &lines_with_word(code, word), "lanes wait for what they expect, up to a deadline")
        })
        .collect()
}

fn unsafe_places(file: &File, code: &str) -> Vec<String> {
    if !file.path.starts_with("xdp-ebpf/src/") || UNSAFE_FILES.contains(&file.path.as_str()) {
        return Vec::new();
    }
    // `#[unsafe(no_mangle)]` is how an entry point or a licence is exported, and runs nothing.
    let code = code.replace("#[unsafe(", "#[(");
    at(
        file,
        &lines_with_word(&code, "unsafe"),
        "unsafe code of the kernel crate lives in the files of UNSAFE_FILES",
    )
}

fn client_places(file: &File, code: &str) -> Vec<String> {
    let Some(inside) = file.path.strip_prefix("xdp-agent/src/") else { return Vec::new() };
    let may = |allowed: &[&str]| allowed.iter().any(|prefix| inside.starts_with(prefix));
    let mut findings = Vec::new();
    if !may(&AYA_FILES) {
        let what = "only the files that attach and write maps name aya";
        findings.extend(at(file, &lines_with_word(code, "aya::"), what));
    }
    if !may(&KUBE_FILES) {
        findings.extend(at(
            file,
            &lines_with_word(code, "kube::"),
            "only the watching file names the Kubernetes client",
        ));
    }
    findings
}

fn common_crate(file: &File, code: &str) -> Vec<String> {
    if !file.path.starts_with("xdp-common/src/") {
        return Vec::new();
    }
    let mut findings = at(file, &lines_with_word(code, "aya"), "the shared crate knows nothing of aya");
    if file.path == "xdp-common/src/lib.rs" {
        for attribute in ["forbid(unsafe_code)", "no_std"] {
            if !code.contains(attribute) {
                findings.push(format!("{}: lacks `{attribute}`", file.path));
            }
        }
    }
    findings
}

/// Places that exist on one machine only.
fn machine_places(file: &File) -> Vec<String> {
    // Put together here, so that this file does not find itself.
    let marks = [
        concat!("/ro", "ot/"),
        concat!("/ho", "me/"),
        concat!("/wo", "rk/"),
        concat!("artif", "actory"),
        concat!(".cor", "p/"),
    ];
    let mut findings = Vec::new();
    for (index, line) in file.text.lines().enumerate() {
        for mark in marks {
            let found = line.match_indices(mark).any(|(at, _)| {
                let before = line[..at].chars().next_back();
                !mark.starts_with('/')
                    || !before.is_some_and(|c| c.is_alphanumeric() || "_-.$}*~".contains(c))
            });
            if found {
                findings.push(format!("{}:{}: `{mark}` names a place of one machine", file.path, index + 1));
            }
        }
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(path: &str, text: &str) -> String {
        findings(&File { path: path.into(), text: text.into() }).join("\n")
    }

    #[test]
    fn each_rule_finds_what_it_forbids() {
        let long = "\n".repeat(FILE_LINES_MAX + 1);
        let home = concat!("run /ho", "me/someone/x");
        for (path, text, says) in [
            ("xdp-agent/src/plan.rs", long.as_str(), "wants to be two"),
            ("xdp-agent/src/plan/mod.rs", "", "never `foo/mod.rs`"),
            ("xdp-agent/src/plan.rs", "fn f() { todo!() }", "unfinished"),
            ("tests/lanes/netns.rs", "#[ignore = \"slow\"]\nfn a() {}", "never ignored"),
            ("tests/lanes/netns/http.rs", "std::thread::sleep(d);", "deadline"),
            ("xdp-ebpf/src/main.rs", "unsafe { f() }", "UNSAFE_FILES"),
            ("xdp-agent/src/plan.rs", "use aya::maps::Array;", "name aya"),
            ("xdp-agent/src/app.rs", "kube::Client::try_default()", "Kubernetes client"),
            ("xdp-common/src/lib.rs", "#![no_std]", "forbid(unsafe_code)"),
            ("xdp-common/src/net.rs", "use aya_ebpf as aya;", "nothing of aya"),
            ("README.md", home, "one machine"),
        ] {
            let found = check(path, text);
            assert!(found.contains(says), "{path}: {text:.40}: {found}");
        }
    }

    #[test]
    fn what_the_rules_allow_is_not_found() {
        for (path, text) in [
            ("xdp-ebpf/src/packet.rs", "unsafe { f() }"),
            ("xdp-ebpf/src/main.rs", "#[unsafe(no_mangle)]\nstatic LICENSE: [u8; 4] = *b\"GPL\\0\";"),
            ("xdp-agent/src/attach/native.rs", "use aya::programs::Xdp;"),
            ("xdp-agent/src/app.rs", "aya_log::EbpfLogger::init()"),
            ("xdp-common/src/lib.rs", "#![cfg_attr(not(test), no_std)]\n#![forbid(unsafe_code)]"),
            ("tests/src/lab/wait.rs", "tokio::time::sleep(step).await"),
            ("README.md", concat!("see $ROOT/ro", "ot/x and a", "/ho", "me/b")),
        ] {
            assert_eq!(check(path, text), "", "{path}: {text}");
        }
    }
}
