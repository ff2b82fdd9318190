//! Attaching so that it outlives the process, detaching, and what both leave behind:
//! pins, and the helper process.

use std::{
    fs::{self, File},
    io::{BufRead as _, BufReader},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::Mutex,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, anyhow};
use aya::{
    maps::{HashMap, Map, MapData},
    programs::{BtfTracePoint, CgroupAttachMode, SkMsg, SockOps, links::FdLink},
};
use nix::{
    sys::{
        signal::{SigSet, Signal, kill},
        signalfd::{SfdFlags, SignalFd},
        statfs,
    },
    unistd::Pid,
};
use underpass_abi::shortcut::{Control, HABIT_BLOCKS, HABIT_URGENT, HABIT_WAITS_FOR_ALL};

use super::{
    Scope, cgroup,
    doctor::NEEDED,
    helper,
    iterate::Iterator,
    plane::{Programs, Tables},
    probe::{self, Finding},
};
use crate::{
    capabilities,
    error::{Error, Result},
    pins::Folder,
};

const FUNCTION: &str = "shortcut";
/// There is one attachment: a socket cannot be in two maps of this kind.
const KEY: &str = "host";
/// Links to control groups are pinned as this and the group's number.
const MEET: &str = "meet-";
/// How long `detach` waits for readers to read what was redirected to them.
const PATIENCE: Duration = Duration::from_secs(5);

/// Arguments of `underpass shortcut attach`.
#[derive(Debug, clap::Args)]
pub struct AttachArgs {
    /// Accelerate connections whose ends are both in this control group (a path under
    /// the cgroup2 mount, absolute or relative to it); may be repeated
    #[arg(long, value_name = "PATH")]
    cgroup: Vec<PathBuf>,
    /// Accelerate connections from or to these ports only
    #[arg(long, value_name = "N", num_args = 1.., value_parser = clap::value_parser!(u16).range(1..))]
    port: Vec<u16>,
    /// Attach although this behaviour does not hold here (`underpass doctor` lists them)
    #[arg(long, value_name = "NAME")]
    accept_risk: Vec<String>,
}

/// Attaches, and says in two lines what is accelerated and what not to rely on.
pub(super) fn attach(args: &AttachArgs) -> Result<[String; 2]> {
    let known: Vec<_> = probe::BEHAVIOURS.iter().map(|behaviour| behaviour.name).collect();
    if let Some(unknown) = args.accept_risk.iter().find(|risk| !known.contains(&risk.as_str())) {
        return Err(Error::Usage(format!("--accept-risk {unknown}: expected one of {}", known.join(", "))));
    }
    let cgroups = args.cgroup.iter().map(|path| find_cgroup(path)).collect::<Result<Vec<_>>>()?;
    capabilities::require(&NEEDED).map_err(|e| Error::Unable(format!("{e:#}")))?;
    if Folder::find(FUNCTION, KEY).is_some() {
        return Err(anyhow!("the shortcut is attached already: underpass shortcut detach first").into());
    }
    let findings = probe::run().map_err(|e| Error::Unable(format!("the probe failed: {e:#}")))?;
    check(&findings, args)?;

    let holds = |name: &str| findings.iter().any(|f| f.behaviour.name == name && f.wrong.is_none());
    let accepts = |name: &str| holds(name) || args.accept_risk.iter().any(|risk| risk == name);
    let habits = [
        ("blocking-recv", HABIT_BLOCKS),
        ("msg-waitall", HABIT_WAITS_FOR_ALL),
        ("out-of-band", HABIT_URGENT),
    ];
    let accepted = habits.iter().filter(|(name, _)| accepts(name)).map(|(_, habit)| habit).sum();
    let scope = Scope { ports: args.port.clone(), accepted };
    let cgroups = if cgroups.is_empty() { vec![cgroup::root()?] } else { cgroups };
    let folder = Folder::create(FUNCTION, KEY)?;
    if let Err(error) = pin(&folder, &scope, &cgroups) {
        // What was pinned so far must not stay; the first error is the one to tell.
        let _ = folder.remove();
        return Err(error.into());
    }
    let wrong: Vec<_> = findings.iter().filter(|f| f.wrong.is_some()).map(|f| f.behaviour.name).collect();
    let cgroups: Vec<_> = cgroups.iter().map(|path| path.display().to_string()).collect();
    let ports: Vec<_> = args.port.iter().map(ToString::to_string).collect();
    let ports = if ports.is_empty() { "all ports".into() } else { format!("port {}", ports.join(", ")) };
    let reliance = if wrong.is_empty() {
        "on this kernel, accelerated sockets were found to behave as those of TCP".into()
    } else {
        format!("programs in it must not rely on: {} (see docs/shortcut.md)", wrong.join(", "))
    };
    Ok([format!("the shortcut is active in {}, {ports}", cgroups.join(", ")), reliance])
}

