//! What the user asks the relay for, checked.

use std::{fmt, fs, net::IpAddr, path::PathBuf, str::FromStr, time::Duration};

use ipnet::IpNet;

use super::{Choice, origin::Version};
use crate::{
    address::{HostPort, Listen},
    error::{Error, Result},
};

/// Where the proxy's password is looked for.
const PASSWORD_VARIABLE: &str = "UNDERPASS_PROXY_PASSWORD";
const SWITCH_VARIABLE: &str = "UNDERPASS_TEST_SWITCH_EVERY";
/// RFC 1929 has one byte for the length of each.
const LONGEST_CREDENTIAL: usize = 255;

/// Arguments of `underpass relay`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Where to listen: host:port, or :port for all addresses of both families
    #[arg(long, value_name = "ADDR")]
    listen: Listen,
    /// Where each connection goes
    #[arg(long, value_name = "HOST:PORT", required_unless_present = "pair", conflicts_with = "pair")]
    to: Option<HostPort>,
    /// Join the first two clients with each other, then the next two, and so on
    #[arg(long, conflicts_with_all = ["proxy_protocol", "accept_proxy_protocol"])]
    pair: bool,
    /// Reach the target through this SOCKS5 proxy, which also resolves its name
    /// (password: the environment's UNDERPASS_PROXY_PASSWORD, or --via-password-file)
    // Parsed later: clap repeats a value that it refuses, and that may be a password.
    #[arg(long, value_name = "socks5://[USER@]HOST:PORT", requires = "to", conflicts_with = "pair")]
    via: Option<String>,
    /// The first line of this file is the proxy's password
    #[arg(long, value_name = "FILE", requires = "via")]
    via_password_file: Option<PathBuf>,
    #[command(flatten)]
    connections: ConnectionArgs,
}

/// How connections are carried: the same words wherever underpass accepts some.
#[derive(Debug, Clone, clap::Args)]
pub struct ConnectionArgs {
    /// Which way the bytes take
    #[arg(long, value_enum, default_value_t = PathArg::Auto)]
    pub path: PathArg,
    /// Tell each target who its client is, by a PROXY protocol header before the first byte
    #[arg(long, value_enum, value_name = "VERSION")]
    pub proxy_protocol: Option<Version>,
    /// Clients are proxies that tell who their client is, by a PROXY protocol header (version 1
    /// or 2); who sends none is turned away. Let only those connect that may say so: --allow
    #[arg(long)]
    pub accept_proxy_protocol: bool,
    /// Let in only who connects from this network; as often as needed [default: everybody]
    #[arg(long, value_name = "CIDR", value_parser = network)]
    pub allow: Vec<IpNet>,
    /// So many connections may be open at a time; one more is closed at once [default: as many as
    /// there are descriptors for]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub max_connections: Option<u32>,
    /// How long reaching a target may take, a proxy's part included
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = time)]
    pub connect_timeout: Duration,
    /// End connections on which nothing moved for so long
    #[arg(long, value_name = "TIME", default_value = "1h", value_parser = time)]
    pub idle_timeout: Duration,
    /// How long connections may take to finish once underpass is told to stop
    #[arg(long, value_name = "TIME", default_value = "5s", value_parser = time)]
    pub grace: Duration,
    /// Log a line for each connection instead of a summary a minute
    #[arg(long)]
    pub log_connections: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum PathArg {
    /// What suits each connection, while it runs
    Auto,
    /// From socket to socket inside the kernel
    Kernel,
    /// Through a pipe, without copying
    Splice,
    /// Read and write
    Copy,
}

impl PathArg {
    /// The choice that the word stands for.
    ///
    /// # Errors
    /// [`Error::Usage`], naming the environment's variable that is wrong.
    pub fn choice(self) -> Result<Choice> {
        Ok(match self {
            Self::Auto => Choice::Auto { kernel: true, switch_every: switch_every()? },
            Self::Kernel => Choice::Kernel,
            Self::Splice => Choice::Splice,
            Self::Copy => Choice::Copy,
        })
    }
}

/// What the relay is to do.
#[derive(Debug, Clone)]
pub struct Settings {
    pub listen: Listen,
    pub to: To,
    pub choice: Choice,
    pub connections: ConnectionArgs,
}

/// Where connections go.
#[derive(Debug, Clone)]
pub enum To {
    /// To each other.
    Pair,
    /// To a target.
    Target(Target),
}

/// A target and the way to it.
#[derive(Debug, Clone)]
pub struct Target {
    pub address: HostPort,
    pub via: Option<Proxy>,
}

/// A SOCKS5 proxy.
#[derive(Clone)]
pub struct Proxy {
    pub address: HostPort,
    /// User and password (RFC 1929).
    pub login: Option<(String, String)>,
}

impl Args {
    /// Checks what the command line parser cannot.
    ///
    /// # Errors
    /// [`Error::Usage`], naming the argument.
    pub fn settings(self) -> Result<Settings> {
        let to = match self.to {
            None => To::Pair,
            Some(address) => {
                let password = self.via_password_file;
                let via = self.via.map(|proxy| proxy_of(&proxy)?.with_password(password)).transpose()?;
                To::Target(Target { address, via })
            }
        };
        let choice = self.connections.path.choice()?;
        Ok(Settings { listen: self.listen, to, choice, connections: self.connections })
    }
}

