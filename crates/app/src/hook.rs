//! Attaching to an interface for good: which hook to take, the pinned link that holds
//! the program there, and putting a new program in its place without a gap.
//!
//! XDP is attached by a link (Linux 5.9), TC by a TCX link (Linux 6.6) or else by a
//! netlink filter in a clsact qdisc, which needs no pin to stay.

use std::{
    io,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
    path::Path,
};

use anyhow::{Context as _, anyhow};
use aya::{
    Ebpf,
    programs::{
        LinkOrder, ProgramError, SchedClassifier, TcAttachType, Xdp, XdpMode,
        links::{FdLink, PinnedLink},
        loaded_programs,
        tc::{self, NlOptions, SchedClassifierLink, TcAttachOptions, TcHandle},
        xdp::XdpLink,
    },
};
use futures_util::TryStreamExt as _;
use rtnetlink::packet_route::link::{LinkAttribute, LinkFlags, LinkInfo, LinkLayerType, LinkXdp};

use crate::{
    error::{Error, Result},
    pins::Folder,
};

/// What `--hook` says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum Wanted {
    /// Native XDP, else generic XDP, else TC
    #[default]
    Auto,
    /// Native XDP: in the driver, before the kernel makes a packet buffer
    Xdp,
    /// Generic XDP: on any interface, after the packet buffer is made
    XdpGeneric,
    /// TC ingress: after generic receive offload, beside other programs
    Tc,
}

/// Where a program sits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hook {
    /// Native XDP.
    Xdp,
    /// Generic XDP.
    XdpGeneric,
    /// TC ingress.
    Tc,
}

impl Hook {
    /// The word for it on the command line.
    pub fn word(self) -> &'static str {
        match self {
            Self::Xdp => "xdp",
            Self::XdpGeneric => "xdp-generic",
            Self::Tc => "tc",
        }
    }

    /// The hook of a word on the command line.
    pub fn from_word(word: &str) -> Option<Self> {
        [Self::Xdp, Self::XdpGeneric, Self::Tc].into_iter().find(|hook| hook.word() == word)
    }

    /// The name of the pinned link.
    fn pin(self) -> &'static str {
        match self {
            Self::Xdp => "link-xdp",
            Self::XdpGeneric => "link-xdp-generic",
            Self::Tc => "link-tc",
        }
    }
}

/// How a program came to sit where it does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attached {
    /// Where.
    pub hook: Hook,
    /// What holds it there.
    pub by: By,
    /// Why there.
    pub why: String,
}

/// What holds a program at its hook.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum By {
    /// A pinned link.
    Link,
    /// A netlink filter of TC. `qdisc`: the clsact qdisc was made for it.
    Filter {
        /// Whether nobody else had made one.
        qdisc: bool,
    },
}

/// An interface of the network namespace that this runs in.
#[derive(Debug, Clone)]
pub struct Interface {
    /// Its name.
    pub name: String,
    /// Its number.
    pub index: u32,
    /// Whether it is set up.
    pub up: bool,
    /// What kind of virtual interface it is, if it is one: `veth`, `bridge` and so on.
    pub virtual_kind: Option<String>,
    /// Whether its packets have an Ethernet header.
    pub ethernet: bool,
    /// The identifiers of the XDP programs on it.
    xdp: Vec<u32>,
}

impl Interface {
    /// Looks an interface up.
    ///
    /// # Errors
    /// [`Error::Usage`] names it if there is none.
    pub fn find(name: &str) -> Result<Self> {
        let all = Self::all()?;
        let names: Vec<_> = all.iter().map(|interface| interface.name.clone()).collect();
        all.into_iter().find(|interface| interface.name == name).ok_or_else(|| {
            Error::Usage(format!("there is no interface {name:?}; there are: {}", names.join(", ")))
        })
    }