/// Whether what the probe found allows to attach.
fn check(findings: &[Finding], args: &AttachArgs) -> Result<()> {
    let fatal = findings.iter().find(|finding| {
        finding.is_fatal() && !args.accept_risk.iter().any(|risk| risk == finding.behaviour.name)
    });
    if let Some(Finding { behaviour, wrong: Some(wrong) }) = fatal {
        return Err(Error::Unable(format!(
            "this kernel would lose data: {}: {wrong}; --accept-risk {0} attaches all the same",
            behaviour.name
        )));
    }
    let wrong: Vec<_> = findings.iter().filter(|f| f.wrong.is_some()).map(|f| f.behaviour.name).collect();
    if args.cgroup.is_empty() && args.port.is_empty() && !wrong.is_empty() {
        return Err(Error::Unable(format!(
            "accelerated sockets do not behave as those of TCP on this kernel in: {}; so it takes a \
             --cgroup or a --port whose programs do not rely on that (see docs/shortcut.md)",
            wrong.join(", ")
        )));
    }
    Ok(())
}

fn find_cgroup(path: &Path) -> Result<PathBuf> {
    let root = cgroup::root().map_err(|e| Error::Unable(format!("{e:#}")))?;
    let full = if path.starts_with(&root) { path.to_owned() } else { root.join(path) };
    let is_cgroup = statfs::statfs(&full)
        .is_ok_and(|stat| stat.filesystem_type() == statfs::CGROUP2_SUPER_MAGIC && full.is_dir());
    if is_cgroup {
        return Ok(full);
    }
    Err(Error::Usage(format!("--cgroup {}: expected a folder under {}", path.display(), root.display())))
}

/// Loads, pins and attaches everything, the link that notes new connections last.
fn pin(folder: &Folder, scope: &Scope, cgroups: &[PathBuf]) -> anyhow::Result<()> {
    let mut programs = Programs::load(scope)?;
    for (name, map) in programs.ebpf.maps() {
        // The object's own sections of constants are maps, too, and have dots in their names.
        if !name.starts_with('.') {
            map.pin(folder.pin(name)).with_context(|| format!("cannot pin {name}"))?;
        }
    }
    let sockets = programs.sockets()?;
    let send: &mut SkMsg = programs.get("shortcut_send")?;
    let link = send.attach(&sockets).context("cannot attach shortcut_send")?;
    // It is attached to the map and lasts as long as that; dropping the link would end it.
    std::mem::forget(send.take_link(link)?);
    let read: &mut BtfTracePoint = programs.get("shortcut_read")?;
    let link = read.attach().context("cannot attach shortcut_read")?;
    let link: FdLink = read.take_link(link)?.into();
    link.pin(folder.pin("read")).context("cannot pin a link")?;
    programs.iterator()?.pin(&folder.pin("enter")).context("cannot pin the iterator")?;

    let mut tables = open(folder)?;
    tables.set_control(Control { accepted: scope.accepted, ..Control::default() })?;
    start_helper()?;

    let meet: &mut SockOps = programs.get("shortcut_meet")?;
    for path in cgroups {
        let file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
        let link = meet.attach(&file, CgroupAttachMode::Single);
        let link = link.with_context(|| format!("cannot attach to {}", path.display()))?;
        let link: FdLink = meet.take_link(link)?.try_into()?;
        let name = format!("{MEET}{}", file.metadata()?.ino());
        link.pin(folder.pin(&name)).context("cannot pin a link")?;
    }
    Ok(())
}

fn open(folder: &Folder) -> anyhow::Result<Tables> {
    Tables::new(Iterator::Pinned(folder.pin("enter")), |name| {
        let map =
            MapData::from_pin(folder.pin(name)).with_context(|| format!("cannot open the pin {name}"))?;
        Ok(Map::from_map_data(map)?)
    })
}

/// What is attached.
pub(super) struct Attached {
    /// Its tables.
    pub(super) tables: Tables,
    /// The numbers of the control groups in scope.
    pub(super) cgroups: Vec<u64>,
    /// The ports in scope; none means all.
    pub(super) ports: Vec<u16>,
}

impl Attached {
    /// What is attached, if anything is.
    pub(super) fn find() -> Result<Option<Self>> {
        let Some(folder) = Folder::find(FUNCTION, KEY) else { return Ok(None) };
        capabilities::require(&NEEDED).map_err(|e| Error::Unable(format!("{e:#}")))?;
        let tables = open(&folder)?;
        let ports = MapData::from_pin(folder.pin("PORTS")).context("cannot open the pin PORTS")?;
        let ports: HashMap<_, u16, u8> =
            Map::from_map_data(ports).and_then(TryInto::try_into).context("PORTS is no hash")?;
        let mut ports: Vec<_> = ports.keys().filter_map(Result::ok).collect();
        ports.sort_unstable();
        let cgroups = links(&folder).iter().filter_map(|path| number(path)).collect();
        Ok(Some(Self { tables, cgroups, ports }))
    }

