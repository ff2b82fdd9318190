//! The programs and maps of the shortcut: loading, attaching, and the pass that puts
//! sockets into the map and takes them out.

use std::{fs::File, os::fd::AsFd as _};

use anyhow::{Context as _, Result};
use aya::{
    Btf, Ebpf, EbpfLoader,
    maps::{Array, HashMap, Map, MapData, RingBuf, SockHash, sock::SockMapFd},
    programs::{BtfTracePoint, CgroupAttachMode, Iter, Program, SkMsg, SockOps},
};
use underpass_abi::shortcut::{Control, GATE_OUT, Group, Key, LEFT_TO_ENTER, LEFT_TO_READ, Pair, Totals};

use super::{Scope, iterate::Iterator};
use crate::{btf, object};

/// The programs, loaded by this process. Dropping it detaches what was not pinned.
#[derive(Debug)]
pub(super) struct Programs {
    pub(super) ebpf: Ebpf,
}

/// The maps, and the iterator that works on them.
pub(super) struct Tables {
    control: Array<MapData, Control>,
    left: Array<MapData, u64>,
    pairs: HashMap<MapData, Key, Pair>,
    totals: HashMap<MapData, Group, Totals>,
    pub(super) calls: RingBuf<MapData>,
    pub(super) iterator: Iterator,
}

/// What a pass over the sockets could not do yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Left {
    /// Sockets that had bytes to read before they can enter the map.
    pub(super) to_enter: u64,
    /// Sockets that had redirected bytes to read before they can leave it.
    pub(super) to_read: u64,
}

impl Programs {
    /// Loads the programs. They are not attached yet.
    pub(super) fn load(scope: &Scope) -> Result<Self> {
        let offsets = offsets()?;
        let any_port = u32::from(scope.ports.is_empty());
        let mut loader = EbpfLoader::new();
        for (name, offset) in &offsets {
            loader.override_global(name, offset, true);
        }
        loader.override_global("ANY_PORT", &any_port, true);
        loader.override_global("ACCEPTED", &scope.accepted, true);
        let mut programs = Self { ebpf: loader.load(object::SHORTCUT).context("cannot load the maps")? };
        let mut ports: HashMap<_, u16, u8> =
            programs.ebpf.map_mut("PORTS").context("no map PORTS")?.try_into()?;
        for port in &scope.ports {
            ports.insert(port, 1, 0).context("cannot list the ports")?;
        }

        let btf = Btf::from_sys_fs().context("cannot read the kernel's BTF")?;
        programs
            .get::<SockOps>("shortcut_meet")?
            .load()
            .map_err(object::refusal)
            .context("cannot load shortcut_meet (the shortcut needs Linux 6.3)")?;
        programs
            .get::<BtfTracePoint>("shortcut_read")?
            .load("sock_recv_length", &btf)
            .context("cannot load shortcut_read (its tracepoint, sock_recv_length, needs Linux 6.3)")?;
        programs
            .get::<SkMsg>("shortcut_send")?
            .load()
            .map_err(object::refusal)
            .context("cannot load shortcut_send")?;
        programs
            .get::<Iter>("shortcut_enter")?
            .load("bpf_sk_storage_map", &btf)
            .context("cannot load shortcut_enter")?;
        Ok(programs)
    }

    /// Attaches the programs: from now on, connections that are established in the
    /// control group are noted. Those that exist are left alone.
    pub(super) fn attach(&mut self, cgroup: &File) -> Result<()> {
        let sockets = self.sockets()?;
        self.get::<SkMsg>("shortcut_send")?.attach(&sockets).context("cannot attach shortcut_send")?;
        self.get::<BtfTracePoint>("shortcut_read")?.attach().context("cannot attach shortcut_read")?;
        // The name of the mode misleads: a link always stands beside those of others.
        self.get::<SockOps>("shortcut_meet")?
            .attach(cgroup, CgroupAttachMode::Single)
            .context("cannot attach shortcut_meet to the control group")?;
        Ok(())
    }

    /// The map of accelerated sockets.
    pub(super) fn sockets(&self) -> Result<SockMapFd> {
        let sockets: SockHash<_, Key> = self.ebpf.map("SOCKETS").context("no map SOCKETS")?.try_into()?;
        Ok(sockets.fd().try_clone()?)
    }

