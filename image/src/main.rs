//! Makes the image of a release, as `cargo xtask image` calls it.

use anyhow::{Context, Result, bail};
use clap::Parser;
use std::path::{Path, PathBuf};
use std::process::Command;
use xdp_agent_image::image::{self, Half};
use xdp_agent_image::layout::{Layout, descriptors};
use xdp_agent_image::sbom::{self, Library};
use xdp_agent_image::{Release, elf, push};

/// What a release of the agent becomes on its way to nodes.
#[derive(Debug, Parser)]
struct Cli {
    /// The repository that the binaries were built from.
    #[arg(long)]
    repository: PathBuf,
    /// Where the binaries are, and bills of materials go.
    #[arg(long)]
    dist: PathBuf,
    /// An architecture, as OCI names it, and the release of Rust and of the C library linked into its binary.
    #[arg(long = "half", value_name = "ARCH,RUST,GLIBC", required = true)]
    halves: Vec<String>,
    /// The commit.
    #[arg(long)]
    revision: String,
    /// Its time, in seconds since 1970.
    #[arg(long)]
    epoch: i64,
    /// Where the layout goes.
    #[arg(long)]
    layout: PathBuf,
    /// Where the image goes then, as REGISTRY/NAME:TAG.
    #[arg(long)]
    push: Option<String>,
}

fn main() -> Result<()> {
    let cli = Cli::parse();
    let release =
        Release { revision: cli.revision.clone(), created: jiff::Timestamp::from_second(cli.epoch)? };
    let mut halves = Vec::new();
    for half in &cli.halves {
        halves.push(read_half(&cli, &release, half)?);
    }
    let layout = Layout::create(&cli.layout)?;
    let index = image::write(&layout, &release, &halves)?;
    report(&layout)?;
    println!("{}  {}@{}", cli.layout.display(), xdp_agent_image::NAME, index.digest);
    let Some(to) = &cli.push else { return Ok(()) };
    let auth = push::credentials(to)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let digest = runtime.block_on(push::push(&layout, to, &auth))?;
    println!("pushed {to}@{digest}");
    Ok(())
}

fn read_half(cli: &Cli, release: &Release, half: &str) -> Result<Half> {
    let [arch, rust, glibc] = half.split(',').collect::<Vec<_>>()[..] else {
        bail!("`{half}` does not name an architecture, a release of Rust and one of glibc");
    };
    let file = cli.dist.join(format!("xdp-agent-linux-{arch}"));
    let program = std::fs::read(&file)
        .with_context(|| format!("cannot read {}: `cargo xtask dist` makes it", file.display()))?;
    elf::runs_alone(&program, arch).with_context(|| format!("{} cannot be in an image", file.display()))?;
    let machine = if arch == "arm64" { "aarch64" } else { "x86_64" };
    let trees = [
        tree(&cli.repository, "xdp-agent", &format!("{machine}-unknown-linux-gnu"))?,
        tree(&cli.repository, "xdp-ebpf", "bpfel-unknown-none")?,
    ];
    let lock =
        std::fs::read_to_string(cli.repository.join("Cargo.lock")).context("cannot read Cargo.lock")?;
    let library = |name: &str, version: &str, licence: &str| Library {
        name: name.to_owned(),
        version: version.to_owned(),
        licence: licence.to_owned(),
    };
    let added = [library("rust", rust, "MIT OR Apache-2.0"), library("glibc", glibc, "LGPL-2.1-or-later")];
    let document = sbom::document(release, arch, &[&trees[0], &trees[1]], &lock, &added)?;
    let sbom = serde_json::to_vec(&document)?;
    let beside = file.with_added_extension("cdx.json");
    std::fs::write(&beside, &sbom).with_context(|| format!("cannot write {}", beside.display()))?;
    Ok(Half { arch: arch.to_owned(), program, sbom })
}

/// What cargo links into a package.
fn tree(repository: &Path, package: &str, target: &str) -> Result<String> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo)
        .current_dir(repository)
        .args(["tree", "--package", package, "--target", target])
        .args(sbom::TREE_ARGUMENTS)
        .output()
        .context("cannot start cargo")?;
    if !output.status.success() {
        bail!("`cargo tree --package {package}` fails:\n{}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(String::from_utf8(output.stdout)?)
}

/// Says how large the image is, and fails where it has grown out of its bounds.
fn report(layout: &Layout) -> Result<()> {
    for manifest in descriptors(&layout.read_json(&layout.image()?)?, "manifests")? {
        let layers = descriptors(&layout.read_json(&manifest)?, "layers")?;
        let bytes: u64 = layers.iter().map(|layer| layer.size).sum();
        let arch = manifest.platform.map(|platform| platform.architecture).unwrap_or_default();
        println!("{arch:6} {:.1} MiB compressed", f64::from(u32::try_from(bytes)?) / f64::from(1 << 20));
        if bytes > image::COMPRESSED_BYTES_MAX {
            bail!("the image for {arch} takes {bytes} bytes; {} are its bounds", image::COMPRESSED_BYTES_MAX);
        }
    }
    Ok(())
}
