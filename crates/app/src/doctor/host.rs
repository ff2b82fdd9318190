//! What the doctor finds out about the host as a whole.

use std::fs;

use nix::sys::resource::{Resource, getrlimit};

use super::Check;
use crate::capabilities::{Capability, effective};

/// Privileges, limits and mounts that functions build on.
pub(super) fn checks() -> Vec<Check> {
    let mut checks: Vec<Check> = capabilities();
    checks.push(memlock());
    checks.push(btf());
    checks.push(mount("bpffs", "bpf", "what is attached to stay is pinned there"));
    checks.push(mount("cgroup2", "cgroup2", "shortcut and watch tell processes apart by it"));
    checks
}

fn capabilities() -> Vec<Check> {
    let have = effective().unwrap_or_default();
    let check = |capability: Capability| Check {
        name: capability.to_string(),
        ok: have.contains(&capability),
        detail: match capability {
            Capability::Bpf => "programs and maps: all functions but relay's copy and splice",
            Capability::NetAdmin => "interfaces, TC, XDP, sockmaps",
            Capability::Perfmon => "tracing programs: watch",
            Capability::NetBindService => "ports below 1024",
            Capability::NetRaw => "packet sockets",
            Capability::SysResource => {
                "more descriptors than the hard limit; locked memory before Linux 5.11"
            }
            Capability::SysAdmin => "network namespaces: demo",
        }
        .into(),
    };
    Capability::ALL.into_iter().map(check).collect()
}

fn memlock() -> Check {
    let limit = getrlimit(Resource::RLIMIT_MEMLOCK);
    let detail = match limit {
        Ok((soft, hard)) => {
            format!("soft {}, hard {}; BPF is charged to it before Linux 5.11 only", size(soft), size(hard))
        }
        Err(error) => error.to_string(),
    };
    Check { name: "memlock limit".into(), ok: limit.is_ok(), detail }
}

fn size(bytes: u64) -> String {
    if bytes == libc::RLIM_INFINITY { "unlimited".into() } else { format!("{} KiB", bytes >> 10) }
}

fn btf() -> Check {
    let path = "/sys/kernel/btf/vmlinux";
    let found = fs::metadata(path);
    let detail = match &found {
        Ok(data) => format!("{path}, {} KiB", data.len() >> 10),
        Err(_) => format!("{path} is missing: the kernel needs CONFIG_DEBUG_INFO_BTF"),
    };
    Check { name: "BTF".into(), ok: found.is_ok(), detail }
}

fn mount(name: &str, kind: &str, what_for: &str) -> Check {
    let table = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let place = table.lines().find_map(|line| {
        let mut fields = line.split(' ');
        let (_, place, found) = (fields.next()?, fields.next()?, fields.next()?);
        (found == kind).then(|| place.to_owned())
    });
    let ok = place.is_some();
    let detail = place.map_or_else(|| format!("not mounted ({what_for})"), |place| format!("at {place}"));
    Check { name: name.into(), ok, detail }
}
