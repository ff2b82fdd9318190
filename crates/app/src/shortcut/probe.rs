//! What accelerated sockets do on this kernel, found by trying it in a network
//! namespace and a control group of the probe's own.
//!
//! The kernel lets a socket in a map behave unlike one of TCP in many small ways, and
//! which ones changes from version to version. Each is tried by its name here; the page
//! docs/shortcut.md says what follows for programs.

use std::{
    io::{self, ErrorKind, IoSlice, IoSliceMut, Read, Write as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream},
    os::fd::{AsFd as _, AsRawFd as _, FromRawFd as _, OwnedFd},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use nix::{
    fcntl::{SpliceFFlags, splice},
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout},
        socket::{
            AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, recv, recvmsg,
            send, sendmsg, socketpair,
        },
    },
};
use underpass_abi::shortcut::{HABIT_BLOCKS, HABIT_URGENT, HABIT_WAITS_FOR_ALL};

use super::{Scope, Shortcut, cgroup::Temporary};
use crate::{lab::Namespace, relay::tcp};

/// A guard against hanging, far above what anything here takes.
const PATIENCE: Duration = Duration::from_secs(3);
/// Long enough for an event that is there already, short enough to wait for one that
/// must not come.
const MOMENT: Duration = Duration::from_millis(50);
/// A reader that stops must have stopped its sender by then.
const STOPPED_BY: usize = 32 << 20;

/// Something that sockets do, and that programs rely on.
#[derive(Debug)]
pub struct Behaviour {
    /// Its name, for `--accept-risk`.
    pub name: &'static str,
    /// What becomes of programs where it does not hold.
    pub harm: Harm,
    attempt: fn(&Lab) -> Result<()>,
}

/// What a behaviour that does not hold does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Harm {
    /// Data is lost, cut short or out of order for any program.
    Data,
    /// Programs that use it misbehave; the text tells how, or what keeps it from them.
    Some(&'static str),
}

/// What a behaviour was found to be.
#[derive(Debug)]
pub struct Finding {
    /// What was tried.
    pub behaviour: &'static Behaviour,
    /// What was wrong, if anything was.
    pub wrong: Option<String>,
}

/// Everything that is tried.
pub const BEHAVIOURS: [Behaviour; 20] = [
    Behaviour { name: "families", harm: Harm::Data, attempt: families },
    Behaviour { name: "poll", harm: Harm::Data, attempt: polls },
    Behaviour { name: "epoll", harm: Harm::Data, attempt: epolls },
    Behaviour { name: "msg-peek", harm: Harm::Data, attempt: peeks },
    Behaviour { name: "fionread", harm: Harm::Data, attempt: fionread },
    Behaviour { name: "half-close", harm: Harm::Data, attempt: half_closes },
    Behaviour { name: "tail-after-close", harm: Harm::Data, attempt: tail },
    Behaviour { name: "reset", harm: Harm::Data, attempt: resets },
    Behaviour { name: "slow-reader", harm: Harm::Data, attempt: slow_reader },
    Behaviour { name: "passed-socket", harm: Harm::Data, attempt: passed },
    Behaviour { name: "tcp-nodelay", harm: Harm::Data, attempt: nodelay },
    Behaviour {
        name: "fionread-behind",
        harm: Harm::Some("FIONREAD may be 0 for about a millisecond after a reader fell behind by 2 MiB"),
        attempt: fionread_behind,
    },
    Behaviour {
        name: "splice",
        harm: Harm::Some("splice(2) from a socket hangs if the program read it otherwise before"),
        attempt: splices,
    },
    Behaviour {
        name: "so-rcvlowat",
        harm: Harm::Some("SO_RCVLOWAT is ignored if it is set in the middle of a connection"),
        attempt: low_water,
    },
    Behaviour {
        name: "msg-waitall",
        harm: Harm::Some("MSG_WAITALL returns short; who reads so is left to TCP"),
        attempt: waits_for_all,
    },
    Behaviour {
        name: "blocking-recv",
        harm: Harm::Some("a recv that waits may return EAGAIN; who reads so is left to TCP"),
        attempt: blocking_recv,
    },
    Behaviour {
        name: "out-of-band",
        harm: Harm::Some("out-of-band data arrives in band; who reads it is left to TCP"),
        attempt: out_of_band,
    },
    Behaviour {
        name: "close-unread",
        harm: Harm::Some("closing with unread data looks like an orderly end to the peer, not like a reset"),
        attempt: close_unread,
    },
    Behaviour {
        name: "tcp-info",
        harm: Harm::Some("tcp_info does not count redirected bytes"),
        attempt: tcp_info,
    },
    Behaviour {
        name: "low-memory",
        harm: Harm::Some("SO_RCVBUF does not bound what is redirected; the cap of 2 MiB does"),
        attempt: receive_buffer,
    },
];

