//! What documents point to is there.

use crate::files;

/// The documents whose links are looked at.
const DOCUMENTS: [&str; 5] =
    ["deploy/README.md", "docs/install.md", "docs/operate.md", "docs/packet-path.md", "docs/troubleshoot.md"];

#[test]
fn links_within_the_repository_lead_somewhere() {
    let mut seen = 0;
    for document in DOCUMENTS {
        for link in links(&files::text(document)) {
            if link.contains("://") {
                continue;
            }
            let (path, heading) = link.split_once('#').unwrap_or((&link, ""));
            let target = files::beside(document.as_ref(), if path.is_empty() { "." } else { path });
            let target = if path.is_empty() { document.into() } else { target };
            assert!(files::root().join(&target).exists(), "{document}: {link} leads nowhere");
            if !heading.is_empty() {
                let headings = files::headings(&target.to_string_lossy());
                assert!(headings.contains(heading), "{document}: {link} has no such heading");
            }
            seen += 1;
        }
    }
    assert!(seen > 10, "only {seen} links were found");
}

/// Where the links of a text lead.
fn links(text: &str) -> Vec<String> {
    let ends = text.match_indices("](").filter_map(|(at, _)| text[at + 2..].split_once(')'));
    ends.map(|(link, _)| link.to_owned()).collect()
}

#[test]
fn kustomizations_and_flags_that_documents_name_exist() {
    let command = <xdp_agent::config::Cli as clap::CommandFactory>::command();
    let mut flags: Vec<String> = command.get_subcommands().flat_map(flags_of).collect();
    flags.extend(OTHERS.map(str::to_owned));
    for document in DOCUMENTS {
        let text = files::text(document);
        for (at, _) in text.match_indices("--") {
            let is_start = text[..at].ends_with([' ', '`', '(', '\n', '"']);
            let flag: String = text[at + 2..]
                .chars()
                .take_while(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || *c == '-')
                .collect();
            let is_pattern = flag.ends_with('-');
            if is_start && flag.len() > 1 && !is_pattern {
                assert!(flags.contains(&flag), "{document}: no --{flag}");
            }
        }
        for (at, _) in text.match_indices("deploy/") {
            let path: String =
                text[at..].chars().take_while(|c| c.is_alphanumeric() || "/-._".contains(*c)).collect();
            let path = path.trim_end_matches(['.', '/']);
            assert!(files::root().join(path).exists(), "{document}: there is no {path}");
        }
    }
}

/// Flags of kubeadm, k3s, cargo and xtask, as far as the documents use them, and one that every program has.
const OTHERS: [&str; 5] = ["skip-phases", "disable-kube-proxy", "test", "push", "version"];

fn flags_of(command: &clap::Command) -> Vec<String> {
    let names = |arg: &clap::Arg| {
        let aliases = arg.get_all_aliases().unwrap_or_default();
        aliases.into_iter().chain(arg.get_long()).map(str::to_owned).collect::<Vec<_>>()
    };
    command.get_arguments().flat_map(names).collect()
}
