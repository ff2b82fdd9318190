//! underpass: moves, filters and watches a Linux host's traffic inside the kernel.
//!
//! The binary is `main.rs`; everything it does is here, so that tests can reach it.

pub mod address;
mod attachment;
pub mod btf;
pub mod capabilities;
pub mod cli;
pub mod demo;
pub mod dnsguard;
pub mod doctor;
pub mod error;
#[cfg(fuzzing)]
pub mod fuzzing;
pub mod hook;
pub mod lab;
mod live;
pub mod logging;
pub mod mux;
pub mod object;
pub mod pins;
pub mod relay;
pub mod shortcut;
pub mod status;
pub mod watch;
