//! Values of flags as people, Kubernetes and Go write them.

use std::{
    ffi::OsString,
    fmt::Display,
    net::{IpAddr, SocketAddr},
    os::unix::ffi::{OsStrExt, OsStringExt},
    str::FromStr,
    time::Duration,
};

use crate::cluster::address::parse_ip_sloppy;

/// A word of the command line with dashes in the flag's name where it has underscores, which Kubernetes' programs take for
/// the same (`WordSepNormalizeFunc` in component-base/cli/flag).
pub(super) fn with_dashes(word: OsString) -> OsString {
    if !word.as_bytes().starts_with(b"--") {
        return word;
    }
    let mut bytes = word.into_vec();
    let name = bytes.iter_mut().take_while(|byte| **byte != b'=');
    name.filter(|byte| **byte == b'_').for_each(|byte| *byte = b'-');
    OsString::from_vec(bytes)
}

/// An address; leading zeros mean nothing, as everywhere in Kubernetes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ip(pub IpAddr);

impl FromStr for Ip {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        ip(text).map(Self)
    }
}

/// Reads an address.
pub(super) fn ip(text: &str) -> Result<IpAddr, &'static str> {
    parse_ip_sloppy(text).ok_or("not an IP address; write it as 192.0.2.1 or 2001:db8::1")
}

/// A list in one value, separated by commas; an empty value is an empty list, as templates write it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct List<T>(pub Vec<T>);

impl<T: FromStr<Err: Display>> FromStr for List<T> {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let items = text.split(',').map(str::trim).filter(|item| !item.is_empty());
        items
            .map(|item| item.parse().map_err(|error| format!("{item}: {error}")))
            .collect::<Result<_, _>>()
            .map(Self)
    }
}

/// What was given by all occurrences of a flag.
pub fn all<T: Clone>(lists: &[List<T>]) -> Vec<T> {
    lists.iter().flat_map(|list| list.0.iter().cloned()).collect()
}

/// A network as `10.0.0.0/8`; bits behind the prefix count as zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cidr {
    /// First address.
    pub addr: IpAddr,
    /// Prefix length in bits.
    pub len: u8,
}

impl FromStr for Cidr {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        const FORM: &str = "write it as ADDRESS/LENGTH, as in 10.244.0.0/16 or fd00:10:244::/56";
        let (addr, len) = text.split_once('/').ok_or(FORM)?;
        let (addr, len) = (parse_ip_sloppy(addr).ok_or(FORM)?, len.parse::<u8>().map_err(|_| FORM)?);
        let addr = match addr {
            IpAddr::V4(addr) if len <= 32 => IpAddr::from(
                (addr.to_bits() & u32::MAX.checked_shl(32 - u32::from(len)).unwrap_or(0)).to_be_bytes(),
            ),
            IpAddr::V6(addr) if len <= 128 => IpAddr::from(
                (addr.to_bits() & u128::MAX.checked_shl(128 - u32::from(len)).unwrap_or(0)).to_be_bytes(),
            ),
            IpAddr::V4(_) | IpAddr::V6(_) => return Err("the prefix is longer than the address"),
        };
        Ok(Self { addr, len })
    }
}

impl From<Cidr> for (IpAddr, u8) {
    fn from(cidr: Cidr) -> Self {
        (cidr.addr, cidr.len)
    }
}

/// Which of the node's addresses NodePorts are served on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NodePortAddress {
    /// The primary one of each family.
    Primary,
    /// All.
    All,
    /// Those in a network.
    In(Cidr),
}

impl FromStr for NodePortAddress {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "primary" => Ok(Self::Primary),
            "all" => Ok(Self::All),
            _ => text
                .parse()
                .map(Self::In)
                .map_err(|_| "write it as primary, all, or networks like 192.0.2.0/24"),
        }
    }
}

/// Where a server listens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bind {
    /// Nowhere.
    Off,
    /// On the usual port of an address.
    Ip(IpAddr),
    /// On an address and port.
    Socket(SocketAddr),
}

impl Bind {
    /// The address to listen on.
    pub fn with_port(self, port: u16) -> Option<SocketAddr> {
        match self {
            Self::Off => None,
            Self::Ip(ip) => Some(SocketAddr::new(ip, port)),
            Self::Socket(address) => Some(address),
        }
    }
}

impl FromStr for Bind {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text.is_empty() {
            return Ok(Self::Off);
        }
        if let Some(ip) = parse_ip_sloppy(text) {
            return Ok(Self::Ip(ip));
        }
        let with_zeros = || {
            let (ip, port) = text.split_once(':')?;
            Some(SocketAddr::new(parse_ip_sloppy(ip)?, port.parse().ok()?))
        };
        let socket = text.parse().ok().or_else(with_zeros);
        socket.map(Self::Socket).ok_or("write it as IP:PORT or [IPV6]:PORT; empty is off")
    }
}

/// A switch as Go writes it: alone, or `=true` and `=false`; an empty value is off, as templates write it.
pub(super) fn switch(text: &str) -> Result<bool, &'static str> {
    match text.to_ascii_lowercase().as_str() {
        "true" | "t" | "1" | "yes" | "on" => Ok(true),
        "false" | "f" | "0" | "no" | "off" | "" => Ok(false),
        _ => Err("write true or false"),
    }
}

/// Fewer than a page of entries helps nobody, and more than 2^26 (8 GiB of flows) is a slip of the pen.
pub(super) fn entries() -> clap::builder::RangedI64ValueParser<u32> {
    clap::value_parser!(u32).range(64..=1 << 26)
}

