//! The architectures that are released, and what each is called where.

use anyhow::{Context, Result};

/// An architecture of nodes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Arch {
    Amd64,
    Arm64,
}

pub(crate) const ARCHS: [Arch; 2] = [Arch::Amd64, Arch::Arm64];

impl Arch {
    /// As Kubernetes, OCI and Debian name it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Amd64 => "amd64",
            Self::Arm64 => "arm64",
        }
    }

    /// As rustc and the kernel name it.
    pub(crate) fn machine(self) -> &'static str {
        match self {
            Self::Amd64 => "x86_64",
            Self::Arm64 => "aarch64",
        }
    }

    /// Rust's target. With glibc, linked statically: its allocator is several times as fast as musl's where threads
    /// share it, and Debian's compiler has no other.
    pub(crate) fn target(self) -> String {
        format!("{}-unknown-linux-gnu", self.machine())
    }

    /// What loads its programs that are linked to shared libraries.
    pub(crate) fn loader(self) -> &'static str {
        match self {
            Self::Amd64 => "lib64/ld-linux-x86-64.so.2",
            Self::Arm64 => "lib/ld-linux-aarch64.so.1",
        }
    }

    /// The C compiler that links for it.
    pub(crate) fn linker(self) -> String {
        if self.is_here() { "cc".to_owned() } else { format!("{}-linux-gnu-gcc", self.machine()) }
    }

    /// Debian's packages with that compiler and the C library to link with.
    pub(crate) fn linker_packages(self) -> [String; 2] {
        if self.is_here() {
            return ["gcc".to_owned(), "libc6-dev".to_owned()];
        }
        let compiler = format!("gcc-{}-linux-gnu", self.machine().replace('_', "-"));
        [compiler, format!("libc6-dev-{}-cross", self.name())]
    }

    /// Reads a name, as OCI or as the kernel has it.
    pub(crate) fn parse(name: &str) -> Result<Self> {
        let known = ARCHS.into_iter().find(|arch| arch.name() == name || arch.machine() == name);
        known.with_context(|| {
            format!("no architecture `{name}`; there are {}", ARCHS.map(Self::name).join(", "))
        })
    }

    /// The architecture of this machine.
    pub(crate) fn here() -> Result<Self> {
        Self::parse(std::env::consts::ARCH)
    }

    /// The one that this machine is not.
    pub(crate) fn other() -> Result<Self> {
        Ok(match Self::here()? {
            Self::Amd64 => Self::Arm64,
            Self::Arm64 => Self::Amd64,
        })
    }

    fn is_here(self) -> bool {
        self.machine() == std::env::consts::ARCH
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_architecture_is_known_by_both_its_names() {
        for arch in ARCHS {
            assert_eq!(Arch::parse(arch.name()).unwrap(), arch);
            assert_eq!(Arch::parse(arch.machine()).unwrap(), arch);
        }
        assert!(Arch::parse("riscv64").unwrap_err().to_string().contains("amd64, arm64"));
    }

    #[test]
    fn the_cross_compiler_of_debian_links_for_the_other_architecture() {
        let other = Arch::other().unwrap();
        assert!(other.linker().ends_with("-linux-gnu-gcc"));
        let packages = [
            ["gcc-x86-64-linux-gnu", "libc6-dev-amd64-cross"],
            ["gcc-aarch64-linux-gnu", "libc6-dev-arm64-cross"],
        ];
        assert!(packages.iter().any(|known| other.linker_packages() == *known));
    }
}
