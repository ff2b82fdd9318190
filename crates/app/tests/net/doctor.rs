//! What the doctor says is what then works. On kernels that refuse a path this shows
//! that it is refused for good reason, and that underpass goes on without it.

use std::{
    process::{Command, Output},
    sync::OnceLock,
};

use serde_json::Value;
use underpass::shortcut::cgroup::Temporary;

use crate::{
    kit::{Daemon, Family, Hosts, fields, underpass},
    relay::{Path, line_of, to},
};

/// What the doctor found out about a function. It is asked once: it loads all there is.
fn doctor(function: &str) -> &'static Value {
    static REPORT: OnceLock<Value> = OnceLock::new();
    let report = REPORT.get_or_init(|| {
        let output = underpass().args(["doctor", "--json"]).output().unwrap();
        // 3: there is a function that does not work here.
        assert!(matches!(output.status.code(), Some(0 | 3)), "{}: {}", output.status, text(&output));
        serde_json::from_slice(&output.stdout).unwrap()
    });
    let functions = report["functions"].as_array().unwrap();
    let function = functions.iter().find(|entry| entry["name"] == function).unwrap();
    println!("the doctor says: {function}");
    function
}

/// Whether something that the doctor tried did work; what it had no reason to try did not.
fn check(function: &Value, name: &str) -> bool {
    let checks = function["checks"].as_array().unwrap();
    checks.iter().any(|check| check["name"] == name && check["ok"] == true)
}

#[test]
fn the_relays_kernel_path() {
    let hosts = Hosts::new();
    let relay = doctor("relay");
    assert_eq!(relay["works"], true, "copy needs nothing");
    let ok = check(relay, "path kernel");
    let target = hosts.listen(Family::V4);
    let address = target.local_addr().unwrap();
    if ok {
        to(&hosts, Path::Kernel, Family::V4, address, &[]);
    } else {
        let args = ["relay", "--path", "kernel", "--listen", "127.0.0.1:0", "--to", "127.0.0.1:9"];
        let refused = hosts.relay.enter(|| underpass().args(args).output()).unwrap();
        assert_eq!(refused.status.code(), Some(3), "{}", text(&refused));
        assert!(text(&refused).contains("--path kernel cannot be used here: "), "{}", text(&refused));
        assert!(!relay["missing"].as_array().unwrap().is_empty(), "{relay}");
    }

    // Without being told, it takes what there is and says which, and why.
    let (relay, listen) = to(&hosts, Path::Auto, Family::V4, address, &[]);
    let why = fields(&ready_line(&relay))["kernel"].clone();
    assert_eq!(why.starts_with("not used: "), !ok, "{why}");
    let (client, server) = (crate::kit::connect(&hosts.client, listen).unwrap(), crate::kit::accept(&target));
    let name = client.local_addr().unwrap();
    drop((client, server));
    assert_eq!(line_of(&relay, name)["end"], "closed");
}

fn ready_line(relay: &Daemon) -> String {
    relay.line(" ready ")
}

fn text(output: &Output) -> String {
    [&output.stdout[..], &output.stderr].map(String::from_utf8_lossy).concat()
}

/// Attaches to an interface and detaches, if it works here; else it has to be refused.
fn attaches(hosts: &Hosts, arguments: &[&str], ok: bool) {
    let run = |arguments: &[&str]| hosts.server.enter(|| underpass().args(arguments).output()).unwrap();
    let attached = run(arguments);
    assert_eq!(attached.status.code(), Some(if ok { 0 } else { 3 }), "{arguments:?}: {}", text(&attached));
    if ok {
        let detached = run(&[arguments[0], "detach", "eth0"]);
        assert!(detached.status.success(), "{}", text(&detached));
    }
}

#[test]
fn the_multiplexers_hooks() {
    let (hosts, mux) = (Hosts::new(), doctor("mux"));
    let replies = check(mux, "UDP, replies");
    for (hook, name) in
        [("tc", "UDP, --hook tc"), ("xdp", "UDP, --hook xdp"), ("xdp-generic", "UDP, --hook xdp")]
    {
        let arguments = ["mux", "attach", "eth0", "--port", "5000", "--route", "@0:x=5001", "--hook", hook];
        attaches(&hosts, &arguments, check(mux, name) && replies);
    }
}

#[test]
fn dnsguards_hooks() {
    let (hosts, dnsguard) = (Hosts::new(), doctor("dnsguard"));
    let pinned = check(dnsguard, "bpffs") && check(dnsguard, "dnsguard_egress");
    for (hook, name) in [("tc", "dnsguard_tc"), ("xdp", "native XDP"), ("xdp-generic", "generic XDP")] {
        attaches(&hosts, &["dnsguard", "attach", "eth0", "--hook", hook], pinned && check(dnsguard, name));
    }
}

/// With mounts and processes of its own, which end with it.
#[test]
fn the_shortcut() {
    const SCRIPT: &str = "mount --make-rprivate / && mount -t bpf bpf /sys/fs/bpf &&
        \"$0\" shortcut attach --cgroup \"$1\" && \"$0\" shortcut detach";
    let cgroup = Temporary::new("doctor").unwrap();
    let shortcut = doctor("shortcut");
    let output = Command::new("setpriv")
        .args(["--pdeathsig", "KILL", "unshare", "--mount", "--net", "--pid", "--fork", "--kill-child"])
        .args(["--mount-proc", "sh", "-c", SCRIPT, env!("CARGO_BIN_EXE_underpass")])
        .arg(cgroup.path())
        .output()
        .unwrap();
    let works = shortcut["works"] == true;
    assert_eq!(output.status.code(), Some(if works { 0 } else { 3 }), "{}", text(&output));
}

#[test]
fn watching() {
    let (hosts, watch) = (Hosts::new(), doctor("watch"));
    let mut command = underpass();
    command.args(["watch", "--json"]).stdout(std::process::Stdio::null());
    if watch["works"] == true {
        let mut daemon = Daemon::start(&hosts.server, &mut command);
        daemon.line("watching");
        daemon.signal(nix::sys::signal::Signal::SIGINT);
        assert!(daemon.wait().success());
    } else {
        let output = hosts.server.enter(|| command.output()).unwrap();
        assert_eq!(output.status.code(), Some(3), "{}", text(&output));
    }
}
