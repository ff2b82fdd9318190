//! Programs of this system that tests start in a guest, with the libraries that they
//! take. A guest of another machine goes without: its tests are those that need none.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};

use crate::{image::Cpio, kernels::Arch};

/// Started by tests, by name.
const PROGRAMS: &[&str] =
    &["bash", "curl", "ethtool", "ip", "mount", "nc", "openssl", "python3", "setpriv", "unshare"];
/// Busybox stands in for these.
const SMALL: &[&str] = &["sh", "cat", "sleep"];

/// Adds the programs, if they run on that machine; returns whether they do.
///
/// # Errors
/// Where one is not installed.
pub fn add(cpio: &mut Cpio, arch: Arch) -> Result<bool> {
    if arch.name() != std::env::consts::ARCH {
        return Ok(false);
    }
    cpio.file(Path::new("bin/busybox"), 0o755, &std::fs::read(find("busybox")?)?);
    for name in SMALL {
        cpio.link(&Path::new("bin").join(name), Path::new("busybox"));
    }
    for name in PROGRAMS {
        let path = find(name)?;
        for library in libraries(&path)? {
            cpio.copy(&library)?;
        }
        cpio.file(&Path::new("usr/bin").join(name), 0o755, &std::fs::read(&path)?);
    }
    python_library(cpio)?;
    Ok(true)
}

/// Debian's own: what comes first in the PATH may be a script that chooses another.
fn find(name: &str) -> Result<PathBuf> {
    let places = ["/usr/bin", "/bin", "/usr/sbin", "/sbin"].map(|folder| Path::new(folder).join(name));
    let found = places.iter().find(|path| path.exists());
    let found = found.with_context(|| format!("{name} is not installed; run ./dev setup matrix"))?;
    Ok(found.canonicalize()?)
}

/// What the dynamic linker would load, itself included, at the paths that it looks at.
fn libraries(program: &Path) -> Result<Vec<PathBuf>> {
    let output = Command::new("ldd").arg(program).output().context("cannot start ldd")?;
    let text = String::from_utf8(output.stdout)?;
    // "libz.so.1 => /lib/libz.so.1 (0x...)", "/lib64/ld-linux-x86-64.so.2 (0x...)"
    let paths = text.lines().filter_map(|line| line.split_whitespace().find(|word| word.starts_with('/')));
    Ok(paths.map(PathBuf::from).collect())
}

/// Python's modules, and what those of them that are libraries need.
fn python_library(cpio: &mut Cpio) -> Result<()> {
    let output = Command::new(find("python3")?)
        .args(["-Ic", "import sysconfig; print(sysconfig.get_path('stdlib'))"])
        .output()?;
    ensure!(output.status.success(), "python3: {}", String::from_utf8_lossy(&output.stderr));
    let folder = PathBuf::from(String::from_utf8(output.stdout)?.trim());
    cpio.tree(&folder, &["py", "so"])?;
    for module in std::fs::read_dir(folder.join("lib-dynload"))? {
        for library in libraries(&module?.path())? {
            cpio.copy(&library)?;
        }
    }
    Ok(())
}
