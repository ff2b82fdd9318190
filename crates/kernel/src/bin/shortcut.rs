//! Chosen local connections go from socket to socket.
//!
//! - `shortcut_meet` (sock_ops) notes each connection in scope when it is established,
//!   joins its two ends into a pair, and sums it up when it ends.
//! - `shortcut_read` (tp_btf/sock_recv_length, Linux 6.3) counts what each end read and
//!   how. It decides which pairs have earned the shortcut.
//! - `shortcut_enter` (iterator over the noted sockets, run by the helper process) puts
//!   the sockets of such a pair into the map and takes them out again.
//! - `shortcut_send` (sk_msg) runs for sockets in the map only and decides the way of
//!   each message.
//!
//! Sockets enter the map only after they were watched: membership alone changes how a
//! socket behaves (FIONREAD, splice, a recv that waits), so a connection that would
//! suffer from it never becomes a member.
#![no_std]
#![no_main]
#![feature(asm_experimental_arch)]

use core::{
    ffi::{c_int, c_void},
    ptr::{addr_of, addr_of_mut},
};

use aya_ebpf::{
    EbpfContext as _,
    bindings::{
        BPF_ANY, BPF_F_INGRESS, BPF_F_NO_PREALLOC, BPF_NOEXIST, BPF_SK_STORAGE_GET_F_CREATE,
        BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB, BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB, BPF_SOCK_OPS_STATE_CB,
        BPF_SOCK_OPS_STATE_CB_FLAG, BPF_TCP_CLOSE, BPF_TCP_CLOSE_WAIT, BPF_TCP_ESTABLISHED, bpf_sock_ops,
    },
    btf_maps::SkStorage,
    helpers::generated::{
        bpf_get_netns_cookie, bpf_map_delete_elem, bpf_map_update_elem, bpf_sk_storage_get,
        bpf_skc_to_tcp_sock,
    },
    macros::{btf_map, btf_tracepoint, map, sk_msg, sock_ops},
    maps::{Array, HashMap, RingBuf, SockHash},
    programs::{BtfTracePointContext, SkMsgContext, SockOpsContext},
};
use underpass_abi::shortcut::{
    BY_TCP, CLIENT, Control, End, GATE_IN, GATE_LEAVING, GATE_OUT, Group, HABIT_BLOCKS, HABIT_URGENT,
    HABIT_WAITS_FOR_ALL, Key, LEFT_TO_ENTER, LEFT_TO_READ, Member, Pair, REASONS, Rhythm, SERVER,
    STAGE_ASKED, STAGE_LEAVING, STAGE_WATCHED, Totals, mapped,
};
use underpass_logic::shortcut::{Direction, LIMITS, Reason, Way, drained, earned, forbids, lost, read};

underpass_kernel::license!();

const MAX_PAIRS: u32 = 65_536;

/// Sockets that may be redirected to and from, each under its own key.
#[map]
static SOCKETS: SockHash<Key> = SockHash::with_max_entries(2 * MAX_PAIRS, 0);

/// Pairs by the key of the end that connected.
#[map]
static PAIRS: HashMap<Key, Pair> = HashMap::with_max_entries(MAX_PAIRS, BPF_F_NO_PREALLOC);

/// What is known of each socket in scope.
#[btf_map]
static MEMBERS: SkStorage<Member> = SkStorage::new();

/// Ports in scope.
#[map]
static PORTS: HashMap<u16, u8> = HashMap::with_max_entries(1024, 0);

#[map]
static TOTALS: HashMap<Group, Totals> = HashMap::with_max_entries(4096, BPF_F_NO_PREALLOC);

/// Written by the user side only.
#[map]
static CONTROL: Array<Control> = Array::with_max_entries(1, 0);

/// What the helper's pass leaves to do: `LEFT_*`.
#[map]
static LEFT: Array<u64> = Array::with_max_entries(2, 0);

