//! Two ends that exchange messages, timed: for the demo and the benchmarks.

use std::{
    fs::File,
    io::{ErrorKind, Read as _, Write as _},
    net::{Ipv4Addr, TcpListener, TcpStream},
    os::fd::{AsFd as _, OwnedFd},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow, ensure};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::lab::Namespace;

/// Ends a run in which something hangs.
const PATIENCE: Duration = Duration::from_secs(20);

/// How an end reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Style {
    /// It waits in poll, as servers do that have more than one connection.
    Polls,
    /// It waits in recv.
    Waits,
}

/// The ends of a TCP connection over a namespace's loopback interface.
///
/// # Errors
/// Where that interface is down.
pub fn loopback(namespace: &Namespace) -> Result<(OwnedFd, OwnedFd)> {
    let (client, server) = namespace.enter(|| -> std::io::Result<_> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let client = TcpStream::connect(listener.local_addr()?)?;
        Ok((client, listener.accept()?.0))
    })?;
    for end in [&client, &server] {
        end.set_nodelay(true)?;
    }
    Ok((client.into(), server.into()))
}

/// Sends `size` bytes there and back `warm + count` times; returns how long each of
/// the last `count` took.
///
/// # Errors
/// Where a byte comes back other than it was sent, or not at all.
pub fn exchanges(
    ends: (OwnedFd, OwnedFd),
    style: Style,
    size: usize,
    (warm, count): (usize, usize),
) -> Result<Vec<Duration>> {
    let (mut client, mut server) = (End::new(ends.0, style)?, End::new(ends.1, style)?);
    thread::scope(|scope| {
        let echo = scope.spawn(move || -> Result<()> {
            let mut message = vec![0; size];
            for _ in 0..warm + count {
                server.read(&mut message)?;
                server.write(&message)?;
            }
            Ok(())
        });
        let mut times = Vec::with_capacity(count);
        let (mut message, mut back) = (vec![0_u8; size], vec![0; size]);
        for round in 0..warm + count {
            let at = round % size;
            message[at] = message[at].wrapping_add(1);
            let begun = Instant::now();
            client.write(&message)?;
            client.read(&mut back)?;
            if round >= warm {
                times.push(begun.elapsed());
            }
            ensure!(message == back, "other bytes came back than were sent");
        }
        echo.join().map_err(|_| anyhow!("the echo panicked"))??;
        Ok(times)
    })
}

/// Sends `total` bytes one way by writes of `size`; returns bytes a second.
///
/// # Errors
/// Where not all of them arrive.
pub fn stream(ends: (OwnedFd, OwnedFd), style: Style, size: usize, total: usize) -> Result<f64> {
    let (mut client, mut server) = (End::new(ends.0, style)?, End::new(ends.1, style)?);
    let begun = Instant::now();
    thread::scope(|scope| {
        let reading = scope.spawn(move || -> Result<()> {
            let mut buffer = vec![0; size.max(64 << 10)];
            let mut left = total;
            while left > 0 {
                let len = left.min(buffer.len());
                left -= server.read_some(&mut buffer[..len])?;
            }
            Ok(())
        });
        let message = vec![7; size];
        let mut left = total;
        while left > 0 {
            let len = left.min(size);
            client.write(&message[..len])?;
            left -= len;
        }
        reading.join().map_err(|_| anyhow!("the reader panicked"))?
    })?;
    Ok(total as f64 / begun.elapsed().as_secs_f64())
}

struct End {
    file: File,
}

impl End {
    fn new(fd: OwnedFd, style: Style) -> Result<Self> {
        let socket = socket2::SockRef::from(&fd);
        socket.set_nonblocking(style == Style::Polls)?;
        socket.set_read_timeout(Some(PATIENCE))?;
        Ok(Self { file: File::from(fd) })
    }

    fn read(&mut self, mut into: &mut [u8]) -> Result<()> {
        while !into.is_empty() {
            let n = self.read_some(into)?;
            into = &mut into[n..];
        }
        Ok(())
    }

    fn read_some(&mut self, into: &mut [u8]) -> Result<usize> {
        loop {
            match self.file.read(into) {
                Ok(0) => return Err(anyhow!("the other end is gone")),
                Ok(n) => return Ok(n),
                Err(e) if e.kind() == ErrorKind::WouldBlock => self.wait(PollFlags::POLLIN)?,
                Err(e) => return Err(e).context("cannot read"),
            }
        }
    }

    fn write(&mut self, mut bytes: &[u8]) -> Result<()> {
        while !bytes.is_empty() {
            match self.file.write(bytes) {
                Ok(n) => bytes = &bytes[n..],
                Err(e) if e.kind() == ErrorKind::WouldBlock => self.wait(PollFlags::POLLOUT)?,
                Err(e) => return Err(e).context("cannot write"),
            }
        }
        Ok(())
    }

    fn wait(&self, what: PollFlags) -> Result<()> {
        let mut polled = [PollFd::new(self.file.as_fd(), what)];
        let ready = poll(&mut polled, PollTimeout::try_from(PATIENCE.as_millis())?)?;
        ensure!(ready > 0, "nothing came for {PATIENCE:?}");
        Ok(())
    }
}
