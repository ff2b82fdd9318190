//! Sees every program that a process and its descendants load, and what the verifier
//! spent on it.
//!
//! The kernel tells that only to the one who loads, in a log which a loader usually
//! asks for only after a failure. So the call is stopped (seccomp lets only this one
//! stop), asked for statistics, and put back as it was. Linux 5.3 and up.

use std::{
    collections::HashMap,
    io::{IoSlice, IoSliceMut},
    mem::offset_of,
    ptr,
    time::Instant,
};

use anyhow::{Context as _, Result};
use nix::{
    errno::Errno,
    sys::{
        ptrace::{self, Options},
        signal::{Signal, kill},
        uio::{RemoteIoVec, process_vm_readv, process_vm_writev},
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::Pid,
};

use crate::plan::{Load, Spent};

const BPF_PROG_LOAD: u32 = 5;
/// Statistics only, no state by state account. Linux 5.2 and up.
const BPF_LOG_STATS: u32 = 4;
const LOG: usize = 16 << 10;
/// How far below the thread's stack pointer the log goes: beyond what its frames use.
const BELOW: u64 = 64 << 10;
const PTRACE_GET_SYSCALL_INFO: libc::c_uint = 0x420e;
const PTRACE_LISTEN: libc::c_uint = 0x4208;
const PTRACE_EVENT_STOP: i32 = 128;

/// The head of the kernel's `union bpf_attr` for `BPF_PROG_LOAD` (Linux 4.15 and up).
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Attributes {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buf: u64,
    kern_version: u32,
    prog_flags: u32,
    prog_name: [u8; 16],
}

/// Stops the calling thread, and whatever it becomes, at each `bpf(BPF_PROG_LOAD)`.
///
/// # Errors
/// Where the kernel refuses: it takes CAP_SYS_ADMIN.
pub fn stop_at_loads() -> Result<()> {
    const LOAD_WORD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
    const EQUAL: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
    const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;
    let call = offset_of!(libc::seccomp_data, nr) as u32;
    // The low word comes first on the machines that the matrix knows.
    let command = offset_of!(libc::seccomp_data, args) as u32;
    let mut filter = [
        libc::sock_filter { code: LOAD_WORD, jt: 0, jf: 0, k: call },
        libc::sock_filter { code: EQUAL, jt: 0, jf: 3, k: libc::SYS_bpf as u32 },
        libc::sock_filter { code: LOAD_WORD, jt: 0, jf: 0, k: command },
        libc::sock_filter { code: EQUAL, jt: 0, jf: 1, k: BPF_PROG_LOAD },
        libc::sock_filter { code: RETURN, jt: 0, jf: 0, k: libc::SECCOMP_RET_TRACE },
        libc::sock_filter { code: RETURN, jt: 0, jf: 0, k: libc::SECCOMP_RET_ALLOW },
    ];
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
    // SAFETY: `program` and the filter that it points to outlive the call, which copies them.
    let result = unsafe {
        libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, ptr::from_ref(&program), 0, 0)
    };
    Errno::result(result).context("seccomp")?;
    Ok(())
}

/// Follows `first`, which has stopped itself and will call [`stop_at_loads`], until it
/// ends or `until` comes; tells of every program loaded. Returns its exit status, as a
/// shell has it. Signals that interrupt the wait make it look at the clock.
///
/// # Errors
/// Where the process cannot be traced.
pub fn follow(first: Pid, until: Instant, mut loaded: impl FnMut(Load)) -> Result<i32> {
    ptrace::seize(
        first,
        Options::PTRACE_O_TRACESECCOMP
            | Options::PTRACE_O_TRACESYSGOOD
            | Options::PTRACE_O_TRACEFORK
            | Options::PTRACE_O_TRACEVFORK
            | Options::PTRACE_O_TRACECLONE
            | Options::PTRACE_O_EXITKILL,
    )
    .context("cannot trace the step")?;
    kill(first, Signal::SIGCONT)?;
    let mut loading = HashMap::new();
    loop {
        let status = match waitpid(None, Some(WaitPidFlag::__WALL)) {
            Err(Errno::EINTR) => {
                if Instant::now() >= until {
                    kill(first, Signal::SIGKILL)?;
                }
                continue;
            }
            // A real-time signal, which nix has no name for.
            Err(Errno::EINVAL) => continue,
            status => status?,
        };
        match status {
            WaitStatus::Exited(pid, status) if pid == first => return Ok(status),
            WaitStatus::Signaled(pid, signal, _) if pid == first => return Ok(128 + signal as i32),
            WaitStatus::PtraceEvent(pid, _, libc::PTRACE_EVENT_SECCOMP) => {
                if let Some(call) = Call::begin(pid) {
                    loading.insert(pid, call);
                    resume(ptrace::syscall(pid, None));
                } else {
                    resume(ptrace::cont(pid, None));
                }
            }
            WaitStatus::PtraceSyscall(pid) => {
                if let Some(call) = loading.remove(&pid)
                    && let Some(load) = call.end(pid)
                {
                    loaded(load);
                }
                resume(ptrace::cont(pid, None));
            }
            // A process that is stopped by a signal stays so.
            WaitStatus::PtraceEvent(pid, signal, PTRACE_EVENT_STOP) if signal != Signal::SIGTRAP => {
                listen(pid);
            }
            WaitStatus::PtraceEvent(pid, ..) => resume(ptrace::cont(pid, None)),
            WaitStatus::Stopped(pid, signal) => resume(ptrace::cont(pid, signal)),
            WaitStatus::Exited(..)
            | WaitStatus::Signaled(..)
            | WaitStatus::Continued(_)
            | WaitStatus::StillAlive => {}
        }
    }
}

