//! Manifests as a source: what they hold, and then how it changes.

use std::path::PathBuf;

use anyhow::{Context, bail};
use tokio::{
    sync::mpsc::{self, Sender},
    task::JoinSet,
};
use tracing::error;

use super::{BATCH_MAX, Event};
use crate::manifests::{self, Problem, ProblemKind, Snapshot, watcher::Watcher};

/// Files that are followed; dropping it ends that.
#[derive(Debug)]
pub struct Files {
    _watcher: Watcher,
    _task: JoinSet<()>,
}

/// Reads manifests, and reads them again when they change. What has been read is on its way when this returns.
///
/// # Errors
/// When one of the paths itself cannot be read.
pub async fn files(paths: Vec<PathBuf>, events: Sender<Event>) -> anyhow::Result<Files> {
    let snapshot = read(paths.clone(), None).await.context("reading the objects ended early")?;
    if let Some(problem) = unreadable_source(&snapshot, &paths) {
        bail!("{problem}; check --services");
    }
    let (watcher, changes) = Watcher::start(paths.clone());
    let mut task = JoinSet::new();
    task.spawn(follow(paths, snapshot, changes, events));
    Ok(Files { _watcher: watcher, _task: task })
}

/// Why a path of `--services` itself cannot be read: that is a slip of the pen, and taking it for "no services" would
/// empty adopted maps. One bad file among those of a directory is a problem like any other, and the rest is served.
fn unreadable_source<'a>(snapshot: &'a Snapshot, paths: &[PathBuf]) -> Option<&'a Problem> {
    snapshot.problems.iter().find(|problem| {
        let is_source = problem.place.as_ref().is_some_and(|place| paths.contains(&place.file));
        problem.kind == ProblemKind::Unreadable && is_source
    })
}

async fn read(paths: Vec<PathBuf>, previous: Option<Snapshot>) -> Result<Snapshot, tokio::task::JoinError> {
    tokio::task::spawn_blocking(move || manifests::read(&paths, previous.as_ref())).await
}

/// Tells what there is, then what changes, until nobody listens or nothing watches the files.
async fn follow(
    paths: Vec<PathBuf>,
    mut snapshot: Snapshot,
    mut changes: mpsc::Receiver<()>,
    events: Sender<Event>,
) {
    let told = tell(&Snapshot::default(), &snapshot, &events).await;
    if told.is_err() || events.send(Event::Synced).await.is_err() {
        return;
    }
    while changes.recv().await.is_some() {
        match read(paths.clone(), Some(snapshot.clone())).await {
            Ok(new) => {
                if tell(&snapshot, &new, &events).await.is_err() {
                    return;
                }
                snapshot = new;
            }
            Err(error) => error!(%error, "reading the objects ended early; what is served stays as it is"),
        }
    }
}

async fn tell(
    before: &Snapshot,
    now: &Snapshot,
    events: &Sender<Event>,
) -> Result<(), mpsc::error::SendError<Event>> {
    let mut changes = now.objects.changes_from(&before.objects).into_iter().peekable();
    while changes.peek().is_some() {
        events.send(Event::Changes(changes.by_ref().take(BATCH_MAX).collect())).await?;
    }
    if now.problems != before.problems {
        events.send(Event::Problems(now.problems.clone())).await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::{fs, time::Duration};

    use super::*;
    use crate::objects::Objects;

    fn service(name: &str, ip: &str) -> String {
        format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: shop}}\nspec: {{clusterIP: {ip}}}\n"
        )
    }

    async fn next(events: &mut mpsc::Receiver<Event>) -> Event {
        let limit = Duration::from_secs(20);
        tokio::time::timeout(limit, events.recv()).await.expect("in time").expect("an event")
    }

    #[tokio::test]
    async fn files_are_told_in_batches_then_said_to_be_complete_and_then_followed() {
        let directory = tempfile::tempdir().unwrap();
        let many: String =
            (0..=BATCH_MAX).map(|n| format!("---\n{}", service(&format!("s{n}"), "10.0.0.1"))).collect();
        fs::write(directory.path().join("many.yaml"), many).unwrap();
        // At once, as a file that is being written could be read before its end.
        let replace = |text: String| {
            fs::write(directory.path().join(".new"), text).unwrap();
            fs::rename(directory.path().join(".new"), directory.path().join("many.yaml")).unwrap();
        };
        let (sender, mut events) = mpsc::channel(1);
        let files = files(vec![directory.path().to_owned()], sender).await.unwrap();
        let mut objects = Objects::default();
        for expected in [BATCH_MAX, 1] {
            let Event::Changes(changes) = next(&mut events).await else { panic!("changes come first") };
            assert_eq!(changes.len(), expected);
            changes.into_iter().for_each(|change| objects.apply(change));
        }
        assert_eq!(next(&mut events).await, Event::Synced);
        replace(service("s0", "10.0.0.2") + "---\nkind: [");
        // What is broken may have been any of the others, so all of them stay.
        let Event::Changes(changes) = next(&mut events).await else { panic!("a change") };
        assert_eq!(changes.len(), 1);
        let Event::Problems(problems) = next(&mut events).await else { panic!("a problem") };
        assert_eq!(problems.len(), 1);
        replace(service("s0", "10.0.0.2"));
        let Event::Changes(changes) = next(&mut events).await else { panic!("the rest is gone") };
        assert_eq!(changes.len(), BATCH_MAX);
        assert_eq!(next(&mut events).await, Event::Problems(Vec::new()));
        drop(files);
        assert_eq!(events.recv().await, None);
    }

    #[tokio::test]
    async fn a_bad_file_in_a_directory_does_not_stop_the_start_and_a_bad_source_does() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        fs::write(at("1.yaml"), service("a", "10.0.0.1")).unwrap();
        fs::write(at("2.yaml"), [0xff, 0xfe]).unwrap();
        std::os::unix::fs::symlink("nowhere", at("3.yaml")).unwrap();
        fs::File::create(at("4.yaml")).unwrap().set_len(manifests::FILE_BYTES_MAX + 1).unwrap();
        let (sender, mut events) = mpsc::channel(8);
        let _files = files(vec![directory.path().to_owned()], sender.clone()).await.unwrap();
        let Event::Changes(changes) = next(&mut events).await else { panic!("the good file") };
        let Event::Problems(problems) = next(&mut events).await else { panic!("the bad ones") };
        assert_eq!((changes.len(), problems.len()), (1, 3));
        for source in [at("2.yaml"), at("3.yaml"), at("4.yaml"), at("missing")] {
            let error =
                files(vec![directory.path().to_owned(), source.clone()], sender.clone()).await.unwrap_err();
            let error = error.to_string();
            assert!(
                error.contains(&source.display().to_string()) && error.ends_with("check --services"),
                "{error}"
            );
        }
    }
}
