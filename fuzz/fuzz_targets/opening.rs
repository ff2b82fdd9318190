//! The opening of a stream: what is decided of its first bytes stays decided, whatever
//! comes after, and who asks for more asks for more than there is.
#![no_main]

use libfuzzer_sys::fuzz_target;
use underpass_logic::mux::{Matcher, Opening, Pattern, Verdict, tls};

const MATCHERS: [Matcher<'_>; 9] = [
    Matcher::Bytes { offset: 20, bytes: b"600" },
    Matcher::Tls,
    Matcher::Sni(Pattern("*.example.org")),
    Matcher::Sni(Pattern("*")),
    Matcher::Alpn(b"h2"),
    Matcher::Ssh,
    Matcher::Http,
    Matcher::HttpHost(Pattern("example.org")),
    Matcher::HttpHost(Pattern("*")),
];

fuzz_target!(|bytes: &[u8]| {
    let Some((cut, stream)) = bytes.split_first_chunk::<2>() else { return };
    let cut = usize::from(u16::from_be_bytes(*cut)) % (stream.len() + 1);
    let (whole, part) = (Opening::new(stream), Opening::new(&stream[..cut]));
    for matcher in &MATCHERS {
        let (early, late) = (part.verdict(matcher), whole.verdict(matcher));
        match early {
            Verdict::More(need) => assert!(need > cut, "{matcher:?}: {need} of {cut}"),
            Verdict::Match | Verdict::Miss => {
                assert_eq!(early, late, "{matcher:?} changed its mind after {cut}")
            }
        }
    }
    let hello = tls::Hello::read(stream);
    if let Some(list) = hello.protocols() {
        tls::protocols(list).for_each(drop);
    }
});
