//! The command line as people and scripts meet it: what it prints and its exit status.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod dnsguard;
mod relay;
mod watch;
