//! With the guard the true answer arrives, without it the forged one; and the guard's
//! own life: changed in place, beside others, and gone.

use std::process::Command;

use aya::programs::{LinkOrder, SchedClassifier, TcAttachType, Xdp, XdpMode, tc::TcAttachOptions};
use underpass::{dnsguard::forgery::INJECTORS, object};

use super::{FORGED, GOOGLE, Lab, TRUTH, UNDERPASS, site, text, unbound, wait_for};

/// A lab with unbound as the resolver.
fn lab() -> (Lab, tempfile::TempDir, Vec<super::Server>) {
    let lab = Lab::new();
    let folder = tempfile::tempdir().unwrap();
    let servers = unbound(&lab.resolver, folder.path());
    wait_for("unbound", || lab.dig(GOOGLE[0], &["www.example.org", "A"]) == TRUTH[0]);
    (lab, folder, servers)
}

/// What glibc's stub resolver and curl make of the name, by a resolv.conf of their own.
fn by_resolv_conf(lab: &Lab, folder: &std::path::Path, command: &str) -> String {
    let conf = folder.join("resolv.conf");
    std::fs::write(&conf, format!("nameserver {}\noptions timeout:2 attempts:2\n", GOOGLE[0])).unwrap();
    let script = format!("mount --bind {} /etc/resolv.conf && exec {command}", conf.display());
    lab.run(Command::new("unshare").args(["--mount", "sh", "-c", &script]))
}

#[test]
fn every_known_forgery_wins_without_the_guard_and_loses_with_it() {
    let (mut lab, folder, _servers) = lab();
    site(&lab.client, TRUTH[0], "the true site");
    site(&lab.client, FORGED[0], "the forged site");
    for hook in ["xdp", "xdp-generic", "tc"] {
        for injector in INJECTORS {
            lab.wire.inject(&[injector]);
            let name = injector.name;
            // The hooks differ in the kernel only: one shows that the forgeries win.
            if hook == "xdp" {
                assert_eq!(lab.dig(GOOGLE[0], &["www.example.org", "A"]), FORGED[0], "{name}");
                assert_eq!(lab.dig(GOOGLE[1], &["www.example.org", "AAAA"]), FORGED[1], "{name}");
                let page =
                    by_resolv_conf(&lab, folder.path(), "curl -s4 --max-time 10 http://www.example.org/");
                assert_eq!(page, "the forged site", "{name}");
                let stub = by_resolv_conf(&lab, folder.path(), "getent ahostsv4 www.example.org");
                assert!(stub.contains(FORGED[0]), "{name}: {stub}");
            }
            lab.guard(&["--hook", hook]);
            assert_eq!(lab.dig(GOOGLE[0], &["www.example.org", "A"]), TRUTH[0], "{name} by {hook}");
            assert_eq!(lab.dig(GOOGLE[1], &["www.example.org", "AAAA"]), TRUTH[1], "{name} by {hook}");
            if hook == "xdp" {
                let page =
                    by_resolv_conf(&lab, folder.path(), "curl -s4 --max-time 10 http://www.example.org/");
                assert_eq!(page, "the true site", "{name}");
                let stub = by_resolv_conf(&lab, folder.path(), "getent ahostsv4 www.example.org");
                assert!(stub.contains(TRUTH[0]) && !stub.contains(FORGED[0]), "{name}: {stub}");
            }
            let shown = lab.show();
            assert_eq!(shown["hook"], hook);
            assert!(shown["packets"]["dropped"].as_u64().unwrap() >= 2, "{shown}");
            let samples = shown["samples"].as_array().unwrap();
            let dropped = samples.iter().find(|sample| sample["verdict"] == "drop").unwrap();
            assert_eq!(dropped["name"], "www.example.org.");
            lab.unguard();
        }
    }
}

#[test]
fn a_change_leaves_no_gap() {
    let (mut lab, _folder, _servers) = lab();
    lab.wire.inject(&INJECTORS[..1]);
    lab.guard(&[]);
    std::thread::scope(|scope| {
        let lab = &lab;
        let asking = scope.spawn(|| -> Vec<_> {
            (0..60)
                .map(|_| lab.dig(GOOGLE[0], &["www.example.org", "A"]))
                .filter(|got| got != TRUTH[0])
                .collect()
        });
        for round in 0..20 {
            let rules = if round % 2 == 0 { ["--resolver", GOOGLE[0]] } else { ["--hook", "auto"] };
            let output = lab.output(Command::new(UNDERPASS).args(["dnsguard", "attach", "eth0"]).args(rules));
            assert!(output.status.success(), "{}", text(&output));
        }
        assert_eq!(asking.join().unwrap(), Vec::<String>::new(), "not the true answer");
    });
    // What was counted before counts still.
    assert!(lab.show()["packets"]["dropped"].as_u64().unwrap() >= 60);
    // To another hook it does not let anything through either.
    for hook in ["tc", "xdp", "tc", "xdp-generic"] {
        lab.guard(&["--hook", hook]);
        assert_eq!(lab.dig(GOOGLE[0], &["www.example.org", "A"]), TRUTH[0], "{hook}");
    }
}

