//! The shortcut: real programs in a control group of the test's own.

use std::{
    io::{BufRead as _, BufReader, Read as _},
    path::Path,
    process::{Child, Command, Stdio},
};

use underpass::{
    lab::Namespace,
    shortcut::{Scope, Shortcut, cgroup::Temporary},
};

/// A namespace, a control group, and the shortcut for it if it is on.
struct Place {
    shortcut: Option<Shortcut>,
    cgroup: Temporary,
    namespace: Namespace,
}

impl Place {
    fn new(on: bool) -> Self {
        let cgroup = Temporary::new("test").unwrap();
        let shortcut = on.then(|| Shortcut::start(cgroup.path(), &Scope::default()).unwrap());
        Self { shortcut, cgroup, namespace: Namespace::new().unwrap() }
    }

    /// Starts a program in the control group and the namespace.
    fn spawn(&self, program: &str, args: &[&str]) -> Running {
        let mut shell = Command::new("sh");
        shell
            .args(["-c", "echo $$ > \"$0\" && exec \"$@\""])
            .arg(self.cgroup.path().join("cgroup.procs"))
            .arg(program)
            .args(args)
            .stdout(Stdio::piped());
        let mut child = self.namespace.spawn(&mut shell).unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        Running { child, output }
    }

    fn python(&self, script: &str, args: &[&str]) -> Running {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/net/shortcut").join(script);
        self.spawn("python3", &[&[script.to_str().unwrap()], args].concat())
    }
}

/// A program that ends with its test.
struct Running {
    child: Child,
    output: BufReader<std::process::ChildStdout>,
}

impl Running {
    fn line(&mut self) -> String {
        let mut line = String::new();
        self.output.read_line(&mut line).unwrap();
        line.trim().to_owned()
    }

    /// Waits until it has ended well; returns what else it printed.
    fn finish(mut self) -> String {
        let mut rest = String::new();
        self.output.read_to_string(&mut rest).unwrap();
        assert!(self.child.wait().unwrap().success(), "it ended badly, after {rest}");
        rest.trim().to_owned()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn exchange(place: &Place, address: &str, target: &str, rounds: &str, max_size: &str) {
    let mut server = place.python("exchange.py", &["server", address, "0", rounds, max_size, "1"]);
    let port = server.line();
    let client = place.python("exchange.py", &["client", target, &port, rounds, max_size, "1"]);
    let client: Vec<_> = client.finish().split(' ').map(str::to_owned).collect();
    let server: Vec<_> = server.finish().split(' ').map(str::to_owned).collect();
    assert_eq!(client[0], server[1], "what the client sent is what the server received");
    assert_eq!(server[0], client[1], "what the server sent is what the client received");
}

#[test]
fn what_is_exchanged_is_the_same_with_and_without() {
    for on in [true, false] {
        for (address, target) in
            [("127.0.0.1", "127.0.0.1"), ("::1", "::1"), ("::", "127.0.0.1"), ("::", "::ffff:127.0.0.1")]
        {
            let place = Place::new(on);
            exchange(&place, address, target, "1000", "300000");
            let Some(shortcut) = &place.shortcut else { continue };
            let summary = shortcut.summary();
            println!("{address} from {target}: {summary:?}");
            assert_eq!(summary.total.accelerated, 1, "{address} {target}");
            assert!(summary.total.redirected_bytes > summary.total.tcp_bytes, "{address} {target}");
        }
    }
}
