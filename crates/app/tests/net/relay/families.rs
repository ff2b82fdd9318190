//! IPv4 and IPv6 on each side, in every mixture, mapped addresses among them.

use std::net::{IpAddr, SocketAddr};

use super::{Path, line_of, start};
use crate::kit::{Family, Hosts, Stream, accept, connect, exchange};

#[test]
fn copy() {
    every_mixture(Path::Copy);
}

#[test]
fn splice() {
    every_mixture(Path::Splice);
}

#[test]
fn kernel() {
    every_mixture(Path::Kernel);
}

#[test]
fn auto() {
    every_mixture(Path::Auto);
}

/// `::ffff:10.0.2.2`
fn mapped(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().into(),
        IpAddr::V6(_) => address,
    }
}

fn every_mixture(path: Path) {
    let hosts = Hosts::new();
    // Each way to write a target, from both families; each way to write where to listen.
    for is_mapped in [false, true] {
        for of_target in [Family::V4, Family::V6] {
            through(&hosts, path, ":0", (of_target, is_mapped), &[Family::V4, Family::V6]);
        }
    }
    let of_client = format!("[{}]:0", mapped(Hosts::relay_address(Family::V4)));
    through(&hosts, path, "[::]:0", (Family::V4, false), &[Family::V4, Family::V6]);
    through(&hosts, path, "0.0.0.0:0", (Family::V6, false), &[Family::V4]);
    through(&hosts, path, &of_client, (Family::V6, false), &[Family::V4]);
}

fn through(hosts: &Hosts, path: Path, listen: &str, to: (Family, bool), clients: &[Family]) {
    let target = hosts.listen(to.0);
    let address = target.local_addr().unwrap();
    let ip = if to.1 { mapped(address.ip()) } else { address.ip() };
    let to = SocketAddr::new(ip, address.port()).to_string();
    let (relay, listening) = start(hosts, &["--path", path.word(), "--listen", listen, "--to", &to]);
    for family in clients {
        let at = SocketAddr::new(Hosts::relay_address(*family), listening.port());
        let client = connect(&hosts.client, at).unwrap();
        let server = accept(&target);
        let (mut there, mut back) = (Stream::new(1), Stream::new(2));
        for _ in 0..40 {
            exchange(&client, &server, &mut there, &mut back, 64);
        }
        exchange(&client, &server, &mut there, &mut back, 300_000);
        let mut from = client.local_addr().unwrap();
        if listening.is_ipv6() {
            from.set_ip(mapped(from.ip()));
        }
        drop((client, server));
        let line = line_of(&relay, from);
        let got = ["sent", "received", "end"].map(|name| line[name].as_str());
        assert_eq!(got, ["302560", "302560", "closed"], "{path:?} {listen} {family:?} {to}: {line:?}");
        if path == Path::Kernel {
            assert_eq!(line["path"], "kernel", "{listen} {family:?} {to}: {line:?}");
        }
    }
}
