//! The relay's kernel path: moves bytes between two joined sockets.
#![no_std]
#![no_main]

use aya_ebpf::{
    macros::{map, stream_verdict},
    maps::SockHash,
    programs::SkBuffContext,
};

underpass_kernel::license!();

#[map]
static SOCKETS: SockHash<u64> = SockHash::with_max_entries(16, 0);

#[stream_verdict]
pub fn relay_verdict(_ctx: SkBuffContext) -> u32 {
    1
}
