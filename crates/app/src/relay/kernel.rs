//! The kernel path: two sockets joined by a verdict program (`kernel/src/bin/relay.rs`).
//!
//! The program moves the bytes; a worker does what is left (see `worker.rs`). The
//! rules that both keep are in `logic::relay`.

use std::{io, net::TcpStream, os::fd::AsRawFd as _};

use anyhow::{Context as _, Result};
use aya::{
    Ebpf, EbpfLoader,
    maps::{HashMap, Map, MapData, RingBuf, SockHash},
    programs::SkSkb,
};
use socket2::SockRef;
use underpass_abi::relay::{Credit, EVENT_BROKEN, Progress};
use underpass_logic::relay::{is_drained, may_write, must_stop};

use super::{
    shared::Shared,
    tcp::{self, Position},
};
use crate::{
    btf::Btf,
    capabilities::{Capability, require},
    object,
};

/// How many bytes may wait in the kernel for room in a socket's send buffer before
/// the user side takes over and TCP stops the sender.
const CAP: u64 = 256 << 10;
/// Two for each pair of sockets that one worker can have on the kernel path.
pub const SLOTS: u32 = 2 * 16_384;

/// The program and its maps.
pub struct Kernel {
    /// Holds the program, which is gone when this is dropped.
    _ebpf: Ebpf,
    sockets: SockHash<MapData, u64>,
    peers: SockHash<MapData, u64>,
    cookie_to_slot: HashMap<MapData, u64, u32>,
    progress: Shared<Progress>,
    credits: Shared<Credit>,
    /// Readable when [`Kernel::event`] has something to say.
    pub events: RingBuf<MapData>,
}

/// A socket that is joined with another, and the direction that begins there.
#[derive(Debug)]
pub struct Joined {
    cookie: u64,
    slot: u32,
    base: Position,
    /// The program judges what arrives; else the user side carries all of it.
    pub judged: bool,
    /// `redirected` when the order was last found to be right.
    checked: Option<u64>,
    /// The size of the receive queue before it was closed to stop the sender.
    closed: Option<usize>,
}

/// What the program has to say about a slot.
#[derive(Debug, PartialEq, Eq)]
pub enum Event {
    /// Bytes were passed to the user side.
    Passed(u32),
    /// The direction cannot go on: one of `abi::relay::BROKEN_*`.
    Broken(u32, u32),
}

impl Kernel {
    /// Loads the program.
    ///
    /// # Errors
    /// Where the kernel lacks a feature, or the process a capability (CAP_BPF and
    /// CAP_NET_ADMIN).
    pub fn load() -> Result<Self> {
        require(&[Capability::Bpf, Capability::NetAdmin])?;
        let btf = Btf::of_the_kernel()?;
        let fields = [
            ("WRITE_SEQ", btf.field("tcp_sock", "write_seq")?),
            ("COPIED_SEQ", btf.field("tcp_sock", "copied_seq")?),
            ("SNDBUF", btf.field("sock", "sk_sndbuf")?),
            ("WMEM_QUEUED", btf.field("sock", "sk_wmem_queued")?),
        ];
        let mut loader = EbpfLoader::new();
        for (name, offset) in &fields {
            loader.override_global(name, offset, true);
        }
        for map in ["SOCKETS", "PEERS", "COOKIE_TO_SLOT", "PROGRESS", "CREDITS"] {
            loader.map_max_entries(map, SLOTS);
        }
        let mut ebpf = loader.load(object::RELAY).context("cannot load the relay's program")?;
        let sockets: SockHash<_, u64> = take(&mut ebpf, "SOCKETS")?.try_into()?;
        let program: &mut SkSkb = ebpf.program_mut("relay_verdict").context("relay_verdict")?.try_into()?;
        program.load().map_err(object::refusal).context("the kernel refuses the relay's program")?;
        program.attach(sockets.fd()).context("cannot attach the relay's program to its map")?;
        Ok(Self {
            sockets,
            peers: take(&mut ebpf, "PEERS")?.try_into()?,
            cookie_to_slot: take(&mut ebpf, "COOKIE_TO_SLOT")?.try_into()?,
            progress: Shared::map(array(take(&mut ebpf, "PROGRESS")?)?.fd(), SLOTS)?,
            credits: Shared::map(array(take(&mut ebpf, "CREDITS")?)?.fd(), SLOTS)?,
            events: take(&mut ebpf, "EVENTS")?.try_into()?,
            _ebpf: ebpf,
        })
    }

    /// Joins two connected sockets of which the user side holds no byte; the first
    /// one's direction gets `slot`, the second one's the next. Both enter the map
    /// without a program first: nothing is judged before both ways are known. Then
    /// TCP is made to look at what came before the program was there.
    ///
    /// A socket that has received a FIN is refused. If that happens to the second
    /// one between the steps, the user side has to carry its direction.
    ///
    /// # Errors
    /// Where the kernel refuses; then both sockets are as they were.
    pub fn join(&mut self, slot: u32, sockets: [&TcpStream; 2]) -> Result<[Joined; 2]> {
        let [to_a, to_b] = sockets;
        let [mut a, mut b] = [self.prepare(slot, to_a)?, self.prepare(slot + 1, to_b)?];
        let entered = (|| {
            self.cookie_to_slot.insert(a.cookie, a.slot, 0)?;
            self.cookie_to_slot.insert(b.cookie, b.slot, 0)?;
            self.peers.insert(a.cookie, to_b.as_raw_fd(), 0)?;
            self.peers.insert(b.cookie, to_a.as_raw_fd(), 0)?;
            self.sockets.insert(a.cookie, to_a.as_raw_fd(), 0)
        })();
        if let Err(error) = entered {
            for end in [a, b] {
                // Some of these are not there.
                let _ = self.peers.remove(&end.cookie);
                self.forget(&end);
            }
            return Err(anyhow::Error::from(error).context("the kernel refuses the connection"));
        }
        a.judged = true;
        b.judged = self.sockets.insert(b.cookie, to_b.as_raw_fd(), 0).is_ok();
        for socket in [to_a, to_b] {
            // Fails where the socket is closed already, which epoll reports as well.
            let _ = tcp::kick(socket);
        }
        Ok([a, b])
    }

