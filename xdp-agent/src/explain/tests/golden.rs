//! Golden cases: the objects of a behaviour, and what the maps hold for it.
//!
//! `tests/cases/*.yaml` begin with a sentence about the behaviour and the flags of `explain` they go with; the dump
//! beside each is what `xdp-agent explain --maps --services FILE FLAGS` prints. `XDP_AGENT_BLESS=1` writes it anew.

use std::{env, fs, path::PathBuf, slice};

use clap::Parser;

use super::{super::dump::ENDING, *};

/// What stands before a case's flags.
const FLAGS: &str = "# explain ";

#[test]
fn the_maps_hold_what_the_cases_say_in_whatever_order_their_objects_come() {
    let directory = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/cases");
    let files = fs::read_dir(directory).expect("the cases").map(|entry| entry.expect("a file").path());
    let mut cases: Vec<PathBuf> =
        files.filter(|path| path.extension().is_some_and(|ext| ext == "yaml")).collect();
    cases.sort_unstable();
    assert_eq!(cases.len(), 26);
    for case in cases {
        let name = case.display();
        let objects = manifests::read(slice::from_ref(&case), None);
        assert_eq!(objects.problems, [], "{name}");
        let changes = changes(&objects.objects);
        let found = at_once(&case, &changes).dump();
        let golden = case.with_extension("maps");
        if env::var_os("XDP_AGENT_BLESS").is_some() {
            fs::write(&golden, &found).expect("written");
        }
        let expected = fs::read_to_string(&golden).expect("a dump; XDP_AGENT_BLESS=1 writes it");
        assert_eq!(found, expected, "{name}: if this is meant, XDP_AGENT_BLESS=1 writes it anew");
        let backwards: Vec<Change> = changes.iter().rev().cloned().collect();
        for order in [&changes, &backwards] {
            for going in [&changes, &backwards] {
                one_by_one(&case, order, going, &expected);
            }
        }
    }
}

/// Lets objects come and go one at a time.
fn one_by_one(case: &PathBuf, coming: &[Change], going: &[Change], expected: &str) {
    let mut world = at_once(case, &[]);
    let empty = world.dump();
    for change in coming {
        world.apply([change.clone()]);
    }
    assert_eq!(settled(&world.dump()), expected, "{}: coming one by one", case.display());
    for change in going {
        world.apply([removal(change)]);
    }
    world.collect();
    assert_eq!(world.dump(), empty, "{}: all gone", case.display());
}

/// A dump without the backends that were in a list before all objects were there.
fn settled(dump: &str) -> String {
    let mut is_ending = false;
    let mut text = String::new();
    for line in dump.lines() {
        if !line.starts_with(' ') {
            is_ending = line.ends_with(ENDING);
        }
        if !is_ending {
            text.extend([line, "\n"]);
        }
    }
    text
}

fn at_once(case: &PathBuf, changes: &[Change]) -> World {
    let text = fs::read_to_string(case).expect("a case");
    let flags = text.lines().find_map(|line| line.strip_prefix(FLAGS)).expect("a line of flags");
    let services =
        ["--maps", "--services"].map(Into::into).into_iter().chain([case.clone().into_os_string()]);
    let program = ["explain".into()].into_iter();
    let words = program.chain(services).chain(flags.split_whitespace().map(Into::into));
    let args =
        ExplainArgs::try_parse_from(words).unwrap_or_else(|error| panic!("{}: {error}", case.display()));
    let mut world = World::new(args.cluster.options().expect("flags"));
    world.apply(changes.iter().cloned());
    world
}
