//! EndpointSlices (Kubernetes: pkg/proxy/endpointslicecache.go).

use std::collections::{HashMap, HashSet};

use k8s_openapi::{
    api::discovery::v1::{self, EndpointSlice},
    jiff::Timestamp,
};

use super::{
    Flaw, Flaws, quoted,
    service::{port_number, unknown_protocol},
};
use crate::cluster::{
    address::{parse_ip_sloppy, special},
    wanted::{Ip6, IpAddress, Protocol},
};

const LABEL_SERVICE_NAME: &str = "kubernetes.io/service-name";
const LABEL_HEADLESS: &str = "service.kubernetes.io/headless";
const ANNOTATION_TRIGGER: &str = "endpoints.kubernetes.io/last-change-trigger-time";

/// What matters of an EndpointSlice; one that no proxy uses (headless, of no Service, FQDN) reads as the default, but for
/// its flaws.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Slice {
    /// The Service that it belongs to, in its own namespace; empty when it is not used.
    pub service: Box<str>,
    /// Its ports.
    pub ports: Box<[SlicePort]>,
    /// Its endpoints, when its addresses are IPv4.
    pub v4: Box<[SliceEndpoint<[u8; 4]>]>,
    /// Its endpoints, when its addresses are IPv6.
    pub v6: Box<[SliceEndpoint<Ip6>]>,
    names: Names,
    /// When what it tells happened, in milliseconds since 1970, as its controller says.
    pub trigger_ms: Option<i64>,
    /// What cannot be used of it.
    pub flaws: Box<[Flaw]>,
}

/// A port that every endpoint of a slice has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlicePort {
    /// Its name, by which it belongs to a port of the Service.
    pub name: Box<str>,
    /// Its protocol.
    pub protocol: Protocol,
    /// The port.
    pub port: u16,
}

/// An endpoint of a slice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SliceEndpoint<A> {
    /// Its first address; further ones are used by nobody (see the API's documentation of the field).
    pub addr: A,
    /// `conditions.ready`.
    pub ready: bool,
    /// `conditions.serving`.
    pub serving: bool,
    /// `conditions.terminating`.
    pub terminating: bool,
    /// `nodeName`.
    pub node: NameId,
    /// `hints.forNodes`.
    pub node_hints: HintsId,
    /// `hints.forZones`.
    pub zone_hints: HintsId,
}

/// A name within its slice; the default is no name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct NameId(u32);

/// A list of names within its slice; the default is the empty list.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct HintsId(u32);

/// The names of nodes and zones in a slice, each once: endpoints hold numbers in place of texts.
#[derive(Clone, Debug, Default, PartialEq)]
struct Names {
    text: Box<str>,
    /// Where in the text each name ends, which is where the next begins.
    ends: Box<[usize]>,
    lists: Box<[Box<[NameId]>]>,
}

impl Slice {
    /// Reads an object.
    pub fn read(object: &EndpointSlice) -> Self {
        let labels = object.metadata.labels.as_ref();
        let service = labels.and_then(|labels| labels.get(LABEL_SERVICE_NAME)).map_or("", String::as_str);
        if service.is_empty() || labels.is_some_and(|labels| labels.contains_key(LABEL_HEADLESS)) {
            return Self::default();
        }
        let mut flaws = Flaws::default();
        let mut names = Interner::default();
        let mut slice = Self { service: service.into(), ..Self::default() };
        match object.address_type.as_str() {
            "IPv4" => slice.v4 = endpoints(object, &mut names, &mut flaws),
            "IPv6" => slice.v6 = endpoints(object, &mut names, &mut flaws),
            "FQDN" => {
                flaws.unsupported(|| {
                    "addressType FQDN has no addresses to forward to; it is left out".to_owned()
                });
                return Self { flaws: flaws.finish(), ..Self::default() };
            }
            other => {
                flaws.push(|| {
                    format!("addressType {} is neither IPv4 nor IPv6; it is left out", quoted(other))
                });
                return Self { flaws: flaws.finish(), ..Self::default() };
            }
        }
        slice.ports = ports(object, &mut flaws);
        slice.names = names.finish();
        let annotations = object.metadata.annotations.as_ref();
        let trigger = annotations.and_then(|annotations| annotations.get(ANNOTATION_TRIGGER));
        slice.trigger_ms = trigger.and_then(|t| t.parse::<Timestamp>().ok()).map(Timestamp::as_millisecond);
        slice.flaws = flaws.finish();
        slice
    }

    /// The number of a name, if any endpoint or hint has it.
    pub fn name(&self, name: &str) -> Option<NameId> {
        let mut start = 0;
        let at = self.names.ends.iter().position(|&end| {
            let is_it = self.names.text.get(start..end) == Some(name);
            start = end;
            is_it
        })?;
        Some(NameId(at as u32 + 1))
    }

