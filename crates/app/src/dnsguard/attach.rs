//! Attaching, detaching, and telling what is attached.

use std::{io::Write as _, net::IpAddr, time::SystemTime};

use anyhow::Context as _;
use aya::{
    Ebpf, EbpfLoader,
    maps::{Array, LpmTrie, Map, MapData, lpm_trie::Key},
};
use ipnet::IpNet;
use underpass_abi::dnsguard::{Attachment, attachment_flag, rule, settings_flag};
use underpass_logic::packet::ip::Address;

use super::{AttachArgs, Rules};
use crate::{
    error::{Error, Result},
    hook::{self, Attached, By, Hook, Interface, Program},
    object,
    pins::{self, Folder},
    status::Item,
};

/// The function's word, for its folder of pins.
const FUNCTION: &str = "dnsguard";
/// The two halves of the program that judges answers.
pub(super) const GUARD: Program = Program { xdp: "dnsguard_xdp", tc: "dnsguard_tc" };
/// The program that sees queries leave.
pub(super) const EGRESS: &str = "dnsguard_egress";
/// The maps that are kept from one attachment to the next.
const KEPT: [&str; 6] = ["COUNTERS", "SAMPLES", "LEARNED", "QUERIES", "ANSWERED", "ATTACHMENT"];

/// An attachment that was found by its pins.
#[derive(Debug)]
pub(super) struct Found {
    pub folder: Folder,
    pub attachment: Attachment,
    pub attached: Attached,
}

impl Found {
    /// The interface's name: as it is now, else as it was.
    pub(super) fn interface(&self) -> String {
        let here = pins::namespace().is_ok_and(|namespace| namespace == self.attachment.namespace);
        let now = here.then(|| hook::interface_name(self.attachment.interface)).flatten();
        now.unwrap_or_else(|| text(&self.attachment.name))
    }

    /// Whether it belongs to the network namespace that this runs in.
    pub(super) fn is_here(&self) -> Result<bool> {
        Ok(pins::namespace()? == self.attachment.namespace)
    }

    pub(super) fn is_alive(&self) -> Result<bool> {
        Ok(!self.is_here()? || hook::is_alive(&self.attached, self.attachment.interface, &self.folder))
    }

    fn egress(&self) -> Option<By> {
        let flags = self.attachment.flags;
        let by = match flags & attachment_flag::EGRESS_FILTER {
            0 => By::Link,
            _ => By::Filter { qdisc: flags & attachment_flag::QDISC != 0 },
        };
        (flags & attachment_flag::EGRESS != 0).then_some(by)
    }
}

/// Everything of ours that is pinned, in all network namespaces.
pub(super) fn found() -> Result<Vec<Found>> {
    let mut found = vec![];
    for folder in Folder::all(FUNCTION)? {
        let path = folder.pin("ATTACHMENT");
        // Another process may be in the middle of attaching or detaching.
        if !path.exists() {
            continue;
        }
        let map = match MapData::from_pin(&path) {
            Err(_) if !path.exists() => continue,
            map => map.with_context(|| format!("cannot open {}", path.display()))?,
        };
        let map: Array<_, Attachment> =
            Map::from_map_data(map).and_then(TryInto::try_into).context("ATTACHMENT is no array")?;
        let attachment = map.get(&0, 0).context("cannot read ATTACHMENT")?;
        let hook = match attachment.hook {
            underpass_abi::dnsguard::hook::XDP => Hook::Xdp,
            underpass_abi::dnsguard::hook::XDP_GENERIC => Hook::XdpGeneric,
            _ => Hook::Tc,
        };
        let by = match attachment.flags & attachment_flag::FILTER {
            0 => By::Link,
            _ => By::Filter { qdisc: attachment.flags & attachment_flag::QDISC != 0 },
        };
        let attached = Attached { hook, by, why: text(&attachment.reason) };
        found.push(Found { folder, attachment, attached });
    }
    Ok(found)
}

