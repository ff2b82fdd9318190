//! What the fuzz targets (`fuzz/`) need of private parts: each function takes what came
//! from outside and checks what has to hold of it, whatever it is. Only there where
//! cargo-fuzz builds.

use std::path::Path;

use tokio::io::AsyncWriteExt as _;

use crate::{
    dnsguard::{Guarded, Rules, check::judge_all},
    error::Error,
    relay::{dial, settings::Proxy},
};

/// A capture for `dnsguard check`.
///
/// # Panics
/// Where what is printed is not what is promised.
pub fn capture(bytes: &[u8]) {
    thread_local! {
        static RULES: Rules = Rules::new(&[Guarded::Any], None).expect("the default");
    }
    let mut out = vec![];
    let judged = RULES.with(|rules| judge_all(bytes, Path::new("x.pcap"), rules, true, &mut out));
    let lines: Vec<serde_json::Value> = out
        .split_inclusive(|byte| *byte == b'\n')
        .map(|line| serde_json::from_slice(line).expect("JSON"))
        .collect();
    match judged {
        Ok(()) => {
            let (last, answers) = lines.split_last().expect("a summary");
            assert_eq!(last["summary"]["answers"], answers.len());
            let drops = answers.iter().filter(|line| line["verdict"] == "drop").count();
            assert_eq!(last["summary"]["dropped"], drops);
        }
        Err(Error::Usage(message)) => assert!(message.starts_with("x.pcap")),
        Err(error) => panic!("not an error of the capture: {error}"),
    }
}

/// A rules file for dnsguard.
///
/// # Panics
/// Where settings are beyond their bounds.
pub fn rules(text: &str) {
    // A file that the rules name is another matter, and would be read.
    if text.contains("file") {
        return;
    }
    for guarded in [&[][..], &[Guarded::Any]] {
        match Rules::parse(guarded, text, Some(Path::new("rules.toml"))) {
            Ok(rules) => {
                let settings = &rules.settings;
                assert_eq!(
                    rules.names.len(),
                    underpass_abi::dnsguard::RULES.len() + settings.pattern_count as usize
                );
                assert_eq!(settings.enabled >> rules.names.len(), 0);
                assert_eq!(rules.hit(u32::MAX).len(), rules.names.len());
            }
            Err(Error::Usage(message)) => assert!(message.starts_with("rules.toml: "), "{message}"),
            Err(error) => panic!("not an error of the file: {error}"),
        }
    }
}

/// A value of `--via`.
///
/// # Panics
/// Where a proxy is not written as it is read, or a password was taken.
pub fn proxy_url(text: &str) {
    let Ok(proxy) = text.parse::<Proxy>() else { return };
    let written = proxy.to_string();
    let again: Proxy = written.parse().expect("what was written");
    assert_eq!((&again.address, &again.login), (&proxy.address, &proxy.login));
    assert!(proxy.login.is_none_or(|(user, password)| password.is_empty() && !user.contains(':')));
}

/// What a SOCKS5 proxy sends, all at once, before it closes.
///
/// # Panics
/// Where the handshake takes something for success that is none, or tells the password.
pub fn socks(login: bool, by_name: bool, answer: &[u8]) {
    const PASSWORD: &str = "a secret of ours";
    let login = login.then(|| ("someone".to_owned(), PASSWORD.to_owned()));
    let proxy = Proxy { address: "proxy:1080".parse().expect("an address"), login };
    let target = if by_name { "example.org:443" } else { "192.0.2.1:443" };
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
    let asked = runtime.block_on(async {
        let (ours, mut theirs) = tokio::io::duplex(1 << 16);
        // Its end is closed for writing, and takes whatever it is sent.
        theirs.write_all(answer).await.expect("room");
        theirs.shutdown().await.expect("open");
        let asked = dial::ask(ours, &proxy, &target.parse().expect("an address")).await;
        drop(theirs);
        asked
    });
    match asked {
        Ok(_) => {
            // The method, perhaps the login's reply (of which some proxies get the version
            // wrong), then the reply to CONNECT (RFC 1928, 1929).
            let reply = match answer {
                [5, 2, _, 0, reply @ ..] => reply,
                [5, 0, reply @ ..] => reply,
                other => panic!("connected by {other:02x?}"),
            };
            assert!(matches!(reply, [5, 0, _, 1 | 3 | 4, ..]), "connected by {reply:02x?}");
        }
        Err(error) => assert!(!error.to_string().contains(PASSWORD)),
    }
}
