//! The multiplexer, in each of its forms.

mod connection;
mod datagram;
mod front;
mod message;
mod refusals;

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    path::PathBuf,
    process::Command,
    thread,
};

use underpass::lab::Namespace;

use crate::kit::{Daemon, fields, underpass};

/// A host on its own.
fn host() -> Namespace {
    Namespace::new().unwrap()
}

/// `mux listen` on a host, once it is ready, and where it listens.
fn listen(host: &Namespace, arguments: &[&str]) -> (Daemon, SocketAddr) {
    let daemon = Daemon::start(
        host,
        underpass().args(["mux", "listen", "127.0.0.1:0", "--log-connections"]).args(arguments),
    );
    let address = fields(&daemon.line("ready"))["listen"].parse().unwrap();
    (daemon, address)
}

/// A service that waits for the client's end, and then says its name and what it got.
fn service(host: &Namespace, name: &'static str) -> SocketAddr {
    let listener = host.enter(|| TcpListener::bind((Ipv4Addr::LOCALHOST, 0))).unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        for stream in listener.incoming() {
            thread::spawn(move || answer(stream.unwrap(), name));
        }
    });
    address
}

fn answer(mut stream: TcpStream, name: &str) {
    let mut got = vec![];
    // A client that resets gets no answer.
    if stream.read_to_end(&mut got).is_ok() {
        let _ = stream.write_all(&[name.as_bytes(), b":", &got].concat());
    }
}

/// The output of a command run on a host.
fn output(host: &Namespace, command: &mut Command) -> String {
    let output = host.enter(|| command.output()).unwrap();
    String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned()
}

/// A folder that is removed with everything in it.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("underpass-{name}-{}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        // sshd wants to be the only one who may write on the way to its keys.
        std::os::unix::fs::chown(&path, Some(0), Some(0)).unwrap();
        Self(path)
    }

    fn write(&self, name: &str, text: &str) -> String {
        let path = self.0.join(name);
        fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    }

    fn path(&self, name: &str) -> String {
        self.0.join(name).to_str().unwrap().to_owned()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}
