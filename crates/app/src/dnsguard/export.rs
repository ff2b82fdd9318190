//! `dnsguard export`: an object with the settings written into it, for other loaders.

use std::{
    fs, io,
    io::Write as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, ensure};
use object::{Object as _, ObjectSection as _, ObjectSymbol as _};
use underpass_abi::dnsguard::{MAX_RANGES, RESOLVER_SLOTS, Range, Settings, rule};

use super::{Rules, memory::ranges};
use crate::{
    attachment::say,
    error::{Error, Result},
};

/// Arguments of `underpass dnsguard export`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Where to write the object
    pub file: PathBuf,
    #[command(flatten)]
    pub rules: super::RuleArgs,
    /// Count, but drop nothing
    #[arg(long)]
    pub dry_run: bool,
}

pub(super) fn export(args: &Args) -> Result<()> {
    let mut rules = args.rules.rules()?;
    if args.dry_run {
        rules.settings.flags |= underpass_abi::dnsguard::settings_flag::DRY_RUN;
    }
    let object = build(&rules)?;
    write(&args.file, &object)
        .with_context(|| format!("cannot write {}", args.file.display()))
        .map_err(Error::Failed)?;
    say(&format!(
        "{}: {}; load it with `ip link set dev IFACE xdp obj {0}`{}",
        args.file.display(),
        if rules.any() {
            "guards whoever answers".to_owned()
        } else {
            format!("guards {} resolvers", rules.resolvers.len())
        },
        "\nnot in it: no-edns, which needs a program that sees queries leave; duplicate and the samples, \
         which only `dnsguard show` reads"
    ))
}

/// The object with these rules in its read-only data.
pub(super) fn build(rules: &Rules) -> Result<Vec<u8>> {
    let mut settings = rules.settings.clone();
    settings.enabled &= !(rule::NO_EDNS | rule::DUPLICATE);
    let bogus = ranges(&rules.bogus);
    if bogus.len() > MAX_RANGES {
        return Err(Error::Usage(format!(
            "{} ranges of bogus addresses, expected at most {MAX_RANGES} in an exported object; \
             `dnsguard attach` takes 100,000",
            bogus.len()
        )));
    }
    settings.range_count = bogus.len() as u32;
    let mut object = crate::object::DNSGUARD_EXPORT.to_vec();
    patch(&mut object, "SETTINGS", &bytes_of_settings(&settings))?;
    let split = |address: u128| [(address >> 64) as u64, address as u64];
    let mut table = vec![];
    for (first, last) in bogus {
        let range = Range { first: split(first), last: split(last) };
        for word in range.first.into_iter().chain(range.last) {
            table.extend(word.to_ne_bytes());
        }
    }
    patch(&mut object, "RANGES", &table)?;
    Ok(object)
}

/// Writes bytes over the start of a variable in the object's read-only data.
fn patch(bytes: &mut [u8], name: &str, value: &[u8]) -> anyhow::Result<()> {
    let offset = {
        let object = object::File::parse(&*bytes).context("the object is no ELF file")?;
        let symbol = object
            .symbols()
            .find(|symbol| symbol.name() == Ok(name))
            .with_context(|| format!("the object has no {name}"))?;
        ensure!(symbol.size() as usize >= value.len(), "{name} has room for {} bytes", symbol.size());
        let section = symbol.section_index().context("the symbol is in no section")?;
        let section = object.section_by_index(section).context("the object lacks a section")?;
        let (start, _) = section.file_range().context("the section is not in the file")?;
        (start + symbol.address()) as usize
    };
    bytes
        .get_mut(offset..offset + value.len())
        .with_context(|| format!("{name} is beyond the object's end"))?
        .copy_from_slice(value);
    Ok(())
}

/// The settings as the program reads them: field by field, as they have no padding.
fn bytes_of_settings(settings: &Settings) -> Vec<u8> {
    let mut bytes = vec![];
    bytes.extend(settings.flags.to_ne_bytes());
    bytes.extend(settings.enabled.to_ne_bytes());
    bytes.extend(settings.hash_seed.to_ne_bytes());
    bytes.extend(settings.tick_ns.to_ne_bytes());
    bytes.extend(settings.ttl_remember_ns.to_ne_bytes());
    bytes.extend(settings.duplicate_window_ns.to_ne_bytes());
    for word in [settings.ttl_tolerance, settings.pattern_count, settings.range_count, settings.padding] {
        bytes.extend(word.to_ne_bytes());
    }
    for pattern in &settings.patterns {
        bytes.extend(pattern.offset.to_ne_bytes());
        bytes.extend([pattern.layer, pattern.length]);
        bytes.extend(pattern.padding.to_ne_bytes());
        bytes.extend(pattern.bytes);
        bytes.extend(pattern.mask);
    }
    for resolver in std::iter::once(&settings.any).chain(&settings.resolvers) {
        bytes.extend(resolver.address.map(u64::to_ne_bytes).as_flattened());
        bytes.extend(resolver.alone.to_ne_bytes());
        bytes.extend(resolver.paired.to_ne_bytes());
    }
    debug_assert_eq!(bytes.len(), size_of::<Settings>());
    debug_assert_eq!(settings.resolvers.len(), RESOLVER_SLOTS);
    bytes
}

/// Beside the file first, then over it: nobody loads half an object.
fn write(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut beside = path.as_os_str().to_owned();
    beside.push(".new");
    let beside = PathBuf::from(beside);
    let mut file = fs::File::create(&beside)?;
    file.write_all(bytes).and_then(|()| file.sync_all()).and_then(|()| fs::rename(&beside, path)).inspect_err(
        |_| {
            // What failed is of more interest than whether this does.
            let _ = fs::remove_file(&beside);
        },
    )
}
