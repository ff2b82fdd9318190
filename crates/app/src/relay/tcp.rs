//! What the relay asks of TCP sockets beyond reading and writing.

use std::{
    io,
    os::fd::{AsFd, AsRawFd as _},
    sync::OnceLock,
    time::Duration,
};

use nix::sys::socket::{setsockopt, sockopt};
use socket2::SockRef;

/// What a receive queue holds at most, in bytes of memory. With a pipe and a send
/// queue (`net.ipv4.tcp_wmem`, 4 MiB) that is less than 16 MiB for each direction.
const MOST_QUEUED: usize = 8 << 20;

/// A fixed send queue, in bytes of memory: as far as TCP widens it by default
/// (`net.ipv4.tcp_wmem`).
const SEND_QUEUE: usize = 4 << 20;

/// How far a socket has come: bytes, counted by the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Position {
    /// `tcpi_bytes_received`: in order, whether read or not; a FIN counts one.
    pub received: u64,
    /// `tcpi_bytes_acked` plus what is in the send queue: all that ever entered it,
    /// plus one if this side opened the connection (its SYN).
    pub queued: u64,
}

/// Reads a socket's position. As acknowledgements may come between the two system
/// calls, `queued` errs on the low side, never on the high one.
///
/// # Errors
/// Where the socket is no TCP socket.
pub fn position(socket: &impl AsFd) -> io::Result<Position> {
    let (acked, received) = bytes_acked_and_received(socket)?;
    Ok(Position { received, queued: acked + unsent(socket)? })
}

/// A socket's position without what waits in it unread: where the kernel path
/// starts to count.
///
/// `None` where the socket is so busy that no consistent picture could be had.
///
/// # Errors
/// Where the socket is no TCP socket.
pub fn baseline(socket: &impl AsFd) -> io::Result<Option<Position>> {
    for _ in 0..100 {
        let before = bytes_acked_and_received(socket)?;
        let (unread, unsent) = (unread(socket)?, unsent(socket)?);
        if before == bytes_acked_and_received(socket)? {
            let (acked, received) = before;
            let received = received.checked_sub(unread);
            return Ok(received.map(|received| Position { received, queued: acked + unsent }));
        }
    }
    Ok(None)
}

/// Makes TCP look at what it has received and tell its reader again. The reader of
/// a socket that has just entered a sockmap is the verdict program.
///
/// # Errors
/// Where the socket is closed.
pub fn kick(socket: &impl AsFd) -> io::Result<()> {
    set_low_water(socket, 1)
}

/// Sets how many bytes must wait for a socket to be readable (SO_RCVLOWAT).
///
/// # Errors
/// Where the socket is closed.
pub fn set_low_water(socket: &impl AsFd, bytes: libc::c_int) -> io::Result<()> {
    // SAFETY: the kernel reads one int.
    let result = unsafe {
        libc::setsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_RCVLOWAT,
            (&raw const bytes).cast(),
            size_of_val(&bytes) as libc::socklen_t,
        )
    };
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Limits what the kernel queues for this socket while nobody reads it; for one that
/// is not connected and does not listen yet, as the window that is offered is derived
/// from it. Where the system's own limit (`net.ipv4.tcp_rmem`) is no higher nothing is
/// changed: it grows by need, which is better than any fixed size.
///
/// Going above `net.core.rmem_max` takes CAP_NET_ADMIN; without it the system's
/// limit stays the only one.
pub fn limit_receive_queue(socket: &impl AsFd) {
    // Read once: this is asked for each connection.
    static SYSTEM: OnceLock<Option<usize>> = OnceLock::new();
    let most = SYSTEM.get_or_init(|| {
        let limits = std::fs::read_to_string("/proc/sys/net/ipv4/tcp_rmem").ok()?;
        limits.split_whitespace().last()?.parse().ok()
    });
    if most.is_none_or(|most| most > MOST_QUEUED) {
        // The kernel doubles what is asked for (socket(7)).
        let _ = setsockopt(socket, sockopt::RcvBufForce, &(MOST_QUEUED / 2));
    }
}

