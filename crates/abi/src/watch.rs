//! watch: what the kernel programs note down about sockets, and what they hand
//! to the user side. Times are nanoseconds of the boot clock
//! (`CLOCK_BOOTTIME`), ports in host byte order, addresses in network byte order.

/// An IPv6 address, or an IPv4 address mapped into one (`::ffff:a.b.c.d`).
pub type Address = [u8; 16];

/// How many bytes the kernel keeps of a process' name, the last one a NUL.
pub const COMM: usize = 16;

/// What a record of the ring buffer is: its first four bytes.
pub mod event {
    /// [`super::Connection`]: a connection has ended.
    pub const CLOSED: u32 = 1;
    /// [`super::Connection`]: a connection that is alive, as an iterator saw it.
    pub const LIVE: u32 = 2;
    /// [`super::Process`]: a process that uses a socket for the first time.
    pub const PROCESS: u32 = 3;
    /// [`super::Answer`]: what a process received from port 53.
    pub const ANSWER: u32 = 4;
    /// [`super::Released`]: a socket with several peers was closed.
    pub const RELEASED: u32 = 5;
}

/// How well the owner of a socket is known, from worst to best.
pub mod quality {
    /// Nobody is known to own it.
    pub const NONE: u32 = 0;
    /// Inherited from the listening socket; whoever uses the connection first owns it.
    pub const LISTENER: u32 = 1;
    /// Found in a process' table of open files when the watch began.
    pub const SEEDED: u32 = 2;
    /// Seen at work in the kernel: it connected, read, wrote or closed.
    pub const SEEN: u32 = 3;
}

/// Who opened a connection.
pub mod direction {
    /// Not known: the connection is older than the watch.
    pub const UNKNOWN: u8 = 0;
    /// This host's process.
    pub const OUTBOUND: u8 = 1;
    /// The other side.
    pub const INBOUND: u8 = 2;
    /// Neither: this host passes it on.
    pub const FORWARDED: u8 = 3;
}

/// `Socket::flags` and `Connection::flags`.
pub mod flag {
    /// The socket listens: it is no connection.
    pub const LISTENING: u8 = 1;
    /// The owner is the kernel itself.
    pub const KERNEL: u8 = 2;
    /// The end of the connection has been reported.
    pub const REPORTED: u8 = 4;
    /// The end was not seen: the totals are those last read. The user side sets it.
    pub const UNSEEN: u8 = 8;
}

/// The process that a socket belongs to, as of when it became known.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Owner {
    /// The number of its cgroup in the unified hierarchy.
    pub cgroup: u64,
    /// Process (thread group), 0 for none.
    pub tgid: u32,
    /// User, in the initial user namespace.
    pub uid: u32,
    /// Name, NUL-terminated.
    pub comm: [u8; COMM],
    /// One of [`quality`].
    pub quality: u32,
    /// 1 if it is a thread of the kernel.
    pub kernel: u32,
}

/// What is kept with every TCP socket.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct Socket {
    /// The kernel's number for the socket (`SO_COOKIE`).
    pub cookie: u64,
    /// When the connection began, 0 if before the watch.
    pub started: u64,
    /// Bytes as last reported by the iterator, `u64::MAX` if never.
    pub reported_rx: u64,
    /// The same for bytes sent.
    pub reported_tx: u64,
    /// Whose it is.
    pub owner: Owner,
    /// Who opened it, one of [`direction`].
    pub direction: u8,
    /// Of [`flag`].
    pub flags: u8,
    /// Zero.
    pub padding: [u8; 2],
    /// The inode number of the network namespace.
    pub netns: u32,
}

/// One use of a datagram socket: this process with that peer.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct FlowKey {
    /// The kernel's number for the socket.
    pub cookie: u64,
    /// The peer, all zero where it is not known.
    pub remote: Address,
    /// The process.
    pub tgid: u32,
    /// The peer's port.
    pub remote_port: u16,
    /// Zero.
    pub padding: u16,
}