    /// All interfaces.
    ///
    /// # Errors
    /// Where the kernel does not list them.
    pub fn all() -> Result<Vec<Self>> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .context("cannot start a runtime")?;
        let links = runtime.block_on(async {
            let (connection, handle, _) = rtnetlink::new_connection()?;
            let connection = tokio::spawn(connection);
            let links = handle.link().get().execute().try_collect::<Vec<_>>().await;
            connection.abort();
            links.map_err(io::Error::other)
        });
        let links = links.context("cannot list the interfaces")?;
        Ok(links.into_iter().filter_map(Self::from_message).collect())
    }

    fn from_message(message: rtnetlink::packet_route::link::LinkMessage) -> Option<Self> {
        let mut interface = Self {
            name: String::new(),
            index: message.header.index,
            up: message.header.flags.contains(LinkFlags::Up),
            virtual_kind: (message.header.link_layer_type == LinkLayerType::Loopback)
                .then(|| "loopback".into()),
            ethernet: matches!(
                message.header.link_layer_type,
                LinkLayerType::Ether | LinkLayerType::Loopback
            ),
            xdp: vec![],
        };
        for attribute in message.attributes {
            if let LinkAttribute::IfName(name) = attribute {
                interface.name = name;
            } else if let LinkAttribute::LinkInfo(infos) = attribute {
                let kind = infos.into_iter().find_map(|info| {
                    if let LinkInfo::Kind(kind) = info { Some(kind.to_string()) } else { None }
                });
                interface.virtual_kind = kind.or(interface.virtual_kind);
            } else if let LinkAttribute::Xdp(xdp) = attribute {
                for entry in xdp {
                    if let LinkXdp::ProgId(id)
                    | LinkXdp::DrvProgId(id)
                    | LinkXdp::SkbProgId(id)
                    | LinkXdp::HwProgId(id) = entry
                        && id != 0
                        && !interface.xdp.contains(&id)
                    {
                        interface.xdp.push(id);
                    }
                }
            }
        }
        (!interface.name.is_empty()).then_some(interface)
    }

    /// Whose XDP program sits on the interface, if one does.
    fn xdp_program(&self) -> Option<String> {
        let id = self.xdp.first()?;
        let info = loaded_programs().flatten().find(|info| info.id() == *id);
        let name = info.as_ref().and_then(|info| info.name_as_str()).filter(|name| !name.is_empty());
        Some(name.map_or_else(|| format!("program {id}"), |name| format!("program {id} ({name})")))
    }
}

/// A program that can sit in XDP and in TC, by the names of its two halves.
#[derive(Debug, Clone, Copy)]
pub struct Program {
    /// In XDP.
    pub xdp: &'static str,
    /// In TC.
    pub tc: &'static str,
}

/// Loads and attaches a program where it suits, and pins link and program in the
/// folder. What `current` says is there already is replaced without a gap.
///
/// # Errors
/// [`Error::Unable`] where the kernel, the interface or the privileges do not allow what
/// was asked for.
pub fn attach(
    ebpf: &mut Ebpf,
    program: Program,
    interface: &Interface,
    wanted: Wanted,
    current: Option<&Attached>,
    folder: &Folder,
) -> Result<Attached> {
    let Some(current) = current else { return attach_new(ebpf, program, interface, wanted, folder) };
    let stays = match wanted {
        Wanted::Auto => true,
        Wanted::Xdp => current.hook == Hook::Xdp,
        Wanted::XdpGeneric => current.hook == Hook::XdpGeneric,
        Wanted::Tc => current.hook == Hook::Tc,
    };
    if stays {
        replace(ebpf, program, interface, current, folder)?;
        return Ok(current.clone());
    }
    // The XDP program on the interface is our own. From and to TC the new program works
    // before the old one goes; native and generic XDP exclude each other.
    let mut interface = interface.clone();
    if current.hook != Hook::Tc {
        interface.xdp.clear();
    }
    let exclusive = current.hook != Hook::Tc && wanted != Wanted::Tc;
    if exclusive {
        detach(program, &interface.name, current, folder)?;
    }
    let attached = attach_new(ebpf, program, &interface, wanted, folder)?;
    if !exclusive {
        detach(program, &interface.name, current, folder)?;
    }
    Ok(attached)
}

