//! Who may ask: the name that the browser asked for (against DNS rebinding), the page that
//! asks (against other sites), and the token where there is one.

use std::{
    fs,
    net::IpAddr,
    os::unix::fs::MetadataExt as _,
    path::Path,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, Result, ensure};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use hmac::{Hmac, KeyInit as _, Mac as _};
use sha2::Sha256;

/// The shortest token: with it, guessing is hopeless.
const SHORTEST: usize = 16;
/// How long a login lasts.
pub const LOGIN: Duration = Duration::from_hours(7 * 24);
const COOKIE: &str = "underpass";

/// What a request has to have.
#[derive(Debug)]
pub struct Guard {
    hosts: Vec<String>,
    token: Option<Token>,
}

/// Why a request is refused: the status and what to say.
pub type Refusal = (StatusCode, &'static str);

impl Guard {
    /// `hosts` are the names, besides addresses and `localhost`, that the page has.
    pub fn new(hosts: Vec<String>, token: Option<Token>) -> Self {
        Self { hosts, token }
    }

    /// Refuses what was sent to another name or by another site's page.
    ///
    /// # Errors
    /// The refusal.
    pub fn admits(&self, method: &Method, path: &str, headers: &HeaderMap) -> Result<(), Refusal> {
        let mut hosts = headers.get_all(header::HOST).iter();
        let (Some(host), None) = (hosts.next().and_then(|host| host.to_str().ok()), hosts.next()) else {
            return Err((StatusCode::BAD_REQUEST, "one Host is needed"));
        };
        if !self.knows(host) {
            return Err((
                StatusCode::MISDIRECTED_REQUEST,
                "this name is not one of underpass watch: use its address, or start it with --web-host NAME",
            ));
        }
        if let Some(origin) = headers.get(header::ORIGIN) {
            let same = origin.to_str().ok().and_then(|origin| origin.split_once("://"));
            if same.is_none_or(|(_, origin)| !origin.eq_ignore_ascii_case(host)) {
                return Err((StatusCode::FORBIDDEN, "another site's page has no access"));
            }
        }
        let site = headers.get("sec-fetch-site").map(HeaderValue::as_bytes);
        if matches!(site, Some(b"cross-site" | b"same-site")) {
            // Following a link to the page is no reading of it.
            let follows = headers.get("sec-fetch-mode").is_some_and(|mode| mode == "navigate")
                && headers.get("sec-fetch-dest").is_some_and(|to| to == "document");
            if !(follows && method == Method::GET && matches!(path, "/" | "/login")) {
                return Err((StatusCode::FORBIDDEN, "another site's page has no access"));
            }
        }
        Ok(())
    }

    /// An address cannot be rebound; a name can, unless it is known.
    fn knows(&self, host: &str) -> bool {
        let name = match host.strip_prefix('[') {
            Some(rest) => rest.split(']').next().unwrap_or_default(),
            None => host.split(':').next().unwrap_or_default(),
        };
        name.parse::<IpAddr>().is_ok()
            || name.eq_ignore_ascii_case("localhost")
            || self.hosts.iter().any(|known| known.eq_ignore_ascii_case(name))
    }

    /// Whether a request carries the token, or a login's cookie.
    pub fn knows_sender(&self, headers: &HeaderMap) -> bool {
        let Some(token) = &self.token else { return true };
        let bearer = headers
            .get(header::AUTHORIZATION)
            .and_then(|value| value.to_str().ok())
            .and_then(|value| value.split_once(' '))
            .filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"))
            .map(|(_, given)| given.trim());
        if let Some(given) = bearer {
            return token.is(given);
        }
        let cookies = headers.get_all(header::COOKIE).iter().filter_map(|value| value.to_str().ok());
        cookies
            .flat_map(|line| line.split(';'))
            .filter_map(|cookie| cookie.trim().split_once('='))
            .any(|(name, value)| name == COOKIE && token.signed(value, SystemTime::now()))
    }

    /// The cookie for who has sent this token; `None` if it is wrong, or none is needed.
    pub fn log_in(&self, given: &str) -> Option<String> {
        let token = self.token.as_ref().filter(|token| token.is(given.trim()))?;
        let value = token.sign(SystemTime::now() + LOGIN);
        let age = LOGIN.as_secs();
        Some(format!("{COOKIE}={value}; Path=/; Max-Age={age}; HttpOnly; SameSite=Strict"))
    }

    /// Takes the cookie away.
    pub fn log_out() -> String {
        format!("{COOKIE}=; Path=/; Max-Age=0; HttpOnly; SameSite=Strict")
    }
}

/// The secret that lets in.
pub struct Token(String);

impl std::fmt::Debug for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Token(..)")
    }
}

impl Token {
    /// Reads the first line of a file that nobody else may read.
    ///
    /// # Errors
    /// Where it cannot be read, others may read it, or the token is too short.
    pub fn read(file: &Path) -> Result<Self> {
        let name = format!("--web-token-file {}", file.display());
        let mode = fs::metadata(file).with_context(|| name.clone())?.mode();
        ensure!(mode & 0o027 == 0, "{name}: others may read or change it; chmod 600 it");
        let text = fs::read_to_string(file).with_context(|| name.clone())?;
        let token = text.lines().next().unwrap_or_default().trim();
        ensure!(
            token.len() >= SHORTEST && token.bytes().all(|byte| byte.is_ascii_graphic()),
            "{name}: its first line must be at least {SHORTEST} letters, digits or signs without spaces; \
             `openssl rand -hex 32` makes one"
        );
        Ok(Self(token.to_owned()))
    }