/// Wakes the helper; what an event says does not matter.
#[map]
static CALLS: RingBuf = RingBuf::with_byte_size(4096, 0);

/// Not 0: connections on any port are in scope.
#[unsafe(no_mangle)]
static ANY_PORT: u32 = 0;
/// Habits that the user accepts, bits `HABIT_*`.
#[unsafe(no_mangle)]
static ACCEPTED: u32 = 0;

// Offsets of kernel structures' fields, from BTF.
#[unsafe(no_mangle)]
static WRITE_SEQ: u32 = 0; // tcp_sock.write_seq
#[unsafe(no_mangle)]
static RCV_NXT: u32 = 0; // tcp_sock.rcv_nxt
#[unsafe(no_mangle)]
static COPIED_SEQ: u32 = 0; // tcp_sock.copied_seq
#[unsafe(no_mangle)]
static RCVLOWAT: u32 = 0; // sock.sk_rcvlowat
#[unsafe(no_mangle)]
static SK_SOCKET: u32 = 0; // sock.sk_socket
#[unsafe(no_mangle)]
static SOCKET_FILE: u32 = 0; // socket.file
#[unsafe(no_mangle)]
static FILE_FLAGS: u32 = 0; // file.f_flags
#[unsafe(no_mangle)]
static SK_CGROUP: u32 = 0; // sock.sk_cgrp_data.cgroup
#[unsafe(no_mangle)]
static CGROUP_NODE: u32 = 0; // cgroup.kn
#[unsafe(no_mangle)]
static NODE_ID: u32 = 0; // kernfs_node.id

const O_NONBLOCK: u32 = 0o4000;
const MSG_OOB: i32 = 1;
const MSG_PEEK: i32 = 2;
const MSG_DONTWAIT: i32 = 0x40;
const MSG_WAITALL: i32 = 0x100;
const MSG_ERRQUEUE: i32 = 0x2000;

const AF_INET: u32 = 2;
const SK_PASS: u32 = 1;

// Values to begin with: the stack of a program has no room for them.
static NEW_PAIR: Pair = Pair {
    ends: [NEW_END; 2],
    cgroup: 0,
    ended: 0,
    rhythm: Rhythm { turns: 0, reader: 0, reads: 0, bytes: 0, needed: LIMITS.turns, zero: 0 },
    stage: STAGE_WATCHED,
    reason: Reason::Unpaired as u32,
    port: 0,
    zero: [0; 6],
};
const NEW_END: End = End {
    redirected: 0,
    consumed: 0,
    mark: 0,
    first: 0,
    expects: 0,
    streak: BY_TCP,
    reads: 0,
    gate: GATE_OUT,
    opens_at: 0,
    habits: 0,
    zero: 0,
};
static NO_TOTALS: Totals =
    Totals { accelerated: 0, left_alone: [0; REASONS], redirected_bytes: 0, tcp_bytes: 0 };

/// A read-only global that the user side sets before the program is loaded.
macro_rules! global {
    ($name:ident) => {
        // SAFETY: a read-only word of this object. Volatile, as the compiler must
        // not take the value it sees here for the one that is loaded.
        unsafe { core::ptr::read_volatile(&raw const $name) }
    };
}

/// Reads a word of a program's context. The verifier wants the field's offset in the
/// load itself; the compiler would rather add it to the pointer first.
macro_rules! context {
    ($pointer:expr, $type:ty, $field:ident $($at:tt)*) => {{
        let value: u64;
        // SAFETY: the kernel passed the context.
        unsafe {
            core::arch::asm!(
                "{value} = *(u32 *)({context} + {offset})",
                value = out(reg) value,
                context = in(reg) $pointer,
                offset = const core::mem::offset_of!($type, $field) $($at)*,
                options(readonly, nostack),
            );
        }
        value as u32
    }};
}

