//! Proves at start, by doing it, that the kernel path is sound on this kernel: a few
//! connections over loopback, both families, through the worker that will carry the
//! real ones. What is proven is the behaviour, not a version.

use std::{
    fmt,
    io::{ErrorKind, Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, TcpListener, TcpStream},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use underpass_logic::relay::Path;

use super::{
    Choice, End,
    worker::{Job, Report, Worker},
};

/// A guard against hanging, far above what a probe takes.
const PATIENCE: Duration = Duration::from_secs(5);
const EARLY: &[u8] = b"sent before the kernel path took over";
const ROUNDS: u8 = 32;
const BULK: usize = 512 << 10;
const ANSWER: usize = 100_003;
/// A reader that stops must have stopped the sender by then, the probe's own
/// sockets' buffers included.
const STOPPED_BY: usize = 48 << 20;

/// What was proven.
#[derive(Debug)]
pub struct Proof {
    families: Vec<&'static str>,
    stopped_after: usize,
    took: Duration,
}

impl fmt::Display for Proof {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "proven over {} in {} ms: order, early bytes, half-close, tail, byte counts, changes of path; a stopped reader stopped its \
             sender after {} KiB",
            self.families.join(" and "),
            self.took.as_millis(),
            self.stopped_after >> 10
        )
    }
}

/// Runs the probe on a worker that has the kernel path.
///
/// # Errors
/// What was wrong.
pub fn run(worker: &Worker) -> Result<Proof> {
    let begun = Instant::now();
    exchange(worker, Ipv4Addr::LOCALHOST.into()).context("over IPv4")?;
    let mut families = vec!["IPv4"];
    // A host without IPv6 has no such address; then no connection will use it either.
    if TcpListener::bind((Ipv6Addr::LOCALHOST, 0)).is_ok() {
        exchange(worker, Ipv6Addr::LOCALHOST.into()).context("over IPv6")?;
        families.push("IPv6");
    }
    switches(worker).context("with changes of path in the middle of a stream")?;
    let stopped_after = stopped_reader(worker).context("with a reader that stops")?;
    Ok(Proof { families, stopped_after, took: begun.elapsed() })
}

/// Early bytes, small exchanges, bulk, half-close, the tail, and the counts.
fn exchange(worker: &Worker, address: IpAddr) -> Result<()> {
    let (mut client, client_side) = connection(address)?;
    let (mut target, target_side) = connection(address)?;
    client.write_all(EARLY)?;
    let report = join(worker, Choice::Kernel, client_side, target_side);
    expect(&mut target, EARLY).context("early bytes")?;
    for round in 0..ROUNDS {
        let sent = [round; 64];
        client.write_all(&sent)?;
        expect(&mut target, &sent).context("a small exchange")?;
        target.write_all(&sent)?;
        expect(&mut client, &sent).context("a small exchange")?;
    }
    let bulk = pattern(BULK);
    thread::scope(|scope| -> Result<()> {
        let sender = scope.spawn(|| {
            for chunk in bulk.chunks(10_007) {
                client.write_all(chunk)?;
            }
            client.shutdown(Shutdown::Write)
        });
        expect(&mut target, &bulk).context("order of many bytes")?;
        expect_end(&mut target).context("half-close")?;
        sender.join().map_err(|_| anyhow::anyhow!("the sender panicked"))??;
        Ok(())
    })?;
    let answer = pattern(ANSWER);
    target.write_all(&answer).context("answer after half-close")?;
    drop(target);
    expect(&mut client, &answer).context("tail after close")?;
    expect_end(&mut client).context("end after the tail")?;
    let report = report.recv_timeout(PATIENCE).context("the connection did not end")?;
    let exchanged = 64 * usize::from(ROUNDS);
    check(&report, [EARLY.len() + exchanged + BULK, exchanged + ANSWER])
}

fn check(report: &Report, expected: [usize; 2]) -> Result<()> {
    ensure!(matches!(report.end, End::Closed), "it ended with {:?}", report.end);
    ensure!(report.path == Path::Kernel, "the kernel path was not taken: {}", report.why);
    for (bytes, expected) in report.bytes.iter().zip(expected) {
        ensure!(bytes.total() == expected as u64, "{bytes:?} were counted where {expected} were sent");
        ensure!(bytes.kernel > 0, "the kernel moved nothing");
    }
    Ok(())
}

