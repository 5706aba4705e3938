//! Configuration files of kube-proxy: each field stands for a flag, or is explained.
//!
//! Values are handed to the flags as their defaults, so that they are checked in one place and flags win over the file.

use serde::de::{self, Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_saphyr::Spanned;

use super::ignored;

/// What identifies such a file.
const API_VERSION: &str = "kubeproxy.config.k8s.io/v1alpha1";
const KIND: &str = "KubeProxyConfiguration";
/// Longer than any configuration, and short enough to hold.
const BYTES_MAX: usize = 1 << 20;
const DEPTH_MAX: usize = 16;

/// What becomes of a field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It stands for the flag of this name, written with underscores.
    Flag(&'static str),
    /// It has no effect, nor has anything below it, for this reason.
    Ignored(&'static str),
    /// It has no effect for this reason, but has to have one of these values.
    IgnoredOf(&'static [&'static str], &'static str),
    /// It says what the file is.
    Header,
}

const CLIENT: Fate = Fate::Ignored(ignored::OWN_CLIENT);
const NO_SYNC: Fate = Fate::Ignored(ignored::NO_SYNC);
const NO_NETFILTER: Fate = Fate::Ignored(ignored::NO_NETFILTER);
const NO_IPVS: Fate = Fate::Ignored(ignored::NO_IPVS);
const OWN_TABLE: Fate = Fate::Ignored(ignored::OWN_TABLE);
const NO_WINDOWS: Fate = Fate::Ignored("this is not Windows");

/// Every field of the kind, by its path.
pub const FIELDS: &[(&str, Fate)] = &[
    ("apiVersion", Fate::Header),
    ("kind", Fate::Header),
    ("bindAddress", Fate::Flag("bind_address")),
    ("bindAddressHardFail", Fate::Flag("bind_address_hard_fail")),
    ("clientConnection.acceptContentTypes", CLIENT),
    ("clientConnection.burst", CLIENT),
    ("clientConnection.contentType", CLIENT),
    ("clientConnection.kubeconfig", Fate::Flag("kubeconfig")),
    ("clientConnection.qps", CLIENT),
    ("clusterCIDR", Fate::Flag("cluster_cidr")),
    ("configSyncPeriod", Fate::Ignored(ignored::NO_RESYNC)),
    ("conntrack.maxPerCore", OWN_TABLE),
    ("conntrack.min", OWN_TABLE),
    ("conntrack.tcpBeLiberal", Fate::Ignored(ignored::LIBERAL)),
    ("conntrack.tcpCloseWaitTimeout", Fate::Flag("tcp_half_closed_timeout")),
    ("conntrack.tcpEstablishedTimeout", Fate::Flag("tcp_established_timeout")),
    ("conntrack.udpStreamTimeout", Fate::Flag("udp_timeout")),
    ("conntrack.udpTimeout", Fate::Ignored(ignored::UNANSWERED)),
    ("detectLocal.bridgeInterface", Fate::Flag("pod_bridge_interface")),
    ("detectLocal.interfaceNamePrefix", Fate::Flag("pod_interface_name_prefix")),
    ("detectLocalMode", Fate::Flag("detect_local_mode")),
    ("enableProfiling", Fate::Ignored(ignored::NO_PPROF)),
    ("featureGates", Fate::Ignored(ignored::NO_GATES)),
    ("healthzBindAddress", Fate::Flag("healthz_bind_address")),
    ("hostnameOverride", Fate::Flag("node")),
    ("iptables.localhostNodePorts", Fate::Ignored(ignored::NO_LOCALHOST)),
    ("iptables.masqueradeAll", Fate::Flag("masquerade_all")),
    ("iptables.masqueradeBit", NO_NETFILTER),
    ("iptables.minSyncPeriod", NO_SYNC),
    (
        "iptables.snatNodeInternalIP",
        Fate::Ignored("the source is an address of the interface that flows leave by"),
    ),
    ("iptables.syncPeriod", NO_SYNC),
    ("ipvs.excludeCIDRs", NO_IPVS),
    ("ipvs.minSyncPeriod", NO_SYNC),
    ("ipvs.scheduler", Fate::Ignored(ignored::MAGLEV)),
    ("ipvs.strictARP", NO_IPVS),
    ("ipvs.syncPeriod", NO_SYNC),
    ("ipvs.tcpFinTimeout", Fate::Ignored("use conntrack.tcpCloseWaitTimeout")),
    ("ipvs.tcpTimeout", Fate::Ignored("use conntrack.tcpEstablishedTimeout")),
    ("ipvs.udpTimeout", Fate::Ignored("use conntrack.udpStreamTimeout")),
    ("logging", Fate::Ignored("use --log and --log-format")),
    ("metricsBindAddress", Fate::Flag("metrics_bind_address")),
    ("mode", Fate::IgnoredOf(ignored::PROXY_MODES, ignored::ONE_DATAPATH)),
    ("nftables.masqueradeAll", Fate::Flag("masquerade_all")),
    ("nftables.masqueradeBit", NO_NETFILTER),
    ("nftables.minSyncPeriod", NO_SYNC),
    ("nftables.syncPeriod", NO_SYNC),
    ("nodePortAddresses", Fate::Flag("nodeport_addresses")),
    ("oomScoreAdj", Fate::Ignored(ignored::OOM)),
    ("portRange", Fate::Ignored("no port of the node is listened on for Services")),
    ("showHiddenMetricsForVersion", Fate::Ignored(ignored::NO_HIDDEN)),
    ("windowsRunAsService", NO_WINDOWS),
    ("winkernel", NO_WINDOWS),
];

/// A value that a file gives to a flag.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Setting {
    /// The flag's name, with underscores.
    pub flag: &'static str,
    /// Path of the field.
    pub field: &'static str,
    /// Its value, or its values if it is a list.
    pub values: Vec<String>,
}

/// What a file says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct File {
    /// For flags.
    pub settings: Vec<Setting>,
    /// Fields that have a value and no effect, with the reason.
    pub ignored: Vec<(&'static str, &'static str)>,
}

