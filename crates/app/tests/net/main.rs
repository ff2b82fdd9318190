//! End to end, in private network namespaces, with the real binary. Needs root.

mod lab;
mod shortcut;
mod watch;
