//! `mux attach` and `detach`: the programs and the table in the kernel, pinned.

use std::{fs, io::Write as _, time::SystemTime};

use anyhow::Context as _;
use aya::{
    Ebpf, EbpfLoader,
    maps::{Array, Map, MapData, PerCpuArray, PerCpuValues},
    util::nr_cpus,
};
use underpass_abi::mux::{Attachment, MAX_ROUTES, Table};
use underpass_logic::mux::table;

use super::{
    datagram::{self, Default, Plan},
    route::Lengths,
};
use crate::{
    error::{Error, Result},
    hook::{self, Attached, By, Hook, Interface, Program, Wanted},
    object,
    pins::{self, Folder},
    status::Item,
};

/// The function's word, for its folder of pins.
const FUNCTION: &str = "mux";
/// The two halves of the program that sends datagrams on.
const INGRESS: Program = Program { xdp: "mux_xdp", tc: "mux_in" };
/// The program that sees replies leave.
const EGRESS: &str = "mux_out";
/// The maps that are kept from one attachment to the next.
const KEPT: [&str; 5] = ["TABLES", "ACTIVE", "FLOWS", "COUNTERS", "ATTACHMENT"];
/// How many flows are remembered if the user does not say.
const FLOWS: u32 = 65_536;

/// Arguments of `underpass mux attach`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The interface that datagrams come in on
    #[arg(value_name = "IFACE")]
    interface: String,
    /// The UDP port that everybody sends to
    #[arg(long, value_name = "PORT", value_parser = datagram::port)]
    port: u16,
    /// What goes where; the first route that matches wins. MATCH is '@20:600' (text at byte 20
    /// of the payload) or '@0:0x1603' (hex)
    #[arg(long = "route", value_name = "MATCH=PORT", required = true)]
    routes: Vec<String>,
    /// What happens to a datagram of a valid length that no route takes
    #[arg(long, value_name = "PORT|drop|pass", default_value = "drop")]
    default: Default,
    /// The valid lengths of a payload in bytes, for instance 290..=294; others are dropped
    #[arg(long, value_name = "RANGE")]
    length: Option<Lengths>,
    /// Where the program sits
    #[arg(long, value_enum, default_value_t)]
    hook: Wanted,
    /// How many clients' ports are remembered for the replies; the least recently used
    /// makes room [default: 65536]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=16_777_216))]
    flows: Option<u32>,
}

/// An attachment that was found by its pins.
#[derive(Debug)]
pub(super) struct Found {
    pub folder: Folder,
    pub attachment: Attachment,
    pub attached: Attached,
    egress: By,
}

impl Found {
    fn open(folder: Folder) -> Result<Option<Self>> {
        if !folder.pin("ATTACHMENT").exists() {
            return Ok(None);
        }
        let map: Array<_, Attachment> = array(&folder, "ATTACHMENT")?;
        let attachment = map.get(&0, 0).context("cannot read ATTACHMENT")?;
        if attachment.since == 0 {
            return Ok(None);
        }
        let by = |filter| if filter == 0 { By::Link } else { By::Filter { qdisc: attachment.qdisc != 0 } };
        let hook = match attachment.hook {
            0 => Hook::Xdp,
            1 => Hook::XdpGeneric,
            _ => Hook::Tc,
        };
        let attached = Attached { hook, by: by(attachment.filter), why: text(&attachment.reason) };
        Ok(Some(Self { folder, attached, egress: by(attachment.egress_filter), attachment }))
    }

    /// The interface's name: as it is now, else as it was.
    pub(super) fn interface(&self) -> String {
        let here = self.is_here().unwrap_or(false);
        let now = here.then(|| nix::net::if_::if_indextoname(self.attachment.interface).ok()).flatten();
        now.and_then(|name| name.into_string().ok()).unwrap_or_else(|| text(&self.attachment.name))
    }

    /// Whether it belongs to the network namespace that this runs in.
    pub(super) fn is_here(&self) -> Result<bool> {
        Ok(pins::namespace()? == self.attachment.namespace)
    }

    pub(super) fn works(&self) -> Result<bool> {
        Ok(!self.is_here()? || hook::is_alive(&self.attached, self.attachment.interface, &self.folder))
    }

    /// The table that is in use.
    pub(super) fn table(&self) -> Result<Box<Table>> {
        let active = array::<u32>(&self.folder, "ACTIVE")?.get(&0, 0).context("cannot read ACTIVE")?;
        let table = array::<Table>(&self.folder, "TABLES")?.get(&active, 0).context("cannot read TABLES")?;
        Ok(Box::new(table))
    }
}