/// Reads a field of a kernel structure to which the verifier knows the pointer.
macro_rules! field {
    ($pointer:expr, $offset:ident as $type:ty) => {{
        let (pointer, offset) = ($pointer.cast::<u8>(), global!($offset) as usize);
        // SAFETY: the offset is the field's, from the kernel's own description, and
        // the verifier checks the access; a bad pointer reads as zero.
        unsafe { core::ptr::read_volatile(pointer.add(offset).cast::<$type>()) }
    }};
}

/// A word that another CPU may be writing.
macro_rules! get {
    ($place:expr) => {
        // SAFETY: a field of a map's value, aligned; the kernel keeps the value
        // until this program has ended.
        unsafe { addr_of!($place).read_volatile() }
    };
}

macro_rules! set {
    ($place:expr, $value:expr) => {{
        let value = $value;
        // SAFETY: as in `get!`.
        unsafe { addr_of_mut!($place).write_volatile(value) }
    }};
}

/// Adds to a counter that several CPUs write, and returns what it was. It is a full
/// barrier, too.
macro_rules! add {
    ($place:expr, $value:expr) => {{
        let value = $value;
        // SAFETY: as in `get!`; all that write it do so atomically.
        unsafe { fetch_add(addr_of_mut!($place), value) }
    }};
}

/// Adds to a word atomically. `core` has no such operation for this target.
///
/// # Safety
/// `place` must be valid for reading and writing.
#[inline(always)]
unsafe fn fetch_add(place: *mut u64, mut value: u64) -> u64 {
    // SAFETY: one instruction (BPF_ATOMIC | BPF_FETCH, Linux 5.12), on a valid place.
    unsafe {
        core::arch::asm!(
            "{value} = atomic_fetch_add((u64 *)({place} + 0), {value})",
            place = in(reg) place,
            value = inout(reg) value,
        );
    }
    value
}

/// The end (`CLIENT` or `SERVER`) of a pair.
#[inline(always)]
fn end(pair: *mut Pair, side: u32) -> *mut End {
    // Not an index: the verifier would have to be convinced of its bounds.
    if side == CLIENT {
        // SAFETY: a field of a map's value.
        unsafe { addr_of_mut!((*pair).ends[0]) }
    } else {
        // SAFETY: likewise.
        unsafe { addr_of_mut!((*pair).ends[1]) }
    }
}

#[inline(always)]
fn own_key(pair: &Key, side: u32) -> Key {
    if side == CLIENT { *pair } else { pair.mirrored() }
}

#[inline(always)]
fn member(socket: *mut c_void) -> Option<&'static Member> {
    if socket.is_null() {
        return None;
    }
    // SAFETY: the verifier knows the pointer as a socket's; without a value to begin
    // with, nothing is created. What is found lives as long as the socket.
    unsafe {
        bpf_sk_storage_get((&raw const MEMBERS).cast_mut().cast(), socket, core::ptr::null_mut(), 0)
            .cast::<Member>()
            .as_ref()
    }
}

#[inline(always)]
fn call() {
    // If the ring is full, the helper has been called already.
    let _ = CALLS.output::<u64>(0u64, 0);
}

/// Both ends leave the map, for `reason`; what was redirected is read first.
#[inline(always)]
fn leave(pair: *mut Pair, reason: Reason) {
    let (client, server) = (end(pair, CLIENT), end(pair, SERVER));
    set!((*pair).reason, reason as u32);
    if get!((*client).gate) == GATE_OUT && get!((*server).gate) == GATE_OUT {
        return start_over(pair);
    }
    for end in [client, server] {
        if get!((*end).gate) == GATE_IN {
            set!((*end).gate, GATE_LEAVING);
        }
    }
    set!((*pair).stage, STAGE_LEAVING);
    call();
}

/// The pair is watched again, and has to earn the shortcut harder.
#[inline(always)]
fn start_over(pair: *mut Pair) {
    set!((*pair).rhythm, lost(get!((*pair).rhythm)));
    set!((*pair).stage, STAGE_WATCHED);
}