    /// Compares in a time that does not tell how much of it is right.
    fn is(&self, given: &str) -> bool {
        mac(given, "token").verify(&mac(&self.0, "token").finalize().into_bytes()).is_ok()
    }

    /// A login that lasts until then, also over a restart, as long as the token stays.
    fn sign(&self, until: SystemTime) -> String {
        let until = until.duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs());
        let signature = mac(&self.0, &format!("login {until}")).finalize().into_bytes();
        let signature: String = signature.iter().map(|byte| format!("{byte:02x}")).collect();
        format!("{until}.{signature}")
    }

    fn signed(&self, cookie: &str, now: SystemTime) -> bool {
        let Some((until, signature)) = cookie.split_once('.') else { return false };
        let Ok(until) = until.parse::<u64>() else { return false };
        let bytes: Option<Vec<u8>> = (0..signature.len())
            .step_by(2)
            .map(|at| signature.get(at..at + 2).and_then(|hex| u8::from_str_radix(hex, 16).ok()))
            .collect();
        let now = now.duration_since(UNIX_EPOCH).map_or(u64::MAX, |time| time.as_secs());
        now < until
            && bytes.is_some_and(|bytes| mac(&self.0, &format!("login {until}")).verify_slice(&bytes).is_ok())
    }
}

fn mac(key: &str, text: &str) -> Hmac<Sha256> {
    let mut mac = Hmac::new_from_slice(key.as_bytes()).expect("HMAC takes keys of any length");
    mac.update(text.as_bytes());
    mac
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderName;

    use super::*;

    fn headers(list: &[(&str, &str)]) -> HeaderMap {
        let pair = |(name, value): &(&str, &str)| {
            (name.parse::<HeaderName>().unwrap(), HeaderValue::from_str(value).unwrap())
        };
        list.iter().map(pair).collect()
    }

    fn status(path: &str, list: &[(&str, &str)]) -> u16 {
        let guard = Guard::new(vec!["watch.example".to_owned()], None);
        guard.admits(&Method::GET, path, &headers(list)).map_or_else(|(status, _)| status.as_u16(), |()| 200)
    }

    #[test]
    fn only_known_names_and_own_pages_are_admitted() {
        for (list, expected) in [
            (&[("host", "127.0.0.1:7676")][..], 200),
            (&[("host", "[::1]:7676")], 200),
            (&[("host", "192.0.2.1")], 200),
            (&[("host", "LOCALHOST:7676")], 200),
            (&[("host", "watch.example:7676")], 200),
            (&[("host", "evil.example:7676")], 421),
            (&[("host", "127.0.0.1.evil.example:7676")], 421),
            (&[("host", "localhost.evil.example")], 421),
            (&[("host", "")], 421),
            (&[], 400),
            (&[("host", "localhost"), ("host", "evil.example")], 400),
            (&[("host", "localhost:7676"), ("origin", "http://localhost:7676")], 200),
            (&[("host", "watch.example"), ("origin", "https://watch.example")], 200),
            (&[("host", "localhost:7676"), ("origin", "http://localhost:8080")], 403),
            (&[("host", "localhost:7676"), ("origin", "https://evil.example")], 403),
            (&[("host", "localhost:7676"), ("origin", "null")], 403),
            (&[("host", "localhost:7676"), ("sec-fetch-site", "same-origin")], 200),
            (&[("host", "localhost:7676"), ("sec-fetch-site", "none")], 200),
            (&[("host", "localhost:7676"), ("sec-fetch-site", "cross-site")], 403),
            (&[("host", "localhost:7676"), ("sec-fetch-site", "same-site")], 403),
        ] {
            assert_eq!(status("/api/v1/status", list), expected, "{list:?}");
        }
        let link = [
            ("host", "localhost"),
            ("sec-fetch-site", "cross-site"),
            ("sec-fetch-mode", "navigate"),
            ("sec-fetch-dest", "document"),
        ];
        assert_eq!((status("/", &link), status("/api/v1/status", &link)), (200, 403));
    }

    #[test]
    fn a_token_or_a_login_lets_in() {
        let guard = Guard::new(vec![], Some(Token("0123456789abcdef".to_owned())));
        assert!(!guard.knows_sender(&headers(&[])));
        assert!(guard.knows_sender(&headers(&[("authorization", "Bearer 0123456789abcdef")])));
        assert!(!guard.knows_sender(&headers(&[("authorization", "Bearer 0123456789abcdeF")])));
        assert!(!guard.knows_sender(&headers(&[("authorization", "Bearer ")])));
        assert!(guard.log_in("wrong").is_none());
        let cookie = guard.log_in(" 0123456789abcdef\n").unwrap();
        assert!(cookie.ends_with("; HttpOnly; SameSite=Strict"), "{cookie}");
        let pair = cookie.split(';').next().unwrap();
        assert!(guard.knows_sender(&headers(&[("cookie", &format!("other=1; {pair}"))])));
        let (name, value) = pair.split_once('=').unwrap();
        let later = value.replacen('1', "9", 1);
        for forged in ["", "1", "9999999999.", "9999999999.00", "9999999999.zz", &later] {
            assert!(!guard.knows_sender(&headers(&[("cookie", &format!("{name}={forged}"))])), "{forged}");
        }
    }

    #[test]
    fn a_login_ends() {
        let token = Token("0123456789abcdef".to_owned());
        let now = UNIX_EPOCH + Duration::from_secs(1_000_000);
        let cookie = token.sign(now);
        assert!(token.signed(&cookie, now - Duration::from_secs(1)));
        assert!(!token.signed(&cookie, now));
        assert!(!Token("0123456789abcdeg".to_owned()).signed(&cookie, now - Duration::from_secs(1)));
    }
}
