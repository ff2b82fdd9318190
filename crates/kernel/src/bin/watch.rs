//! watch: who talks to whom, from the sockets themselves.
//!
//! - `watch_state` follows TCP's state changes: it notes who connects and who
//!   listens, and reports a connection once, when it ends, with its totals.
//!   `watch_state2` stands in for it where the kernel passed it over.
//! - `watch_send` and `watch_receive` run once per system call: the first user of
//!   an accepted connection becomes its owner; datagrams, raw packets and frames
//!   are counted per socket, process and peer.
//! - `watch_*msg*` note the peer that a UDP call names; `watch_release` ends flows.
//! - `watch_tcp`, `watch_flows` are iterators: they hand out what has changed,
//!   when the user side asks. `watch_seed`, `watch_seed_tcp` note what was there
//!   before.
//!
//! No program runs per packet.
#![no_std]
#![no_main]

use core::{ffi::c_void, ptr};

use aya_ebpf::{
    EbpfContext as _,
    bindings::{BPF_F_NO_PREALLOC, BPF_RB_FORCE_WAKEUP, BPF_RB_NO_WAKEUP, BPF_SK_STORAGE_GET_F_CREATE},
    btf_maps::{Array, HashMap, LruHashMap, PerCpuArray, RingBuf, SkStorage},
    helpers::{
        bpf_get_current_comm, bpf_get_current_pid_tgid, bpf_get_current_uid_gid, bpf_ktime_get_boot_ns,
        bpf_probe_read_kernel, bpf_probe_read_user,
        generated::{
            bpf_get_current_cgroup_id, bpf_get_current_task_btf, bpf_get_socket_cookie,
            bpf_probe_read_kernel_str, bpf_probe_read_user as probe_read_user, bpf_ringbuf_query,
            bpf_seq_write, bpf_sk_storage_get, bpf_skc_to_tcp_sock, bpf_sock_from_file, bpf_task_pt_regs,
        },
    },
    macros::{btf_map, btf_tracepoint, cgroup_sock, cgroup_sock_addr},
    programs::{BtfTracePointContext, SockAddrContext, SockContext},
};
use underpass_abi::watch::{
    ANSWER, Address, Answer, Calls, Connection, Datagrams, Filter, Flow, FlowKey, NAME, Offsets, Owner,
    PACKET, Path, Peer, Process, Released, Socket, StateChange, control, direction, event, flag, lost,
    quality,
};
use underpass_kernel::add_to;

underpass_kernel::license!();

#[unsafe(no_mangle)]
static OFFSETS: Offsets = ZERO_OFFSETS;
#[unsafe(no_mangle)]
static CALLS: Calls = ZERO_CALLS;
#[unsafe(no_mangle)]
static FILTER: Filter = ZERO_FILTER;

// SAFETY: these are made of integers only, for which zero is a value.
const ZERO_OFFSETS: Offsets = unsafe { core::mem::zeroed() };
// SAFETY: as above.
const ZERO_CALLS: Calls = unsafe { core::mem::zeroed() };
// SAFETY: as above.
const ZERO_FILTER: Filter = unsafe { core::mem::zeroed() };

/// A read-only global that the user side has set; the verifier knows its value.
macro_rules! global {
    ($structure:ident.$field:ident) => {
        // SAFETY: a read of an initialised static; volatile, as its value is set before the load.
        unsafe { ptr::read_volatile(&raw const $structure.$field) }
    };
}

/// A field of a kernel object whose type the verifier knows: it checks the access.
macro_rules! field {
    ($object:expr, $offset:ident as $kind:ty) => {{
        let (object, offset) = ($object, global!(OFFSETS.$offset));
        // SAFETY: the offset comes from the kernel's own description of the object,
        // the verifier refuses what does not fit, and the kernel handles a fault.
        unsafe { ptr::read_volatile(object.cast::<u8>().add(offset as usize).cast::<$kind>()) }
    }};
}

/// A field of any kernel object, read through a helper: for what is off the hot path.
macro_rules! probe {
    ($object:expr, $offset:ident as $kind:ty) => {{
        let place = $object.cast::<u8>().wrapping_add(global!(OFFSETS.$offset) as usize);
        // SAFETY: the helper fails on an address that cannot be read.
        unsafe { bpf_probe_read_kernel(place.cast::<$kind>()) }
    }};
}

/// The user side makes it as large as the machine asks for.
#[btf_map]
static EVENTS: RingBuf<u8, { 4 << 20 }> = RingBuf::new();

/// Every TCP socket. A child gets a copy of its listener's.
#[btf_map]
static SOCKETS: ClonedStorage<Socket> = ClonedStorage::new();

/// Every other socket that has sent or received.
#[btf_map]
static DATAGRAMS: SkStorage<Datagrams> = SkStorage::new();

#[btf_map]
static FLOWS: HashMap<FlowKey, Flow, 65536, { BPF_F_NO_PREALLOC as usize }> = HashMap::new();

/// The peer that a thread's current call names. Short-lived: a lost entry costs
/// a flow its address, never its bytes.
#[btf_map]
static PEERS: LruHashMap<u64, Peer, 4096> = LruHashMap::new();

/// Which processes the user side has been told of, and running which program.
#[btf_map]
static PROCESSES: LruHashMap<u32, u64, 16384> = LruHashMap::new();

/// What the user side switches while the programs run.
#[btf_map]
static CONTROLS: Array<u32, { control::COUNT as usize }> = Array::new();

/// What `watch_state` last began to look at on each CPU.
#[btf_map]
static STATES: PerCpuArray<StateChange, 1> = PerCpuArray::new();

