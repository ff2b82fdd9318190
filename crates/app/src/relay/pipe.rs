//! Pipes for splice(2), kept for the next connection that needs one.

use std::{io, net::TcpStream, os::fd::OwnedFd};

use nix::fcntl::{FcntlArg, OFlag, SpliceFFlags, fcntl, splice};

/// What a pipe should hold; an unprivileged user may get less
/// (`/proc/sys/fs/pipe-user-pages-soft`).
const SIZE: i32 = 256 << 10;
/// More idle pipes than this are closed: each holds two descriptors.
const KEPT: usize = 64;

/// A pipe and how many bytes are in it.
#[derive(Debug)]
pub struct Pipe {
    read: OwnedFd,
    write: OwnedFd,
    held: usize,
}

/// Empty pipes.
#[derive(Debug, Default)]
pub struct Pipes(Vec<Pipe>);

impl Pipes {
    /// An empty pipe.
    ///
    /// # Errors
    /// Where the process has no descriptors left.
    pub fn take(&mut self) -> io::Result<Pipe> {
        if let Some(pipe) = self.0.pop() {
            return Ok(pipe);
        }
        let (read, write) = nix::unistd::pipe2(OFlag::O_NONBLOCK | OFlag::O_CLOEXEC)?;
        // A smaller pipe does, too.
        let _ = fcntl(&write, FcntlArg::F_SETPIPE_SZ(SIZE));
        Ok(Pipe { read, write, held: 0 })
    }

    /// Keeps a pipe for others, if it is empty.
    pub fn give_back(&mut self, pipe: Pipe) {
        if pipe.held == 0 && self.0.len() < KEPT {
            self.0.push(pipe);
        }
    }
}

impl Pipe {
    /// Bytes in the pipe.
    pub fn held(&self) -> usize {
        self.held
    }

    /// Moves what a socket has received into the pipe, which must be empty: only
    /// then does `WouldBlock` mean that the socket has nothing.
    ///
    /// # Errors
    /// The socket's, `WouldBlock` among them.
    pub fn fill(&mut self, from: &TcpStream) -> io::Result<usize> {
        debug_assert_eq!(self.held, 0, "a pipe that is filled is empty");
        let count = move_bytes(from, &self.write, SIZE as usize)?;
        self.held = count;
        Ok(count)
    }

    /// Moves what is in the pipe into a socket's send queue.
    ///
    /// # Errors
    /// The socket's, `WouldBlock` among them.
    pub fn empty(&mut self, to: &TcpStream) -> io::Result<usize> {
        let count = move_bytes(&self.read, to, self.held)?;
        self.held -= count;
        Ok(count)
    }
}

fn move_bytes(from: &impl std::os::fd::AsFd, to: &impl std::os::fd::AsFd, most: usize) -> io::Result<usize> {
    let flags = SpliceFFlags::SPLICE_F_MOVE | SpliceFFlags::SPLICE_F_NONBLOCK;
    Ok(splice(from, None, to, None, most, flags)?)
}
