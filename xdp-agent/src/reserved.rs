//! Ports that the kernel must not give to connections of its own: those of translated flows, and NodePorts.
//!
//! A process that connects is given a port by the kernel, from `net.ipv4.ip_local_port_range` without those of
//! `net.ipv4.ip_local_reserved_ports`. The agent adds its ports to the latter and keeps in a pinned map which of them were
//! not there before: those, and no others, it takes out again when its programs go.

use std::{fs, io, path::Path};

use tracing::{debug, info, warn};

use crate::{
    config::{PortRange, ports},
    maps::ReservedPorts,
};

const PATH: &str = "/proc/sys/net/ipv4/ip_local_reserved_ports";
/// Words of a bitmap of all ports.
pub const WORDS: usize = 1 << 10;

/// A set of ports, a bit each.
#[derive(Clone, PartialEq, Eq)]
pub struct Ports(Box<[u64; WORDS]>);

impl Default for Ports {
    fn default() -> Self {
        Self(Box::new([0; WORDS]))
    }
}

impl std::fmt::Debug for Ports {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Ports({self})")
    }
}

impl std::fmt::Display for Ports {
    /// As the kernel writes them: ranges, separated by commas.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (at, range) in self.ranges().into_iter().enumerate() {
            let comma = if at == 0 { "" } else { "," };
            match range.ports() {
                1 => write!(f, "{comma}{}", range.min)?,
                _ => write!(f, "{comma}{range}")?,
            }
        }
        Ok(())
    }
}

impl Ports {
    /// Those of a bitmap; what it lacks is empty.
    pub fn of_words(words: impl IntoIterator<Item = u64>) -> Self {
        let mut ports = Self::default();
        for (to, from) in ports.0.iter_mut().zip(words) {
            *to = from;
        }
        ports
    }

    /// The bitmap.
    pub fn words(&self) -> &[u64] {
        &self.0[..]
    }

    /// Those of ranges.
    pub fn of_ranges(ranges: &[PortRange]) -> Self {
        Self::of(ranges.iter().flat_map(|range| range.min..=range.max))
    }

    fn of(all: impl Iterator<Item = u16>) -> Self {
        let mut ports = Self::default();
        for port in all {
            ports.0[usize::from(port / 64)] |= 1 << (port % 64);
        }
        ports
    }

    /// Reads what the kernel writes.
    pub fn parse(text: &str) -> Option<Self> {
        let ranges = text.trim().split(',').filter(|word| !word.is_empty()).map(|word| {
            let (min, max) = word.split_once('-').unwrap_or((word, word));
            Some(PortRange { min: min.parse().ok()?, max: max.parse().ok()? })
        });
        Some(Self::of_ranges(&ranges.collect::<Option<Vec<_>>>()?))
    }

    fn with(&self, other: &Self) -> Self {
        Self::of_words(self.0.iter().zip(other.words()).map(|(own, other)| own | other))
    }

    fn without(&self, other: &Self) -> Self {
        Self::of_words(self.0.iter().zip(other.words()).map(|(own, other)| own & !other))
    }

    fn has(&self, port: u16) -> bool {
        self.0[usize::from(port / 64)] >> (port % 64) & 1 == 1
    }

    fn ranges(&self) -> Vec<PortRange> {
        let mut ranges: Vec<PortRange> = Vec::new();
        for port in (0..=u16::MAX).filter(|&port| self.has(port)) {
            match ranges.last_mut() {
                Some(range) if range.max + 1 == port => range.max = port,
                _ => ranges.push(PortRange { min: port, max: port }),
            }
        }
        ranges
    }
}

/// Keeps ports from the kernel's choice: those of translated flows, the usual NodePorts, and what NodePorts there are beside.
#[derive(Debug)]
pub struct Reservation {
    added: ReservedPorts,
    /// Whatever Services there are.
    always: Ports,
    wanted: Ports,
    kept: Ports,
}

impl Reservation {
    /// Keeps the ports of translated flows, the usual NodePorts, and those that are known already.
    pub fn new(mut added: ReservedPorts, snat: PortRange, node_ports: impl Iterator<Item = u16>) -> Self {
        let always = Ports::of_ranges(&[snat, ports::NODE_PORTS]);
        let wanted = always.with(&Ports::of(node_ports));
        let kept = keep(&mut added, &wanted);
        Self { added, always, wanted, kept }
    }

    /// Those that are kept: none when the setting cannot be written.
    pub fn kept(&self) -> &Ports {
        &self.kept
    }