#[btf_map]
static LOST: PerCpuArray<u64, { lost::COUNT as usize }> = PerCpuArray::new();

const TCP: u16 = 6;
const AF_INET: u16 = 2;
const AF_INET6: u16 = 10;
const AF_PACKET: u16 = 17;

/// `enum` of include/net/tcp_states.h, the same since Linux 2.6.
mod state {
    pub const ESTABLISHED: i32 = 1;
    pub const SYN_SENT: i32 = 2;
    pub const SYN_RECV: i32 = 3;
    pub const FIN_WAIT1: i32 = 4;
    pub const FIN_WAIT2: i32 = 5;
    pub const CLOSE: i32 = 7;
    pub const CLOSE_WAIT: i32 = 8;
    pub const LAST_ACK: i32 = 9;
    pub const LISTEN: i32 = 10;
    pub const CLOSING: i32 = 11;
}

/// A kernel object.
type Object = *const c_void;

// ---- TCP ----

#[btf_tracepoint(function = "inet_sock_set_state")]
pub fn watch_state(ctx: BtfTracePointContext) -> i32 {
    let sk: Object = ctx.arg(0);
    let (old, new) = (ctx.arg(1), ctx.arg(2));
    if field!(sk, protocol as u16) != TCP || !matters(old, new) {
        return 0;
    }
    let Some(last) = STATES.get_ptr_mut(0) else { return 0 };
    // SAFETY: this CPU's value. The order counts: an interrupt may come between.
    unsafe {
        ptr::write_volatile(&raw mut (*last).sk, sk as u64);
        ptr::write_volatile(&raw mut (*last).new, new);
        ptr::write_volatile(&raw mut (*last).busy, 1);
    }
    changed(sk, old, new);
    // SAFETY: as above.
    unsafe { ptr::write_volatile(&raw mut (*last).busy, 0) };
    0
}

/// The kernel does not run a program on a CPU that is in the middle of it: a state
/// change in softirq, while `watch_state` looks at another one, is passed over. This
/// program runs after it, for every change, and looks at those. One that it takes for
/// passed over, though it was not, does no harm: each is noted but once.
#[btf_tracepoint(function = "inet_sock_set_state")]
pub fn watch_state2(ctx: BtfTracePointContext) -> i32 {
    let sk: Object = ctx.arg(0);
    let (old, new) = (ctx.arg(1), ctx.arg(2));
    if field!(sk, protocol as u16) != TCP || !matters(old, new) {
        return 0;
    }
    let Some(last) = STATES.get_ptr_mut(0) else { return 0 };
    // SAFETY: this CPU's value.
    let (seen, busy) = unsafe { (((*last).sk, (*last).new), (*last).busy) };
    if seen == (sk as u64, new) {
        return 0;
    }
    changed(sk, old, new);
    if busy == 1 {
        lose(lost::CAUGHT);
    }
    0
}

/// Whether anything is done about a state change.
#[inline(always)]
fn matters(old: i32, new: i32) -> bool {
    match new {
        state::SYN_SENT | state::LISTEN | state::FIN_WAIT1 | state::LAST_ACK | state::CLOSE => true,
        state::ESTABLISHED => old == state::SYN_RECV,
        _ => false,
    }
}

#[inline(always)]
fn changed(sk: Object, old: i32, new: i32) {
    match new {
        state::SYN_SENT => begun(sk, quality::SEEN, direction::OUTBOUND, 0),
        state::LISTEN => begun(sk, quality::LISTENER, direction::UNKNOWN, flag::LISTENING),
        // A child of a listener. This runs wherever its last packet came in, so the
        // current task says nothing; the copy of the listener's owner stands in.
        state::ESTABLISHED if old == state::SYN_RECV => accepted(sk),
        state::FIN_WAIT1 | state::LAST_ACK | state::CLOSE => {
            let Some(socket) = socket_of(sk) else { return };
            if socket.flags & (flag::LISTENING | flag::REPORTED) != 0 {
                return;
            }
            // The lock is held by a task only inside a system call of its own: close,
            // shutdown or exit. In softirq it is not.
            if field!(sk, owned as i32) == 1 {
                take_over(socket);
            }
            if new == state::CLOSE {
                socket.flags |= flag::REPORTED;
                report_end(sk, socket, old);
            }
        }
        _ => {}
    }
}

#[inline(always)]
fn begun(sk: Object, quality: u32, direction: u8, flags: u8) {
    let Some(socket) = storage(sk) else { return };
    *socket = Socket {
        cookie: cookie(sk),
        started: now(),
        reported_rx: u64::MAX,
        reported_tx: u64::MAX,
        owner: current(quality),
        direction,
        flags,
        padding: [0; 2],
        netns: netns(sk),
    };
    introduce(socket.owner.tgid);
}

#[inline(always)]
fn accepted(sk: Object) {
    let Some(socket) = storage(sk) else { return };
    socket.cookie = cookie(sk);
    socket.started = now();
    socket.reported_rx = u64::MAX;
    socket.reported_tx = u64::MAX;
    socket.direction = direction::INBOUND;
    socket.flags = 0;
    socket.netns = netns(sk);
    if socket.owner.quality > quality::LISTENER {
        socket.owner.quality = quality::LISTENER;
    }
}

/// The current process uses the connection: it owns it unless another was seen to.
#[inline(always)]
fn take_over(socket: &mut Socket) {
    if socket.owner.quality < quality::SEEN {
        socket.owner = current(quality::SEEN);
        introduce(socket.owner.tgid);
    }
}

#[inline(always)]
fn report_end(sk: Object, socket: &Socket, old: i32) {
    let Some(report) = tcp_report(sk, socket, event::CLOSED, old) else { return };
    if shown(&report) {
        send(&report);
    }
}

