//! An API server for tests: lists, watches and events over HTTP, and every way in which a real one may fail.
//!
//! What it says is compared with streams recorded from a real kube-apiserver (`tests/cases/watch`). It keeps objects as
//! they are given, checks nothing in them, and gives them versions.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::netns::Namespace;
use super::{runtime, wait_for};
use store::{Entry, Store};
pub use store::{Injection, Resource};

mod http;
mod selectors;
mod store;
mod stream;

/// Longest time for connections to end.
const END_TIMEOUT: Duration = Duration::from_secs(5);

/// A running API server; dropping it ends every connection.
pub struct ApiServer {
    address: SocketAddr,
    namespace: Option<Namespace>,
    shared: Arc<Shared>,
    serving: Option<JoinHandle<()>>,
}

/// A request as the server saw it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Asked {
    /// What was asked for; none when it was something else.
    pub resource: Option<Resource>,
    /// Whether it was a watch.
    pub watch: bool,
    /// Parameters of the query.
    pub query: BTreeMap<String, String>,
    /// Who asked.
    pub user_agent: String,
}

/// How requests fail.
#[derive(Clone, Debug)]
pub struct Fault {
    /// Which requests; all when there is none.
    pub resource: Option<Resource>,
    /// Status.
    pub code: u16,
    /// Seconds in a `Retry-After` header.
    pub retry_after: Option<u32>,
}

/// How a version that is forgotten is refused.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Gone {
    /// By an ERROR event in a watch that was opened, as kube-apiserver does.
    #[default]
    Event,
    /// By the status of the answer.
    Status,
}

/// What requests and the test share.
struct Shared {
    state: Mutex<State>,
    /// Says that there is something new to look at.
    tick: watch::Sender<()>,
}

#[derive(Default)]
struct State {
    store: Store,
    asked: Vec<Asked>,
    posted: Vec<Value>,
    faults: Vec<Fault>,
    gone: Gone,
    held: Vec<Resource>,
    delay: Duration,
    /// A watch ends as soon as it is opened.
    hangs_up: bool,
    open: BTreeMap<Resource, usize>,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no holder panics")
    }

    fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let value = change(&mut self.state());
        self.tick.send_replace(());
        value
    }
}

impl ApiServer {
    /// Starts a server without objects on a free port of this machine's loopback device.
    pub fn start() -> Result<Self> {
        Self::start_at(None, (Ipv4Addr::LOCALHOST, 0).into())
    }

    /// Starts a server without objects on the loopback device of a namespace.
    pub fn start_in(namespace: &Namespace, port: u16) -> Result<Self> {
        Self::start_at(Some(namespace.clone()), (Ipv4Addr::LOCALHOST, port).into())
    }

    fn start_at(namespace: Option<Namespace>, address: SocketAddr) -> Result<Self> {
        let shared = Arc::new(Shared { state: Mutex::default(), tick: watch::Sender::new(()) });
        let mut server = Self { address, namespace, shared, serving: None };
        server.back()?;
        Ok(server)
    }

    /// Returns where the server listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Ends every connection and listens no more, as when the machine of the server is off.
    pub fn go(&mut self) -> Result<()> {
        if let Some(serving) = self.serving.take() {
            serving.abort();
        }
        // Every connection shares the state, until the runtime has noticed that it is over.
        wait_for("every connection to end", END_TIMEOUT, || {
            let others = Arc::strong_count(&self.shared) - 1;
            ensure!(others == 0, "{others} are left");
            Ok(())
        })
    }

    /// Listens again where the server listened before, with the objects it has.
    pub fn back(&mut self) -> Result<()> {
        let address = self.address;
        let bind = || -> std::io::Result<TcpListener> {
            let _context = runtime().enter();
            let socket = tokio::net::TcpSocket::new_v4()?;
            socket.set_reuseaddr(true)?;
            socket.bind(address)?;
            socket.listen(128)
        };
        let bound = match &self.namespace {
            Some(namespace) => namespace.run(bind),
            None => bind(),
        };
        let listener = bound.with_context(|| format!("API server on {address}"))?;
        self.address = listener.local_addr()?;
        self.serving = Some(runtime().spawn(http::serve(listener, Arc::clone(&self.shared))));
        Ok(())
    }

