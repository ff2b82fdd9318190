//! The relay's kernel path: moves what arrives on one of two joined sockets to the
//! other's send queue. The rules are in `logic::relay`; this translates.
#![no_std]
#![no_main]

use aya_ebpf::{
    bindings::{BPF_F_MMAPABLE, BPF_F_NO_PREALLOC, sk_action::SK_DROP, sk_action::SK_PASS},
    macros::{map, stream_verdict},
    maps::{Array, HashMap, RingBuf, SockHash},
    programs::SkBuffContext,
};
use underpass_abi::relay::{BROKEN_GAP, BROKEN_REDIRECT, BROKEN_TRIM, Credit, EVENT_BROKEN, Progress};
use underpass_kernel::{
    add_to,
    socket::{self, TcpField},
};
use underpass_logic::relay::{Gap, News, SendQueue, Verdict, decide, news, overlap};

underpass_kernel::license!();

/// A socket's cookie to the socket itself: membership starts the verdict program.
#[map]
static SOCKETS: SockHash<u64> = SockHash::with_max_entries(1, 0);

/// A socket's cookie to the socket that it is joined with. Filled before `SOCKETS`,
/// and without a program, so that no segment is judged before its way is known.
#[map]
static PEERS: SockHash<u64> = SockHash::with_max_entries(1, 0);

/// A socket's cookie to the slot of the direction that begins there.
#[map]
static COOKIE_TO_SLOT: HashMap<u64, u32> = HashMap::with_max_entries(1, BPF_F_NO_PREALLOC);

#[map]
static PROGRESS: Array<Progress> = Array::with_max_entries(1, BPF_F_MMAPABLE);

#[map]
static CREDITS: Array<Credit> = Array::with_max_entries(1, BPF_F_MMAPABLE);

/// Slots that the user side has to look at.
#[map]
static EVENTS: RingBuf = RingBuf::with_byte_size(1 << 18, 0);

/// The offset of `write_seq` in the kernel's `struct tcp_sock`; set before loading.
#[unsafe(no_mangle)]
static WRITE_SEQ: TcpField = TcpField::UNSET;

/// The same of `copied_seq`.
#[unsafe(no_mangle)]
static COPIED_SEQ: TcpField = TcpField::UNSET;

/// The same of `sk_sndbuf` in `struct sock`, with which a `tcp_sock` begins.
#[unsafe(no_mangle)]
static SNDBUF: TcpField = TcpField::UNSET;

/// The same of `sk_wmem_queued`.
#[unsafe(no_mangle)]
static WMEM_QUEUED: TcpField = TcpField::UNSET;

#[stream_verdict]
pub fn relay_verdict(ctx: SkBuffContext) -> u32 {
    // A FIN comes as a segment without bytes; redirecting it would break the other
    // socket's queue. The user side learns of it from EPOLLRDHUP.
    if ctx.len() == 0 {
        return SK_DROP;
    }
    let cookie = socket::cookie(&ctx);
    let Some(slot) = COOKIE_TO_SLOT.get_ptr(cookie) else {
        return SK_PASS;
    };
    // SAFETY: an entry is removed only after its sockets are closed.
    let slot = unsafe { *slot };
    let (Some(progress), Some(credit)) = (PROGRESS.get_ptr_mut(slot), CREDITS.get_ptr(slot)) else {
        return SK_PASS;
    };
    // SAFETY: both point into maps that live as long as the program. The kernel
    // holds the source socket's lock around a verdict, so nobody else has this
    // slot's progress; the user side writes only the credit, in whole words.
    let progress = unsafe { &mut *progress };
    match judge(&ctx, cookie, slot, progress, credit) {
        Ok(action) => action,
        Err(reason) => {
            progress.broken = reason;
            let _ = EVENTS.output::<u32>(slot | EVENT_BROKEN, 0);
            SK_DROP
        }
    }
}

#[inline(always)]
fn judge(
    ctx: &SkBuffContext,
    cookie: u64,
    slot: u32,
    progress: &mut Progress,
    credit: *const Credit,
) -> Result<u32, u32> {
    let seq = socket::segment_seq(ctx);
    let len = ctx.len();
    let send_queue = socket::member(&PEERS, cookie, |peer| SendQueue {
        write_seq: peer.read(&WRITE_SEQ),
        room: peer.read(&SNDBUF).saturating_sub(peer.read(&WMEM_QUEUED)),
        owed: is_owed(slot ^ 1),
    });
    let Some(send_queue) = send_queue else {
        return Err(BROKEN_REDIRECT);
    };
    if progress.started == 0 {
        // The first segment may be one of which the user side has read a part.
        progress.last_end = socket::source(ctx, &COPIED_SEQ).ok_or(BROKEN_GAP)?;
        progress.base_seq = send_queue.write_seq;
        progress.started = 1;
    }
    let old = overlap(progress, seq).map_err(|Gap| BROKEN_GAP)?;
    if old >= len {
        progress.trimmed += len as u64;
        return Ok(SK_DROP);
    }
    progress.last_end = seq.wrapping_add(len);
    if old > 0 {
        progress.trimmed += old as u64;
        socket::trim(ctx, old).map_err(|_| BROKEN_TRIM)?;
    }
    progress.segments += 1;
    let len = len - old;
    // SAFETY: see `relay_verdict`.
    let allowed = unsafe { credit.read_volatile() };
    match decide(progress, &allowed, &send_queue, len) {
        Verdict::Redirect => redirect(ctx, cookie, progress, len),
        Verdict::Pass => pass(ctx, cookie, slot, progress, credit, len),
    }
}

/// Passes a segment to the user side and tells it where it has to be told.
#[inline(always)]
fn pass(
    ctx: &SkBuffContext,
    cookie: u64,
    slot: u32,
    progress: &mut Progress,
    credit: *const Credit,
    len: u32,
) -> Result<u32, u32> {
    // SAFETY: see `relay_verdict`. The credit is read behind the barrier that `add_to` is.
    let credit = unsafe {
        add_to(&raw mut progress.passed, len as u64);
        credit.read_volatile()
    };
    match news(progress, &credit, len) {
        News::None => Ok(SK_PASS),
        News::Much => {
            // If there is no room for it, the next one tells.
            let _ = EVENTS.output::<u32>(slot, 0);
            Ok(SK_PASS)
        }
        News::Arrived if EVENTS.output::<u32>(slot, 0).is_ok() => Ok(SK_PASS),
        News::Arrived => {
            // Nobody would ever fetch what is passed: over the limit is the lesser evil.
            progress.passed -= len as u64;
            redirect(ctx, cookie, progress, len)
        }
    }
}

/// Whether bytes of a direction are passed to the user side and not written yet.
#[inline(always)]
fn is_owed(slot: u32) -> bool {
    let (Some(progress), Some(credit)) = (PROGRESS.get_ptr(slot), CREDITS.get_ptr(slot)) else {
        return true;
    };
    // SAFETY: both point into maps that live as long as the program; others write them
    // meanwhile, in whole words.
    let (passed, consumed) = unsafe {
        ((&raw const (*progress).passed).read_volatile(), (&raw const (*credit).consumed).read_volatile())
    };
    passed != consumed
}

#[inline(always)]
fn redirect(ctx: &SkBuffContext, cookie: u64, progress: &mut Progress, len: u32) -> Result<u32, u32> {
    if PEERS.redirect_skb(ctx, cookie, 0) as u32 != SK_PASS {
        return Err(BROKEN_REDIRECT);
    }
    progress.redirected += len as u64;
    Ok(SK_PASS)
}