/// What is to be said of a TCP connection that is, or until now was, in `state`.
#[inline(always)]
fn tcp_report(sk: Object, socket: &Socket, kind: u32, state: i32) -> Option<Connection> {
    // SAFETY: `sk` is a socket; the helper checks that it is one of TCP.
    let tcp = unsafe { bpf_skc_to_tcp_sock(sk.cast_mut()) };
    if tcp.is_null() {
        return None;
    }
    let fin = match state {
        state::CLOSE_WAIT | state::LAST_ACK | state::CLOSING => 1,
        state::FIN_WAIT1 | state::FIN_WAIT2 => field!(sk, flags as u64) >> SOCK_DONE & 1,
        // A reset sets the flag without a FIN.
        _ => 0,
    };
    let (local, remote) = addresses(sk);
    Some(Connection {
        kind,
        netns: socket.netns,
        cookie: socket.cookie,
        started: socket.started,
        at: now(),
        rx_bytes: field!(tcp, bytes_received as u64).saturating_sub(fin),
        tx_bytes: field!(tcp, bytes_sent as u64) - field!(tcp, bytes_retrans as u64),
        local,
        remote,
        // `skc_num` is already given back at the end.
        local_port: u16::from_be(field!(tcp, sport as u16)),
        remote_port: u16::from_be(field!(sk, dport as u16)),
        protocol: TCP,
        direction: socket.direction,
        flags: if socket.owner.kernel == 1 { flag::KERNEL } else { 0 },
        rtt_us: field!(tcp, srtt as u32) >> 3,
        retransmits: field!(tcp, total_retrans as u32),
        owner: socket.owner,
    })
}

/// `enum sock_flags`: the peer has sent its FIN.
const SOCK_DONE: u64 = 1;

// ---- One system call ----

#[btf_tracepoint(function = "sock_send_length")]
pub fn watch_send(ctx: BtfTracePointContext) -> i32 {
    used(&ctx, true);
    0
}

#[btf_tracepoint(function = "sock_recv_length")]
pub fn watch_receive(ctx: BtfTracePointContext) -> i32 {
    used(&ctx, false);
    0
}

const MSG_PEEK: i32 = 2;
const MSG_ERRQUEUE: i32 = 0x2000;

#[inline(always)]
fn used(ctx: &BtfTracePointContext, sent: bool) {
    let sk: Object = ctx.arg(0);
    let (result, flags): (i32, i32) = (ctx.arg(1), ctx.arg(2));
    let family = field!(sk, family as u16);
    if family != AF_INET && family != AF_INET6 && family != AF_PACKET {
        return;
    }
    if family != AF_PACKET && field!(sk, protocol as u16) == TCP {
        tcp_used(sk, result, sent);
    } else {
        datagram(sk, family, result, flags, sent);
    }
}

#[inline(always)]
fn tcp_used(sk: Object, result: i32, sent: bool) {
    let Some(socket) = socket_of(sk) else { return };
    if result >= 0 {
        take_over(socket);
    }
    if !sent && result > 0 && field!(sk, dport as u16) == DNS {
        answer(socket.cookie, TCP, result as u32);
    }
}

/// Port 53, as in the packet.
const DNS: u16 = 53u16.to_be();

#[inline(always)]
fn datagram(sk: Object, family: u16, result: i32, flags: i32, sent: bool) {
    let mut key = FlowKey { cookie: 0, remote: [0; 16], tgid: 0, remote_port: 0, padding: 0 };
    let named = named_peer(&mut key);
    if result <= 0 || flags & (MSG_PEEK | MSG_ERRQUEUE) != 0 {
        return;
    }
    key.cookie = cookie(sk);
    key.tgid = (bpf_get_current_pid_tgid() >> 32) as u32;
    let (mut protocol, mut local) = (PACKET, [0; 16]);
    if family != AF_PACKET {
        let connected;
        (local, connected) = addresses(sk);
        protocol = field!(sk, protocol as u16);
        if !named && connected != [0; 16] {
            (key.remote, key.remote_port) = (connected, u16::from_be(field!(sk, dport as u16)));
        } else if !named && sent {
            peer_argument(&mut key);
        }
    }
    count(sk, &key, local, protocol, result as u64, sent);
    if !sent && key.remote_port == DNS.swap_bytes() {
        answer(key.cookie, protocol, result as u32);
    }
}

#[inline(always)]
fn count(sk: Object, key: &FlowKey, local: Address, protocol: u16, bytes: u64, sent: bool) {
    let time = now();
    if let Some(flow) = FLOWS.get_ptr_mut(key) {
        // SAFETY: the map's value; counts are atomic, the time is one aligned store.
        unsafe { add(flow, bytes, sent, time) };
        return;
    }
    let packet = protocol == PACKET;
    let flow = Flow {
        started: time,
        seen: time,
        rx_bytes: if sent { 0 } else { bytes },
        tx_bytes: if sent { bytes } else { 0 },
        reported_rx: u64::MAX,
        reported_tx: u64::MAX,
        local,
        owner: current(quality::SEEN),
        local_port: if packet { 0 } else { field!(sk, num as u16) },
        protocol,
        direction: if sent { direction::OUTBOUND } else { direction::INBOUND },
        padding: [0; 3],
        netns: netns(sk),
        padding2: 0,
    };
    if !shown(&flow_report(key, &flow, event::LIVE)) {
        return;
    }
    const NOEXIST: u64 = 1;
    if FLOWS.insert(key, &flow, NOEXIST).is_err() {
        match FLOWS.get_ptr_mut(key) {
            // Another thread was first.
            // SAFETY: as above.
            Some(flow) => unsafe { add(flow, bytes, sent, time) },
            None => lose(lost::FLOWS),
        }
        return;
    }
    introduce(key.tgid);
    remember(sk, key);
}

