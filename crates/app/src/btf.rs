//! Where the running kernel keeps the fields of its structures.
//!
//! Programs here read a few fields of kernel structures (`tcp_sock.write_seq`).
//! Their offsets differ between kernels; the kernel describes itself in BTF
//! (`/sys/kernel/btf/vmlinux`, format: Documentation/bpf/btf.rst, since 4.18).
//! The user side looks the offsets up here and hands them to a program as
//! read-only globals, which the verifier treats as known constants.

use std::{collections::HashMap, fs};

use anyhow::{Context as _, Result, bail, ensure};

const VMLINUX: &str = "/sys/kernel/btf/vmlinux";
const MAGIC: u16 = 0xeb9f;
const HEADER: usize = 24;

/// The kernel's description of its own types.
#[derive(Debug)]
pub struct Btf {
    data: Vec<u8>,
    strings: usize,
    /// Where each type's record begins, by type number; 0 is `void`.
    types: Vec<usize>,
    /// Structures and unions by name.
    structs: HashMap<Vec<u8>, u32>,
}

/// The offset, in bytes, of a field of a kernel structure, reaching into unnamed
/// members and along dots: `field("sock", "__sk_common.skc_family")`.
///
/// # Errors
/// Where the kernel has no BTF, or no such field in a structure of that name.
pub fn field(structure: &str, path: &str) -> Result<u32> {
    Btf::of_the_kernel()?.field(structure, path)
}

impl Btf {
    /// Reads the running kernel's description.
    ///
    /// # Errors
    /// Where the kernel was built without it (CONFIG_DEBUG_INFO_BTF).
    pub fn of_the_kernel() -> Result<Self> {
        let data = fs::read(VMLINUX)
            .with_context(|| format!("cannot read {VMLINUX} (the kernel needs CONFIG_DEBUG_INFO_BTF)"))?;
        Self::parse(data).with_context(|| format!("cannot parse {VMLINUX}"))
    }

    /// Indexes a description in the byte order of this machine.
    fn parse(data: Vec<u8>) -> Result<Self> {
        let mut btf = Self { data, strings: 0, types: vec![0], structs: HashMap::new() };
        let magic = btf.word(0)? as u16;
        ensure!(magic == MAGIC, "it begins with {magic:#06x}, not with {MAGIC:#06x}");
        let header = btf.word(4)? as usize;
        ensure!(header >= HEADER, "its header has {header} bytes, fewer than {HEADER}");
        let (types, types_len) = (header + btf.word(8)? as usize, btf.word(12)? as usize);
        btf.strings = header + btf.word(16)? as usize;
        let mut at = types;
        while at < types + types_len {
            let kind = btf.kind(at)?;
            if kind.is_composite() {
                let (name, number) = (btf.name(btf.word(at)?)?.to_vec(), btf.types.len() as u32);
                btf.structs.entry(name).or_insert(number);
            }
            btf.types.push(at);
            at += 12 + kind.extra(btf.word(at + 4)? as usize & 0xffff)?;
        }
        Ok(btf)
    }

    /// As [`field`], on a description that was read before.
    ///
    /// # Errors
    /// Where there is no such field in a structure of that name.
    pub fn field(&self, structure: &str, path: &str) -> Result<u32> {
        let mut holder = *self
            .structs
            .get(structure.as_bytes())
            .with_context(|| format!("this kernel has no structure {structure}"))?;
        let mut bits = 0;
        for name in path.split('.') {
            let (offset, kind) = self
                .member(holder, name.as_bytes())?
                .with_context(|| format!("this kernel's {structure} has no field {path} (at {name})"))?;
            bits += offset;
            holder = kind;
        }
        ensure!(bits % 8 == 0, "{structure}.{path} is a bit field");
        Ok(bits / 8)
    }

    /// The size, in bytes, of a structure.
    ///
    /// # Errors
    /// Where there is no structure of that name.
    pub fn size(&self, structure: &str) -> Result<u32> {
        let number = self.structs.get(structure.as_bytes());
        let number = *number.with_context(|| format!("this kernel has no structure {structure}"))?;
        self.word(self.types[number as usize] + 8)
    }

