//! Loads and attaches the kernel programs, and reads what they hand out.

use std::{
    fs::{self, File},
    io::{self, Read as _},
    os::fd::{AsFd, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd},
    path::PathBuf,
};

use anyhow::{Context as _, Result, anyhow};
use aya::{
    Btf, Ebpf, EbpfLoader,
    maps::{Array, HashMap, MapData, PerCpuArray, RingBuf},
    programs::{BtfTracePoint, CgroupAttachMode, CgroupSock, CgroupSockAddr, Iter, Program, ProgramError},
};
use underpass_abi::watch::{Calls, Connection, Filter, Flow, FlowKey, Offsets, control, lost};

use super::event::Missed;
use crate::{btf, object};

/// The programs at work. Dropping it detaches them.
pub struct Programs {
    /// Where the programs leave their records.
    pub events: RingBuf<MapData>,
    flows: HashMap<MapData, FlowKey, Flow>,
    lost: PerCpuArray<MapData, u64>,
    controls: Array<MapData, u32>,
    live_tcp: Iterator,
    live_flows: Iterator,
    seed_files: Iterator,
    seed_tcp: Iterator,
    state_program: OwnedFd,
    /// What could not be attached here, and what is lost by it.
    pub missing: Vec<String>,
    _object: Ebpf,
}

impl Programs {
    /// Loads everything and attaches it.
    ///
    /// # Errors
    /// Where the kernel or the privileges do not allow it; the message says which.
    pub fn attach(filter: &Filter) -> Result<Self> {
        let (offsets, calls) = (offsets()?, calls());
        let mut object = EbpfLoader::new()
            .override_global("OFFSETS", &offsets, true)
            .override_global("CALLS", &calls, true)
            .override_global("FILTER", filter, true)
            .map_max_entries("EVENTS", ring_size())
            .load(object::WATCH)
            .map_err(object::root)
            .context("the kernel refuses watch's maps (it takes CAP_BPF and CAP_PERFMON)")?;
        let kernel =
            Btf::from_sys_fs().context("the kernel does not describe its types (CONFIG_DEBUG_INFO_BTF)")?;
        let mut missing = vec![];

        let state_program = tracepoint(&mut object, "watch_state", "inet_sock_set_state", &kernel)?;
        tracepoint(&mut object, "watch_state2", "inet_sock_set_state", &kernel)?;
        for (name, point) in [("watch_send", "sock_send_length"), ("watch_receive", "sock_recv_length")] {
            if let Err(error) = tracepoint(&mut object, name, point, &kernel) {
                missing.push(format!("{point} (Linux 6.3): UDP, raw packets and frames are not counted, and an accepted connection keeps its listener's name until it is closed ({error:#})"));
            }
        }
        if let Err(error) = cgroup_programs(&mut object) {
            missing.push(format!(
                "cgroup hooks: UDP flows without a connected peer show no remote address, and end only by idleness ({error:#})"
            ));
        }

        let sockets = map_fd(&object, "SOCKETS")?;
        let live_tcp = iterator(&mut object, "watch_tcp", "bpf_sk_storage_map", Some(&sockets), &kernel)?;
        let flows_fd = map_fd(&object, "FLOWS")?;
        let live_flows = iterator(&mut object, "watch_flows", "bpf_map_elem", Some(&flows_fd), &kernel)?;
        let seed_files = iterator(&mut object, "watch_seed", "task_file", None, &kernel)?;
        let seed_tcp = iterator(&mut object, "watch_seed_tcp", "tcp", None, &kernel)?;

        let mut take = |name| object.take_map(name).with_context(|| format!("the object has no map {name}"));
        Ok(Self {
            events: RingBuf::try_from(take("EVENTS")?)?,
            flows: HashMap::try_from(take("FLOWS")?)?,
            lost: PerCpuArray::try_from(take("LOST")?)?,
            controls: Array::try_from(take("CONTROLS")?)?,
            live_tcp,
            live_flows,
            seed_files,
            seed_tcp,
            state_program,
            missing,
            _object: object,
        })
    }

