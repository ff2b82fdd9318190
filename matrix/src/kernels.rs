//! Finds Debian's cloud kernels on the mirror that this system is configured with,
//! fetches them without installing anything, and keeps what a guest needs of them.

use std::{
    cmp::Ordering,
    fmt::{self, Write as _},
    fs,
    path::{Path, PathBuf},
    process::Command,
    str::FromStr,
};

use anyhow::{Context as _, Result, bail, ensure};

/// All kernels of the matrix: the oldest and the newest that underpass is made for,
/// and the long-term ones between.
pub const ALL: &[Series] = &[
    Series { version: "5.10", suite: Suite::Security("bullseye-security"), arch: Arch::Amd64 },
    Series { version: "6.1", suite: Suite::Security("bookworm-security"), arch: Arch::Amd64 },
    Series { version: "6.12", suite: Suite::Security("bookworm-security"), arch: Arch::Amd64 },
    Series { version: "6.18", suite: Suite::Main("trixie-backports"), arch: Arch::Amd64 },
    Series { version: "7", suite: Suite::Main("trixie-backports"), arch: Arch::Amd64 },
    Series { version: "6.12", suite: Suite::Security("bookworm-security"), arch: Arch::Arm64 },
];

/// What the guests and the programs in them may need; some kernels have it built in.
/// In an order that respects their dependencies.
const MODULES: &[&str] = &["veth", "dummy", "sch_ingress", "cls_bpf", "inet_diag", "tcp_diag", "udp_diag"];

/// A line of kernels, of which the newest release is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Series {
    version: &'static str,
    suite: Suite,
    /// The machine.
    pub arch: Arch,
}

/// Where Debian carries a series.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Suite {
    Main(&'static str),
    Security(&'static str),
}

/// A machine that can be emulated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arch {
    /// x86, 64 bit.
    Amd64,
    /// ARM, 64 bit.
    Arm64,
}

impl Arch {
    /// As Rust calls it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Amd64 => "x86_64",
            Self::Arm64 => "aarch64",
        }
    }

    fn debian(self) -> &'static str {
        match self {
            Self::Amd64 => "amd64",
            Self::Arm64 => "arm64",
        }
    }
}

impl fmt::Display for Series {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match self.arch {
            Arch::Amd64 => self.version.to_owned(),
            Arch::Arm64 => format!("{}-arm64", self.version),
        };
        f.pad(&name)
    }
}

impl FromStr for Series {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        ALL.iter().copied().find(|series| series.to_string() == text).ok_or_else(|| {
            let known: Vec<_> = ALL.iter().map(Self::to_string).collect();
            format!("the matrix has {}", known.join(", "))
        })
    }
}

/// A kernel at hand.
#[derive(Debug)]
pub struct Kernel {
    /// What was asked for.
    pub series: Series,
    /// What was found, as `uname -r` prints it.
    pub release: String,
    folder: PathBuf,
}

impl Kernel {
    /// The file to boot.
    pub fn image(&self) -> PathBuf {
        self.folder.join("vmlinuz")
    }

    /// Its modules, in the order in which to load them.
    pub fn modules(&self) -> Vec<PathBuf> {
        MODULES
            .iter()
            .map(|name| self.folder.join(format!("{name}.ko")))
            .filter(|file| file.exists())
            .collect()
    }

    /// Major and minor.
    ///
    /// # Errors
    /// Where the release does not begin with them.
    pub fn version(&self) -> Result<(u32, u32)> {
        match numbers(&self.release)[..] {
            [major, minor, ..] => Ok((major, minor)),
            _ => bail!("{:?} is no kernel release", self.release),
        }
    }
}

/// The kernels that were fetched, and how to fetch more.
pub struct Store {
    folder: PathBuf,
    refresh: bool,
    /// Asked once; what went wrong is true for every kernel.
    names: Option<Result<Vec<String>, String>>,
}

impl Store {
    /// Opens the store in a folder; `refresh` looks for newer kernels than those in it.
    ///
    /// # Errors
    /// Where the folder cannot be written to.
    pub fn open(cache: &Path, refresh: bool) -> Result<Self> {
        let folder = cache.to_owned();
        fs::create_dir_all(&folder)?;
        Ok(Self { folder, refresh, names: None })
    }