fn attach_new(
    ebpf: &mut Ebpf,
    program: Program,
    interface: &Interface,
    wanted: Wanted,
    folder: &Folder,
) -> Result<Attached> {
    let name = &interface.name;
    let foreign = interface.xdp_program();
    let by_xdp = |hook: Hook, why: String| Attached { hook, by: By::Link, why };
    let asked = |hook: Hook| format!("--hook {} says so", hook.word());
    let try_xdp = |ebpf: &mut Ebpf, hook: Hook| attach_xdp(ebpf, program.xdp, interface, hook, folder);
    let try_tc = |ebpf: &mut Ebpf, why: String| {
        let pin = folder.pin(Hook::Tc.pin());
        let by = attach_classifier(ebpf, program.tc, interface, TcAttachType::Ingress, &pin)?;
        pin_program(classifier(ebpf, program.tc)?, &folder.pin("program"))?;
        Ok(Attached { hook: Hook::Tc, by, why })
    };
    let only = match wanted {
        Wanted::Auto => None,
        Wanted::Xdp => Some(Hook::Xdp),
        Wanted::XdpGeneric => Some(Hook::XdpGeneric),
        Wanted::Tc => return try_tc(ebpf, asked(Hook::Tc)),
    };
    if let Some(hook) = only {
        if let Some(foreign) = foreign {
            return Err(Error::Unable(format!(
                "{name} has an XDP program already: {foreign}; --hook tc goes beside it"
            )));
        }
        try_xdp(ebpf, hook)?.map_err(|why| {
            Error::Unable(format!("{name} does not take {}: {why}; try --hook auto", hook.word()))
        })?;
        return Ok(by_xdp(hook, asked(hook)));
    }
    if let Some(foreign) = foreign {
        return try_tc(ebpf, format!("its XDP is taken by {foreign}"));
    }
    let native = match try_xdp(ebpf, Hook::Xdp)? {
        Ok(()) => return Ok(by_xdp(Hook::Xdp, "its driver runs XDP".to_owned())),
        Err(why) => why,
    };
    let generic = match try_xdp(ebpf, Hook::XdpGeneric)? {
        Ok(()) => return Ok(by_xdp(Hook::XdpGeneric, format!("its driver does not run XDP ({native})"))),
        Err(why) => why,
    };
    try_tc(ebpf, format!("it takes no XDP (native: {native}; generic: {generic})"))
}

/// Attaches to XDP, or says why the interface does not take it.
fn attach_xdp(
    ebpf: &mut Ebpf,
    name: &str,
    interface: &Interface,
    hook: Hook,
    folder: &Folder,
) -> Result<Result<(), String>> {
    let mode = if hook == Hook::Xdp { XdpMode::Driver } else { XdpMode::Skb };
    let program = xdp(ebpf, name)?;
    let link = match program.attach_to_if_index(interface.index, mode) {
        Ok(link) => program.take_link(link).context("cannot take the link over")?,
        Err(error) => return Ok(Err(reason(&error))),
    };
    let Ok(link) = FdLink::try_from(link) else {
        return Ok(Err("this kernel has no XDP links".to_owned()));
    };
    pin_link(link, &folder.pin(hook.pin()))?;
    pin_program(program, &folder.pin("program"))?;
    Ok(Ok(()))
}

/// Attaches a TC program at egress, beside the one at ingress, or replaces the one that
/// `current` says is there.
///
/// # Errors
/// [`Error::Unable`] where the kernel refuses.
pub fn attach_egress(
    ebpf: &mut Ebpf,
    name: &str,
    interface: &Interface,
    current: Option<By>,
    folder: &Folder,
) -> Result<By> {
    let pin = folder.pin(EGRESS_PIN);
    let by = match current {
        Some(by) => {
            replace_classifier(ebpf, name, interface, TcAttachType::Egress, by, &pin)?;
            by
        }
        None => attach_classifier(ebpf, name, interface, TcAttachType::Egress, &pin)?,
    };
    pin_program(classifier(ebpf, name)?, &folder.pin("program-egress"))?;
    Ok(by)
}

