//! The relay, end to end: client - relay - server.

mod auto;
mod backpressure;
mod families;
mod hazards;
mod limits;
mod pair;
mod socks;

use std::{
    net::{SocketAddr, TcpListener, TcpStream},
    thread,
};

use crate::kit::{Daemon, Family, Hosts, accept, connect, fields, underpass};

/// The words of `--path`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Path {
    Copy,
    Splice,
    Kernel,
    Auto,
}

impl Path {
    pub fn word(self) -> &'static str {
        match self {
            Self::Copy => "copy",
            Self::Splice => "splice",
            Self::Kernel => "kernel",
            Self::Auto => "auto",
        }
    }
}

/// Starts a relay on the middle host; returns where it listens, too.
pub fn start(hosts: &Hosts, args: &[&str]) -> (Daemon, SocketAddr) {
    let mut command = underpass();
    command.arg("relay").args(args).arg("--log-connections");
    let relay = Daemon::start(&hosts.relay, &mut command);
    let listen = ready(&relay);
    (relay, listen)
}

/// Waits until a relay is ready; returns where it listens.
pub fn ready(relay: &Daemon) -> SocketAddr {
    fields(&relay.line(" ready "))["listen"].parse().unwrap()
}

/// A relay on one path, and the listener that it relays to.
pub struct World {
    pub hosts: Hosts,
    pub path: Path,
    pub family: Family,
    pub relay: Daemon,
    pub listen: SocketAddr,
    pub target: TcpListener,
}

impl World {
    pub fn new(path: Path, family: Family) -> Self {
        Self::with(path, family, &[])
    }

    /// With further arguments for the relay.
    pub fn with(path: Path, family: Family, args: &[&str]) -> Self {
        Self::on(Hosts::new(), path, family, args)
    }

    /// On other hosts than usual.
    pub fn on(hosts: Hosts, path: Path, family: Family, args: &[&str]) -> Self {
        let target = hosts.listen(family);
        let (relay, listen) = to(&hosts, path, family, target.local_addr().unwrap(), args);
        Self { hosts, path, family, relay, listen, target }
    }

    /// A connection through the relay: the client's end, and the server's.
    pub fn connect(&self) -> (TcpStream, TcpStream) {
        let client = connect(&self.hosts.client, self.listen).unwrap();
        (client, accept(&self.target))
    }

    /// Waits for a client's connection to end as it should, and checks what the log
    /// says about it: `closed`, and the bytes each way.
    pub fn closed(&self, client: SocketAddr, sent: u64, received: u64) {
        let line = line_of(&self.relay, client);
        assert_eq!(line["end"], "closed", "{line:?}");
        assert_eq!(
            (&line["sent"], &line["received"]),
            (&sent.to_string(), &received.to_string()),
            "{line:?}"
        );
        if self.path != Path::Auto && !line["why"].starts_with("not by the kernel") {
            assert_eq!(line["path"], self.path.word(), "{line:?}");
        }
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if thread::panicking() {
            println!("on the path {:?}, {:?}:", self.path, self.family);
        }
    }
}

/// A relay on a path to an address, listening on that family's.
pub fn to(hosts: &Hosts, path: Path, family: Family, to: SocketAddr, args: &[&str]) -> (Daemon, SocketAddr) {
    let listen = SocketAddr::new(Hosts::relay_address(family), 0).to_string();
    let to = to.to_string();
    let all = [&["--path", path.word(), "--listen", &listen, "--to", &to], args].concat();
    start(hosts, &all)
}

/// Waits for the log line of a client's connection; returns its fields.
pub fn line_of(relay: &Daemon, client: SocketAddr) -> std::collections::HashMap<String, String> {
    let address = client.to_string();
    let is_it = |line: &str| {
        line.contains(" connection ") && fields(line).get("client").is_some_and(|client| *client == address)
    };
    fields(&relay.find(&format!("a line about {address}"), is_it))
}

/// Makes tests of a function: one for each path and family.
macro_rules! on_every_path {
    ($($check:ident),+ $(,)?) => {$(
        mod $check {
            use $crate::{kit::Family::{V4, V6}, relay::Path::{Auto, Copy, Kernel, Splice}};
            #[test] fn copy_ipv4() { super::$check(Copy, V4) }
            #[test] fn copy_ipv6() { super::$check(Copy, V6) }
            #[test] fn splice_ipv4() { super::$check(Splice, V4) }
            #[test] fn splice_ipv6() { super::$check(Splice, V6) }
            #[test] fn kernel_ipv4() { super::$check(Kernel, V4) }
            #[test] fn kernel_ipv6() { super::$check(Kernel, V6) }
            #[test] fn auto_ipv4() { super::$check(Auto, V4) }
            #[test] fn auto_ipv6() { super::$check(Auto, V6) }
        }
    )+};
}
pub(crate) use on_every_path;

/// As before, for functions that mostly wait: both families at the same time.
macro_rules! on_every_path_waiting {
    ($($check:ident),+ $(,)?) => {$(
        mod $check {
            use $crate::{kit::Family::{V4, V6}, relay::Path::{self, Auto, Copy, Kernel, Splice}};
            fn both(path: Path) {
                std::thread::scope(|scope| {
                    scope.spawn(|| super::$check(path, V4));
                    scope.spawn(|| super::$check(path, V6));
                });
            }
            #[test] fn copy() { both(Copy) }
            #[test] fn splice() { both(Splice) }
            #[test] fn kernel() { both(Kernel) }
            #[test] fn auto() { both(Auto) }
        }
    )+};
}
pub(crate) use on_every_path_waiting;