    /// A kernel, fetched if need be.
    ///
    /// # Errors
    /// Where it cannot be had, with the reason.
    pub fn get(&mut self, series: Series) -> Result<Kernel> {
        let folder = self.folder.join(series.to_string());
        let kept = fs::read_to_string(folder.join("release")).ok();
        if let Some(release) = kept.clone().filter(|_| !self.refresh) {
            return Ok(Kernel { series, release, folder });
        }
        let newest = self.newest(series);
        match (newest, kept) {
            (Ok((release, _)), Some(kept)) if release == kept => {}
            (Ok((release, packages)), _) => self.fetch(series, &release, &packages, &folder)?,
            // An older one is better than none.
            (Err(error), Some(kept)) => eprintln!("== {series}: {error:#}; taking {kept}"),
            (Err(error), None) => return Err(error),
        }
        let release = fs::read_to_string(folder.join("release"))?;
        Ok(Kernel { series, release, folder })
    }

    /// The newest release of a series, and the packages that it is made of.
    fn newest(&mut self, series: Series) -> Result<(String, Vec<String>)> {
        let (folder, arch) = (self.folder.clone(), series.arch.debian());
        let names = self.names.get_or_insert_with(|| list(&folder).map_err(|error| format!("{error:#}")));
        let names = names.as_ref().map_err(|error| anyhow::anyhow!("{error}"))?;
        let end = format!("-cloud-{arch}");
        let (prefix, mut best) = (format!("{}.", series.version), None::<&str>);
        for name in names {
            let version = name.strip_prefix("linux-image-").and_then(|rest| rest.strip_suffix(&end));
            let Some(version) = version.filter(|v| v.starts_with(&prefix) && !v.contains("rc")) else {
                continue;
            };
            if best.is_none_or(|best| newer(version, best) == Ordering::Greater) {
                best = Some(version);
            }
        }
        let Some(version) = best else { bail!("the mirror carries no {series} any more") };
        let release = format!("{version}{end}");
        // Up to 6.18 all is in the image; then it is but a name for the others.
        let parts = ["image", "binary", "modules"].map(|part| format!("linux-{part}-{release}"));
        let packages =
            parts.into_iter().filter(|name| names.contains(name)).map(|name| format!("{name}:{arch}"));
        Ok((release.clone(), packages.collect()))
    }

    fn fetch(&self, series: Series, release: &str, packages: &[String], folder: &Path) -> Result<()> {
        eprintln!("== fetching {series}: {}", packages.join(" "));
        let partial = folder.with_extension("partial");
        // Left by a run that was cut short.
        let _ = fs::remove_dir_all(&partial);
        let unpacked = partial.join("unpacked");
        fs::create_dir_all(&unpacked)?;
        succeed(apt(&self.folder, "apt-get").current_dir(&partial).args(["-qq", "download"]).args(packages))?;
        for entry in fs::read_dir(&partial)? {
            let path = entry?.path();
            if path.extension().is_some_and(|extension| extension == "deb") {
                succeed(Command::new("dpkg-deb").arg("-x").arg(&path).arg(&unpacked))?;
                fs::remove_file(path)?;
            }
        }
        keep(&unpacked, &partial)?;
        ensure!(partial.join("vmlinuz").exists(), "no kernel image in {}", packages.join(" "));
        fs::remove_dir_all(&unpacked)?;
        fs::write(partial.join("release"), release)?;
        let _ = fs::remove_dir_all(folder);
        fs::rename(&partial, folder)?;
        Ok(())
    }
}

/// Moves the kernel and the modules that are wanted from what packages held.
fn keep(from: &Path, to: &Path) -> Result<()> {
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let (path, name) = (entry.path(), entry.file_name());
        let name = name.to_string_lossy();
        if entry.file_type()?.is_dir() {
            keep(&path, to)?;
        } else if name.starts_with("vmlinu") {
            fs::rename(&path, to.join("vmlinuz"))?;
        } else if let Some(module) = MODULES.iter().find(|module| name.split('.').next() == Some(**module)) {
            let kept = to.join(name.as_ref());
            fs::rename(&path, &kept)?;
            if name.ends_with(".xz") {
                succeed(Command::new("xz").arg("-d").arg(&kept))?;
            }
            ensure!(to.join(format!("{module}.ko")).exists(), "{name} is packed in an unknown way");
        }
    }
    Ok(())
}

