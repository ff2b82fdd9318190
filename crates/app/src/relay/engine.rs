//! The workers of a relay, and which paths they may use.

use std::{io, net::TcpListener, sync::Arc, thread::available_parallelism};

use anyhow::Context as _;
use tokio::sync::mpsc;

use super::{
    Choice,
    front::{Client, Front},
    kernel::Kernel,
    probe,
    worker::{Door, Job, Open, Taken, Worker},
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

    /// Lets the workers accept clients themselves, and ends when the listener fails them.
    /// `take` says what becomes of each that is let in; it stays with the worker that accepted
    /// it, unless another has a good deal less to do: waking that one costs more than a small
    /// difference.
    pub async fn open(
        &self,
        front: &Arc<Front>,
        listener: &Arc<TcpListener>,
        take: impl Fn(Client) -> Taken + Clone + Send + Sync + 'static,
    ) -> io::Error {
        let (fail, mut failure) = mpsc::unbounded_channel();
        for (at, worker) in self.workers.iter().enumerate() {
            let (take, workers, front, fail) =
                (take.clone(), self.workers.clone(), Arc::clone(front), fail.clone());
            let same = Arc::clone(listener);
            let place = move |accepted| {
                let taken = match front.admit(&same, accepted) {
                    Ok(client) => client.map_or(Taken::Gone, &take),
                    Err(error) => {
                        // Nobody is there to be told once all stops, which shuts the listener.
                        let _ = fail.send(error);
                        Taken::Gone
                    }
                };
                let least = workers.iter().min_by_key(|worker| worker.load());
                match least {
                    Some(least) if taken.stays() && workers[at].load() > least.load() + least.load() / 4 => {
                        least.take(taken);
                        Taken::Gone
                    }
                    _ => taken,
                }
            };
            worker.open(Door { listener: Arc::clone(listener), take: Arc::new(place) });
        }
        drop(fail);
        match failure.recv().await {
            Some(error) => error,
            // Every worker was stopped.
            None => std::future::pending().await,
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