const EGRESS_PIN: &str = "link-egress";
/// Priority and handle of netlink filters, to know our own again by.
const FILTER_PRIORITY: u16 = 7;
const FILTER_HANDLE: TcHandle = TcHandle::new(0, 0x7570);

fn attach_classifier(
    ebpf: &mut Ebpf,
    name: &str,
    interface: &Interface,
    at: TcAttachType,
    pin: &Path,
) -> Result<By> {
    let program = classifier(ebpf, name)?;
    // First, so that nothing sees a packet before.
    let first = TcAttachOptions::TcxOrder(LinkOrder::first());
    if let Ok(link) = program.attach_with_options(&interface.name, at, first) {
        let link = program.take_link(link).context("cannot take the link over")?;
        let link = FdLink::try_from(link).map_err(|error| anyhow!("a TCX link is no link: {error}"))?;
        pin_link(link, pin)?;
        return Ok(By::Link);
    }
    let qdisc = tc::qdisc_add_clsact(&interface.name).is_ok();
    let filter = NlOptions { priority: FILTER_PRIORITY, handle: FILTER_HANDLE, classid: None };
    let link = program
        .attach_with_options(&interface.name, at, TcAttachOptions::Netlink(filter))
        .map_err(|error| Error::Unable(format!("{} does not take tc: {}", interface.name, reason(&error))))?;
    // Dropping the link would remove the filter.
    std::mem::forget(program.take_link(link).context("cannot take the filter over")?);
    Ok(By::Filter { qdisc })
}

/// Puts the program in the place of the one that is attached.
fn replace(
    ebpf: &mut Ebpf,
    program: Program,
    interface: &Interface,
    current: &Attached,
    folder: &Folder,
) -> Result<()> {
    let (link, pinned) = (folder.pin(current.hook.pin()), folder.pin("program"));
    if current.hook == Hook::Tc {
        replace_classifier(ebpf, program.tc, interface, TcAttachType::Ingress, current.by, &link)?;
        return pin_program(classifier(ebpf, program.tc)?, &pinned);
    }
    let link = FdLink::from(pinned_link(&link)?);
    let link = XdpLink::try_from(link).map_err(|error| anyhow!("the pin is no XDP link: {error}"))?;
    let program = xdp(ebpf, program.xdp)?;
    let link = program
        .attach_to_link(link)
        .map_err(|error| anyhow!("cannot replace the XDP program: {}", reason(&error)))?;
    // The pin holds it from here on.
    drop(program.take_link(link).context("cannot take the link over")?);
    pin_program(program, &pinned)
}

fn replace_classifier(
    ebpf: &mut Ebpf,
    name: &str,
    interface: &Interface,
    at: TcAttachType,
    by: By,
    pin: &Path,
) -> Result<()> {
    let program = classifier(ebpf, name)?;
    let link = match by {
        By::Link => SchedClassifierLink::try_from(FdLink::from(pinned_link(pin)?))
            .map_err(|error| anyhow!("the pin is no TCX link: {error}"))?,
        By::Filter { .. } => {
            SchedClassifierLink::attached(&interface.name, at, FILTER_PRIORITY, FILTER_HANDLE, None)
                .with_context(|| format!("no interface {}", interface.name))?
        }
    };
    let link = program
        .attach_to_link(link)
        .map_err(|error| anyhow!("cannot replace the TC program: {}", reason(&error)))?;
    let link = program.take_link(link).context("cannot take the link over")?;
    match by {
        // The pin holds it from here on.
        By::Link => drop(link),
        // Dropping the link would remove the filter.
        By::Filter { .. } => std::mem::forget(link),
    }
    Ok(())
}