/// A pinned map.
///
/// # Errors
/// Where it cannot be opened.
pub(super) fn pinned(folder: &Folder, name: &str) -> Result<Map> {
    let path = folder.pin(name);
    let data = MapData::from_pin(&path).with_context(|| format!("cannot open {}", path.display()))?;
    Ok(Map::from_map_data(data).with_context(|| format!("{name} is of no known kind"))?)
}

fn array<V: aya::Pod>(folder: &Folder, name: &str) -> Result<Array<MapData, V>> {
    Ok(pinned(folder, name)?.try_into().with_context(|| format!("{name} is no array"))?)
}

/// Everything of ours that is pinned, in all network namespaces.
pub(super) fn found() -> Result<Vec<Found>> {
    let folders = Folder::all(FUNCTION)?;
    folders.into_iter().filter_map(|folder| Found::open(folder).transpose()).collect()
}

pub(super) fn attach(args: &Args) -> Result<()> {
    let plan = Plan::new(args.port, &args.routes, args.default, args.length.clone())?;
    let interface = Interface::find(&args.interface)?;
    if !interface.ethernet {
        return Err(Error::Unable(format!(
            "{} is no Ethernet interface: its packets have no Ethernet header",
            interface.name
        )));
    }
    let folder = Folder::create(FUNCTION, &pins::interface_key(interface.index)?)?;
    let before = Found::open(folder.clone())?;
    let result = attach_in(&folder, &interface, &plan, args, before.as_ref());
    if result.is_err() && before.is_none() {
        // Nothing of an attachment that failed stays. What failed is of more interest
        // than whether this does.
        let _ = folder.remove();
    }
    let attached = result?;
    if !interface.up {
        warn(&format!("{} is down: nothing comes in on it until it is set up", interface.name));
    }
    let (count, hook) = (plan.routes.len(), attached.hook.word());
    say(&format!(
        "{}: port {} goes by {count} routes, by {hook}: {}",
        interface.name, plan.port, attached.why
    ))
}

fn attach_in(
    folder: &Folder,
    interface: &Interface,
    plan: &Plan,
    args: &Args,
    before: Option<&Found>,
) -> Result<Attached> {
    let mut ebpf = load(folder, args.flows, before.is_some())?;
    let old = before.map(Found::table).transpose()?;
    put_table(&mut ebpf, plan, old.as_deref())?;
    // Replies first: none leaves with the service's port.
    let egress = before.map(|found| found.egress);
    let egress = hook::attach_egress(&mut ebpf, EGRESS, interface, egress, folder)?;
    let current = before.map(|found| &found.attached);
    let attached = attach_ingress(&mut ebpf, interface, args.hook, current, folder);
    if attached.is_err() && before.is_none() {
        // What failed is of more interest than whether this does.
        let _ = hook::detach_egress(EGRESS, &interface.name, egress, folder);
    }
    let attached = attached?;
    let mut map: Array<_, Attachment> =
        map(&mut ebpf, "ATTACHMENT")?.try_into().context("ATTACHMENT is no array")?;
    let was = before.is_some_and(|found| found.attachment.qdisc != 0);
    map.set(0, describe(interface, &attached, egress, was)?, 0).context("cannot note what is attached")?;
    Ok(attached)
}

/// Attaches where it is right for the interface.
fn attach_ingress(
    ebpf: &mut Ebpf,
    interface: &Interface,
    wanted: Wanted,
    current: Option<&Attached>,
    folder: &Folder,
) -> Result<Attached> {
    if wanted != Wanted::Auto || current.is_some() {
        return hook::attach(ebpf, INGRESS, interface, wanted, current, folder);
    }
    let mut tc = |why: String| {
        let attached = hook::attach(ebpf, INGRESS, interface, Wanted::Tc, None, folder)?;
        Ok(Attached { why, ..attached })
    };
    if let Some(why) = needs_tc(interface) {
        return tc(why);
    }
    match hook::attach(ebpf, INGRESS, interface, Wanted::Xdp, None, folder) {
        Ok(attached) => Ok(Attached {
            why: "its driver runs XDP, and what comes in on it is delivered here".to_owned(),
            ..attached
        }),
        Err(Error::Unable(why)) => {
            let attached = hook::attach(ebpf, INGRESS, interface, Wanted::Tc, None, folder)?;
            Ok(Attached { why: format!("native XDP is not to be had ({why})"), ..attached })
        }
        Err(error) => Err(error),
    }
}

