//! Running a BPF iterator over the sockets that a storage map knows.
//!
//! aya's `Iter` attaches iterators that need no map; this one does (`bpf(2)`,
//! `bpf_link_create` with `bpf_iter_link_info.map`, Linux 5.9), so the three commands
//! it takes are given here.

use std::{
    ffi::CString,
    fs::File,
    io::{self, Read as _},
    os::{
        fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::{Path, PathBuf},
};

const BPF_OBJ_PIN: libc::c_int = 6;
const BPF_LINK_CREATE: libc::c_int = 28;
const BPF_ITER_CREATE: libc::c_int = 33;
const BPF_TRACE_ITER: u32 = 28;

/// An iterator that is ready to run.
#[derive(Debug)]
pub(super) enum Iterator {
    /// Held by this process.
    Link(OwnedFd),
    /// Pinned: opening the file makes a new run of it.
    Pinned(PathBuf),
}

impl Iterator {
    /// Links an iterator program with the map over which it goes.
    pub(super) fn link(program: BorrowedFd<'_>, map: BorrowedFd<'_>) -> io::Result<Self> {
        /// `bpf_attr.link_create`, as far as it is used.
        #[repr(C)]
        struct LinkCreate {
            program: i32,
            target: i32,
            attach_type: u32,
            flags: u32,
            info: u64,
            info_len: u32,
            zero: u32,
        }
        let info = [map.as_raw_fd(), 0];
        let attr = LinkCreate {
            program: program.as_raw_fd(),
            target: 0,
            attach_type: BPF_TRACE_ITER,
            flags: 0,
            info: info.as_ptr() as u64,
            info_len: size_of_val(&info) as u32,
            zero: 0,
        };
        bpf(BPF_LINK_CREATE, &attr).map(Self::Link)
    }

    /// Pins it, so that it outlives this process.
    pub(super) fn pin(&self, path: &Path) -> io::Result<()> {
        /// `bpf_attr.pathname` and what follows.
        #[repr(C)]
        struct ObjPin {
            path: u64,
            fd: i32,
            flags: u32,
        }
        let Self::Link(link) = self else { return Ok(()) };
        let path = CString::new(path.as_os_str().as_bytes())?;
        let attr = ObjPin { path: path.as_ptr() as u64, fd: link.as_raw_fd(), flags: 0 };
        // The descriptor that other commands return is 0 here: not one.
        bpf_status(BPF_OBJ_PIN, &attr).map(drop)
    }

    /// Goes over all sockets once.
    pub(super) fn run(&self) -> io::Result<()> {
        let mut run = match self {
            Self::Link(link) => {
                // `bpf_attr.iter_create`: the link and no flags.
                File::from(bpf(BPF_ITER_CREATE, &[link.as_raw_fd(), 0])?)
            }
            Self::Pinned(path) => File::open(path)?,
        };
        let mut nothing = [0; 64];
        loop {
            match run.read(&mut nothing) {
                Ok(0) => return Ok(()),
                Ok(_) => {}
                // After a million sockets the kernel wants to be asked again.
                Err(e) if e.kind() == io::ErrorKind::WouldBlock || e.kind() == io::ErrorKind::Interrupted => {
                }
                Err(e) => return Err(e),
            }
        }
    }
}

fn bpf<T>(command: libc::c_int, attr: &T) -> io::Result<OwnedFd> {
    let fd = bpf_status(command, attr)?;
    // SAFETY: the command succeeded, and those called here return a new descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn bpf_status<T>(command: libc::c_int, attr: &T) -> io::Result<libc::c_int> {
    // SAFETY: the attribute is a part of `bpf_attr` that this command reads, of the size
    // given; what it points to outlives the call.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_ref(attr), size_of::<T>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result as libc::c_int) }
}
