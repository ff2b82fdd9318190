//! Programs run on packets by `BPF_PROG_TEST_RUN`, in the kernel but off the network.
//! Needs root.
#![allow(clippy::wildcard_enum_match_arm, reason = "of aya's many kinds of program two matter here")]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod dnsguard;
mod mux;
mod objects;
mod packet;
mod run;