    /// Notes which process has which socket open. Sees all processes that are alive.
    ///
    /// # Errors
    /// Where the iterator fails.
    pub fn seed_files(&self) -> Result<()> {
        self.seed_files.read().context("cannot look through the open files")?;
        Ok(())
    }

    /// Notes the TCP sockets of the current thread's network namespace.
    ///
    /// # Errors
    /// Where the iterator fails.
    pub fn seed_tcp(&self) -> Result<()> {
        self.seed_tcp.read().context("cannot look through the TCP sockets")?;
        Ok(())
    }

    /// The TCP connections that have changed since they were last handed out; all of
    /// them if `everything`.
    ///
    /// # Errors
    /// Where the iterator fails.
    pub fn tcp(&mut self, everything: bool) -> Result<Vec<Connection>> {
        self.controls.set(control::EVERYTHING, u32::from(everything), 0)?;
        let records = self.live_tcp.read().context("cannot read the TCP connections")?;
        Ok(connections(&records))
    }

    /// The same for datagram flows.
    ///
    /// # Errors
    /// Where the iterator fails.
    pub fn flows(&mut self, everything: bool) -> Result<Vec<Connection>> {
        self.controls.set(control::EVERYTHING, u32::from(everything), 0)?;
        let records = self.live_flows.read().context("cannot read the datagram flows")?;
        Ok(connections(&records))
    }

    /// Frees the entry of a flow that has ended.
    pub fn forget(&mut self, flow: &FlowKey) {
        // It may be gone already, which is as well.
        let _ = self.flows.remove(flow);
    }

    /// What was missed since the start.
    ///
    /// # Errors
    /// Where the map cannot be read.
    pub fn missed(&self) -> Result<Missed> {
        let count = |index: u32| -> Result<u64> {
            Ok(self.lost.get(&index, 0).context("cannot read the losses")?.iter().sum())
        };
        Ok(Missed {
            events: count(lost::ENDS)?,
            names: count(lost::NAMES)?,
            changes: runs_missed(self.state_program.as_fd()).saturating_sub(count(lost::CAUGHT)?),
            flows: count(lost::FLOWS)?,
            sockets: count(lost::SOCKETS)?,
            passages: 0,
            packets: 0,
        })
    }
}

/// How many bytes the ring of events has: the more CPUs, the more ends a second. A
/// power of two, as the kernel asks for.
fn ring_size() -> u32 {
    const A_CPU: usize = 2 << 20;
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    (A_CPU * cpus.clamp(2, 16)).next_power_of_two() as u32
}

/// How often the kernel did not run a program because the CPU was in the middle of
/// running it: a state change in softirq may interrupt another's program. The kernel
/// tells since 5.12; before, it does not count.
fn runs_missed(program: BorrowedFd<'_>) -> u64 {
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", program.as_raw_fd())).unwrap_or_default();
    let misses = info.lines().find_map(|line| line.strip_prefix("recursion_misses:"));
    misses.and_then(|misses| misses.trim().parse().ok()).unwrap_or(0)
}

fn tracepoint(object: &mut Ebpf, name: &str, point: &str, kernel: &Btf) -> Result<OwnedFd> {
    let program: &mut BtfTracePoint = program(object, name)?;
    program
        .load(point, kernel)
        .map_err(object::refusal)
        .with_context(|| format!("the kernel refuses {name} (it takes CAP_BPF and CAP_PERFMON)"))?;
    program.attach().with_context(|| format!("cannot attach {name} to {point}"))?;
    Ok(program.fd()?.as_fd().try_clone_to_owned()?)
}

fn cgroup_programs(object: &mut Ebpf) -> Result<()> {
    let root = File::open(cgroup_root()?).context("cannot open the root of the cgroups")?;
    // An attachment by link leaves room for others without being asked to.
    for name in ["watch_sendmsg4", "watch_sendmsg6", "watch_recvmsg4", "watch_recvmsg6"] {
        let program: &mut CgroupSockAddr = program(object, name)?;
        program.load().map_err(object::refusal).with_context(|| format!("the kernel refuses {name}"))?;
        program.attach(&root, CgroupAttachMode::Single).with_context(|| format!("cannot attach {name}"))?;
    }
    let program: &mut CgroupSock = program(object, "watch_release")?;
    program.load().map_err(object::refusal).context("the kernel refuses watch_release")?;
    program.attach(&root, CgroupAttachMode::Single).context("cannot attach watch_release")?;
    Ok(())
}