/// Why an interface needs TC, if it does: XDP cannot tell a checksum that is still to
/// be completed from one that is complete.
fn needs_tc(interface: &Interface) -> Option<String> {
    let setting =
        |path: String| fs::read_to_string(path).map(|text| text.trim().to_owned()).unwrap_or_default();
    if let Some(kind) = &interface.virtual_kind {
        return Some(format!("it is virtual ({kind}), so its packets may have partial checksums"));
    }
    for family in ["ipv4", "ipv6"] {
        if setting(format!("/proc/sys/net/{family}/conf/{}/forwarding", interface.name)) == "1" {
            return Some(format!(
                "it forwards {family}, and what is forwarded must have a checksum beyond doubt"
            ));
        }
    }
    None
}

/// Opens the object; its maps are those that are pinned in the folder.
fn load(folder: &Folder, flows: Option<u32>, again: bool) -> Result<Ebpf> {
    // Kernels before 5.11 charge maps to this limit. Without the right to raise it
    // loading may still work, and says so if it does not.
    let _ = nix::sys::resource::setrlimit(
        nix::sys::resource::Resource::RLIMIT_MEMLOCK,
        nix::sys::resource::RLIM_INFINITY,
        nix::sys::resource::RLIM_INFINITY,
    );
    if again {
        let path = folder.pin("FLOWS");
        let now = aya::maps::MapInfo::from_pin(&path).context("cannot open FLOWS")?.max_entries();
        if flows.is_some_and(|flows| flows != now) {
            return Err(Error::Usage(format!(
                "--flows: {now} flows are remembered, and that changes only with `mux detach` and a new `mux attach`"
            )));
        }
    }
    let mut loader = EbpfLoader::new();
    loader.map_max_entries("FLOWS", flows.unwrap_or(FLOWS));
    for map in KEPT {
        loader.map_pin_path(map, folder.pin(map));
    }
    loader.load(object::MUX).map_err(|error| {
        let text = format!("{:#}", anyhow::Error::new(error));
        if text.contains("Operation not permitted") || text.contains("Permission denied") {
            Error::Unable(
                "no right to load programs: run as root or with CAP_BPF and CAP_NET_ADMIN".to_owned(),
            )
        } else {
            Error::Failed(anyhow::anyhow!("cannot load mux's object: {text}"))
        }
    })
}

fn map<'a>(ebpf: &'a mut Ebpf, name: &str) -> Result<&'a mut Map> {
    Ok(ebpf.map_mut(name).with_context(|| format!("the object has no {name}"))?)
}

/// Writes the table that is not in use and then makes it the one in use, so that each
/// packet sees the old routes or the new ones.
///
/// # Errors
/// Where the maps cannot be written.
pub fn put_table(ebpf: &mut Ebpf, plan: &Plan, before: Option<&Table>) -> Result<()> {
    let table = plan.table(before)?;
    let mut active: Array<_, u32> = map(ebpf, "ACTIVE")?.try_into().context("ACTIVE is no array")?;
    let next = 1 - active.get(&0, 0).context("cannot read ACTIVE")?.min(1);
    if before.is_some() {
        wait_for_programs();
    }
    let mut tables: Array<_, Table> = map(ebpf, "TABLES")?.try_into().context("TABLES is no array")?;
    tables.set(next, table.as_ref(), 0).context("cannot write the routes")?;
    clear_counters(ebpf, &table, before)?;
    active = map(ebpf, "ACTIVE")?.try_into().context("ACTIVE is no array")?;
    active.set(0, next, 0).context("cannot switch to the new routes")?;
    Ok(())
}

/// Counters that now stand for another route start anew.
fn clear_counters(ebpf: &mut Ebpf, table: &Table, before: Option<&Table>) -> Result<()> {
    let Some(before) = before else { return Ok(()) };
    let old: Vec<u16> = table::routes(before).map(|slot| slot.counter).collect();
    let kept: Vec<_> =
        table::routes(before).map(|slot| (slot.counter, datagram::tag(before, slot))).collect();
    let cpus = nr_cpus().map_err(|(_, error)| error).context("cannot count the CPUs")?;
    let mut counters: PerCpuArray<_, u64> =
        map(ebpf, "COUNTERS")?.try_into().context("COUNTERS is no array")?;
    for slot in table::routes(table) {
        let same = kept.contains(&(slot.counter, datagram::tag(table, slot)));
        if old.contains(&slot.counter) && !same && usize::from(slot.counter) < MAX_ROUTES {
            let zeros = PerCpuValues::try_from(vec![0; cpus]).context("one value for each CPU")?;
            counters.set(slot.counter.into(), zeros, 0).context("cannot clear a counter")?;
        }
    }
    Ok(())
}

