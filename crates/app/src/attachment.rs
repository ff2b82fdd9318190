//! What the functions share that attach to an interface for good: noting what was
//! attached where, finding it again by its pins, and taking it off.

use std::{io::Write as _, time::SystemTime};

use anyhow::Context as _;
use aya::{
    Ebpf, EbpfLoader,
    maps::{Array, Map, MapData},
};
use underpass_abi::attachment::{Attachment, held, hook as place};

use crate::{
    error::{Error, Result},
    hook::{self, Attached, By, Hook, Interface, Program},
    pins::{self, Folder},
    status::Item,
};

/// The map that each such function has.
const ATTACHMENT: &str = "ATTACHMENT";

/// A function that attaches to interfaces, by its parts' names.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Function {
    /// The function's word, for its folder of pins.
    pub word: &'static str,
    /// The two halves of its program at ingress.
    pub ingress: Program,
    /// Its program at egress.
    pub egress: &'static str,
}

/// An attachment that was found by its pins.
#[derive(Debug)]
pub(crate) struct Found {
    pub folder: Folder,
    pub attached: Attached,
    /// What holds the program at egress, if there is one.
    pub egress: Option<By>,
    note: Attachment,
}

impl Found {
    /// What a folder says is attached. One that does not say was left by a crash, or
    /// another process is in the middle of attaching or detaching.
    fn open(folder: Folder) -> Result<Option<Self>> {
        let path = folder.pin(ATTACHMENT);
        if !path.exists() {
            return Ok(None);
        }
        let map: Array<_, Attachment> = match array(&folder, ATTACHMENT) {
            Err(_) if !path.exists() => return Ok(None),
            map => map?,
        };
        let note = map.get(&0, 0).context("cannot read ATTACHMENT")?;
        if note.since == 0 {
            return Ok(None);
        }
        let hook = match note.hook {
            place::XDP => Hook::Xdp,
            place::XDP_GENERIC => Hook::XdpGeneric,
            _ => Hook::Tc,
        };
        let by = |held| match held {
            held::NOT => None,
            held::BY_FILTER => Some(By::Filter { qdisc: note.qdisc != 0 }),
            _ => Some(By::Link),
        };
        let attached = Attached { hook, by: by(note.ingress).unwrap_or(By::Link), why: text(&note.reason) };
        Ok(Some(Self { folder, attached, egress: by(note.egress), note }))
    }

    /// When it was attached, in seconds since 1970.
    pub fn since(&self) -> u64 {
        self.note.since
    }

    /// The interface's name: as it is now, else as it was.
    pub fn interface(&self) -> String {
        let here = self.is_here().unwrap_or(false);
        let now = here.then(|| hook::interface_name(self.note.interface)).flatten();
        now.unwrap_or_else(|| text(&self.note.name))
    }

    /// Whether it belongs to the network namespace that this runs in.
    pub fn is_here(&self) -> Result<bool> {
        Ok(pins::namespace()? == self.note.namespace)
    }

    /// Whether it is at work, as far as can be seen from here.
    pub fn works(&self) -> Result<bool> {
        Ok(!self.is_here()? || hook::is_alive(&self.attached, self.note.interface, &self.folder))
    }

    fn remove(self, function: &Function) -> Result<()> {
        let interface = self.interface();
        if self.is_here()? {
            hook::detach(function.ingress, &interface, &self.attached, &self.folder)?;
            if let Some(by) = self.egress {
                hook::detach_egress(function.egress, &interface, by, &self.folder)?;
            }
            if self.note.qdisc != 0 {
                hook::remove_qdisc(self.note.interface)?;
            }
        }
        self.folder.remove()
    }
}

impl Function {
    /// Everything of it that is pinned, in all network namespaces.
    pub fn found(&self) -> Result<Vec<Found>> {
        let folders = Folder::all(self.word)?;
        folders.into_iter().filter_map(|folder| Found::open(folder).transpose()).collect()
    }

    /// Makes the folder of an attachment and lets `attach` fill it, which is told what
    /// is attached there already. Warns where nothing will come in.
    pub fn attach(
        &self,
        interface: &Interface,
        attach: impl FnOnce(&Folder, Option<&Found>) -> Result<Attached>,
    ) -> Result<Attached> {
        let folder = Folder::create(self.word, &pins::interface_key(interface.index)?)?;
        let before = Found::open(folder.clone())?;
        let result = attach(&folder, before.as_ref());
        if result.is_err() && before.is_none() {
            // Nothing of an attachment that failed stays. What failed is of more interest
            // than whether this does.
            let _ = folder.remove();
        }
        let attached = result?;
        if !interface.up {
            warn(&format!("{} is down: nothing comes in on it until it is set up", interface.name));
        }
        Ok(attached)
    }

    /// Notes in the object's map what is now attached.
    pub fn note(
        ebpf: &mut Ebpf,
        interface: &Interface,
        attached: &Attached,
        egress: Option<By>,
        before: Option<&Found>,
    ) -> Result<()> {
        let held = |by: By| if by == By::Link { held::BY_LINK } else { held::BY_FILTER };
        let made = [Some(attached.by), egress].contains(&Some(By::Filter { qdisc: true }));
        let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        let note = Attachment {
            since: since.map_or(1, |since| since.as_secs()),
            namespace: pins::namespace()?,
            interface: interface.index,
            hook: match attached.hook {
                Hook::Xdp => place::XDP,
                Hook::XdpGeneric => place::XDP_GENERIC,
                Hook::Tc => place::TC,
            },
            ingress: held(attached.by),
            egress: egress.map_or(held::NOT, held),
            qdisc: u32::from(made || before.is_some_and(|before| before.note.qdisc != 0)),
            padding: 0,
            name: fixed(&interface.name),
            reason: fixed(&attached.why),
        };
        set(ebpf, ATTACHMENT, note)
    }

