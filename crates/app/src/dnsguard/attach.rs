//! Attaching, detaching, and telling what is attached.

use std::net::IpAddr;

use anyhow::Context as _;
use aya::{
    Ebpf, EbpfLoader,
    maps::{LpmTrie, lpm_trie::Key},
};
use ipnet::IpNet;
use underpass_abi::dnsguard::{MAX_PATTERNS, Policy, RULES, rule, settings_flag};
use underpass_logic::packet::ip::Address;

use super::{AttachArgs, Rules};
use crate::{
    attachment::{self, Found, Function, fixed, say, warn},
    error::Result,
    hook::{self, Attached, Interface, Program},
    object,
    pins::Folder,
};

/// dnsguard's parts: what judges answers, and what sees queries leave.
pub(crate) const DNSGUARD: Function = Function {
    word: "dnsguard",
    ingress: Program { xdp: "dnsguard_xdp", tc: "dnsguard_tc" },
    egress: "dnsguard_egress",
};
/// The maps that are kept from one attachment to the next.
const KEPT: [&str; 6] = ["COUNTERS", "SAMPLES", "LEARNED", "QUERIES", "ANSWERED", "POLICY"];

pub(super) fn attach(args: &AttachArgs) -> Result<()> {
    let mut rules = args.rules.rules()?;
    if args.dry_run {
        rules.settings.flags |= settings_flag::DRY_RUN;
    }
    let interface = Interface::find(&args.interface)?;
    let attached = DNSGUARD
        .attach(&interface, |folder, before| attach_in(folder, &interface, &rules, args.hook, before))?;
    say(&format!(
        "{}: {} by {}, as {}",
        interface.name,
        if args.dry_run { "watched" } else { "guarded" },
        attached.hook.word(),
        attached.why
    ))
}

fn attach_in(
    folder: &Folder,
    interface: &Interface,
    rules: &Rules,
    wanted: hook::Wanted,
    before: Option<&Found>,
) -> Result<Attached> {
    let mut ebpf = load(rules, Some(folder))?;
    let current = before.map(|found| &found.attached);
    let mut egress = before.and_then(|found| found.egress);
    let wants_queries = rules.settings.enabled & rule::NO_EDNS != 0;
    // Queries first: an answer is then never judged against one that was missed.
    if wants_queries {
        match hook::attach_egress(&mut ebpf, DNSGUARD.egress, interface, egress, folder) {
            Ok(by) => egress = Some(by),
            Err(error) => warn(&format!("no-edns hits nothing: queries cannot be seen leaving: {error}")),
        }
    }
    let attached = hook::attach(&mut ebpf, DNSGUARD.ingress, interface, wanted, current, folder);
    if attached.is_err()
        && before.is_none()
        && let Some(by) = egress
    {
        // What failed is of more interest than whether this does.
        let _ = hook::detach_egress(DNSGUARD.egress, &interface.name, by, folder);
    }
    let attached = attached?;
    if !wants_queries && let Some(by) = egress.take() {
        hook::detach_egress(DNSGUARD.egress, &interface.name, by, folder)?;
    }
    attachment::set(&mut ebpf, "POLICY", policy(rules))?;
    Function::note(&mut ebpf, interface, &attached, egress, before)?;
    Ok(attached)
}

/// Opens the object with these rules in it. With a folder, its maps are those that are
/// pinned there.
pub(super) fn load(rules: &Rules, folder: Option<&Folder>) -> Result<Ebpf> {
    let mut settings = rules.settings.clone();
    settings.tick_ns = tick_ns();
    let mut loader = EbpfLoader::new();
    loader.override_global("SETTINGS", &*settings, true);
    let mut ebpf = DNSGUARD.load(loader, object::DNSGUARD, &KEPT, folder)?;
    let mut bogus: LpmTrie<_, [u8; 16], u8> =
        attachment::map(&mut ebpf, "BOGUS")?.try_into().context("BOGUS is no trie")?;
    for network in &rules.bogus {
        let (address, prefix) = mapped(network);
        bogus
            .insert(&Key::new(prefix, address.0), 1, 0)
            .with_context(|| format!("cannot put {network} on the list of bogus addresses"))?;
    }
    Ok(ebpf)
}

/// The length of a tick of this kernel's clock in nanoseconds; 0 if it does not tell.
fn tick_ns() -> u64 {
    // The coarse clocks move with the ticks, and so that is their resolution.
    let tick = nix::time::clock_getres(nix::time::ClockId::CLOCK_MONOTONIC_COARSE);
    tick.map_or(0, |tick| u64::try_from(tick.tv_nsec()).unwrap_or(0))
}

/// A network with its address mapped into IPv6.
pub(super) fn mapped(network: &IpNet) -> (Address, u32) {
    let prefix = u32::from(network.prefix_len());
    let address: IpAddr = network.network();
    (Address::from(address), if address.is_ipv4() { 96 + prefix } else { prefix })
}

/// What `show` needs to know of the rules.
fn policy(rules: &Rules) -> Policy {
    let mut patterns = [[0; 32]; MAX_PATTERNS];
    for (to, name) in patterns.iter_mut().zip(rules.names.iter().skip(RULES.len())) {
        *to = fixed(name);
    }
    Policy {
        enabled: rules.settings.enabled,
        dry_run: u32::from(rules.settings.flags & settings_flag::DRY_RUN != 0),
        patterns,
    }
}

pub(super) fn detach(name: &str) -> Result<()> {
    DNSGUARD.detach(name)?;
    say(&format!("{name}: no longer guarded"))
}