/// Tries everything.
///
/// # Errors
/// Where the shortcut cannot be loaded at all, or nothing is accelerated.
pub fn run() -> Result<Vec<Finding>> {
    let lab = Lab::new()?;
    Ok(BEHAVIOURS
        .iter()
        .map(|behaviour| Finding {
            behaviour,
            wrong: (behaviour.attempt)(&lab).err().map(|error| format!("{error:#}")),
        })
        .collect())
}

impl Finding {
    /// Whether it keeps the shortcut off unless the user accepts it.
    pub fn is_fatal(&self) -> bool {
        self.wrong.is_some() && self.behaviour.harm == Harm::Data
    }
}

/// Where it is tried: the process is in the control group as long as this lives.
struct Lab {
    shortcut: Shortcut,
    namespace: Namespace,
    _cgroup: Temporary,
}

/// Two ends of an accelerated connection.
struct Pair {
    client: TcpStream,
    server: TcpStream,
}

impl Lab {
    fn new() -> Result<Self> {
        let cgroup = Temporary::new("probe")?;
        // What a program does not do on its own must be tried, too.
        let scope = Scope { ports: vec![], accepted: HABIT_BLOCKS | HABIT_WAITS_FOR_ALL | HABIT_URGENT };
        let shortcut = Shortcut::start(cgroup.path(), &scope)?;
        let namespace = Namespace::new()?;
        cgroup.enter().context("cannot enter the probe's control group")?;
        Ok(Self { shortcut, namespace, _cgroup: cgroup })
    }

    /// An accelerated connection whose sockets do not wait.
    fn pair(&self) -> Result<Pair> {
        self.connect(Ipv4Addr::LOCALHOST.into(), true)
    }

    /// An accelerated connection whose sockets wait, though not for ever.
    fn waiting_pair(&self) -> Result<Pair> {
        self.connect(Ipv4Addr::LOCALHOST.into(), false)
    }

    fn connect(&self, address: IpAddr, nonblocking: bool) -> Result<Pair> {
        let (client, server) = self.namespace.enter(|| -> io::Result<_> {
            let listener = TcpListener::bind(SocketAddr::new(address, 0))?;
            let client = TcpStream::connect(listener.local_addr()?)?;
            Ok((client, listener.accept()?.0))
        })?;
        let port = server.local_addr()?.port();
        for socket in [&client, &server] {
            socket.set_nonblocking(nonblocking)?;
            socket.set_nodelay(true)?;
            socket.set_read_timeout(Some(PATIENCE))?;
        }
        let pair = Pair { client, server };
        let deadline = Instant::now() + PATIENCE;
        // As interactive as can be, until the helper has seen it; then a little more,
        // for readers that wait have to come back from where they wait.
        let mut after = 0;
        while after < 4 {
            pair.ping()?;
            after += u32::from(self.shortcut.is_accelerated(port));
            ensure!(Instant::now() < deadline, "a connection of the probe was not accelerated");
        }
        Ok(pair)
    }
}

impl Pair {
    /// A byte there and a byte back.
    fn ping(&self) -> Result<()> {
        for (from, to) in [(&self.client, &self.server), (&self.server, &self.client)] {
            (&*from).write_all(b"?")?;
            ensure!(read(to, 1)? == b"?", "a byte did not arrive");
        }
        Ok(())
    }
}

/// Reads exactly so many bytes.
fn read(from: &TcpStream, len: usize) -> Result<Vec<u8>> {
    let mut bytes = vec![0; len];
    let mut at = 0;
    while at < len {
        ensure!(readable(from, PATIENCE)?, "{at} of {len} bytes arrived");
        match (&*from).read(&mut bytes[at..]) {
            Ok(0) => bail!("it ended after {at} of {len} bytes"),
            Ok(n) => at += n,
            Err(e) if e.kind() == ErrorKind::WouldBlock => {}
            Err(e) => return Err(e).with_context(|| format!("after {at} of {len} bytes")),
        }
    }
    Ok(bytes)
}

