use std::{boxed::Box, format, string::String, vec, vec::Vec};

use proptest::prelude::*;

use super::{
    Decision, Matcher, Opening, Pattern, Verdict,
    frame::Frame,
    http,
    table::{self, Misfit, Route},
};

/// Builds ClientHellos.
#[derive(Clone)]
struct Hello {
    sni: Option<&'static str>,
    alpn: &'static [&'static str],
    padding: usize,
    /// The most bytes of handshake that a record has.
    record: usize,
}

impl Default for Hello {
    fn default() -> Self {
        Self { sni: Some("www.example.org"), alpn: &["h2", "http/1.1"], padding: 0, record: 1 << 14 }
    }
}

impl Hello {
    fn bytes(&self) -> Vec<u8> {
        let mut extensions = extension(0x0015, &vec![0; self.padding]);
        if let Some(name) = self.sni {
            let entry = [&[0][..], &prefixed(name.as_bytes())].concat();
            extensions.extend(extension(0, &prefixed(&entry)));
        }
        // A hybrid key share as browsers send: X25519MLKEM768 has 1216 bytes.
        extensions.extend(extension(0x0033, &[0x5a; 1216]));
        if !self.alpn.is_empty() {
            let list: Vec<u8> = self
                .alpn
                .iter()
                .flat_map(|protocol| [&[protocol.len() as u8][..], protocol.as_bytes()].concat())
                .collect();
            extensions.extend(extension(16, &prefixed(&list)));
        }
        let mut body = vec![3, 3];
        body.extend([7; 32]);
        body.extend([32].iter().chain(&[9; 32])); // session id
        body.extend(prefixed(&[0x13, 1, 0x13, 2])); // cipher suites
        body.extend([1, 0]); // compression methods
        body.extend(prefixed(&extensions));
        let mut hello = vec![1, 0];
        hello.extend(prefixed(&body));
        hello.chunks(self.record).flat_map(|part| [&[22, 3, 1][..], &prefixed(part)].concat()).collect()
    }
}

fn prefixed(bytes: &[u8]) -> Vec<u8> {
    [&(bytes.len() as u16).to_be_bytes(), bytes].concat()
}

fn extension(kind: u16, value: &[u8]) -> Vec<u8> {
    [&kind.to_be_bytes()[..], &prefixed(value)].concat()
}

const SNI: Matcher<'_> = Matcher::Sni(Pattern("www.example.org"));
const OTHER_SNI: Matcher<'_> = Matcher::Sni(Pattern("mail.example.org"));
const H2: Matcher<'_> = Matcher::Alpn(b"h2");
const H1: Matcher<'_> = Matcher::Alpn(b"http/1.1");

fn verdict(bytes: &[u8], matcher: Matcher<'_>) -> Verdict {
    Opening::new(bytes).verdict(&matcher)
}

/// What a matcher says in the end, when its bytes come one by one; checks on the
/// way that nothing is taken back and that what it waits for is ahead.
fn said_in_pieces(bytes: &[u8], matcher: Matcher<'_>) -> Verdict {
    let mut said = Verdict::More(0);
    for end in 0..=bytes.len() {
        let now = verdict(&bytes[..end], matcher);
        match (said, now) {
            (Verdict::More(_), Verdict::More(need)) => assert!(need > end, "waits for {need} at {end}"),
            (Verdict::More(_), _) => {}
            (before, now) => assert_eq!(before, now, "took its word back at byte {end}"),
        }
        said = now;
    }
    said
}

#[test]
fn a_hello_is_read_however_it_is_cut() {
    for record in [1, 2, 5, 50, 1000, 1 << 14] {
        let bytes = Hello { record, ..Hello::default() }.bytes();
        for (matcher, wanted) in [
            (Matcher::Tls, Verdict::Match),
            (SNI, Verdict::Match),
            (OTHER_SNI, Verdict::Miss),
            (H2, Verdict::Match),
            (H1, Verdict::Match),
            (Matcher::Alpn(b"h"), Verdict::Miss),
            (Matcher::Alpn(b"acme-tls/1"), Verdict::Miss),
            (Matcher::Ssh, Verdict::Miss),
            (Matcher::Http, Verdict::Miss),
        ] {
            assert_eq!(said_in_pieces(&bytes, matcher), wanted, "{matcher:?}, records of {record}");
        }
    }
}