#[inline(always)]
unsafe fn add(flow: *mut Flow, bytes: u64, sent: bool, time: u64) {
    // SAFETY: the caller's pointer is the map's value.
    unsafe {
        let counter = if sent { &raw mut (*flow).tx_bytes } else { &raw mut (*flow).rx_bytes };
        add_to(counter, bytes);
        (*flow).seen = time;
    }
}

/// Lets the socket know its flows, so that its end is theirs.
#[inline(always)]
fn remember(sk: Object, key: &FlowKey) {
    // SAFETY: `sk` is a full socket, the map one of socket storage.
    let datagrams = unsafe {
        bpf_sk_storage_get(
            map(&DATAGRAMS),
            sk.cast_mut(),
            ptr::null_mut(),
            u64::from(BPF_SK_STORAGE_GET_F_CREATE),
        )
    };
    // SAFETY: null, or the socket's storage, which lives as long as the program runs.
    match unsafe { datagrams.cast::<Datagrams>().as_mut() } {
        Some(datagrams) => {
            datagrams.last = *key;
            datagrams.flows += 1;
        }
        None => lose(lost::SOCKETS),
    }
}

// ---- The peer of a datagram ----

#[cgroup_sock_addr(sendmsg4)]
pub fn watch_sendmsg4(ctx: SockAddrContext) -> i32 {
    name_peer4(&ctx)
}

#[cgroup_sock_addr(sendmsg6)]
pub fn watch_sendmsg6(ctx: SockAddrContext) -> i32 {
    name_peer6(&ctx)
}

#[cgroup_sock_addr(recvmsg4)]
pub fn watch_recvmsg4(ctx: SockAddrContext) -> i32 {
    name_peer4(&ctx)
}

#[cgroup_sock_addr(recvmsg6)]
pub fn watch_recvmsg6(ctx: SockAddrContext) -> i32 {
    name_peer6(&ctx)
}

#[inline(always)]
fn name_peer4(ctx: &SockAddrContext) -> i32 {
    // SAFETY: the context of this program type has these fields.
    let (ip, port) = unsafe { ((*ctx.sock_addr).user_ip4, (*ctx.sock_addr).user_port) };
    name_peer(mapped(ip), port)
}

#[inline(always)]
fn name_peer6(ctx: &SockAddrContext) -> i32 {
    // SAFETY: as above. Word by word: the verifier knows no wider access here.
    let (words, port) = unsafe {
        let ip = &raw const (*ctx.sock_addr).user_ip6;
        let word = |i| ptr::read_volatile(ip.cast::<u32>().add(i));
        ([word(0), word(1), word(2), word(3)], (*ctx.sock_addr).user_port)
    };
    name_peer(joined(words), port)
}

#[inline(always)]
fn name_peer(address: Address, port: u32) -> i32 {
    let thread = bpf_get_current_pid_tgid();
    let peer = Peer { address, port: u16::from_be(port as u16), valid: 1, padding: 0 };
    if PEERS.insert(&thread, &peer, 0).is_err() {
        lose(lost::SOCKETS);
    }
    ALLOW
}

/// Verdict of the cgroup programs: they only look.
const ALLOW: i32 = 1;

/// Enters the peer that this thread's call has named, once.
#[inline(always)]
fn named_peer(key: &mut FlowKey) -> bool {
    let Some(peer) = PEERS.get_ptr_mut(&bpf_get_current_pid_tgid()) else { return false };
    // SAFETY: the map's value, which only this thread writes.
    unsafe {
        if (*peer).valid == 0 {
            return false;
        }
        (*peer).valid = 0;
        (key.remote, key.remote_port) = ((*peer).address, (*peer).port);
    }
    true
}

/// Enters the peer that a raw socket's sender names, for which there is no hook of
/// its own: the address that the system call points to.
#[inline(always)]
fn peer_argument(key: &mut FlowKey) {
    let Some(call) = Call::current() else { return };
    let name = if call.number == global!(CALLS.sendto) {
        call.fifth
    } else if call.number == global!(CALLS.sendmsg) {
        user_word(call.second).unwrap_or(0)
    } else {
        return;
    };
    // `struct sockaddr_in`: family, port, address; `sockaddr_in6` has a word between.
    let Some(head) = user_word(name) else { return };
    if head as u16 == AF_INET {
        key.remote = mapped((head >> 32) as u32);
    } else if head as u16 == AF_INET6 {
        // SAFETY: the helper fails on an address that cannot be read.
        key.remote = unsafe { bpf_probe_read_user((name + 8) as *const Address) }.unwrap_or([0; 16]);
    }
}

/// The system call that the current thread is in.
struct Call {
    number: u32,
    second: u64,
    fifth: u64,
}

impl Call {
    #[inline(always)]
    fn current() -> Option<Self> {
        // SAFETY: the helpers have no preconditions; the registers of a thread that
        // is inside a system call are those of its user side.
        let regs = unsafe { bpf_task_pt_regs(bpf_get_current_task_btf()) } as Object;
        let number = probe!(regs, regs_call as u64).ok()? as u32;
        let (second, fifth) = (probe!(regs, regs_second as u64).ok()?, probe!(regs, regs_fifth as u64).ok()?);
        Some(Self { number, second, fifth })
    }

