//! `underpass relay`: what is wrong with a command line, told so that a newcomer understands.

use std::{
    fs,
    io::{BufRead as _, BufReader},
    net::TcpListener,
    process::{Command, Stdio},
};

/// Runs a relay that is expected to refuse: its exit status and what it said.
fn relay(args: &[&str]) -> (Option<i32>, String) {
    run(args, &[])
}

fn run(args: &[&str], env: &[(&str, &str)]) -> (Option<i32>, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_underpass"));
    command.arg("relay").args(args).envs(env.iter().copied()).stdin(Stdio::null());
    // One that does not refuse would stay for ever.
    let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
    let mut said = String::new();
    let mut lines = BufReader::new(child.stderr.take().unwrap());
    while lines.read_line(&mut said).unwrap() > 0 {
        if said.contains(" ready ") {
            child.kill().unwrap();
        }
    }
    (child.wait().unwrap().code(), said)
}

#[test]
fn help() {
    let mut command = Command::new(env!("CARGO_BIN_EXE_underpass"));
    let output = command.args(["relay", "--help"]).output().unwrap();
    assert!(output.status.success());
    let help = String::from_utf8(output.stdout).unwrap();
    for word in [
        "--listen",
        "--to",
        "--pair",
        "--via",
        "--via-password-file",
        "--path",
        "--connect-timeout",
        "--idle-timeout",
        "--grace",
        "--log-connections",
        "auto",
        "kernel",
        "splice",
        "copy",
    ] {
        assert!(help.contains(word), "{word} is not in the help:\n{help}");
    }
}

/// Each with a part of its message; all of them exit with 2.
#[test]
fn wrong_command_lines() {
    let cases: &[(&[&str], &str)] = &[
        (&[], "--listen"),
        (&["--listen", ":0"], "--to"),
        (&["--to", "h:1"], "--listen"),
        (&["--listen", ":0", "--to", "h:1", "--pair"], "cannot be used with"),
        (&["--listen", ":0", "--pair", "--via", "socks5://p:1"], "cannot be used with"),
        (&["--listen", ":0", "--to", "h"], "no port: expected host:port"),
        (&["--listen", ":0", "--to", ":1"], "no host: expected host:port"),
        (&["--listen", ":0", "--to", "h:0"], "port 0"),
        (&["--listen", ":0", "--to", "h:65536"], "'65536' is no port"),
        (&["--listen", ":0", "--to", "::1:5"], "brackets: [::1]:443"),
        (&["--listen", ":x", "--to", "h:1"], "'x' is no port"),
        (&["--listen", "nothing", "--to", "h:1"], "no port"),
        (&["--listen", ":0", "--to", "h:1", "--via", "http://p:1"], "expected socks5://[USER@]HOST:PORT"),
        (&["--listen", ":0", "--to", "h:1", "--via", "socks5://p"], "no port"),
        (&["--listen", ":0", "--to", "h:1", "--path", "fast"], "possible values: auto, kernel, splice, copy"),
        (&["--listen", ":0", "--to", "h:1", "--idle-timeout", "0s"], "a time above 0"),
        (
            &["--listen", ":0", "--to", "h:1", "--connect-timeout", "soon"],
            "expected a time such as 500ms, 30s or 5m",
        ),
        (&["--listen", ":0", "--to", "h:1", "--grace", "5"], "expected a time such as 500ms, 30s or 5m"),
        (&["--listen", ":0", "--to", "h:1", "--via-password-file", "/x"], "--via"),
        (
            &["--listen", ":0", "--to", "h:1", "--via", "socks5://p:1", "--via-password-file", "/x"],
            "needs a user",
        ),
        (&["--listen", ":0", "--to", "h:1", "--via", "socks5://me@p:1"], "UNDERPASS_PROXY_PASSWORD"),
        (
            &["--listen", ":0", "--to", "h:1", "--via", "socks5://me@p:1", "--via-password-file", "/no/file"],
            "cannot read /no/file",
        ),
    ];
    for (args, part) in cases {
        let (status, said) = relay(args);
        assert_eq!(status, Some(2), "{args:?}: {said}");
        assert!(said.contains(part), "{args:?}: {said}");
    }
}

#[test]
fn a_password_is_never_repeated() {
    let secret = "k9-Zebra_41";
    let via = format!("socks5://me:{secret}@p:1");
    let (status, said) = relay(&["--listen", ":0", "--to", "h:1", "--via", &via]);
    // What was typed is known to whoever typed it, but a log of stderr outlives that.
    assert!(status == Some(2) && said.contains("does not belong on the command line"), "{said}");
    assert!(!said.contains(secret), "{said}");
    let long = "x".repeat(256);
    for password in ["", &long] {
        let env = [("UNDERPASS_PROXY_PASSWORD", password)];
        let (status, said) = run(&["--listen", ":0", "--to", "h:1", "--via", "socks5://me@p:1"], &env);
        assert!(status == Some(2) && said.contains("SOCKS5 allows 1 to 255"), "{said}");
        assert!(password.is_empty() || !said.contains(password), "{said}");
    }
}

#[test]
fn a_password_file_is_read() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("password");
    fs::write(&file, "\n").unwrap();
    let file = file.to_str().unwrap();
    let (status, said) =
        relay(&["--listen", ":0", "--to", "h:1", "--via", "socks5://me@p:1", "--via-password-file", file]);
    assert!(status == Some(2) && said.contains("0 bytes"), "{said}");
}

#[test]
fn a_port_in_use() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let (status, said) = relay(&["--listen", &address, "--to", "127.0.0.1:1", "--path", "copy"]);
    let expected = format!("cannot listen on {address}: the port is in use");
    assert!(status == Some(1) && said.contains(&expected), "{status:?} {said}");
}

#[test]
fn an_address_of_no_interface() {
    // 192.0.2.0/24 is for documentation (RFC 5737).
    let (status, said) = relay(&["--listen", "192.0.2.1:0", "--to", "127.0.0.1:1", "--path", "copy"]);
    assert!(
        status == Some(1) && said.contains("no interface of this host has that address"),
        "{status:?} {said}"
    );
}

#[test]
fn names_that_do_not_resolve() {
    // No name ends so (RFC 6761).
    let (status, said) = relay(&["--listen", ":0", "--to", "no-such-host.invalid:1", "--path", "copy"]);
    assert!(status == Some(1) && said.contains("cannot resolve no-such-host.invalid"), "{status:?} {said}");
    let (status, said) =
        relay(&["--listen", "no-such-host.invalid:0", "--to", "127.0.0.1:1", "--path", "copy"]);
    assert!(status == Some(1) && said.contains("cannot resolve no-such-host.invalid"), "{status:?} {said}");
    let via =
        ["--listen", ":0", "--to", "h:1", "--via", "socks5://no-such-proxy.invalid:1", "--path", "copy"];
    let (status, said) = relay(&via);
    assert!(status == Some(1) && said.contains("cannot resolve no-such-proxy.invalid"), "{status:?} {said}");
}

#[test]
fn the_test_knob_is_checked() {
    let env = [("UNDERPASS_TEST_SWITCH_EVERY", "0")];
    let (status, said) = run(&["--listen", ":0", "--to", "127.0.0.1:1"], &env);
    assert!(status == Some(2) && said.contains("UNDERPASS_TEST_SWITCH_EVERY"), "{status:?} {said}");
}
