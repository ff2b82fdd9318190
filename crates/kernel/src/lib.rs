//! What all kernel programs share.
#![no_std]
#![feature(asm_experimental_arch)]

pub mod packet;
pub mod socket;

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
