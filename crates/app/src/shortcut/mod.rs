//! `underpass shortcut`: chosen local processes talk socket to socket.

use std::{
    fs::File,
    io::Write as _,
    os::fd::AsFd as _,
    path::Path,
    sync::{Arc, Mutex},
    thread::JoinHandle,
    time::Duration,
};

use anyhow::{Context as _, Result};
use nix::sys::eventfd::EventFd;

use crate::error;

mod attach;
pub mod cgroup;
mod demo;
mod doctor;
mod helper;
mod iterate;
pub mod measure;
mod plane;
pub mod probe;
mod show;
pub mod summary;

pub(crate) use demo::scene;
pub(crate) use doctor::doctor;
use plane::{Programs, Tables};
pub(crate) use show::{down, status};
use summary::Summary;

/// Arguments of `underpass shortcut`.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Accelerate request/response connections of chosen local processes from now on
    Attach(attach::AttachArgs),
    /// Leave new connections to TCP, and take the running ones back to it
    Detach,
    /// Connections accelerated and left alone, bytes by way, by control group and port
    Show(show::ShowArgs),
    /// What `attach` leaves running
    #[command(hide = true)]
    Serve,
}

pub(crate) fn run(args: &Args) -> error::Result<()> {
    let mut out = std::io::stdout();
    match &args.command {
        Command::Attach(args) => {
            for line in attach::attach(args)? {
                writeln!(out, "{line}").context("cannot print what was attached")?;
            }
        }
        Command::Detach => {
            writeln!(out, "{}", attach::detach()?).context("cannot print that it was detached")?;
        }
        Command::Show(args) => show::show(args)?,
        Command::Serve => attach::serve()?,
    }
    Ok(())
}

/// What is to be accelerated.
#[derive(Debug, Default)]
pub struct Scope {
    /// Ports, at either end; none means all of them.
    pub ports: Vec<u16>,
    /// Habits of reading of which the user accepts the consequences, bits `HABIT_*`
    /// of `underpass_abi::shortcut`.
    pub accepted: u32,
}

/// A shortcut that lasts as long as this value: for the probe, the demo and tests.
pub struct Shortcut {
    tables: Arc<Mutex<Tables>>,
    stop: Arc<EventFd>,
    helper: Option<JoinHandle<Result<()>>>,
    /// Detached when dropped, after the helper has ended.
    _programs: Programs,
}

impl Shortcut {
    /// Accelerates connections that are established in a control group from now on.
    ///
    /// # Errors
    /// Where the kernel lacks what it takes, or the privileges are missing.
    pub fn start(cgroup: &Path, scope: &Scope) -> Result<Self> {
        let mut programs = Programs::load(scope)?;
        let tables = Arc::new(Mutex::new(programs.tables()?));
        let cgroup = File::open(cgroup).with_context(|| format!("cannot open {}", cgroup.display()))?;
        programs.attach(&cgroup)?;
        let stop = Arc::new(EventFd::new()?);
        let helper = std::thread::spawn({
            let (tables, stop) = (Arc::clone(&tables), Arc::clone(&stop));
            move || helper::serve(&tables, stop.as_fd())
        });
        Ok(Self { tables, stop, helper: Some(helper), _programs: programs })
    }

    /// Whether a connection to this server's port goes from socket to socket now.
    pub fn is_accelerated(&self, port: u16) -> bool {
        helper::lock(&self.tables).pairs().any(|(_, pair)| pair.port == port && plane::is_inside(&pair))
    }

    /// What it did so far.
    pub fn summary(&self) -> Summary {
        Summary::of(&helper::lock(&self.tables))
    }
}

impl Drop for Shortcut {
    fn drop(&mut self) {
        // If the helper does not end, the process does: it holds no more than this one.
        if self.stop.write(1).is_ok() {
            let _ = self.helper.take().map(JoinHandle::join);
        }
        let _ = helper::drain(&self.tables, Duration::from_secs(1));
    }
}