    fn prepare(&mut self, slot: u32, socket: &TcpStream) -> Result<Joined> {
        let cookie = SockRef::from(socket).cookie().context("no cookie (SO_COOKIE, Linux 4.12)")?;
        tcp::fix_send_queue(socket).context("the send queue cannot be widened (SO_SNDBUFFORCE)")?;
        let base = tcp::baseline(socket)?.context("the connection is too busy to be handed over")?;
        self.progress.clear(slot);
        self.credits.clear(slot, CAP);
        Ok(Joined { cookie, slot, base, judged: false, checked: None, closed: None })
    }

    /// Forgets a direction whose socket is closed, which took it out of the sockmaps.
    pub fn forget(&mut self, end: &Joined) {
        // Where it is not there, somebody closed a pair that was never joined.
        let _ = self.cookie_to_slot.remove(&end.cookie);
    }

    /// The next thing that the program has to say.
    pub fn event(&mut self) -> Option<Event> {
        let event = self.events.next()?;
        let word = event.first_chunk().map_or(0, |bytes| u32::from_ne_bytes(*bytes));
        let slot = word & !EVENT_BROKEN;
        if word == slot {
            return Some(Event::Passed(slot));
        }
        Some(Event::Broken(slot, self.progress.get(slot).broken))
    }

    /// Bytes that the kernel has moved from this end.
    pub fn redirected(&self, src: &Joined) -> u64 {
        self.progress.get(src.slot).redirected
    }

    /// Bytes that the program passed to the user side and that are not written yet.
    pub fn owed(&self, src: &Joined) -> u64 {
        self.progress.get(src.slot).passed - self.credits.get(src.slot).consumed
    }

    /// Tells the program that `bytes` of those passed are written.
    pub fn consume(&mut self, src: &Joined, bytes: u64) {
        if src.judged {
            self.credits.consume(src.slot, bytes);
        }
    }

    /// Stops the sender of a direction of which far too many bytes are owed, and lets it
    /// go on later; true while it is stopped, which has to be looked at again then. TCP
    /// does it where passed bytes are charged to their socket; behind redirected ones that
    /// cannot go out they are not.
    ///
    /// # Errors
    /// Where the socket is closed.
    pub fn throttle(&self, src: &mut Joined, socket: &TcpStream) -> io::Result<bool> {
        let stop = must_stop(self.owed(src), src.closed.is_some());
        if stop {
            let size = tcp::close_receive_queue(socket)?;
            src.closed.get_or_insert(size);
        } else if let Some(size) = src.closed.take() {
            tcp::open_receive_queue(socket, size)?;
        }
        Ok(stop)
    }

    /// Whether all that was redirected before the passed bytes is in the other
    /// socket's send queue. Has to be asked before passed bytes are read.
    ///
    /// # Errors
    /// Where the destination is no TCP socket any more.
    pub fn is_in_order(&self, src: &mut Joined, dst: (&Joined, &TcpStream)) -> io::Result<bool> {
        let (progress, credit) = (self.progress.get(src.slot), self.credits.get(src.slot));
        if src.checked == Some(progress.redirected) {
            return Ok(true);
        }
        let queued = tcp::position(dst.1)?.queued.saturating_sub(dst.0.base.queued);
        let right = may_write(&progress, &credit, queued);
        if right {
            src.checked = Some(progress.redirected);
        }
        Ok(right)
    }

    /// Whether the last byte of a direction whose sender has finished is in the
    /// other socket's send queue.
    ///
    /// # Errors
    /// Where a socket is no TCP socket any more.
    pub fn is_drained(&self, src: (&Joined, &TcpStream), dst: (&Joined, &TcpStream)) -> io::Result<bool> {
        let received = tcp::position(src.1)?.received.saturating_sub(src.0.base.received);
        let queued = tcp::position(dst.1)?.queued.saturating_sub(dst.0.base.queued);
        let slot = src.0.slot;
        let drained = is_drained(&self.progress.get(slot), &self.credits.get(slot), received, queued);
        if !drained {
            // Bytes that nobody has looked at yet get another chance.
            let _ = tcp::kick(src.1);
        }
        Ok(drained)
    }
}

fn take(ebpf: &mut Ebpf, name: &str) -> Result<Map> {
    ebpf.take_map(name).with_context(|| format!("the relay's object has no map {name}"))
}

fn array(map: Map) -> Result<MapData> {
    if let Map::Array(data) = map { Ok(data) } else { anyhow::bail!("an array was expected, not {map:?}") }
}