/// Where the unified hierarchy is mounted.
///
/// # Errors
/// Where it is not.
pub fn cgroup_root() -> Result<PathBuf> {
    let mounts = std::fs::read_to_string("/proc/self/mounts").context("cannot read the mount table")?;
    let mount = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
    mount
        .filter(|fields| fields.get(2) == Some(&"cgroup2"))
        .find_map(|fields| fields.get(1).map(PathBuf::from))
        .context("no cgroup2 is mounted (mount -t cgroup2 none /sys/fs/cgroup)")
}

fn iterator(
    object: &mut Ebpf,
    name: &str,
    kind: &str,
    map: Option<&OwnedFd>,
    kernel: &Btf,
) -> Result<Iterator> {
    let program: &mut Iter = program(object, name)?;
    program
        .load(kind, kernel)
        .map_err(object::refusal)
        .with_context(|| format!("the kernel refuses {name}"))?;
    let program = program.fd()?.as_fd();
    Iterator::attach(program, map.map(AsFd::as_fd)).with_context(|| format!("cannot attach {name}"))
}

fn program<'a, T>(object: &'a mut Ebpf, name: &str) -> Result<&'a mut T>
where
    &'a mut T: TryFrom<&'a mut Program, Error = ProgramError>,
{
    let program = object.program_mut(name).ok_or_else(|| anyhow!("the object has no program {name}"))?;
    Ok(program.try_into()?)
}

#[expect(clippy::wildcard_enum_match_arm, reason = "of aya's kinds of maps iterators take two")]
fn map_fd(object: &Ebpf, name: &str) -> Result<OwnedFd> {
    let map = object.map(name).with_context(|| format!("the object has no map {name}"))?;
    let data = match map {
        aya::maps::Map::HashMap(data) | aya::maps::Map::SkStorage(data) => data,
        other => return Err(anyhow!("the map {name} is of an unexpected kind: {other:?}")),
    };
    Ok(data.fd().as_fd().try_clone_to_owned()?)
}

fn connections(records: &[u8]) -> Vec<Connection> {
    records.chunks_exact(size_of::<Connection>()).filter_map(super::event::read).collect()
}

/// An attached iterator program (bpf(2), BPF_LINK_CREATE with BPF_TRACE_ITER,
/// since Linux 5.8). aya has no way to name the map that one goes through.
#[derive(Debug)]
struct Iterator {
    link: OwnedFd,
}

impl Iterator {
    fn attach(program: BorrowedFd<'_>, map: Option<BorrowedFd<'_>>) -> io::Result<Self> {
        const LINK_CREATE: libc::c_long = 28;
        const TRACE_ITER: u32 = 28;
        let info = map.map(|map| map.as_raw_fd().cast_unsigned());
        let (pointer, len) = info.as_ref().map_or((0, 0), |info| (std::ptr::from_ref(info) as u64, 4));
        let request = LinkCreate {
            program: program.as_raw_fd().cast_unsigned(),
            target: 0,
            attach_type: TRACE_ITER,
            flags: 0,
            info: pointer,
            info_len: len,
            padding: 0,
        };
        Ok(Self { link: bpf(LINK_CREATE, &request)? })
    }

    /// Runs the program once over everything and returns what it wrote.
    fn read(&self) -> io::Result<Vec<u8>> {
        const ITER_CREATE: libc::c_long = 33;
        let request = [self.link.as_raw_fd().cast_unsigned(), 0];
        let mut records = vec![];
        File::from(bpf(ITER_CREATE, &request)?).read_to_end(&mut records)?;
        Ok(records)
    }
}

/// The part of `union bpf_attr` for BPF_LINK_CREATE.
#[repr(C)]
struct LinkCreate {
    program: u32,
    target: u32,
    attach_type: u32,
    flags: u32,
    info: u64,
    info_len: u32,
    padding: u32,
}

fn bpf<T>(command: libc::c_long, request: &T) -> io::Result<OwnedFd> {
    // SAFETY: both callers pass a request laid out as the kernel's for the command,
    // whose pointers are valid for the call.
    let fd = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_ref(request), size_of::<T>()) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: both commands return a new descriptor that is ours.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// Where this kernel keeps what the programs read.
