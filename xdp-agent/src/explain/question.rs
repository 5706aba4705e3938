//! A question: a connection that somebody would open.

use std::{net::IpAddr, str::FromStr};

use serde::Deserialize;
use serde_json::{Map, Value};
use xdp_common::net::{FlowKey, Ip6};

use crate::cluster::{address::parse_ip_sloppy, wanted::Protocol};

/// Source port where a question has none; no policy depends on it.
const ANY_PORT: u16 = 40_000;

/// A connection that somebody would open, by the key of its first packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Question {
    /// In IPv4.
    V4(FlowKey<[u8; 4]>),
    /// In IPv6.
    V6(FlowKey<Ip6>),
}

/// An address with a port or without.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Source {
    /// Address.
    pub addr: IpAddr,
    /// Port.
    pub port: u16,
}

/// An address and a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Destination {
    /// Address.
    pub addr: IpAddr,
    /// Port.
    pub port: u16,
}

/// A line of a batch; other fields are ignored.
#[derive(Deserialize)]
struct Line {
    from: String,
    to: String,
    /// As without the flag.
    #[serde(default = "tcp")]
    proto: String,
}

fn tcp() -> String {
    Protocol::Tcp.name().to_owned()
}

impl Question {
    /// Puts a question together.
    ///
    /// # Errors
    /// When the two addresses are not of one family.
    pub fn new(from: Source, to: Destination, protocol: Protocol) -> Result<Self, String> {
        match (from.addr, to.addr) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => {
                Ok(Self::V4(key(src.octets(), dst.octets(), from.port, to.port, protocol)))
            }
            (IpAddr::V6(src), IpAddr::V6(dst)) => {
                Ok(Self::V6(key(src.octets().into(), dst.octets().into(), from.port, to.port, protocol)))
            }
            (IpAddr::V4(_), IpAddr::V6(_)) | (IpAddr::V6(_), IpAddr::V4(_)) => {
                Err(format!("{} and {} are of different families", from.addr, to.addr))
            }
        }
    }

    /// Reads a line of a batch: `{"from": "IP[:PORT]", "to": "IP:PORT", "proto": "tcp|udp|sctp"}`, where the last one may
    /// be left out.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn from_json(line: &str) -> Result<Self, String> {
        // An object first: a structure would be read from a list as well.
        let object: Map<String, Value> = serde_json::from_str(line).map_err(|error| error.to_string())?;
        let line: Line = serde_json::from_value(object.into()).map_err(|error| error.to_string())?;
        let from = line.from.parse().map_err(|error| format!("from: {error}"))?;
        let to = line.to.parse().map_err(|error| format!("to: {error}"))?;
        let protocol = parse_protocol(&line.proto).map_err(|error| format!("proto: {error}"))?;
        Self::new(from, to, protocol)
    }
}

impl FromStr for Source {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (addr, port) = split(text)?;
        Ok(Self { addr, port: port.unwrap_or(ANY_PORT) })
    }
}

impl FromStr for Destination {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match split(text)? {
            (addr, Some(port)) => Ok(Self { addr, port }),
            (IpAddr::V4(_), None) => Err(format!("{text:?} has no port; write it as 10.96.0.10:80")),
            (IpAddr::V6(_), None) => Err(format!("{text:?} has no port; write it as [fd00::10]:80")),
        }
    }
}

fn key<A>(src: A, dst: A, sport: u16, dport: u16, protocol: Protocol) -> FlowKey<A> {
    let (sport, dport) = (sport.to_be_bytes(), dport.to_be_bytes());
    FlowKey { src, dst, sport, dport, proto: protocol.number(), zero: [0; 3] }
}

/// Reads a protocol, in capitals or not.
///
/// # Errors
/// When it is none of the three.
pub(super) fn parse_protocol(text: &str) -> Result<Protocol, String> {
    Protocol::ALL
        .into_iter()
        .find(|protocol| protocol.name().eq_ignore_ascii_case(text))
        .ok_or_else(|| format!("{text:?} is not a protocol; write tcp, udp or sctp"))
}

