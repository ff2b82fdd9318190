//! BPF arrays mapped into this process' memory (BPF_F_MMAPABLE, Linux 5.5).

use std::{
    num::NonZeroUsize,
    os::fd::AsFd,
    ptr::NonNull,
    sync::atomic::{AtomicU32, AtomicU64, Ordering},
};

use anyhow::{Context as _, Result};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use underpass_abi::relay::{Credit, Progress};

/// An array of `T` that a program and this process read and write at the same time.
pub struct Shared<T> {
    base: NonNull<T>,
    len: u32,
}

// SAFETY: the memory belongs to the mapping, not to a thread, and is only ever
// accessed through atomics.
unsafe impl<T> Send for Shared<T> {}

impl<T> Shared<T> {
    /// Maps an array of `len` elements.
    ///
    /// # Errors
    /// Where the map was not made with BPF_F_MMAPABLE, or memory is short.
    pub fn map(array: impl AsFd, len: u32) -> Result<Self> {
        let bytes = NonZeroUsize::new(len as usize * size_of::<T>()).context("an empty array")?;
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let base = unsafe { mmap(None, bytes, access, MapFlags::MAP_SHARED, array, 0) }
            .context("cannot map a BPF array into memory (BPF_F_MMAPABLE, Linux 5.5)")?;
        Ok(Self { base: base.cast(), len })
    }

    fn at(&self, slot: u32) -> *mut T {
        assert!(slot < self.len, "slot {slot} of {}", self.len);
        // SAFETY: within the mapping, as asserted.
        unsafe { self.base.as_ptr().add(slot as usize) }
    }
}

impl<T> Drop for Shared<T> {
    fn drop(&mut self) {
        // SAFETY: this is what `map` mapped, and nothing refers to it any more.
        let _ = unsafe { munmap(self.base.cast(), self.len as usize * size_of::<T>()) };
    }
}

impl Shared<Progress> {
    /// What the program has done so far. `redirected` is read after `passed`: bytes
    /// redirected before those passed are always seen.
    pub fn get(&self, slot: u32) -> Progress {
        let it = self.at(slot);
        // SAFETY: the fields lie in the mapping and are aligned; the program, too,
        // writes them in whole words.
        unsafe {
            // In one order with what `consume` wrote: see `logic::relay::news`.
            let passed = AtomicU64::from_ptr(&raw mut (*it).passed).load(Ordering::SeqCst);
            Progress {
                passed,
                redirected: AtomicU64::from_ptr(&raw mut (*it).redirected).load(Ordering::Acquire),
                trimmed: AtomicU64::from_ptr(&raw mut (*it).trimmed).load(Ordering::Relaxed),
                segments: AtomicU64::from_ptr(&raw mut (*it).segments).load(Ordering::Relaxed),
                base_seq: AtomicU32::from_ptr(&raw mut (*it).base_seq).load(Ordering::Relaxed),
                last_end: AtomicU32::from_ptr(&raw mut (*it).last_end).load(Ordering::Relaxed),
                started: AtomicU32::from_ptr(&raw mut (*it).started).load(Ordering::Relaxed),
                broken: AtomicU32::from_ptr(&raw mut (*it).broken).load(Ordering::Relaxed),
                reserved: [0; 2],
            }
        }
    }

    /// Puts a slot at rest. No socket may be joined under it.
    pub fn clear(&mut self, slot: u32) {
        // SAFETY: within the mapping; with no socket joined the program does not
        // touch this slot.
        unsafe { self.at(slot).write_volatile(Progress::default()) };
    }
}

impl Shared<Credit> {
    /// What this process has allowed and consumed.
    pub fn get(&self, slot: u32) -> Credit {
        // SAFETY: within the mapping; only this process writes it.
        unsafe { self.at(slot).read_volatile() }
    }

    /// Puts a slot at rest. No socket may be joined under it.
    pub fn clear(&mut self, slot: u32, cap: u64) {
        // SAFETY: as for the progress.
        unsafe { self.at(slot).write_volatile(Credit { cap, ..Credit::default() }) };
    }

    /// Tells the program that `bytes` more of the passed ones are written.
    pub fn consume(&mut self, slot: u32, bytes: u64) {
        // SAFETY: within the mapping and aligned.
        let consumed = unsafe { AtomicU64::from_ptr(&raw mut (*self.at(slot)).consumed) };
        consumed.fetch_add(bytes, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use nix::sys::mman::mmap_anonymous;

    use super::*;

    impl<T> Shared<T> {
        /// This process' own memory in place of an array: Miri follows it there.
        fn in_memory(len: u32) -> Self {
            let bytes = NonZeroUsize::new(len as usize * size_of::<T>()).unwrap();
            let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
            // SAFETY: a new mapping at an address of the kernel's choice.
            let base = unsafe { mmap_anonymous(None, bytes, access, MapFlags::MAP_PRIVATE) }.unwrap();
            Self { base: base.cast(), len }
        }
    }

    #[test]
    fn slots_are_apart() {
        let mut credits = Shared::<Credit>::in_memory(3);
        credits.clear(0, 10);
        credits.clear(2, 30);
        credits.consume(2, 5);
        credits.consume(2, 6);
        let read = |slot| (credits.get(slot).cap, credits.get(slot).consumed);
        assert_eq!([0, 1, 2].map(read), [(10, 0), (0, 0), (30, 11)]);
        let mut progress = Shared::<Progress>::in_memory(2);
        progress.clear(1);
        assert_eq!(progress.get(1).passed, 0);
    }

    #[test]
    #[should_panic(expected = "slot 3 of 3")]
    fn a_slot_that_is_not_there_is_not_touched() {
        Shared::<Credit>::in_memory(3).get(3);
    }

    /// A thread in the program's place redirects some bytes before it passes as many.
    #[test]
    fn what_was_redirected_before_is_seen_with_what_is_passed() {
        let shared = Shared::<Progress>::in_memory(1);
        let it = shared.at(0);
        // SAFETY: both fields lie in the mapping, which outlives the threads, and are aligned.
        let (redirected, passed) = unsafe {
            (AtomicU64::from_ptr(&raw mut (*it).redirected), AtomicU64::from_ptr(&raw mut (*it).passed))
        };
        let rounds = if cfg!(miri) { 20 } else { 100_000 };
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for count in 1..=rounds {
                    redirected.store(count, Ordering::Relaxed);
                    passed.store(count, Ordering::Release);
                }
            });
            let mut seen = 0;
            while seen < rounds {
                let progress = shared.get(0);
                assert!(progress.redirected >= progress.passed, "{progress:?}");
                seen = progress.passed;
                std::thread::yield_now();
            }
        });
    }
}