    /// Where this call has put what it received.
    #[inline(always)]
    fn received(&self) -> Option<u64> {
        if self.number == global!(CALLS.read) || self.number == global!(CALLS.recvfrom) {
            return Some(self.second);
        }
        let vector = if self.number == global!(CALLS.readv) {
            self.second
        } else if self.number == global!(CALLS.recvmsg) || self.number == global!(CALLS.recvmmsg) {
            // `struct user_msghdr`: msg_name, msg_namelen, msg_iov.
            user_word(self.second + 16)?
        } else {
            return None;
        };
        user_word(vector)
    }
}

/// A word of the current process' memory.
#[inline(always)]
fn user_word(at: u64) -> Option<u64> {
    // SAFETY: the helper fails on an address that cannot be read.
    unsafe { bpf_probe_read_user(at as *const u64) }.ok()
}

/// Hands on what was just received from a name server, from where the receiver
/// has it: no packet is touched, and connections that are no name server's pay
/// nothing.
#[inline(always)]
fn answer(cookie: u64, protocol: u16, received: u32) {
    let Some(at) = Call::current().and_then(|call| call.received()) else { return };
    let Some(mut entry) = EVENTS.reserve_untyped::<Answer>(0) else { return lose(lost::NAMES) };
    let record = entry.as_mut_ptr();
    let len = if received > ANSWER as u32 { ANSWER as u32 } else { received };
    // SAFETY: the record is ours until it is submitted and as large as is said; what
    // cannot be read leaves zeros, and `len` says how much is meant.
    unsafe {
        (*record).kind = event::ANSWER;
        (*record).len = len;
        (*record).cookie = cookie;
        (*record).at = now();
        (*record).protocol = u32::from(protocol);
        (*record).received = received;
        let bytes = (&raw mut (*record).bytes).cast::<c_void>();
        if probe_read_user(bytes, len, at as Object) < 0 {
            (*record).len = 0;
        }
    }
    entry.submit(wakeup());
}

// ---- The end of a datagram socket ----

#[cgroup_sock(sock_release)]
pub fn watch_release(ctx: SockContext) -> i32 {
    // SAFETY: the context of this program type has this field.
    if unsafe { (*ctx.sock).protocol } != u32::from(TCP) {
        released(&ctx);
    }
    ALLOW
}

#[inline(always)]
fn released(ctx: &SockContext) {
    // SAFETY: the context stands for the socket.
    let datagrams = unsafe { bpf_sk_storage_get(map(&DATAGRAMS), ctx.as_ptr(), ptr::null_mut(), 0) };
    // SAFETY: null, or the socket's storage.
    let Some(datagrams) = (unsafe { datagrams.cast::<Datagrams>().as_ref() }) else { return };
    let key = datagrams.last;
    if datagrams.flows == 1
        && let Some(flow) = FLOWS.get_ptr_mut(&key)
    {
        // SAFETY: the map's value.
        let report = unsafe { flow_report(&key, &*flow, event::CLOSED) };
        send(&report);
        // Gone already if the user side let it expire.
        let _ = FLOWS.remove(&key);
        return;
    }
    let record = Released { kind: event::RELEASED, padding: 0, cookie: key.cookie, at: now() };
    if EVENTS.output_untyped::<Released>(&record, wakeup()).is_err() {
        lose(lost::ENDS);
    }
}

#[inline(always)]
fn flow_report(key: &FlowKey, flow: &Flow, kind: u32) -> Connection {
    Connection {
        kind,
        netns: flow.netns,
        cookie: key.cookie,
        started: flow.started,
        at: flow.seen,
        rx_bytes: flow.rx_bytes,
        tx_bytes: flow.tx_bytes,
        local: flow.local,
        remote: key.remote,
        local_port: flow.local_port,
        remote_port: key.remote_port,
        protocol: flow.protocol,
        direction: flow.direction,
        flags: if flow.owner.kernel == 1 { flag::KERNEL } else { 0 },
        rtt_us: 0,
        retransmits: 0,
        owner: flow.owner,
    }
}

// ---- What the user side asks for ----

/// `struct bpf_iter_meta`, of which only the first field is needed.
#[repr(C)]
struct Meta {
    seq: *mut c_void,
}

/// `struct bpf_iter__bpf_sk_storage_map`
#[repr(C)]
pub struct StorageIterator {
    meta: *const Meta,
    map: Object,
    sk: Object,
    value: *mut Socket,
}

/// Hands out the TCP connections that have changed since they were last handed out.
#[unsafe(no_mangle)]
#[unsafe(link_section = "iter/bpf_sk_storage_map")]
pub extern "C" fn watch_tcp(ctx: *const StorageIterator) -> i32 {
    // SAFETY: the kernel's context of this program type.
    let (meta, sk, value) = unsafe { ((*ctx).meta, (*ctx).sk, (*ctx).value) };
    if sk.is_null() || value.is_null() {
        return 0;
    }
    // SAFETY: not null, and the verifier knows its size.
    let socket = unsafe { &mut *value };
    if socket.flags & (flag::LISTENING | flag::REPORTED) != 0 {
        return 0;
    }
    let Some(report) = tcp_report(sk, socket, event::LIVE, i32::from(field!(sk, state as u8))) else {
        return 0;
    };
    let changed = report.rx_bytes != socket.reported_rx || report.tx_bytes != socket.reported_tx;
    if (changed || everything()) && shown(&report) && write(meta, &report) {
        socket.reported_rx = report.rx_bytes;
        socket.reported_tx = report.tx_bytes;
    }
    0
}

/// `struct bpf_iter__bpf_map_elem`
#[repr(C)]
pub struct MapIterator {
    meta: *const Meta,
    map: Object,
    key: *const FlowKey,
    value: *mut Flow,
}

