//! What passes through an interface (`--interface`): flows that TC programs count.

use std::{
    collections::{HashMap, HashSet},
    net::IpAddr,
};

use anyhow::{Context as _, Result};
use aya::{
    Ebpf, EbpfLoader,
    maps::{MapData, PerCpuArray, PerCpuHashMap, RingBuf},
    programs::{LinkOrder, SchedClassifier, TcAttachType, tc::TcAttachOptions},
};
use underpass_abi::watch::{
    Address, Connection, Filter, FlowKey, Owner, PacketNote, Passage, Passed, direction, event, passing,
};

use super::event::read;
use crate::object;

/// The programs on the interface. Dropping it detaches them.
pub struct Gateway {
    passages: PerCpuHashMap<MapData, Passage, Passed>,
    counters: PerCpuArray<MapData, u64>,
    packets: RingBuf<MapData>,
    known: HashMap<Passage, Known>,
    numbers: HashMap<u64, Passage>,
    next: u64,
    removed: u64,
    own: HashSet<Address>,
    filter: Filter,
    _object: Ebpf,
}

/// A flow that was reported, and how.
struct Known {
    number: u64,
    bytes: (u64, u64),
}

/// The numbers of flows begin here; those of sockets never get so far.
const FIRST: u64 = 1 << 63;

impl Gateway {
    /// Attaches the programs in both directions, before others of their kind.
    ///
    /// # Errors
    /// Where there is no such interface, or no TCX (Linux 6.6).
    pub fn attach(interface: &str, each_packet: bool, filter: Filter) -> Result<Self> {
        let each = u32::from(each_packet);
        let mut object = EbpfLoader::new()
            .override_global("EACH", &each, true)
            .load(object::WATCH_GATEWAY)
            .map_err(object::root)
            .context("the kernel refuses the gateway's maps (it takes CAP_BPF)")?;
        for (name, at) in [("watch_ingress", TcAttachType::Ingress), ("watch_egress", TcAttachType::Egress)] {
            let program =
                object.program_mut(name).with_context(|| format!("the object has no program {name}"))?;
            let program: &mut SchedClassifier = program.try_into()?;
            program
                .load()
                .map_err(object::refusal)
                .with_context(|| format!("the kernel refuses {name} (it takes CAP_BPF and CAP_NET_ADMIN)"))?;
            program
                .attach_with_options(interface, at, TcAttachOptions::TcxOrder(LinkOrder::first()))
                .with_context(|| {
                    format!(
                        "cannot attach {name} to {interface} (it takes TCX, of Linux 6.6, and CAP_NET_ADMIN)"
                    )
                })?;
        }
        let mut take = |name| object.take_map(name).with_context(|| format!("the object has no map {name}"));
        Ok(Self {
            passages: PerCpuHashMap::try_from(take("PASSAGES")?)?,
            counters: PerCpuArray::try_from(take("COUNTERS")?)?,
            packets: RingBuf::try_from(take("PACKETS")?)?,
            known: HashMap::new(),
            numbers: HashMap::new(),
            next: FIRST,
            removed: 0,
            own: own_addresses()?,
            filter,
            _object: object,
        })
    }

    /// The forwarded flows that have changed, and how many made room for others unseen.
    ///
    /// # Errors
    /// Where the map cannot be read.
    pub fn flows(&mut self) -> Result<(Vec<Connection>, u64)> {
        let mut changed = vec![];
        let mut present = 0;
        let passages: Vec<_> =
            self.passages.keys().collect::<Result<_, _>>().context("cannot read the flows")?;
        for passage in passages {
            // It may have made room for another since.
            let Ok(values) = self.passages.get(&passage, 0) else { continue };
            present += 1;
            let sum =
                values.iter().fold((0, 0), |sum, passed| (sum.0 + passed.in_bytes, sum.1 + passed.out_bytes));
            let own = values.iter().any(|passed| passed.own == 1) || self.own.contains(&passage.behind);
            if own || !shown(&self.filter, &passage) {
                continue;
            }
            let known = self.known.entry(passage).or_insert_with(|| {
                self.next += 1;
                self.numbers.insert(self.next, passage);
                Known { number: self.next, bytes: (u64::MAX, u64::MAX) }
            });
            if known.bytes == sum {
                continue;
            }
            known.bytes = sum;
            let started =
                values.iter().map(|passed| passed.started).filter(|time| *time != 0).min().unwrap_or(0);
            let at = values.iter().map(|passed| passed.seen).max().unwrap_or(0);
            changed.push(report(&passage, known.number, (started, at), sum));
        }
        let entered: u64 = self.counters.get(&passing::ENTERED, 0)?.iter().sum();
        Ok((changed, entered.saturating_sub(self.removed + present)))
    }

    /// Packets that were not told one by one.
    ///
    /// # Errors
    /// Where the map cannot be read.
    pub fn untold(&self) -> Result<u64> {
        Ok(self.counters.get(&passing::UNTOLD, 0)?.iter().sum())
    }

    /// The packets since the last call, if each is to be told.
    pub fn packets(&mut self) -> Vec<PacketNote> {
        let mut notes = vec![];
        while let Some(record) = self.packets.next() {
            notes.extend(read::<PacketNote>(&record).filter(|note| shown(&self.filter, &note.passage)));
        }
        notes
    }

    /// Frees the entry of a flow that has ended, if it is one of these.
    pub fn forget(&mut self, flow: &FlowKey) -> bool {
        let Some(passage) = self.numbers.remove(&flow.cookie) else { return false };
        self.known.remove(&passage);
        self.removed += u64::from(self.passages.remove(&passage).is_ok());
        true
    }
}

/// Whether the filter lets a flow through. One for a process lets none.
fn shown(filter: &Filter, passage: &Passage) -> bool {
    let port = filter.port == 0 || [passage.beyond_port, passage.behind_port].contains(&filter.port);
    let (mask, network) = (u128::from_ne_bytes(filter.mask), u128::from_ne_bytes(filter.remote));
    let remote = u128::from_ne_bytes(passage.beyond) & mask == network;
    port && remote && filter.tgid == 0 && filter.comm[0] == 0
}

fn report(passage: &Passage, number: u64, (started, at): (u64, u64), bytes: (u64, u64)) -> Connection {
    let nobody = Owner { cgroup: 0, tgid: 0, uid: 0, comm: [0; 16], quality: 0, kernel: 0 };
    Connection {
        kind: event::LIVE,
        netns: 0,
        cookie: number,
        started,
        at,
        rx_bytes: bytes.0,
        tx_bytes: bytes.1,
        local: passage.behind,
        remote: passage.beyond,
        local_port: passage.behind_port,
        remote_port: passage.beyond_port,
        protocol: u16::from(passage.protocol),
        direction: direction::FORWARDED,
        flags: 0,
        rtt_us: 0,
        retransmits: 0,
        owner: nobody,
    }
}

/// This host's addresses in its network namespace: what they send or receive is no
/// passing flow, and the sockets tell of it.
fn own_addresses() -> Result<HashSet<Address>> {
    let interfaces = nix::ifaddrs::getifaddrs().context("cannot list the addresses")?;
    let addresses = interfaces.filter_map(|interface| {
        let address = interface.address?;
        let v4 = address.as_sockaddr_in().map(|address| IpAddr::V4(address.ip()));
        v4.or_else(|| address.as_sockaddr_in6().map(|address| IpAddr::V6(address.ip())))
    });
    Ok(addresses
        .map(|address| match address {
            IpAddr::V4(address) => address.to_ipv6_mapped().octets(),
            IpAddr::V6(address) => address.octets(),
        })
        .collect())
}
