//! The guest's whole file system: an archive in the form the kernel unpacks (cpio, "newc").

use anyhow::{Context, Result};
use std::collections::BTreeSet;
use std::path::{Component, Path};

const DIRECTORY: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;
const DEVICE: u32 = 0o020_600;
const SYMLINK: u32 = 0o120_777;

/// An archive in the making; several, one after another, unpack as one.
#[derive(Default)]
pub(crate) struct Initramfs {
    bytes: Vec<u8>,
    directories: BTreeSet<String>,
}

impl Initramfs {
    /// Adds a file that may be executed, and the directories above it.
    pub(crate) fn file(&mut self, path: &str, content: &[u8]) {
        self.parents(path);
        self.entry(path, PROGRAM, content, (0, 0));
    }

    /// Adds a copy of a file.
    pub(crate) fn copy(&mut self, path: &str, from: &Path) -> Result<()> {
        let content = std::fs::read(from).with_context(|| format!("cannot read {}", from.display()))?;
        self.file(path, &content);
        Ok(())
    }

    /// Adds a directory and those above it.
    pub(crate) fn directory(&mut self, path: &str) {
        self.parents(&format!("{path}/."));
    }

    /// Adds a link to another path.
    pub(crate) fn symlink(&mut self, path: &str, to: &str) {
        self.parents(path);
        self.entry(path, SYMLINK, to.as_bytes(), (0, 0));
    }

    /// Adds a character device.
    pub(crate) fn device(&mut self, path: &str, major: u32, minor: u32) {
        self.parents(path);
        self.entry(path, DEVICE, &[], (major, minor));
    }

    /// The finished archive.
    pub(crate) fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, &[], (0, 0));
        self.bytes
    }

    fn parents(&mut self, path: &str) {
        let mut above = String::new();
        let parts = Path::new(path).parent().into_iter().flat_map(Path::components);
        for part in parts.filter(|part| matches!(part, Component::Normal(_))) {
            if !above.is_empty() {
                above.push('/');
            }
            above.push_str(&part.as_os_str().to_string_lossy());
            if self.directories.insert(above.clone()) {
                self.entry(&above.clone(), DIRECTORY, &[], (0, 0));
            }
        }
    }

    fn entry(&mut self, path: &str, mode: u32, content: &[u8], device: (u32, u32)) {
        let path = path.trim_start_matches('/');
        // Number of the file, mode, owner, group, links, time, length, device, device of a device file, length of the
        // name with its end, checksum (unused in this form).
        let number = self.bytes.len() as u32;
        let numbers = [
            number,
            mode,
            0,
            0,
            1,
            0,
            content.len() as u32,
            0,
            0,
            device.0,
            device.1,
            path.len() as u32 + 1,
            0,
        ];
        self.bytes.extend_from_slice(b"070701");
        for number in numbers {
            self.bytes.extend_from_slice(format!("{number:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(path.as_bytes());
        self.bytes.push(0);
        self.align();
        self.bytes.extend_from_slice(content);
        self.align();
    }

    fn align(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_archive_holds_directories_before_what_is_in_them() {
        let mut archive = Initramfs::default();
        archive.file("/a/b/file", b"12345");
        archive.file("a/b/other", b"");
        let bytes = archive.finish();
        let at = |name: &str| bytes.windows(name.len()).position(|window| window == name.as_bytes());
        let order =
            [at("a\0"), at("a/b\0"), at("a/b/file\0"), at("12345"), at("a/b/other\0"), at("TRAILER!!!\0")];
        assert!(order.iter().all(Option::is_some) && order.is_sorted(), "{order:?}");
        assert_eq!(bytes.len() % 4, 0);
        assert_eq!(bytes.windows(6).filter(|window| window == b"070701").count(), 5);
        // The second number of the first header, after the magic.
        assert_eq!(&bytes[6 + 8..6 + 16], format!("{DIRECTORY:08x}").as_bytes());
    }
}
