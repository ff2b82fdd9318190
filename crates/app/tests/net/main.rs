//! End to end, in private network namespaces, with the real binary. Needs root.

mod dnsguard;
mod doctor;
mod kit;
mod lab;
mod mux;
mod relay;
mod shortcut;
mod watch;
mod watch_gateway;
mod watch_kinds;
mod watch_owners;