fn offsets() -> Result<Offsets> {
    let kernel = btf::Btf::of_the_kernel()?;
    let field = |structure, path| kernel.field(structure, path);
    let common = |path: &str| kernel.field("sock", &format!("__sk_common.{path}"));
    let (call, second, fifth) = registers(&kernel)?;
    Ok(Offsets {
        family: common("skc_family")?,
        daddr: common("skc_daddr")?,
        saddr: common("skc_rcv_saddr")?,
        v6_daddr: common("skc_v6_daddr")?,
        v6_saddr: common("skc_v6_rcv_saddr")?,
        dport: common("skc_dport")?,
        num: common("skc_num")?,
        state: common("skc_state")?,
        net: common("skc_net.net")?,
        inum: field("net", "ns.inum")?,
        protocol: field("sock", "sk_protocol")?,
        owned: field("sock", "sk_lock.owned")?,
        flags: common("skc_flags")?,
        sport: field("inet_sock", "inet_sport")?,
        bytes_sent: field("tcp_sock", "bytes_sent")?,
        bytes_retrans: field("tcp_sock", "bytes_retrans")?,
        bytes_received: field("tcp_sock", "bytes_received")?,
        srtt: field("tcp_sock", "srtt_us")?,
        total_retrans: field("tcp_sock", "total_retrans")?,
        task_flags: field("task_struct", "flags")?,
        task_tgid: field("task_struct", "tgid")?,
        task_comm: field("task_struct", "comm")?,
        exec_id: field("task_struct", "self_exec_id")?,
        start_time: field("task_struct", "start_boottime")?,
        leader: field("task_struct", "group_leader")?,
        mm: field("task_struct", "mm")?,
        cred: field("task_struct", "cred")?,
        uid: field("cred", "uid")?,
        cgroups: field("task_struct", "cgroups")?,
        dfl_cgrp: field("css_set", "dfl_cgrp")?,
        kn: field("cgroup", "kn")?,
        kn_parent: field("kernfs_node", "__parent").or_else(|_| field("kernfs_node", "parent"))?,
        kn_name: field("kernfs_node", "name")?,
        kn_id: field("kernfs_node", "id")?,
        exe_file: field("mm_struct", "exe_file")?,
        dentry: field("file", "f_path.dentry")?,
        mnt: field("file", "f_path.mnt")?,
        d_name: field("dentry", "d_name.name")?,
        d_parent: field("dentry", "d_parent")?,
        mnt_root: field("vfsmount", "mnt_root")?,
        mount_mnt: field("mount", "mnt")?,
        mnt_parent: field("mount", "mnt_parent")?,
        mnt_mountpoint: field("mount", "mnt_mountpoint")?,
        socket_sk: field("socket", "sk")?,
        regs_call: call,
        regs_second: second,
        regs_fifth: fifth,
    })
}

/// Where `pt_regs` has the number, the second and the fifth argument of a system call.
#[cfg(target_arch = "x86_64")]
fn registers(kernel: &btf::Btf) -> Result<(u32, u32, u32)> {
    let field = |name| kernel.field("pt_regs", name);
    Ok((field("orig_ax")?, field("si")?, field("r8")?))
}

/// Where `pt_regs` has the number, the second and the fifth argument of a system call.
#[cfg(target_arch = "aarch64")]
fn registers(kernel: &btf::Btf) -> Result<(u32, u32, u32)> {
    let registers = kernel.field("pt_regs", "regs")?;
    Ok((kernel.field("pt_regs", "syscallno")?, registers + 8, registers + 32))
}

fn calls() -> Calls {
    Calls {
        read: libc::SYS_read as u32,
        readv: libc::SYS_readv as u32,
        recvfrom: libc::SYS_recvfrom as u32,
        recvmsg: libc::SYS_recvmsg as u32,
        recvmmsg: libc::SYS_recvmmsg as u32,
        sendto: libc::SYS_sendto as u32,
        sendmsg: libc::SYS_sendmsg as u32,
        padding: 0,
    }
}
