//! What the doctor says is what then works. On kernels that refuse a path this shows
//! that it is refused for good reason, and that underpass goes on without it.

use std::process::Output;

use serde_json::Value;

use crate::{
    kit::{Daemon, Family, Hosts, fields, underpass},
    relay::{Path, line_of, to},
};

/// What the doctor found out about a function, on a host of its own.
fn doctor(hosts: &Hosts, function: &str) -> Value {
    let output = hosts.relay.enter(|| underpass().args(["doctor", "--json"]).output()).unwrap();
    // 3: there is a function that does not work here.
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(matches!(output.status.code(), Some(0 | 3)), "{}: {stderr}", output.status);
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let functions = report["functions"].as_array().unwrap();
    functions.iter().find(|entry| entry["name"] == function).unwrap().clone()
}

fn check(function: &Value, name: &str) -> (bool, String) {
    let checks = function["checks"].as_array().unwrap();
    let check = checks.iter().find(|check| check["name"] == name).unwrap();
    (check["ok"].as_bool().unwrap(), check["detail"].as_str().unwrap().to_owned())
}

#[test]
fn the_relays_kernel_path() {
    let hosts = Hosts::new();
    let relay = doctor(&hosts, "relay");
    assert_eq!(relay["works"], true, "copy needs nothing");
    let (ok, detail) = check(&relay, "path kernel");
    println!("the doctor says: {detail}");
    let target = hosts.listen(Family::V4);
    let address = target.local_addr().unwrap();
    if ok {
        to(&hosts, Path::Kernel, Family::V4, address, &[]);
    } else {
        let Output { status, stderr, .. } = refused(&hosts);
        let stderr = String::from_utf8(stderr).unwrap();
        assert_eq!(status.code(), Some(3), "{stderr}");
        assert!(stderr.contains("--path kernel cannot be used here: "), "{stderr}");
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

fn refused(hosts: &Hosts) -> Output {
    let args = ["relay", "--path", "kernel", "--listen", "127.0.0.1:0", "--to", "127.0.0.1:9"];
    hosts.relay.enter(|| underpass().args(args).output()).unwrap()
}
