//! What the matrix runs: for each function the tests that make sense without speed and
//! without other programs, and the kernel from which on they have to pass.

use crate::{image::Image, plan::Command};

/// What can be asked for on the command line.
pub const FUNCTIONS: &[&str] =
    &["objects", "doctor", "packet", "app", "logic", "lab", "relay", "mux", "dnsguard", "shortcut", "watch"];

/// A row of the table.
#[derive(Debug, Clone)]
pub struct Step {
    /// The function that it is about.
    pub function: &'static str,
    /// What of it.
    pub part: &'static str,
    /// The oldest kernel that it has to pass on.
    pub since: (u32, u32),
    /// Starts programs of the host, which not every guest can run.
    needs_peers: bool,
    /// Too slow to be run at every change.
    slow: bool,
    statuses: &'static [i32],
    run: Run,
    seconds: u32,
}

#[derive(Debug, Clone, Copy)]
enum Run {
    /// Tests of a test program that match one of the filters (none: all), but for some.
    Tests { program: &'static str, filters: &'static [&'static str], skip: &'static [&'static str] },
    /// The binary with these arguments has to exit with 0.
    Underpass(&'static [&'static str]),
}

/// Kernels before this are not claimed to work.
const OLDEST: (u32, u32) = (5, 10);

const STEPS: &[Step] = &[
    tests("objects", "xdp and tc", "prog_run", &["objects::"], &[]),
    Step { needs_peers: true, ..tests("objects", "exported", "net", &["guard::an_exported_object"], &[]) },
    // 3: a function that this kernel cannot do.
    slow(Step { statuses: &[0, 3], ..command("doctor", "itself", &["doctor"]) }),
    tests("doctor", "verdicts", "net", &["doctor::"], &["the_shortcut"]),
    Step { needs_peers: true, ..tests("doctor", "shortcut", "net", &["doctor::the_shortcut"], &[]) },
    tests("packet", "prog_run", "prog_run", &["packet::"], &[]),
    // The library's unit tests: what reads the kernel's BTF and files meets other kernels here.
    tests("app", "unit", "underpass-lib", &[], &[]),
    // On arm64 this is another machine.
    slow(tests("logic", "unit", "underpass_logic-lib", &[], &[])),
    tests("lab", "net", "net", &["lab::"], &[]),
    // One family is enough where it is the kernel that differs.
    tests(
        "relay",
        "ends",
        "net",
        &["early_bytes::auto", "fin_first::auto", "reset_by_the_server::auto", "reset_by_the_server::splice"],
        &["_ipv6"],
    ),
    slow(tests(
        "relay",
        "ends more",
        "net",
        &["early_bytes::", "fin_first::", "reset_by_the"],
        &["::kernel", "_ipv6", "::auto"],
    )),
    slow(tests(
        "relay",
        "hazards",
        "net",
        &["half_close", "tail_after", "random_write"],
        &["::kernel", "_ipv6"],
    )),
    // Where the probe refuses this path `doctor::` shows that it does so with good reason.
    tests(
        "relay",
        "kernel ends",
        "net",
        &[
            "hazards::early_bytes::kernel",
            "hazards::fin_first::kernel",
            "hazards::reset_by_the_server::kernel_ipv4",
        ],
        &[],
    ),
    slow(tests(
        "relay",
        "kernel hazards",
        "net",
        &["relay::hazards::"],
        &["::copy", "::splice", "::auto", "_ipv6", "early", "fin_first", "five"],
    )),
    // Not the one that waits for tens of streams of 20 MiB.
    slow(tests("relay", "backpressure", "net", &["relay::backpressure::"], &["many_stopped"])),
    Step {
        needs_peers: true,
        ..slow(tests("relay", "pair", "net", &["relay::pair::"], &["::copy", "::splice", "socat"]))
    },
    tests("mux", "prog_run", "prog_run", &["mux::hits_move", "mux::replies_leave"], &[]),
    // What the verifier spends is in the budget, kernel by kernel.
    slow(tests(
        "mux",
        "prog_run more",
        "prog_run",
        &["mux::"],
        &["hits_move", "replies_leave", "the_verifier_spends"],
    )),
    // Each hook, with real datagrams, both families.
    Step {
        needs_peers: true,
        ..tests("mux", "datagram", "net", &["datagram::tags_reach", "datagram::the_hook_is_chosen"], &[])
    },
    Step {
        needs_peers: true,
        // One starts name servers, one counts its flows in thousands.
        ..slow(tests(
            "mux",
            "datagram more",
            "net",
            &["mux::datagram::"],
            &["tags_reach", "the_hook_is_chosen", "name_servers", "flows_are_bounded"],
        ))
    },
    slow(tests("mux", "message", "net", &["mux::message::"], &[])),
    Step {
        needs_peers: true,
        // Those start nginx and sshd, and cut a greeting a thousand times.
        ..slow(tests(
            "mux",
            "connection",
            "net",
            &["mux::connection::"],
            &["real_servers", "cut_at_every_byte"],
        ))
    },
    tests("dnsguard", "prog_run", "prog_run", &["dnsguard::every_known", "dnsguard::tags_and"], &[]),
    slow(tests(
        "dnsguard",
        "prog_run more",
        "prog_run",
        &["dnsguard::"],
        &["every_known", "tags_and", "the_verifier_spends"],
    )),
    // Attaches and detaches, with an injector on the wire.
    command("dnsguard", "guards", &["demo", "--json", "--only", "dnsguard"]),
    Step {
        needs_peers: true,
        // Those that need no name servers.
        ..tests(
            "dnsguard",
            "hooks",
            "net",
            &["detach_leaves_nothing", "beside_another_xdp", "guard_whose_interface_is_gone"],
            &["watch", "mux::"],
        )
    },
    // It counts what is read by a tracepoint that came with 6.3.
    Step { needs_peers: true, since: (6, 3), ..tests("shortcut", "net", "net", &["shortcut::ports_1"], &[]) },
    Step {
        needs_peers: true,
        since: (6, 3),
        // Not those of servers that the guests do not have.
        ..slow(tests(
            "shortcut",
            "more",
            "net",
            &[
                "what_is_exchanged",
                "namespaces_do",
                "that_exist",
                "churn",
                "fall_behind",
                "that_wait",
                "through_a_relay",
            ],
            &["relay::", "mux::", "watch"],
        ))
    },
    // Its programs keep what they know in the sockets, which came with 5.11.
    Step { needs_peers: true, since: (5, 11), ..tests("watch", "net", "net", &["watch::"], &[]) },
    // Who uses a connection, and what is no TCP, is told by the tracepoints of 6.3. Left out is
    // what takes name servers and ping, and a cat that is no busybox.
    Step {
        needs_peers: true,
        since: (6, 3),
        ..slow(tests(
            "watch",
            "owners",
            "net",
            &["watch_owners::"],
            &["fifty_thousand", "unbound", "remote_names", "looked_up_in_reverse", "an_inherited"],
        ))
    },
    Step {
        needs_peers: true,
        since: (6, 3),
        ..slow(tests("watch", "kinds", "net", &["watch_kinds::"], &["io_uring", "icmp_raw"]))
    },
];

const fn tests(
    function: &'static str,
    part: &'static str,
    program: &'static str,
    filters: &'static [&'static str],
    skip: &'static [&'static str],
) -> Step {
    let run = Run::Tests { program, filters, skip };
    Step { function, part, since: OLDEST, needs_peers: false, slow: false, statuses: &[0], run, seconds: 600 }
}

