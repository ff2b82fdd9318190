//! What has to be done on the user side: run a pass over the sockets when a program
//! calls. If nobody does, connections keep the way that they have.

use std::{
    os::fd::{AsRawFd as _, BorrowedFd},
    sync::Mutex,
    time::{Duration, Instant},
};

use anyhow::Result;
use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
};

use super::plane::{Left, Tables};

/// Between two passes, so that many calls make one pass.
const PAUSE: Duration = Duration::from_millis(2);
/// Sockets that could not enter at once are tried again after this, twice this, ...
const RETRY: Duration = Duration::from_millis(4);
const LAST_RETRY: Duration = Duration::from_millis(512);

/// Runs passes until `stop` is readable.
pub(super) fn serve(tables: &Mutex<Tables>, stop: BorrowedFd<'_>) -> Result<()> {
    let calls = lock(tables).calls.as_raw_fd();
    // SAFETY: the ring buffer lives as long as the tables, which are borrowed.
    let calls = unsafe { BorrowedFd::borrow_raw(calls) };
    let mut retry = None;
    loop {
        wait(&[stop, calls], retry)?;
        if wait(&[stop], Some(PAUSE))? {
            return Ok(());
        }
        let left = lock(tables).pass()?;
        retry = match (left.to_enter, retry) {
            (0, _) => None,
            (_, None) => Some(RETRY),
            (_, Some(last)) => Some((last * 2).min(LAST_RETRY)),
        };
    }
}

/// Takes everything out of the map; says what could not be taken out before `patience`
/// was over, as it has redirected bytes to read.
pub(super) fn drain(tables: &Mutex<Tables>, patience: Duration) -> Result<Left> {
    let mut control = lock(tables).control()?;
    control.closing = 1;
    lock(tables).set_control(control)?;
    let deadline = Instant::now() + patience;
    loop {
        let left = lock(tables).pass()?;
        if left.to_read == 0 || Instant::now() >= deadline {
            return Ok(left);
        }
        std::thread::sleep(PAUSE);
    }
}

pub(super) fn lock(tables: &Mutex<Tables>) -> std::sync::MutexGuard<'_, Tables> {
    // The tables are whole whatever their holder was doing when it panicked.
    tables.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Waits until one of the descriptors is readable; says whether the first is.
fn wait(fds: &[BorrowedFd<'_>], timeout: Option<Duration>) -> Result<bool> {
    let mut polled: Vec<_> = fds.iter().map(|fd| PollFd::new(*fd, PollFlags::POLLIN)).collect();
    let timeout = timeout
        .map_or(PollTimeout::NONE, |t| PollTimeout::try_from(t.as_millis()).unwrap_or(PollTimeout::MAX));
    match poll(&mut polled, timeout) {
        Ok(_) | Err(Errno::EINTR) => Ok(polled[0].any() == Some(true)),
        Err(e) => Err(e.into()),
    }
}
