//! The workers of a relay, and which paths they may use.

use std::{
    net::{TcpListener, TcpStream},
    sync::Arc,
    thread::available_parallelism,
};

use anyhow::Context as _;

use super::{
    Choice,
    kernel::Kernel,
    probe,
    worker::{Accepted, Door, Job, Open, Worker},
};
use crate::error::{Error, Result};

/// Carries connections on as many threads as there are CPUs.
#[derive(Debug)]
pub struct Engine {
    workers: Vec<Worker>,
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
        Ok(Self { workers, choice, kernel })
    }

    /// Carries a connection to its end, on the worker that has the fewest.
    pub fn carry(&self, job: Job) {
        let least = self.workers.iter().min_by_key(|worker| worker.load());
        least.expect("there is a worker for each CPU").carry(job);
    }

    /// Lets the workers accept clients themselves. `take` turns each into a job, which
    /// stays with the worker that accepted it, unless another has a good deal less to do:
    /// waking that one costs more than a small difference.
    pub fn open(
        &self,
        listener: &Arc<TcpListener>,
        take: impl Fn(Accepted) -> Option<Job> + Clone + Send + Sync + 'static,
    ) {
        for (at, worker) in self.workers.iter().enumerate() {
            let (take, workers) = (take.clone(), self.workers.clone());
            let place = move |accepted| {
                let job = take(accepted)?;
                let load = |worker: &&Worker| worker.load();
                let least = workers.iter().min_by_key(load)?;
                if workers[at].load() <= least.load() + least.load() / 4 {
                    return Some(job);
                }
                least.carry(job);
                None
            };
            worker.open(Door { listener: Arc::clone(listener), take: Arc::new(place) });
        }
    }

    /// Accepts no more clients.
    pub fn close_door(&self) {
        self.workers.iter().for_each(Worker::close_door);
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
