//! From `--resolver` and `--rules` to the settings that the programs read.

use std::{
    collections::BTreeMap,
    fs,
    net::IpAddr,
    path::{Path, PathBuf},
    str::FromStr,
    time::Duration,
};

use ipnet::IpNet;
use serde::{Deserialize, Deserializer, de::Error as _};
use underpass_abi::dnsguard::{
    MAX_BOGUS, MAX_PATTERNS, MAX_RESOLVERS, MAX_RULES, Pattern, RULES, Resolver, Settings, layer, rule,
    settings_flag,
};
use underpass_logic::{dnsguard::slot_of, packet::ip::Address};

use crate::error::{Error, Result};

/// Which answers are looked at, and what goes for them.
#[derive(Debug, Clone)]
pub struct Rules {
    /// For the programs, and for [`underpass_logic::dnsguard::judge`].
    pub settings: Box<Settings>,
    /// Addresses that only forged answers name.
    pub bogus: Vec<IpNet>,
    /// The names of all rules, in the order of their bits.
    pub names: Vec<String>,
    /// The resolvers that are guarded, in order; empty for `any`.
    pub resolvers: Vec<IpAddr>,
}

/// A value of `--resolver`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Guarded {
    /// One resolver.
    Address(IpAddr),
    /// Whoever answers from port 53.
    Any,
}

impl FromStr for Guarded {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "any" {
            return Ok(Self::Any);
        }
        text.parse().map(Self::Address).map_err(|_| "expected an IP address or `any`".to_owned())
    }
}

/// What a hit of a rule does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Mode {
    /// The rule is not looked at.
    Off,
    /// A hit is counted and sampled.
    Mark,
    /// A hit drops the answer if another rule hits too.
    Paired,
    /// A hit drops the answer.
    Alone,
}

/// Who runs a resolver: what its answers look like depends on that.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Operator {
    /// Sends no DF, random identifications, EDNS if asked with it.
    Google,
    /// Another public resolver. Answers come from Linux hosts: DF, identification 0.
    Public,
    /// A resolver of one's own, of which nothing is known.
    Unknown,
}

/// The public resolvers that are guarded by default, each operator's in one text.
const WELL_KNOWN: [(Operator, &str); 8] = [
    (Operator::Google, "8.8.8.8 8.8.4.4 2001:4860:4860::8888 2001:4860:4860::8844"),
    // Cloudflare, then its two filtering services.
    (Operator::Public, "1.1.1.1 1.0.0.1 2606:4700:4700::1111 2606:4700:4700::1001"),
    (Operator::Public, "1.1.1.2 1.0.0.2 2606:4700:4700::1112 2606:4700:4700::1002"),
    (Operator::Public, "1.1.1.3 1.0.0.3 2606:4700:4700::1113 2606:4700:4700::1003"),
    // Quad9, then without blocking, then with client subnets.
    (Operator::Public, "9.9.9.9 149.112.112.112 2620:fe::fe 2620:fe::9"),
    (Operator::Public, "9.9.9.10 149.112.112.10 2620:fe::10 2620:fe::fe:10"),
    (Operator::Public, "9.9.9.11 149.112.112.11 2620:fe::11 2620:fe::fe:11"),
    // OpenDNS, then AdGuard.
    (
        Operator::Public,
        "208.67.222.222 208.67.220.220 2620:119:35::35 2620:119:53::53
         94.140.14.14 94.140.15.15 2a10:50c0::ad1:ff 2a10:50c0::ad2:ff",
    ),
];

/// The public resolvers that are guarded by default, with who runs them.
fn well_known() -> impl Iterator<Item = (Operator, IpAddr)> {
    let parse = |text: &str| text.parse().expect("an address");
    WELL_KNOWN.iter().flat_map(move |(who, list)| list.split_whitespace().map(move |ip| (*who, parse(ip))))
}

/// What goes for a resolver unless the rules file says otherwise, in the order of
/// [`RULES`]. docs/dnsguard.md gives the reasons.
fn defaults(operator: Operator) -> [Mode; RULES.len()] {
    use Mode::{Alone, Mark, Off, Paired};
    match operator {
        Operator::Google => [Alone, Alone, Alone, Alone, Alone, Paired, Alone, Mark],
        Operator::Public => [Off, Off, Alone, Paired, Alone, Paired, Alone, Mark],
        Operator::Unknown => [Off, Off, Paired, Paired, Alone, Paired, Paired, Mark],
    }
}

/// A rules file.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct File {
    /// What goes for all guarded resolvers.
    #[serde(default)]
    rules: RuleTable,
    /// What goes for one.
    #[serde(default)]
    resolver: BTreeMap<IpAddr, ResolverTable>,
    #[serde(default)]
    pattern: Vec<PatternTable>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
