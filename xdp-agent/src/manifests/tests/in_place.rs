//! A file that is being written stands for what it held before.

use std::time::Duration;

use super::{
    super::in_place::{By, REST, REST_OPEN},
    *,
};

/// A file of two Services that has been read, and the means to read it again.
struct Followed {
    files: Files,
    path: PathBuf,
    written: Written,
    snapshot: Snapshot,
    start: Instant,
}

impl Followed {
    fn new() -> Self {
        let files = Files::new();
        let path = files.write("1.yaml", &two("10.0.0"));
        let snapshot = files.read(None);
        assert_eq!(services(&snapshot), ["shop/a 10.0.0.1", "shop/b 10.0.0.2"]);
        Self { files, path, written: Written::default(), snapshot, start: Instant::now() }
    }

    /// The Services after another read, so long after the start.
    fn services_after(&mut self, time: Duration) -> Vec<String> {
        let paths = [self.files.dir.path().to_owned()];
        self.snapshot = read_again(&paths, &self.snapshot, &self.written, self.start + time);
        services(&self.snapshot)
    }

    fn write(&self, text: &str) {
        fs::write(&self.path, text).unwrap();
    }

    fn close(&self) {
        self.written.note(&self.path, By::Closing);
    }

    fn waits_until(&self) -> Option<Duration> {
        Some(self.snapshot.again_at? - self.start)
    }
}

/// Two Services with addresses that begin so.
fn two(network: &str) -> String {
    format!("{}---\n{}", service("a", &format!("{network}.1")), service("b", &format!("{network}.2")))
}

const OLD: [&str; 2] = ["shop/a 10.0.0.1", "shop/b 10.0.0.2"];
const NEW: [&str; 2] = ["shop/a 10.0.9.1", "shop/b 10.0.9.2"];
const SECOND: Duration = Duration::from_secs(1);

#[test]
fn however_far_a_file_is_written_it_stands_for_what_it_held() {
    let mut file = Followed::new();
    let text = two("10.0.9");
    for len in 0..text.len() {
        file.write(&text[..len]);
        // Each state is new, so that the wait begins anew.
        let time = SECOND * len as u32;
        assert_eq!(file.services_after(time), OLD, "{len}");
        assert_eq!((file.snapshot.problems.len(), file.waits_until()), (0, Some(time + REST_OPEN)), "{len}");
    }
    file.write(&text);
    let time = SECOND * text.len() as u32;
    assert_eq!(file.services_after(time), OLD, "it is not closed yet");
    file.close();
    assert_eq!((file.services_after(time), file.waits_until()), (NEW.map(str::to_owned).to_vec(), None));
}

#[test]
fn a_file_that_changes_while_it_is_read_stands_for_what_it_held() {
    let file = Followed::new();
    let seen = Stamp::of(&file.path);
    let read = |text: &str, is_closed: bool| {
        file.write(text);
        if is_closed {
            file.close();
        }
        let caution = Some(Caution { written: &file.written, now: file.start });
        let mut reader =
            Reader { now: Snapshot::default(), previous: Some(&file.snapshot), caution, kept: Vec::new() };
        // Its state was looked at before it was written.
        reader.file_in(&file.path, seen);
        let snapshot = reader.finish();
        let problems = snapshot.problems.len();
        (services(&snapshot), problems, snapshot.files[&file.path].rested_at())
    };
    let old = OLD.map(str::to_owned).to_vec();
    for text in [String::new(), service("a", "10.0.0.1"), two("10.0.99"), "---\nkind: [\n".to_owned()] {
        assert_eq!(read(&text, false), (old.clone(), 0, Some(file.start + REST_OPEN)), "{text}");
        assert_eq!(read(&text, true), (old.clone(), 0, Some(file.start + REST)), "{text}");
    }
}

#[test]
fn a_file_that_is_closed_with_something_missing_or_wrong_has_to_rest() {
    for (text, rested, problems) in [
        (String::new(), &[][..], 0),
        (service("a", "10.0.9.1"), &["shop/a 10.0.9.1"], 0),
        (two("10.0.9") + "---\nkind: [\n", &NEW, 1),
        ("nonsense\n".to_owned(), &OLD, 1),
    ] {
        let mut file = Followed::new();
        file.write(&text);
        file.close();
        assert_eq!(file.services_after(SECOND), OLD, "{text}");
        assert_eq!((file.snapshot.problems.len(), file.waits_until()), (0, Some(SECOND + REST)), "{text}");
        // Looking again does not make the wait any longer.
        assert_eq!(file.services_after(2 * SECOND), OLD, "{text}");
        assert_eq!(file.waits_until(), Some(SECOND + REST), "{text}");
        assert_eq!(file.services_after(SECOND + REST), rested, "{text}");
        assert_eq!((file.snapshot.problems.len(), file.waits_until()), (problems, None), "{text}");
        assert_eq!(file.services_after(10 * SECOND), rested, "{text}");
        assert_eq!((file.snapshot.problems.len(), file.waits_until()), (problems, None), "{text}");
    }
}

#[test]
fn a_file_that_nobody_is_seen_to_close_is_taken_when_it_rests() {
    let mut file = Followed::new();
    file.write(&two("10.0.9"));
    assert_eq!(file.services_after(SECOND), OLD);
    assert_eq!(file.services_after(SECOND + REST), OLD);
    assert_eq!(file.services_after(SECOND + REST_OPEN), NEW);
}

#[test]
fn a_file_that_is_replaced_or_removed_is_believed_at_once() {
    let mut file = Followed::new();
    let replace = |file: &Followed, text: &str| {
        let next = file.files.write(".next", text);
        fs::rename(next, &file.path).unwrap();
    };
    replace(&file, &two("10.0.9"));
    assert_eq!(file.services_after(SECOND), NEW);
    replace(&file, "");
    assert_eq!((file.services_after(SECOND).len(), file.waits_until()), (0, None));
    let mut file = Followed::new();
    fs::remove_file(&file.path).unwrap();
    assert_eq!((file.services_after(SECOND).len(), file.waits_until()), (0, None));
}

#[test]
fn a_new_file_is_read_at_once_and_others_do_not_wait() {
    let mut file = Followed::new();
    file.write("");
    file.files.write("2.yaml", &service("c", "10.0.0.3"));
    assert_eq!(file.services_after(SECOND), ["shop/a 10.0.0.1", "shop/b 10.0.0.2", "shop/c 10.0.0.3"]);
    // What has moved to the other file is served from there.
    fs::write(file.files.at("2.yaml"), two("10.0.9")).unwrap();
    file.written.note(&file.files.at("2.yaml"), By::Closing);
    assert_eq!(file.services_after(2 * SECOND).len(), 3, "something is missing there");
    assert_eq!(file.services_after(2 * SECOND + REST), NEW);
    // The first file has not been seen closed, and has rested by now.
    assert_eq!(file.services_after(SECOND + REST_OPEN), NEW);
}