#[inline(always)]
fn closing() -> bool {
    CONTROL.get_ptr(0).is_none_or(|control| get!((*control).closing) != 0)
}

// --- Connections begin and end ------------------------------------------------------

#[sock_ops]
pub fn shortcut_meet(ctx: SockOpsContext) -> u32 {
    match context!(ctx.ops, bpf_sock_ops, op) {
        BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB => meet(&ctx, CLIENT),
        BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB => meet(&ctx, SERVER),
        BPF_SOCK_OPS_STATE_CB if context!(ctx.ops, bpf_sock_ops, __bindgen_anon_1 + 4) == BPF_TCP_CLOSE => {
            part(&ctx)
        }
        _ => {}
    }
    1
}

/// A connection is established, at its end `side`.
#[inline(always)]
fn meet(ctx: &SockOpsContext, side: u32) {
    let (local, remote) = (local_port(ctx), remote_port(ctx));
    if closing() || !(global!(ANY_PORT) != 0 || is_listed(local) || is_listed(remote)) {
        return;
    }
    let mut member = Member { pair: key(ctx), side, zero: 0 };
    let (port, met) = if side == CLIENT {
        (remote, connected(ctx, &member.pair, remote))
    } else {
        member.pair = member.pair.mirrored();
        (local, accepted(ctx, &member.pair))
    };
    match met {
        Ok(()) => note(ctx, &mut member),
        Err(reason) => {
            if let Some(totals) = totals(cgroup(socket(ctx)), port) {
                count_reason(totals, reason as u32);
            }
        }
    }
}

#[inline(always)]
fn connected(ctx: &SockOpsContext, key: &Key, port: u16) -> Result<(), Reason> {
    // A pair of this name that is still there is one whose end went unseen.
    PAIRS.insert(key, &NEW_PAIR, BPF_ANY.into()).map_err(|_| Reason::Full)?;
    let pair = PAIRS.get_ptr_mut(key).ok_or(Reason::Full)?;
    let client = end(pair, CLIENT);
    set!((*client).first, snd_nxt(ctx));
    set!((*client).expects, rcv_nxt(ctx));
    set!((*pair).cgroup, cgroup(socket(ctx)));
    set!((*pair).port, port);
    Ok(())
}

#[inline(always)]
fn accepted(ctx: &SockOpsContext, key: &Key) -> Result<(), Reason> {
    let pair = PAIRS.get_ptr_mut(key).ok_or(Reason::Unpaired)?;
    let (client, server) = (end(pair, CLIENT), end(pair, SERVER));
    // The ends of one connection agree on its sequence numbers. Two sockets that only
    // seem to mirror each other, by address translation say, do not.
    if get!((*client).first) != rcv_nxt(ctx) || get!((*client).expects) != snd_nxt(ctx) {
        return Err(Reason::Unpaired);
    }
    set!((*server).first, snd_nxt(ctx));
    set!((*server).expects, rcv_nxt(ctx));
    set!((*pair).reason, Reason::Turns as u32);
    Ok(())
}

/// An end of a connection is closed. With the second, its pair is summed up and
/// forgotten; until then the other may still have redirected bytes to read.
#[inline(always)]
fn part(ctx: &SockOpsContext) {
    let Some(member) = member(socket(ctx)) else { return };
    let Some(pair) = PAIRS.get_ptr_mut(&member.pair) else { return };
    let (client, server) = (end(pair, CLIENT), end(pair, SERVER));
    let is_whole = get!((*server).first) != 0 || get!((*server).expects) != 0;
    if add!((*pair).ended, 1) == 0 && is_whole {
        return;
    }
    let redirected = get!((*client).redirected) + get!((*server).redirected);
    let read = get!((*client).consumed) + get!((*server).consumed);
    if let Some(totals) = totals(get!((*pair).cgroup), get!((*pair).port)) {
        add!((*totals).redirected_bytes, redirected);
        add!((*totals).tcp_bytes, read.saturating_sub(redirected));
        if redirected > 0 {
            add!((*totals).accelerated, 1);
        } else {
            count_reason(totals, get!((*pair).reason));
        }
    }
    // Nobody else removes it.
    let _ = PAIRS.remove(&member.pair);
}

