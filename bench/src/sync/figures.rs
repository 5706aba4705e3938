//! What a row of the table is made of.

use std::{
    fs, thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

/// Time between two looks at the kernel's memory.
const SETTLE_PAUSE: Duration = Duration::from_millis(200);
/// Memory that stands still differs by less than this between two looks; other processes use some of it too.
const SETTLED_MIB: f64 = 0.5;
/// On a busy machine it never stands still.
const SETTLE_LIMIT: Duration = Duration::from_secs(10);

/// Figures of one contestant at one size; what does not apply is absent.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct Row {
    /// The contestant and its version.
    pub(super) name: String,
    /// Everything loaded, in milliseconds; absent when it took too long.
    pub(super) load_ms: Option<f64>,
    /// One endpoint replaced, in milliseconds, each time it was measured, ascending.
    pub(super) changes_ms: Vec<f64>,
    /// Memory of the process in MiB at its peak.
    pub(super) process_mib: Option<f64>,
    /// Growth of the kernel's memory in MiB, of the whole machine.
    pub(super) kernel_mib: Option<f64>,
    /// Further figures, printed below the table.
    pub(super) notes: Vec<String>,
}

impl Row {
    pub(super) fn set_changes(&mut self, times: &[Duration]) {
        self.changes_ms = times.iter().copied().map(milliseconds).collect();
        self.changes_ms.sort_by(f64::total_cmp);
    }

    /// The value below which a share of the changes lies, by nearest rank.
    pub(super) fn percentile(&self, share: f64) -> Option<f64> {
        percentile(&self.changes_ms, share)
    }
}

fn percentile(ascending: &[f64], share: f64) -> Option<f64> {
    let rank = (share * ascending.len() as f64).ceil() as usize;
    ascending.get(rank.saturating_sub(1)).copied()
}

pub(super) fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// Memory of the kernel that rules and maps live in, in MiB: slabs, vmalloc and per-CPU areas of the whole machine, for
/// neither rules nor maps are charged to a process. Waits until it stands still, because the kernel gives back later.
pub(super) fn kernel_mib() -> Result<f64> {
    let end = Instant::now() + SETTLE_LIMIT;
    let mut before = kernel_mib_now()?;
    loop {
        thread::sleep(SETTLE_PAUSE);
        let now = kernel_mib_now()?;
        if (now - before).abs() < SETTLED_MIB || Instant::now() > end {
            return Ok(now);
        }
        before = now;
    }
}

fn kernel_mib_now() -> Result<f64> {
    let fields = ["Slab", "VmallocUsed", "Percpu"];
    fields.iter().map(|field| kib("/proc/meminfo", field)).sum::<Result<f64>>().map(|kib| kib / 1024.0)
}

/// A field of `/proc/PID/status` in MiB.
pub(super) fn status_mib(process: &str, field: &str) -> Result<f64> {
    Ok(kib(&format!("/proc/{process}/status"), field)? / 1024.0)
}

fn kib(path: &str, field: &str) -> Result<f64> {
    let text = fs::read_to_string(path).with_context(|| format!("cannot read {path}"))?;
    let value = text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
    let value = value.with_context(|| format!("{path} has no {field}"))?;
    let (number, unit) =
        value.trim().split_once(' ').with_context(|| format!("{path}: {field} is no size"))?;
    ensure!(unit == "kB", "{path}: {field} is in {unit}, not in kB");
    Ok(number.parse()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_values_that_were_measured() {
        let times: Vec<f64> = (1..=200).map(f64::from).collect();
        assert_eq!(percentile(&times, 0.5), Some(100.0));
        assert_eq!(percentile(&times, 0.99), Some(198.0));
        assert_eq!(percentile(&times, 1.0), Some(200.0));
        assert_eq!(percentile(&times[..20], 0.99), Some(20.0));
        assert_eq!(percentile(&[], 0.5), None);
    }
}
