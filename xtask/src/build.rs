//! `build`: the BPF objects, then the agent that embeds them.

use crate::compiler::{BPF_TARGET, Core};
use crate::process;
use crate::remap;
use crate::setup::{self, Toolchain};
use crate::stack::{self, STACK_MAX, Used};
use crate::workspace::{Profile, Workspace};
use anyhow::{Context, Result, bail, ensure};
use std::path::{Path, PathBuf};

/// What rustc is told when it compiles the kernel programs, besides the linker and the path prefixes.
const BPF_RUSTC_FLAGS: &[&str] = &["-C", "debuginfo=2", "-C", "link-arg=--btf", "-C", "target-cpu=v3"];

/// The BPF build's profile, set apart from the host's: bpf-linker optimises the whole program itself, and BTF is made
/// from debug information that must not be stripped before.
const BPF_PROFILE: [(&str, &str); 5] = [
    ("CARGO_PROFILE_RELEASE_LTO", "off"),
    ("CARGO_PROFILE_RELEASE_OPT_LEVEL", "3"),
    ("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "1"),
    ("CARGO_PROFILE_RELEASE_STRIP", "none"),
    ("CARGO_PROFILE_RELEASE_PANIC", "abort"),
];

/// The binaries of the kernel crate: the product's programs, and those of the lab and the benches.
const BPF_OBJECTS: [&str; 2] = ["xdp-ebpf", "xdp-lab"];

pub(crate) fn verb(workspace: &Workspace, args: &[String]) -> Result<()> {
    let mut profile = Profile::Release;
    let mut features = None;
    let mut args = args.iter();
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--debug" => profile = Profile::Debug,
            "--release" => profile = Profile::Release,
            "--features" => {
                features = Some(args.next().context("`--features` needs a list, such as `trace`")?)
            }
            other => bail!("`build` does not know `{other}`; it takes --debug and --features LIST"),
        }
    }
    let features = features.map(String::as_str);
    bpf_objects(workspace, &setup::ensure()?, features)?;
    let agent = agent(workspace, profile, features)?;
    println!("{}", agent.display());
    Ok(())
}

/// Sets up and builds what running the agent takes; returns the agent.
pub(crate) fn release_agent(workspace: &Workspace) -> Result<PathBuf> {
    bpf_objects(workspace, &setup::ensure()?, None)?;
    agent(workspace, Profile::Release, None)
}

/// Builds one binary of the default members.
///
/// No `-p`: cargo unifies features over the selected packages, so naming one package would compile shared dependencies
/// once more with fewer features than the test lanes, which select all default members too.
pub(crate) fn binary(workspace: &Workspace, name: &str) -> Result<PathBuf> {
    host_binary(workspace, Profile::Release, name, None)
}

fn agent(workspace: &Workspace, profile: Profile, features: Option<&str>) -> Result<PathBuf> {
    host_binary(workspace, profile, "xdp-agent", features)
}

fn host_binary(
    workspace: &Workspace,
    profile: Profile,
    name: &str,
    features: Option<&str>,
) -> Result<PathBuf> {
    let mut command = process::cargo_compile(workspace);
    command.arg("build").args(profile.flags()).args(["--bin", name]);
    if let Some(features) = features {
        let of_package: Vec<_> = features.split(',').map(|feature| format!("{name}/{feature}")).collect();
        command.arg("--features").arg(of_package.join(","));
    }
    process::run(&mut command)?;
    Ok(workspace.binary(profile, name))
}

