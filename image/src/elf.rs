//! What has to be true of a program that runs where there is nothing else.

use anyhow::{Result, bail};

/// `EI_CLASS` and `EI_DATA` of 64 bits, little-endian.
const CLASS_AND_DATA: [u8; 2] = [2, 1];
/// `PT_INTERP`: the program asks for a dynamic loader.
const INTERPRETER: u32 = 3;
/// Sizes and places of the fields below: `Elf64_Ehdr` and `Elf64_Phdr` of elf(5).
const PROGRAM_HEADER_BYTES: usize = 56;

/// Fails unless the program is for the architecture and linked statically.
pub fn runs_alone(program: &[u8], arch: &str) -> Result<()> {
    let machine = match arch {
        "amd64" => 62_u16,
        "arm64" => 183,
        other => bail!("no architecture `{other}` is known here"),
    };
    if program.get(..4) != Some(b"\x7fELF") || program.get(4..6) != Some(&CLASS_AND_DATA) {
        bail!("not an ELF program of 64 bits");
    }
    if field(program, 18)? != machine.to_le_bytes() {
        bail!("not a program for {arch}");
    }
    let headers = usize::try_from(u64::from_le_bytes(field(program, 32)?))?;
    for header in 0..usize::from(u16::from_le_bytes(field(program, 56)?)) {
        let kind = u32::from_le_bytes(field(program, headers.saturating_add(header * PROGRAM_HEADER_BYTES))?);
        if kind == INTERPRETER {
            bail!(
                "linked dynamically: the image has no loader and no libraries; `cargo xtask dist` links statically"
            );
        }
    }
    Ok(())
}

fn field<const N: usize>(program: &[u8], at: usize) -> Result<[u8; N]> {
    match program.get(at..).and_then(|rest| rest.first_chunk()) {
        Some(bytes) => Ok(*bytes),
        None => bail!("the ELF program is cut short"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The headers of a program with one segment of the kind.
    fn program(machine: u16, segment: u32) -> Vec<u8> {
        let mut bytes = vec![0; 64 + PROGRAM_HEADER_BYTES];
        bytes[..6].copy_from_slice(b"\x7fELF\x02\x01");
        bytes[18..20].copy_from_slice(&machine.to_le_bytes());
        bytes[32..40].copy_from_slice(&64_u64.to_le_bytes());
        bytes[56..58].copy_from_slice(&1_u16.to_le_bytes());
        bytes[64..68].copy_from_slice(&segment.to_le_bytes());
        bytes
    }

    #[test]
    fn a_static_program_of_its_architecture_passes() {
        runs_alone(&program(62, 1), "amd64").unwrap();
        runs_alone(&program(183, 1), "arm64").unwrap();
    }

    #[test]
    fn what_would_not_start_in_an_empty_image_is_refused() {
        for (bytes, arch, says) in [
            (program(183, 1), "amd64", "not a program for amd64"),
            (program(62, 3), "amd64", "linked dynamically"),
            (program(62, 1)[..70].to_vec(), "amd64", ""),
            (program(62, 1)[..60].to_vec(), "amd64", "cut short"),
            (b"#!/bin/sh\n".to_vec(), "amd64", "not an ELF program"),
            (program(62, 1), "riscv64", "riscv64"),
        ] {
            match runs_alone(&bytes, arch) {
                Ok(()) => assert_eq!(says, "", "{arch}"),
                Err(error) => assert!(!says.is_empty() && error.to_string().contains(says), "{error}"),
            }
        }
    }

    #[test]
    fn the_tests_own_program_needs_its_libraries() {
        let own = std::fs::read(std::env::current_exe().unwrap()).unwrap();
        let arch = if cfg!(target_arch = "x86_64") { "amd64" } else { "arm64" };
        assert!(runs_alone(&own, arch).unwrap_err().to_string().contains("linked dynamically"));
    }
}
