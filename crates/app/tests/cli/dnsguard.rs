//! dnsguard without privileges: captures judged, and what is refused.

use std::{
    fs,
    path::Path,
    process::{Command, Output},
    time::Duration,
};

use pcap_file::{
    DataLink, Endianness, TsResolution,
    pcap::{PcapHeader, PcapPacket, PcapWriter},
    pcapng::{
        PcapNgWriter,
        blocks::{enhanced_packet::EnhancedPacketBlock, interface_description::InterfaceDescriptionBlock},
    },
};
use serde_json::Value;
use underpass::dnsguard::forgery::{HONEST, INJECTORS, answer, query};

fn underpass(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_underpass")).arg("dnsguard").args(args).output().unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Each known forgery and an honest answer, after a query each.
fn frames(client: &str, resolver: &str, address: &str) -> Vec<Vec<u8>> {
    let kind = if address.contains(':') { 28 } else { 1 };
    let mut frames = vec![];
    for (id, injector) in INJECTORS.iter().chain([&HONEST]).enumerate() {
        let asked = query(
            (client.parse().unwrap(), 4000),
            resolver.parse().unwrap(),
            ("www.example.org", kind),
            id as u16,
            true,
        );
        let honest = injector == &HONEST;
        let answered = answer(&asked, injector, address.parse().unwrap(), honest).unwrap();
        frames.extend([asked, answered]);
    }
    frames
}

fn write_pcap(path: &Path, link: DataLink, frames: &[Vec<u8>]) {
    let header = PcapHeader {
        datalink: link,
        endianness: Endianness::Little,
        ts_resolution: TsResolution::NanoSecond,
        ..PcapHeader::default()
    };
    let mut writer = PcapWriter::with_header(fs::File::create(path).unwrap(), header).unwrap();
    for (nth, frame) in frames.iter().enumerate() {
        let packet = PcapPacket::new(Duration::from_millis(nth as u64), frame.len() as u32, frame);
        writer.write_packet(&packet).unwrap();
    }
}

fn write_pcapng(path: &Path, frames: &[Vec<u8>]) {
    let mut writer = PcapNgWriter::new(fs::File::create(path).unwrap()).unwrap();
    let interface =
        InterfaceDescriptionBlock { linktype: DataLink::ETHERNET, snaplen: 0xffff, options: vec![] };
    writer.write_pcapng_block(interface).unwrap();
    for frame in frames {
        let block = EnhancedPacketBlock {
            interface_id: 0,
            timestamp: Duration::ZERO,
            original_len: frame.len() as u32,
            data: frame.as_slice().into(),
            options: vec![],
        };
        writer.write_pcapng_block(block).unwrap();
    }
}

/// The lines of `check --json`: the answers, and the summary.
fn check(path: &Path) -> (Vec<Value>, Value) {
    let output = underpass(&["check", path.to_str().unwrap(), "--json"]);
    assert!(output.status.success(), "{}", stderr(&output));
    let text = String::from_utf8(output.stdout).unwrap();
    let mut lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let summary = lines.pop().unwrap()["summary"].clone();
    (lines, summary)
}

#[test]
fn check_judges_captures_of_both_formats_and_families() {
    let folder = tempfile::tempdir().unwrap();
    let v4 = frames("192.0.2.10", "8.8.8.8", "203.0.113.66");
    let v6 = frames("2001:db8::10", "2001:4860:4860::8888", "2001:db8:66::66");
    for frames in [v4, v6] {
        let (pcap, pcapng) = (folder.path().join("a.pcap"), folder.path().join("a.pcapng"));
        write_pcap(&pcap, DataLink::ETHERNET, &frames);
        write_pcapng(&pcapng, &frames);
        for path in [pcap, pcapng] {
            let (lines, summary) = check(&path);
            assert_eq!(lines.len(), INJECTORS.len() + 1);
            for (nth, line) in lines.iter().enumerate() {
                let forged = nth < INJECTORS.len();
                assert_eq!(line["packet"], nth as u64 * 2 + 2);
                assert_eq!(line["verdict"], if forged { "drop" } else { "pass" }, "{line}");
                assert_eq!(line["rules"].as_array().unwrap().is_empty(), !forged, "{line}");
                assert_eq!(line["name"], "www.example.org.");
            }
            assert_eq!(summary["packets"], frames.len() as u64);
            assert_eq!(summary["dropped"], INJECTORS.len() as u64);
            assert_eq!(summary["passed"], 1);
        }
    }
}

#[test]
fn check_reads_links_without_ethernet() {
    let folder = tempfile::tempdir().unwrap();
    let frames = frames("192.0.2.10", "8.8.8.8", "203.0.113.66");
    let cut = |prefix: &[u8]| -> Vec<Vec<u8>> {
        frames.iter().map(|frame| [prefix, &frame[14..]].concat()).collect()
    };
    let cooked = [&[0, 0, 0, 1, 0, 6][..], &[0; 8], &[8, 0]].concat();
    for (link, frames) in [
        (DataLink::RAW, cut(&[])),
        (DataLink::NULL, cut(&[2, 0, 0, 0])),
        (DataLink::LINUX_SLL, cut(&cooked)),
        (DataLink::LINUX_SLL2, cut(&[&[8, 0][..], &[0; 18]].concat())),
    ] {
        let path = folder.path().join("link.pcap");
        write_pcap(&path, link, &frames);
        assert_eq!(check(&path).1["dropped"], INJECTORS.len() as u64, "{link:?}");
    }
}

#[test]
fn check_prints_totals_for_people() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.pcap");
    write_pcap(&path, DataLink::ETHERNET, &frames("192.0.2.10", "8.8.8.8", "203.0.113.66"));
    let output = underpass(&["check", path.to_str().unwrap()]);
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains("14 packets, 7 DNS answers: 1 pass, 6 drop"), "{text}");
    assert!(text.contains("drop www.example.org. from 8.8.8.8"), "{text}");
}