/// Reads the text of a file. Values that say nothing (null, "", 0, false, empty lists) count as absent, because the
/// files that tools generate have every field.
///
/// # Errors
/// When it is not such a file, with the line of what is wrong.
pub fn read(text: &str) -> Result<File, String> {
    if text.len() > BYTES_MAX {
        return Err(format!("longer than {BYTES_MAX} bytes"));
    }
    let options = serde_saphyr::options! {
        budget: serde_saphyr::budget! { max_depth: DEPTH_MAX },
        with_snippet: false,
    };
    let root: Node = serde_saphyr::from_str_with_options(text, options)
        .map_err(|error| error.without_snippet().to_string())?;
    let Node::Map(fields) = root else {
        return Err(format!("not an object of kind {KIND}"));
    };
    for (name, expected) in [("apiVersion", API_VERSION), ("kind", KIND)] {
        match fields.iter().find(|field| field.name == name) {
            Some(Field { value: Node::Scalar(found), .. }) if found == expected => {}
            Some(field) => return Err(format!("line {}: {name} is not {expected}", field.line)),
            None => return Err(format!("{name} is missing; it should be {expected}")),
        }
    }
    let mut file = File::default();
    walk(&fields, "", &mut file)?;
    Ok(file)
}

fn walk(fields: &[Field], parent: &str, file: &mut File) -> Result<(), String> {
    for Field { name, line, value } in fields {
        let path = if parent.is_empty() { name.clone() } else { format!("{parent}.{name}") };
        if let Some((field, fate)) = FIELDS.iter().find(|(field, _)| *field == path) {
            let shape = |_| format!("line {line}: {path} is neither a value nor a list of values");
            match *fate {
                Fate::Flag(flag) if !value.is_empty() => {
                    let values = value.scalars().map_err(shape)?;
                    file.settings.push(Setting { flag, field, values });
                }
                Fate::Ignored(why) if !value.is_empty() => file.ignored.push((field, why)),
                Fate::IgnoredOf(known, why) if !value.is_empty() => {
                    let values = value.scalars().map_err(shape)?;
                    if let Some(other) = values.iter().find(|value| !known.contains(&value.as_str())) {
                        let known = known.join(", ");
                        return Err(format!("line {line}: {path} {other:?} is none of {known}"));
                    }
                    file.ignored.push((field, why));
                }
                Fate::Flag(_) | Fate::Ignored(_) | Fate::IgnoredOf(..) | Fate::Header => {}
            }
            continue;
        }
        let inside = format!("{path}.");
        if !FIELDS.iter().any(|(field, _)| field.starts_with(&inside)) {
            return Err(format!("line {line}: {path} is no field of {KIND} {API_VERSION}"));
        }
        match value {
            Node::Map(fields) => walk(fields, &path, file)?,
            Node::Scalar(_) | Node::List(_) if value.is_empty() => {}
            Node::Scalar(_) | Node::List(_) => return Err(format!("line {line}: {path} is not an object")),
        }
    }
    Ok(())
}

