//! `./dev bench FUNCTION`: each function beside its peers, interleaved in one run.
//! A function's measurements are in the module of its name; `report` is what they
//! share: samples, medians, the page in docs/benchmarks/ and its plots.

mod dnsguard;
mod load;
mod mux;
mod packet;
mod peers;
mod plot;
mod process;
mod relay;
mod report;
mod shortcut;
mod watch;
mod watch_web;

use clap::{Parser, Subcommand};

/// Measures underpass beside its peers and writes docs/benchmarks/.
#[derive(Debug, Parser)]
#[command(name = "./dev bench", bin_name = "./dev bench")]
struct Cli {
    #[command(subcommand)]
    bench: Bench,
}

#[derive(Debug, Subcommand)]
enum Bench {
    /// The relay's paths beside haproxy, nginx stream, socat and realm
    Relay(relay::Args),
    /// What watching costs, beside bpftrace, tcplife and events per packet
    Watch(report::Args),
    /// What the page of watch costs, and how fluid it is
    WatchWeb(report::Args),
    /// Local connections with and without the shortcut, and over Unix sockets
    Shortcut(report::Args),
    /// UDP beside socat and nginx, TCP beside haproxy and sslh, messages beside a plain loop
    Mux(report::Args),
    /// The packet library beside C and network-types
    Packet(report::Args),
    /// dnsguard beside bare programs, nft and iptables
    Dnsguard(report::Args),
}

fn main() -> anyhow::Result<()> {
    let cli = Cli::parse();
    leave_on_interrupt()?;
    match cli.bench {
        Bench::Relay(args) => relay::run(&args),
        Bench::Watch(args) => watch::run(&args),
        Bench::WatchWeb(args) => watch_web::run(&args),
        Bench::Shortcut(args) => shortcut::run(&args),
        Bench::Mux(args) => mux::run(&args),
        Bench::Packet(args) => packet::run(&args),
        Bench::Dnsguard(args) => dnsguard::run(&args),
    }
}

/// As the first process of a namespace of processes (./dev starts it so, that its
/// children die with it) the default action of a signal does not apply: exit by hand.
fn leave_on_interrupt() -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    std::thread::spawn(move || {
        runtime.block_on(async {
            if tokio::signal::ctrl_c().await.is_ok() {
                std::process::exit(130);
            }
        });
    });
    Ok(())
}
