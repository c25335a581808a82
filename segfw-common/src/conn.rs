//! What gate conn and the list of address families share between their programs and the loader.

/// Offsets, in bytes, in structures of the running kernel. The loader reads them from the kernel's BTF.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Layout {
    /// `struct sock`: `__sk_common.skc_cookie`, 8 bytes.
    pub cookie: u32,
    /// `struct sk_buff`: `head`, a pointer.
    pub head: u32,
    /// `struct sk_buff`: `network_header`, 2 bytes, from `head` on.
    pub network_header: u32,
}

/// `AF_UNIX` (include/linux/socket.h).
pub const AF_UNIX: u32 = 1;
/// `AF_PACKET`.
pub const AF_PACKET: u32 = 17;
/// `AF_VSOCK`.
pub const AF_VSOCK: u32 = 40;

/// Families that every workload may use, as bits: `AF_UNIX`, `AF_INET`, `AF_INET6`, `AF_NETLINK`. `AF_UNSPEC` too, which the
/// kernel itself refuses.
pub const JUDGED_FAMILIES: u32 = 1 | 1 << AF_UNIX | 1 << 2 | 1 << 10 | 1 << 16;

/// A local socket of this protocol is refused to everybody: the question by which the agent learns that the list is in
/// force. No such protocol exists: without the list the kernel says `EPROTONOSUPPORT`.
pub const CANARY_PROTOCOL: u32 = 0x5e9f;

#[cfg(feature = "user")]
// SAFETY: `repr(C)`, integers only.
unsafe impl aya::Pod for Layout {}
