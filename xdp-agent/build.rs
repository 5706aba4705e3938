//! Puts the BPF object where the agent embeds it from, or an empty file where there is none.

use std::{
    env, fs,
    path::{Path, PathBuf},
};

const OBJECT: &str = "xdp-ebpf";

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-env-changed=XDP_AGENT_BPF_DIR");
    println!("cargo::rerun-if-env-changed=XDP_AGENT_REVISION");
    // Only released binaries name their commit: others would be built again at every one.
    let revision = env::var("XDP_AGENT_REVISION").unwrap_or_else(|_| "unknown".to_owned());
    println!("cargo::rustc-env=XDP_AGENT_REVISION={revision}");
    let out_dir = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let bpf_dir = match env::var_os("XDP_AGENT_BPF_DIR") {
        Some(dir) => PathBuf::from(dir),
        None => target_dir(&out_dir).join("bpf"),
    };
    let object = bpf_dir.join(OBJECT);
    let embedded = out_dir.join(OBJECT);
    if object.is_file() {
        println!("cargo::rerun-if-changed={}", object.display());
        if let Err(error) = fs::copy(&object, &embedded) {
            panic!("cannot copy the BPF object {}: {error}", object.display());
        }
        return;
    }
    // Cargo runs the script at every build while a watched path is missing; an empty directory that exists is quiet
    // and changes when the object appears in it.
    let watched = if fs::create_dir_all(&bpf_dir).is_ok() { bpf_dir.as_path() } else { object.as_path() };
    println!("cargo::rerun-if-changed={}", watched.display());
    println!(
        "cargo::warning=no BPF object at {}: this xdp-agent will not run; build it with `cargo xtask build`",
        object.display()
    );
    if let Err(error) = fs::write(&embedded, []) {
        panic!("cannot write {}: {error}", embedded.display());
    }
}

/// The target directory: the one above `OUT_DIR` that cargo has marked as its cache, whatever flag or variable chose it.
fn target_dir(out_dir: &Path) -> PathBuf {
    let marked = out_dir.ancestors().find(|dir| dir.join("CACHEDIR.TAG").is_file());
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the crate is in a workspace");
    marked.map_or_else(|| workspace.join("target"), Path::to_path_buf)
}