/// What is counted for each [`FlowKey`].
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct Flow {
    /// First use.
    pub started: u64,
    /// Last use.
    pub seen: u64,
    /// Payload bytes received.
    pub rx_bytes: u64,
    /// Payload bytes sent.
    pub tx_bytes: u64,
    /// As last reported, `u64::MAX` if never.
    pub reported_rx: u64,
    /// As last reported.
    pub reported_tx: u64,
    /// The socket's own address, all zero for any.
    pub local: Address,
    /// Who used it.
    pub owner: Owner,
    /// The socket's own port.
    pub local_port: u16,
    /// As in [`Connection`].
    pub protocol: u16,
    /// Who spoke first, one of [`direction`].
    pub direction: u8,
    /// Zero.
    pub padding: [u8; 3],
    /// The inode number of the network namespace.
    pub netns: u32,
    /// Zero.
    pub padding2: u32,
}

/// What is kept with every datagram socket.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct Datagrams {
    /// The last new peer.
    pub last: FlowKey,
    /// How many flows the socket has had.
    pub flows: u64,
}

/// A connection or datagram flow: a report of the ring buffer or of an iterator.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Connection {
    /// One of [`event`].
    pub kind: u32,
    /// The inode number of the network namespace.
    pub netns: u32,
    /// The kernel's number for the socket.
    pub cookie: u64,
    /// When it began, 0 if before the watch.
    pub started: u64,
    /// When this was read, for a flow when it was last used.
    pub at: u64,
    /// Payload bytes received since it began.
    pub rx_bytes: u64,
    /// Payload bytes sent since it began, without retransmissions.
    pub tx_bytes: u64,
    /// This side, all zero for any.
    pub local: Address,
    /// The other side, all zero where not known.
    pub remote: Address,
    /// This side's port.
    pub local_port: u16,
    /// The other side's port.
    pub remote_port: u16,
    /// IP protocol number; [`PACKET`] for frames.
    pub protocol: u16,
    /// One of [`direction`].
    pub direction: u8,
    /// Of [`flag`].
    pub flags: u8,
    /// Smoothed round-trip time, microseconds, 0 if not known.
    pub rtt_us: u32,
    /// Segments sent again.
    pub retransmits: u32,
    /// Whose it is.
    pub owner: Owner,
}

/// The protocol of an AF_PACKET socket; IP protocol numbers end at 262.
pub const PACKET: u16 = 0xffff;

/// How many names of a path are kept, counted from its end.
pub const DEPTH: usize = 16;
/// How many bytes of a name are kept, the last one a NUL; a container's scope takes 90.
pub const NAME: usize = 128;

/// The names of a path, each NUL-terminated, the last part first. Empty ones do not count.
pub type Path = [[u8; NAME]; DEPTH];

/// A process that uses a socket for the first time since it started its program.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct Process {
    /// [`event::PROCESS`]
    pub kind: u32,
    /// Process (thread group).
    pub tgid: u32,
    /// When it was seen.
    pub at: u64,
    /// Its cgroup's number in the unified hierarchy.
    pub cgroup: u64,
    /// The program's path.
    pub exe: Path,
    /// The cgroup's path.
    pub cgroup_path: Path,
}

/// A flow through an interface: who is beyond the interface, who is on this side.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Passage {
    /// Source of what comes in by the interface.
    pub beyond: Address,
    /// Source of what goes out by it.
    pub behind: Address,
    /// The port beyond, 0 where there is none.
    pub beyond_port: u16,
    /// The port behind.
    pub behind_port: u16,
    /// IP protocol number.
    pub protocol: u8,
    /// Zero.
    pub padding: [u8; 3],
}

/// What is counted for each [`Passage`], on each CPU.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct Passed {
    /// First packet.
    pub started: u64,
    /// Last packet.
    pub seen: u64,
    /// Payload bytes that came in by the interface.
    pub in_bytes: u64,
    /// Payload bytes that went out by it.
    pub out_bytes: u64,
    /// 1 if a socket of this host has sent some of it.
    pub own: u64,
}