/// A timeout; 0 stands for `default`, because kube-proxy's 0 leaves things as they are.
pub(super) fn timeout(
    default: u32,
) -> impl Fn(&str) -> Result<Duration, String> + Clone + Send + Sync + 'static {
    move |text| {
        let time = humantime::parse_duration(text)
            .map_err(|error| format!("{error}; write it as 90s, 3m or 24h"))?;
        if time.is_zero() {
            return Ok(Duration::from_secs(default.into()));
        }
        // Flow ages are counted in 32 bits of seconds, half of which are the past.
        if time.as_secs() == 0 || time.as_secs() > u64::from(u32::MAX / 4) {
            return Err("a timeout is at least 1s and at most 30 years, or 0 for the default".to_owned());
        }
        Ok(time)
    }
}

/// Names of interfaces: `*` stands for anything, `?` for one character.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pattern(String);

impl Pattern {
    /// As it was written.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether a name is one of them.
    pub fn matches(&self, name: &str) -> bool {
        matches(self.0.as_bytes(), name.as_bytes())
    }
}

impl FromStr for Pattern {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let text = text.trim();
        if text.is_empty() || text.bytes().all(|byte| byte == b'*') {
            return Err(
                "name the devices of pods, as in veth* or cali*; every device of the node is too much",
            );
        }
        Ok(Self(text.to_owned()))
    }
}

/// Names are 15 characters at most, so going back costs nothing.
fn matches(pattern: &[u8], name: &[u8]) -> bool {
    match (pattern, name) {
        ([], []) => true,
        ([b'*', rest @ ..], _) => (0..=name.len()).any(|at| matches(rest, &name[at..])),
        ([b'?', rest @ ..], [_, left @ ..]) => matches(rest, left),
        ([one, rest @ ..], [other, left @ ..]) => one == other && matches(rest, left),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks_are_read_without_the_bits_behind_the_prefix() {
        for (text, addr, len) in [
            ("10.244.3.7/16", "10.244.0.0", 16),
            ("0.0.0.0/0", "0.0.0.0", 0),
            ("192.0.2.1/32", "192.0.2.1", 32),
            ("fd00:10:244::5/56", "fd00:10:244::", 56),
            ("::/0", "::", 0),
            ("010.244.003.000/16", "10.244.0.0", 16),
        ] {
            assert_eq!(text.parse(), Ok(Cidr { addr: addr.parse().expect("an address"), len }), "{text}");
        }
        for bad in ["", "10.0.0.0", "10.0.0.0/33", "::/129", "here/8", "10.0.0.0/-1"] {
            assert!(bad.parse::<Cidr>().is_err(), "{bad}");
        }
    }

    #[test]
    fn leading_zeros_of_addresses_mean_nothing() {
        assert_eq!("010.000.0.012".parse(), Ok(Ip([10, 0, 0, 12].into())));
        for bad in ["", "10.0.0", "0x0a.0.0.1", "10.0.0.256", "here"] {
            assert!(bad.parse::<Ip>().is_err(), "{bad}");
        }
    }

    #[test]
    fn underscores_in_names_of_flags_are_dashes_and_in_values_are_not() {
        for (word, expected) in [
            ("--cluster_cidr", "--cluster-cidr"),
            ("--pod_interface-name_prefix=a_b", "--pod-interface-name-prefix=a_b"),
            ("my_node", "my_node"),
            ("-v_", "-v_"),
            ("--", "--"),
        ] {
            assert_eq!(with_dashes(word.into()), expected, "{word}");
        }
    }

    #[test]
    fn lists_may_be_empty_and_name_the_item_that_is_wrong() {
        assert_eq!("".parse(), Ok(List::<Cidr>(vec![])));
        let list: List<Cidr> = "10.0.0.0/8, fd00::/8".parse().expect("two networks");
        assert_eq!(list.0.len(), 2);
        let error = "10.0.0.0/8,x".parse::<List<Cidr>>().expect_err("x is no network");
        assert!(error.starts_with("x: "), "{error}");
    }

    #[test]
    fn addresses_to_listen_on_may_lack_the_port_or_be_empty() {
        for (text, address) in [
            ("", None),
            ("0.0.0.0", Some("0.0.0.0:10256")),
            ("::", Some("[::]:10256")),
            ("127.0.0.1:1", Some("127.0.0.1:1")),
            ("[::1]:2", Some("[::1]:2")),
            ("127.000.000.001:010", Some("127.0.0.1:10")),
            ("010.0.0.1", Some("10.0.0.1:10256")),
        ] {
            let bind: Bind = text.parse().expect("valid");
            assert_eq!(
                bind.with_port(10256),
                address.map(|address| address.parse().expect("an address")),
                "{text}"
            );
        }
        assert!("here:80".parse::<Bind>().is_err());
    }

    #[test]
    fn times_of_go_and_of_people_are_understood() {
        for (text, seconds) in
            [("24h0m0s", 86_400), ("1.5h", 5_400), ("90s", 90), ("2days", 172_800), ("0s", 7), ("0", 7)]
        {
            assert_eq!(timeout(7)(text), Ok(Duration::from_secs(seconds)), "{text}");
        }
        assert!(timeout(7)("999ms").is_err() && timeout(7)("soon").is_err());
    }

    #[test]
    fn patterns_match_names_of_interfaces() {
        for (pattern, name, is_match) in [
            ("veth*", "veth1a2b", true),
            ("veth*", "eth0", false),
            ("pod?", "pod1", true),
            ("pod?", "pod12", false),
            ("lxc*_h", "lxc12_h", true),
            ("*-tap", "vm-1-tap", true),
            ("eni", "eni0", false),
        ] {
            let found = pattern.parse::<Pattern>().expect("a pattern").matches(name);
            assert_eq!(found, is_match, "{pattern} {name}");
        }
        for bad in ["", " ", "*", "**"] {
            assert!(bad.parse::<Pattern>().is_err(), "{bad:?}");
        }
    }
}
