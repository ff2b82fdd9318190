//! `watch --web`: a live page, a JSON API and metrics, for whoever this host lets in.
//!
//! The watch brings [`model`] up to date after each look; [`server`] answers from it on a
//! thread of its own, [`guard`] decides whom, [`show`] and [`metrics`] say how, [`geo`]
//! knows where. The page itself is in `crates/app/ui`.

mod assets;
mod geo;
mod guard;
mod limit;
mod metrics;
mod model;
mod server;
mod show;

use std::{
    net::{Ipv6Addr, SocketAddr, TcpListener, ToSocketAddrs as _},
    path::PathBuf,
    sync::Arc,
    time::{Duration, UNIX_EPOCH},
};

use anyhow::Context as _;

use self::{
    geo::Databases,
    guard::{Guard, Token},
    limit::Limited,
    model::{About, Model},
    server::Shared,
};
use super::{
    nice,
    output::{self, Clock},
    state::{Line, State, What},
};
use crate::{
    address::{AddressError, Listen},
    error::{Error, Result},
};

/// Arguments of `underpass watch --web`.
#[derive(Debug, clap::Args)]
#[group(skip)]
pub struct Args {
    /// Show it on a live web page, too, with a JSON API and metrics
    #[arg(long, value_name = "ADDR", num_args = 0..=1, default_missing_value = "127.0.0.1:7676", value_parser = listen)]
    web: Option<SocketAddr>,
    /// A file with the token that the page asks for; needed where ADDR is not of this host alone
    #[arg(long, value_name = "FILE", requires = "web")]
    web_token_file: Option<PathBuf>,
    /// A name that the page has besides its address, for instance behind a proxy
    #[arg(long, value_name = "NAME", requires = "web")]
    web_host: Vec<String>,
    /// A database of the MaxMind format that says where addresses are, or in which
    /// autonomous system; without it countries come from the one in the binary
    #[arg(long, value_name = "FILE", requires = "web")]
    geo: Vec<PathBuf>,
    /// Where this host is, in degrees north and east: 52.52,13.40; by default its public
    /// address says so, if it has one
    #[arg(long, value_name = "LAT,LON", requires = "web", value_parser = coordinates, allow_hyphen_values = true)]
    home: Option<Coordinates>,
}

fn listen(text: &str) -> std::result::Result<SocketAddr, String> {
    let Listen { host, port } = text.parse().map_err(|error: AddressError| error.to_string())?;
    let Some(host) = host else { return Ok((Ipv6Addr::UNSPECIFIED, port).into()) };
    let found = (&*host, port).to_socket_addrs().ok().and_then(|mut found| found.next());
    found.ok_or_else(|| format!("'{host}' has no address"))
}

#[derive(Debug, Clone, Copy)]
struct Coordinates(f64, f64);

fn coordinates(text: &str) -> std::result::Result<Coordinates, String> {
    let parts = text.split_once(',').and_then(|(north, east)| {
        Some((north.trim().parse::<f64>().ok()?, east.trim().parse::<f64>().ok()?))
    });
    match parts {
        Some((north, east)) if north.abs() <= 90.0 && east.abs() <= 180.0 => Ok(Coordinates(north, east)),
        _ => Err("expected degrees north and east: 52.52,13.40".to_owned()),
    }
}

/// The arguments are right, and the port is ours.
pub struct Ready {
    listener: TcpListener,
    guard: Guard,
    databases: Databases,
    home: Option<(f64, f64)>,
}

impl Args {
    /// Checks everything, while there still are the rights to read and bind.
    pub fn prepare(&self) -> Result<Option<Ready>> {
        let Some(address) = self.web else { return Ok(None) };
        if !address.ip().is_loopback() && self.web_token_file.is_none() {
            return Err(Error::Usage(format!(
                "--web {address}: others could see every connection of this host; give them a token by \
                 --web-token-file FILE, or use 127.0.0.1 or [::1]"
            )));
        }
        let wrong = |error: anyhow::Error| Error::Usage(format!("{error:#}"));
        let token = self.web_token_file.as_deref().map(Token::read).transpose().map_err(wrong)?;
        let databases = Databases::open(&self.geo).map_err(wrong)?;
        let listener = TcpListener::bind(address).with_context(|| format!("cannot listen on {address}"))?;
        listener.set_nonblocking(true).context("cannot listen")?;
        let home = self.home.map(|Coordinates(north, east)| (north, east));
        Ok(Some(Ready { listener, guard: Guard::new(self.web_host.clone(), token), databases, home }))
    }
}

/// The page while it is shown. It ends with the process.
pub struct Web {
    shared: Arc<Shared>,
    /// Where it is.
    pub url: String,
}

impl Ready {
    /// Starts to answer, on a thread of its own.
    pub fn start(
        self,
        clock: Clock,
        interval: Duration,
        missing: Vec<String>,
        interface: Option<String>,
    ) -> anyhow::Result<Web> {
        let names = nix::sys::utsname::uname().context("uname")?;
        let started = clock.wall(output::boot_time()).duration_since(UNIX_EPOCH);
        let about = About {
            version: env!("CARGO_PKG_VERSION"),
            host: names.nodename().to_string_lossy().into_owned(),
            kernel: names.release().to_string_lossy().into_owned(),
            started: started.map_or(0, |time| time.as_millis() as u64),
            interval: interval.as_millis() as u64,
            missing,
            geo: self.databases.names(),
            interface,
            home: self.home,
        };
        let url = format!("http://{}/", self.listener.local_addr()?);
        let shared = Arc::new(Shared::new(Model::new(about, clock, self.databases), self.guard));
        let router = server::router(Arc::clone(&shared));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let listener = self.listener;
        // Without a name of its own: then it goes by the process' in every table.
        std::thread::Builder::new().spawn(move || {
            // Who looks may wait, unlike the ring of events. Lowering is always allowed.
            let _ = nice(0);
            runtime.block_on(async {
                let listener = tokio::net::TcpListener::from_std(listener)?;
                axum::serve(Limited::new(listener), router).await
            })
        })?;
        Ok(Web { shared, url })
    }
}

impl Web {
    /// Takes in what has been told, of which the ends count.
    pub fn told(&self, lines: &[Line]) {
        let mut model = self.shared.model();
        for line in lines {
            match line {
                Line::Connection { what: What::Close, connection } => model.end(connection),
                Line::Connection { .. } | Line::Lost(_) => {}
            }
        }
    }

    /// Takes in the state after a look, and tells the pages.
    pub fn look(&self, state: &State) -> anyhow::Result<()> {
        let mut model = self.shared.model();
        model.look(state, output::boot_time());
        self.shared.tell(&mut model).context("cannot tell the page")
    }
}
