//! What the running kernel says of its own types (BTF, Documentation/bpf/btf.rst): where a field is, which number a function
//! has. Ours because the kept-up reader of BTF in Rust is LGPL, and aya-obj keeps its fields to itself.

use std::io;
use std::path::Path;

const MAGIC: u16 = 0xeb9f;
/// `struct btf_type`: name, info, size or type.
const TYPE: usize = 12;

// Kinds (include/uapi/linux/btf.h).
const INT: u32 = 1;
const PTR: u32 = 2;
const ARRAY: u32 = 3;
const STRUCT: u32 = 4;
const UNION: u32 = 5;
const ENUM: u32 = 6;
const TYPEDEF: u32 = 8;
const VOLATILE: u32 = 9;
const CONST: u32 = 10;
const RESTRICT: u32 = 11;
const FUNC: u32 = 12;
const FUNC_PROTO: u32 = 13;
const VAR: u32 = 14;
const DATASEC: u32 = 15;
const DECL_TAG: u32 = 17;
const TYPE_TAG: u32 = 18;
const ENUM64: u32 = 19;
/// The newest kind; its neighbours FWD (7) and FLOAT (16) carry nothing.
const LAST: u32 = ENUM64;

/// Types within types that are followed before a cycle is assumed.
const DEPTH: usize = 32;

/// A parsed BTF blob.
#[derive(Debug)]
pub struct Btf {
    bytes: Vec<u8>,
    /// Where each type begins; type number `n` is at `n - 1`.
    types: Vec<u32>,
    strings: usize,
}

/// A type as the blob has it.
#[derive(Clone, Copy)]
struct Type {
    at: usize,
    name: u32,
    info: u32,
    /// Bytes, or the number of another type, by kind.
    size_or_type: u32,
}

impl Type {
    fn kind(self) -> u32 {
        self.info >> 24 & 31
    }
    fn members(self) -> usize {
        self.info as usize & 0xffff
    }
    /// Member offsets carry a bit-field size above their low 24 bits.
    fn has_bit_fields(self) -> bool {
        self.info >> 31 != 0
    }
}

fn invalid(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("the kernel's BTF cannot be read: {what}"))
}

impl Btf {
    /// That of the running kernel.
    ///
    /// # Errors
    ///
    /// `NotFound` where the kernel was built without CONFIG_DEBUG_INFO_BTF.
    pub fn of_kernel() -> io::Result<Self> {
        Self::parse(std::fs::read(Path::new("/sys/kernel/btf/vmlinux"))?)
    }

    /// Little-endian, as all kernels we run on.
    pub fn parse(bytes: Vec<u8>) -> io::Result<Self> {
        let word = |at: usize| word(&bytes, at).ok_or_else(|| invalid("its header is cut off"));
        if word(0)? as u16 != MAGIC {
            return Err(invalid("it does not begin as BTF does"));
        }
        let header = word(4)? as usize;
        let (types_at, types_len, strings) = (word(8)? as usize, word(12)? as usize, word(16)? as usize);
        let (mut at, end) = (header + types_at, header + types_at + types_len);
        let mut types = Vec::new();
        while at < end {
            let t = type_at(&bytes, at).ok_or_else(|| invalid("a type is cut off"))?;
            types.push(u32::try_from(at).map_err(|_| invalid("it is too large"))?);
            let n = t.members();
            at += TYPE
                + match t.kind() {
                    INT | VAR | DECL_TAG => 4,
                    ARRAY => 12,
                    STRUCT | UNION | DATASEC | ENUM64 => 12 * n,
                    ENUM | FUNC_PROTO => 8 * n,
                    0 => return Err(invalid("a type of kind 0")),
                    kind if kind > LAST => return Err(invalid(&format!("a type of the unknown kind {kind}"))),
                    _ => 0,
                };
        }
        Ok(Self { bytes, types, strings: header + strings })
    }

    fn get(&self, number: u32) -> Option<Type> {
        let at = *self.types.get((number as usize).checked_sub(1)?)?;
        type_at(&self.bytes, at as usize)
    }

