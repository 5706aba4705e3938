//! The table of what was run, in docs/compatibility.md: a run with `--record` replaces the cells it has measured.

use super::{Architecture, Lane, Request, results::Outcome};
use crate::process;
use crate::workspace::Workspace;
use anyhow::{Context, Result};
use std::collections::BTreeMap;
use std::process::Command;

const DOCUMENT: &str = "docs/compatibility.md";
const START: &str = "<!-- measured -->\n";
const END: &str = "<!-- end of measured -->";

/// Cells by lane, of one architecture and one kernel.
type Rows = BTreeMap<(String, Vec<u64>, String), BTreeMap<&'static str, String>>;

/// The day and the commit that cells are marked by: those of the start, because a run takes long.
pub(crate) fn mark(workspace: &Workspace) -> Result<String> {
    let answer = |program: &str, args: &[&str]| {
        let mut command = Command::new(program);
        let answer = process::output(command.args(args).current_dir(&workspace.root));
        answer.map(|answer| answer.trim().to_owned()).with_context(|| format!("`{program}` does not answer"))
    };
    let commit = answer("git", &["rev-parse", "--short=10", "HEAD"])?;
    // The document itself changes while machines are measured.
    let changed = answer("git", &["status", "--porcelain", "--", ":!docs/compatibility.md"])?;
    let dirty = if changed.is_empty() { "" } else { "-dirty" };
    Ok(format!("{}, {commit}{dirty}", answer("date", &["-u", "+%F"])?))
}

/// Writes the outcome of a machine into the document.
pub(crate) fn write(
    workspace: &Workspace,
    mark: &str,
    (architecture, _, outcome): &(Architecture, String, Outcome),
    request: &Request,
) -> Result<()> {
    let Some(kernel) = &outcome.kernel else { return Ok(()) };
    let path = workspace.root.join(DOCUMENT);
    let text = std::fs::read_to_string(&path).with_context(|| format!("cannot read {DOCUMENT}"))?;
    let marks = format!("{DOCUMENT} has not the comments that the table is between");
    let (before, rest) = text.split_once(START).context(marks.clone())?;
    let (table, after) = rest.split_once(END).context(marks)?;
    let mut known = parse(table);
    let cells = known.entry(key(architecture.name(), kernel)).or_default();
    // What is refused is so in every lane.
    let is_refused = outcome.refusal.is_some();
    for lane in if is_refused { &Lane::ALL[..] } else { &request.lanes } {
        let amount = if is_refused { "" } else { request.amount(*lane) };
        let broken = if outcome.problems.is_empty() { "" } else { "FAILED, " };
        let built = if request.is_debug() && !is_refused { ", debug" } else { "" };
        cells.insert(lane.name(), format!("{broken}{}{amount}{built} ({mark})", outcome.cell(*lane)));
    }
    std::fs::write(&path, format!("{before}{START}{}{END}{after}", render(&known)))?;
    Ok(())
}

fn key(architecture: &str, kernel: &str) -> (String, Vec<u64>, String) {
    let numbers = kernel.split(|c: char| !c.is_ascii_digit()).filter_map(|number| number.parse().ok());
    (architecture.to_owned(), numbers.collect(), kernel.to_owned())
}

fn parse(table: &str) -> Rows {
    let cells = |line: &'_ str| {
        line.trim_matches('|').split('|').map(|cell| cell.trim().to_owned()).collect::<Vec<_>>()
    };
    // A table from before a lane was added has a column less.
    let head = table.lines().next().map(cells).unwrap_or_default();
    let mut rows = Rows::new();
    for line in table.lines().skip(2) {
        let cells = cells(line);
        let [architecture, kernel, ..] = cells.as_slice() else { continue };
        let row = rows.entry(key(architecture, kernel)).or_default();
        for (name, cell) in head.iter().zip(&cells).filter(|(_, cell)| *cell != NOT_RUN) {
            if let Some(lane) = Lane::ALL.iter().find(|lane| lane.name() == name) {
                row.insert(lane.name(), cell.clone());
            }
        }
    }
    rows
}

const NOT_RUN: &str = "not run";

fn render(rows: &Rows) -> String {
    let names = Lane::ALL.map(Lane::name).join(" | ");
    let mut text =
        format!("| architecture | kernel | {names} |\n|---|---|{}\n", "---|".repeat(Lane::ALL.len()));
    for ((architecture, _, kernel), cells) in rows {
        text.push_str(&format!("| {architecture} | {kernel} |"));
        for lane in Lane::ALL {
            let cell = cells.get(lane.name()).map_or(NOT_RUN, String::as_str);
            text.push_str(&format!(" {cell} |"));
        }
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_measured_before_is_kept_and_kernels_are_in_order() {
        let mut rows = Rows::new();
        rows.entry(key("x86_64", "6.12.117-amd64"))
            .or_default()
            .insert("netns", "7 passed (a day)".to_owned());
        rows.entry(key("x86_64", "6.1.0-56-amd64"))
            .or_default()
            .insert("prog-run", "5 passed (a day)".to_owned());
        let table = render(&rows);
        assert_eq!(parse(&table), rows);
        let older = "| architecture | kernel | netns |\n|---|---|---|\n| arm64 | 6.1 | 7 passed (a day) |\n";
        assert_eq!(parse(older)[&key("arm64", "6.1")]["netns"], "7 passed (a day)");
        let kernels: Vec<_> = table.lines().skip(2).filter_map(|line| line.split('|').nth(2)).collect();
        assert_eq!(kernels, [" 6.1.0-56-amd64 ", " 6.12.117-amd64 "]);
    }
}
