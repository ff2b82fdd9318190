//! What the kernel programs and the user side share: keys, values, events and
//! configs, one module per function.
//!
//! Every type here is `repr(C)`, has no implicit padding and its size asserted,
//! so that both sides agree on each byte. Integers are in host byte order unless
//! a field says otherwise.
#![no_std]

pub mod attachment;
pub mod dnsguard;
pub mod mux;
pub mod relay;
pub mod shortcut;
pub mod watch;

/// Implements aya's `Pod` for types without padding whose every bit pattern is
/// valid, and asserts their size.
#[macro_export]
macro_rules! pod {
    ($($name:ty = $size:expr),+ $(,)?) => {$(
        const _: () = assert!(core::mem::size_of::<$name>() == $size);
        // SAFETY: the type is `repr(C)`, `Copy`, made of integers only, and the
        // assertion above leaves no room for padding.
        #[cfg(feature = "user")]
        unsafe impl aya::Pod for $name {}
    )+};
}