    fn text(&self, at: u32) -> &[u8] {
        let text = self.bytes.get(self.strings + at as usize..).unwrap_or_default();
        text.split(|b| *b == 0).next().unwrap_or_default()
    }

    fn find(&self, kind: u32, name: &str) -> Option<(u32, Type)> {
        (1..).zip(&self.types).find_map(|(number, at)| {
            let t = type_at(&self.bytes, *at as usize)?;
            (t.kind() == kind && self.text(t.name) == name.as_bytes()).then_some((number, t))
        })
    }

    /// The number of a function, by its name and the types of its arguments as C would write them without `const`
    /// (`sock *`, `int`). `None` = there is none, or it takes something else.
    pub fn function(&self, name: &str, arguments: &[&str]) -> Option<u32> {
        let (number, function) = self.find(FUNC, name)?;
        let prototype = self.get(function.size_or_type).filter(|t| t.kind() == FUNC_PROTO)?;
        let taken = (0..prototype.members()).map(|i| word(&self.bytes, prototype.at + TYPE + 8 * i + 4));
        let taken: Option<Vec<String>> = taken.map(|t| t.and_then(|t| self.name(t, 0))).collect();
        (taken? == arguments).then_some(number)
    }

    fn name(&self, number: u32, depth: usize) -> Option<String> {
        if depth > DEPTH {
            return None;
        }
        let t = self.get(number)?;
        match t.kind() {
            PTR => Some(format!("{} *", self.name(t.size_or_type, depth + 1)?)),
            CONST | VOLATILE | RESTRICT | TYPE_TAG => self.name(t.size_or_type, depth + 1),
            _ => Some(String::from_utf8_lossy(self.text(t.name)).into_owned()),
        }
    }

    /// Offset in bytes of a field of a structure, given as the names on the way to it (`["__sk_common", "skc_cookie"]`;
    /// structures without a name are looked through). `None` = not there, a bit field, or not of `size` bytes.
    pub fn offset(&self, structure: &str, path: &[&str], size: u32) -> Option<u32> {
        let (_, mut at) = self.find(STRUCT, structure)?;
        let (mut bits, mut field) = (0, None);
        for name in path {
            let (offset, number) = self.member(at, name, 0)?;
            bits += offset;
            field = Some(number);
            at = self.plain(number)?;
        }
        (bits % 8 == 0 && self.size(field?, 0)? == size).then_some(bits / 8)
    }

    /// Bits from the beginning of a structure or union to a member, and the member's type.
    fn member(&self, of: Type, name: &str, depth: usize) -> Option<(u32, u32)> {
        if depth > DEPTH || !matches!(of.kind(), STRUCT | UNION) {
            return None;
        }
        (0..of.members()).find_map(|i| {
            let at = of.at + TYPE + 12 * i;
            let (called, number) = (word(&self.bytes, at)?, word(&self.bytes, at + 4)?);
            let raw = word(&self.bytes, at + 8)?;
            let (offset, width) = if of.has_bit_fields() { (raw & 0xff_ffff, raw >> 24) } else { (raw, 0) };
            if called == 0 {
                let (inner, found) = self.member(self.plain(number)?, name, depth + 1)?;
                return Some((offset + inner, found));
            }
            (width == 0 && self.text(called) == name.as_bytes()).then_some((offset, number))
        })
    }

    /// A type without typedefs and qualifiers.
    fn plain(&self, mut number: u32) -> Option<Type> {
        for _ in 0..DEPTH {
            let t = self.get(number)?;
            if !matches!(t.kind(), TYPEDEF | CONST | VOLATILE | RESTRICT | TYPE_TAG) {
                return Some(t);
            }
            number = t.size_or_type;
        }
        None
    }

