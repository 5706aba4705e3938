//! The tables of what was run and found, in docs/compatibility.md: a run with `--record` replaces the cells it has measured.

use super::{
    Architecture, Lane, Request,
    results::{FEATURES, Outcome},
};
use crate::process;
use crate::workspace::Workspace;
use anyhow::{Context, Result};
use std::collections::BTreeMap;
use std::process::Command;

const DOCUMENT: &str = "docs/compatibility.md";

/// A table: the comments around it, and its columns behind architecture and kernel.
struct Table {
    name: &'static str,
    columns: &'static [&'static str],
}

/// What each lane found.
const LANES: Table = Table { name: "measured", columns: &LANE_NAMES };
const LANE_NAMES: [&str; Lane::ALL.len()] = {
    let mut names = [""; Lane::ALL.len()];
    let mut lane = 0;
    while lane < names.len() {
        names[lane] = Lane::ALL[lane].name();
        lane += 1;
    }
    names
};
/// Which way the agent takes, as its `doctor` says.
const WAYS: Table = Table { name: "ways", columns: &WAY_NAMES };
const WAY_NAMES: [&str; FEATURES.len() + 1] = [FEATURES[0], FEATURES[1], FEATURES[2], FEATURES[3], SEEN];
/// The column that says when and at which commit.
const SEEN: &str = "seen";

/// Cells by column, of one architecture and one kernel.
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
    let mut text = std::fs::read_to_string(&path).with_context(|| format!("cannot read {DOCUMENT}"))?;
    let row = key(architecture.name(), kernel);
    let mut cells = BTreeMap::new();
    // What is refused is so in every lane.
    let is_refused = outcome.refusal.is_some();
    for lane in if is_refused { &Lane::ALL[..] } else { &request.lanes } {
        let amount = if is_refused { "" } else { request.amount(*lane) };
        let broken = if outcome.problems.is_empty() { "" } else { "FAILED, " };
        let built = if request.is_debug() && !is_refused { ", debug" } else { "" };
        cells.insert(lane.name(), format!("{broken}{}{amount}{built} ({mark})", outcome.cell(*lane)));
    }
    text = LANES.with(&text, &row, cells)?;
    if let Some(doctor) = &outcome.doctor {
        let mut ways = doctor.features.clone();
        ways.insert(SEEN, mark.to_owned());
        text = WAYS.with(&text, &row, ways)?;
    }
    std::fs::write(&path, text)?;
    Ok(())
}

impl Table {
    /// The document with these cells of a row in place of what they were.
    fn with(
        &self,
        document: &str,
        row: &(String, Vec<u64>, String),
        cells: BTreeMap<&'static str, String>,
    ) -> Result<String> {
        let (start, end) = (format!("<!-- {} -->\n", self.name), format!("<!-- end of {} -->", self.name));
        let marks = || format!("{DOCUMENT} has not the comments that the table {:?} is between", self.name);
        let (before, rest) = document.split_once(&start).with_context(marks)?;
        let (table, after) = rest.split_once(&end).with_context(marks)?;
        let mut known = self.parse(table);
        known.entry(row.clone()).or_default().extend(cells);
        Ok(format!("{before}{start}{}{end}{after}", self.render(&known)))
    }

    fn parse(&self, table: &str) -> Rows {
        let cells = |line: &'_ str| {
            line.trim_matches('|').split('|').map(|cell| cell.trim().to_owned()).collect::<Vec<_>>()
        };
        // A table from before a column was added has one less.
        let head = table.lines().next().map(cells).unwrap_or_default();
        let mut rows = Rows::new();
        for line in table.lines().skip(2) {
            let cells = cells(line);
            let [architecture, kernel, ..] = cells.as_slice() else { continue };
            let row = rows.entry(key(architecture, kernel)).or_default();
            for (name, cell) in head.iter().zip(&cells).filter(|(_, cell)| *cell != NOT_RUN) {
                if let Some(column) = self.columns.iter().find(|column| *column == name) {
                    row.insert(column, cell.clone());
                }
            }
        }
        rows
    }

    fn render(&self, rows: &Rows) -> String {
        let names = self.columns.join(" | ");
        let mut text =
            format!("| architecture | kernel | {names} |\n|---|---|{}\n", "---|".repeat(self.columns.len()));
        for ((architecture, _, kernel), cells) in rows {
            text.push_str(&format!("| {architecture} | {kernel} |"));
            for column in self.columns {
                let cell = cells.get(column).map_or(NOT_RUN, String::as_str);
                text.push_str(&format!(" {cell} |"));
            }
            text.push('\n');
        }
        text
    }
}

fn key(architecture: &str, kernel: &str) -> (String, Vec<u64>, String) {
    let numbers = kernel.split(|c: char| !c.is_ascii_digit()).filter_map(|number| number.parse().ok());
    (architecture.to_owned(), numbers.collect(), kernel.to_owned())
}

const NOT_RUN: &str = "not run";

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
        let table = LANES.render(&rows);
        assert_eq!(LANES.parse(&table), rows);
        let older = "| architecture | kernel | netns |\n|---|---|---|\n| arm64 | 6.1 | 7 passed (a day) |\n";
        assert_eq!(LANES.parse(older)[&key("arm64", "6.1")]["netns"], "7 passed (a day)");
        let kernels: Vec<_> = table.lines().skip(2).filter_map(|line| line.split('|').nth(2)).collect();
        assert_eq!(kernels, [" 6.1.0-56-amd64 ", " 6.12.117-amd64 "]);
    }

    #[test]
    fn a_row_is_replaced_in_its_own_table_alone() {
        let document = "words\n<!-- measured -->\n<!-- end of measured -->\n\n<!-- ways -->\n\
                        | architecture | kernel | tc | drivers | errors | frags | seen |\n|---|---|---|---|---|---|---|\n\
                        | arm64 | 6.1 | filters | have to be tried | named | taken | a day |\n<!-- end of ways -->\nmore\n";
        let ways = BTreeMap::from([("tc", "links".to_owned()), (SEEN, "another day".to_owned())]);
        let written = WAYS.with(document, &key("arm64", "6.1"), ways.clone()).expect("a document");
        let row = "| arm64 | 6.1 | links | have to be tried | named | taken | another day |";
        assert_eq!(
            written,
            document.replace("| arm64 | 6.1 | filters | have to be tried | named | taken | a day |", row)
        );
        assert!(WAYS.with("words", &key("arm64", "6.1"), ways).is_err());
    }
}
