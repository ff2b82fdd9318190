//! The programs that underpass has, and which of them a kernel has to take.

use crate::plan::Load;

/// The kernel keeps so much of a name.
const KEPT: usize = 15;
/// Kernels before this are not claimed to work.
const OLDEST: (u32, u32) = (5, 10);
/// Storage in sockets that tracing programs may use.
const WATCH: (u32, u32) = (5, 11);
/// The tracepoints `sock_send_length` and `sock_recv_length`.
const LENGTHS: (u32, u32) = (6, 3);

/// In the format of iproute2, which loads it, where a guest has iproute2.
const EXPORTED: &str = "dnsguard";

/// Each with the oldest kernel that has to take it.
const PROGRAMS: &[(&str, (u32, u32))] = &[
    (EXPORTED, OLDEST),
    ("dnsguard_egress", OLDEST),
    ("dnsguard_tc", OLDEST),
    ("dnsguard_xdp", OLDEST),
    ("mux_in", OLDEST),
    ("mux_out", OLDEST),
    ("mux_xdp", OLDEST),
    ("packet_bare_drop_xdp", OLDEST),
    ("packet_bare_pass_xdp", OLDEST),
    ("packet_bare_tc", OLDEST),
    ("packet_pass_tc", OLDEST),
    ("packet_pass_xdp", OLDEST),
    ("packet_port_tc", OLDEST),
    ("packet_port_xdp", OLDEST),
    ("packet_send_xdp", OLDEST),
    ("peer_pass_xdp", OLDEST),
    ("relay_verdict", OLDEST),
    ("shortcut_enter", LENGTHS),
    ("shortcut_meet", LENGTHS),
    ("shortcut_read", LENGTHS),
    ("shortcut_send", LENGTHS),
    ("watch_egress", OLDEST),
    ("watch_flows", WATCH),
    ("watch_ingress", OLDEST),
    ("watch_receive", LENGTHS),
    ("watch_recvmsg4", WATCH),
    ("watch_recvmsg6", WATCH),
    ("watch_release", WATCH),
    ("watch_seed", WATCH),
    ("watch_seed_tcp", WATCH),
    ("watch_send", LENGTHS),
    ("watch_sendmsg4", WATCH),
    ("watch_sendmsg6", WATCH),
    ("watch_state", WATCH),
    ("watch_state2", WATCH),
    ("watch_tcp", WATCH),
];

fn kept(name: &str) -> &str {
    &name[..name.len().min(KEPT)]
}

/// A load of a program of underpass: the kernel and libraries load some of their own.
pub fn is_ours(load: &Load) -> bool {
    PROGRAMS.iter().any(|(name, _)| kept(name) == load.program)
}

/// What came of the programs in a guest of this version: how many were loaded, and
/// which were not, though they should.
pub fn loaded(loads: &[Load], version: (u32, u32), has_peers: bool) -> (usize, Vec<&'static str>) {
    let takes = |name: &str| loads.iter().any(|load| load.program == kept(name) && load.error == 0);
    let (loaded, missing): (Vec<_>, Vec<_>) = PROGRAMS.iter().partition(|(name, _)| takes(name));
    let should = missing.iter().filter(|(name, since)| *since <= version && (has_peers || *name != EXPORTED));
    (loaded.len(), should.map(|(name, _)| *name).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The kernel side's entry points are its public functions.
    #[test]
    fn every_program_is_listed() {
        let mut found: Vec<String> = vec![];
        for file in std::fs::read_dir("../crates/kernel/src/bin").unwrap() {
            let text = std::fs::read_to_string(file.unwrap().path()).unwrap();
            let names = text.lines().filter_map(|line| {
                let line = line.strip_prefix("pub ")?;
                let name = line.strip_prefix("extern \"C\" ").unwrap_or(line).strip_prefix("fn ")?;
                name.split_once('(').map(|(name, _)| name.to_owned())
            });
            found.extend(names);
        }
        found.sort();
        assert_eq!(found, PROGRAMS.iter().map(|(name, _)| *name).collect::<Vec<_>>());
    }

    #[test]
    fn what_a_kernel_should_take_and_does_not_is_named() {
        let load = |program: &str, error| Load { program: program.to_owned(), error, spent: None };
        let loads = [load("packet_bare_pas", 0), load("relay_verdict", 7), load("relay_verdict", 0)];
        let (count, missing) = loaded(&loads, (5, 10), true);
        assert_eq!(count, 2);
        assert!(missing.contains(&"mux_in") && !missing.contains(&"relay_verdict"), "{missing:?}");
        assert!(!missing.contains(&"watch_state"), "{missing:?}");
        assert!(missing.contains(&EXPORTED));
        let (_, missing) = loaded(&loads, (6, 12), false);
        assert!(missing.contains(&"watch_state") && !missing.contains(&EXPORTED), "{missing:?}");
    }
}