/// Whether poll(2) says that there is something to read.
fn readable(socket: &TcpStream, timeout: Duration) -> Result<bool> {
    let mut polled = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
    poll(&mut polled, PollTimeout::try_from(timeout.as_millis())?)?;
    Ok(polled[0].any() == Some(true))
}

/// Bytes of which each tells its place, as far as a byte can.
fn pattern(from: usize, len: usize) -> Vec<u8> {
    (from..from + len).map(|i| (i % 251) as u8).collect()
}

/// Writes until the socket takes no more; returns how much it took.
fn fill(socket: &TcpStream, limit: usize) -> Result<usize> {
    let bytes = pattern(0, limit);
    let mut at = 0;
    while at < limit {
        match (&*socket).write(&bytes[at..limit.min(at + (64 << 10))]) {
            Ok(n) => at += n,
            Err(e) if e.kind() == ErrorKind::WouldBlock => break,
            Err(e) => return Err(e).with_context(|| format!("after {at} bytes")),
        }
    }
    Ok(at)
}

fn families(lab: &Lab) -> Result<()> {
    lab.connect(Ipv4Addr::LOCALHOST.into(), true).context("IPv4")?;
    if lab.namespace.enter(|| TcpListener::bind((Ipv6Addr::LOCALHOST, 0))).is_ok() {
        lab.connect(Ipv6Addr::LOCALHOST.into(), true).context("IPv6")?;
        lab.connect(Ipv4Addr::LOCALHOST.to_ipv6_mapped().into(), true).context("IPv4 mapped to IPv6")?;
    }
    Ok(())
}

fn polls(lab: &Lab) -> Result<()> {
    let Pair { mut client, server } = lab.pair()?;
    ensure!(!readable(&server, Duration::ZERO)?, "readable without data");
    thread::scope(|scope| {
        let waiting = scope.spawn(|| readable(&server, PATIENCE));
        thread::sleep(MOMENT / 5);
        client.write_all(b"data")?;
        ensure!(waiting.join().is_ok_and(|woken| woken.is_ok_and(|woken| woken)), "poll was not woken");
        ensure!(readable(&server, Duration::ZERO)?, "not readable with data");
        ensure!(read(&server, 4)? == b"data", "other bytes arrived");
        ensure!(!readable(&server, Duration::ZERO)?, "readable after all was read");
        Ok(())
    })
}

fn epolls(lab: &Lab) -> Result<()> {
    let Pair { mut client, server } = lab.pair()?;
    let epoll = Epoll::new(EpollCreateFlags::empty())?;
    epoll.add(&server, EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLET, 0))?;
    let wakes = |timeout: Duration| -> Result<bool> {
        let mut events = [EpollEvent::empty()];
        Ok(epoll.wait(&mut events, EpollTimeout::try_from(timeout.as_millis())?)? > 0)
    };
    for _ in 0..3 {
        client.write_all(b"data")?;
        ensure!(wakes(PATIENCE)?, "no edge for new data");
        ensure!(!wakes(Duration::ZERO)?, "an edge without new data");
        read(&server, 2)?;
    }
    read(&server, 6)?;
    Ok(())
}

fn peeks(lab: &Lab) -> Result<()> {
    let Pair { mut client, server } = lab.pair()?;
    client.write_all(b"one")?;
    client.write_all(b"two")?;
    let mut bytes = [0; 4];
    for _ in 0..2 {
        ensure!(server.peek(&mut bytes)? >= 3 && bytes.starts_with(b"one"), "peek sees other bytes");
    }
    ensure!(read(&server, 6)? == b"onetwo", "peeking changed what is read");
    Ok(())
}

fn fionread(lab: &Lab) -> Result<()> {
    let Pair { mut client, server } = lab.pair()?;
    client.write_all(&[1; 700])?;
    client.write_all(&[1; 300])?;
    let unread = tcp::unread(&server)?;
    ensure!(unread == 1000, "FIONREAD says {unread} while 1000 bytes wait");
    read(&server, 400)?;
    let unread = tcp::unread(&server)?;
    ensure!(unread == 600, "FIONREAD says {unread} while 600 bytes wait");
    Ok(())
}

fn fionread_behind(lab: &Lab) -> Result<()> {
    let Pair { client, server } = lab.pair()?;
    let sent = fill(&client, 3 << 20)?;
    let mut left = sent;
    while left > 0 {
        ensure!(readable(&server, PATIENCE)?, "{left} of {sent} bytes did not arrive");
        let unread = tcp::unread(&server)? as usize;
        ensure!(unread > 0, "FIONREAD says 0 while poll says readable and {left} bytes wait");
        read(&server, unread)?;
        left = left.saturating_sub(unread);
    }
    Ok(())
}

