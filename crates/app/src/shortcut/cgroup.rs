//! Control groups (cgroup v2): the scope of the shortcut.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};

/// Where the cgroup v2 hierarchy is mounted. Its place differs between systems.
///
/// # Errors
/// Where it is not mounted.
pub fn root() -> Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").context("cannot read /proc/self/mounts")?;
    mounts
        .lines()
        .map(|line| line.split(' ').collect::<Vec<_>>())
        .find(|fields| fields.get(2) == Some(&"cgroup2"))
        .and_then(|fields| fields.get(1).map(PathBuf::from))
        .context("cgroup2 is not mounted: mount -t cgroup2 none /sys/fs/cgroup")
}

/// The control group of this process.
///
/// # Errors
/// Where cgroup2 is not mounted.
pub fn own() -> Result<PathBuf> {
    let text = fs::read_to_string("/proc/self/cgroup").context("cannot read /proc/self/cgroup")?;
    let path = text.lines().find_map(|line| line.strip_prefix("0::/")).context("no cgroup v2 line")?;
    Ok(root()?.join(path))
}

/// A control group that is removed when this is dropped, with the processes in it
/// moved to where its maker came from.
#[derive(Debug)]
pub struct Temporary {
    path: PathBuf,
    back: PathBuf,
}

impl Temporary {
    /// Makes a control group whose name begins with `name`.
    ///
    /// # Errors
    /// Where cgroup2 is not mounted or may not be written.
    pub fn new(name: &str) -> Result<Self> {
        let back = own()?;
        let unique = format!("underpass-{name}-{}", std::process::id());
        let root = root()?;
        for number in 0.. {
            let path = root.join(format!("{unique}-{number}"));
            match fs::create_dir(&path) {
                Ok(()) => return Ok(Self { path, back }),
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
                Err(e) => return Err(e).with_context(|| format!("cannot make {}", path.display())),
            }
        }
        unreachable!("the numbers do not end")
    }

    /// Its folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Moves a process into it. Sockets that it opens from now on belong to it.
    ///
    /// # Errors
    /// Where there is no such process.
    pub fn adopt(&self, pid: u32) -> io::Result<()> {
        fs::write(self.path.join("cgroup.procs"), pid.to_string())
    }

    /// Moves the calling thread into it, which takes its whole process.
    ///
    /// # Errors
    /// Where the kernel refuses.
    pub fn enter(&self) -> io::Result<()> {
        fs::write(self.path.join("cgroup.procs"), "0")
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        let procs = fs::read_to_string(self.path.join("cgroup.procs")).unwrap_or_default();
        for pid in procs.lines() {
            // It may have ended.
            let _ = fs::write(self.back.join("cgroup.procs"), pid);
        }
        // Ended processes stay until they are waited for; the kernel then says EBUSY.
        for _ in 0..100 {
            if fs::remove_dir(&self.path).is_ok() {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
    }
}
