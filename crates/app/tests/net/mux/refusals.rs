//! Command lines that are wrong.

use crate::kit::underpass;

fn refusal(arguments: &[&str]) -> (i32, String) {
    let output = underpass().arg("mux").args(arguments).output().unwrap();
    (output.status.code().unwrap(), String::from_utf8_lossy(&output.stderr).into_owned())
}

#[test]
fn wrong_command_lines_are_refused_with_the_reason() {
    let listen = ["listen", "127.0.0.1:0"];
    for (arguments, reason) in [
        (&["--route", "telnet=a:1"][..], "--route 'telnet=a:1': 'telnet' is no match"),
        (&["--route", "tls=a:70000"], "'70000' is no port"),
        (&["--route", "tls=a"], "no port: expected host:port"),
        (&["--route", "tls=a:1", "--route", "tls=b:1"], "'tls=b:1' contradicts 'tls=a:1'"),
        (&["--route", "tls=a:1", "--route", "sni:x=b:1"], "'sni:x=b:1' can never match"),
        (&["--route", "@16380:12345=a:1"], "can never match: its bytes end at 16385"),
        (&[], "--route"),
        (&["--route", "@0:a=a:1", "--per", "message"], "--frame"),
        (&["--route", "tls=a:1", "--frame", "fixed:9"], "--frame goes with --per message"),
        (&["--route", "tls=a:1", "--per", "message", "--frame", "fixed:9"], "decided on the first bytes"),
        (&["--route", "@9:a=a:1", "--per", "message", "--frame", "fixed:9"], "bytes end at 10"),
        (&["--route", "@0:a=a:1", "--per", "message", "--frame", "u24be@0"], "'u24be@0' is no frame"),
        (
            &["--route", "@0:a=a:1", "--per", "message", "--frame", "fixed:9", "--length", "10.."],
            "excludes every message",
        ),
        (
            &["--route", "@0:12345678901234567=a:1", "--per", "message", "--frame", "u16be@0"],
            "a tag has 1 to 16 bytes",
        ),
    ] {
        let (status, said) = refusal(&[&listen, arguments].concat());
        assert_eq!(status, 2, "{arguments:?}: {said}");
        assert!(said.contains(reason), "{arguments:?}: {said}");
    }
}

#[test]
fn a_port_in_use_is_named() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let (status, said) = refusal(&["listen", &address, "--route", "tls=a:1"]);
    assert_eq!(status, 1);
    assert!(said.contains(&address) && said.contains("in use"), "{said}");
}
