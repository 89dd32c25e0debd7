//! Ethernet, as far as a bridge reads it: the two addresses, from a private copy of the frame's head.

use std::fmt;
use std::str::FromStr;

use super::frame::Head;

/// Bytes of an Ethernet header without tags: destination, source, EtherType (IEEE 802.3 §3.1.1).
pub const HEADER_LEN: u32 = 14;

const ADDRESS: u64 = 0xffff_ffff_ffff;

/// A MAC address: 48 bits, the first byte on the wire in the lowest byte.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Mac(u64);

impl Mac {
    /// From the six bytes in wire order.
    pub const fn from_bytes(b: [u8; 6]) -> Mac {
        Mac(u64::from_le_bytes([
            b[0], b[1], b[2], b[3], b[4], b[5], 0, 0,
        ]))
    }

    /// The six bytes in wire order.
    pub const fn to_bytes(self) -> [u8; 6] {
        let b = self.0.to_le_bytes();
        [b[0], b[1], b[2], b[3], b[4], b[5]]
    }

    /// From the low 48 bits of `bits`; the rest is ignored.
    #[inline]
    pub const fn from_bits(bits: u64) -> Mac {
        Mac(bits & ADDRESS)
    }

    /// The 48 bits, first byte lowest.
    #[inline]
    pub const fn bits(self) -> u64 {
        self.0
    }

    /// True for group addresses, broadcast among them (IEEE 802 §8.2: the first bit on the wire).
    #[inline]
    pub const fn is_multicast(self) -> bool {
        self.0 & 1 == 1
    }

    /// True for 00:00:00:00:00:00, which no station may have.
    #[inline]
    pub const fn is_zero(self) -> bool {
        self.0 == 0
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let b = self.to_bytes();
        write!(
            f,
            "{:02x}:{:02x}:{:02x}:{:02x}:{:02x}:{:02x}",
            b[0], b[1], b[2], b[3], b[4], b[5]
        )
    }
}

impl fmt::Debug for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A text that is no MAC address.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no MAC address; write six hexadecimal bytes with colons, like 02:00:00:00:00:01")]
pub struct NotAMac(String);

impl FromStr for Mac {
    type Err = NotAMac;

    fn from_str(text: &str) -> Result<Mac, NotAMac> {
        let wrong = || NotAMac(text.to_owned());
        let mut bytes = [0u8; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().ok_or_else(wrong)?;
            if part.len() != 2 || !part.bytes().all(|c| c.is_ascii_hexdigit()) {
                return Err(wrong());
            }
            *byte = u8::from_str_radix(part, 16).map_err(|_| wrong())?;
        }
        if parts.next().is_some() {
            Err(wrong())
        } else {
            Ok(Mac::from_bytes(bytes))
        }
    }
}

#[inline]
fn word(head: &Head, at: usize) -> u64 {
    let b = &head.0;
    u64::from_le_bytes([
        b[at],
        b[at + 1],
        b[at + 2],
        b[at + 3],
        b[at + 4],
        b[at + 5],
        b[at + 6],
        b[at + 7],
    ])
}

/// The destination address: bytes 0 to 5.
#[inline]
pub fn destination(head: &Head) -> Mac {
    Mac::from_bits(word(head, 0))
}

/// The source address: bytes 6 to 11.
#[inline]
pub fn source(head: &Head) -> Mac {
    Mac::from_bits(word(head, 6))
}

/// True if both frames go from the same station to the same station: the first 12 bytes agree.
#[inline]
pub fn same_stations(a: &Head, b: &Head) -> bool {
    (word(a, 0) ^ word(b, 0)) | (word(a, 4) ^ word(b, 4)) == 0
}

/// True for 01:80:c2:00:00:00 to 0f, link-local protocols that a bridge does not forward (IEEE 802.1Q §8.6.3).
#[inline]
pub fn is_reserved(mac: Mac) -> bool {
    mac.0 & 0xf0ff_ffff_ffff == 0x0000_00c2_8001
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head(start: &[u8]) -> Head {
        let mut bytes = [0; 64];
        bytes[..start.len()].copy_from_slice(start);
        Head(bytes)
    }

    #[test]
    fn reads_both_addresses_in_wire_order() {
        let head = head(&[2, 1, 3, 4, 5, 6, 0x12, 0x22, 0x32, 0x42, 0x52, 0x62, 8, 0]);
        assert_eq!(destination(&head).to_string(), "02:01:03:04:05:06");
        assert_eq!(source(&head).to_string(), "12:22:32:42:52:62");
    }

    #[test]
    fn a_text_is_read_back_as_written_and_nothing_else_is_taken() {
        let mac: Mac = "02:00:5e:10:FF:01".parse().unwrap();
        assert_eq!(mac.to_string(), "02:00:5e:10:ff:01");
        for wrong in [
            "",
            "02",
            "02:00:00:00:00",
            "02:00:00:00:00:01:02",
            "2:0:0:0:0:1",
            "02-00-00-00-00-01",
            "+2:00:00:00:00:01",
        ] {
            assert!(wrong.parse::<Mac>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn only_the_sixteen_bridge_addresses_are_reserved() {
        for last in 0..=255u8 {
            let mac = Mac::from_bytes([1, 0x80, 0xc2, 0, 0, last]);
            assert_eq!(is_reserved(mac), last < 16, "{mac}");
        }
        assert!(!is_reserved(Mac::from_bytes([1, 0x80, 0xc2, 0, 1, 0])));
    }

    #[test]
    fn frames_between_the_same_stations_differ_only_behind_byte_twelve() {
        let a = head(&[2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 8, 0]);
        for at in 0..14 {
            let mut b = a;
            b.0[at] ^= 0x40;
            assert_eq!(same_stations(&a, &b), at >= 12, "byte {at}");
        }
    }
}