struct RuleTable {
    ip_id_zero: Option<Simple>,
    dont_fragment: Option<Simple>,
    authoritative: Option<Simple>,
    full_name: Option<Simple>,
    bogus_address: Option<BogusAddress>,
    ttl_deviates: Option<TtlDeviates>,
    no_edns: Option<Simple>,
    duplicate: Option<Duplicate>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
struct ResolverTable {
    ip_id_zero: Option<Mode>,
    dont_fragment: Option<Mode>,
    authoritative: Option<Mode>,
    full_name: Option<Mode>,
    bogus_address: Option<Mode>,
    ttl_deviates: Option<Mode>,
    no_edns: Option<Mode>,
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(deny_unknown_fields)]
struct Simple {
    mode: Mode,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct BogusAddress {
    mode: Option<Mode>,
    #[serde(default)]
    addresses: Vec<Network>,
    /// One address or network a line; `#` starts a comment. Relative to the rules file.
    file: Option<PathBuf>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct TtlDeviates {
    mode: Option<Mode>,
    /// How many hops the TTL may differ.
    tolerance: Option<u8>,
    /// How long a learned TTL counts.
    #[serde(default, deserialize_with = "duration")]
    remember: Option<Duration>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Duplicate {
    mode: Option<MarkMode>,
    /// How long after an answer another one is a duplicate.
    #[serde(default, deserialize_with = "duration")]
    window: Option<Duration>,
}

/// `duplicate` never drops: it cannot know which of the two was forged.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
enum MarkMode {
    Off,
    Mark,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct PatternTable {
    name: String,
    layer: Layer,
    offset: u16,
    bytes: Hex,
    mask: Option<Hex>,
    mode: Mode,
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Layer {
    Ip,
    Udp,
    Dns,
}

/// One to eight bytes, written `0x8400`.
#[derive(Debug, Clone)]
struct Hex(Vec<u8>);

impl<'de> Deserialize<'de> for Hex {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let text = String::deserialize(from)?;
        let expected =
            || D::Error::custom(format!("{text:?}: expected one to eight bytes, such as \"0x8400\""));
        let digits = text.strip_prefix("0x").ok_or_else(expected)?;
        if !digits.is_ascii() || !digits.len().is_multiple_of(2) || !(2..=16).contains(&digits.len()) {
            return Err(expected());
        }
        let bytes = (0..digits.len()).step_by(2).map(|at| u8::from_str_radix(&digits[at..at + 2], 16));
        bytes.collect::<Result<_, _>>().map(Self).map_err(|_| expected())
    }
}

/// An address or a network; of a network's address the bits behind the prefix do not count.
#[derive(Debug, Clone, Copy)]
struct Network(IpNet);

impl<'de> Deserialize<'de> for Network {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let text = String::deserialize(from)?;
        network(&text)
            .map(Self)
            .ok_or_else(|| D::Error::custom(format!("{text:?}: expected an address or a network")))
    }
}

fn network(text: &str) -> Option<IpNet> {
    text.parse().ok().or_else(|| text.parse::<IpAddr>().ok().map(IpNet::from))
}

fn duration<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Duration>, D::Error> {
    let text = String::deserialize(from)?;
    humantime::parse_duration(&text)
        .map(Some)
        .map_err(|_| D::Error::custom(format!("{text:?}: expected a time such as 500ms, 30s or 5m")))
}

impl Rules {
    /// Puts together what `--resolver` and `--rules` say.
    ///
    /// # Errors
    /// [`Error::Usage`] names the file, line and key that is wrong.
    pub fn new(guarded: &[Guarded], file: Option<&Path>) -> Result<Self> {
        let text = match file {
            Some(path) => fs::read_to_string(path).map_err(|error| {
                Error::Usage(format!("cannot read the rules file {}: {error}", path.display()))
            })?,
            None => String::new(),
        };
        Self::parse(guarded, &text, file)
    }

    /// The same from the text of a rules file, which `file` only names.
    pub(crate) fn parse(guarded: &[Guarded], text: &str, file: Option<&Path>) -> Result<Self> {
        let config: File = toml::from_str(text).map_err(|error| {
            Error::Usage(format!("{}: {error}", file.unwrap_or(Path::new("rules")).display()))
        })?;
        let shown = file.map_or_else(String::new, |path| format!("{}: ", path.display()));
        let bogus = bogus_addresses(&config, file)?;
        let mut settings = Box::new(Settings::EMPTY);
        let mut names: Vec<_> = RULES.iter().map(|name| (*name).to_owned()).collect();
        add_patterns(&config, &mut settings, &mut names)
            .map_err(|why| Error::Usage(format!("{shown}{why}")))?;

        let mut resolvers: Vec<(Operator, IpAddr)> = vec![];
        let mut any = false;
        for one in guarded {
            match one {
                Guarded::Any => any = true,
                Guarded::Address(address) => resolvers.push((operator(*address), *address)),
            }
        }
        if guarded.is_empty() || any {
            resolvers.extend(well_known());
        }
        resolvers.sort_by_key(|(_, address)| *address);
        resolvers.dedup();
        for address in config.resolver.keys() {
            if !resolvers.iter().any(|(_, guarded)| guarded == address) {
                if !any {
                    return Err(Error::Usage(format!(
                        "{shown}[resolver.\"{address}\"] is not among the guarded resolvers: add --resolver {address}"
                    )));
                }
                resolvers.push((operator(*address), *address));
            }
        }
        if resolvers.len() > MAX_RESOLVERS {
            return Err(Error::Usage(format!(
                "{} resolvers, expected at most {MAX_RESOLVERS}; `--resolver any` guards them all",
                resolvers.len()
            )));
        }

        fill(&config, &mut settings, &resolvers, any, &bogus);
        let resolvers = resolvers.into_iter().map(|(_, address)| address).collect();
        Ok(Self { settings, bogus, names, resolvers })
    }

    /// Whether whoever answers from port 53 is guarded.
    pub fn any(&self) -> bool {
        self.settings.flags & settings_flag::ANY != 0
    }

    /// The names of the rules in a mask.
    pub fn hit(&self, mask: u32) -> Vec<&str> {
        names_in(&self.names, mask)
    }
}

/// The names of the rules in a mask.
pub(super) fn names_in(names: &[String], mask: u32) -> Vec<&str> {
    let hit = names.iter().enumerate().filter(|(bit, _)| mask & 1 << bit != 0);
    hit.map(|(_, name)| name.as_str()).collect()
}

fn operator(address: IpAddr) -> Operator {
    well_known().find(|(_, known)| *known == address).map_or(Operator::Unknown, |(operator, _)| operator)
}

fn bogus_addresses(config: &File, rules: Option<&Path>) -> Result<Vec<IpNet>> {
    let Some(table) = &config.rules.bogus_address else { return Ok(vec![]) };
    let mut bogus: Vec<_> = table.addresses.iter().map(|Network(network)| *network).collect();
    if let Some(file) = &table.file {
        let path = rules.and_then(Path::parent).unwrap_or(Path::new("")).join(file);
        let text = fs::read_to_string(&path).map_err(|error| {
            Error::Usage(format!("cannot read the addresses in {}: {error}", path.display()))
        })?;
        for (nth, line) in text.lines().enumerate() {
            let entry = line.split('#').next().unwrap_or("").trim();
            if entry.is_empty() {
                continue;
            }
            bogus.push(network(entry).ok_or_else(|| {
                Error::Usage(format!(
                    "{}:{}: {entry:?}: expected an address or a network",
                    path.display(),
                    nth + 1
                ))
            })?);
        }
    }
    for network in &mut bogus {
        *network = network.trunc();
    }
    bogus.sort();
    bogus.dedup();
    if bogus.len() > MAX_BOGUS {
        return Err(Error::Usage(format!("{} bogus addresses, expected at most {MAX_BOGUS}", bogus.len())));
    }
    Ok(bogus)
}

fn add_patterns(config: &File, settings: &mut Settings, names: &mut Vec<String>) -> Result<(), String> {
    if config.pattern.len() > MAX_PATTERNS {
        return Err(format!("{} [[pattern]] rules, expected at most {MAX_PATTERNS}", config.pattern.len()));
    }
    for (nth, pattern) in config.pattern.iter().enumerate() {
        let name = &pattern.name;
        if names.contains(name) {
            return Err(format!("[[pattern]] name = {name:?}: there is a rule of that name already"));
        }
        if name.is_empty() || name.len() > 31 {
            return Err(format!("[[pattern]] name = {name:?}: expected one to 31 bytes"));
        }
        let Hex(bytes) = &pattern.bytes;
        let mask = pattern.mask.clone().map_or_else(|| vec![0xff; bytes.len()], |Hex(mask)| mask);
        if mask.len() != bytes.len() {
            return Err(format!("[[pattern]] {name:?}: mask and bytes differ in length"));
        }
        if pattern.offset > 1500 {
            return Err(format!("[[pattern]] {name:?}: offset {}, expected at most 1500", pattern.offset));
        }
        let to = &mut settings.patterns[nth];
        *to = Pattern {
            offset: pattern.offset,
            layer: match pattern.layer {
                Layer::Ip => layer::IP,
                Layer::Udp => layer::UDP,
                Layer::Dns => layer::DNS,
            },
            length: bytes.len() as u8,
            ..Pattern::EMPTY
        };
        to.bytes[..bytes.len()].copy_from_slice(bytes);
        to.mask[..mask.len()].copy_from_slice(&mask);
        names.push(name.clone());
    }
    settings.pattern_count = config.pattern.len() as u32;
    Ok(())
}

/// Fills in everything but the patterns.
fn fill(
    config: &File,
    settings: &mut Settings,
    resolvers: &[(Operator, IpAddr)],
    any: bool,
    bogus: &[IpNet],
) {
    let rules = &config.rules;
    let ttl = rules.ttl_deviates.as_ref();
    let hour = Duration::from_hours(1);
    settings.ttl_tolerance = u32::from(ttl.and_then(|ttl| ttl.tolerance).unwrap_or(3));
    settings.ttl_remember_ns = nanoseconds(ttl.and_then(|ttl| ttl.remember).unwrap_or(hour));
    let window = rules.duplicate.as_ref().and_then(|duplicate| duplicate.window);
    settings.duplicate_window_ns = nanoseconds(window.unwrap_or(Duration::from_secs(2)));

    if any {
        settings.flags |= settings_flag::ANY;
    }
    if !bogus.is_empty() {
        settings.flags |= settings_flag::BOGUS;
    }

    let mut policies = vec![];
    for (operator, address) in resolvers {
        let policy = modes(config, *operator, config.resolver.get(address));
        policies.push((Some(*address), policy));
    }
    if any {
        policies.push((None, modes(config, Operator::Unknown, None)));
    }
    let mut entries = vec![];
    for (address, policy) in &policies {
        let mut entry = Resolver::EMPTY;
        for (bit, mode) in policy.iter().enumerate() {
            match mode {
                Mode::Off => continue,
                Mode::Mark => {}
                Mode::Paired => entry.paired |= 1 << bit,
                Mode::Alone => entry.alone |= 1 << bit,
            }
            settings.enabled |= 1 << bit;
        }
        match address {
            Some(address) => {
                entry.address = Address::from(*address).words();
                entries.push(entry);
            }
            None => settings.any = entry,
        }
    }
    // The rule that can never hit costs nothing.
    if bogus.is_empty() {
        settings.enabled &= !rule::BOGUS_ADDRESS;
    }
    place(settings, &entries);
}

/// The mode of each rule for one resolver.
fn modes(config: &File, operator: Operator, own: Option<&ResolverTable>) -> [Mode; MAX_RULES] {
    let rules = &config.rules;
    let simple = |rule: &Option<Simple>| rule.map(|rule| rule.mode);
    let duplicate = rules.duplicate.as_ref().and_then(|rule| rule.mode).map(|mode| match mode {
        MarkMode::Off => Mode::Off,
        MarkMode::Mark => Mode::Mark,
    });
    let general = [
        simple(&rules.ip_id_zero),
        simple(&rules.dont_fragment),
        simple(&rules.authoritative),
        simple(&rules.full_name),
        rules.bogus_address.as_ref().and_then(|rule| rule.mode),
        rules.ttl_deviates.as_ref().and_then(|rule| rule.mode),
        simple(&rules.no_edns),
        duplicate,
    ];
    let own = own.map_or([None; RULES.len()], |own| {
        [
            own.ip_id_zero,
            own.dont_fragment,
            own.authoritative,
            own.full_name,
            own.bogus_address,
            own.ttl_deviates,
            own.no_edns,
            None,
        ]
    });
    let mut modes = [Mode::Off; MAX_RULES];
    for (bit, default) in defaults(operator).into_iter().enumerate() {
        modes[bit] = own[bit].or(general[bit]).unwrap_or(default);
    }
    for (nth, pattern) in config.pattern.iter().enumerate() {
        modes[RULES.len() + nth] = pattern.mode;
    }
    modes
}

/// Puts each resolver into a slot of its own, by looking for a hash that does.
fn place(settings: &mut Settings, entries: &[Resolver]) {
    let mut seed = 0_u64;
    while {
        settings.resolvers = [Resolver::EMPTY; underpass_abi::dnsguard::RESOLVER_SLOTS];
        settings.hash_seed = seed;
        seed = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
        entries.iter().any(|entry| {
            let slot = slot_of(settings, entry.address);
            let taken = settings.resolvers[slot].address != [0; 2];
            settings.resolvers[slot] = *entry;
            taken
        })
    } {}
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}