    /// The helper's process, if it is alive.
    pub(super) fn helper(&self) -> Result<Option<u32>> {
        let Control { helper, helper_started, .. } = self.tables.control()?;
        Ok((helper != 0 && started(helper) == Some(helper_started)).then_some(helper))
    }
}

/// The pinned links to control groups.
fn links(folder: &Folder) -> Vec<PathBuf> {
    let parent = folder.pin("");
    let entries = fs::read_dir(parent).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).filter(|path| number(path).is_some()).collect()
}

fn number(link: &Path) -> Option<u64> {
    link.file_name()?.to_str()?.strip_prefix(MEET)?.parse().ok()
}

/// Detaches: new connections are left to TCP at once, those that are accelerated go
/// over to it once everything that was redirected is read.
pub(super) fn detach() -> Result<String> {
    let Some(attached) = Attached::find()? else {
        return Err(anyhow!("the shortcut is not attached").into());
    };
    let helper = match attached.helper()? {
        Some(helper) => helper,
        // It died: another one cleans up.
        None => start_helper()?,
    };
    // Told to end, the helper empties the map and removes the pins.
    kill(Pid::from_raw(helper as i32), Signal::SIGTERM).context("cannot tell the helper to end")?;
    let deadline = Instant::now() + PATIENCE;
    while Folder::find(FUNCTION, KEY).is_some() {
        if Instant::now() > deadline {
            return Ok(format!(
                "detached; process {helper} stays until readers have read what was redirected to them"
            ));
        }
        thread::sleep(Duration::from_millis(5));
    }
    Ok("detached".into())
}

/// Leaves a process running that puts sockets into the map and takes them out. It is
/// at work when this returns.
fn start_helper() -> anyhow::Result<u32> {
    let mut child = Command::new("/proc/self/exe")
        .args(["shortcut", "serve"])
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .context("cannot start the helper")?;
    let mut line = String::new();
    BufReader::new(child.stdout.take().context("no pipe")?).read_line(&mut line)?;
    if line.trim() == "ready" {
        return Ok(child.id());
    }
    let status = child.wait()?;
    Err(anyhow!("the helper did not start: {}: {status}", line.trim()))
}

/// The helper: runs until it is told to end, then empties the map and removes the pins.
pub(super) fn serve() -> Result<()> {
    let folder = Folder::find(FUNCTION, KEY).context("the shortcut is not attached")?;
    let tables = Mutex::new(open(&folder)?);
    let me = std::process::id();
    let started = started(me).context("cannot read /proc/self/stat")?;
    let control = helper::lock(&tables).control()?;
    helper::lock(&tables).set_control(Control { helper: me, helper_started: started, ..control })?;
    // It outlives the terminal that it was started from. It fails where this process
    // leads a group already, which then is as good.
    let _ = nix::unistd::setsid();
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGTERM);
    signals.add(Signal::SIGINT);
    signals.thread_block().context("cannot block signals")?;
    let signals = SignalFd::with_flags(&signals, SfdFlags::SFD_CLOEXEC).context("cannot make a signalfd")?;
    // Whoever started it reads this one line.
    let _ = std::io::Write::write_all(&mut std::io::stdout(), b"ready\n");

    helper::serve(&tables, std::os::fd::AsFd::as_fd(&signals))?;
    for link in links(&folder) {
        fs::remove_file(&link).with_context(|| format!("cannot remove {}", link.display()))?;
    }
    // A reader may take its time. Until it has read, its bytes are in the map only.
    while helper::drain(&tables, PATIENCE)?.to_read > 0 {}
    folder.remove()
}

/// When a process that is alive started, in clock ticks since the system did.
fn started(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field, the name, is in parentheses and may hold anything; the state
    // follows it, and 22 is the twentieth from there.
    let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace();
    let state = fields.next()?;
    // A zombie is dead, though nobody has taken note of it.
    if state == "Z" { None } else { fields.nth(18)?.parse().ok() }
}

impl Attached {
    /// What is accelerated, in words.
    pub(super) fn on(&self) -> String {
        let paths = super::summary::cgroup_paths(self.cgroups.iter().copied());
        let cgroups: Vec<_> = paths.values().map(|path| path.display().to_string()).collect();
        let ports: Vec<_> = self.ports.iter().map(ToString::to_string).collect();
        match (cgroups.is_empty(), ports.is_empty()) {
            (true, _) => "no control group".into(),
            (false, true) => cgroups.join(","),
            (false, false) => format!("{}:{}", cgroups.join(","), ports.join(",")),
        }
    }
}