#[test]
fn a_hello_without_the_extension_misses() {
    let bare = Hello { sni: None, alpn: &[], ..Hello::default() }.bytes();
    assert_eq!(said_in_pieces(&bare, SNI), Verdict::Miss);
    assert_eq!(said_in_pieces(&bare, Matcher::Sni(Pattern("*"))), Verdict::Miss);
    assert_eq!(said_in_pieces(&bare, H2), Verdict::Miss);
    assert_eq!(said_in_pieces(&bare, Matcher::Tls), Verdict::Match);
}

#[test]
fn a_hello_without_any_extensions_is_one() {
    let mut body = vec![3, 1];
    body.extend([7; 32]);
    body.extend([0, 0, 2, 0x13, 1, 1, 0]);
    let hello = [&[1, 0][..], &prefixed(&body)].concat();
    let bytes = [&[22, 3, 1][..], &prefixed(&hello)].concat();
    assert_eq!(said_in_pieces(&bytes, Matcher::Tls), Verdict::Match);
    assert_eq!(said_in_pieces(&bytes, SNI), Verdict::Miss);
}

#[test]
fn a_name_before_64_kib_of_padding_is_found_without_it() {
    // The padding does not fit a hello's extensions and their own length in one,
    // but who reads front to back meets the name first.
    let bytes = Hello { sni: None, padding: 60_000, record: 16_000, ..Hello::default() }.bytes();
    let early = &bytes[..16_384];
    assert!(matches!(verdict(early, SNI), Verdict::More(need) if need > early.len()));
    assert_eq!(Opening::new(early).decide([SNI, Matcher::Tls], true), Decision::Route(1));
}

#[test]
fn tls_is_told_by_its_first_six_bytes() {
    for (bytes, wanted) in [
        (&[22, 3, 1, 2, 0, 1][..], Verdict::Match),
        (&[22, 3, 3, 0, 1, 1], Verdict::Match),
        (&[22, 3, 1, 2, 0, 2], Verdict::Miss),    // a ServerHello
        (&[22, 3, 9, 2, 0, 1], Verdict::Miss),    // no version yet
        (&[22, 3, 1, 0x41, 0, 1], Verdict::Miss), // too long for a record
        (&[22, 3, 1, 0, 0], Verdict::Miss),       // empty
        (&[23, 3, 1, 2, 0, 1], Verdict::Miss),    // application data
        (&[0x80, 0x2e, 1, 3, 1], Verdict::Miss),  // SSL 2
        (&[22, 3, 1], Verdict::More(6)),
        (&[], Verdict::More(6)),
    ] {
        assert_eq!(verdict(bytes, Matcher::Tls), wanted, "{bytes:?}");
    }
}

#[test]
fn http_is_told_by_its_method_or_its_whole_line() {
    for (bytes, wanted) in [
        (&b"GET / HTTP/1.1\r\n"[..], Verdict::Match),
        (b"GET ", Verdict::Match),
        (b"\r\nPOST ", Verdict::Match),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", Verdict::Match),
        (b"M-SEARCH * HTTP/1.1\r\n", Verdict::Match),
        (b"M-SEARCH * HTTP", Verdict::More(16)),
        (b"HELO example.org\r\n", Verdict::Miss),
        (b"GE", Verdict::More(3)),
        (b"", Verdict::More(1)),
        (b"\r", Verdict::More(2)),
        (b"get / HTTP/1.1\r\n", Verdict::Miss),
        (b"SSH-2.0-OpenSSH_9.2", Verdict::Miss),
        (b"ABCDEFGHIJKLMNOPQRSTUVWXYZ", Verdict::Miss),
        (b" / HTTP/1.1\r\n", Verdict::Miss),
    ] {
        assert_eq!(verdict(bytes, Matcher::Http), wanted, "{}", String::from_utf8_lossy(bytes));
    }
}

#[test]
fn the_host_is_found() {
    use http::Host::{Is, More, None};
    for (request, wanted) in [
        ("GET / HTTP/1.1\r\nHost: a.example\r\n\r\n", Is(b"a.example")),
        ("GET / HTTP/1.1\nhOsT:a.example:8080 \n\n", Is(b"a.example")),
        ("GET / HTTP/1.1\r\nAccept: */*\r\nHost: [fd00::1]:80\r\n\r\n", Is(b"fd00::1")),
        ("GET http://u:p@b.example:80/x HTTP/1.1\r\nHost: a.example\r\n\r\n", Is(b"b.example")),
        ("GET /?u=http://b.example/ HTTP/1.1\r\nHost: a.example\r\n\r\n", Is(b"a.example")),
        ("GET / HTTP/1.0\r\n\r\nHost: a.example\r\n", None),
        ("GET / HTTP/1.1\r\nHost:\r\n\r\n", None),
        ("GET / HTTP/2.0\r\nHost: a.example\r\n\r\n", None),
        ("GET / HTTP/1.1\r\nHost: a.exa", More(28)),
        ("EHLO a.example\r\n", None),
    ] {
        assert_eq!(http::host(request.as_bytes()), wanted, "{request:?}");
    }
}