/// Remembers in the socket which pair it belongs to, and asks to be told of its end.
#[inline(always)]
fn note(ctx: &SockOpsContext, member: &mut Member) {
    let socket = socket(ctx);
    if socket.is_null() {
        return;
    }
    // SAFETY: the context's socket, and a value of the map's type.
    unsafe {
        bpf_sk_storage_get(
            (&raw const MEMBERS).cast_mut().cast(),
            socket,
            core::ptr::from_mut(member).cast(),
            BPF_SK_STORAGE_GET_F_CREATE.into(),
        )
    };
    let flags =
        context!(ctx.ops, bpf_sock_ops, bpf_sock_ops_cb_flags) as i32 | BPF_SOCK_OPS_STATE_CB_FLAG as i32;
    // Without it the pair stays in the table until another takes its name.
    let _ = ctx.set_cb_flags(flags);
}

#[inline(always)]
fn is_listed(port: u16) -> bool {
    // SAFETY: a set that never changes while the programs run.
    unsafe { PORTS.get(&port) }.is_some()
}

#[inline(always)]
fn totals(cgroup: u64, port: u16) -> Option<*mut Totals> {
    let group = Group { cgroup, port, zero: [0; 6] };
    if let Some(totals) = TOTALS.get_ptr_mut(&group) {
        return Some(totals);
    }
    // Another CPU may do the same.
    let _ = TOTALS.insert(&group, &NO_TOTALS, BPF_NOEXIST.into());
    TOTALS.get_ptr_mut(&group)
}

#[inline(always)]
fn count_reason(totals: *mut Totals, reason: u32) {
    // SAFETY: the index is masked to the array's length.
    add!((*totals).left_alone[(reason & 15) as usize], 1);
}

#[inline(always)]
fn snd_nxt(ctx: &SockOpsContext) -> u32 {
    context!(ctx.ops, bpf_sock_ops, snd_nxt)
}

#[inline(always)]
fn rcv_nxt(ctx: &SockOpsContext) -> u32 {
    context!(ctx.ops, bpf_sock_ops, rcv_nxt)
}

#[inline(always)]
fn local_port(ctx: &SockOpsContext) -> u16 {
    context!(ctx.ops, bpf_sock_ops, local_port) as u16
}

#[inline(always)]
fn remote_port(ctx: &SockOpsContext) -> u16 {
    u32::from_be(context!(ctx.ops, bpf_sock_ops, remote_port)) as u16
}

#[inline(always)]
fn socket(ctx: &SockOpsContext) -> *mut c_void {
    let socket: *mut c_void;
    // SAFETY: the kernel passed the context; see `context!`.
    unsafe {
        core::arch::asm!(
            "{socket} = *(u64 *)({context} + {offset})",
            socket = out(reg) socket,
            context = in(reg) ctx.ops,
            offset = const core::mem::offset_of!(bpf_sock_ops, __bindgen_anon_2),
            options(readonly, nostack),
        );
    }
    socket
}

/// The control group of a socket, 0 if it cannot be told.
#[inline(always)]
fn cgroup(socket: *mut c_void) -> u64 {
    if socket.is_null() {
        return 0;
    }
    // SAFETY: the context's socket. The helper hands out what the fields can be read from.
    let sock = unsafe { bpf_skc_to_tcp_sock(socket) };
    if sock.is_null() {
        return 0;
    }
    let cgroup = field!(sock, SK_CGROUP as *const c_void);
    let node = field!(cgroup, CGROUP_NODE as *const c_void);
    field!(node, NODE_ID as u64)
}

