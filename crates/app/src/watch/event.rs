//! What the kernel side reports, decoded.

use std::{ptr, time::Duration};

use underpass_abi::watch::{ANSWER, Address, Connection, FlowKey, Path, Process, Released, event};

/// Something that happened to the watched sockets.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// A connection has ended; these are its last figures.
    Ended(Connection),
    /// A connection is alive, or was when it was looked at.
    Alive(Connection),
    /// A process uses the network for the first time.
    Process(Program),
    /// A name server's answer, or a piece of a TCP stream of them.
    Answer(Answer),
    /// A reverse look-up has found a name.
    Name {
        /// What was looked up.
        address: Address,
        /// What was found.
        name: String,
        /// For how long that counts.
        lives: Duration,
    },
    /// A datagram socket is closed: all its flows have ended.
    Released {
        /// The kernel's number for the socket.
        cookie: u64,
    },
    /// All flows of the kernel have been reported as alive: what is idle or belongs
    /// to a released socket has ended.
    FlowsRead,
    /// After losses, every connection was reported as alive: the others have ended
    /// unseen.
    Swept,
    /// What the kernel side has missed since the start.
    Lost(Missed),
}

/// What was missed since the start, as far as the kernel side knows.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Missed {
    /// Ends of connections that found the ring buffer full.
    pub events: u64,
    /// Descriptions of programs and answers of name servers that found it full.
    pub names: u64,
    /// State changes that the kernel did not hand over.
    pub changes: u64,
    /// Datagrams whose flow found the map full.
    pub flows: u64,
    /// Sockets for which there was no memory.
    pub sockets: u64,
    /// Forwarded flows that made room for others before they were read.
    pub passages: u64,
    /// Packets that were not told one by one, though that was asked for.
    pub packets: u64,
}

/// Which program a process runs, and where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Program {
    /// Process (thread group).
    pub pid: u32,
    /// The program's path, empty where there is none (threads of the kernel).
    pub exe: String,
    /// The cgroup's number.
    pub cgroup: u64,
    /// The cgroup's path in the unified hierarchy.
    pub cgroup_path: String,
}

/// What a process received from port 53.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// The kernel's number for the socket.
    pub cookie: u64,
    /// Whether it is a piece of a TCP stream.
    pub stream: bool,
    /// How many bytes were received; more than there are in `bytes` if it was cut.
    pub received: u32,
    /// The bytes.
    pub bytes: Vec<u8>,
}

impl Event {
    /// Decodes a record of the ring buffer; `None` if it is cut short or unknown.
    pub fn decode(record: &[u8]) -> Option<Self> {
        let kind = u32::from_ne_bytes(*record.first_chunk()?);
        Some(match kind {
            event::CLOSED => Self::Ended(read(record)?),
            event::LIVE => Self::Alive(read(record)?),
            event::PROCESS => {
                let process: Process = read(record)?;
                Self::Process(Program {
                    pid: process.tgid,
                    exe: path(&process.exe),
                    cgroup: process.cgroup,
                    cgroup_path: path(&process.cgroup_path),
                })
            }
            event::ANSWER => {
                let answer: underpass_abi::watch::Answer = read(record)?;
                Self::Answer(Answer {
                    cookie: answer.cookie,
                    stream: answer.protocol == 6,
                    received: answer.received,
                    bytes: answer.bytes[..ANSWER.min(answer.len as usize)].to_vec(),
                })
            }
            event::RELEASED => Self::Released { cookie: read::<Released>(record)?.cookie },
            _ => return None,
        })
    }
}

/// What both sides share has every bit pattern as a value ([`aya::Pod`]).
pub(super) fn read<T: aya::Pod>(record: &[u8]) -> Option<T> {
    // SAFETY: there are enough bytes, any bytes are a value of a `Pod`, and the read
    // does not ask for alignment.
    (record.len() >= size_of::<T>()).then(|| unsafe { ptr::read_unaligned(record.as_ptr().cast()) })
}

/// The kernel side leaves the parts of a path last first, each with a NUL.
fn path(parts: &Path) -> String {
    let mut path = String::new();
    for part in parts.iter().rev() {
        let end = part.iter().position(|byte| *byte == 0).unwrap_or(part.len());
        if end > 0 {
            path.push('/');
            path.push_str(&String::from_utf8_lossy(&part[..end]));
        }
    }
    path
}

/// What a connection is known by: the socket, and for datagrams the process and peer.
pub(super) fn key(report: &Connection) -> FlowKey {
    let tcp = report.protocol == 6;
    FlowKey {
        cookie: report.cookie,
        remote: if tcp { [0; 16] } else { report.remote },
        tgid: if tcp { 0 } else { report.owner.tgid },
        remote_port: if tcp { 0 } else { report.remote_port },
        padding: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Any bytes are a record, wherever it lies; one that is cut short is none.
    #[test]
    fn records_are_decoded_where_they_lie() {
        let kinds = [
            (event::CLOSED, size_of::<Connection>()),
            (event::LIVE, size_of::<Connection>()),
            (event::PROCESS, size_of::<Process>()),
            (event::ANSWER, size_of::<underpass_abi::watch::Answer>()),
            (event::RELEASED, size_of::<Released>()),
        ];
        for (kind, length) in kinds {
            for shift in 0..8 {
                let mut memory = vec![0xa5; shift + length];
                memory[shift..shift + 4].copy_from_slice(&kind.to_ne_bytes());
                let record = &memory[shift..];
                assert!(Event::decode(record).is_some(), "kind {kind}, shifted by {shift}");
                assert_eq!(Event::decode(&record[..length - 1]), None, "kind {kind}");
            }
        }
        assert_eq!(Event::decode(&[0xff; 4000]), None);
        assert_eq!(Event::decode(&[1]), None);
    }
}