#[test]
fn names_fit_patterns() {
    for (pattern, name, fits) in [
        ("www.example.org", "WWW.Example.org", true),
        ("www.example.org", "www.example.org.", true),
        ("www.example.org", "ww.example.org", false),
        ("*.example.org", "a.example.org", true),
        ("*.example.org", "a.b.example.org", true),
        ("*.example.org", "example.org", false),
        ("*.example.org", ".example.org", false),
        ("*.example.org", "aexample.org", false),
        ("*", "anything", true),
        ("*", "", false),
    ] {
        assert_eq!(Pattern(pattern).matches(name.as_bytes()), fits, "{pattern} {name}");
    }
    for (one, other, covers) in [
        ("*.example.org", "a.example.org", true),
        ("*.example.org", "*.b.example.org", true),
        ("*.b.example.org", "*.example.org", false),
        ("*.example.org", "*.example.org", true),
        ("*", "*.example.org", true),
        ("*.example.org", "*", false),
        ("a.example.org", "*.example.org", false),
        ("a.example.org", "A.example.org", true),
        ("*.example.org", "*.anexample.org", false),
    ] {
        assert_eq!(Pattern(one).covers(&Pattern(other)), covers, "{one} {other}");
    }
}

#[test]
fn the_first_route_that_matches_wins_and_what_is_unsure_is_waited_for() {
    let routes = [Matcher::Bytes { offset: 2, bytes: b"xyz" }, Matcher::Ssh, Matcher::Http];
    let decide = |bytes: &[u8], last| Opening::new(bytes).decide(routes, last);
    assert_eq!(decide(b"", false), Decision::More(5));
    assert_eq!(decide(b"SSH-", false), Decision::Route(1));
    assert_eq!(decide(b"SSxy", false), Decision::More(5));
    assert_eq!(decide(b"SSxyz", false), Decision::Route(0));
    assert_eq!(decide(b"GET", false), Decision::More(4));
    assert_eq!(decide(b"GET", true), Decision::None);
    assert_eq!(decide(b"\0\0\0", false), Decision::None);
}

#[test]
fn frames_tell_where_a_message_ends() {
    let u16be = Frame::Length { width: 2, offset: 1, plus: 0 };
    assert_eq!(u16be.length(&[9, 1]), Ok(None));
    assert_eq!(u16be.length(&[9, 1, 2]), Ok(Some(0x102)));
    assert_eq!(u16be.length(&[9, 0, 2]).unwrap_err().says, 2);
    let u32be = Frame::Length { width: 4, offset: 0, plus: 4 };
    assert_eq!(u32be.length(&[0; 4]), Ok(Some(4)));
    assert_eq!(u32be.length(&[0xff; 4]), Ok(Some((1 << 32) + 3)));
    assert_eq!(Frame::Fixed(7).length(&[]), Ok(Some(7)));
}

fn table(routes: &[(u16, Vec<u8>)]) -> Result<Box<underpass_abi::mux::Table>, (usize, Misfit)> {
    let mut table = Box::new(table::EMPTY);
    let routes = routes.iter().enumerate().map(|(index, (offset, tag))| Route {
        offset: *offset,
        tag,
        port: index as u16,
        counter: index as u16,
    });
    table::build(&mut table, routes)?;
    Ok(table)
}

#[test]
fn a_full_table_finds_all_it_holds() {
    let routes: Vec<_> = (0..1024_u16).map(|i| (i % 32 * 3, format!("{i:04}").into_bytes())).collect();
    let table = table(&routes).unwrap();
    for (index, (offset, tag)) in routes.iter().enumerate() {
        let mut payload = vec![b'-'; usize::from(*offset)];
        payload.extend(tag);
        assert_eq!(table::find_in(&table, &payload).map(|slot| slot.port), Some(index as u16));
        payload.pop();
        assert_eq!(table::find_in(&table, &payload), None);
    }
    let back: Vec<_> = table::routes(&table)
        .map(|slot| {
            let (offset, window, length) = table::tag(&table, slot);
            (offset, window[16 - length..].to_vec())
        })
        .collect();
    assert_eq!(back, routes);
}