/// Detaches a program from ingress. What else the folder holds stays.
///
/// # Errors
/// Where a pin or a filter cannot be removed.
pub fn detach(program: Program, interface: &str, attached: &Attached, folder: &Folder) -> Result<()> {
    let pin = folder.pin(attached.hook.pin());
    release(program.tc, interface, TcAttachType::Ingress, attached.by, &pin)
}

/// Detaches a program from egress.
///
/// # Errors
/// Where a pin or a filter cannot be removed.
pub fn detach_egress(name: &str, interface: &str, by: By, folder: &Folder) -> Result<()> {
    release(name, interface, TcAttachType::Egress, by, &folder.pin(EGRESS_PIN))
}

fn release(name: &str, interface: &str, at: TcAttachType, by: By, pin: &Path) -> Result<()> {
    match by {
        By::Link => {
            detach_now(pin);
            match std::fs::remove_file(pin) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    Err(anyhow!(error).context(format!("cannot remove {}", pin.display())).into())
                }
                _ => Ok(()),
            }
        }
        By::Filter { .. } => {
            // An interface that is gone has taken its filters with it.
            if nix::net::if_::if_nametoindex(interface).is_err() {
                return Ok(());
            }
            match tc::qdisc_detach_program(interface, at, name) {
                Err(tc::TcError::IoError(error)) if error.kind() == io::ErrorKind::NotFound => Ok(()),
                result => Ok(result.with_context(|| format!("cannot remove the filter from {interface}"))?),
            }
        }
    }
}

/// Detaches a pinned link at once. Without this the kernel does it a moment after its
/// last pin is gone, when somebody may want to attach again already. Where it fails,
/// removing the pin still detaches.
fn detach_now(pin: &Path) {
    // `bpf(2)`'s commands that aya does not have: it keeps a link's descriptor to itself,
    // so that another one has to be opened by the link's number. Since Linux 5.9.
    const LINK_GET_FD_BY_ID: libc::c_int = 30;
    const LINK_DETACH: libc::c_int = 34;
    let command = |command: libc::c_int, first: u32| {
        let mut attribute = [0_u32; 32];
        attribute[0] = first;
        // SAFETY: the attribute is longer than what these commands read, and outlives the call.
        let result =
            unsafe { libc::syscall(libc::SYS_bpf, command, &raw mut attribute, size_of_val(&attribute)) };
        i32::try_from(result).ok().filter(|result| *result >= 0)
    };
    let Ok(link) = PinnedLink::from_pin(pin) else { return };
    let Ok(info) = FdLink::from(link).info() else { return };
    if let Some(fd) = command(LINK_GET_FD_BY_ID, info.id()) {
        // SAFETY: the kernel has just opened it for us.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        command(LINK_DETACH, fd.as_raw_fd() as u32);
    }
}

/// The name of an interface of the network namespace that this runs in.
pub fn interface_name(index: u32) -> Option<String> {
    let name = nix::net::if_::if_indextoname(index).ok()?.into_string().ok()?;
    // For a number that was in use this gives an empty name instead of an error.
    (!name.is_empty()).then_some(name)
}

/// Whether the link of an attachment still has its interface: one that is gone leaves
/// a link that is attached to nothing.
pub fn is_alive(attached: &Attached, interface: u32, folder: &Folder) -> bool {
    interface_name(interface).is_some()
        && (attached.by != By::Link || folder.pin(attached.hook.pin()).exists())
}

fn xdp<'a>(ebpf: &'a mut Ebpf, name: &str) -> Result<&'a mut Xdp> {
    let program = ebpf.program_mut(name).with_context(|| format!("the object has no program {name}"))?;
    let program: &mut Xdp = program.try_into().with_context(|| format!("{name} is no XDP program"))?;
    loaded(program.load(), name)?;
    Ok(program)
}

fn classifier<'a>(ebpf: &'a mut Ebpf, name: &str) -> Result<&'a mut SchedClassifier> {
    let program = ebpf.program_mut(name).with_context(|| format!("the object has no program {name}"))?;
    let program: &mut SchedClassifier =
        program.try_into().with_context(|| format!("{name} is no TC program"))?;
    loaded(program.load(), name)?;
    Ok(program)
}

