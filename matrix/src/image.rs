//! Builds underpass and its tests as static binaries and packs them for a guest.

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::OsStr,
    fs::{self, File},
    io::Write as _,
    os::unix::ffi::OsStrExt as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::{kernels::Arch, peers, plan::PLAN};

/// What was built, for each machine.
#[derive(Default)]
pub struct Images(BTreeMap<&'static str, Image>);

/// Static binaries of one machine, and the archive that holds them.
#[derive(Debug)]
pub struct Image {
    /// By what they are: `underpass`, `net`, `prog_run`, ...
    pub binaries: BTreeMap<String, PathBuf>,
    /// An initial file system, without the kernel's own part.
    pub archive: PathBuf,
    /// This system's programs are in it.
    pub has_peers: bool,
}

impl Images {
    /// Builds the image for a machine, once.
    ///
    /// # Errors
    /// Where something does not build.
    pub fn build(&mut self, target: Target, cache: &Path) -> Result<()> {
        if !self.0.contains_key(target.triple) {
            let image = build(target, cache).with_context(|| format!("building for {}", target.triple))?;
            self.0.insert(target.triple, image);
        }
        Ok(())
    }

    /// The image for a machine.
    ///
    /// # Panics
    /// Where it was not built.
    pub fn get(&self, target: Target) -> &Image {
        &self.0[target.triple]
    }
}

/// How static binaries are built for a machine.
#[derive(Debug, Clone, Copy)]
pub struct Target {
    arch: Arch,
    triple: &'static str,
    /// What cargo has to be told.
    setting: Option<(&'static str, &'static str)>,
}

impl Target {
    /// Finds out which Rust there is for a machine.
    ///
    /// # Errors
    /// Where there is none.
    pub fn find(arch: Arch) -> Result<Self> {
        let (triple, setting) = match arch {
            Arch::Amd64 if !is_installed("x86_64-unknown-linux-musl")? => (
                // A packaged Rust has this machine's own target only.
                "x86_64-unknown-linux-gnu",
                Some(("CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUSTFLAGS", "-Ctarget-feature=+crt-static")),
            ),
            Arch::Amd64 => ("x86_64-unknown-linux-musl", None),
            // Rust's own linker knows every machine, and the target brings its C library.
            Arch::Arm64 => (
                "aarch64-unknown-linux-musl",
                Some(("CARGO_TARGET_AARCH64_UNKNOWN_LINUX_MUSL_LINKER", "rust-lld")),
            ),
        };
        ensure!(is_installed(triple)?, "this Rust cannot build for {triple}; run ./dev setup matrix");
        Ok(Self { arch, triple, setting })
    }
}

fn is_installed(triple: &str) -> Result<bool> {
    let output = Command::new("rustc").args(["--print", "sysroot"]).output().context("cannot start rustc")?;
    let sysroot = PathBuf::from(String::from_utf8(output.stdout)?.trim());
    Ok(sysroot.join("lib/rustlib").join(triple).join("lib").is_dir())
}

fn build(target: Target, cache: &Path) -> Result<Image> {
    eprintln!("== building for {}", target.triple);
    let mut binaries = BTreeMap::new();
    cargo(target, &["build", "-p", "underpass", "-p", "underpass-matrix"], &mut binaries)?;
    cargo(target, &["test", "--no-run", "-p", "underpass", "-p", "underpass-logic"], &mut binaries)?;
    let archive = cache.join(format!("{}.cpio", target.triple));
    let mut cpio = Cpio::default();
    for folder in ["dev", "etc", "proc", "sys", "tmp", "run"] {
        cpio.folder(Path::new(folder));
    }
    cpio.file(Path::new("etc/hosts"), 0o644, b"127.0.0.1 localhost\n::1 localhost\n");
    cpio.file(Path::new("etc/passwd"), 0o644, b"root:x:0:0::/:/bin/sh\nnobody:x:65534:65534::/:/bin/sh\n");
    cpio.file(Path::new("init"), 0o755, &fs::read(&binaries["underpass-matrix"])?);
    let has_peers = peers::add(&mut cpio, target.arch)?;
    // Tests know the binary, and their own files, by the path that they were built at.
    cpio.tree(&Path::new("crates/app/tests").canonicalize()?, &["py", "snap"])?;
    cpio.tree(&Path::new("crates/app/src").canonicalize()?, &["snap"])?;
    for path in binaries.iter().filter(|(name, _)| *name != "underpass-matrix").map(|(_, path)| path) {
        cpio.copy(path)?;
    }
    cpio.write(&mut File::create(&archive)?)?;
    Ok(Image { binaries, archive, has_peers })
}

/// Runs cargo and notes the executables that it tells of.
fn cargo(target: Target, arguments: &[&str], binaries: &mut BTreeMap<String, PathBuf>) -> Result<()> {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command
        .args(arguments)
        .args(["--quiet", "--locked", "--profile", "matrix", "--target", target.triple])
        .args(["--message-format", "json-render-diagnostics"])
        .stderr(Stdio::inherit());
    // What cargo told this process is about this process.
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.as_bytes().starts_with(b"CARGO_PKG_")) {
        command.env_remove(name);
    }
    command.envs(target.setting);
    let output = command.output().context("cannot start cargo")?;
    ensure!(output.status.success(), "cargo {} failed", arguments.join(" "));
    for line in output.stdout.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
        let message: Value = serde_json::from_slice(line)?;
        let Some(path) = message["executable"].as_str() else { continue };
        let name = message["target"]["name"].as_str().context("a target without a name")?;
        // A library's unit tests have the library's name, the binary's may have the same.
        let is_library = message["target"]["kind"][0] == "lib";
        let name = if is_library { format!("{name}-lib") } else { name.to_owned() };
        if message["profile"]["test"] == true && message["target"]["kind"][0] == "bin" {
            continue;
        }
        binaries.insert(name, path.into());
    }
    Ok(())
}