#[test]
fn tags_that_count_up_fill_a_table_in_one_place_whatever_their_length() {
    for (length, radix) in [(2, 40), (3, 16), (4, 10), (8, 10), (9, 10), (16, 10)] {
        for offset in [0, 20] {
            let digits = |mut value: u32| {
                let mut tag = vec![b'0'; length];
                for digit in tag.iter_mut().rev() {
                    *digit = b'0' + (value % radix) as u8;
                    value /= radix;
                }
                (offset, tag)
            };
            let routes: Vec<_> = (0..1024).map(digits).collect();
            let table = table(&routes).unwrap_or_else(|why| panic!("{length} digits of {radix}: {why:?}"));
            for (index, (_, tag)) in routes.iter().enumerate() {
                let payload = [&vec![b'-'; usize::from(offset)][..], tag].concat();
                assert_eq!(table::find_in(&table, &payload).map(|slot| slot.port), Some(index as u16));
            }
        }
    }
}

#[test]
fn what_does_not_fit_a_table_is_named() {
    let tag = |i: usize| (0, format!("{i:05}").into_bytes());
    let tags = |count| (0..count).map(tag).collect::<Vec<_>>();
    let misfit = |routes: &[_]| table(routes).unwrap_err();
    assert_eq!(misfit(&tags(1025)), (1024, Misfit::Routes));
    assert_eq!(misfit(&[tag(1), tag(2), tag(1)]), (2, Misfit::Twice));
    assert_eq!(misfit(&[(0, vec![])]), (0, Misfit::Tag));
    assert_eq!(misfit(&[(0, vec![0; 17])]), (0, Misfit::Tag));
    assert_eq!(misfit(&[(65_535, vec![0])]), (0, Misfit::Tag));
    let shapes: Vec<_> = (0..33).map(|offset| (offset, vec![1])).collect();
    assert_eq!(misfit(&shapes), (32, Misfit::Shapes));
}

proptest! {
    #[test]
    fn a_table_says_what_asking_each_route_in_turn_says(
        routes in prop::collection::vec((0_u16..6, prop::collection::vec(0_u8..3, 1..4)), 1..200),
        payloads in prop::collection::vec(prop::collection::vec(0_u8..3, 0..12), 50),
    ) {
        let mut routes = routes;
        let mut seen = std::collections::BTreeSet::new();
        routes.retain(|route| seen.insert(route.clone()));
        let table = table(&routes).unwrap();
        for payload in payloads {
            let naive = routes.iter().position(|(offset, tag)| {
                payload.get(usize::from(*offset)..).is_some_and(|rest| rest.starts_with(tag))
            });
            let found = table::find_in(&table, &payload).map(|slot| usize::from(slot.port));
            prop_assert_eq!(found, naive);
        }
    }

    #[test]
    fn no_bytes_upset_a_matcher_and_none_takes_its_word_back(
        start in prop_oneof![
            Just(Hello::default().bytes()),
            Just(Hello { record: 7, ..Hello::default() }.bytes()),
            Just(b"GET http://a.example/ HTTP/1.1\r\nHost: b.example\r\n\r\n".to_vec()),
            prop::collection::vec(any::<u8>(), 0..100),
        ],
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6),
        at in any::<prop::sample::Index>(),
    ) {
        let mut bytes = start;
        for (at, byte) in changes {
            if !bytes.is_empty() {
                let at = at.index(bytes.len());
                bytes[at] = byte;
            }
        }
        let early = &bytes[..at.index(bytes.len() + 1)];
        for matcher in [
            Matcher::Tls, SNI, H2, Matcher::Ssh, Matcher::Http, Matcher::HttpHost(Pattern("*.example")),
            Matcher::Bytes { offset: 3, bytes: b"htt" },
        ] {
            match verdict(early, matcher) {
                Verdict::More(need) => prop_assert!(need > early.len()),
                sure @ (Verdict::Match | Verdict::Miss) => prop_assert_eq!(verdict(&bytes, matcher), sure),
            }
        }
    }

    #[test]
    fn a_frame_never_promises_less_than_it_read(
        bytes in prop::collection::vec(any::<u8>(), 0..12),
        wide in any::<bool>(), offset in 0_u16..6, plus in 0_u16..20,
    ) {
        let frame = Frame::Length { width: if wide { 4 } else { 2 }, offset, plus };
        if let Ok(Some(length)) = frame.length(&bytes) {
            prop_assert!(length >= frame.header() as u64);
        }
    }
}