/// The names of all kernel packages on the mirror.
fn list(folder: &Path) -> Result<Vec<String>> {
    let apt_folder = folder.join("apt");
    for part in ["state/lists/partial", "cache/archives/partial"] {
        fs::create_dir_all(apt_folder.join(part))?;
    }
    fs::write(apt_folder.join("status"), "")?;
    fs::write(apt_folder.join("sources.list"), sources()?)?;
    eprintln!("== asking the mirror for its kernels");
    succeed(apt(folder, "apt-get").args(["-qq", "update"]))?;
    let output = apt(folder, "apt-cache").args(["pkgnames", "linux-"]).output()?;
    ensure!(output.status.success(), "apt-cache: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?.lines().map(str::to_owned).collect())
}

/// A sources list of the suites that carry kernels, on the mirror that this system uses.
fn sources() -> Result<String> {
    const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
    ensure!(Path::new(KEYRING).exists(), "kernels come from a Debian mirror, and there is no {KEYRING}");
    let mut lines = String::new();
    let mut suites: Vec<Suite> = ALL.iter().map(|series| series.suite).collect();
    suites.dedup();
    for suite in suites {
        let (label, name) = match suite {
            Suite::Main(name) => ("Debian", name),
            Suite::Security(name) => ("Debian-Security", name),
        };
        let mirror = mirror(label)?;
        writeln!(lines, "deb [arch=amd64,arm64 signed-by={KEYRING}] {mirror} {name} main").expect("memory");
    }
    Ok(lines)
}

fn mirror(label: &str) -> Result<String> {
    let label = format!("Label: {label}");
    let output = Command::new("apt-get")
        .args(["indextargets", "--format", "$(REPO_URI)", "Identifier: Packages", &label])
        .output()
        .context("kernels come from a Debian mirror, and there is no apt-get here")?;
    let mirrors = String::from_utf8(output.stdout)?;
    let mirror = mirrors.lines().next().with_context(|| {
        format!("kernels come from a Debian mirror, and this system's apt has none with {label}")
    })?;
    Ok(mirror.to_owned())
}

/// apt with lists and a state of its own: nothing of this system's is touched.
fn apt(folder: &Path, program: &str) -> Command {
    let folder = folder.join("apt");
    let mut command = Command::new(program);
    for (key, path) in [
        ("Dir::State", "state"),
        ("Dir::State::status", "status"),
        ("Dir::Cache", "cache"),
        ("Dir::Etc::SourceList", "sources.list"),
        ("Dir::Etc::SourceParts", "none"),
    ] {
        command.arg("-o").arg(format!("{key}={}", folder.join(path).display()));
    }
    for option in [
        "APT::Architectures=amd64,arm64",
        "APT::Sandbox::User=root",
        "Acquire::Languages=none",
        "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false",
        "Debug::NoLocking=1",
    ] {
        command.args(["-o", option]);
    }
    command
}

fn succeed(command: &mut Command) -> Result<()> {
    let output =
        command.output().with_context(|| format!("cannot start {}", command.get_program().display()))?;
    let program = command.get_program().display();
    ensure!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr).trim());
    Ok(())
}

fn newer(a: &str, b: &str) -> Ordering {
    numbers(a).cmp(&numbers(b))
}

fn numbers(version: &str) -> Vec<u32> {
    version.split(|c: char| !c.is_ascii_digit()).filter_map(|number| number.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_release_is_found_by_number() {
        assert_eq!(newer("6.18.15+deb13", "6.18.9+deb13"), Ordering::Greater);
        assert_eq!(newer("6.1.0-56", "6.1.0-0.deb11.52"), Ordering::Greater);
        assert_eq!(newer("5.10.0-46", "5.10.0-46"), Ordering::Equal);
    }

    #[test]
    fn every_series_is_found_by_its_name() {
        for series in ALL {
            assert_eq!(series.to_string().parse(), Ok(*series));
        }
        assert!("4.19".parse::<Series>().is_err());
    }
}