/// The key of the context's socket.
#[inline(always)]
fn key(ctx: &SockOpsContext) -> Key {
    // SAFETY: the context is the program's own.
    let namespace = unsafe { bpf_get_netns_cookie(ctx.as_ptr()) };
    let (local, remote) = if context!(ctx.ops, bpf_sock_ops, family) == AF_INET {
        let (local, remote) =
            (context!(ctx.ops, bpf_sock_ops, local_ip4), context!(ctx.ops, bpf_sock_ops, remote_ip4));
        (mapped(local.to_ne_bytes()), mapped(remote.to_ne_bytes()))
    } else {
        (local_ip6(ctx.ops), remote_ip6(ctx.ops))
    };
    Key::new(namespace, (local, local_port(ctx)), (remote, remote_port(ctx)))
}

macro_rules! ip6 {
    ($name:ident) => {
        #[inline(always)]
        fn $name(ops: *const bpf_sock_ops) -> [u8; 16] {
            let a = context!(ops, bpf_sock_ops, $name).to_ne_bytes();
            let b = context!(ops, bpf_sock_ops, $name + 4).to_ne_bytes();
            let c = context!(ops, bpf_sock_ops, $name + 8).to_ne_bytes();
            let d = context!(ops, bpf_sock_ops, $name + 12).to_ne_bytes();
            [a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3], c[0], c[1], c[2], c[3], d[0], d[1], d[2], d[3]]
        }
    };
}
ip6!(local_ip6);
ip6!(remote_ip6);

// --- An end reads -------------------------------------------------------------------

#[btf_tracepoint(function = "sock_recv_length")]
pub fn shortcut_read(ctx: BtfTracePointContext) -> i32 {
    let (bytes, flags): (c_int, c_int) = (ctx.arg(1), ctx.arg(2));
    if bytes <= 0 || flags & (MSG_PEEK | MSG_ERRQUEUE) != 0 {
        return 0;
    }
    let Some(member) = member(ctx.arg::<*mut c_void>(0)) else { return 0 };
    let Some(pair) = PAIRS.get_ptr_mut(&member.pair) else { return 0 };
    let me = end(pair, member.side);
    let consumed = add!((*me).consumed, bytes as u64) + bytes as u64;
    set!((*me).reads, get!((*me).reads).wrapping_add(1));
    let habits = get!((*me).habits) | habits(flags);
    set!((*me).habits, habits);
    set!((*pair).rhythm, read(get!((*pair).rhythm), member.side, bytes as u32, &LIMITS));

    let other = end(pair, member.side ^ 1);
    match get!((*pair).stage) {
        STAGE_WATCHED if earned(&get!((*pair).rhythm)) && get!((*other).first) != 0 => ask(pair),
        STAGE_ASKED => {
            if let Some(reason) = forbids(habits, global!(ACCEPTED)) {
                leave(pair, reason);
            }
        }
        STAGE_LEAVING if get!((*me).gate) == GATE_LEAVING && drained(get!((*other).mark), consumed) => call(),
        _ => {}
    }
    0
}

/// The pair has earned the shortcut: the helper may put it into the map.
#[inline(always)]
fn ask(pair: *mut Pair) {
    let habits = get!((*end(pair, CLIENT)).habits) | get!((*end(pair, SERVER)).habits);
    if let Some(reason) = forbids(habits, global!(ACCEPTED)) {
        set!((*pair).rhythm, lost(get!((*pair).rhythm)));
        set!((*pair).reason, reason as u32);
        return;
    }
    set!((*pair).stage, STAGE_ASKED);
    call();
}

#[inline(always)]
const fn habits(flags: c_int) -> u32 {
    let mut habits = 0;
    if flags & MSG_DONTWAIT == 0 {
        habits |= HABIT_BLOCKS;
    }
    if flags & MSG_WAITALL != 0 {
        habits |= HABIT_WAITS_FOR_ALL;
    }
    if flags & MSG_OOB != 0 {
        habits |= HABIT_URGENT;
    }
    habits
}