/// Splits `IP`, `IP:PORT`, `[IP]` and `[IP]:PORT`; octets may have leading zeros.
fn split(text: &str) -> Result<(IpAddr, Option<u16>), String> {
    let wrong = || format!("{text:?} is not an address; write it as 10.96.0.10:80 or [fd00::10]:80");
    let (addr, port) = match text.strip_prefix('[') {
        Some(rest) => {
            let (addr, rest) = rest.split_once(']').ok_or_else(wrong)?;
            let port = if rest.is_empty() { None } else { Some(rest.strip_prefix(':').ok_or_else(wrong)?) };
            (addr, port)
        }
        // More than one colon: an IPv6 address without brackets, which leaves no place for a port.
        None => match text.split_once(':') {
            Some((addr, port)) if !port.contains(':') => (addr, Some(port)),
            Some(_) | None => (text, None),
        },
    };
    let addr = parse_ip_sloppy(addr).ok_or_else(wrong)?;
    let port = port.map(|port| match port.parse() {
        Ok(number) if number > 0 && port.bytes().all(|byte| byte.is_ascii_digit()) => Ok(number),
        Ok(_) | Err(_) => Err(format!("{port:?} is not a port from 1 to 65535")),
    });
    Ok((addr, port.transpose()?))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{super::answer::endpoint, *};

    fn to(text: &str) -> Result<String, String> {
        text.parse::<Destination>().map(|to| endpoint(to.addr, to.port))
    }

    #[test]
    fn destinations_have_an_address_and_a_port() {
        for (text, expected) in [
            ("10.96.0.10:80", "10.96.0.10:80"),
            ("010.096.000.010:0080", "10.96.0.10:80"),
            ("[fd00::10]:443", "[fd00::10]:443"),
            ("[fd00:0:0::0010]:443", "[fd00::10]:443"),
            ("[::ffff:10.0.0.1]:53", "10.0.0.1:53"),
        ] {
            assert_eq!(to(text).as_deref(), Ok(expected), "{text}");
        }
        for (text, hint) in [
            ("10.96.0.10", "has no port"),
            ("fd00::10", "write it as [fd00::10]:80"),
            ("10.96.0.10:0", "1 to 65535"),
            ("10.96.0.10:65536", "1 to 65535"),
            ("10.96.0.10:+80", "1 to 65535"),
            ("10.96.0.10:", "1 to 65535"),
            ("web:80", "is not an address"),
            ("[fd00::10:80", "is not an address"),
            ("[fd00::10]80", "is not an address"),
            ("", "is not an address"),
        ] {
            let message = to(text).expect_err("refused");
            assert!(message.contains(hint), "{text}: {message}");
        }
    }

    #[test]
    fn sources_may_leave_the_port_out() {
        for (text, addr, port) in [
            ("10.0.0.2", "10.0.0.2", ANY_PORT),
            ("10.0.0.2:1234", "10.0.0.2", 1234),
            ("fd00::2", "fd00::2", ANY_PORT),
            ("[fd00::2]", "fd00::2", ANY_PORT),
            ("[fd00::2]:1234", "fd00::2", 1234),
        ] {
            let expected = Source { addr: addr.parse().expect("an address"), port };
            assert_eq!(text.parse::<Source>(), Ok(expected), "{text}");
        }
    }

    #[test]
    fn lines_say_what_is_wrong_with_them() {
        let good = r#"{"from": "10.0.0.2", "to": "10.96.0.10:80", "proto": "UDP", "note": "ignored"}"#;
        let expected = key([10, 0, 0, 2], [10, 96, 0, 10], ANY_PORT, 80, Protocol::Udp);
        assert_eq!(Question::from_json(good), Ok(Question::V4(expected)));
        let short = r#"{"from": "10.0.0.2", "to": "10.96.0.10:80"}"#;
        let expected = key([10, 0, 0, 2], [10, 96, 0, 10], ANY_PORT, 80, Protocol::Tcp);
        assert_eq!(Question::from_json(short), Ok(Question::V4(expected)));
        for (line, hint) in [
            ("", "EOF"),
            ("[]", "expected a map"),
            (r#"["10.0.0.2", "10.96.0.10:80", "tcp"]"#, "expected a map"),
            (r#"{"from": "10.0.0.2"}"#, "missing field `to`"),
            (r#"{"from": "10.0.0.2", "to": "10.96.0.10:80", "proto": null}"#, "null"),
            (r#"{"from": "x", "to": "10.96.0.10:80", "proto": "tcp"}"#, "from: "),
            (r#"{"from": "10.0.0.2", "to": "x", "proto": "tcp"}"#, "to: "),
            (r#"{"from": "10.0.0.2", "to": "10.96.0.10:80", "proto": "icmp"}"#, "proto: "),
            (r#"{"from": "fd00::2", "to": "10.96.0.10:80", "proto": "tcp"}"#, "different families"),
        ] {
            let message = Question::from_json(line).expect_err("refused");
            assert!(message.contains(hint), "{line}: {message}");
        }
    }

    proptest! {
        #[test]
        fn no_text_makes_it_panic(text: String) {
            let _ = (text.parse::<Source>(), text.parse::<Destination>(), Question::from_json(&text));
        }
    }
}