/// Narrows a receive queue to what it holds: its sender is promised nothing more, and what
/// is on its way still finds room. Tells the size before, for [`open_receive_queue`].
///
/// # Errors
/// Where the socket is closed.
pub fn close_receive_queue(socket: &impl AsFd) -> io::Result<usize> {
    // What the receive queue holds, and may hold, come first (SO_MEMINFO, Linux 4.12).
    let mut memory = [0u32; 9];
    words(socket, (libc::SOL_SOCKET, libc::SO_MEMINFO), &mut memory)?;
    let [held, size, ..] = memory;
    // The kernel doubles what is asked for, and takes its least instead of less than that
    // (socket(7)), which is below the size of a segment.
    setsockopt(socket, sockopt::RcvBufForce, &(held as usize / 2))?;
    Ok(size as usize)
}

/// Gives a socket back its receive queue. Its sender learns of it with the next read.
///
/// # Errors
/// Where the socket is closed, or without CAP_NET_ADMIN.
pub fn open_receive_queue(socket: &impl AsFd, size: usize) -> io::Result<()> {
    // The kernel doubles what is asked for (socket(7)), and tells what it has.
    Ok(setsockopt(socket, sockopt::RcvBufForce, &(size / 2))?)
}

/// Gives a socket a send queue of a fixed size. What a program redirects has to fit into
/// it at once, and TCP widens a queue only as the connection needs it.
///
/// # Errors
/// Without CAP_NET_ADMIN.
pub fn fix_send_queue(socket: &impl AsFd) -> io::Result<()> {
    // The kernel doubles what is asked for (socket(7)).
    Ok(setsockopt(socket, sockopt::SndBufForce, &(SEND_QUEUE / 2))?)
}

/// From now on closing the socket resets the connection instead of finishing it.
pub fn reset_on_close(socket: &impl AsFd) {
    // If it fails the connection is gone already.
    let _ = SockRef::from(socket).set_linger(Some(Duration::ZERO));
}

fn bytes_acked_and_received(socket: &impl AsFd) -> io::Result<(u64, u64)> {
    // `struct tcp_info` (uapi/linux/tcp.h) in words of eight bytes: bytes_acked and
    // bytes_received are words 15 and 16, since Linux 4.1.
    const ACKED: usize = 15;
    const RECEIVED: usize = 16;
    let mut info = [0u64; RECEIVED + 1];
    words(socket, (libc::IPPROTO_TCP, libc::TCP_INFO), &mut info)?;
    Ok((info[ACKED], info[RECEIVED]))
}

/// Reads the beginning of a socket option that is made of whole words.
fn words<T: zerocopy::FromBytes + zerocopy::IntoBytes>(
    socket: &impl AsFd,
    (level, name): (libc::c_int, libc::c_int),
    words: &mut [T],
) -> io::Result<()> {
    let mut len = size_of_val(words) as libc::socklen_t;
    // SAFETY: the kernel writes at most `len` bytes into `words`, and any bytes will do.
    let result = unsafe {
        libc::getsockopt(socket.as_fd().as_raw_fd(), level, name, words.as_mut_ptr().cast(), &raw mut len)
    };
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Bytes that were received and not read (FIONREAD).
///
/// # Errors
/// Where the socket is closed.
pub fn unread(socket: &impl AsFd) -> io::Result<u64> {
    ioctl_int(socket, libc::FIONREAD)
}

/// Bytes in the send queue that the other side has not acknowledged.
fn unsent(socket: &impl AsFd) -> io::Result<u64> {
    ioctl_int(socket, libc::TIOCOUTQ)
}

fn ioctl_int(socket: &impl AsFd, request: libc::Ioctl) -> io::Result<u64> {
    let mut value: libc::c_int = 0;
    // SAFETY: both requests write one int.
    if unsafe { libc::ioctl(socket.as_fd().as_raw_fd(), request, &raw mut value) } == -1 {
        return Err(io::Error::last_os_error());
    }
    Ok(value.max(0) as u64)
}