    /// Follows the NodePorts of the Services; whether that has changed what is to be kept.
    pub fn follow(&mut self, node_ports: impl Iterator<Item = u16>) -> bool {
        let wanted = self.always.with(&Ports::of(node_ports));
        let has_changed = wanted != self.wanted;
        if has_changed {
            self.kept = keep(&mut self.added, &wanted);
            self.wanted = wanted;
        }
        has_changed
    }
}

/// Keeps ports, and says which: none when the setting cannot be written, which is a warning.
fn keep(added: &mut ReservedPorts, wanted: &Ports) -> Ports {
    match add(added, wanted) {
        Ok(()) => {
            info!(ports = %wanted, "the kernel gives these ports to no connection of its own (net.ipv4.ip_local_reserved_ports)");
            wanted.clone()
        }
        // In a container that is a matter of course.
        Err(error) if !is_in_reach(wanted) => {
            debug!(%error, "cannot write net.ipv4.ip_local_reserved_ports; the kernel chooses none of these ports anyway");
            Ports::default()
        }
        Err(error) => {
            warn!(
                %error,
                "cannot write net.ipv4.ip_local_reserved_ports; see that net.ipv4.ip_local_port_range stays clear of {wanted}, \
                 or set it on the node to that, or leave it alone by --reserve-ports=false"
            );
            Ports::default()
        }
    }
}

/// Gives back what an earlier agent has reserved: nothing is kept.
pub fn leave_alone(mut added: ReservedPorts) {
    give_back(&mut added);
}

/// Gives back what an agent has reserved; `maps` is where its maps are pinned.
pub fn release(maps: &Path) {
    let mut added = match ReservedPorts::open(maps) {
        Ok(Some(added)) => added,
        Ok(None) => return,
        Err(error) => {
            debug!(%error, "cannot tell which ports were reserved");
            return;
        }
    };
    give_back(&mut added);
}

fn give_back(added: &mut ReservedPorts) {
    if let Err(error) = remove(added) {
        warn!(%error, "cannot take this agent's ports out of net.ipv4.ip_local_reserved_ports");
    }
}

/// Whether the kernel may choose any of the ports as it is set now; so it may when that is unknown.
fn is_in_reach(wanted: &Ports) -> bool {
    ports::ephemeral().map_or(true, |range| (range.min..=range.max).any(|port| wanted.has(port)))
}

fn add(added: &mut ReservedPorts, wanted: &Ports) -> io::Result<()> {
    let (now, before) = (read()?, added.get()?);
    let others = now.without(&before);
    let own = wanted.without(&others);
    // First noted, then done: whatever ends the agent between, nothing is kept that nobody knows of.
    added.set(&own.with(&before))?;
    write(&now, &others.with(wanted))?;
    added.set(&own)
}

fn remove(added: &mut ReservedPorts) -> io::Result<()> {
    let (now, own) = (read()?, added.get()?);
    if own == Ports::default() {
        return Ok(());
    }
    write(&now, &now.without(&own))?;
    added.set(&Ports::default())
}

fn read() -> io::Result<Ports> {
    let text = fs::read_to_string(PATH)?;
    Ports::parse(&text).ok_or_else(|| io::Error::other(format!("cannot understand {PATH}")))
}

fn write(now: &Ports, ports: &Ports) -> io::Result<()> {
    if now == ports {
        return Ok(());
    }
    fs::write(PATH, format!("{ports}\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> Ports {
        Ports::parse(text).expect("ports")
    }

    #[test]
    fn ports_are_read_and_written_as_the_kernel_does() {
        for text in ["", "8080", "1024-29999", "22,80-81,443", "0-65535"] {
            assert_eq!(parsed(text).to_string(), text);
        }
        assert_eq!(parsed("1024-2047,2048\n").to_string(), "1024-2048");
        for bad in ["x", "1-", "70000", "1-2-3"] {
            assert_eq!(Ports::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn what_others_have_reserved_stays_theirs() {
        let (others, wanted) = (parsed("8080,31000-40000"), parsed("1024-32767"));
        let added = wanted.without(&others);
        assert_eq!(added.to_string(), "1024-8079,8081-30999");
        let all = others.with(&wanted);
        assert_eq!(all.to_string(), "1024-40000");
        assert_eq!(all.without(&added), others);
        assert_eq!(Ports::of_words(added.words().iter().copied()), added);
    }
}