pub(super) fn attach(args: &AttachArgs) -> Result<()> {
    let mut rules = args.rules.rules()?;
    if args.dry_run {
        rules.settings.flags |= settings_flag::DRY_RUN;
    }
    let interface = Interface::find(&args.interface)?;
    let key = pins::interface_key(interface.index)?;
    let folder = Folder::create(FUNCTION, &key)?;
    let before = found_or_leftover(&folder)?;
    let result = attach_in(&folder, &interface, &rules, args.hook, before.as_ref());
    if result.is_err() && before.is_none() {
        // Nothing of an attachment that failed stays. What failed is of more interest
        // than whether this does.
        let _ = folder.remove();
    }
    let attached = result?;
    if !interface.up {
        warn(&format!("{} is down: nothing comes in on it until it is set up", interface.name));
    }
    say(&format!(
        "{}: {} by {}, as {}",
        interface.name,
        if args.dry_run { "watched" } else { "guarded" },
        attached.hook.word(),
        attached.why
    ))
}

/// What the folder says is attached. A folder without it was left by a crash in between.
fn found_or_leftover(folder: &Folder) -> Result<Option<Found>> {
    if !folder.pin("ATTACHMENT").exists() {
        return Ok(None);
    }
    let found = found()?.into_iter().find(|found| found.folder == *folder);
    Ok(found.filter(|found| found.attachment.since != 0))
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
    let mut egress = before.and_then(Found::egress);
    let wants_queries = rules.settings.enabled & rule::NO_EDNS != 0;
    // Queries first: an answer is then never judged against one that was missed.
    if wants_queries {
        match hook::attach_egress(&mut ebpf, EGRESS, interface, egress, folder) {
            Ok(by) => egress = Some(by),
            Err(error) => warn(&format!("no-edns hits nothing: queries cannot be seen leaving: {error}")),
        }
    }
    let attached = hook::attach(&mut ebpf, GUARD, interface, wanted, current, folder)?;
    if !wants_queries && let Some(by) = egress.take() {
        hook::detach_egress(EGRESS, &interface.name, by, folder)?;
    }
    let mut map: Array<_, Attachment> = ebpf
        .take_map("ATTACHMENT")
        .context("the object has no ATTACHMENT")?
        .try_into()
        .context("ATTACHMENT is no array")?;
    let attachment = describe(interface, rules, &attached, egress)?;
    map.set(0, attachment, 0).context("cannot note what is attached")?;
    Ok(attached)
}

