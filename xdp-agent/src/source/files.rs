//! Manifests as a source: what they hold, and then how it changes.

use std::{path::PathBuf, time::Instant};

use anyhow::{Context, bail};
use tokio::{
    sync::mpsc::{self, Sender},
    task::JoinSet,
    time::sleep_until,
};
use tracing::error;

use super::{BATCH_MAX, Event};
use crate::manifests::{self, Problem, ProblemKind, Snapshot, in_place::Written, watcher::Watcher};

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
    let first = paths.clone();
    let snapshot = tokio::task::spawn_blocking(move || manifests::read(&first, None)).await;
    let snapshot = snapshot.context("reading the objects ended early")?;
    if let Some(problem) = unreadable_source(&snapshot, &paths) {
        bail!("{problem}; check --services");
    }
    let written = Written::default();
    let (watcher, changes) = Watcher::start(paths.clone(), written.clone());
    let mut task = JoinSet::new();
    task.spawn(follow(paths, snapshot, written, changes, events));
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

/// Waits for a time, or for ever without one.
async fn at(time: Option<Instant>) {
    match time {
        Some(time) => sleep_until(time.into()).await,
        None => std::future::pending().await,
    }
}

/// Tells what there is, then what changes, until nobody listens or nothing watches the files.
async fn follow(
    paths: Vec<PathBuf>,
    mut snapshot: Snapshot,
    written: Written,
    mut changes: mpsc::Receiver<()>,
    events: Sender<Event>,
) {
    let told = tell(&Snapshot::default(), &snapshot, &events).await;
    if told.is_err() || events.send(Event::Synced).await.is_err() {
        return;
    }
    loop {
        tokio::select! {
            changed = changes.recv() => if changed.is_none() { return },
            () = at(snapshot.again_at) => {}
        }
        let (paths, previous, written) = (paths.clone(), snapshot.clone(), written.clone());
        let read = move || manifests::read_again(&paths, &previous, &written, Instant::now());
        match tokio::task::spawn_blocking(read).await {
            Ok(new) => {
                if tell(&snapshot, &new, &events).await.is_err() {
                    return;
                }
                snapshot = new;
            }
            Err(error) => {
                snapshot.again_at = None;
                error!(%error, "reading the objects ended early; what is served stays as it is");
            }
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
    use std::{fs, io::Write, time::Duration};

    use super::*;
    use crate::objects::Objects;

    fn service(name: &str, ip: &str) -> String {
        format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: shop}}\nspec: {{clusterIP: {ip}}}\n"
        )
    }

    async fn next(events: &mut mpsc::Receiver<Event>) -> Event {
        // What is told is asserted, and not when: an emulated processor that others use takes half a minute for what others
        // read at once.
        let limit = Duration::from_secs(120);
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
    async fn a_file_that_takes_the_place_of_another_is_taken_at_once_though_it_has_its_inode() {
        let directory = tempfile::tempdir().unwrap();
        let elsewhere = tempfile::tempdir().unwrap();
        let (file, staged) = (directory.path().join("web.yaml"), elsewhere.path().join("web.yaml"));
        fs::write(&file, service("a", "10.0.0.1")).unwrap();
        let (sender, mut events) = mpsc::channel(8);
        let _files = files(vec![file.clone()], sender).await.unwrap();
        let mut objects = Objects::default();
        // The first is replaced by another inode, and shows that changes are seen; the second is changed under its inode.
        for ip in ["10.0.0.2", "10.0.0.3"] {
            if ip == "10.0.0.3" {
                fs::rename(&file, &staged).unwrap();
            }
            fs::write(&staged, service("a", ip)).unwrap();
            fs::rename(&staged, &file).unwrap();
            let changed = async {
                let has = |objects: &Objects| {
                    let mut ips = objects.services.values().flat_map(|service| &service.cluster_ips);
                    ips.any(|found| found.to_string() == ip)
                };
                while !has(&objects) {
                    let Event::Changes(changes) = next(&mut events).await else { continue };
                    changes.into_iter().for_each(|change| objects.apply(change));
                }
            };
            let limit = manifests::in_place::REST_OPEN - Duration::from_secs(2);
            tokio::time::timeout(limit, changed).await.expect("it does not have to rest");
        }
    }

    #[tokio::test]
    async fn a_file_that_is_written_slowly_withdraws_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("web.yaml");
        let names = ["a", "b", "c"];
        let text = move |network: &str| -> String {
            let one = |name: &&str| format!("---\n{}", service(name, &format!("{network}.{}", name.len())));
            names.iter().map(one).collect()
        };
        fs::write(&file, text("10.0.0")).unwrap();
        let (sender, mut events) = mpsc::channel(8);
        let _files = files(vec![file.clone()], sender).await.unwrap();
        let writer = tokio::spawn(async move {
            // Truncates, and then gives everybody time to look at each part.
            let mut file = fs::File::create(&file).unwrap();
            for part in text("10.0.9").as_bytes().chunks(24) {
                tokio::time::sleep(Duration::from_millis(60)).await;
                file.write_all(part).unwrap();
            }
        });
        let mut objects = Objects::default();
        let has = |objects: &Objects, network: &str| {
            let mut ips = objects.services.values().flat_map(|service| &service.cluster_ips);
            objects.services.len() == names.len() && ips.all(|ip| ip.to_string().starts_with(network))
        };
        while !has(&objects, "10.0.9.") {
            match next(&mut events).await {
                Event::Changes(changes) => changes.into_iter().for_each(|change| objects.apply(change)),
                Event::Synced => assert!(has(&objects, "10.0.0.")),
                Event::Problems(problems) => panic!("{problems:?}"),
            }
            assert!(has(&objects, "10.0.0.") || has(&objects, "10.0.9."), "{objects:?}");
        }
        writer.await.unwrap();
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