    /// The iterator, linked with the map of noted sockets.
    pub(super) fn iterator(&mut self) -> Result<Iterator> {
        let program = self.get::<Iter>("shortcut_enter")?.fd()?.try_clone()?;
        let Some(Map::SkStorage(members)) = self.ebpf.map("MEMBERS") else {
            anyhow::bail!("no map MEMBERS");
        };
        Iterator::link(program.as_fd(), members.fd().as_fd()).context("cannot link the iterator over sockets")
    }

    /// Hands out the maps. Only once.
    pub(super) fn tables(&mut self) -> Result<Tables> {
        let iterator = self.iterator()?;
        Tables::new(iterator, |name| self.ebpf.take_map(name).with_context(|| format!("no map {name}")))
    }

    pub(super) fn get<'a, T>(&'a mut self, name: &str) -> Result<&'a mut T>
    where
        &'a mut T: TryFrom<&'a mut Program, Error = aya::programs::ProgramError>,
    {
        let program = self.ebpf.program_mut(name).with_context(|| format!("no program {name}"))?;
        Ok(program.try_into()?)
    }
}

impl Tables {
    /// Of maps by name.
    pub(super) fn new(iterator: Iterator, mut map: impl FnMut(&str) -> Result<Map>) -> Result<Self> {
        Ok(Self {
            control: map("CONTROL")?.try_into()?,
            left: map("LEFT")?.try_into()?,
            pairs: map("PAIRS")?.try_into()?,
            totals: map("TOTALS")?.try_into()?,
            calls: map("CALLS")?.try_into()?,
            iterator,
        })
    }

    /// Puts the sockets of pairs that earned it into the map, takes those out that are
    /// to leave.
    pub(super) fn pass(&mut self) -> Result<Left> {
        for what in [LEFT_TO_ENTER, LEFT_TO_READ] {
            self.left.set(what, 0, 0)?;
        }
        while self.calls.next().is_some() {}
        self.iterator.run().context("cannot go over the sockets")?;
        Ok(Left { to_enter: self.left.get(&LEFT_TO_ENTER, 0)?, to_read: self.left.get(&LEFT_TO_READ, 0)? })
    }

    pub(super) fn control(&self) -> Result<Control> {
        Ok(self.control.get(&0, 0)?)
    }

    pub(super) fn set_control(&mut self, control: Control) -> Result<()> {
        Ok(self.control.set(0, control, 0)?)
    }

    /// The pairs that exist now.
    pub(super) fn pairs(&self) -> impl std::iter::Iterator<Item = (Key, Pair)> {
        // A pair may end while the table is read.
        self.pairs.iter().filter_map(Result::ok)
    }

    /// What ended connections did.
    pub(super) fn totals(&self) -> impl std::iter::Iterator<Item = (Group, Totals)> {
        self.totals.iter().filter_map(Result::ok)
    }
}

/// Whether a pair goes from socket to socket at the moment.
pub(super) fn is_inside(pair: &Pair) -> bool {
    pair.ends.iter().all(|end| end.gate != GATE_OUT)
}

/// Where the programs find the fields that they read.
fn offsets() -> Result<[(&'static str, u32); 10]> {
    let btf = btf::Btf::of_the_kernel()?;
    let field = |structure, path| btf.field(structure, path);
    Ok([
        ("WRITE_SEQ", field("tcp_sock", "write_seq")?),
        ("RCV_NXT", field("tcp_sock", "rcv_nxt")?),
        ("COPIED_SEQ", field("tcp_sock", "copied_seq")?),
        ("RCVLOWAT", field("sock", "sk_rcvlowat")?),
        ("SK_SOCKET", field("sock", "sk_socket")?),
        ("SOCKET_FILE", field("socket", "file")?),
        ("FILE_FLAGS", field("file", "f_flags")?),
        ("SK_CGROUP", field("sock", "sk_cgrp_data.cgroup")?),
        ("CGROUP_NODE", field("cgroup", "kn")?),
        ("NODE_ID", field("kernfs_node", "id")?),
    ])
}
