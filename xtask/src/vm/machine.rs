//! The machine: what qemu is started with, and how long it may stay silent.

use super::packages;
use super::{Architecture, Guest};
use crate::process;
use anyhow::{Context, Result, bail};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

/// No test is silent for longer, emulated on a busy machine; a guest that is has hung.
const SILENCE_MAX: Duration = Duration::from_secs(600);
/// What all lanes of one guest may take together.
const TOTAL_MAX: Duration = Duration::from_secs(7_200);

/// What a card is connected to its peer by.
#[derive(Clone, Copy)]
enum Cable {
    /// A hub of the emulator, which carries finished frames.
    Hub,
    /// Devices of this machine's kernel with a bridge between them, in a namespace that ends with the emulator: they carry
    /// frames as virtio does, long ones that are to be cut and checksums that are not finished.
    Bridge,
}

/// Network cards of the lane `devices`: each with a peer at the other end of a cable, and nothing of this machine near it.
/// The last two bytes of an address are the number of the cable, and which end of it (1 the card, 2 its peer).
const CARDS: [(&str, Cable); 7] = [
    ("virtio-net-pci,mq=on,vectors=10", Cable::Hub),
    ("virtio-net-pci", Cable::Hub),
    ("e1000", Cable::Hub),
    ("e1000e", Cable::Hub),
    ("igb", Cable::Hub),
    ("vmxnet3", Cable::Hub),
    // It cannot be asked to stop merging frames.
    ("virtio-net-pci,ctrl_guest_offloads=off", Cable::Bridge),
];

/// Starts the emulator, which is what follows, in the namespace that it is in, with the ends of such a cable there.
const PLUGGED: &str = "set -e; ip link add cables type bridge; ip link set cables up; for end in $ENDS; do \
                       ip tuntap add \"$end\" mode tap; ip link set \"$end\" master cables up; done; exec \"$@\"";

/// Finds the emulator of an architecture, or installs its package.
pub(crate) fn emulator(architecture: Architecture) -> Result<PathBuf> {
    let (program, package) = match architecture {
        Architecture::X86 => ("qemu-system-x86_64", "qemu-system-x86"),
        Architecture::Arm | Architecture::Arm16k => ("qemu-system-aarch64", "qemu-system-arm"),
    };
    if let Some(found) = process::on_path(program) {
        return Ok(found);
    }
    if !crate::host::is_root() {
        bail!("no {program} on PATH: install it (`apt-get install {package}` on Debian)");
    }
    packages::install(package)
        .with_context(|| format!("no {program} on PATH, and it cannot be installed"))?;
    process::on_path(program).with_context(|| format!("the package {package} has no {program}"))
}

/// Boots a guest and returns what it has written, with the reason why it did not end by itself, if it did not.
pub(crate) fn run(guest: &Guest) -> Result<(String, Option<String>)> {
    let mut command = command(guest)?;
    process::show(&command);
    let mut child = command.spawn().context("cannot start qemu")?;
    let output = child.stdout.take().context("qemu has no output")?;
    let (lines, received) = mpsc::channel();
    let reader = std::thread::spawn(move || {
        let mut output = BufReader::new(output);
        let mut line = Vec::new();
        while output.read_until(b'\n', &mut line).is_ok_and(|length| length > 0) {
            if lines.send(String::from_utf8_lossy(&line).replace('\r', "")).is_err() {
                break;
            }
            line.clear();
        }
    });
    let mut text = String::new();
    let mut log =
        std::fs::File::create(&guest.log).with_context(|| format!("cannot write {}", guest.log.display()))?;
    let start = Instant::now();
    let problem = loop {
        match received.recv_timeout(SILENCE_MAX) {
            Ok(line) => {
                log.write_all(line.as_bytes())?;
                if line.starts_with("##vm") || line.starts_with("test result") || line.contains("... FAILED")
                {
                    eprint!("vm: {} {line}", guest.name);
                }
                text.push_str(&line);
            }
            Err(RecvTimeoutError::Disconnected) => break None,
            Err(RecvTimeoutError::Timeout) => break Some(format!("silent for {} s", SILENCE_MAX.as_secs())),
        }
        if start.elapsed() > TOTAL_MAX {
            break Some(format!("not over after {} s", TOTAL_MAX.as_secs()));
        }
    };
    end(&mut child, problem.is_some())?;
    // It ends with the output, which has ended.
    let _ = reader.join();
    Ok((text, problem))
}

fn end(child: &mut Child, by_force: bool) -> Result<()> {
    if by_force {
        child.kill().context("cannot end qemu")?;
    }
    child.wait().context("cannot wait for qemu")?;
    Ok(())
}

fn command(guest: &Guest) -> Result<Command> {
    let emulator = emulator(guest.architecture)?;
    let mut command = Command::new("unshare");
    // Who is not root is so in there.
    command.arg("--net").args((!crate::host::is_root()).then_some("--map-root-user"));
    command.args(["sh", "-c", PLUGGED, "sh"]).arg(emulator);
    command.args(["-accel", "tcg,thread=multi", "-smp", "2", "-m", "3G", "-nodefaults"]);
    command.args(["-no-user-config", "-display", "none", "-serial", "stdio", "-no-reboot"]);
    let console = match guest.architecture {
        Architecture::X86 => {
            // Byte by byte is what a processor does best and its emulation worst: without these the kernel copies words.
            command.args(["-M", "q35", "-cpu", "max,-erms,-fsrm"]);
            "console=ttyS0 mitigations=off"
        }
        Architecture::Arm => {
            command.args(["-M", "virt,gic-version=3", "-cpu", "cortex-a72"]);
            "console=ttyAMA0"
        }
        // The older one has no pages of 16 KiB.
        Architecture::Arm16k => {
            command.args(["-M", "virt,gic-version=3", "-cpu", "cortex-a76"]);
            "console=ttyAMA0"
        }
    };
    // Level 1: a panic is shown, and no message of the kernel lands within a line of a lane.
    command.args(["-append", &format!("{console} panic=-1 quiet loglevel=1")]);
    command.arg("-kernel").arg(&guest.kernel).arg("-initrd").arg(&guest.initrd);
    if guest.has_cards {
        let mut ends = String::new();
        for (number, (card, cable)) in CARDS.iter().enumerate() {
            for (end, device) in [(1, *card), (2, "virtio-net-pci")] {
                let id = format!("cable{number}end{end}");
                let netdev = match cable {
                    Cable::Hub => format!("hubport,id={id},hubid={number}"),
                    Cable::Bridge => {
                        ends.push_str(&format!(" {id}"));
                        format!("tap,id={id},ifname={id},script=no,downscript=no")
                    }
                };
                command.args(["-netdev", &netdev]);
                let mac = format!("52:54:00:00:{number:02x}:{end:02x}");
                command.args(["-device", &format!("{device},netdev={id},mac={mac},romfile=")]);
            }
        }
        command.env("ENDS", ends);
    }
    command.stdin(Stdio::null()).stdout(Stdio::piped());
    Ok(command)
}

/// Where the guests' consoles are kept.
pub(crate) fn logs(target: &Path) -> Result<PathBuf> {
    let directory = target.join("vm");
    std::fs::create_dir_all(&directory).with_context(|| format!("cannot create {}", directory.display()))?;
    Ok(directory)
}