/// Hands out the flows that have changed since they were last handed out.
#[unsafe(no_mangle)]
#[unsafe(link_section = "iter/bpf_map_elem")]
pub extern "C" fn watch_flows(ctx: *const MapIterator) -> i32 {
    // SAFETY: the kernel's context of this program type.
    let (meta, key, value) = unsafe { ((*ctx).meta, (*ctx).key, (*ctx).value) };
    if key.is_null() || value.is_null() {
        return 0;
    }
    // SAFETY: not null, and the verifier knows their sizes.
    let (key, flow) = unsafe { (&*key, &mut *value) };
    let report = flow_report(key, flow, event::LIVE);
    let changed = report.rx_bytes != flow.reported_rx || report.tx_bytes != flow.reported_tx;
    if (changed || everything()) && write(meta, &report) {
        flow.reported_rx = report.rx_bytes;
        flow.reported_tx = report.tx_bytes;
    }
    0
}

/// Hands a record to the reader of an iterator. Where its buffer is full this says
/// no, and the kernel calls again for the same object once there is room.
#[inline(always)]
fn write(meta: *const Meta, report: &Connection) -> bool {
    let record = ptr::from_ref(report).cast();
    // SAFETY: the kernel's iterator, and a record on the stack.
    unsafe { bpf_seq_write((*meta).seq.cast(), record, size_of::<Connection>() as u32) == 0 }
}

/// Whether the reader wants what has not changed, too.
#[inline(always)]
fn everything() -> bool {
    CONTROLS.get(control::EVERYTHING).is_some_and(|value| *value != 0)
}

// ---- What was there before ----

/// `struct bpf_iter__task_file`
#[repr(C)]
pub struct FileIterator {
    meta: *const Meta,
    task: Object,
    fd: u64,
    file: Object,
}

/// Gives every open socket without an owner to the process that has it open.
#[unsafe(no_mangle)]
#[unsafe(link_section = "iter/task_file")]
pub extern "C" fn watch_seed(ctx: *const FileIterator) -> i32 {
    // SAFETY: the kernel's context of this program type.
    let (task, file) = unsafe { ((*ctx).task, (*ctx).file) };
    if task.is_null() || file.is_null() {
        return 0;
    }
    // SAFETY: a file; the helper gives null for one that is no socket.
    let socket: Object = unsafe { bpf_sock_from_file(file.cast_mut().cast()) }.cast();
    if socket.is_null() {
        return 0;
    }
    let sk = field!(socket, socket_sk as Object);
    if sk.is_null() {
        return 0;
    }
    let family = field!(sk, family as u16);
    if family != AF_INET && family != AF_INET6 {
        return 0;
    }
    let owner = owner_of(task);
    if field!(sk, protocol as u16) == TCP {
        seed_tcp(sk, owner);
    } else {
        seed_flow(sk, owner);
    }
    0
}

#[inline(always)]
fn seed_tcp(sk: Object, owner: Owner) {
    let state = i32::from(field!(sk, state as u8));
    if state == state::CLOSE || socket_of(sk).is_some_and(|socket| socket.owner.quality != quality::NONE) {
        return;
    }
    let Some(socket) = storage(sk) else { return };
    *socket = Socket {
        cookie: cookie(sk),
        started: 0,
        reported_rx: u64::MAX,
        reported_tx: u64::MAX,
        owner,
        direction: direction::UNKNOWN,
        flags: if state == state::LISTEN { flag::LISTENING } else { 0 },
        padding: [0; 2],
        netns: netns(sk),
    };
}

#[inline(always)]
fn seed_flow(sk: Object, owner: Owner) {
    let (local, remote) = addresses(sk);
    if remote == [0; 16] {
        return;
    }
    let key = FlowKey {
        cookie: cookie(sk),
        remote,
        tgid: owner.tgid,
        remote_port: u16::from_be(field!(sk, dport as u16)),
        padding: 0,
    };
    let time = now();
    let flow = Flow {
        started: 0,
        seen: time,
        rx_bytes: 0,
        tx_bytes: 0,
        reported_rx: u64::MAX,
        reported_tx: u64::MAX,
        local,
        owner,
        local_port: field!(sk, num as u16),
        protocol: field!(sk, protocol as u16),
        direction: direction::UNKNOWN,
        padding: [0; 3],
        netns: netns(sk),
        padding2: 0,
    };
    if shown(&flow_report(&key, &flow, event::LIVE)) && FLOWS.insert(&key, &flow, 1).is_ok() {
        remember(sk, &key);
    }
}

/// `struct bpf_iter__tcp`
#[repr(C)]
pub struct TcpIterator {
    meta: *const Meta,
    sk: Object,
}

/// Notes the TCP sockets that no process has open: the kernel's own, and those
/// whose process has closed them while data is still on its way.
#[unsafe(no_mangle)]
#[unsafe(link_section = "iter/tcp")]
pub extern "C" fn watch_seed_tcp(ctx: *const TcpIterator) -> i32 {
    // SAFETY: the kernel's context of this program type.
    let sk = unsafe { (*ctx).sk };
    if sk.is_null() {
        return 0;
    }
    // SAFETY: a socket, perhaps a small one (a handshake, TIME_WAIT): then null.
    let tcp: Object = unsafe { bpf_skc_to_tcp_sock(sk.cast_mut()) }.cast();
    if tcp.is_null() {
        return 0;
    }
    if socket_of(tcp).is_none() {
        // SAFETY: integers only.
        seed_tcp(tcp, unsafe { core::mem::zeroed() });
    }
    0
}

// ---- Who ----

