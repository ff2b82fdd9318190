//! `mux attach` and `detach`: the programs and the table in the kernel, pinned.

use std::fs;

use anyhow::Context as _;
use aya::{
    Ebpf, EbpfLoader,
    maps::{Array, PerCpuArray, PerCpuValues},
    util::nr_cpus,
};
use underpass_abi::mux::{MAX_ROUTES, Table};
use underpass_logic::mux::table;

use super::{
    datagram::{self, Default, Plan},
    route::Lengths,
};
use crate::{
    attachment::{Found, Function, array, map, say},
    error::{Error, Result},
    hook::{self, Attached, Interface, Program, Wanted},
    object,
    pins::Folder,
    status::Item,
};

/// The parts of what is attached: what sends datagrams on, and what sees replies leave.
pub(crate) const MUX: Function =
    Function { word: "mux", ingress: Program { xdp: "mux_xdp", tc: "mux_in" }, egress: "mux_out" };
/// The maps that are kept from one attachment to the next.
const KEPT: [&str; 4] = ["TABLES", "ACTIVE", "FLOWS", "COUNTERS"];
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

/// The table that is in use.
///
/// # Errors
/// Where the pinned maps cannot be read.
pub(super) fn table(found: &Found) -> Result<Box<Table>> {
    let active = array::<u32>(&found.folder, "ACTIVE")?.get(&0, 0).context("cannot read ACTIVE")?;
    let table = array::<Table>(&found.folder, "TABLES")?.get(&active, 0).context("cannot read TABLES")?;
    Ok(Box::new(table))
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
    let attached =
        MUX.attach(&interface, |folder, before| attach_in(folder, &interface, &plan, args, before))?;
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
    let old = before.map(table).transpose()?;
    put_table(&mut ebpf, plan, old.as_deref())?;
    // Replies first: none leaves with the service's port.
    let egress = before.and_then(|found| found.egress);
    let egress = hook::attach_egress(&mut ebpf, MUX.egress, interface, egress, folder)?;
    let current = before.map(|found| &found.attached);
    let attached = attach_ingress(&mut ebpf, interface, args.hook, current, folder);
    if attached.is_err() && before.is_none() {
        // What failed is of more interest than whether this does.
        let _ = hook::detach_egress(MUX.egress, &interface.name, egress, folder);
    }
    let attached = attached?;
    Function::note(&mut ebpf, interface, &attached, Some(egress), before)?;
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
        return hook::attach(ebpf, MUX.ingress, interface, wanted, current, folder);
    }
    let mut tc = |why: String| {
        let attached = hook::attach(ebpf, MUX.ingress, interface, Wanted::Tc, None, folder)?;
        Ok(Attached { why, ..attached })
    };
    if let Some(why) = needs_tc(interface) {
        return tc(why);
    }
    match hook::attach(ebpf, MUX.ingress, interface, Wanted::Xdp, None, folder) {
        Ok(attached) => Ok(Attached {
            why: "its driver runs XDP, and what comes in on it is delivered here".to_owned(),
            ..attached
        }),
        Err(Error::Unable(why)) => {
            let attached = hook::attach(ebpf, MUX.ingress, interface, Wanted::Tc, None, folder)?;
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
    MUX.load(loader, object::MUX, &KEPT, Some(folder))
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

pub(super) fn detach(name: &str) -> Result<()> {
    MUX.detach(name)?;
    say(&format!("{name}: ports are no longer rewritten"))
}

/// What is attached, and who listens.
pub(crate) fn status() -> Result<Vec<Item>> {
    let mut items = super::listen::status()?;
    items.extend(MUX.status()?);
    Ok(items)
}