fn splices(lab: &Lab) -> Result<()> {
    let Pair { mut client, server } = lab.pair()?;
    client.write_all(b"data")?;
    let (_end, pipe) = nix::unistd::pipe()?;
    match splice(&server, None, &pipe, None, 64, SpliceFFlags::SPLICE_F_NONBLOCK) {
        Ok(4) => Ok(()),
        Ok(n) => bail!("splice moved {n} of 4 bytes"),
        Err(e) => bail!("splice says {e} while poll says readable"),
    }
}

fn low_water(lab: &Lab) -> Result<()> {
    let Pair { mut client, server } = lab.pair()?;
    tcp::set_low_water(&server, 100)?;
    client.write_all(&[1; 10])?;
    ensure!(!readable(&server, MOMENT)?, "readable with 10 bytes where 100 were asked for");
    client.write_all(&[1; 90])?;
    ensure!(readable(&server, PATIENCE)?, "not readable with all that was asked for");
    Ok(())
}

fn waits_for_all(lab: &Lab) -> Result<()> {
    let Pair { mut client, server } = lab.waiting_pair()?;
    thread::scope(|scope| {
        let reading = scope.spawn(|| recv(server.as_raw_fd(), &mut [0; 1000], MsgFlags::MSG_WAITALL));
        for _ in 0..2 {
            thread::sleep(MOMENT / 5);
            client.write_all(&[1; 500])?;
        }
        match reading.join() {
            Ok(Ok(1000)) => Ok(()),
            Ok(Ok(n)) => bail!("MSG_WAITALL returned {n} of 1000 bytes"),
            other => bail!("MSG_WAITALL failed: {other:?}"),
        }
    })
}

/// A wake-up that brings no data makes the kernel give EAGAIN to a recv that waits
/// (`tcp_bpf_recvmsg` waits once, where `tcp_recvmsg` does so in a loop). A signal does
/// it, room in the send buffer does it, and a reset, which is easiest to bring about.
fn blocking_recv(lab: &Lab) -> Result<()> {
    let Pair { client, server } = lab.waiting_pair()?;
    thread::scope(|scope| {
        let reading = scope.spawn(|| (&server).read(&mut [0; 10]));
        thread::sleep(MOMENT / 5);
        tcp::reset_on_close(&client);
        drop(client);
        match reading.join() {
            Ok(Err(e)) if e.kind() == ErrorKind::ConnectionReset => Ok(()),
            Ok(other) => bail!("a recv that waited returned {other:?}, not a reset"),
            Err(_) => bail!("the reader panicked"),
        }
    })
}

fn half_closes(lab: &Lab) -> Result<()> {
    let Pair { mut client, mut server } = lab.pair()?;
    client.write_all(b"request")?;
    client.shutdown(Shutdown::Write)?;
    ensure!((&client).write(b"more").is_err(), "a socket that was shut down takes data");
    ensure!(read(&server, 7)? == b"request", "other bytes arrived");
    ensure!(ends(&server)?, "no end after the last byte");
    server.write_all(b"response")?;
    drop(server);
    ensure!(read(&client, 8)? == b"response", "other bytes came back");
    ensure!(ends(&client)?, "no end after the last byte, the other way");
    Ok(())
}

/// Whether the next thing to read is the end.
fn ends(socket: &TcpStream) -> Result<bool> {
    Ok(readable(socket, PATIENCE)? && (&*socket).read(&mut [0])? == 0)
}

fn tail(lab: &Lab) -> Result<()> {
    let Pair { client, server } = lab.pair()?;
    let sent = fill(&client, 1 << 20)?;
    drop(client);
    ensure!(read(&server, sent)? == pattern(0, sent), "other bytes arrived");
    ensure!(ends(&server)?, "no end after the last byte");
    Ok(())
}

fn resets(lab: &Lab) -> Result<()> {
    let Pair { client, server } = lab.pair()?;
    tcp::reset_on_close(&server);
    drop(server);
    expect_reset(&client)
}

fn close_unread(lab: &Lab) -> Result<()> {
    let Pair { mut client, server } = lab.pair()?;
    client.write_all(b"never read")?;
    drop(server);
    expect_reset(&client)
}

fn expect_reset(socket: &TcpStream) -> Result<()> {
    ensure!(readable(socket, PATIENCE)?, "nothing happened");
    match (&*socket).read(&mut [0]) {
        Err(e) if e.kind() == ErrorKind::ConnectionReset => Ok(()),
        Ok(0) => bail!("it looks like an orderly end"),
        other => bail!("it looks like {other:?}"),
    }
}