/// The kernel path takes over while bytes flow: a segment of which the user side has
/// read a part must not be delivered from its start.
fn switches(worker: &Worker) -> Result<()> {
    let (mut client, client_side) = connection(Ipv4Addr::LOCALHOST.into())?;
    let (mut target, target_side) = connection(Ipv4Addr::LOCALHOST.into())?;
    let bulk = pattern(4 * BULK);
    let choice = Choice::Auto { kernel: true, switch_every: Some(100_000) };
    let report = join(worker, choice, client_side, target_side);
    thread::scope(|scope| -> Result<()> {
        let sender = scope.spawn(|| client.write_all(&bulk).and_then(|()| client.shutdown(Shutdown::Write)));
        expect(&mut target, &bulk)?;
        expect_end(&mut target)?;
        sender.join().map_err(|_| anyhow::anyhow!("the sender panicked"))??;
        Ok(())
    })?;
    drop((client, target));
    let report = report.recv_timeout(PATIENCE).context("the connection did not end")?;
    ensure!(matches!(report.end, End::Closed), "it ended with {:?}", report.end);
    ensure!(report.bytes[0].total() == bulk.len() as u64, "{:?} were counted", report.bytes[0]);
    Ok(())
}

/// A reader that stops has to stop the sender; nothing is lost when it goes on.
fn stopped_reader(worker: &Worker) -> Result<usize> {
    let (mut client, client_side) = connection(Ipv4Addr::LOCALHOST.into())?;
    let (mut target, target_side) = connection(Ipv4Addr::LOCALHOST.into())?;
    let report = join(worker, Choice::Kernel, client_side, target_side);
    // Until the kernel path has it.
    client.write_all(EARLY)?;
    expect(&mut target, EARLY)?;
    client.set_nonblocking(true)?;
    let chunk = pattern(256 << 10);
    let (mut sent, mut quiet) = (0, Instant::now());
    while quiet.elapsed() < Duration::from_millis(15) {
        match client.write(&chunk[sent % chunk.len()..]) {
            Ok(count) => {
                sent += count;
                quiet = Instant::now();
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => thread::sleep(Duration::from_millis(1)),
            Err(error) => return Err(error.into()),
        }
        if sent > STOPPED_BY {
            bail!("the sender was not stopped after {} MiB", sent >> 20);
        }
    }
    client.shutdown(Shutdown::Write)?;
    let mut got = vec![0; chunk.len()];
    for at in (0..sent).step_by(chunk.len()) {
        let len = chunk.len().min(sent - at);
        target.read_exact(&mut got[..len])?;
        ensure!(got[..len] == chunk[..len], "bytes changed after {at}");
    }
    expect_end(&mut target)?;
    drop((client, target));
    report.recv_timeout(PATIENCE).context("the connection did not end")?;
    Ok(sent)
}

/// A connection over loopback: the probe's end, and the one for the worker.
fn connection(address: IpAddr) -> Result<(TcpStream, TcpStream)> {
    let listener = TcpListener::bind((address, 0)).context("cannot use the loopback interface; is it up?")?;
    let ours = TcpStream::connect_timeout(&listener.local_addr()?, PATIENCE)?;
    let (theirs, _) = listener.accept()?;
    ours.set_read_timeout(Some(PATIENCE))?;
    ours.set_write_timeout(Some(PATIENCE))?;
    ours.set_nodelay(true)?;
    Ok((ours, prepare(theirs)?))
}

/// Makes a socket ready for a worker.
fn prepare(stream: TcpStream) -> std::io::Result<TcpStream> {
    stream.set_nonblocking(true)?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

fn join(worker: &Worker, choice: Choice, client: TcpStream, target: TcpStream) -> mpsc::Receiver<Report> {
    let (tell, report) = mpsc::channel();
    worker.carry(Job {
        client,
        target,
        connecting: None,
        early: vec![],
        choice,
        idle: PATIENCE,
        // Nobody waits any more if the probe has failed.
        done: Box::new(move |report| drop(tell.send(report))),
    });
    report
}

fn expect(from: &mut TcpStream, bytes: &[u8]) -> Result<()> {
    let mut got = vec![0; bytes.len()];
    from.read_exact(&mut got)?;
    ensure!(got == bytes, "other bytes came than were sent");
    Ok(())
}

fn expect_end(from: &mut TcpStream) -> Result<()> {
    ensure!(from.read(&mut [0])? == 0, "bytes came that were not sent");
    Ok(())
}

/// Bytes in which a shifted, lost or repeated part shows.
pub fn pattern(len: usize) -> Vec<u8> {
    (0..len as u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect()
}