/// The process that is running.
#[inline(always)]
fn current(quality: u32) -> Owner {
    // SAFETY: helpers without preconditions.
    let (cgroup, task) = unsafe { (bpf_get_current_cgroup_id(), bpf_get_current_task_btf()) };
    const PF_KTHREAD: u32 = 0x0020_0000;
    Owner {
        cgroup,
        tgid: (bpf_get_current_pid_tgid() >> 32) as u32,
        uid: bpf_get_current_uid_gid() as u32,
        comm: bpf_get_current_comm().unwrap_or([0; 16]),
        quality,
        kernel: u32::from(field!(task, task_flags as u32) & PF_KTHREAD != 0),
    }
}

/// A process found by its open files.
#[inline(always)]
fn owner_of(task: Object) -> Owner {
    let null: Object = ptr::null();
    let cred = probe!(task, cred as Object).unwrap_or(null);
    let cgroups = probe!(task, cgroups as Object).unwrap_or(null);
    let cgroup = probe!(cgroups, dfl_cgrp as Object).unwrap_or(null);
    let kn = probe!(cgroup, kn as Object).unwrap_or(null);
    Owner {
        cgroup: probe!(kn, kn_id as u64).unwrap_or(0),
        tgid: probe!(task, task_tgid as u32).unwrap_or(0),
        uid: probe!(cred, uid as u32).unwrap_or(0),
        comm: probe!(task, task_comm as [u8; 16]).unwrap_or([0; 16]),
        quality: quality::SEEDED,
        kernel: 0,
    }
}

/// Tells the user side which program the current process runs and in which
/// cgroup, once per process and program: it may be gone before anybody asks.
#[inline(always)]
fn introduce(tgid: u32) {
    // SAFETY: a helper without preconditions.
    let task: Object = unsafe { bpf_get_current_task_btf() }.cast_const().cast();
    let leader = field!(task, leader as Object);
    let began = field!(leader, start_time as u64).wrapping_add(u64::from(field!(task, exec_id as u32)));
    if let Some(known) = PROCESSES.get_ptr_mut(&tgid) {
        // SAFETY: the map's value.
        if unsafe { *known } == began {
            return;
        }
    }
    // One that could not be told is told at its next use.
    if describe(task, tgid) == TOLD && PROCESSES.insert(&tgid, &began, 0).is_err() {
        lose(lost::NAMES);
    }
}

/// What [`describe`] gives if it has told; a function of its own gives a number.
const TOLD: u32 = 1;

#[inline(never)]
fn describe(task: Object, tgid: u32) -> u32 {
    let Some(mut entry) = EVENTS.reserve_untyped::<Process>(0) else {
        lose(lost::NAMES);
        return 0;
    };
    let null: Object = ptr::null();
    let record = entry.as_mut_ptr();
    let mm = probe!(task, mm as Object).unwrap_or(null);
    let file = probe!(mm, exe_file as Object).unwrap_or(null);
    let cgroups = probe!(task, cgroups as Object).unwrap_or(null);
    let cgroup = probe!(cgroups, dfl_cgrp as Object).unwrap_or(null);
    let kn = probe!(cgroup, kn as Object).unwrap_or(null);
    let number = probe!(kn, kn_id as u64).unwrap_or(0);
    // SAFETY: the record is ours until it is submitted; each name's bytes up to its
    // NUL are written.
    unsafe {
        (*record).kind = event::PROCESS;
        (*record).tgid = tgid;
        (*record).at = now();
        (*record).cgroup = number;
        file_path(file, &mut (*record).exe);
        cgroup_path(kn, &mut (*record).cgroup_path);
    }
    entry.submit(wakeup());
    TOLD
}

/// Writes the names of a file's path, the last first. The loop has a fixed number of
/// rounds and a place for each: with an early end and names back to back the verifier
/// (6.18) takes 1.7 s instead of a few milliseconds.
#[inline(always)]
fn file_path(file: Object, to: &mut Path) {
    let null: Object = ptr::null();
    let mut dentry = probe!(file, dentry as Object).unwrap_or(null);
    let mut vfsmount = probe!(file, mnt as Object).unwrap_or(null);
    let inside = global!(OFFSETS.mount_mnt) as usize;
    for name in to {
        name[0] = 0;
        let parent = probe!(dentry, d_parent as Object).unwrap_or(null);
        let root = probe!(vfsmount, mnt_root as Object).unwrap_or(null);
        if dentry == root || dentry == parent {
            // The top of a mount: go on where it is mounted.
            let mount: Object = vfsmount.wrapping_byte_sub(inside);
            let outer = probe!(mount, mnt_parent as Object).unwrap_or(null);
            let top = outer == mount || outer.is_null();
            dentry = if top { null } else { probe!(mount, mnt_mountpoint as Object).unwrap_or(null) };
            vfsmount = outer.wrapping_byte_add(inside);
        } else {
            copy_name(name, probe!(dentry, d_name as Object).unwrap_or(null));
            dentry = parent;
        }
    }
}

/// The same for a cgroup's path. The root has no name.
#[inline(always)]
fn cgroup_path(kn: Object, to: &mut Path) {
    let null: Object = ptr::null();
    let mut kn = kn;
    for name in to {
        name[0] = 0;
        copy_name(name, probe!(kn, kn_name as Object).unwrap_or(null));
        kn = probe!(kn, kn_parent as Object).unwrap_or(null);
    }
}

#[inline(always)]
fn copy_name(to: &mut [u8; NAME], name: Object) {
    // SAFETY: the helper writes at most as many bytes as it is told, and nothing but a
    // NUL where the name cannot be read.
    unsafe { bpf_probe_read_kernel_str(to.as_mut_ptr().cast(), NAME as u32, name) };
}

// ---- Small things ----

