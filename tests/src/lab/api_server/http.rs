//! Requests and answers.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::io;
use std::sync::Arc;

use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Bytes, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::task::JoinSet;

use super::selectors::Selector;
use super::store::{Key, Resource};
use super::stream::{Refused, Watch, status};
use super::{Asked, Shared};

type Answer = Response<UnsyncBoxBody<Bytes, io::Error>>;

/// Takes connections until it is aborted, which ends them all.
pub(super) async fn serve(listener: TcpListener, shared: Arc<Shared>) {
    let mut connections = JoinSet::new();
    loop {
        // An error concerns the connection that was not made.
        let Ok((stream, _)) = listener.accept().await else { continue };
        // As kube-apiserver has it: else an event waits until the client acknowledges the one before, up to 40 ms.
        if stream.set_nodelay(true).is_err() {
            continue; // it is gone already
        }
        let shared = Arc::clone(&shared);
        let service = service_fn(move |request| {
            let shared = Arc::clone(&shared);
            async move { Ok::<_, Infallible>(answer(&shared, request).await) }
        });
        connections.spawn(http1::Builder::new().serve_connection(TokioIo::new(stream), service));
        while connections.try_join_next().is_some() {}
    }
}

async fn answer(shared: &Arc<Shared>, request: Request<Incoming>) -> Answer {
    let query = parameters(request.uri().query().unwrap_or_default());
    let resource = Resource::of_path(request.uri().path());
    let is_watch = query.get("watch").is_some_and(|value| value == "true");
    let user_agent = request.headers().get("user-agent").and_then(|value| value.to_str().ok());
    let asked = Asked {
        resource,
        watch: is_watch,
        query: query.clone(),
        user_agent: user_agent.unwrap_or_default().into(),
    };
    let (fault, delay) = {
        let mut state = shared.state();
        state.asked.push(asked);
        let concerns = |of: Option<Resource>| of.is_none() || of == resource;
        (state.faults.iter().find(|fault| concerns(fault.resource)).cloned(), state.delay)
    };
    if !delay.is_zero() {
        tokio::time::sleep(delay).await;
    }
    if let Some(fault) = fault {
        return refuse(fault.code, "refused by the test", fault.retry_after);
    }
    let Some(resource) = resource else { return post(shared, request).await };
    let text = |name: &str| query.get(name).map(String::as_str);
    let selector = match Selector::parse(text("fieldSelector"), text("labelSelector")) {
        Ok(selector) => selector,
        Err(error) => return refuse(400, &error.to_string(), None),
    };
    if !is_watch {
        return list(shared, resource, &selector, &query);
    }
    match Watch::open(shared, resource, selector, &query) {
        Ok(watch) => Response::new(StreamBody::new(watch.body()).boxed_unsync()),
        Err(Refused { code, message }) => refuse(code, &message, None),
    }
}

/// Takes an event; nothing else can be created.
async fn post(shared: &Shared, request: Request<Incoming>) -> Answer {
    let path = request.uri().path();
    let is_event = path.starts_with("/apis/events.k8s.io/v1/namespaces/") && path.ends_with("/events");
    if request.method() != Method::POST || !is_event {
        return refuse(404, "the server could not find the requested resource", None);
    }
    let body = request.into_body().collect().await.map(|body| body.to_bytes()).unwrap_or_default();
    match serde_json::from_slice::<Value>(&body) {
        Ok(event) => {
            let answer = respond(201, &event, None);
            shared.state().posted.push(event);
            answer
        }
        Err(error) => refuse(400, &error.to_string(), None),
    }
}

/// A page of the objects after a key, with a token for the rest.
fn list(
    shared: &Shared,
    resource: Resource,
    selector: &Selector,
    query: &BTreeMap<String, String>,
) -> Answer {
    let state = shared.state();
    let limit = query.get("limit").and_then(|limit| limit.parse().ok()).filter(|limit| *limit > 0);
    let (version, after) = match query.get("continue").map(|token| token_of(token)) {
        None => (state.store.version(), None),
        Some(None) => return refuse(400, "continue key is not valid", None),
        Some(Some((version, _))) if !state.store.remembers(version) => {
            return refuse(410, "The provided continue parameter is too old", None);
        }
        Some(Some((version, key))) => (version, Some(key)),
    };
    let wanted = state.store.after(resource, after);
    let mut wanted = wanted.filter(|(_, object)| selector.takes(object)).peekable();
    let (mut items, mut last) = (Vec::new(), None);
    while items.len() < limit.unwrap_or(usize::MAX) {
        let Some((key, object)) = wanted.next() else { break };
        let mut item = (**object).clone();
        // The list says it for all of them.
        item.as_object_mut().map(|fields| (fields.remove("kind"), fields.remove("apiVersion")));
        items.push(item);
        last = Some(key);
    }
    let mut metadata = json!({ "resourceVersion": version.to_string() });
    if let (Some((namespace, name)), Some(_)) = (last, wanted.peek()) {
        metadata["continue"] = format!("{version}/{namespace}/{name}").into();
        // With a selector kube-apiserver does not count, because it would have to look at every object.
        if *selector == Selector::default() {
            metadata["remainingItemCount"] = wanted.count().into();
        }
    }
    let kind = format!("{}List", resource.kind());
    let list = json!({
        "kind": kind, "apiVersion": resource.api_version(), "metadata": metadata, "items": items
    });
    respond(200, &list, None)
}

fn token_of(token: &str) -> Option<(u64, Key)> {
    let (version, key) = token.split_once('/')?;
    let (namespace, name) = key.split_once('/')?;
    Some((version.parse().ok()?, (namespace.to_string(), name.to_string())))
}

fn refuse(code: u16, message: &str, retry_after: Option<u32>) -> Answer {
    respond(code, &status(code, message), retry_after)
}

fn respond(code: u16, body: &Value, retry_after: Option<u32>) -> Answer {
    let mut response = Response::builder().status(code).header("content-type", "application/json");
    if let Some(seconds) = retry_after {
        response = response.header("retry-after", seconds);
    }
    let body = Full::new(Bytes::from(body.to_string())).map_err(|never| match never {});
    response.body(body.boxed_unsync()).expect("status and headers are valid")
}

/// The parameters of a query, with what is written as `+` and `%XX` put back.
fn parameters(query: &str) -> BTreeMap<String, String> {
    let pairs = query.split('&').filter(|pair| !pair.is_empty());
    pairs
        .map(|pair| {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            (decoded(name), decoded(value))
        })
        .collect()
}

fn decoded(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        match byte {
            b'+' => bytes.push(b' '),
            b'%' => {
                let mut digit = || char::from(rest.next().unwrap_or(b'0')).to_digit(16).unwrap_or(0) as u8;
                let high = digit();
                bytes.push(high << 4 | digit());
            }
            byte => bytes.push(byte),
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queries_are_read_as_they_were_meant() {
        let query =
            parameters("fieldSelector=spec.clusterIP%21%3DNone&continue=7%2Fdefault%2Fa+b&watch=true&x");
        assert_eq!(query["fieldSelector"], "spec.clusterIP!=None");
        assert_eq!(token_of(&query["continue"]), Some((7, ("default".into(), "a b".into()))));
        assert_eq!((query["watch"].as_str(), query["x"].as_str()), ("true", ""));
    }
}
