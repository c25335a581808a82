//! Where the running kernel keeps a field: the one thing that is read from its type information (BTF).
//!
//! Layout: include/uapi/linux/btf.h and Documentation/bpf/btf.rst.

use std::io;
use std::path::Path;

/// The kernel's own types.
const VMLINUX: &str = "/sys/kernel/btf/vmlinux";
const MAGIC: u16 = 0xeb9f;
const KIND_STRUCT: u32 = 4;

/// Type information of a kernel.
pub struct Btf(Vec<u8>);

impl Btf {
    /// Of this kernel.
    pub fn of_kernel() -> io::Result<Self> {
        let bytes = std::fs::read(Path::new(VMLINUX))?;
        if bytes.get(..2) != Some(&MAGIC.to_ne_bytes()) {
            return Err(io::Error::new(io::ErrorKind::InvalidData, format!("{VMLINUX} is no BTF")));
        }
        Ok(Self(bytes))
    }

    fn word(&self, at: usize) -> Option<u32> {
        Some(u32::from_ne_bytes(self.0.get(at..at.checked_add(4)?)?.try_into().ok()?))
    }

    /// Offset of a field in bytes; `None` = no such structure, no such field, or one that is not a whole number of bytes.
    pub fn offset(&self, structure: &str, field: &str) -> Option<u32> {
        let header = self.word(4)? as usize;
        let (types, types_len) = (header + self.word(8)? as usize, self.word(12)? as usize);
        let strings = header + self.word(16)? as usize;
        let is = |name: u32, wanted: &str| {
            let text = self.0.get(strings + name as usize..).unwrap_or_default();
            text.strip_prefix(wanted.as_bytes()).is_some_and(|rest| rest.first() == Some(&0))
        };
        let mut at = types;
        while at < types + types_len {
            let (name, info) = (self.word(at)?, self.word(at + 4)?);
            let (kind, count) = (info >> 24 & 0x1f, (info & 0xffff) as usize);
            at += 12;
            if kind == KIND_STRUCT && is(name, structure) {
                let members = (0..count).map(|i| at + 12 * i);
                for member in members {
                    if is(self.word(member)?, field) {
                        // With the kind flag the upper byte is the width of a bit field; 0 = none.
                        let bits = self.word(member + 8)?;
                        let plain = info >> 31 == 0 || bits >> 24 == 0;
                        return (plain && bits % 8 == 0).then_some((bits & 0xff_ffff) / 8);
                    }
                }
            }
            at += match kind {
                // Integer, variable, declaration tag.
                1 | 14 | 17 => 4,
                // Array.
                3 => 12,
                // Structure, union, section, 64-bit enumeration: twelve bytes each.
                KIND_STRUCT | 5 | 15 | 19 => 12 * count,
                // Enumeration, arguments of a function: eight.
                6 | 13 => 8 * count,
                // Pointer, forward, typedef, volatile, const, restrict, function, float, type tag: nothing.
                2 | 7..=12 | 16 | 18 => 0,
                // Newer than this list: what follows cannot be found.
                _ => return None,
            };
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `struct s { int a:3; int b; }`, after an integer.
    fn small() -> Btf {
        let strings = b"\0int\0s\0a\0b\0";
        let words: [u32; 4 + 9] = [
            1,
            1 << 24,
            4,
            32, // int
            5,
            1 << 31 | 4 << 24 | 2,
            8,
            7,
            1,
            3 << 24,
            9,
            1,
            32, // s
        ];
        let mut bytes = vec![0x9f, 0xeb, 1, 0];
        let types = 4 * words.len() as u32;
        for word in [24, 0, types, types, strings.len() as u32].iter().chain(&words) {
            bytes.extend(word.to_ne_bytes());
        }
        bytes.extend(strings);
        Btf(bytes)
    }

    #[test]
    fn finds_fields() {
        let btf = small();
        assert_eq!(btf.offset("s", "b"), Some(4));
        assert_eq!(btf.offset("s", "a"), None, "a bit field");
        assert_eq!(btf.offset("s", "c"), None);
        assert_eq!(btf.offset("t", "b"), None);
        for end in 0..btf.0.len() {
            let _ = Btf(btf.0[..end].to_vec()).offset("s", "b");
        }
    }

    #[test]
    fn this_kernel_has_the_fields_that_programs_read() {
        let Ok(btf) = Btf::of_kernel() else { return };
        for (structure, field) in crate::datapath::load::FIELDS.map(|(_, structure, field)| (structure, field)) {
            assert!(btf.offset(structure, field).is_some(), "{structure}.{field}");
        }
    }
}