const fn command(function: &'static str, part: &'static str, arguments: &'static [&'static str]) -> Step {
    let run = Run::Underpass(arguments);
    Step { function, part, since: OLDEST, needs_peers: false, slow: false, statuses: &[0], run, seconds: 240 }
}

const fn slow(step: Step) -> Step {
    Step { slow: true, ..step }
}

/// The steps of these functions, of all if there are none; without the slow ones if
/// it has to be quick.
pub fn steps(functions: &[String], quick: bool) -> Vec<Step> {
    STEPS
        .iter()
        .filter(|step| !(quick && step.slow))
        .filter(|step| functions.is_empty() || functions.iter().any(|function| function == step.function))
        .cloned()
        .collect()
}

/// Whether the steps of these functions load every program that there is: the doctor
/// tries those that need more than a packet.
pub fn loads_all(functions: &[String]) -> bool {
    let asked = |name: &str| functions.is_empty() || functions.iter().any(|function| function == name);
    asked("objects") && asked("doctor")
}

impl Step {
    /// Whether it is a test program, which says how many tests it ran.
    pub fn is_tests(&self) -> bool {
        matches!(self.run, Run::Tests { .. })
    }

    /// Whether an exit status means that it passed.
    pub fn is_success(&self, status: i32) -> bool {
        self.statuses.contains(&status)
    }

    /// Whether a guest can do it.
    pub fn is_possible(&self, has_peers: bool) -> bool {
        has_peers || !self.needs_peers
    }

    /// What the guest has to start; nothing if that was not built.
    pub fn command(&self, image: &Image) -> Option<Command> {
        let (program, arguments) = match self.run {
            Run::Underpass(arguments) => ("underpass", arguments.to_vec()),
            Run::Tests { program, filters, skip } => {
                let mut arguments = vec!["--test-threads=1", "--show-output"];
                arguments.extend(filters);
                arguments.extend(skip.iter().flat_map(|name| ["--skip", name]));
                (program, arguments)
            }
        };
        let program = image.binaries.get(program)?.to_str()?;
        let argv = [program].iter().chain(&arguments).map(ToString::to_string).collect();
        Some(Command { argv, seconds: self.seconds })
    }
}