/// Whether the filter lets a connection through.
#[inline(always)]
fn shown(report: &Connection) -> bool {
    let port = global!(FILTER.port);
    if port != 0 && report.local_port != port && report.remote_port != port {
        return false;
    }
    let tgid = global!(FILTER.tgid);
    if tgid != 0 && report.owner.tgid != tgid {
        return false;
    }
    let (mask, network) = (global!(FILTER.mask), global!(FILTER.remote));
    if mask != [0; 16]
        && u128::from_ne_bytes(report.remote) & u128::from_ne_bytes(mask) != u128::from_ne_bytes(network)
    {
        return false;
    }
    let comm = global!(FILTER.comm);
    if comm[0] != 0 && u128::from_ne_bytes(comm) != u128::from_ne_bytes(report.owner.comm) {
        return false;
    }
    !(global!(FILTER.no_loopback) == 1 && is_loopback(report.remote))
}

#[inline(always)]
fn is_loopback(address: Address) -> bool {
    const MAPPED: [u8; 12] = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff];
    let number = u128::from_be_bytes(address);
    number == 1 || (address[..12] == MAPPED && address[12] == 127)
}

fn send(report: &Connection) {
    if EVENTS.output_untyped::<Connection>(report, wakeup()).is_err() {
        lose(lost::ENDS);
    }
}

/// The user side looks in by itself several times a second; it is woken only
/// when a good part of the ring is full.
#[inline(always)]
fn wakeup() -> u64 {
    const AVAILABLE: u64 = 0;
    const MANY: u64 = 256 << 10;
    // SAFETY: the map is a ring buffer.
    let waiting = unsafe { bpf_ringbuf_query(map(&EVENTS), AVAILABLE) };
    u64::from(if waiting >= MANY { BPF_RB_FORCE_WAKEUP } else { BPF_RB_NO_WAKEUP })
}

#[inline(always)]
fn lose(what: u32) {
    if let Some(counter) = LOST.get_ptr_mut(what) {
        // A program in softirq may interrupt one that is about to count.
        // SAFETY: this CPU's value.
        unsafe { add_to(counter, 1) };
    }
}

/// This side's address and the other's.
#[inline(always)]
fn addresses(sk: Object) -> (Address, Address) {
    if field!(sk, family as u16) == AF_INET {
        return (mapped(field!(sk, saddr as u32)), mapped(field!(sk, daddr as u32)));
    }
    (wide(sk, global!(OFFSETS.v6_saddr)), wide(sk, global!(OFFSETS.v6_daddr)))
}

#[inline(always)]
fn wide(sk: Object, offset: u32) -> Address {
    // SAFETY: as `field!`; word by word, as the kernel describes it.
    let word =
        |i: usize| unsafe { ptr::read_volatile(sk.cast::<u8>().add(offset as usize + 4 * i).cast::<u32>()) };
    joined([word(0), word(1), word(2), word(3)])
}

/// The address of four words that are in network byte order already.
#[inline(always)]
fn joined(words: [u32; 4]) -> Address {
    let mut address = [0; 16];
    for (four, word) in address.as_chunks_mut::<4>().0.iter_mut().zip(words) {
        *four = word.to_ne_bytes();
    }
    address
}

/// IPv4 in IPv6's clothes; "any" becomes IPv6's "any".
#[inline(always)]
fn mapped(ip: u32) -> Address {
    if ip == 0 { [0; 16] } else { joined([0, 0, 0xffff_u32.to_be(), ip]) }
}

#[inline(always)]
fn socket_of(sk: Object) -> Option<&'static mut Socket> {
    // SAFETY: a full socket and a map of socket storage; the value lives as long as
    // the socket, and the programs' races over it are over whole fields.
    unsafe { bpf_sk_storage_get(map(&SOCKETS), sk.cast_mut(), ptr::null_mut(), 0).cast::<Socket>().as_mut() }
}

#[inline(always)]
fn storage(sk: Object) -> Option<&'static mut Socket> {
    let create = u64::from(BPF_SK_STORAGE_GET_F_CREATE);
    // SAFETY: as above.
    let socket = unsafe { bpf_sk_storage_get(map(&SOCKETS), sk.cast_mut(), ptr::null_mut(), create) };
    if socket.is_null() {
        lose(lost::SOCKETS);
    }
    // SAFETY: as above.
    unsafe { socket.cast::<Socket>().as_mut() }
}

#[inline(always)]
fn map<T>(map: &T) -> *mut c_void {
    ptr::from_ref(map).cast_mut().cast()
}

#[inline(always)]
fn cookie(sk: Object) -> u64 {
    // SAFETY: a socket.
    unsafe { bpf_get_socket_cookie(sk.cast_mut()) }
}

#[inline(always)]
fn netns(sk: Object) -> u32 {
    let net = field!(sk, net as Object);
    field!(net, inum as u32)
}

#[inline(always)]
fn now() -> u64 {
    // SAFETY: a helper without preconditions.
    unsafe { bpf_ktime_get_boot_ns() }
}

/// [`SkStorage`] whose values a child socket gets copies of (`BPF_F_CLONE`).
#[repr(C)]
pub struct ClonedStorage<T> {
    r#type: *const [i32; 24],
    key: *const i32,
    value: *const T,
    max_entries: *const [i32; 0],
    map_flags: *const [i32; 0x201],
}

impl<T> ClonedStorage<T> {
    const fn new() -> Self {
        Self {
            r#type: ptr::null(),
            key: ptr::null(),
            value: ptr::null(),
            max_entries: ptr::null(),
            map_flags: ptr::null(),
        }
    }
}

// SAFETY: a description for the loader; nobody dereferences it.
unsafe impl<T> Sync for ClonedStorage<T> {}