/// Builds the objects that the agent embeds.
pub(crate) fn bpf_objects(
    workspace: &Workspace,
    toolchain: &Toolchain,
    features: Option<&str>,
) -> Result<()> {
    let compiler = &toolchain.compiler;
    let mut command = process::cargo_compile_by(&compiler.cargo());
    command
        .current_dir(&workspace.root)
        .env("CARGO_TARGET_DIR", workspace.bpf_build())
        .env("RUSTC", &compiler.rustc)
        // Both the target and build-std are unstable; this lets a stable compiler have them.
        .env("RUSTC_BOOTSTRAP", "1")
        .env("CARGO_ENCODED_RUSTFLAGS", rustc_flags(workspace, toolchain).join("\u{1f}"))
        .envs(BPF_PROFILE)
        .env_remove("RUSTFLAGS")
        .env_remove("RUSTC_WRAPPER")
        .args(["build", "--release", "--target", BPF_TARGET, "--package", "xdp-ebpf"]);
    if compiler.core == Core::FromSource {
        command.args(["-Z", "build-std=core"]);
    }
    if let Some(features) = features {
        command.args(["--features", features]);
    }
    if let Some(llvm) = compiler.llvm() {
        command.env("LD_LIBRARY_PATH", llvm_directory(workspace, &llvm)?);
    }
    process::run(&mut command)?;
    let built = workspace.bpf_build().join(BPF_TARGET).join("release");
    for object in BPF_OBJECTS {
        // With further features they are for the machine that builds them.
        if features.is_none() {
            check_programs(&built.join(object))?;
        }
        copy_if_changed(&built.join(object), &workspace.bpf_objects().join(object))?;
    }
    Ok(())
}

/// Fails when a program of the object takes more stack than every supported kernel grants, or jumps where it is not told.
fn check_programs(object: &Path) -> Result<()> {
    for Used { program, bytes, chain, loose_tail_calls } in stack::used(object)? {
        ensure!(
            bytes <= STACK_MAX,
            "{program} takes {bytes} bytes of stack and kernels before 6.8 grant {STACK_MAX}; the longest chain of calls:\n  {}",
            chain.join("\n  ")
        );
        ensure!(
            loose_tail_calls == 0,
            "{program} has {loose_tail_calls} tail calls with the slot in a register"
        );
    }
    Ok(())
}

/// The flags, with every path of this machine mapped away: objects are the same wherever they are built.
fn rustc_flags(workspace: &Workspace, toolchain: &Toolchain) -> Vec<String> {
    let mut flags: Vec<String> = BPF_RUSTC_FLAGS.iter().map(|&flag| flag.to_owned()).collect();
    flags.push(format!("-Clinker={}", toolchain.linker.display()));
    flags.extend(remap::flags(workspace, &toolchain.compiler.sysroot, &workspace.bpf_build()));
    flags
}

/// A directory that holds the compiler's LLVM and nothing else.
///
/// bpf-linker loads the first file called libLLVM* that it meets in LD_LIBRARY_PATH, in whatever order the directory
/// lists them; a machine with several LLVMs would get one that cannot read this compiler's bitcode.
fn llvm_directory(workspace: &Workspace, llvm: &Path) -> Result<PathBuf> {
    let directory = workspace.bpf_build().join("llvm");
    let link = directory.join("libLLVM-of-rustc.so");
    if std::fs::read_link(&link).is_ok_and(|to| to == llvm) {
        return Ok(directory);
    }
    std::fs::create_dir_all(&directory)?;
    match std::fs::remove_file(&link) {
        Ok(()) => {}
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => return Err(error).with_context(|| format!("cannot replace {}", link.display())),
    }
    std::os::unix::fs::symlink(llvm, &link).with_context(|| format!("cannot create {}", link.display()))?;
    Ok(directory)
}

/// Leaves the copy and its time alone when the bytes are the same, so that the agent is not built again.
fn copy_if_changed(from: &Path, to: &Path) -> Result<()> {
    let new =
        std::fs::read(from).with_context(|| format!("the build left no object at {}", from.display()))?;
    if std::fs::read(to).is_ok_and(|old| old == new) {
        return Ok(());
    }
    let directory = to.parent().context("an object needs a directory")?;
    std::fs::create_dir_all(directory).with_context(|| format!("cannot create {}", directory.display()))?;
    std::fs::write(to, new).with_context(|| format!("cannot write {}", to.display()))
}
