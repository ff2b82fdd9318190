//! What all kernel programs share.
#![no_std]
#![feature(asm_experimental_arch)]

pub mod dnsguard;
pub mod packet;
pub mod socket;

/// Adds to a number that others read or write meanwhile. `core` has no such operation for
/// this target; the instruction is there (BPF_XADD), on every kernel. On x86-64 it is a full
/// barrier besides.
///
/// # Safety
/// `number` must be valid for reading and writing.
#[inline(always)]
pub unsafe fn add_to(number: *mut u64, more: u64) {
    // SAFETY: one instruction on a valid place.
    unsafe {
        core::arch::asm!("lock *(u64 *)({number} + 0) += {more}", number = in(reg) number, more = in(reg) more);
    }
}

/// The program's settings, from its read-only data: the user side writes them before
/// the program is loaded, so the compiler must not know them, and the verifier does.
#[macro_export]
macro_rules! settings {
    ($static:ident) => {{
        let mut settings = &raw const $static;
        // SAFETY: a move of a register; what it points to is as valid as before.
        unsafe {
            core::arch::asm!("{0} = {0}", inout(reg) settings, options(pure, readonly, nostack));
            &*settings
        }
    }};
}

/// The licence that each object declares to the kernel.
#[macro_export]
macro_rules! license {
    () => {
        #[unsafe(no_mangle)]
        #[unsafe(link_section = "license")]
        static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

        #[cfg(not(test))]
        #[panic_handler]
        fn panic(_info: &core::panic::PanicInfo) -> ! {
            loop {}
        }
    };
}
