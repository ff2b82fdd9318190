//! Parsing and decisions: the same code in the kernel programs, in the binary, in
//! host tests, in property tests and in fuzzers. Pure: no IO, no clock, no memory
//! allocation, and no `unsafe`.
#![no_std]
#![forbid(unsafe_code)]

pub mod dns;
pub mod dnsguard;
pub mod mux;
pub mod packet;
pub mod relay;
pub mod shortcut;

#[cfg(any(test, fuzzing))]
extern crate std;
