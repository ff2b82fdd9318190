//! What this process may do: its effective capabilities (capabilities(7)).

use std::{fmt, fs};

use anyhow::{Context as _, Result};

/// A capability that some function needs. The value is the kernel's number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Capability {
    /// Ports below 1024.
    NetBindService = 10,
    /// Interfaces, TC, XDP, sockmaps.
    NetAdmin = 12,
    /// Raw and packet sockets.
    NetRaw = 13,
    /// Network namespaces; stands in for the BPF capabilities before Linux 5.8.
    SysAdmin = 21,
    /// Limits above the hard ones.
    SysResource = 24,
    /// Tracing programs.
    Perfmon = 38,
    /// Programs and maps.
    Bpf = 39,
}

impl Capability {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::Bpf,
        Self::NetAdmin,
        Self::Perfmon,
        Self::NetBindService,
        Self::NetRaw,
        Self::SysResource,
        Self::SysAdmin,
    ];
}

impl fmt::Display for Capability {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NetBindService => "CAP_NET_BIND_SERVICE",
            Self::NetAdmin => "CAP_NET_ADMIN",
            Self::NetRaw => "CAP_NET_RAW",
            Self::SysAdmin => "CAP_SYS_ADMIN",
            Self::SysResource => "CAP_SYS_RESOURCE",
            Self::Perfmon => "CAP_PERFMON",
            Self::Bpf => "CAP_BPF",
        })
    }
}

/// The capabilities that this process has.
///
/// # Errors
/// Where /proc is not mounted.
pub fn effective() -> Result<Vec<Capability>> {
    let status = fs::read_to_string("/proc/self/status").context("cannot read /proc/self/status")?;
    let bits = status.lines().find_map(|line| line.strip_prefix("CapEff:")).context("no CapEff line")?;
    let bits = u64::from_str_radix(bits.trim(), 16).context("an odd CapEff line")?;
    let has = |capability: Capability| bits >> capability as u8 & 1 == 1;
    // CAP_SYS_ADMIN includes what was split off it in Linux 5.8.
    let granted = |capability| match capability {
        Capability::Bpf | Capability::Perfmon => has(capability) || has(Capability::SysAdmin),
        Capability::NetBindService
        | Capability::NetAdmin
        | Capability::NetRaw
        | Capability::SysAdmin
        | Capability::SysResource => has(capability),
    };
    Ok(Capability::ALL.into_iter().filter(|capability| granted(*capability)).collect())
}

/// Checks that this process has all of `needed`.
///
/// # Errors
/// Names those that it lacks and how to get them.
pub fn require(needed: &[Capability]) -> Result<()> {
    let have = effective()?;
    let missing: Vec<_> = needed.iter().filter(|capability| !have.contains(capability)).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let names = missing.iter().map(ToString::to_string).collect::<Vec<_>>().join(" and ");
    let set = names.to_lowercase().replace(" and ", ",");
    anyhow::bail!(
        "{names} missing: run it as root, or give the binary the right: setcap {set}+ep /path/to/underpass"
    )
}