/// Writes an initial file system: what all kernels share, and this kernel's own part,
/// its modules and the plan.
///
/// # Errors
/// Where a file cannot be read or written.
pub fn pack(modules: &[PathBuf], plan: &str, shared: &Path, to: &Path) -> Result<()> {
    let mut cpio = Cpio::default();
    cpio.folder(Path::new("modules"));
    for module in modules {
        let name = module.file_name().context("a module has a name")?;
        cpio.file(&Path::new("modules").join(name), 0o644, &fs::read(module)?);
    }
    cpio.file(Path::new(PLAN).strip_prefix("/")?, 0o644, plan.as_bytes());
    fs::copy(shared, to)?;
    // The kernel unpacks one archive after the other.
    cpio.write(&mut fs::OpenOptions::new().append(true).open(to)?)
}

/// An archive in the "newc" format, as the kernel unpacks it
/// (Documentation/driver-api/early-userspace/buffer-format.rst).
#[derive(Default)]
pub struct Cpio {
    bytes: Vec<u8>,
    entries: u32,
    paths: BTreeSet<PathBuf>,
}

impl Cpio {
    /// A file with the folders that it is in, once.
    pub fn file(&mut self, path: &Path, mode: u32, content: &[u8]) {
        if !self.paths.insert(path.to_owned()) {
            return;
        }
        if let Some(parent) = path.parent() {
            self.folder(parent);
        }
        self.entry(path.as_os_str(), 0o100_000 | mode, content);
    }

    /// A folder, and those that it is in.
    fn folder(&mut self, path: &Path) {
        if path == Path::new("") || self.paths.contains(path) {
            return;
        }
        if let Some(parent) = path.parent() {
            self.folder(parent);
        }
        self.entry(path.as_os_str(), 0o040_755, b"");
        self.paths.insert(path.to_owned());
    }

    /// A symbolic link.
    pub fn link(&mut self, path: &Path, to: &Path) {
        if let Some(parent) = path.parent() {
            self.folder(parent);
        }
        self.entry(path.as_os_str(), 0o120_777, to.as_os_str().as_bytes());
    }

    /// The files below a folder that have one of these extensions, at the same path.
    pub fn tree(&mut self, folder: &Path, extensions: &[&str]) -> Result<()> {
        for entry in fs::read_dir(folder).with_context(|| folder.display().to_string())? {
            let path = entry?.path();
            if path.is_dir() && !path.is_symlink() {
                self.tree(&path, extensions)?;
            } else if path.extension().and_then(OsStr::to_str).is_some_and(|it| extensions.contains(&it)) {
                self.copy(&path)?;
            }
        }
        Ok(())
    }

    /// A file of this system, at the same path.
    pub fn copy(&mut self, path: &Path) -> Result<()> {
        let content = fs::read(path).with_context(|| path.display().to_string())?;
        self.file(path.strip_prefix("/")?, 0o755, &content);
        Ok(())
    }

    fn entry(&mut self, name: &OsStr, mode: u32, content: &[u8]) {
        self.entries += 1;
        let links = 1;
        let (size, name_size) = (content.len() as u32, name.len() as u32 + 1);
        let fields = [self.entries, mode, 0, 0, links, 0, size, 0, 0, 0, 0, name_size, 0];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    fn write(mut self, to: &mut File) -> Result<()> {
        self.entry(OsStr::new("TRAILER!!!"), 0, b"");
        to.write_all(&self.bytes).context("cannot write a guest's image")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_archive_has_each_folder_once_before_its_files() {
        let mut cpio = Cpio::default();
        cpio.file(Path::new("a/b/c"), 0o644, b"12345");
        cpio.file(Path::new("a/b/d"), 0o644, b"");
        let text = String::from_utf8(cpio.bytes.clone()).unwrap();
        let names = text.split("070701").skip(1).map(|entry| {
            let entry = &entry[104..];
            &entry[..entry.find('\0').unwrap()]
        });
        let names: Vec<_> = names.collect();
        assert_eq!(names, ["a", "a/b", "a/b/c", "a/b/d"]);
        assert_eq!(cpio.bytes.len() % 4, 0);
    }
}
