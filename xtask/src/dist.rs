//! `dist`: static binaries of the agent for every architecture, with checksums, the same from every build of a commit.

mod check;

use crate::arch::{ARCHS, Arch};
use crate::build;
use crate::cross::{self, Cross};
use crate::process;
use crate::remap;
use crate::setup;
use crate::workspace::Workspace;
use anyhow::{Context, Result, bail};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// The checksums, in the form of `sha256sum --check`.
pub(crate) const CHECKSUMS: &str = "SHA256SUMS";

/// Ends the revision of a tree with changes of its own.
const DIRTY: &str = "-dirty";

/// What a build is made from.
pub(crate) struct Commit {
    /// The full hash, with a mark when the tree differs from it.
    pub(crate) revision: String,
    /// Seconds since 1970: the time of everything that bears one.
    pub(crate) epoch: String,
}

pub(crate) fn verb(workspace: &Workspace, args: &[String]) -> Result<()> {
    let (mut archs, mut check) = (Vec::new(), false);
    let mut args = args.iter();
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--arch" => {
                archs.push(Arch::parse(args.next().context("`--arch` needs a name, such as `arm64`")?)?)
            }
            "--check" => check = true,
            other => bail!("`dist` does not know `{other}`; it takes --arch NAME and --check"),
        }
    }
    if archs.is_empty() {
        archs = ARCHS.to_vec();
    }
    if check {
        return check::verb(workspace, &archs);
    }
    for file in binaries(workspace, &archs)? {
        println!("{}", file.display());
    }
    Ok(())
}

/// Builds the binaries and their checksums; returns the files.
pub(crate) fn binaries(workspace: &Workspace, archs: &[Arch]) -> Result<Vec<PathBuf>> {
    let commit = Commit::of(workspace)?;
    let cross = cross::ensure(archs)?;
    build::bpf_objects(workspace, &setup::ensure()?, None)?;
    let directory = workspace.dist();
    std::fs::create_dir_all(&directory).with_context(|| format!("cannot create {}", directory.display()))?;
    let mut files = Vec::new();
    for &arch in archs {
        let built = agent(workspace, &cross, arch, &commit)?;
        let file = binary(workspace, arch);
        std::fs::copy(&built, &file).with_context(|| format!("cannot write {}", file.display()))?;
        files.push(file);
    }
    files.push(checksums(&directory, &files)?);
    Ok(files)
}

/// Where the binary of an architecture is put.
pub(crate) fn binary(workspace: &Workspace, arch: Arch) -> PathBuf {
    workspace.dist().join(format!("xdp-agent-linux-{}", arch.name()))
}

impl Commit {
    /// The commit that is checked out.
    pub(crate) fn of(workspace: &Workspace) -> Result<Self> {
        let git = |args: &[&str]| {
            process::output(Command::new("git").current_dir(&workspace.root).args(args))
                .map(|answer| answer.trim().to_owned())
                .with_context(|| format!("`git {}` fails: a release is built from a clone", args.join(" ")))
        };
        let mut revision = git(&["rev-parse", "HEAD"])?;
        if !git(&["status", "--porcelain"])?.is_empty() {
            eprintln!("dist: the tree has changes that are not committed; the revision says so");
            revision.push_str(DIRTY);
        }
        Ok(Self { revision, epoch: git(&["log", "-1", "--format=%ct"])? })
    }

    /// The hash alone.
    pub(crate) fn hash(&self) -> &str {
        self.revision.trim_end_matches(DIRTY)
    }

    /// Whether the tree differs from the commit.
    pub(crate) fn is_dirty(&self) -> bool {
        self.revision.ends_with(DIRTY)
    }
}

fn agent(workspace: &Workspace, cross: &Cross, arch: Arch, commit: &Commit) -> Result<PathBuf> {
    let target = arch.target();
    let build = workspace.dist_build(&cross.release);
    let mut command = process::cargo_compile(workspace);
    command.args(["build", "--release", "--locked", "--package", "xdp-agent"]);
    command.env("XDP_AGENT_REVISION", &commit.revision).env("SOURCE_DATE_EPOCH", &commit.epoch);
    process::run(released(&mut command, workspace, cross, arch))?;
    Ok(build.join(target).join("release/xdp-agent"))
}

/// Makes a cargo call, whose verb is there, one that compiles as released binaries of an architecture are compiled.
pub(crate) fn released<'a>(
    command: &'a mut Command,
    workspace: &Workspace,
    cross: &Cross,
    arch: Arch,
) -> &'a mut Command {
    let target = arch.target();
    let build = workspace.dist_build(&cross.release);
    let mut flags = remap::flags(workspace, &cross.sysroot, &build);
    flags.push(format!("--sysroot={}", cross.sysroot.display()));
    flags.push("-Ctarget-feature=+crt-static".to_owned());
    let variable = target.to_uppercase().replace('-', "_");
    command
        .args(["--target", &target])
        .env("CARGO_TARGET_DIR", &build)
        .env("RUSTC", &cross.rustc)
        // By the target flag they are for the agent alone, and not for what runs while it is built.
        .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\u{1f}"))
        .env(format!("CARGO_TARGET_{variable}_LINKER"), arch.linker())
        .env(
            format!("CFLAGS_{}", target.replace('-', "_")),
            remap::c_flags(workspace, &cross.sysroot, &build).join(" "),
        )
        .env_remove("RUSTFLAGS")
        .env_remove("RUSTC_WRAPPER")
}

/// Writes the checksums of files, by the program that checks them.
pub(crate) fn checksums(directory: &Path, files: &[PathBuf]) -> Result<PathBuf> {
    let mut command = Command::new("sha256sum");
    command.current_dir(directory).stderr(Stdio::inherit()).arg("--");
    for file in files {
        command.arg(file.file_name().context("a file has a name")?);
    }
    let sums = process::output(&mut command).context("sha256sum fails on what was built")?;
    let file = directory.join(CHECKSUMS);
    std::fs::write(&file, sums).with_context(|| format!("cannot write {}", file.display()))?;
    Ok(file)
}
