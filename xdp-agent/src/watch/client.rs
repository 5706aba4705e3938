//! The connection to the API server: how it is found and made, and what comes over it as bytes.

use std::{error::Error, ops::Range, path::PathBuf, time::Duration};

use anyhow::{Context, bail};
use axum::http;
use http_body_util::{BodyExt, Limited};
use hyper_util::{
    client::legacy::{Client as HttpClient, connect::HttpConnector},
    rt::TokioExecutor,
};
use kube::{
    Client, Config,
    api::{ListParams, WatchParams},
    client::{Body, ConfigExt},
    config::{KubeConfigOptions, Kubeconfig},
    core::{Request, Status},
};
use tower::{BoxError, ServiceBuilder};

use super::pace::Pace;
use crate::source::Kind;

/// Objects of a page, as in client-go.
const PAGE: u32 = 500;
/// Largest page in bytes; 500 EndpointSlices of 1,000 endpoints each stay below it.
const PAGE_BYTES_MAX: usize = 512 << 20;
/// Longest line of a watch in bytes; etcd holds no object of more than 1.5 MiB.
const LINE_BYTES_MAX: usize = 32 << 20;
/// Longest error text that is read, in bytes.
const ERROR_BYTES_MAX: usize = 64 << 10;
/// Longest error text that is shown, in characters.
const MESSAGE_CHARS_MAX: usize = 300;
/// Longest time to connect.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Silence on a connection before the kernel asks whether the other end is there, and between questions.
const KEEPALIVE: Duration = Duration::from_secs(15);
/// Questions without an answer after which the connection is dead.
const KEEPALIVE_RETRIES: u32 = 2;

/// Where the API server is, and who asks.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Access {
    /// Kubeconfig file; without one, and without a server, what Kubernetes gives to every pod.
    pub kubeconfig: Option<PathBuf>,
    /// URL of the API server in place of the kubeconfig's.
    pub master: Option<String>,
}

/// A client, and how to make it anew.
#[derive(Debug)]
pub(super) struct Connection {
    access: Access,
    client: MadeClient,
}

/// The client itself has nothing to show.
struct MadeClient(Client);

impl std::fmt::Debug for MadeClient {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Client")
    }
}

/// Which objects of a kind are wanted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Selection {
    pub(super) kind: Kind,
    pub(super) fields: Option<String>,
    pub(super) labels: Option<&'static str>,
}

/// Why a list or a watch did not go on.
#[derive(Debug, thiserror::Error)]
pub(super) enum Failure {
    /// 410 Gone: what came after the version is forgotten.
    #[error("the API server has forgotten where the watch was")]
    Expired,
    /// Any other refusal.
    #[error("the API server says {code}: {message}{}", hint(*.code))]
    Refused { code: u16, message: String, retry_after: Option<Duration> },
    /// No answer, or one that broke off.
    #[error("cannot reach the API server: {0}")]
    Unreachable(String),
    /// An answer that is not what the API server should say.
    #[error("the answer of the API server cannot be read: {0}")]
    Unreadable(String),
}

fn hint(code: u16) -> &'static str {
    match code {
        401 => "; check the token or certificate of the kubeconfig",
        403 => "; bind the agent's user to the cluster role system:node-proxier",
        _ => "",
    }
}

impl Selection {
    /// The objects that kube-proxy asks for, and of nodes all that matter.
    pub(super) fn new(kind: Kind, only_node: Option<&String>) -> Self {
        let (fields, labels) = match kind {
            Kind::Service => {
                (Some("spec.clusterIP!=None".to_owned()), Some("!service.kubernetes.io/service-proxy-name"))
            }
            Kind::EndpointSlice => (None, Some("!service.kubernetes.io/headless")),
            Kind::Node => (only_node.map(|node| format!("metadata.name={node}")), None),
            Kind::ServiceCidr => (None, None),
        };
        Self { kind, fields, labels }
    }

    fn request(&self) -> Request {
        let plural = match self.kind {
            Kind::Service => "services",
            Kind::EndpointSlice => "endpointslices",
            Kind::Node => "nodes",
            Kind::ServiceCidr => "servicecidrs",
        };
        let version = self.kind.api_version();
        let root = if version.contains('/') { "apis" } else { "api" };
        Request::new(format!("/{root}/{version}/{plural}"))
    }