/// Opens the object with these rules in it. With a folder, its maps are those that are
/// pinned there.
pub(super) fn load(rules: &Rules, folder: Option<&Folder>) -> Result<Ebpf> {
    // Kernels before 5.11 charge maps to this limit. Without the right to raise it
    // loading may still work, and says so if it does not.
    let _ = nix::sys::resource::setrlimit(
        nix::sys::resource::Resource::RLIMIT_MEMLOCK,
        nix::sys::resource::RLIM_INFINITY,
        nix::sys::resource::RLIM_INFINITY,
    );
    let mut settings = rules.settings.clone();
    settings.tick_ns = tick_ns();
    let mut loader = EbpfLoader::new();
    loader.override_global("SETTINGS", &*settings, true);
    if let Some(folder) = folder {
        for map in KEPT {
            loader.map_pin_path(map, folder.pin(map));
        }
    }
    let mut ebpf = loader.load(object::DNSGUARD).map_err(|error| {
        let text = format!("{:#}", anyhow::Error::new(error));
        if text.contains("Operation not permitted") || text.contains("Permission denied") {
            Error::Unable(
                "no right to load programs: run as root or with CAP_BPF and CAP_NET_ADMIN".to_owned(),
            )
        } else {
            Error::Failed(anyhow::anyhow!("cannot load dnsguard's object: {text}"))
        }
    })?;
    let mut bogus: LpmTrie<_, [u8; 16], u8> =
        ebpf.map_mut("BOGUS").context("the object has no BOGUS")?.try_into().context("BOGUS is no trie")?;
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

fn describe(
    interface: &Interface,
    rules: &Rules,
    attached: &Attached,
    egress: Option<By>,
) -> Result<Attachment> {
    let mut flags = 0;
    if rules.settings.flags & settings_flag::DRY_RUN != 0 {
        flags |= attachment_flag::DRY_RUN;
    }
    if matches!(attached.by, By::Filter { .. }) {
        flags |= attachment_flag::FILTER;
    }
    match egress {
        Some(By::Filter { .. }) => flags |= attachment_flag::EGRESS | attachment_flag::EGRESS_FILTER,
        Some(By::Link) => flags |= attachment_flag::EGRESS,
        None => {}
    }
    if [Some(attached.by), egress].contains(&Some(By::Filter { qdisc: true })) {
        flags |= attachment_flag::QDISC;
    }
    let mut patterns = [[0; 32]; underpass_abi::dnsguard::MAX_PATTERNS];
    for (to, name) in patterns.iter_mut().zip(rules.names.iter().skip(underpass_abi::dnsguard::RULES.len())) {
        *to = fixed(name);
    }
    Ok(Attachment {
        since: SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(1, |since| since.as_secs()),
        namespace: pins::namespace()?,
        interface: interface.index,
        hook: match attached.hook {
            Hook::Xdp => underpass_abi::dnsguard::hook::XDP,
            Hook::XdpGeneric => underpass_abi::dnsguard::hook::XDP_GENERIC,
            Hook::Tc => underpass_abi::dnsguard::hook::TC,
        },
        flags,
        enabled: rules.settings.enabled,
        name: fixed(&interface.name),
        reason: fixed(&attached.why),
        patterns,
    })
}

pub(super) fn detach(name: &str) -> Result<()> {
    let namespace = pins::namespace()?;
    let mut gone = 0;
    for found in found()? {
        if found.attachment.namespace == namespace && found.interface() == name {
            remove(found)?;
            gone += 1;
        }
    }
    if gone == 0 {
        return Err(Error::Usage(format!(
            "dnsguard is not attached to {name:?}; `underpass status` lists what is"
        )));
    }
    say(&format!("{name}: no longer guarded"))
}

fn remove(found: Found) -> Result<()> {
    let interface = found.interface();
    if found.is_here()? {
        hook::detach(GUARD, &interface, &found.attached, &found.folder)?;
        if let Some(by) = found.egress() {
            hook::detach_egress(EGRESS, &interface, by, &found.folder)?;
        }
        if found.attachment.flags & attachment_flag::QDISC != 0 {
            hook::remove_qdisc(found.attachment.interface)?;
        }
    }
    found.folder.remove()
}

/// Removes every attachment and says what that was.
pub(crate) fn down() -> Result<Vec<String>> {
    let mut removed = vec![];
    for found in found()? {
        removed.push(format!("dnsguard {}: detached from {}", found.interface(), found.attached.hook.word()));
        remove(found)?;
    }
    // What a crash in the middle of attaching left.
    for folder in Folder::all(FUNCTION)? {
        removed.push(format!("dnsguard: removed what was left of {}", folder.key));
        folder.remove()?;
    }
    Ok(removed)
}

/// What is attached.
pub(crate) fn status() -> Result<Vec<Item>> {
    let mut items = vec![];
    for found in found()? {
        let works = found.is_alive()?;
        let why = if !works {
            "the interface is gone; `underpass down` removes what is left".to_owned()
        } else if found.is_here()? {
            found.attached.why.clone()
        } else {
            format!("{}; in another network namespace", found.attached.why)
        };
        items.push(Item {
            function: FUNCTION,
            on: found.interface(),
            path: found.attached.hook.word().to_owned(),
            why,
            works,
            details: None,
        });
    }
    Ok(items)
}

pub(super) fn say(line: &str) -> Result<()> {
    Ok(writeln!(std::io::stdout(), "{line}").context("cannot print")?)
}

fn warn(line: &str) {
    // A warning that nobody reads stops nothing.
    let _ = writeln!(std::io::stderr(), "underpass: warning: {line}");
}

/// A text cut to what fits, ended by zeros.
fn fixed<const N: usize>(text: &str) -> [u8; N] {
    let mut bytes = [0; N];
    let mut length = text.len().min(N - 1);
    while !text.is_char_boundary(length) {
        length -= 1;
    }
    bytes[..length].copy_from_slice(&text.as_bytes()[..length]);
    bytes
}

/// A text that is ended by zeros.
pub(super) fn text(bytes: &[u8]) -> String {
    let length = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..length]).into_owned()
}