/// YAML, with the lines of its fields.
#[derive(Debug)]
enum Node {
    /// A value as it is written; nothing for null.
    Scalar(String),
    List(Vec<Node>),
    Map(Vec<Field>),
}

#[derive(Debug)]
struct Field {
    name: String,
    line: u64,
    value: Node,
}

/// Not a value or a list of values.
#[derive(Debug)]
struct Nested;

impl Node {
    fn is_empty(&self) -> bool {
        match self {
            Self::Scalar(text) => ["", "false", "0", "0s"].contains(&text.as_str()),
            Self::List(items) => items.is_empty(),
            Self::Map(fields) => fields.iter().all(|field| field.value.is_empty()),
        }
    }

    fn scalars(&self) -> Result<Vec<String>, Nested> {
        let scalar = |node: &Self| match node {
            Self::Scalar(text) => Ok(text.clone()),
            Self::List(_) | Self::Map(_) => Err(Nested),
        };
        match self {
            Self::List(items) => items.iter().map(scalar).collect(),
            Self::Scalar(_) | Self::Map(_) => scalar(self).map(|text| vec![text]),
        }
    }
}

impl<'de> Deserialize<'de> for Node {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Any;

        impl<'de> Visitor<'de> for Any {
            type Value = Node;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("YAML or JSON")
            }

            fn visit_unit<E: de::Error>(self) -> Result<Node, E> {
                Ok(Node::Scalar(String::new()))
            }

            fn visit_bool<E: de::Error>(self, value: bool) -> Result<Node, E> {
                Ok(Node::Scalar(value.to_string()))
            }

            fn visit_i64<E: de::Error>(self, value: i64) -> Result<Node, E> {
                Ok(Node::Scalar(value.to_string()))
            }

            fn visit_u64<E: de::Error>(self, value: u64) -> Result<Node, E> {
                Ok(Node::Scalar(value.to_string()))
            }

            fn visit_f64<E: de::Error>(self, value: f64) -> Result<Node, E> {
                Ok(Node::Scalar(value.to_string()))
            }

            fn visit_str<E: de::Error>(self, value: &str) -> Result<Node, E> {
                Ok(Node::Scalar(value.to_owned()))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Node, A::Error> {
                let mut list = Vec::new();
                while let Some(item) = items.next_element()? {
                    list.push(item);
                }
                Ok(Node::List(list))
            }

            fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Node, A::Error> {
                let mut fields = Vec::new();
                while let Some(name) = entries.next_key::<Spanned<String>>()? {
                    let line = name.referenced.line();
                    fields.push(Field { name: name.value, line, value: entries.next_value()? });
                }
                Ok(Node::Map(fields))
            }
        }

        deserializer.deserialize_any(Any)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEADER: &str = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n";