// --- An end sends -------------------------------------------------------------------

#[sk_msg]
pub fn shortcut_send(ctx: SkMsgContext) -> u32 {
    // Whatever happens here, the message is sent: by TCP if not otherwise.
    send(&ctx);
    SK_PASS
}

#[inline(always)]
fn send(ctx: &SkMsgContext) -> Option<()> {
    // SAFETY: the kernel passed the context.
    let socket = unsafe { addr_of!((*ctx.msg).__bindgen_anon_3.sk).read_volatile() };
    if socket.is_null() {
        return None;
    }
    // SAFETY: likewise; the verifier knows it is not null.
    let state = unsafe { addr_of!((*socket).state).read_volatile() };
    let member = member(socket.cast())?;
    let pair = PAIRS.get_ptr_mut(&member.pair)?;
    let (me, other) = (end(pair, member.side), end(pair, member.side ^ 1));
    let settled = get!((*other).reads).wrapping_sub(get!((*other).opens_at)) as i32 >= 0;
    let open = get!((*other).gate) == GATE_IN && settled;
    if !open || (state != BPF_TCP_ESTABLISHED && state != BPF_TCP_CLOSE_WAIT) {
        set!((*me).streak, BY_TCP);
        return None;
    }
    // SAFETY: the socket is the context's.
    let sock = unsafe { bpf_skc_to_tcp_sock(socket.cast()) };
    if sock.is_null() {
        set!((*me).streak, BY_TCP);
        return None;
    }
    let direction = Direction {
        redirected: get!((*me).redirected),
        tcp: field!(sock, WRITE_SEQ as u32).wrapping_sub(get!((*me).first)),
        consumed: get!((*other).consumed),
        streak: get!((*me).streak),
    };
    let len = ctx.size();
    match direction.way(len, &LIMITS) {
        Way::Redirect { streak, mark } => {
            let before = get!((*me).mark);
            set!((*me).streak, streak);
            set!((*me).mark, mark);
            // The barrier between announcing the message and looking at the gate: the
            // helper closes the gate and then looks at the mark.
            add!((*me).redirected, u64::from(len));
            let mut key = own_key(&member.pair, member.side ^ 1);
            let redirected = get!((*other).gate) == GATE_IN
                && SOCKETS.redirect_msg(ctx, &mut key, BPF_F_INGRESS.into()) == SK_PASS.into();
            if !redirected {
                add!((*me).redirected, u64::from(len).wrapping_neg());
                set!((*me).mark, before);
                set!((*me).streak, BY_TCP);
                leave(pair, Reason::Refused);
            }
        }
        Way::Tcp => set!((*me).streak, BY_TCP),
        Way::Leave(reason) => {
            set!((*me).streak, BY_TCP);
            leave(pair, reason);
        }
    }
    Some(())
}

// --- The helper's pass over the noted sockets ----------------------------------------

/// `struct bpf_iter__bpf_sk_storage_map`
#[repr(C)]
pub struct Visit {
    meta: *mut c_void,
    map: *mut c_void,
    socket: *mut c_void,
    value: *mut Member,
}

#[unsafe(no_mangle)]
#[unsafe(link_section = "iter/bpf_sk_storage_map")]
pub fn shortcut_enter(visit: *mut Visit) -> i32 {
    // SAFETY: the kernel passed the context; both pointers are null after the last socket.
    let (socket, value) =
        unsafe { (addr_of!((*visit).socket).read_volatile(), addr_of!((*visit).value).read_volatile()) };
    if socket.is_null() || value.is_null() {
        return 0;
    }
    // SAFETY: the verifier knows its size and that it is not null.
    let member = unsafe { *value };
    let Some(pair) = PAIRS.get_ptr_mut(&member.pair) else { return 0 };
    let (me, other) = (end(pair, member.side), end(pair, member.side ^ 1));
    let mut key = own_key(&member.pair, member.side);
    let stage = if closing() { STAGE_LEAVING } else { get!((*pair).stage) };
    let left = match (get!((*me).gate), stage) {
        (GATE_OUT, STAGE_ASKED) => enter(socket, &mut key, pair, me),
        (GATE_OUT, _) | (GATE_IN, STAGE_ASKED) => None,
        _ => exit(&mut key, pair, me, other),
    };
    if let Some(left) = left.and_then(|left| LEFT.get_ptr_mut(left)) {
        add!(*left, 1);
    }
    0
}

