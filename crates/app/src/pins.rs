//! What outlives the process: pinned in a bpffs, at `underpass/<function>/<key>/`.
//!
//! A key is made of digits, letters and `-_`: a bpffs takes no dots. What belongs to an
//! interface has the key of [`interface_key`], as names change and are taken twice in
//! two network namespaces.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use anyhow::Context as _;
use nix::{mount::MsFlags, sys::statfs};

use crate::error::{Error, Result};

/// Where systemd and everybody else mounts a bpffs.
const USUAL: &str = "/sys/fs/bpf";

/// A folder of pins: all that belongs to one attachment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Folder {
    /// What identifies the attachment within its function.
    pub key: String,
    path: PathBuf,
}

impl Folder {
    /// The folder of a function's attachment, made if it is not there. Mounts a bpffs
    /// if there is none.
    ///
    /// # Errors
    /// [`Error::Unable`] where a bpffs is missing and cannot be mounted.
    pub fn create(function: &str, key: &str) -> Result<Self> {
        let root = mounted()?;
        let folder = Self::at(&root, function, key);
        if let Err(error) = fs::create_dir_all(&folder.path) {
            if error.kind() == io::ErrorKind::PermissionDenied {
                return Err(Error::Unable(format!(
                    "cannot write to {}: run as root, or as a user to whom that folder belongs",
                    root.display()
                )));
            }
            return Err(anyhow::Error::new(error)
                .context(format!("cannot make {}", folder.path.display()))
                .into());
        }
        Ok(folder)
    }

    /// The folder of a function's attachment, if it is there.
    pub fn find(function: &str, key: &str) -> Option<Self> {
        let folder = Self::at(&find()?, function, key);
        folder.path.is_dir().then_some(folder)
    }

    /// All folders of a function, in order.
    ///
    /// # Errors
    /// Where they cannot be read.
    pub fn all(function: &str) -> Result<Vec<Self>> {
        let Some(root) = find() else { return Ok(vec![]) };
        let parent = root.join("underpass").join(function);
        let entries = match fs::read_dir(&parent) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(vec![]),
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                return Err(Error::Unable(format!(
                    "cannot read {}: run as root, or as a user to whom that folder belongs",
                    parent.display()
                )));
            }
            Err(error) => {
                return Err(anyhow::Error::new(error)
                    .context(format!("cannot read {}", parent.display()))
                    .into());
            }
        };
        let mut folders = vec![];
        for entry in entries {
            let entry = entry.with_context(|| format!("cannot read {}", parent.display()))?;
            if let Some(key) = entry.file_name().to_str() {
                folders.push(Self::at(&root, function, key));
            }
        }
        folders.sort_by(|a, b| a.key.cmp(&b.key));
        Ok(folders)
    }

    /// The path of a pin in the folder, whether it is there or not.
    pub fn pin(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// Removes the folder and every pin in it: links are detached by that, programs
    /// and maps are gone once nobody uses them.
    ///
    /// # Errors
    /// Where a pin cannot be removed.
    pub fn remove(self) -> Result<()> {
        let gone = |path: &Path| format!("cannot remove {}", path.display());
        for entry in fs::read_dir(&self.path).with_context(|| gone(&self.path))? {
            let path = entry.with_context(|| gone(&self.path))?.path();
            fs::remove_file(&path).with_context(|| gone(&path))?;
        }
        fs::remove_dir(&self.path).with_context(|| gone(&self.path))?;
        // The folders above, if this was the last.
        for parent in self.path.ancestors().skip(1).take(2) {
            if fs::remove_dir(parent).is_err() {
                break;
            }
        }
        Ok(())
    }

    fn at(root: &Path, function: &str, key: &str) -> Self {
        Self { key: key.to_owned(), path: root.join("underpass").join(function).join(key) }
    }
}

/// The key of an interface of the network namespace that this runs in.
///
/// # Errors
/// Where /proc is not mounted.
pub fn interface_key(index: u32) -> Result<String> {
    Ok(format!("{}-{index}", namespace()?))
}

/// The network namespace that this runs in, by inode.
///
/// # Errors
/// Where /proc is not mounted.
pub fn namespace() -> Result<u64> {
    use std::os::unix::fs::MetadataExt as _;
    let metadata = fs::metadata("/proc/thread-self/ns/net").context("cannot tell the network namespace")?;
    Ok(metadata.ino())
}

/// Where a bpffs is mounted; mounts one if there is none.
///
/// # Errors
/// [`Error::Unable`] where that is refused.
pub fn mounted() -> Result<PathBuf> {
    find().map_or_else(mount, Ok)
}

/// A mounted bpffs: the usual one, else whichever is mounted.
fn find() -> Option<PathBuf> {
    let is_bpffs =
        |path: &Path| statfs::statfs(path).is_ok_and(|stat| stat.filesystem_type() == statfs::BPF_FS_MAGIC);
    let usual = Path::new(USUAL);
    if is_bpffs(usual) {
        return Some(usual.to_owned());
    }
    let mounts = fs::read_to_string("/proc/self/mounts").ok()?;
    let paths = mounts.lines().filter_map(|line| {
        let mut fields = line.split(' ').skip(1);
        let (path, kind) = (fields.next()?, fields.next()?);
        (kind == "bpf").then(|| PathBuf::from(path))
    });
    paths.into_iter().find(|path| is_bpffs(path))
}

fn mount() -> Result<PathBuf> {
    nix::mount::mount(Some("bpf"), USUAL, Some("bpf"), MsFlags::empty(), Some("mode=0700")).map_err(
        |errno| {
            Error::Unable(format!(
                "no bpffs is mounted, and mounting one at {USUAL} failed: {errno}; \
                 run `mount -t bpf bpf {USUAL}` as root"
            ))
        },
    )?;
    Ok(PathBuf::from(USUAL))
}