    fn size(&self, number: u32, depth: usize) -> Option<u32> {
        let t = self.plain(number)?;
        match t.kind() {
            INT | STRUCT | UNION | ENUM | ENUM64 => Some(t.size_or_type),
            PTR => Some(8),
            ARRAY if depth < DEPTH => {
                let element = word(&self.bytes, t.at + TYPE)?;
                self.size(element, depth + 1)?.checked_mul(word(&self.bytes, t.at + TYPE + 8)?)
            }
            _ => None,
        }
    }
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn type_at(bytes: &[u8], at: usize) -> Option<Type> {
    Some(Type { at, name: word(bytes, at)?, info: word(bytes, at + 4)?, size_or_type: word(bytes, at + 8)? })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A blob with these types and strings.
    fn blob(types: &[u32], strings: &str) -> Vec<u8> {
        let length = 4 * types.len() as u32;
        let header = [u32::from(MAGIC) | 1 << 16, 24, 0, length, length, strings.len() as u32];
        let words = header.iter().chain(types).flat_map(|w| w.to_le_bytes());
        words.chain(strings.bytes()).collect()
    }

    const fn info(kind: u32, members: u32) -> u32 {
        kind << 24 | members
    }

    /// int; struct s { int a; struct { union { u16 b; }; }; }; s *; void f(const s *, int).
    fn example() -> Vec<u8> {
        // Offsets of the names in the strings.
        let (int, short, s, a, b, f) = (1, 5, 11, 13, 15, 17);
        #[rustfmt::skip]
        let types = [
            int, info(INT, 0), 4, 32,                                   // 1
            short, info(INT, 0), 2, 16,                                 // 2
            0, info(UNION, 1), 4, b, 2, 0,                              // 3
            0, info(STRUCT, 1), 4, 0, 3, 0,                             // 4
            s, info(STRUCT, 2), 8, a, 1, 0, 0, 4, 32,                   // 5
            0, info(CONST, 0), 5,                                       // 6
            0, info(PTR, 0), 6,                                         // 7
            0, info(FUNC_PROTO, 2), 0, 0, 7, 0, 1,                      // 8
            f, info(FUNC, 0), 8,                                        // 9
        ];
        blob(&types, "\0int\0short\0s\0a\0b\0f\0")
    }

    #[test]
    fn fields_and_functions_are_found_with_their_types() {
        let btf = Btf::parse(example()).unwrap();
        assert_eq!(btf.offset("s", &["a"], 4), Some(0));
        assert_eq!(btf.offset("s", &["b"], 2), Some(4), "through structures without a name");
        assert_eq!(btf.offset("s", &["b"], 4), None, "another size");
        assert_eq!(btf.offset("s", &["c"], 4), None);
        assert_eq!(btf.offset("t", &["a"], 4), None);
        assert_eq!(btf.function("f", &["s *", "int"]), Some(9));
        assert_eq!(btf.function("f", &["s *"]), None, "another number of arguments");
        assert_eq!(btf.function("g", &[]), None);
    }

    #[test]
    fn damage_is_an_error_or_nothing_found() {
        let whole = example();
        for cut in 0..whole.len() {
            if let Ok(btf) = Btf::parse(whole[..cut].to_vec()) {
                let _ = (btf.offset("s", &["b"], 2), btf.function("f", &["s *", "int"]));
            }
        }
        for at in 0..whole.len() {
            let mut broken = whole.clone();
            broken[at] ^= 0xff;
            if let Ok(btf) = Btf::parse(broken) {
                let _ = (btf.offset("s", &["b"], 2), btf.function("f", &["s *", "int"]));
            }
        }
    }

    /// The kernel this runs on, if it says anything.
    #[test]
    fn the_running_kernel_has_what_gate_conn_reads() {
        let Ok(btf) = Btf::of_kernel() else { return };
        assert!(btf.offset("sock", &["__sk_common", "skc_cookie"], 8).is_some());
        assert!(btf.offset("sk_buff", &["head"], 8).is_some_and(|at| at % 8 == 0));
        assert!(btf.offset("sk_buff", &["network_header"], 2).is_some());
        assert!(btf.function("security_socket_create", &["int", "int", "int", "int"]).is_some());
    }
}
