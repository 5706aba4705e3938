//! The process, as Prometheus' client libraries show it, read at each scrape.

use std::{fmt, fs};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric},
    metrics::{MetricType, counter::ConstCounter, gauge::ConstGauge},
};

/// `USER_HZ`, in which /proc counts, on every architecture that there is an agent for.
const TICKS_PER_SECOND: f64 = 100.0;

/// Reads /proc.
#[derive(Debug)]
pub struct Process;

#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Figures {
    cpu_seconds: f64,
    start_time_seconds: f64,
    virtual_bytes: u64,
    resident_bytes: u64,
    threads: u64,
    open_fds: u64,
    max_fds: u64,
}

impl Collector for Process {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let file = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let mut figures = Figures::read(
            &file("/proc/self/stat"),
            &file("/proc/self/status"),
            &file("/proc/self/limits"),
            &file("/proc/stat"),
        );
        figures.open_fds = fs::read_dir("/proc/self/fd").map_or(0, |fds| fds.count() as u64);
        figures.encode(encoder)
    }
}

impl Figures {
    /// Figures that are not there count as zero (proc(5)).
    fn read(stat: &str, status: &str, limits: &str, host: &str) -> Self {
        // The name, in parentheses, may hold anything; the third field follows it.
        let fields: Vec<&str> =
            stat.rsplit_once(')').map(|(_, rest)| rest.split_whitespace().collect()).unwrap_or_default();
        let number = |text: Option<&str>| text.and_then(|text| text.parse::<u64>().ok()).unwrap_or(0);
        let field = |index: usize| number(fields.get(index - 3).copied());
        let boot = value(host, "btime");
        Self {
            cpu_seconds: (field(14) + field(15)) as f64 / TICKS_PER_SECOND,
            start_time_seconds: boot as f64 + field(22) as f64 / TICKS_PER_SECOND,
            virtual_bytes: field(23),
            resident_bytes: value(status, "VmRSS:") * 1024,
            threads: field(20),
            open_fds: 0,
            max_fds: value(limits, "Max open files"),
        }
    }

    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let cpu = encoder.encode_descriptor("cpu_seconds", "CPU time used.", None, MetricType::Counter)?;
        ConstCounter::new(self.cpu_seconds).encode(cpu)?;
        let start = "When the process started, in seconds since 1970.";
        let start = encoder.encode_descriptor("start_time_seconds", start, None, MetricType::Gauge)?;
        ConstGauge::new(self.start_time_seconds).encode(start)?;
        for (name, help, value) in [
            ("virtual_memory_bytes", "Addresses in use.", self.virtual_bytes),
            (
                "resident_memory_bytes",
                "Memory in use, with the maps of the kernel that the agent has in its own.",
                self.resident_bytes,
            ),
            ("threads", "Threads.", self.threads),
            ("open_fds", "Open file descriptors.", self.open_fds),
            ("max_fds", "File descriptors that may be open.", self.max_fds),
        ] {
            let gauge = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
            ConstGauge::new(value as i64).encode(gauge)?;
        }
        Ok(())
    }
}

/// The first number of the line that begins so.
fn value(text: &str, start: &str) -> u64 {
    let line = text.lines().find_map(|line| line.strip_prefix(start));
    line.and_then(|rest| rest.split_whitespace().next()).and_then(|word| word.parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_read_as_the_kernel_writes_them() {
        let stat =
            "42 (a ) name) S 1 42 42 0 -1 4194560 900 0 0 0 250 50 0 0 20 0 9 0 12345 104857600 2000 0";
        let status = "Name:\ta\nVmRSS:\t    8192 kB\n";
        let limits = "Limit  Soft Limit  Hard Limit  Units\nMax open files            1024                 4096  files\n";
        let host = "cpu 1 2 3\nbtime 1700000000\n";
        assert_eq!(
            Figures::read(stat, status, limits, host),
            Figures {
                cpu_seconds: 3.0,
                start_time_seconds: 1_700_000_123.45,
                virtual_bytes: 104_857_600,
                resident_bytes: 8 << 20,
                threads: 9,
                open_fds: 0,
                max_fds: 1024,
            }
        );
        assert_eq!(Figures::read("", "", "", ""), Figures::default());
    }

    #[test]
    fn this_process_has_memory_and_descriptors() {
        let (registries, ..) = crate::metrics::Registries::new();
        let text = registries.encode().expect("text");
        let figure = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name)).expect("a figure");
            line.trim().parse::<f64>().expect("a number")
        };
        assert!(figure("process_resident_memory_bytes ") > 1e6);
        assert!(figure("process_open_fds ") >= 3.0 && figure("process_start_time_seconds ") > 1e9);
    }
}