/// A process that was killed meanwhile is no error.
fn resume(result: nix::Result<()>) {
    let _ = result;
}

fn listen(pid: Pid) {
    // SAFETY: it takes no pointers; on a process that is gone it fails, which is right.
    unsafe {
        libc::ptrace(PTRACE_LISTEN as _, pid.as_raw(), 0, 0);
    }
}

/// A load that the kernel has not answered yet.
struct Call {
    attributes: u64,
    before: Attributes,
    log: Option<u64>,
}

impl Call {
    /// Asks for statistics, if the loader has not asked for a log.
    fn begin(pid: Pid) -> Option<Self> {
        let [_, _, stack, _, _, attributes, ..] = syscall_info(pid)?;
        let before = read_attributes(pid, attributes)?;
        if before.log_level != 0 {
            return Some(Self { attributes, before, log: None });
        }
        let log = (stack - BELOW - LOG as u64) & !7;
        let now = Attributes { log_level: BPF_LOG_STATS, log_size: LOG as u32, log_buf: log, ..before };
        write(pid, attributes, &bytes(now))?;
        Some(Self { attributes, before, log: Some(log) })
    }

    fn end(self, pid: Pid) -> Option<Load> {
        let [_, _, _, result, ..] = syscall_info(pid)?;
        let program = String::from_utf8_lossy(&self.before.prog_name);
        let program = program.trim_end_matches('\0').to_owned();
        let mut spent = None;
        if let Some(log) = self.log {
            write(pid, self.attributes, &bytes(self.before))?;
            let mut text = [0; 4096];
            read(pid, log, &mut text)?;
            spent = parse(&String::from_utf8_lossy(&text));
        }
        let error = i32::try_from(-(result as i64).min(0)).ok()?;
        Some(Load { program, error, spent })
    }
}

/// `struct ptrace_syscall_info`, by words: operation, instruction pointer, stack
/// pointer; then the number and the arguments, or what the call returned.
fn syscall_info(pid: Pid) -> Option<[u64; 11]> {
    let mut info = [0u64; 11];
    // SAFETY: the kernel writes at most as many bytes as it is told to `info`.
    let length = unsafe {
        libc::ptrace(PTRACE_GET_SYSCALL_INFO as _, pid.as_raw(), size_of_val(&info), info.as_mut_ptr())
    };
    (length > 0).then_some(info)
}

fn read_attributes(pid: Pid, at: u64) -> Option<Attributes> {
    let mut raw = [0; size_of::<Attributes>()];
    read(pid, at, &mut raw)?;
    // SAFETY: integers of any value, in a structure without padding.
    Some(unsafe { std::mem::transmute::<[u8; size_of::<Attributes>()], Attributes>(raw) })
}

fn bytes(attributes: Attributes) -> [u8; size_of::<Attributes>()] {
    // SAFETY: a structure without padding.
    unsafe { std::mem::transmute(attributes) }
}

fn read(pid: Pid, at: u64, to: &mut [u8]) -> Option<()> {
    let remote = [RemoteIoVec { base: at as usize, len: to.len() }];
    process_vm_readv(pid, &mut [IoSliceMut::new(to)], &remote).ok().map(drop)
}

fn write(pid: Pid, at: u64, from: &[u8]) -> Option<()> {
    let remote = [RemoteIoVec { base: at as usize, len: from.len() }];
    process_vm_writev(pid, &[IoSlice::new(from)], &remote).ok().map(drop)
}

/// Finds `processed 3300 insns (limit 1000000) max_states_per_insn 4 total_states 100 ...`.
fn parse(log: &str) -> Option<Spent> {
    let log = log.split('\0').next()?;
    let line = log.lines().find(|line| line.starts_with("processed "))?;
    let mut words = line.split_whitespace();
    let mut after = |word| words.by_ref().skip_while(|w| *w != word).nth(1)?.parse().ok();
    Some(Spent { instructions: after("processed")?, states: after("total_states")? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_verifiers_figures_are_found() {
        let log = "verification time 912 usec\nstack depth 40\nprocessed 3300 insns (limit 1000000) \
                   max_states_per_insn 4 total_states 100 peak_states 90 mark_read 10\n\0rest";
        assert_eq!(parse(log), Some(Spent { instructions: 3300, states: 100 }));
        assert_eq!(parse("\0"), None);
    }
}
