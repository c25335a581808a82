//! One address type for both families: 16 bytes, IPv4 mapped (RFC 4291, 2.5.5.2), so that `::ffff:a.b.c.d` and
//! `a.b.c.d` can never be two different peers.

/// An IPv6 address, or an IPv4 address mapped into `::ffff:0:0/96`; four words whose *bytes* are in network order.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Addr(pub [u32; 4]);

/// The third word of an IPv4-mapped address.
const MAPPED: u32 = u32::from_ne_bytes([0, 0, 0xff, 0xff]);

impl Addr {
    /// `::`, the wildcard of both families after [`Addr::any_of_family`].
    pub const UNSPECIFIED: Self = Self([0; 4]);
    /// `0.0.0.0`, mapped.
    pub const UNSPECIFIED_V4: Self = Self([0, 0, MAPPED, 0]);

    /// From an IPv4 address as it lies in memory (network order).
    #[inline(always)]
    pub const fn from_v4_be(be: u32) -> Self {
        Self([0, 0, MAPPED, be])
    }

    /// From the four words of an IPv6 address as they lie in memory (network order).
    #[inline(always)]
    pub const fn from_v6_be(words: [u32; 4]) -> Self {
        Self(words)
    }

    /// From IPv4 octets.
    pub const fn v4(octets: [u8; 4]) -> Self {
        Self::from_v4_be(u32::from_ne_bytes(octets))
    }

    /// From the 16 octets of an IPv6 address.
    pub const fn v6(o: [u8; 16]) -> Self {
        Self([
            u32::from_ne_bytes([o[0], o[1], o[2], o[3]]),
            u32::from_ne_bytes([o[4], o[5], o[6], o[7]]),
            u32::from_ne_bytes([o[8], o[9], o[10], o[11]]),
            u32::from_ne_bytes([o[12], o[13], o[14], o[15]]),
        ])
    }

    /// The 16 octets.
    pub const fn octets(&self) -> [u8; 16] {
        let [a, b, c, d] =
            [self.0[0].to_ne_bytes(), self.0[1].to_ne_bytes(), self.0[2].to_ne_bytes(), self.0[3].to_ne_bytes()];
        [a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3], c[0], c[1], c[2], c[3], d[0], d[1], d[2], d[3]]
    }

    /// True for an IPv4 address, however it was written.
    #[inline(always)]
    pub const fn is_v4(&self) -> bool {
        self.0[0] == 0 && self.0[1] == 0 && self.0[2] == MAPPED
    }

    /// `127.0.0.0/8` or `::1`.
    #[inline(always)]
    pub const fn is_loopback(&self) -> bool {
        if self.is_v4() {
            u32::from_be(self.0[3]) >> 24 == 127
        } else {
            self.0[0] == 0 && self.0[1] == 0 && self.0[2] == 0 && u32::from_be(self.0[3]) == 1
        }
    }

    /// `0.0.0.0` or `::`.
    #[inline(always)]
    pub const fn is_unspecified(&self) -> bool {
        self.0[0] == 0 && self.0[1] == 0 && self.0[3] == 0 && (self.0[2] == 0 || self.0[2] == MAPPED)
    }

    /// Multicast of either family, or the limited broadcast address.
    #[inline(always)]
    pub const fn is_multicast(&self) -> bool {
        if self.is_v4() {
            let v4 = u32::from_be(self.0[3]);
            v4 >> 28 == 0xe || v4 == u32::MAX
        } else {
            u32::from_be(self.0[0]) >> 24 == 0xff
        }
    }

    /// The wildcard a socket of this address's own family binds to.
    #[inline(always)]
    pub const fn any_of_family(&self) -> Self {
        if self.is_v4() { Self::UNSPECIFIED_V4 } else { Self::UNSPECIFIED }
    }
}

#[cfg(feature = "user")]
mod user {
    use super::Addr;
    use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
    extern crate std;

    impl From<IpAddr> for Addr {
        fn from(ip: IpAddr) -> Self {
            match ip {
                IpAddr::V4(v4) => Self::v4(v4.octets()),
                IpAddr::V6(v6) => Self::v6(v6.octets()),
            }
        }
    }
    impl From<Addr> for IpAddr {
        fn from(addr: Addr) -> Self {
            let o = addr.octets();
            if addr.is_v4() { Self::V4(Ipv4Addr::new(o[12], o[13], o[14], o[15])) } else { Self::V6(Ipv6Addr::from(o)) }
        }
    }
    impl core::fmt::Display for Addr {
        fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
            IpAddr::from(*self).fmt(f)
        }
    }
    impl core::fmt::Debug for Addr {
        fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
            IpAddr::from(*self).fmt(f)
        }
    }
    impl core::str::FromStr for Addr {
        type Err = std::net::AddrParseError;
        fn from_str(s: &str) -> Result<Self, Self::Err> {
            s.parse::<IpAddr>().map(Self::from)
        }
    }
}
#[cfg(not(feature = "user"))]
impl core::fmt::Debug for Addr {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_list().entries(self.octets().iter()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::Addr;

    #[test]
    fn mapped_and_plain_are_one_address() {
        let plain = Addr::v4([127, 0, 0, 1]);
        let mapped = Addr::v6([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 127, 0, 0, 1]);
        assert_eq!(plain, mapped);
        assert!(mapped.is_v4() && mapped.is_loopback());
    }

    #[test]
    fn loopback_and_its_neighbours() {
        let v6 = |last: u8, first: u8| Addr::v6([first, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, last]);
        assert!(Addr::v4([127, 255, 0, 9]).is_loopback());
        assert!(!Addr::v4([128, 0, 0, 1]).is_loopback());
        assert!(v6(1, 0).is_loopback());
        assert!(!v6(2, 0).is_loopback());
        assert!(!v6(1, 1).is_loopback());
        assert!(v6(0, 0).is_unspecified() && Addr::v4([0; 4]).is_unspecified());
        assert!(
            v6(1, 0xff).is_multicast() && Addr::v4([239, 1, 1, 1]).is_multicast() && Addr::v4([255; 4]).is_multicast()
        );
        assert!(!Addr::v4([223, 1, 1, 1]).is_multicast());
    }

    #[test]
    fn octets_round_trip() {
        let o: [u8; 16] = core::array::from_fn(|i| i as u8);
        assert_eq!(Addr::v6(o).octets(), o);
    }
}