fn slow_reader(lab: &Lab) -> Result<()> {
    let Pair { client, server } = lab.pair()?;
    let mut sent = fill(&client, STOPPED_BY)?;
    ensure!(sent < STOPPED_BY, "a reader that stopped did not stop its sender within {STOPPED_BY} bytes");
    let taken = sent;
    let mut received = 0;
    while received < taken + (1 << 20) {
        // The sender goes on whenever it can.
        if sent < taken + (1 << 20) {
            match (&client).write(&pattern(sent, 1000.min(taken + (1 << 20) - sent))) {
                Ok(n) => sent += n,
                Err(e) if e.kind() == ErrorKind::WouldBlock => {}
                Err(e) => return Err(e.into()),
            }
        }
        let len = 50_000.min(sent - received);
        ensure!(read(&server, len)? == pattern(received, len), "bytes are out of order near {received}");
        received += len;
    }
    Ok(())
}

fn passed(lab: &Lab) -> Result<()> {
    let Pair { mut client, server } = lab.pair()?;
    let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::Stream, None, SockFlag::empty())?;
    client.write_all(b"before")?;
    let fds = [server.as_raw_fd()];
    sendmsg::<()>(
        ours.as_raw_fd(),
        &[IoSlice::new(b"x")],
        &[ControlMessage::ScmRights(&fds)],
        MsgFlags::empty(),
        None,
    )?;
    drop(server);
    client.write_all(b"after")?;
    let mut space = nix::cmsg_space!([i32; 1]);
    let mut byte = [0];
    let mut slices = [IoSliceMut::new(&mut byte)];
    let message = recvmsg::<()>(theirs.as_raw_fd(), &mut slices, Some(&mut space), MsgFlags::empty())?;
    let fd = message.cmsgs()?.find_map(|message| {
        let ControlMessageOwned::ScmRights(fds) = message else { return None };
        fds.first().copied()
    });
    // SAFETY: the kernel has just made the descriptor for this message.
    let server = TcpStream::from(unsafe { OwnedFd::from_raw_fd(fd.context("no socket was passed")?) });
    ensure!(read(&server, 11)? == b"beforeafter", "other bytes arrived");
    (&server).write_all(b"back")?;
    ensure!(read(&client, 4)? == b"back", "other bytes came back");
    Ok(())
}

fn nodelay(lab: &Lab) -> Result<()> {
    let Pair { mut client, server } = lab.pair()?;
    for on in [false, true] {
        client.set_nodelay(on)?;
        ensure!(client.nodelay()? == on, "TCP_NODELAY cannot be set");
        client.write_all(b"a")?;
        client.write_all(b"b")?;
        ensure!(read(&server, 2)? == b"ab", "other bytes arrived");
    }
    Ok(())
}

fn out_of_band(lab: &Lab) -> Result<()> {
    let Pair { client, server } = lab.pair()?;
    send(client.as_raw_fd(), b"!", MsgFlags::MSG_OOB)?;
    let mut polled = [PollFd::new(server.as_fd(), PollFlags::POLLPRI)];
    poll(&mut polled, PollTimeout::try_from(MOMENT.as_millis())?)?;
    ensure!(polled[0].any() == Some(true), "out-of-band data is not announced (POLLPRI)");
    let read = recv(server.as_raw_fd(), &mut [0], MsgFlags::MSG_OOB);
    ensure!(read == Ok(1), "out-of-band data is not there: {read:?}");
    Ok(())
}

fn tcp_info(lab: &Lab) -> Result<()> {
    let Pair { mut client, server } = lab.pair()?;
    let before = tcp::position(&server)?.received;
    client.write_all(&[1; 1000])?;
    read(&server, 1000)?;
    let counted = tcp::position(&server)?.received - before;
    ensure!(counted == 1000, "tcp_info counted {counted} of 1000 bytes");
    Ok(())
}

fn receive_buffer(lab: &Lab) -> Result<()> {
    let Pair { client, server } = lab.pair()?;
    socket2::SockRef::from(&server).set_recv_buffer_size(8192)?;
    socket2::SockRef::from(&client).set_send_buffer_size(8192)?;
    let taken = fill(&client, 1 << 20)?;
    ensure!(taken < 512 << 10, "buffers of 8 KiB took {taken} bytes");
    Ok(())
}
