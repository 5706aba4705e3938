//! Rules over manifests and the lock file: which way dependencies point, and where they come from.

use super::File;

/// Every package of ours and those of ours it may depend on.
const ALLOWED: [(&str, &[&str]); 7] = [
    ("xdp-common", &[]),
    ("xdp-ebpf", &["xdp-common"]),
    ("xdp-agent", &["xdp-common"]),
    ("xtask", &[]),
    ("image", &[]),
    ("tests", &["xdp-common", "xdp-agent"]),
    ("bench", &["xdp-common", "xdp-agent", "xdp-agent-tests"]),
];

const OURS: [&str; 7] =
    ["xdp-common", "xdp-ebpf", "xdp-agent", "xdp-agent-tests", "xdp-agent-bench", "xdp-agent-image", "xtask"];

/// The shared crate compiles for the kernel and for the host, and so depends on neither side.
const NOT_IN_COMMON: [&str; 6] = ["aya", "aya-ebpf", "aya-log", "aya-log-ebpf", "tokio", "libc"];

const CRATES_IO: &str = "registry+https://github.com/rust-lang/crates.io-index";

pub(super) fn findings(file: &File) -> Vec<String> {
    if file.path == "Cargo.lock" {
        return sources(file);
    }
    let Some(package) = file.path.strip_suffix("/Cargo.toml") else { return Vec::new() };
    let Some((_, allowed)) = ALLOWED.iter().find(|(name, _)| *name == package) else { return Vec::new() };
    let mut findings = Vec::new();
    for dependency in dependencies(&file.text) {
        if OURS.contains(&dependency.as_str()) && !allowed.contains(&dependency.as_str()) {
            findings.push(format!("{}: must not depend on {dependency}", file.path));
        }
        if package == "xdp-common" && NOT_IN_COMMON.contains(&dependency.as_str()) {
            findings.push(format!("{}: must not depend on {dependency}", file.path));
        }
    }
    findings
}

fn dependencies(manifest: &str) -> Vec<String> {
    let mut inside = false;
    let mut found = Vec::new();
    for line in manifest.lines().map(str::trim) {
        if let Some(section) = line.strip_prefix('[') {
            let section = section.trim_end_matches(']');
            inside = section.ends_with("dependencies");
            // A dependency may be a table of its own: [dependencies.name].
            if let Some((_, name)) = section.split_once("dependencies.") {
                found.push(name.to_owned());
            }
        } else if inside && !line.starts_with('#') {
            let name: String =
                line.chars().take_while(|c| c.is_alphanumeric() || "-_".contains(*c)).collect();
            if !name.is_empty() {
                found.push(name);
            }
        }
    }
    found
}

fn sources(lock: &File) -> Vec<String> {
    let sources = lock.text.lines().filter_map(|line| line.strip_prefix("source = "));
    let foreign = sources.map(|source| source.trim_matches('"')).filter(|source| *source != CRATES_IO);
    foreign.map(|source| format!("{}: {source} is not crates.io", lock.path)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(path: &str, text: &str) -> Vec<String> {
        findings(&File { path: path.into(), text: text.into() })
    }

    #[test]
    fn a_dependency_against_the_direction_is_found() {
        for (path, text) in [
            ("xdp-agent/Cargo.toml", "[dev-dependencies]\nxdp-agent-tests = { path = \"../tests\" }\n"),
            ("xdp-common/Cargo.toml", "[dependencies]\nxdp-agent.workspace = true\n"),
            ("xdp-common/Cargo.toml", "[target.'cfg(unix)'.dependencies]\naya = \"0.14\"\n"),
            ("xtask/Cargo.toml", "[dependencies.xdp-common]\nworkspace = true\n"),
            ("Cargo.lock", "source = \"git+https://example.org/x\"\n"),
        ] {
            assert_eq!(check(path, text).len(), 1, "{path}: {text}");
        }
    }

    #[test]
    fn dependencies_in_the_right_direction_pass() {
        for (path, text) in [
            (
                "xdp-agent/Cargo.toml",
                "[package]\nname = \"xdp-agent\"\n[dependencies]\nxdp-common.workspace = true\n",
            ),
            ("bench/Cargo.toml", "[dependencies]\n# the lab\nxdp-agent-tests.workspace = true\n"),
            ("Cargo.lock", "source = \"registry+https://github.com/rust-lang/crates.io-index\"\n"),
        ] {
            assert_eq!(check(path, text), [""; 0], "{path}: {text}");
        }
    }
}
