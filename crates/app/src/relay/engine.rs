//! The workers of a relay, and which paths they may use.

use std::{
    net::TcpStream,
    sync::atomic::{AtomicUsize, Ordering},
    thread::available_parallelism,
};

use anyhow::Context as _;

use super::{
    Choice,
    kernel::Kernel,
    probe,
    worker::{Job, Open, Worker},
};
use crate::error::{Error, Result};

/// Carries connections on as many threads as there are CPUs.
#[derive(Debug)]
pub struct Engine {
    workers: Vec<Worker>,
    next: AtomicUsize,
    /// The paths that new connections may use.
    pub choice: Choice,
    /// Why the kernel path is used or not.
    pub kernel: String,
}

impl Engine {
    /// Starts the workers. With `auto` the kernel path is used only where it proves
    /// itself; with `kernel` it has to.
    ///
    /// # Errors
    /// [`Error::Unable`] where `choice` is the kernel path and it cannot be used.
    pub fn start(choice: Choice) -> Result<Self> {
        let count = available_parallelism().map_or(1, usize::from);
        let (workers, choice, kernel) = match choice {
            Choice::Copy | Choice::Splice => (plain(count)?, choice, "not asked for".into()),
            Choice::Kernel | Choice::Auto { .. } => match with_kernel(count) {
                Ok((workers, proof)) => (workers, choice, proof),
                Err(error) if choice == Choice::Kernel => {
                    return Err(Error::Unable(format!("--path kernel cannot be used here: {error:#}")));
                }
                Err(error) => (plain(count)?, choice.without_kernel(), format!("not used: {error:#}")),
            },
        };
        Ok(Self { workers, next: AtomicUsize::new(0), choice, kernel })
    }

    /// Carries a connection to its end.
    pub fn carry(&self, job: Job) {
        let next = self.next.fetch_add(1, Ordering::Relaxed);
        self.workers[next % self.workers.len()].carry(job);
    }

    /// Tells of the open connections.
    pub async fn describe(&self) -> Vec<Open> {
        let mut open = vec![];
        for worker in &self.workers {
            // A worker that was stopped has none.
            open.extend(worker.describe().await.unwrap_or_default());
        }
        open
    }

    /// Ends every connection.
    pub fn stop(&self) {
        self.workers.iter().for_each(Worker::stop);
    }
}

/// Proves the kernel path, for the doctor.
///
/// # Errors
/// Why it cannot be used.
pub fn prove() -> anyhow::Result<String> {
    let (workers, proof) = with_kernel(1)?;
    workers.iter().for_each(Worker::stop);
    Ok(proof)
}

fn plain(count: usize) -> Result<Vec<Worker>> {
    Ok((0..count).map(|_| Worker::start(None)).collect::<anyhow::Result<_>>()?)
}

fn with_kernel(count: usize) -> anyhow::Result<(Vec<Worker>, String)> {
    let workers: Vec<_> =
        (0..count).map(|_| Worker::start(Some(Kernel::load()?))).collect::<anyhow::Result<_>>()?;
    let first = workers.first().context("no worker")?;
    match probe::run(first) {
        Ok(proof) => Ok((workers, proof.to_string())),
        Err(error) => {
            workers.iter().for_each(Worker::stop);
            Err(error)
        }
    }
}

/// Makes a socket ready for a worker.
///
/// # Errors
/// Where the connection is gone already.
pub fn prepare(stream: TcpStream) -> std::io::Result<TcpStream> {
    stream.set_nonblocking(true)?;
    stream.set_nodelay(true)?;
    Ok(stream)
}
