//! The relay's choice of a path, over any traffic: it names another path than the one
//! in use, never one that this kernel lacks, and never leaves the kernel's.
#![no_main]

use libfuzzer_sys::fuzz_target;
use underpass_logic::relay::{Path, Window, better_path};

fuzz_target!(|input: (bool, u8, Vec<(bool, u32)>)| {
    let (kernel, start, visits) = input;
    let mut now = if start % 2 == 0 { Path::Copy } else { Path::Splice };
    let mut window = Window::default();
    let mut moved = 0;
    for (side, bytes) in visits {
        window.note(side.into(), bytes.into());
        moved += u64::from(bytes);
        assert_eq!(window.moved(), moved);
        if let Some((path, reason)) = better_path(now, &mut window, kernel) {
            assert_ne!(path, now);
            assert_ne!(now, Path::Kernel);
            assert!(kernel || path != Path::Kernel);
            assert!(path != Path::Copy && !reason.is_empty());
            now = path;
        }
        moved = window.moved();
    }
});