fn loaded(result: Result<(), ProgramError>, name: &str) -> Result<()> {
    match result {
        Ok(()) | Err(ProgramError::AlreadyLoaded) => Ok(()),
        Err(error) => Err(refused(&error, name)),
    }
}

/// Why the kernel did not load a program, in words that say what to do.
fn refused(error: &ProgramError, name: &str) -> Error {
    if let ProgramError::LoadError { io_error, verifier_log } = error {
        if io_error.kind() == io::ErrorKind::PermissionDenied && verifier_log.to_string().is_empty() {
            return Error::Unable(format!(
                "the kernel did not let us load {name}: run as root or with CAP_BPF and CAP_NET_ADMIN"
            ));
        }
        return Error::Unable(format!(
            "the kernel refused {name}: {io_error}; its log ends: {}",
            tail(verifier_log)
        ));
    }
    Error::Failed(anyhow!("cannot load {name}: {error}"))
}

fn tail(log: &impl std::fmt::Display) -> String {
    let log = log.to_string();
    let lines: Vec<_> = log.lines().filter(|line| !line.trim().is_empty()).collect();
    lines[lines.len().saturating_sub(4)..].join(" | ")
}

/// The heart of an attachment's failure: what the kernel said.
fn reason(error: &ProgramError) -> String {
    let mut inner: &dyn std::error::Error = error;
    while let Some(source) = inner.source() {
        inner = source;
    }
    inner.to_string()
}

fn pinned_link(pin: &Path) -> Result<PinnedLink> {
    Ok(PinnedLink::from_pin(pin).map_err(|error| anyhow!("cannot open {}: {error}", pin.display()))?)
}

fn pin_link(link: FdLink, pin: &Path) -> Result<()> {
    link.pin(pin).map_err(|error| anyhow!("cannot pin the link at {}: {error}", pin.display()))?;
    Ok(())
}

/// A program that can be pinned.
trait Pin {
    fn pin_at(&mut self, path: &Path) -> Result<(), aya::pin::PinError>;
}

impl Pin for Xdp {
    fn pin_at(&mut self, path: &Path) -> Result<(), aya::pin::PinError> {
        self.pin(path)
    }
}

impl Pin for SchedClassifier {
    fn pin_at(&mut self, path: &Path) -> Result<(), aya::pin::PinError> {
        self.pin(path)
    }
}

/// Pins a program, over one that may be pinned there.
fn pin_program(program: &mut impl Pin, path: &Path) -> Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(anyhow!(error).context(format!("cannot remove {}", path.display())).into());
        }
        _ => {}
    }
    program.pin_at(path).map_err(|error| anyhow!("cannot pin the program at {}: {error}", path.display()))?;
    Ok(())
}

/// Removes the clsact qdisc that was made for a filter, unless others use it by now.
///
/// # Errors
/// Where the kernel does not list the filters.
pub fn remove_qdisc(interface: u32) -> Result<()> {
    let Ok(index) = i32::try_from(interface) else { return Ok(()) };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start a runtime")?;
    let result = runtime.block_on(async {
        let (connection, handle, _) = rtnetlink::new_connection()?;
        let connection = tokio::spawn(connection);
        let ingress = handle.traffic_filter(index).get().ingress().execute();
        let egress = handle.traffic_filter(index).get().egress().execute();
        let others = (ingress.try_collect::<Vec<_>>().await, egress.try_collect::<Vec<_>>().await);
        if let (Ok(ingress), Ok(egress)) = others
            && ingress.is_empty()
            && egress.is_empty()
        {
            let mut delete = handle.qdisc().del(index);
            delete.message_mut().header.parent = CLSACT.into();
            // If it is gone already, so much the better.
            let _ = delete.execute().await;
        }
        connection.abort();
        io::Result::Ok(())
    });
    Ok(result.context("cannot look at the filters")?)
}

/// `TC_H_CLSACT`, the clsact qdisc's place.
const CLSACT: u32 = 0xffff_fff1;
