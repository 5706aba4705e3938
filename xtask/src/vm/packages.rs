//! Debian packages, fetched beside the system's own: for other releases, other architectures, and never installed.

use crate::process;
use crate::workspace;
use anyhow::{Context, Result, bail};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

const MIRROR: &str = "http://deb.debian.org";
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// Where kernels of every age are, oldest first; the newest are in backports.
const SUITES: [(&str, &str); 6] = [
    ("debian", "bullseye"),
    ("debian-security", "bullseye-security"),
    ("debian", "bookworm"),
    ("debian-security", "bookworm-security"),
    ("debian", "trixie"),
    ("debian", "trixie-backports"),
];

/// How old lists of packages may grow: names of kernels rotate within weeks.
const LISTS_AGE_MAX: Duration = Duration::from_secs(7 * 24 * 3600);

/// An apt of its own: own sources, own lists, and no idea of what is installed.
pub(crate) struct Apt {
    directory: PathBuf,
    options: Vec<String>,
}

impl Apt {
    /// The packages of one Debian architecture in every release.
    pub(crate) fn of(architecture: &str) -> Result<Self> {
        let directory = cache()?.join(format!("apt-{architecture}"));
        std::fs::create_dir_all(directory.join("lists/partial"))?;
        // Without this the packages of this system would count as there, of whatever architecture.
        let status = directory.join("status");
        std::fs::write(&status, "")?;
        let mut apt = Self { options: Vec::new(), directory };
        apt.option("APT::Architecture", architecture);
        apt.option("APT::Architectures", architecture);
        apt.option("Dir::State::status", &status.display().to_string());
        apt.sources(&SUITES)?;
        apt.refresh()?;
        Ok(apt)
    }

    /// The packages of this system's release, and its backports.
    fn of_this_system(codename: &str) -> Result<Self> {
        let directory = cache()?.join("apt-host");
        std::fs::create_dir_all(directory.join("lists/partial"))?;
        let mut apt = Self { options: Vec::new(), directory };
        let (security, backports) = (format!("{codename}-security"), format!("{codename}-backports"));
        apt.sources(&[("debian", codename), ("debian-security", &security), ("debian", &backports)])?;
        apt.refresh()?;
        Ok(apt)
    }

    fn sources(&mut self, suites: &[(&str, &str)]) -> Result<()> {
        let lines = suites
            .iter()
            .map(|(archive, suite)| format!("deb [signed-by={KEYRING}] {MIRROR}/{archive} {suite} main\n"));
        let path = self.directory.join("sources.list");
        std::fs::write(&path, lines.collect::<String>())?;
        let lists = self.directory.join("lists").display().to_string();
        self.option("Dir::Etc::sourcelist", &path.display().to_string());
        self.option("Dir::Etc::sourceparts", "-");
        self.option("Dir::Etc::preferencesparts", "-");
        self.option("Dir::State::lists", &lists);
        self.option("Dir::Cache::pkgcache", "");
        self.option("Dir::Cache::srcpkgcache", "");
        self.option("Dir::Cache::archives", &self.directory.display().to_string());
        // Its user could not enter this directory.
        self.option("APT::Sandbox::User", "root");
        Ok(())
    }

    fn option(&mut self, name: &str, value: &str) {
        self.options.extend(["-o".to_owned(), format!("{name}={value}")]);
    }

    fn refresh(&self) -> Result<()> {
        let stamp = self.directory.join("refreshed");
        let age = stamp.metadata().and_then(|meta| meta.modified()).ok().and_then(|time| time.elapsed().ok());
        if age.is_some_and(|age| age < LISTS_AGE_MAX) {
            return Ok(());
        }
        let mut update = self.command("apt-get")?;
        process::run(update.args(["update", "--quiet=2"]))?;
        std::fs::write(stamp, "")?;
        Ok(())
    }

    fn command(&self, program: &str) -> Result<Command> {
        if process::on_path(program).is_none() || !Path::new(KEYRING).is_file() {
            bail!("kernels are Debian packages: this needs {program}, dpkg and {KEYRING}, as on Debian");
        }
        let mut command = process::in_outer_netns(program.as_ref());
        command.args(&self.options).env("DEBIAN_FRONTEND", "noninteractive");
        Ok(command)
    }

    /// Names of all packages that begin so.
    pub(crate) fn names(&self, beginning: &str) -> Result<Vec<String>> {
        let mut command = self.command("apt-cache")?;
        let names = process::output(command.args(["pkgnames", beginning]));
        let names = names.with_context(|| format!("apt-cache knows no packages {beginning}*"))?;
        Ok(names.lines().map(str::to_owned).collect())
    }

    /// Downloads packages and unpacks them into a directory; nothing is installed.
    pub(crate) fn unpack(&self, packages: &[String], into: &Path) -> Result<()> {
        let downloads = self.directory.join("downloads");
        // What an interrupted download has left is not unpacked with the rest.
        let _ = std::fs::remove_dir_all(&downloads);
        std::fs::create_dir_all(&downloads)?;
        let mut download = self.command("apt-get")?;
        process::run_briefly(
            download.current_dir(&downloads).args(["download", "--quiet=2"]).args(packages),
        )?;
        for package in std::fs::read_dir(&downloads)? {
            process::run_briefly(Command::new("dpkg").arg("-x").arg(package?.path()).arg(into))?;
        }
        std::fs::remove_dir_all(&downloads)?;
        Ok(())
    }
}

/// Installs a package of this system, or of its backports where what is installed comes from there.
pub(crate) fn install(package: &str) -> Result<()> {
    let release = std::fs::read_to_string("/etc/os-release").unwrap_or_default();
    let codename = release.lines().find_map(|line| line.strip_prefix("VERSION_CODENAME="));
    let codename = codename.context("not a Debian system: its packages are not an option")?;
    eprintln!("setup: installing the package {package}");
    let apt = Apt::of_this_system(codename)?;
    let mut install = apt.command("apt-get")?;
    install.arg(format!("--target-release={codename}-backports"));
    install.args(["install", "--quiet=2", "--yes", "--no-install-recommends", "--no-remove"]);
    process::run(install.args(["-o", "DPkg::Lock::Timeout=120", package]))
}

/// Where kernels and what belongs to them are kept.
pub(crate) fn cache() -> Result<PathBuf> {
    Ok(workspace::cache()?.join("vm"))
}