    /// Every name that an endpoint or a hint has.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        (1..=self.names.ends.len() as u32).map(|name| self.text(NameId(name)))
    }

    /// The text of a name; empty for that of no name.
    pub fn text(&self, name: NameId) -> &str {
        let Some(at) = (name.0 as usize).checked_sub(1) else { return "" };
        let end_of = |at: usize| self.names.ends.get(at).copied();
        let start = at.checked_sub(1).map_or(Some(0), end_of);
        start.zip(end_of(at)).and_then(|(start, end)| self.names.text.get(start..end)).unwrap_or_default()
    }

    /// The names of a list of hints.
    pub fn hints(&self, list: HintsId) -> &[NameId] {
        let at = (list.0 as usize).checked_sub(1);
        at.and_then(|at| self.names.lists.get(at)).map_or(&[], |list| list)
    }
}

fn ports(object: &EndpointSlice, flaws: &mut Flaws) -> Box<[SlicePort]> {
    let mut ports = Vec::new();
    for port in object.ports.iter().flatten() {
        let Some(name) = &port.name else {
            flaws.push(|| {
                "a port without a name belongs to no port of the Service; it is left out".to_owned()
            });
            continue;
        };
        let Some(number) = port.port else {
            flaws.unsupported(|| {
                format!("port {} without a number means every port; it is left out", quoted(name))
            });
            continue;
        };
        let Some(protocol) = Protocol::parse(port.protocol.as_deref()) else {
            flaws.push(|| unknown_protocol(port.protocol.as_deref(), number));
            continue;
        };
        let Some(port) = port_number(number) else {
            flaws.push(|| format!("port {number} is not 1 to 65535; the port is left out"));
            continue;
        };
        ports.push(SlicePort { name: name.as_str().into(), protocol, port });
    }
    ports.into()
}

fn endpoints<'a, A: IpAddress>(
    object: &'a EndpointSlice,
    names: &mut Interner<'a>,
    flaws: &mut Flaws,
) -> Box<[SliceEndpoint<A>]> {
    let mut endpoints = Vec::new();
    let mut ready = HashSet::new();
    for endpoint in object.endpoints.iter().flatten() {
        let Some(text) = endpoint.addresses.first() else {
            flaws.push(|| "an endpoint without an address is left out".to_owned());
            continue;
        };
        let ip = parse_ip_sloppy(text);
        let Some((ip, addr)) = ip.and_then(|ip| Some((ip, A::from_ip(ip)?))) else {
            flaws.push(|| {
                let (text, family) = (quoted(text), A::FAMILY);
                format!("endpoint address {text} is not an {family} address; the endpoint is left out")
            });
            continue;
        };
        if let Some(is) = special(ip) {
            flaws.push(|| {
                format!("endpoint address {ip} is {is} and cannot be an endpoint's; the endpoint is left out")
            });
            continue;
        }
        let endpoint = read_endpoint(endpoint, addr, names);
        // While an address moves to another Pod, both may stand here, but only one of them serves.
        if endpoint.ready && !endpoint.terminating && !ready.insert(addr) {
            flaws.push(|| format!("endpoint address {ip} stands there twice; it counts once"));
        }
        endpoints.push(endpoint);
    }
    endpoints.into()
}

fn read_endpoint<'a, A>(endpoint: &'a v1::Endpoint, addr: A, names: &mut Interner<'a>) -> SliceEndpoint<A> {
    let conditions = endpoint.conditions.as_ref();
    let hints = endpoint.hints.as_ref();
    let nodes = hints.and_then(|hints| hints.for_nodes.as_deref()).unwrap_or_default();
    let zones = hints.and_then(|hints| hints.for_zones.as_deref()).unwrap_or_default();
    SliceEndpoint {
        addr,
        ready: conditions.and_then(|c| c.ready).unwrap_or(true),
        serving: conditions.and_then(|c| c.serving).unwrap_or(true),
        terminating: conditions.and_then(|c| c.terminating).unwrap_or(false),
        node: endpoint.node_name.as_deref().map_or(NameId::default(), |name| names.name(name)),
        node_hints: names.list(nodes.iter().map(|hint| hint.name.as_str())),
        zone_hints: names.list(zones.iter().map(|hint| hint.name.as_str())),
    }
}

/// Gives numbers to names and to lists of them, in the order in which they come.
#[derive(Default)]
struct Interner<'a> {
    names: HashMap<&'a str, NameId>,
    text: String,
    ends: Vec<usize>,
    lists: HashMap<Box<[NameId]>, HintsId>,
    ordered: Vec<Box<[NameId]>>,
}

impl<'a> Interner<'a> {
    fn name(&mut self, name: &'a str) -> NameId {
        if name.is_empty() {
            return NameId::default();
        }
        *self.names.entry(name).or_insert_with(|| {
            self.text.push_str(name);
            self.ends.push(self.text.len());
            NameId(self.ends.len() as u32)
        })
    }

    fn list(&mut self, names: impl Iterator<Item = &'a str>) -> HintsId {
        let list: Box<[NameId]> = names.map(|name| self.name(name)).collect();
        if list.is_empty() {
            return HintsId::default();
        }
        *self.lists.entry(list).or_insert_with_key(|list| {
            self.ordered.push(list.clone());
            HintsId(self.ordered.len() as u32)
        })
    }

    fn finish(self) -> Names {
        Names { text: self.text.into(), ends: self.ends.into(), lists: self.ordered.into() }
    }
}
