//! A registry in memory: as much of the Distribution Specification 1.1 as a push takes, with the token challenge of the
//! registries that people use.

use axum::Router;
use axum::body::Bytes;
use axum::extract::{Query, State};
use axum::http::{HeaderMap, Method, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{any, get};
use serde_json::Value;
use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard};
use xdp_agent_image::layout::digest;

pub(crate) const USER: &str = "someone";
pub(crate) const PASSWORD: &str = "something";

/// `someone:something`, by RFC 7617.
const BASIC: &str = "Basic c29tZW9uZTpzb21ldGhpbmc=";

/// What has been written.
#[derive(Debug, Default)]
pub(crate) struct Kept {
    /// By digest.
    pub(crate) blobs: BTreeMap<String, Vec<u8>>,
    /// By `NAME:REFERENCE`; under its digest, and under the tag if there was one.
    pub(crate) manifests: BTreeMap<String, Vec<u8>>,
    /// How many blobs have been sent.
    pub(crate) uploads: usize,
}

/// Serves until the test ends.
pub(crate) struct Registry {
    pub(crate) address: String,
    kept: Arc<Mutex<Kept>>,
}

struct Server {
    address: String,
    kept: Arc<Mutex<Kept>>,
}

impl Registry {
    pub(crate) async fn start() -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let kept = Arc::new(Mutex::new(Kept::default()));
        let server = Server { address: address.clone(), kept: Arc::clone(&kept) };
        let router = Router::new()
            .route("/token", get(token))
            .route("/v2/", any(repository))
            .route("/v2/{*path}", any(repository))
            .with_state(Arc::new(server));
        tokio::spawn(async move { axum::serve(listener, router).await });
        Self { address, kept }
    }

    pub(crate) fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap()
    }
}

/// A token is the scope it is for.
async fn token(headers: HeaderMap, Query(query): Query<HashMap<String, String>>) -> Response {
    if headers.get(header::AUTHORIZATION).is_none_or(|value| value != BASIC) {
        return StatusCode::UNAUTHORIZED.into_response();
    }
    let token = query["scope"].replace([':', ',', '/'], "_");
    axum::Json(serde_json::json!({ "token": token })).into_response()
}

async fn repository(
    State(server): State<Arc<Server>>,
    method: Method,
    uri: Uri,
    Query(query): Query<HashMap<String, String>>,
    headers: HeaderMap,
    body: Bytes,
) -> Response {
    let path = uri.path().trim_start_matches("/v2/").to_owned();
    let mut words: Vec<&str> = path.split('/').collect();
    let last = words.pop().unwrap_or_default();
    let mut kind = words.pop().unwrap_or_default();
    if kind == "uploads" {
        words.pop();
    }
    let name = words.join("/");
    if kind.is_empty() {
        kind = "root";
    }
    let operation = if matches!(method, Method::GET | Method::HEAD) { "pull" } else { "pull_push" };
    let wanted = format!("Bearer repository_{}_{operation}", name.replace('/', "_"));
    let given = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok()).unwrap_or_default();
    if !given.starts_with(&wanted) {
        let challenge = format!("Bearer realm=\"http://{}/token\",service=\"test\"", server.address);
        return (StatusCode::UNAUTHORIZED, [(header::WWW_AUTHENTICATE, challenge)]).into_response();
    }
    let mut kept = server.kept.lock().unwrap();
    match (method, kind) {
        (Method::HEAD | Method::GET, "blobs") => found(kept.blobs.get(last), "application/octet-stream"),
        (Method::POST, "uploads") => {
            let location = format!("http://{}/v2/{name}/blobs/uploads/one", server.address);
            (StatusCode::ACCEPTED, [(header::LOCATION, location)]).into_response()
        }
        (Method::PUT, "uploads") => {
            kept.uploads += 1;
            let digest_given = &query["digest"];
            if digest(&body) != *digest_given {
                return (StatusCode::BAD_REQUEST, "DIGEST_INVALID").into_response();
            }
            kept.blobs.insert(digest_given.clone(), body.to_vec());
            created(format!("http://{}/v2/{name}/blobs/{digest_given}", server.address))
        }
        (Method::PUT, "manifests") => match acceptable(&kept, &name, last, &headers, &body) {
            Ok(()) => {
                for reference in [last, &digest(&body)] {
                    kept.manifests.insert(format!("{name}:{reference}"), body.to_vec());
                }
                created(format!("http://{}/v2/{name}/manifests/{}", server.address, digest(&body)))
            }
            Err(code) => (StatusCode::BAD_REQUEST, code).into_response(),
        },
        (Method::HEAD | Method::GET, "manifests") => {
            let manifest = kept.manifests.get(&format!("{name}:{last}"));
            let document: Option<Value> = manifest.and_then(|bytes| serde_json::from_slice(bytes).ok());
            let media_type = document.and_then(|document| document["mediaType"].as_str().map(str::to_owned));
            found(manifest, &media_type.unwrap_or_default())
        }
        (_, _) => StatusCode::NOT_FOUND.into_response(),
    }
}

/// A manifest says what it is, is what it is called, and names only what is here.
fn acceptable(
    kept: &Kept,
    name: &str,
    reference: &str,
    headers: &HeaderMap,
    body: &[u8],
) -> Result<(), &'static str> {
    let document: Value = serde_json::from_slice(body).map_err(|_| "MANIFEST_INVALID")?;
    let media_type = document["mediaType"].as_str().unwrap_or_default();
    if headers.get(header::CONTENT_TYPE).is_none_or(|value| value != media_type) {
        return Err("MANIFEST_INVALID");
    }
    if reference.starts_with("sha256:") && reference != digest(body) {
        return Err("DIGEST_INVALID");
    }
    let named = |field: &str| document[field].as_array().cloned().unwrap_or_default();
    let blobs = named("layers").into_iter().chain(document.get("config").cloned());
    let has_blob = |blob: Value| kept.blobs.contains_key(blob["digest"].as_str().unwrap_or_default());
    let has_manifest = |manifest: Value| {
        kept.manifests.contains_key(&format!("{name}:{}", manifest["digest"].as_str().unwrap_or_default()))
    };
    if blobs.into_iter().all(has_blob) && named("manifests").into_iter().all(has_manifest) {
        Ok(())
    } else {
        Err("MANIFEST_BLOB_UNKNOWN")
    }
}

fn found(bytes: Option<&Vec<u8>>, media_type: &str) -> Response {
    match bytes {
        Some(bytes) => ([(header::CONTENT_TYPE, media_type.to_owned())], bytes.clone()).into_response(),
        None => StatusCode::NOT_FOUND.into_response(),
    }
}

fn created(location: String) -> Response {
    (StatusCode::CREATED, [(header::LOCATION, location)]).into_response()
}