    /// Detaches it from an interface of this network namespace.
    pub fn detach(&self, name: &str) -> Result<()> {
        let mut gone = 0;
        for found in self.found()? {
            if found.is_here()? && found.interface() == name {
                found.remove(self)?;
                gone += 1;
            }
        }
        if gone == 0 {
            return Err(Error::Usage(format!(
                "{} is not attached to '{name}'; `underpass status` lists what is",
                self.word
            )));
        }
        Ok(())
    }

    /// Removes every attachment and says what that was.
    pub fn down(&self) -> Result<Vec<String>> {
        let mut removed = vec![];
        for found in self.found()? {
            let (on, hook) = (found.interface(), found.attached.hook.word());
            removed.push(format!("{} {on}: detached from {hook}", self.word));
            found.remove(self)?;
        }
        // What a crash in the middle of attaching left.
        for folder in Folder::all(self.word)? {
            removed.push(format!("{}: removed what was left of {}", self.word, folder.key));
            folder.remove()?;
        }
        Ok(removed)
    }

    /// What is attached.
    pub fn status(&self) -> Result<Vec<Item>> {
        let mut items = vec![];
        for found in self.found()? {
            let works = found.works()?;
            let why = if !works {
                "the interface is gone; `underpass down` removes what is left".to_owned()
            } else if found.is_here()? {
                found.attached.why.clone()
            } else {
                format!("{}; in another network namespace", found.attached.why)
            };
            items.push(Item {
                function: self.word,
                on: found.interface(),
                path: found.attached.hook.word().to_owned(),
                why,
                works,
                details: None,
            });
        }
        Ok(items)
    }

    /// Loads its object; the kept maps are those that are pinned in the folder.
    pub fn load<'a>(
        &self,
        mut loader: EbpfLoader<'a>,
        object: &[u8],
        kept: &[&'a str],
        folder: Option<&Folder>,
    ) -> Result<Ebpf> {
        // Kernels before 5.11 charge maps to this limit. Without the right to raise it
        // loading may still work, and says so if it does not.
        let _ = nix::sys::resource::setrlimit(
            nix::sys::resource::Resource::RLIMIT_MEMLOCK,
            nix::sys::resource::RLIM_INFINITY,
            nix::sys::resource::RLIM_INFINITY,
        );
        if let Some(folder) = folder {
            for map in kept.iter().copied().chain([ATTACHMENT]) {
                loader.map_pin_path(map, folder.pin(map));
            }
        }
        loader.load(object).map_err(|error| {
            let text = format!("{:#}", anyhow::Error::new(error));
            if text.contains("Operation not permitted") || text.contains("Permission denied") {
                Error::Unable(
                    "no right to load programs: run as root or with CAP_BPF and CAP_NET_ADMIN".to_owned(),
                )
            } else {
                Error::Failed(anyhow::anyhow!("cannot load {}'s object: {text}", self.word))
            }
        })
    }
}

/// A pinned map.
///
/// # Errors
/// Where it cannot be opened.
pub(crate) fn pinned(folder: &Folder, name: &str) -> Result<Map> {
    let path = folder.pin(name);
    let data = MapData::from_pin(&path).with_context(|| format!("cannot open {}", path.display()))?;
    Ok(Map::from_map_data(data).with_context(|| format!("{name} is of no known kind"))?)
}

/// A pinned map that is an array.
///
/// # Errors
/// Where it cannot be opened.
pub(crate) fn array<V: aya::Pod>(folder: &Folder, name: &str) -> Result<Array<MapData, V>> {
    Ok(pinned(folder, name)?.try_into().with_context(|| format!("{name} is no array"))?)
}

/// A map of an object.
///
/// # Errors
/// Where the object has none of that name.
pub(crate) fn map<'a>(ebpf: &'a mut Ebpf, name: &str) -> Result<&'a mut Map> {
    Ok(ebpf.map_mut(name).with_context(|| format!("the object has no {name}"))?)
}

/// Sets the one value of an object's map that is an array.
///
/// # Errors
/// Where it cannot be written.
pub(crate) fn set<V: aya::Pod>(ebpf: &mut Ebpf, name: &str, value: V) -> Result<()> {
    let mut array: Array<_, V> =
        map(ebpf, name)?.try_into().with_context(|| format!("{name} is no array"))?;
    Ok(array.set(0, value, 0).with_context(|| format!("cannot write {name}"))?)
}

/// Prints a line.
///
/// # Errors
/// Where standard output is closed.
pub(crate) fn say(line: &str) -> Result<()> {
    Ok(writeln!(std::io::stdout(), "{line}").context("cannot print")?)
}

/// Warns on standard error.
pub(crate) fn warn(line: &str) {
    // A warning that nobody reads stops nothing.
    let _ = writeln!(std::io::stderr(), "underpass: warning: {line}");
}

/// A text cut to what fits, ended by zeros.
pub(crate) fn fixed<const N: usize>(text: &str) -> [u8; N] {
    let mut bytes = [0; N];
    let length = text.floor_char_boundary(text.len().min(N - 1));
    bytes[..length].copy_from_slice(&text.as_bytes()[..length]);
    bytes
}

/// A text that is ended by zeros.
pub(crate) fn text(bytes: &[u8]) -> String {
    let length = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..length]).into_owned()
}
