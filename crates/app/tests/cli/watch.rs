//! `underpass watch`: what is wrong with a command line or lacks, told so that a newcomer
//! understands.

use std::{
    fs,
    io::{BufRead as _, BufReader},
    net::TcpListener,
    os::unix::fs::PermissionsExt as _,
    process::{Command, Stdio},
};

const BINARY: &str = env!("CARGO_BIN_EXE_underpass");

/// Runs a watch that is expected to refuse: its exit status and what it said.
fn watch(args: &[&str]) -> (Option<i32>, String) {
    let mut command = Command::new(BINARY);
    command.arg("watch").args(args);
    refused(command)
}

fn refused(mut command: Command) -> (Option<i32>, String) {
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut said = String::new();
    let mut lines = BufReader::new(child.stderr.take().unwrap());
    while lines.read_line(&mut said).unwrap() > 0 {
        // One that does not refuse would stay for ever.
        if said.contains("watching") {
            child.kill().unwrap();
        }
    }
    (child.wait().unwrap().code(), said)
}

/// Each with a part of its message; all of them exit with 2.
#[test]
fn wrong_command_lines() {
    let cases: &[(&[&str], &str)] = &[
        (&["--remote", "300.1.1.1"], "300.1.1.1 is no IP address"),
        (&["--remote", "example.org"], "example.org is no IP address"),
        (&["--remote", "10.0.0.0/33"], "a prefix of 10.0.0.0 has at most 32 bits"),
        (&["--remote", "::1/129"], "a prefix of ::1 has at most 128 bits"),
        (&["--remote", "10.0.0.0/x"], "a prefix is a number of bits"),
        (&["--port", "65536"], "65536 is not in 1..=65535"),
        (&["--port", "0"], "0 is not in 1..=65535"),
        (&["--pid", "0"], "0 is not in 1.."),
        (&["--process", ""], "--process takes a name"),
        (&["--interval", "5ms"], "--interval takes at least 10ms"),
        (&["--interval", "1"], "time unit needed"),
        (&["--packets"], "--interface"),
        (&["--interface", "nosuch0"], "there is no interface \"nosuch0\"; there are: lo"),
        (&["--interface", ""], "there is no interface \"\""),
        (&["--web", "127.0.0.1:99999"], "'99999' is no port"),
        (&["--web", "0.0.0.0:7676"], "--web-token-file"),
        (&["--web", "127.0.0.1:0", "--web-token-file", "/nowhere"], "/nowhere: No such file"),
        (&["--web", "127.0.0.1:0", "--geo", "/nowhere"], "--geo /nowhere: No such file"),
        (&["--web", "127.0.0.1:0", "--geo", "/proc/version"], "not a MaxMind database"),
        (&["--web", "127.0.0.1:0", "--home", "95,0"], "expected degrees north and east"),
        (&["--geo", "/nowhere"], "--web"),
    ];
    for (args, part) in cases {
        let (status, said) = watch(args);
        assert_eq!(status, Some(2), "{args:?}: {said}");
        assert!(said.contains(part), "{args:?} should say {part:?}: {said}");
    }
}

#[test]
fn a_port_that_is_taken() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let at = taken.local_addr().unwrap().to_string();
    let (status, said) = watch(&["--web", &at]);
    assert_eq!(status, Some(1), "{said}");
    assert!(said.contains(&format!("cannot listen on {at}: Address already in use")), "{said}");
}

/// An ordinary user with some capabilities is told which one lacks, once.
#[test]
fn privileges_that_lack_are_named() {
    let folder = tempfile::tempdir().unwrap();
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let binary = folder.path().join("underpass");
    // By another process: a child that a test beside this one starts meanwhile would have
    // the copy open for writing, which then cannot be executed (ETXTBSY).
    assert!(Command::new("cp").arg(BINARY).arg(&binary).status().unwrap().success());
    for (has, args, lacks) in [
        ("", &["watch"][..], "CAP_BPF"),
        (",+bpf", &["watch"], "CAP_PERFMON"),
        (",+bpf,+perfmon", &["watch", "--interface", "lo"], "CAP_NET_ADMIN"),
    ] {
        let mut setpriv = Command::new("setpriv");
        for set in ["--inh-caps", "--ambient-caps", "--bounding-set"] {
            setpriv.arg(format!("{set}=-all{has}"));
        }
        setpriv.args(["--reuid", "65534", "--regid", "65534", "--clear-groups", "--no-new-privs"]);
        setpriv.arg(&binary).args(args);
        let (status, said) = refused(setpriv);
        assert_eq!(status, Some(3), "{has}: {said}");
        assert!(said.contains(lacks), "{has}: {said}");
        assert_eq!(said.matches("not permitted").count(), 1, "{has}: {said}");
    }
}