/// Waits until no program runs that has begun before, so that none still reads what
/// is about to be written: programs run under RCU, whose grace period this is.
fn wait_for_programs() {
    const MEMBARRIER_CMD_GLOBAL: libc::c_int = 1;
    // SAFETY: the system call takes three integers and touches no memory.
    let result = unsafe { libc::syscall(libc::SYS_membarrier, MEMBARRIER_CMD_GLOBAL, 0, 0) };
    if result != 0 {
        // A kernel without it: no program runs nearly as long as this.
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
}

fn describe(interface: &Interface, attached: &Attached, egress: By, qdisc: bool) -> Result<Attachment> {
    let filter = |by: By| u8::from(by != By::Link);
    let made = [attached.by, egress].contains(&By::Filter { qdisc: true });
    Ok(Attachment {
        since: SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(1, |since| since.as_secs()),
        namespace: pins::namespace()?,
        interface: interface.index,
        hook: match attached.hook {
            Hook::Xdp => 0,
            Hook::XdpGeneric => 1,
            Hook::Tc => 2,
        },
        filter: filter(attached.by),
        egress_filter: filter(egress),
        qdisc: u8::from(qdisc || made),
        reserved: [0; 5],
        name: fixed(&interface.name),
        reason: fixed(&attached.why),
    })
}

pub(super) fn detach(name: &str) -> Result<()> {
    let mut gone = 0;
    for found in found()? {
        if found.is_here()? && found.interface() == name {
            remove(found)?;
            gone += 1;
        }
    }
    if gone == 0 {
        return Err(Error::Usage(format!(
            "mux is not attached to '{name}'; `underpass status` lists what is"
        )));
    }
    say(&format!("{name}: ports are no longer rewritten"))
}

fn remove(found: Found) -> Result<()> {
    let interface = found.interface();
    if found.is_here()? {
        hook::detach(INGRESS, &interface, &found.attached, &found.folder)?;
        hook::detach_egress(EGRESS, &interface, found.egress, &found.folder)?;
        if found.attachment.qdisc != 0 {
            hook::remove_qdisc(found.attachment.interface)?;
        }
    }
    found.folder.remove()
}

/// Removes every attachment and says what that was.
pub(crate) fn down() -> Result<Vec<String>> {
    let mut removed = vec![];
    for found in found()? {
        removed.push(format!("mux {}: detached from {}", found.interface(), found.attached.hook.word()));
        remove(found)?;
    }
    // What a crash left before it was done.
    Folder::all(FUNCTION)?.into_iter().try_for_each(Folder::remove)?;
    Ok(removed)
}

/// What is attached.
pub(crate) fn status() -> Result<Vec<Item>> {
    let mut items = super::listen::status()?;
    for found in found()? {
        let works = found.works()?;
        let why = if !works {
            "the interface is gone; `underpass down` removes what is left".to_owned()
        } else if found.is_here()? {
            found.attached.why.clone()
        } else {
            format!("{}; in another network namespace", found.attached.why)
        };
        let (on, path) = (found.interface(), found.attached.hook.word().to_owned());
        items.push(Item { function: FUNCTION, on, path, why, works, details: None });
    }
    Ok(items)
}

fn say(line: &str) -> Result<()> {
    Ok(writeln!(std::io::stdout(), "{line}").context("cannot print")?)
}

fn warn(line: &str) {
    // A warning that nobody reads stops nothing.
    let _ = writeln!(std::io::stderr(), "underpass: warning: {line}");
}

/// A text cut to what fits, ended by zeros.
fn fixed<const N: usize>(text: &str) -> [u8; N] {
    let mut bytes = [0; N];
    let length = text.floor_char_boundary(text.len().min(N - 1));
    bytes[..length].copy_from_slice(&text.as_bytes()[..length]);
    bytes
}

/// A text that is ended by zeros.
fn text(bytes: &[u8]) -> String {
    let length = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..length]).into_owned()
}
