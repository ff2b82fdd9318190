//! Raw access to sockets and their segments.

use aya_ebpf::{
    bindings::tcp_sock,
    helpers::{bpf_get_socket_cookie, bpf_sk_release, bpf_skc_to_tcp_sock, generated::bpf_map_lookup_elem},
    maps::SockHash,
    programs::SkBuffContext,
};

/// The most that `bpf_skb_adjust_room` cuts off at once is 0xfff bytes.
const TRIM_STEP: u32 = 4000;
/// TCP merges what waits to be read into segments of up to 17 pages of 32 KiB
/// (MAX_SKB_FRAGS): 557,056 bytes.
const TRIM_STEPS: u32 = 140;

/// The number that names the segment's socket for its whole life.
#[inline(always)]
pub fn cookie(ctx: &SkBuffContext) -> u64 {
    // SAFETY: the context is the one that the kernel called the program with.
    unsafe { bpf_get_socket_cookie(ctx.skb.skb.cast()) }
}

/// The sequence number of the segment's first byte, host byte order.
///
/// TCP keeps it in the first word of the segment's control block, which programs
/// on a sockmap without a parser see as `cb[0]` since Linux 5.16 (before, `cb[0]`
/// is the third word). The relay's probe makes sure of it.
#[inline(always)]
pub fn segment_seq(ctx: &SkBuffContext) -> u32 {
    // SAFETY: as in `cookie`; the verifier turns it into a read of the control block.
    unsafe { (*ctx.skb.skb).cb[0] }
}

/// A field of the kernel's `struct tcp_sock`: its offset, set by the user side
/// before the program is loaded.
#[repr(transparent)]
pub struct TcpField(u32);

impl TcpField {
    /// To be set before loading.
    pub const UNSET: Self = Self(0);
}

/// A TCP socket that the kernel keeps while it is looked at.
pub struct Tcp(*const tcp_sock);

impl Tcp {
    /// Reads a field, a u32.
    #[inline(always)]
    pub fn read(&self, field: &'static TcpField) -> u32 {
        // SAFETY: the pointer is one that `bpf_skc_to_tcp_sock` gave; the offset is a
        // constant to the verifier, which checks that a u32 lies there.
        unsafe {
            let offset = core::ptr::read_volatile(&raw const field.0) as usize;
            self.0.cast::<u8>().add(offset).cast::<u32>().read_volatile()
        }
    }
}

/// A field of the socket that the segment has arrived at.
#[inline(always)]
pub fn source(ctx: &SkBuffContext, field: &'static TcpField) -> Option<u32> {
    // SAFETY: the kernel keeps the segment's socket while the program runs.
    let tcp = unsafe {
        let socket = (*ctx.skb.skb).__bindgen_anon_2.sk;
        if socket.is_null() {
            return None;
        }
        bpf_skc_to_tcp_sock(socket.cast())
    };
    if tcp.is_null() { None } else { Some(Tcp(tcp).read(field)) }
}

/// Looks at the socket that `sockets` has under `cookie`.
#[inline(always)]
pub fn member<T>(sockets: &'static SockHash<u64>, cookie: u64, look: impl FnOnce(&Tcp) -> T) -> Option<T> {
    // SAFETY: the helper takes a map and a key of its size.
    let socket = unsafe {
        bpf_map_lookup_elem(
            core::ptr::from_ref(sockets).cast_mut().cast(),
            core::ptr::from_ref(&cookie).cast(),
        )
    };
    if socket.is_null() {
        return None;
    }
    // SAFETY: `socket` is a socket that the lookup took a reference on, given back
    // below on every way.
    unsafe {
        let tcp = bpf_skc_to_tcp_sock(socket.cast());
        let value = if tcp.is_null() { None } else { Some(look(&Tcp(tcp))) };
        bpf_sk_release(socket.cast());
        value
    }
}

/// Cuts `count` bytes off the segment's front.
///
/// # Errors
/// Where the kernel refuses, or for more than 560,000 bytes.
#[inline(always)]
pub fn trim(ctx: &SkBuffContext, count: u32) -> Result<(), i64> {
    let mut left = count;
    for _ in 0..TRIM_STEPS {
        // The last step leaves the loop: were it left by what is then 0, which the verifier
        // does not know, it would go round again from each step (on 6.12 834,000
        // instructions of the million that it grants, and a second to load).
        if left <= TRIM_STEP {
            return if left == 0 { Ok(()) } else { ctx.adjust_room(-(left as i32), 0, 0) };
        }
        ctx.adjust_room(-(TRIM_STEP as i32), 0, 0)?;
        left -= TRIM_STEP;
    }
    Err(-1)
}