/// Puts a socket into the map. What is left to do is counted under the result.
#[inline(always)]
fn enter(socket: *mut c_void, key: &mut Key, pair: *mut Pair, me: *mut End) -> Option<u32> {
    if field!(socket, RCVLOWAT as c_int) > 1 {
        leave(pair, Reason::LowWater);
        return None;
    }
    let file = field!(field!(socket, SK_SOCKET as *const c_void), SOCKET_FILE as *const c_void);
    let waits = field!(file, FILE_FLAGS as u32) & O_NONBLOCK == 0;
    if waits && global!(ACCEPTED) & HABIT_BLOCKS == 0 {
        leave(pair, Reason::Blocks);
        return None;
    }
    // While bytes that came by TCP wait in a member, FIONREAD does not count them.
    if !caught_up(socket) {
        return Some(LEFT_TO_ENTER);
    }
    // What it sent so far went by TCP.
    set!((*me).streak, BY_TCP);
    // SAFETY: the map's key, and a socket that lives as long as the iterator is at it.
    let result = unsafe {
        bpf_map_update_elem(
            (&raw const SOCKETS).cast_mut().cast(),
            (&raw mut *key).cast::<c_void>(),
            socket,
            BPF_ANY.into(),
        )
    };
    if result != 0 {
        leave(pair, Reason::Refused);
        return None;
    }
    if !caught_up(socket) {
        delete(key);
        return Some(LEFT_TO_ENTER);
    }
    // A recv that was waiting when the socket entered sees nothing of what is
    // redirected: two reads must end first, of which the second began as a member.
    set!((*me).opens_at, get!((*me).reads).wrapping_add(if waits { 2 } else { 0 }));
    set!((*me).gate, GATE_IN);
    // The reading side may have thought better of it meanwhile.
    (get!((*pair).stage) != STAGE_ASKED).then_some(LEFT_TO_ENTER)
}

/// Takes a socket out of the map once it has read what was redirected to it.
#[inline(always)]
fn exit(key: &mut Key, pair: *mut Pair, me: *mut End, other: *mut End) -> Option<u32> {
    set!((*me).gate, GATE_LEAVING);
    // A barrier: see `send`.
    let consumed = add!((*me).consumed, 0);
    if !drained(get!((*other).mark), consumed) {
        // `shortcut_read` calls once it has been read.
        set!((*pair).stage, STAGE_LEAVING);
        return Some(LEFT_TO_READ);
    }
    delete(key);
    set!((*me).gate, GATE_OUT);
    if get!((*other).gate) == GATE_OUT {
        start_over(pair);
    }
    None
}

#[inline(always)]
fn delete(key: &mut Key) {
    // SAFETY: the map's key. It is not there any more if the socket was closed.
    unsafe { bpf_map_delete_elem((&raw const SOCKETS).cast_mut().cast(), (&raw mut *key).cast::<c_void>()) };
}

/// Whether an end has read all that arrived by TCP, waiting for it for some microseconds.
#[inline(always)]
fn caught_up(socket: *mut c_void) -> bool {
    // SAFETY: a socket; the helper makes sure that it is one of TCP.
    let sock = unsafe { bpf_skc_to_tcp_sock(socket) };
    if sock.is_null() {
        return false;
    }
    for _ in 0..2000 {
        if field!(sock, RCV_NXT as u32) == field!(sock, COPIED_SEQ as u32) {
            return true;
        }
    }
    false
}