    /// The offset in bits and the type of a member, found in unnamed members too.
    fn member(&self, holder: u32, name: &[u8]) -> Result<Option<(u32, u32)>> {
        let at = self.record(holder)?;
        let info = self.word(at + 4)?;
        if !self.kind(at)?.is_composite() {
            return Ok(None);
        }
        let has_bit_fields = info >> 31 == 1;
        for i in 0..(info & 0xffff) as usize {
            let member = at + 12 + 12 * i;
            let (kind, offset) = (self.word(member + 4)?, self.word(member + 8)?);
            let offset = if has_bit_fields { offset & 0x00ff_ffff } else { offset };
            match self.name(self.word(member)?)? {
                found if found == name => return Ok(Some((offset, kind))),
                b"" => {
                    if let Some((inner, kind)) = self.member(kind, name)? {
                        return Ok(Some((offset + inner, kind)));
                    }
                }
                _ => {}
            }
        }
        Ok(None)
    }

    /// Where a type's record begins, looking through typedefs and qualifiers.
    fn record(&self, mut number: u32) -> Result<usize> {
        // A chain of qualifiers is short; the bound keeps a broken file from looping.
        for _ in 0..16 {
            let at = *self.types.get(number as usize).context("a type number is out of range")?;
            ensure!(at != 0, "a member has no type");
            if !self.kind(at)?.is_alias() {
                return Ok(at);
            }
            number = self.word(at + 8)?;
        }
        bail!("a chain of typedefs has no end")
    }

    fn kind(&self, at: usize) -> Result<Kind> {
        Ok(Kind(self.word(at + 4)? >> 24 & 0x1f))
    }

    fn word(&self, at: usize) -> Result<u32> {
        let bytes = self.data.get(at..at + 4).context("it is cut short")?;
        Ok(u32::from_ne_bytes(bytes.try_into()?))
    }

    fn name(&self, offset: u32) -> Result<&[u8]> {
        let rest = self.data.get(self.strings + offset as usize..).context("a name is out of range")?;
        let end = rest.iter().position(|byte| *byte == 0).context("a name has no end")?;
        Ok(&rest[..end])
    }
}

/// `BTF_KIND_*`
#[derive(Debug, Clone, Copy)]
struct Kind(u32);

impl Kind {
    fn is_composite(self) -> bool {
        matches!(self.0, 4 | 5)
    }

    /// Typedef, volatile, const, restrict, type tag.
    fn is_alias(self) -> bool {
        matches!(self.0, 8..=11 | 18)
    }

    /// How many bytes follow the common 12 of a record with `count` entries.
    fn extra(self, count: usize) -> Result<usize> {
        Ok(match self.0 {
            1 | 14 | 17 => 4,              // int, variable, declaration tag
            2 | 7..=12 | 16 | 18 => 0,     // pointer, forward, aliases, function, float
            3 => 12,                       // array
            4 | 5 | 15 | 19 => 12 * count, // struct, union, section, 64-bit enum
            6 | 13 => 8 * count,           // enum, function prototype
            other => bail!("it has a type of kind {other}, newer than this program"),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_plain_nested_and_unnamed_fields() {
        if !fs::exists(VMLINUX).unwrap() {
            println!("skipped: this kernel has no BTF");
            return;
        }
        let btf = Btf::of_the_kernel().unwrap();
        // `struct sock` begins with `struct sock_common`, and that with the addresses
        // (`skc_daddr`, `skc_rcv_saddr` in an unnamed union), on every kernel so far.
        assert_eq!(btf.field("sock", "__sk_common").unwrap(), 0);
        assert_eq!(btf.field("sock_common", "skc_daddr").unwrap(), 0);
        assert_eq!(btf.field("sock_common", "skc_rcv_saddr").unwrap(), 4);
        assert_eq!(
            btf.field("sock", "__sk_common.skc_family").unwrap(),
            btf.field("sock_common", "skc_family").unwrap()
        );
        assert!(btf.field("tcp_sock", "write_seq").unwrap() > 0);
        assert!(btf.size("tcp_sock").unwrap() > btf.field("tcp_sock", "write_seq").unwrap());
    }

    #[test]
    fn says_what_is_missing() {
        if !fs::exists(VMLINUX).unwrap() {
            println!("skipped: this kernel has no BTF");
            return;
        }
        assert!(field("tcp_sock", "no_such_field").unwrap_err().to_string().contains("no_such_field"));
        assert!(field("no_such_struct", "x").unwrap_err().to_string().contains("no_such_struct"));
    }

    #[test]
    fn refuses_what_is_no_btf() {
        assert!(Btf::parse(vec![]).is_err());
        assert!(Btf::parse(b"\x7fELF and more, long enough for a header".to_vec()).is_err());
        let mut cut = vec![0; HEADER];
        cut[..2].copy_from_slice(&MAGIC.to_ne_bytes());
        cut[4..8].copy_from_slice(&24u32.to_ne_bytes());
        cut[12..16].copy_from_slice(&100u32.to_ne_bytes());
        assert!(Btf::parse(cut).is_err());
    }
}