#[test]
fn a_dry_run_drops_nothing_and_shows_what_it_would() {
    let (mut lab, _folder, _servers) = lab();
    lab.wire.inject(&INJECTORS[..1]);
    lab.guard(&["--dry-run"]);
    assert_eq!(lab.dig(GOOGLE[0], &["www.example.org", "A"]), FORGED[0]);
    let shown = lab.show();
    assert_eq!(shown["dry_run"], true);
    let rule =
        shown["rules"].as_array().unwrap().iter().find(|rule| rule["rule"] == "authoritative").unwrap();
    assert_eq!(rule["hits"], 1, "{shown}");
}

#[test]
fn dns_over_tcp_is_not_touched() {
    let (mut lab, _folder, _servers) = lab();
    lab.wire.inject(&INJECTORS[..1]);
    lab.guard(&["--resolver", "any"]);
    // The wire mends no TCP checksums, so TCP stays on the resolver's side here: what
    // is shown is that the client's guard sees no DNS in it.
    let before = lab.show()["packets"]["not_dns"].as_u64().unwrap();
    let _ = lab.dig(GOOGLE[0], &["+tcp", "+time=1", "+tries=1", "www.example.org", "A"]);
    let shown = lab.show();
    assert_eq!(shown["packets"]["dropped"], 0, "{shown}");
    assert!(shown["packets"]["not_dns"].as_u64().unwrap() >= before);
}

#[test]
fn beside_another_xdp_program_it_takes_tc_and_names_it() {
    let mut lab = Lab::new();
    let mut other = aya::Ebpf::load(object::PACKET).unwrap();
    let program: &mut Xdp = other.program_mut("packet_pass_xdp").unwrap().try_into().unwrap();
    program.load().unwrap();
    let index = lab.client.index("eth0").unwrap();
    lab.client.enter(|| program.attach_to_if_index(index, XdpMode::Driver)).unwrap();
    let said = lab.guard(&[]);
    assert!(said.contains("tc") && said.contains("packet_pass_xdp"), "{said}");
    let status = lab.run(Command::new(UNDERPASS).arg("status"));
    assert!(status.contains("packet_pass_xdp"), "{status}");
    lab.unguard();
    let refused = lab.output(Command::new(UNDERPASS).args(["dnsguard", "attach", "eth0", "--hook", "xdp"]));
    assert_eq!(refused.status.code(), Some(3));
    assert!(text(&refused).contains("packet_pass_xdp"), "{}", text(&refused));
}

#[test]
fn detach_leaves_nothing_behind() {
    let mut lab = Lab::new();
    let key = super::pin_of(&lab.client);
    for hook in ["xdp", "xdp-generic", "tc"] {
        lab.guard(&["--hook", hook]);
        assert!(underpass::pins::Folder::find("dnsguard", &key).is_some());
        let links = lab.run(Command::new("ip").args(["-d", "link", "show", "eth0"]));
        assert_eq!(links.contains("prog/xdp"), hook != "tc", "{links}");
        lab.unguard();
        assert!(underpass::pins::Folder::find("dnsguard", &key).is_none());
        let links = lab.run(Command::new("ip").args(["-d", "link", "show", "eth0"]));
        assert!(!links.contains("prog/xdp") && !links.contains("clsact"), "{links}");
    }
}

/// Takes every place for a TCX link of the client's interface, so that attaching another
/// fails as it does on kernels that have none.
fn fill_tcx(lab: &Lab) -> Vec<aya::Ebpf> {
    let mut full = vec![];
    // The kernel has 64 places at most.
    while full.len() < 64 {
        let mut object = aya::Ebpf::load(object::PACKET).unwrap();
        let program: &mut SchedClassifier = object.program_mut("packet_bare_tc").unwrap().try_into().unwrap();
        program.load().unwrap();
        for at in [TcAttachType::Ingress, TcAttachType::Egress] {
            let last = TcAttachOptions::TcxOrder(LinkOrder::last());
            if lab.client.enter(|| program.attach_with_options("eth0", at, last)).is_err() {
                return full;
            }
        }
        full.push(object);
    }
    panic!("there was room for {} programs", full.len())
}