/// One packet, for those who want them one by one.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct PacketNote {
    /// When.
    pub at: u64,
    /// Its flow.
    pub passage: Passage,
    /// Bytes of payload.
    pub payload: u32,
    /// 1 if it went out by the interface, 0 if it came in.
    pub out: u32,
}

/// Indices of the gateway's per-CPU counters.
pub mod passing {
    /// Flows that were entered.
    pub const ENTERED: u32 = 0;
    /// Packets that were not told one by one: too many, or the ring was full.
    pub const UNTOLD: u32 = 1;
    /// Packets told in the second that began at [`SINCE`].
    pub const TOLD: u32 = 2;
    /// When the present second began.
    pub const SINCE: u32 = 3;
    /// How many there are.
    pub const COUNT: u32 = 4;
    /// How many packets a second each CPU tells of.
    pub const A_SECOND: u64 = 10_000;
}

/// The longest message from port 53 that is handed on.
pub const ANSWER: usize = 4096;

/// What a process received from port 53.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct Answer {
    /// [`event::ANSWER`]
    pub kind: u32,
    /// How many of `bytes` are used.
    pub len: u32,
    /// The kernel's number for the socket.
    pub cookie: u64,
    /// When it was received.
    pub at: u64,
    /// 6 for TCP (a piece of the stream), 17 for UDP (a message).
    pub protocol: u32,
    /// How many bytes were received; more than `len` if it was cut.
    pub received: u32,
    /// The message or the piece of the stream.
    pub bytes: [u8; ANSWER],
}

/// A datagram socket with several peers was closed.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct Released {
    /// [`event::RELEASED`]
    pub kind: u32,
    /// Zero.
    pub padding: u32,
    /// The kernel's number for the socket.
    pub cookie: u64,
    /// When.
    pub at: u64,
}

/// The peer that the current thread named in the system call that it is in.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct Peer {
    /// Its address.
    pub address: Address,
    /// Its port.
    pub port: u16,
    /// 1 until the call's end has made use of it.
    pub valid: u16,
    /// Zero.
    pub padding: u32,
}

/// The state change that a CPU last began to look at.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct StateChange {
    /// The socket's address in the kernel.
    pub sk: u64,
    /// The state that it entered, as in the kernel's `tcp_states.h`.
    pub new: i32,
    /// 1 while it is being looked at.
    pub busy: u32,
}

/// Indices of the per-CPU counters of what was missed.
pub mod lost {
    /// Ends of connections that found the ring buffer full.
    pub const ENDS: u32 = 0;
    /// Datagram flows that found their map full.
    pub const FLOWS: u32 = 1;
    /// Sockets for which there was no memory.
    pub const SOCKETS: u32 = 2;
    /// Descriptions of programs and answers of name servers that found the ring full.
    pub const NAMES: u32 = 3;
    /// State changes that the kernel passed over once and the second program caught: not lost.
    pub const CAUGHT: u32 = 4;
    /// How many there are.
    pub const COUNT: u32 = 5;
}

/// Indices of what the user side switches while the programs run.
pub mod control {
    /// 1: the iterators hand out what has not changed, too.
    pub const EVERYTHING: u32 = 0;
    /// How many there are.
    pub const COUNT: u32 = 1;
}

/// Which connections to report; all zero is everything.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Filter {
    /// Network that the remote address must be in.
    pub remote: Address,
    /// Its mask, all zero for any.
    pub mask: Address,
    /// Process (thread group), 0 for any.
    pub tgid: u32,
    /// Local or remote port, 0 for any.
    pub port: u16,
    /// 1 to leave out what stays on the loopback addresses.
    pub no_loopback: u16,
    /// Name of the process, all zero for any.
    pub comm: [u8; COMM],
}

