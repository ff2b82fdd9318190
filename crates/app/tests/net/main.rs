//! End to end, in private network namespaces, with the real binary. Needs root.
#![allow(clippy::print_stdout, reason = "what a test prints is its report")]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod dnsguard;
mod doctor;
mod kit;
mod lab;
mod mux;
mod relay;
mod shortcut;
mod soak;
mod watch;
mod watch_gateway;
mod watch_kinds;
mod watch_losses;
mod watch_owners;
mod watch_web;
