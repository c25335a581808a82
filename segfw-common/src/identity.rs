//! Who is at an end of a flow, and how we know it.

/// One set of labels, or one range of addresses, as a number. Numbers live as long as the pinned maps.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Identity(pub u32);

impl Identity {
    /// A workload under a managed parent whose labels are not known yet, or an end that cannot be told.
    pub const UNRESOLVED: Self = Self(0);
    /// Processes of no workload.
    pub const HOST: Self = Self(1);
    /// An address nobody claims.
    pub const WORLD: Self = Self(2);
    /// Sockets the kernel made for itself.
    pub const KERNEL: Self = Self(3);
    /// Sockets with which the agent finds out whether the hooks still refuse: every policy denies it everything, and what
    /// it does is neither counted nor reported.
    pub const CANARY: Self = Self(4);
    /// The same, of whom no policy speaks: with it the agent finds out that a gate lets anybody through at all.
    pub const CANARY_OPEN: Self = Self(5);
    /// A canary, of either kind: neither counted nor reported.
    #[inline(always)]
    pub const fn is_canary(self) -> bool {
        self.0 == Self::CANARY.0 || self.0 == Self::CANARY_OPEN.0
    }
    /// In a rule key: every identity that has no entry of its own. Never the identity of anybody.
    pub const ANY: Self = Self(255);
    /// The first number that stands for a set of labels or for an address range.
    pub const FIRST_DYNAMIC: u32 = 256;
}

/// How the peer's identity is known, weakest first: a rule may demand a least one.
#[repr(u8)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub enum Evidence {
    /// Nobody claims the address.
    #[default]
    None = 0,
    /// The longest prefix that a policy names.
    Prefix = 1,
    /// The exact address.
    Address = 2,
    /// The exact address, protocol and port of a socket on this host.
    Endpoint = 3,
    /// Written by our own hooks when the flow was opened on this host.
    Origin = 4,
}

impl Evidence {
    /// The word users see.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Prefix => "prefix",
            Self::Address => "address",
            Self::Endpoint => "endpoint",
            Self::Origin => "origin",
        }
    }

    /// From a raw byte; `None` for a value of a newer layout.
    pub const fn from_raw(raw: u8) -> Option<Self> {
        Some(match raw {
            0 => Self::None,
            1 => Self::Prefix,
            2 => Self::Address,
            3 => Self::Endpoint,
            4 => Self::Origin,
            _ => return None,
        })
    }
}