    fn labels(&self) -> Option<String> {
        self.labels.map(str::to_owned)
    }
}

impl Connection {
    /// Makes a client; nothing is sent yet.
    pub(super) async fn open(access: Access) -> anyhow::Result<Self> {
        let client = MadeClient(access.client().await?);
        Ok(Self { access, client })
    }

    /// Makes the client anew after a failure: the kubeconfig, its certificates or its token may have been replaced, and
    /// idle connections may be dead.
    pub(super) async fn renew(&mut self) -> anyhow::Result<()> {
        self.client = MadeClient(self.access.client().await?);
        Ok(())
    }

    /// Fetches a page of a list.
    pub(super) async fn page(
        &self,
        selection: &Selection,
        continue_token: Option<String>,
        pace: &Pace,
    ) -> Result<Vec<u8>, Failure> {
        let params = ListParams {
            label_selector: selection.labels(),
            field_selector: selection.fields.clone(),
            limit: Some(PAGE),
            continue_token,
            ..ListParams::default()
        };
        let fetch = async {
            let body = self.send(selection.request().list(&params)).await?;
            let collected = Limited::new(body, PAGE_BYTES_MAX).collect().await;
            let bytes = collected.map_err(|error| Failure::Unreachable(chain(error.as_ref())))?;
            Ok(bytes.to_bytes().into())
        };
        in_time(pace.list, fetch).await
    }

    /// Opens a watch from a version on.
    pub(super) async fn watch(
        &self,
        selection: &Selection,
        version: &str,
        pace: &Pace,
    ) -> Result<Lines, Failure> {
        let params = WatchParams {
            label_selector: selection.labels(),
            field_selector: selection.fields.clone(),
            timeout: Some(pace.watch_seconds()),
            bookmarks: true,
            send_initial_events: false,
        };
        let body = in_time(pace.list, self.send(selection.request().watch(&params, version))).await?;
        Ok(Lines { body, buffer: Vec::new(), consumed: 0, scanned: 0, idle: pace.idle })
    }

    /// Creates an object.
    pub(super) async fn create(&self, path: String, object: Vec<u8>, limit: Duration) -> Result<(), Failure> {
        let request = Request::new(path).create(&kube::api::PostParams::default(), object);
        in_time(limit, self.send(request)).await.map(drop)
    }

    async fn send<E: Error + 'static>(
        &self,
        request: Result<http::Request<Vec<u8>>, E>,
    ) -> Result<Body, Failure> {
        let request = request.map_err(|error| Failure::Unreachable(chain(&error)))?;
        let sent = self.client.0.send(request.map(Body::from)).await;
        let response = sent.map_err(|error| Failure::Unreachable(chain(&error)))?;
        let code = response.status().as_u16();
        if code < 300 {
            return Ok(response.into_body());
        }
        let header = response.headers().get("retry-after").and_then(|value| value.to_str().ok());
        let retry_after = header.and_then(|seconds| seconds.trim().parse().ok()).map(Duration::from_secs);
        let text = Limited::new(response.into_body(), ERROR_BYTES_MAX).collect().await;
        let text = text.map(|text| text.to_bytes()).unwrap_or_default();
        let message = match serde_json::from_slice::<Status>(&text) {
            Ok(status) => status.message,
            Err(_) => String::from_utf8_lossy(&text).trim().to_owned(),
        };
        Err(refusal(code, &message, retry_after))
    }
}

/// What a status other than success means, whether it came instead of a watch or in it.
pub(super) fn refusal(code: u16, message: &str, retry_after: Option<Duration>) -> Failure {
    match code {
        410 => Failure::Expired,
        code => {
            let message = message.chars().take(MESSAGE_CHARS_MAX).collect();
            Failure::Refused { code, message, retry_after }
        }
    }
}

async fn in_time<T>(limit: Duration, future: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
    let late = |_| Failure::Unreachable(format!("no answer within {limit:?}"));
    tokio::time::timeout(limit, future).await.map_err(late)?
}

/// An error with its causes, each once; the outermost alone says little more than "client error".
fn chain(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        let message = inner.to_string();
        if !text.contains(&message) {
            text = format!("{text}: {message}");
        }
        cause = inner.source();
    }
    text
}