    /// Writes a kubeconfig for this server into a directory.
    pub fn kubeconfig(&self, directory: &Path) -> Result<PathBuf> {
        let path = directory.join("kubeconfig");
        let text = format!(
            "apiVersion: v1\nkind: Config\ncurrent-context: lab\nclusters:\n- name: lab\n  cluster:\n    server: \
             http://{}\ncontexts:\n- name: lab\n  context:\n    cluster: lab\n    user: agent\nusers:\n- name: agent\n  \
             user:\n    token: secret\n",
            self.address
        );
        std::fs::write(&path, text)?;
        Ok(path)
    }

    /// Creates an object or replaces it, and returns its version.
    pub fn put(&self, object: Value) -> u64 {
        self.shared.change(|state| state.store.put(object))
    }

    /// Takes in an object as a recording has it: with the version it had.
    pub fn put_as_it_is(&self, object: Value) {
        self.shared.change(|state| state.store.put_as_it_is(object));
    }

    /// Deletes an object; whether there was one.
    pub fn delete(&self, resource: Resource, namespace: &str, name: &str) -> bool {
        self.shared.change(|state| state.store.delete(resource, namespace, name))
    }

    /// Deletes every object.
    pub fn delete_all(&self) {
        self.shared.change(|state| state.store.delete_all());
    }

    /// Passes to a version, as if something else had changed.
    pub fn advance(&self, version: u64) {
        self.shared.change(|state| state.store.advance(version));
    }

    /// Returns the present version.
    pub fn version(&self) -> u64 {
        self.shared.state().store.version()
    }

    /// Returns every object of a kind.
    pub fn objects(&self, resource: Resource) -> Vec<Value> {
        self.shared.state().store.objects(resource).map(|object| (**object).clone()).collect()
    }

    /// Forgets every change so far: no watch can be resumed at an earlier version, and no list be continued.
    pub fn forget(&self, gone: Gone) {
        self.shared.change(|state| {
            state.gone = gone;
            state.store.forget();
        });
    }

    /// Says something in every open watch of a kind, or of all.
    pub fn inject(&self, resource: Option<Resource>, injection: Injection) {
        self.shared.change(|state| state.store.inject(Entry::Injected { resource, injection }));
    }

    /// Holds back what happens to a kind, until it is let go; other kinds go on.
    pub fn hold(&self, resource: Resource, held: bool) {
        self.shared.change(|state| {
            state.held.retain(|other| *other != resource);
            state.held.extend(held.then_some(resource));
        });
    }

    /// Waits before each answer.
    pub fn slow_down(&self, delay: Duration) {
        self.shared.change(|state| state.delay = delay);
    }

    /// Makes requests fail, or with nothing succeed again.
    pub fn fail(&self, faults: Vec<Fault>) {
        self.shared.change(|state| state.faults = faults);
    }

    /// Ends each watch as soon as it is opened.
    pub fn hang_up(&self, hangs_up: bool) {
        self.shared.change(|state| state.hangs_up = hangs_up);
    }

    /// Returns every request so far, in order.
    pub fn asked(&self) -> Vec<Asked> {
        self.shared.state().asked.clone()
    }

    /// Returns how many watches of a kind are open.
    pub fn open_watches(&self, resource: Resource) -> usize {
        self.shared.state().open.get(&resource).copied().unwrap_or_default()
    }

    /// Returns every Event object that was posted.
    pub fn posted(&self) -> Vec<Value> {
        self.shared.state().posted.clone()
    }
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        if let Some(serving) = self.serving.take() {
            serving.abort();
        }
    }
}