    fn settings(text: &str) -> Vec<(&'static str, Vec<String>)> {
        let file = read(&format!("{HEADER}{text}")).expect("valid");
        file.settings.into_iter().map(|setting| (setting.flag, setting.values)).collect()
    }

    #[test]
    fn fields_become_flags() {
        let text = "hostnameOverride: Node-A\nnodePortAddresses: [192.0.2.0/24, '2001:db8::/64']\nclusterCIDR: \
                    10.244.0.0/16,fd00::/56\nbindAddressHardFail: true\nconntrack:\n  tcpEstablishedTimeout: 2h0m0s\n";
        assert_eq!(
            settings(text),
            [
                ("node", vec!["Node-A".to_owned()]),
                ("nodeport_addresses", vec!["192.0.2.0/24".to_owned(), "2001:db8::/64".to_owned()]),
                ("cluster_cidr", vec!["10.244.0.0/16,fd00::/56".to_owned()]),
                ("bind_address_hard_fail", vec!["true".to_owned()]),
                ("tcp_established_timeout", vec!["2h0m0s".to_owned()]),
            ]
        );
    }

    #[test]
    fn a_file_as_kubeadm_writes_it_says_only_what_it_says() {
        let file = read(include_str!("testdata/kubeadm.yaml")).expect("valid");
        let flags: Vec<_> =
            file.settings.iter().map(|setting| (setting.flag, setting.values[0].as_str())).collect();
        assert_eq!(
            flags,
            [
                ("bind_address", "0.0.0.0"),
                ("kubeconfig", "/var/lib/kube-proxy/kubeconfig.conf"),
                ("cluster_cidr", "10.244.0.0/16"),
            ]
        );
        assert_eq!(file.ignored, []);
    }

    #[test]
    fn fields_without_effect_are_named_with_the_reason() {
        let file = read(&format!("{HEADER}mode: ipvs\nfeatureGates: {{A: true}}\nipvs: {{scheduler: lc}}\n"))
            .expect("valid");
        assert_eq!(
            file.ignored.iter().map(|(field, _)| *field).collect::<Vec<_>>(),
            ["mode", "featureGates", "ipvs.scheduler"]
        );
        assert!(file.ignored[0].1.contains("nftables"), "{:?}", file.ignored[0]);
    }

    #[test]
    fn what_is_wrong_is_named_with_its_line() {
        for (text, says) in [
            (
                format!("{HEADER}conntrack:\n  min: 1\n  maximum: 3\n"),
                "line 5: conntrack.maximum is no field",
            ),
            (format!("{HEADER}clusterCidr: 10.0.0.0/8\n"), "line 3: clusterCidr is no field"),
            (format!("{HEADER}conntrack: 5\n"), "line 3: conntrack is not an object"),
            (format!("{HEADER}clusterCIDR: {{a: b}}\n"), "line 3: clusterCIDR is neither"),
            (format!("{HEADER}mode: [\n"), "line"),
            (
                format!("{HEADER}mode: userspace\n"),
                "line 3: mode \"userspace\" is none of iptables, ipvs, nftables",
            ),
            ("kind: KubeProxyConfiguration\n".to_owned(), "apiVersion is missing"),
            ("apiVersion: v1\nkind: Service\n".to_owned(), "line 1: apiVersion is not kubeproxy"),
            (
                format!("{API}\nkind: Service\n", API = HEADER.lines().next().expect("a line")),
                "line 2: kind is not",
            ),
            ("just text".to_owned(), "not an object of kind KubeProxyConfiguration"),
            (String::new(), "not an object"),
        ] {
            let error = read(&text).expect_err("refused");
            assert!(error.contains(says), "{text}: {error}");
        }
    }

    #[test]
    fn json_is_yaml_too() {
        let text = r#"{"kind": "KubeProxyConfiguration", "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
            "metricsBindAddress": "0.0.0.0:10249"}"#;
        let file = read(text).expect("valid");
        assert_eq!(file.settings[0].flag, "metrics_bind_address");
    }
}
