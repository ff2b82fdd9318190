//! Programs that a benchmark starts.

use std::{
    io,
    net::{SocketAddr, TcpStream},
    os::unix::process::CommandExt as _,
    process::{Child, Command, Stdio},
    thread,
    time::Duration,
};

use anyhow::{Result, bail};
use nix::{
    sys::signal::{Signal, killpg},
    unistd::Pid,
};
use underpass::lab::Namespace;

/// A program that is ended, with those that it has started, when dropped.
#[derive(Debug)]
pub struct Process {
    pub child: Child,
}

impl Process {
    /// Starts a command in a namespace, as the leader of a process group of its own.
    pub fn start(namespace: &Namespace, command: &mut Command) -> io::Result<Self> {
        Ok(Self { child: namespace.spawn(command.process_group(0))? })
    }

    /// Starts a server by a line of shell and waits until it listens.
    pub fn server(namespace: &Namespace, command: &str, at: SocketAddr) -> Result<Self> {
        let mut shell = Command::new("sh");
        shell.args(["-c", command]).stdout(Stdio::null()).stderr(Stdio::null());
        let process = Self::start(namespace, &mut shell)?;
        for _ in 0..1000 {
            if namespace.enter(|| TcpStream::connect(at)).is_ok() {
                return Ok(process);
            }
            thread::sleep(Duration::from_millis(20));
        }
        bail!("nothing listens at {at} after: {command}; run ./dev setup bench")
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Both fail only where it has ended already.
        let _ = killpg(Pid::from_raw(self.child.id().cast_signed()), Signal::SIGKILL);
        let _ = self.child.wait();
    }
}