/// Where the running kernel keeps what the programs read: offsets in bytes, from
/// the kernel's own description (BTF).
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct Offsets {
    /// `sock.__sk_common.skc_family`
    pub family: u32,
    /// `sock.__sk_common.skc_daddr`
    pub daddr: u32,
    /// `sock.__sk_common.skc_rcv_saddr`
    pub saddr: u32,
    /// `sock.__sk_common.skc_v6_daddr`
    pub v6_daddr: u32,
    /// `sock.__sk_common.skc_v6_rcv_saddr`
    pub v6_saddr: u32,
    /// `sock.__sk_common.skc_dport`
    pub dport: u32,
    /// `sock.__sk_common.skc_num`
    pub num: u32,
    /// `sock.__sk_common.skc_state`
    pub state: u32,
    /// `sock.__sk_common.skc_net.net`
    pub net: u32,
    /// `net.ns.inum`
    pub inum: u32,
    /// `sock.sk_protocol`
    pub protocol: u32,
    /// `sock.sk_lock.owned`
    pub owned: u32,
    /// `sock.__sk_common.skc_flags`
    pub flags: u32,
    /// `inet_sock.inet_sport`
    pub sport: u32,
    /// `tcp_sock.bytes_sent`
    pub bytes_sent: u32,
    /// `tcp_sock.bytes_retrans`
    pub bytes_retrans: u32,
    /// `tcp_sock.bytes_received`
    pub bytes_received: u32,
    /// `tcp_sock.srtt_us`
    pub srtt: u32,
    /// `tcp_sock.total_retrans`
    pub total_retrans: u32,
    /// `task_struct.flags`
    pub task_flags: u32,
    /// `task_struct.tgid`
    pub task_tgid: u32,
    /// `task_struct.comm`
    pub task_comm: u32,
    /// `task_struct.self_exec_id`
    pub exec_id: u32,
    /// `task_struct.start_boottime`
    pub start_time: u32,
    /// `task_struct.group_leader`
    pub leader: u32,
    /// `task_struct.mm`
    pub mm: u32,
    /// `task_struct.cred`
    pub cred: u32,
    /// `cred.uid`
    pub uid: u32,
    /// `task_struct.cgroups`
    pub cgroups: u32,
    /// `css_set.dfl_cgrp`
    pub dfl_cgrp: u32,
    /// `cgroup.kn`
    pub kn: u32,
    /// `kernfs_node.__parent`, before 6.15 `parent`
    pub kn_parent: u32,
    /// `kernfs_node.name`
    pub kn_name: u32,
    /// `kernfs_node.id`
    pub kn_id: u32,
    /// `mm_struct.exe_file`
    pub exe_file: u32,
    /// `file.f_path.dentry`
    pub dentry: u32,
    /// `file.f_path.mnt`
    pub mnt: u32,
    /// `dentry.d_name.name`
    pub d_name: u32,
    /// `dentry.d_parent`
    pub d_parent: u32,
    /// `vfsmount.mnt_root`
    pub mnt_root: u32,
    /// `mount.mnt`
    pub mount_mnt: u32,
    /// `mount.mnt_parent`
    pub mnt_parent: u32,
    /// `mount.mnt_mountpoint`
    pub mnt_mountpoint: u32,
    /// `socket.sk`
    pub socket_sk: u32,
    /// `pt_regs`: the system call's number
    pub regs_call: u32,
    /// `pt_regs`: its second argument
    pub regs_second: u32,
    /// `pt_regs`: its fifth argument
    pub regs_fifth: u32,
}

/// The numbers of the system calls whose arguments are read, on this machine's
/// architecture.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct Calls {
    /// `read(2)`
    pub read: u32,
    /// `readv(2)`
    pub readv: u32,
    /// `recvfrom(2)`
    pub recvfrom: u32,
    /// `recvmsg(2)`
    pub recvmsg: u32,
    /// `recvmmsg(2)`
    pub recvmmsg: u32,
    /// `sendto(2)`
    pub sendto: u32,
    /// `sendmsg(2)`
    pub sendmsg: u32,
    /// Zero.
    pub padding: u32,
}

crate::pod!(
    Owner = 40,
    Socket = 80,
    FlowKey = 32,
    Flow = 120,
    Datagrams = 40,
    Connection = 136,
    Passage = 40,
    Passed = 40,
    PacketNote = 56,
    Process = 4120,
    Answer = 4128,
    Released = 24,
    Peer = 24,
    Filter = 56,
    Offsets = 188,
    Calls = 32,
);