impl Access {
    async fn config(&self) -> anyhow::Result<Config> {
        let mut config = match (&self.kubeconfig, &self.master) {
            (Some(path), _) => {
                let context = || format!("cannot use the kubeconfig {}; check --kubeconfig", path.display());
                let file = Kubeconfig::read_from(path).with_context(context)?;
                let options = KubeConfigOptions::default();
                Config::from_custom_kubeconfig(file, &options).await.with_context(context)?
            }
            (None, Some(_)) => Config::new(Default::default()),
            (None, None) => Config::incluster().context(
                "no kubeconfig, and this is no pod of a cluster; give --kubeconfig, or --services for files",
            )?,
        };
        if let Some(master) = &self.master {
            let url = master.parse().with_context(|| format!("--master {master} is no URL"))?;
            config.cluster_url = url;
        }
        if config.cluster_url.scheme().is_none() || config.cluster_url.authority().is_none() {
            bail!("{} is no URL of an API server; write it as https://HOST:PORT", config.cluster_url);
        }
        if let Some(proxy) = &config.proxy_url {
            bail!("the kubeconfig asks for the proxy {proxy}, which is not supported; remove proxy-url");
        }
        let agent = concat!("xdp-agent/", env!("CARGO_PKG_VERSION"));
        config.headers.push(("user-agent".parse()?, agent.parse()?));
        Ok(config)
    }

    /// As kube makes it, but without retries of its own, without a log line for every refusal, and with the kernel
    /// watching over silent connections.
    async fn client(&self) -> anyhow::Result<Client> {
        let config = self.config().await?;
        let mut http = HttpConnector::new();
        http.enforce_http(false);
        http.set_nodelay(true);
        http.set_connect_timeout(Some(CONNECT_TIMEOUT));
        http.set_keepalive(Some(KEEPALIVE));
        http.set_keepalive_interval(Some(KEEPALIVE));
        http.set_keepalive_retries(Some(KEEPALIVE_RETRIES));
        http.set_tcp_user_timeout(Some(KEEPALIVE * (KEEPALIVE_RETRIES + 1)));
        let https = config
            .rustls_https_connector_with_connector(http)
            .context("cannot use the certificates for the API server")?;
        let service = ServiceBuilder::new()
            .layer(config.base_uri_layer())
            .option_layer(config.auth_layer().context("cannot use the credentials for the API server")?)
            .layer(config.extra_headers_layer()?)
            .map_err(BoxError::from)
            .service(HttpClient::builder(TokioExecutor::new()).build(https));
        Ok(Client::new(service, config.default_namespace))
    }
}

/// The lines of a watch.
#[derive(Debug)]
pub(super) struct Lines {
    body: Body,
    buffer: Vec<u8>,
    /// Bytes of the buffer that were handed out.
    consumed: usize,
    /// Bytes of the buffer in which there is no further end of a line.
    scanned: usize,
    idle: Duration,
}

impl Lines {
    /// The next line, or none when the watch has ended or says nothing any more. A line that is cut off is left out:
    /// what it said comes again after the version before it.
    pub(super) async fn next(&mut self) -> Result<Option<&[u8]>, Failure> {
        loop {
            if let Some(line) = self.buffered() {
                return Ok(Some(&self.buffer[line]));
            }
            self.buffer.drain(..self.consumed);
            (self.consumed, self.scanned) = (0, self.buffer.len());
            if self.buffer.len() > LINE_BYTES_MAX {
                return Err(Failure::Unreadable(format!("a line is longer than {LINE_BYTES_MAX} bytes")));
            }
            let Ok(frame) = tokio::time::timeout(self.idle, self.body.frame()).await else {
                return Ok(None);
            };
            match frame {
                Some(Ok(frame)) => self.buffer.extend(frame.data_ref().into_iter().flatten()),
                Some(Err(error)) => return Err(Failure::Unreachable(chain(&error))),
                None => return Ok(None),
            }
        }
    }

    fn buffered(&mut self) -> Option<Range<usize>> {
        let length = self.buffer[self.scanned..].iter().position(|&byte| byte == b'\n')?;
        let line = self.consumed..self.scanned + length;
        self.consumed = line.end + 1;
        self.scanned = self.consumed;
        Some(line)
    }
}