#[test]
fn without_tcx_links_a_netlink_filter_guards() {
    let (mut lab, _folder, _servers) = lab();
    lab.wire.inject(&INJECTORS[..1]);
    let filters = |lab: &Lab| {
        let show = |at: &str| lab.run(Command::new("tc").args(["filter", "show", "dev", "eth0", at]));
        [show("ingress"), show("egress")]
    };
    let full = fill_tcx(&lab);
    lab.guard(&["--hook", "tc"]);
    drop(full);
    let [ingress, egress] = filters(&lab);
    assert!(ingress.contains("dnsguard_tc") && egress.contains("dnsguard_egress"), "{ingress}{egress}");
    assert_eq!(lab.dig(GOOGLE[0], &["www.example.org", "A"]), TRUTH[0]);
    assert_eq!(lab.dig(GOOGLE[1], &["www.example.org", "AAAA"]), TRUTH[1]);
    // A change is in place: still one filter each, and what was counted stays.
    lab.guard(&["--resolver", GOOGLE[0]]);
    assert_eq!(lab.dig(GOOGLE[0], &["www.example.org", "A"]), TRUTH[0]);
    let shown = lab.show();
    assert_eq!(shown["hook"], "tc");
    assert!(shown["packets"]["dropped"].as_u64().unwrap() >= 3, "{shown}");
    assert!(shown["packets"]["queries"].as_u64().unwrap() >= 3, "{shown}");
    for text in filters(&lab) {
        assert_eq!(text.matches("direct-action").count(), 1, "{text}");
    }
    // From there to XDP: the filter for answers goes, the one for queries stays.
    lab.guard(&["--hook", "xdp"]);
    let [ingress, egress] = filters(&lab);
    assert!(ingress.trim().is_empty() && egress.contains("dnsguard_egress"), "{ingress}{egress}");
    assert_eq!(lab.dig(GOOGLE[0], &["www.example.org", "A"]), TRUTH[0]);
    lab.unguard();
    let qdiscs = lab.run(Command::new("tc").args(["qdisc", "show", "dev", "eth0"]));
    assert!(!qdiscs.contains("clsact"), "{qdiscs}");
}

#[test]
fn a_guard_whose_interface_is_gone_is_said_to_be() {
    let mut lab = Lab::new();
    lab.guard(&[]);
    let key = super::pin_of(&lab.client);
    lab.run(Command::new("ip").args(["link", "del", "eth0"]));
    let status = lab.run(Command::new(UNDERPASS).arg("status"));
    assert!(status.contains("the interface is gone"), "{status}");
    lab.unguard();
    assert!(underpass::pins::Folder::find("dnsguard", &key).is_none());
}

#[test]
fn a_down_interface_is_guarded_with_a_warning() {
    let mut lab = Lab::new();
    lab.run(Command::new("ip").args(["link", "set", "eth0", "down"]));
    let said = lab.guard(&[]);
    assert!(said.contains("warning: eth0 is down"), "{said}");
}

#[test]
fn an_exported_object_is_taken_by_the_kernel() {
    let lab = Lab::new();
    let folder = tempfile::tempdir().unwrap();
    let object = folder.path().join("guard.o");
    lab.run(Command::new(UNDERPASS).args(["dnsguard", "export"]).arg(&object));
    let link = ["link", "set", "dev", "eth0", "xdpgeneric"];
    let taken = lab.output(Command::new("ip").args(link).arg("obj").arg(&object));
    assert!(taken.status.success(), "{}", text(&taken));
    lab.run(Command::new("ip").args(link).arg("off"));
}

#[test]
fn iproute2_loads_an_exported_object() {
    let (lab, folder, _servers) = lab();
    let object = folder.path().join("guard.o");
    let rules = folder.path().join("rules.toml");
    std::fs::write(&rules, format!("[rules.bogus-address]\naddresses = [{:?}, \"10.0.0.0/8\"]\n", FORGED[1]))
        .unwrap();
    let export = lab
        .output(Command::new(UNDERPASS).args(["dnsguard", "export"]).arg(&object).arg("--rules").arg(&rules));
    assert!(export.status.success(), "{}", text(&export));
    for (mode, shown) in [("xdp", "xdp "), ("xdpgeneric", "xdpgeneric ")] {
        let link = |args: &[&std::ffi::OsStr]| {
            let output = lab.output(Command::new("ip").args(["link", "set", "dev", "eth0", mode]).args(args));
            assert!(output.status.success(), "{mode}: {}", text(&output));
        };
        link(&["obj".as_ref(), object.as_os_str()]);
        assert!(lab.run(Command::new("ip").args(["link", "show", "eth0"])).contains(shown));
        for injector in INJECTORS {
            lab.wire.inject(&[injector]);
            assert_eq!(lab.dig(GOOGLE[0], &["www.example.org", "A"]), TRUTH[0], "{mode}: {}", injector.name);
            // Its address is on the list.
            assert_eq!(
                lab.dig(GOOGLE[1], &["www.example.org", "AAAA"]),
                TRUTH[1],
                "{mode}: {}",
                injector.name
            );
        }
        link(&["off".as_ref()]);
    }
}