#[test]
fn what_is_no_capture_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.pcap");
    for (bytes, expected) in [
        (&b""[..], "shorter than a file header"),
        (b"hello, this is text", "is no capture"),
        (&[0xd4, 0xc3, 0xb2, 0xa1, 2, 0], "is no capture"),
    ] {
        fs::write(&path, bytes).unwrap();
        let output = underpass(&["check", path.to_str().unwrap()]);
        assert_eq!(output.status.code(), Some(2));
        assert!(stderr(&output).contains(expected), "{}", stderr(&output));
    }
    let output = underpass(&["check", "/nowhere/at/all.pcap"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("/nowhere/at/all.pcap"), "{}", stderr(&output));
}

#[test]
fn a_capture_that_breaks_off_says_where() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.pcap");
    write_pcap(&path, DataLink::ETHERNET, &frames("192.0.2.10", "8.8.8.8", "203.0.113.66"));
    let whole = fs::read(&path).unwrap();
    fs::write(&path, &whole[..whole.len() - 5]).unwrap();
    let output = underpass(&["check", path.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("broken after packet 13"), "{}", stderr(&output));
}

#[test]
fn a_wrong_rules_file_names_line_and_key() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("rules.toml");
    let capture = folder.path().join("a.pcap");
    write_pcap(&capture, DataLink::ETHERNET, &[]);
    for (text, expected) in [
        ("[rules]\nip-id-zer0 = { mode = \"off\" }\n", &["line 2", "ip-id-zer0", "ip-id-zero"][..]),
        ("[rules]\n\nip-id-zero = { mode = \"sometimes\" }\n", &["line 3", "sometimes", "paired"]),
        ("[rules.ttl-deviates]\nremember = \"soon\"\n", &["line 2", "soon", "30s"]),
        ("[rules.bogus-address]\naddresses = [\"1.2.3\"]\n", &["line 2", "1.2.3", "address"]),
        ("[resolver.\"10.9.8.7\"]\nfull-name = \"alone\"\n", &["10.9.8.7", "--resolver"]),
        (
            "[[pattern]]\nname = \"x\"\nlayer = \"dns\"\noffset = 2\nbytes = \"8400\"\nmode = \"alone\"\n",
            &["line 5", "0x8400"],
        ),
        (
            "[[pattern]]\nname = \"no-edns\"\nlayer = \"dns\"\noffset = 2\nbytes = \"0x84\"\nmode = \"alone\"\n",
            &["no-edns", "already"],
        ),
        ("[rules.bogus-address]\nfile = \"missing.txt\"\n", &["missing.txt"]),
    ] {
        fs::write(&path, text).unwrap();
        let output = underpass(&["check", capture.to_str().unwrap(), "--rules", path.to_str().unwrap()]);
        assert_eq!(output.status.code(), Some(2), "{text}");
        let said = stderr(&output);
        for word in [path.file_name().unwrap().to_str().unwrap()].iter().chain(expected) {
            let elsewhere = *word == "rules.toml" && expected == ["missing.txt"];
            assert!(elsewhere || said.contains(word), "{word:?} is not in: {said}");
        }
    }
}

#[test]
fn an_unknown_resolver_or_interface_is_refused() {
    let output = underpass(&["attach", "lo", "--resolver", "nonsense"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("an IP address or `any`"), "{}", stderr(&output));
    let output = underpass(&["attach", "no-such-if"]);
    assert_eq!(output.status.code(), Some(2));
    let said = stderr(&output);
    assert!(said.contains("no-such-if") && said.contains("there are: lo"), "{said}");
    let output = underpass(&["detach", "no-such-if"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("not attached"), "{}", stderr(&output));
}

#[test]
fn without_privileges_it_says_what_is_missing() {
    if !nix::unistd::geteuid().is_root() {
        return;
    }
    let output = Command::new("setpriv")
        .args(["--reuid", "65534", "--clear-groups", "--bounding-set=-all", "--inh-caps=-all"])
        .args([env!("CARGO_BIN_EXE_underpass"), "dnsguard", "attach", "lo"])
        .output()
        .unwrap();
    // Where the build folder is closed to others, there is nothing to start.
    if stderr(&output).contains("setpriv:") {
        println!("skipped: another user cannot start the binary here");
        return;
    }
    assert_eq!(output.status.code(), Some(3), "{}", stderr(&output));
    assert!(stderr(&output).contains("root"), "{}", stderr(&output));
}

#[test]
fn an_exported_object_has_its_settings_in_it() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("guard.o");
    let output = underpass(&["export", path.to_str().unwrap(), "--resolver", "198.51.100.53"]);
    assert!(output.status.success(), "{}", stderr(&output));
    let object = fs::read(&path).unwrap();
    let mapped = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 198, 51, 100, 53];
    assert!(object.windows(16).any(|window| window == mapped));
    assert!(object.windows(5).any(|window| window == b"prog\0"));
    let bogus = folder.path().join("rules.toml");
    let many: Vec<_> = (0..600).map(|n| format!("\"10.0.{}.{}\"", n / 100, n % 100 * 2)).collect();
    let many = many.join(",");
    fs::write(&bogus, format!("[rules.bogus-address]\naddresses = [{many}]\n")).unwrap();
    let output = underpass(&["export", path.to_str().unwrap(), "--rules", bogus.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("at most 512"), "{}", stderr(&output));
}
