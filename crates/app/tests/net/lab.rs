//! The namespaces themselves.

use std::{
    io::{Read as _, Write as _},
    net::{IpAddr, TcpListener, TcpStream},
};

use underpass::lab::Namespace;

#[test]
fn two_namespaces_talk_over_both_families() {
    let (left, right) = (Namespace::new().unwrap(), Namespace::new().unwrap());
    left.join("eth0", &right, "eth0").unwrap();
    for (ours, theirs, prefix) in [("10.0.0.1", "10.0.0.2", 24), ("fd00::1", "fd00::2", 64)] {
        let (ours, theirs): (IpAddr, IpAddr) = (ours.parse().unwrap(), theirs.parse().unwrap());
        left.address("eth0", ours, prefix).unwrap();
        right.address("eth0", theirs, prefix).unwrap();
        let listener = right.enter(|| TcpListener::bind((theirs, 0))).unwrap();
        let to = listener.local_addr().unwrap();
        let mut client = left.enter(|| TcpStream::connect(to)).unwrap();
        client.write_all(b"hello").unwrap();
        drop(client);
        let mut got = vec![];
        listener.accept().unwrap().0.read_to_end(&mut got).unwrap();
        assert_eq!(got, b"hello");
    }
}