fn proxy_of(text: &str) -> Result<Proxy> {
    text.parse().map_err(|error| Error::Usage(format!("--via: {error}")))
}

impl Proxy {
    fn with_password(mut self, file: Option<PathBuf>) -> Result<Self> {
        let Some((user, password)) = &mut self.login else {
            if file.is_some() {
                return Err(Error::Usage(
                    "--via-password-file needs a user: --via socks5://USER@HOST:PORT".into(),
                ));
            }
            return Ok(self);
        };
        *password = match file {
            Some(file) => {
                let text = fs::read_to_string(&file).map_err(|e| {
                    Error::Usage(format!("--via-password-file: cannot read {}: {e}", file.display()))
                })?;
                text.lines().next().unwrap_or_default().to_owned()
            }
            None => std::env::var(PASSWORD_VARIABLE).map_err(|_| {
                Error::Usage(format!(
                    "--via names the user {user}: put the password into the environment's {PASSWORD_VARIABLE}, or \
                     its file into --via-password-file"
                ))
            })?,
        };
        if password.is_empty() || password.len() > LONGEST_CREDENTIAL {
            return Err(Error::Usage(format!(
                "the proxy's password has {} bytes; SOCKS5 allows 1 to {LONGEST_CREDENTIAL}",
                password.len()
            )));
        }
        Ok(self)
    }
}

/// Without the password, wherever it is written to.
impl fmt::Debug for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

impl fmt::Display for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.login {
            Some((user, _)) => write!(f, "socks5://{user}@{}", self.address),
            None => write!(f, "socks5://{}", self.address),
        }
    }
}

impl FromStr for Proxy {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        // What comes after the '@' is all that may be shown: before it may be a password.
        let shape = "expected socks5://[USER@]HOST:PORT";
        let rest = text.strip_prefix("socks5://").or_else(|| text.strip_prefix("socks5h://"));
        let rest = rest.ok_or(shape)?.trim_end_matches('/');
        let (user, address) = match rest.rsplit_once('@') {
            Some((user, address)) => (Some(user), address),
            None => (None, rest),
        };
        if user.is_some_and(|user| user.contains(':')) {
            return Err(format!(
                "a password does not belong on the command line, where others can read it: {shape}, and put the \
                 password into the environment's {PASSWORD_VARIABLE}"
            ));
        }
        if user.is_some_and(|user| user.is_empty() || user.len() > LONGEST_CREDENTIAL) {
            return Err(format!("SOCKS5 user names have 1 to {LONGEST_CREDENTIAL} bytes"));
        }
        let address = address.parse().map_err(|e| format!("{e}; {shape}"))?;
        Ok(Self { address, login: user.map(|user| (user.to_owned(), String::new())) })
    }
}

/// A network, or an address alone.
fn network(text: &str) -> Result<IpNet, String> {
    text.parse().ok().or_else(|| text.parse::<IpAddr>().ok().map(IpNet::from)).ok_or_else(|| {
        format!("'{text}' is no network; expected an address such as 192.0.2.0/24 or 2001:db8::/32")
    })
}

/// Tests force changes of path with it; nobody else should.
fn switch_every() -> Result<Option<u64>> {
    let Some(value) = std::env::var_os(SWITCH_VARIABLE) else { return Ok(None) };
    match value.to_str().and_then(|text| text.parse().ok()) {
        Some(bytes @ 1..) => Ok(Some(bytes)),
        _ => Err(Error::Usage(format!(
            "{SWITCH_VARIABLE} is {}; a number of bytes above 0 was expected",
            value.display()
        ))),
    }
}

pub(crate) fn time(text: &str) -> Result<Duration, String> {
    match humantime::parse_duration(text) {
        Ok(Duration::ZERO) => Err("a time above 0 was expected".into()),
        Ok(time) => Ok(time),
        Err(error) => Err(format!("{error}; expected a time such as 500ms, 30s or 5m")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn proxies_are_read() {
        let proxy: Proxy = "socks5://me@[::1]:1080".parse().unwrap();
        assert_eq!(proxy.to_string(), "socks5://me@[::1]:1080");
        assert_eq!("socks5h://p:1/".parse::<Proxy>().unwrap().to_string(), "socks5://p:1");
    }

    #[test]
    fn a_password_on_the_command_line_is_refused_and_not_repeated() {
        let error = "socks5://me:secret@p:1".parse::<Proxy>().unwrap_err();
        assert!(error.contains(PASSWORD_VARIABLE) && !error.contains("secret"), "{error}");
    }

    #[test]
    fn other_schemes_are_refused() {
        for text in ["http://p:1", "p:1", "socks5://", "socks5://p", "socks5://@p:1", "socks5://p:0"] {
            assert!(text.parse::<Proxy>().is_err(), "{text}");
        }
    }

    #[test]
    fn the_password_is_not_shown() {
        let proxy = Proxy { address: "p:1".parse().unwrap(), login: Some(("me".into(), "secret".into())) };
        assert_eq!(format!("{proxy} {proxy:?}"), "socks5://me@p:1 socks5://me@p:1");
    }
}
