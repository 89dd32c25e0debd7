//! Descriptors as typed words (82599 §7.1.5, §7.2.3): 16 bytes each, two little-endian quadwords.
//!
//! Nothing here touches memory: a ring reads a quadword once and asks this module what it means.

/// Bytes of a descriptor, receive or transmit.
pub const DESC_LEN: usize = 16;

/// The second quadword of a receive descriptor that the device wrote back: status, errors, length and VLAN tag in one load.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RxDone(pub u64);

impl RxDone {
    /// The descriptor is done (DD); all other fields count only then.
    #[inline]
    pub fn done(self) -> bool {
        self.0 & 1 != 0
    }

    /// The frame ends here (EOP).
    #[inline]
    pub fn end(self) -> bool {
        self.0 & 2 != 0
    }

    /// Bytes in this descriptor's buffer, as the device says.
    #[inline]
    pub fn length(self) -> u32 {
        (self.0 >> 32) as u32 & 0xFFFF
    }

    /// A frame error: CRC, length, symbol, oversize, undersize (CE, LE, PE, OSE, USE). Checksum errors do not count.
    #[inline]
    pub fn damaged(self) -> bool {
        self.0 & (1 << 24 | 1 << 25 | 1 << 27 | 1 << 28 | 1 << 29) != 0
    }

    /// The VLAN tag that was stripped from the frame.
    #[inline]
    pub fn vlan(self) -> Option<u16> {
        (self.0 & 1 << 3 != 0).then_some((self.0 >> 48) as u16)
    }

    /// What the device says of the checksum of TCP, UDP or SCTP.
    #[inline]
    pub fn l4_checksum(self) -> Checksum {
        Checksum::of(self.0 & 1 << 5 != 0, self.0 & 1 << 30 != 0)
    }

    /// What the device says of the IPv4 header's checksum.
    #[inline]
    pub fn ip_checksum(self) -> Checksum {
        Checksum::of(self.0 & 1 << 6 != 0, self.0 & 1 << 31 != 0)
    }

    /// The frame came from another VF of the same port.
    pub fn looped_back(self) -> bool {
        self.0 & 1 << 18 != 0
    }
}

/// A checksum as the device saw it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Checksum {
    /// Not looked at.
    Unknown,
    /// Looked at, right.
    Good,
    /// Looked at, wrong. Also said, by erratum, of IPv4 UDP without a checksum and of some fragments: not a reason to drop.
    Bad,
}

impl Checksum {
    #[inline]
    fn of(seen: bool, wrong: bool) -> Checksum {
        match (seen, wrong) {
            (false, _) => Checksum::Unknown,
            (true, false) => Checksum::Good,
            (true, true) => Checksum::Bad,
        }
    }
}

/// Last dword, bit 0 of a transmit descriptor that asked for a report: sent.
pub const TX_DONE: u64 = 1 << 32;

const TX_DATA: u64 = 3 << 20;
const TX_CONTEXT: u64 = 2 << 20;
const TX_END: u64 = 1 << 24;
const TX_INSERT_FCS: u64 = 1 << 25;
const TX_REPORT: u64 = 1 << 27;
const TX_ADVANCED: u64 = 1 << 29;
const TX_VLAN: u64 = 1 << 30;
const TX_SEGMENT: u64 = 1 << 31;
const OLINFO_USE_CONTEXT: u64 = 1 << 39;
const OLINFO_IP_CHECKSUM: u64 = 1 << 40;
const OLINFO_L4_CHECKSUM: u64 = 1 << 41;
const OLINFO_PAYLEN_SHIFT: u32 = 46;
/// Largest value of PAYLEN, an 18-bit field.
pub const PAYLEN_MAX: u32 = (1 << 18) - 1;

/// Work that the device does on a frame it sends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TxOffload {
    /// A VLAN tag (priority and id) to insert.
    pub vlan: Option<u16>,
    /// A checksum to complete.
    pub checksum: Option<TxChecksum>,
    /// Cut the TCP payload into segments of this many bytes; needs `checksum` with [`L4::Tcp`].
    pub mss: Option<TxSegments>,
}

/// Where the headers of a frame are, for [`TxOffload::checksum`]. The pseudo header's sum is already in the checksum field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TxChecksum {
    /// Bytes of the Ethernet header, without the tag that the device inserts; at most 127.
    pub mac_len: u8,
    /// Bytes of the IP header with options or extensions; at most 511.
    pub ip_len: u16,
    /// Also fill in the IPv4 header's checksum.
    pub ipv4: bool,
    /// Whose checksum it is.
    pub l4: L4,
}

/// How a TCP frame is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TxSegments {
    /// Payload bytes per segment.
    pub mss: u16,
    /// Bytes of the TCP header with options. The pseudo header in its checksum field must not contain the length.
    pub tcp_len: u8,
}

/// A protocol that the device knows the checksum of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum L4 {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
}

impl TxOffload {
    /// True if there is nothing to do and no context descriptor is needed.
    #[inline]
    pub fn is_none(&self) -> bool {
        self.vlan.is_none() && self.checksum.is_none() && self.mss.is_none()
    }

    /// Why the device cannot do this to a frame of `len` bytes, if it cannot.
    pub fn check(&self, len: u32) -> Result<(), &'static str> {
        let Some(sum) = self.checksum else {
            return if self.mss.is_some() {
                Err("segments need the place of the headers")
            } else {
                Ok(())
            };
        };
        let headers = u32::from(sum.mac_len) + u32::from(sum.ip_len);
        if sum.mac_len < 14 || sum.mac_len > 127 || sum.ip_len < 20 || sum.ip_len > 511 {
            return Err("a header length that the context descriptor cannot hold");
        }
        if headers >= len {
            return Err("headers longer than the frame");
        }
        if let Some(cut) = self.mss
            && (sum.l4 != L4::Tcp
                || cut.mss == 0
                || cut.tcp_len < 20
                || headers + u32::from(cut.tcp_len) >= len)
        {
            return Err("segments need TCP with a payload");
        }
        Ok(())
    }

    /// The context descriptor.
    pub fn context(&self) -> [u64; 2] {
        let mut lengths = u64::from(self.vlan.unwrap_or(0)) << 16;
        let mut command = TX_CONTEXT | TX_ADVANCED;
        let mut segments = 0;
        if let Some(sum) = self.checksum {
            lengths |= u64::from(sum.mac_len) << 9 | u64::from(sum.ip_len);
            command |= u64::from(sum.ipv4) << 10
                | match sum.l4 {
                    L4::Udp => 0,
                    L4::Tcp => 0x800,
                    L4::Sctp => 0x1000,
                };
        } else {
            lengths |= 14 << 9;
        }
        if let Some(cut) = self.mss {
            segments = u64::from(cut.mss) << 16 | u64::from(cut.tcp_len) << 8;
        }
        [lengths, command | segments << 32]
    }

    /// The part of each data descriptor's second quadword that this asks for, and PAYLEN for a frame of `len` bytes.
    #[inline]
    pub fn data(&self, len: u32) -> u64 {
        if self.is_none() {
            return u64::from(len) << OLINFO_PAYLEN_SHIFT;
        }
        let mut word = OLINFO_USE_CONTEXT;
        let mut payload = len;
        if self.vlan.is_some() {
            word |= TX_VLAN;
        }
        if let Some(sum) = self.checksum {
            word |= OLINFO_L4_CHECKSUM;
            if sum.ipv4 {
                word |= OLINFO_IP_CHECKSUM;
            }
            if let Some(cut) = self.mss {
                word |= TX_SEGMENT;
                payload = len.saturating_sub(
                    u32::from(sum.mac_len) + u32::from(sum.ip_len) + u32::from(cut.tcp_len),
                );
            }
        }
        word | u64::from(payload) << OLINFO_PAYLEN_SHIFT
    }
}

/// The second quadword of a data descriptor: `len` bytes of a frame, whose offloads are `data` (from [`TxOffload::data`]).
#[inline]
pub fn tx_data(len: u32, end: bool, report: bool, data: u64) -> u64 {
    TX_DATA
        | TX_ADVANCED
        | TX_INSERT_FCS
        | u64::from(len)
        | if end { TX_END } else { 0 }
        | if report { TX_REPORT } else { 0 }
        | data
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_received_descriptor_says_what_its_bits_say() {
        let plain = RxDone(0x0064_0000_0000_0000 | 60 << 32 | 0b11);
        assert!(plain.done() && plain.end() && !plain.damaged());
        assert_eq!((plain.length(), plain.vlan()), (60, None));
        assert_eq!(plain.l4_checksum(), Checksum::Unknown);
        let tagged =
            RxDone(0x2064_0000_0000_0000 | 1514 << 32 | 0b1011 | 1 << 5 | 1 << 6 | 1 << 30);
        assert_eq!(tagged.vlan(), Some(0x2064));
        assert_eq!(tagged.l4_checksum(), Checksum::Bad);
        assert_eq!(tagged.ip_checksum(), Checksum::Good);
        assert!(!tagged.damaged());
        for error in [24, 25, 27, 28, 29] {
            assert!(RxDone(1 << error).damaged());
        }
    }

    #[test]
    fn a_plain_frame_needs_one_descriptor_with_length_end_and_checksum_of_the_frame() {
        let word = tx_data(60, true, false, TxOffload::default().data(60));
        assert_eq!(word as u32, 0x2330_003C);
        assert_eq!((word >> 32) as u32, 60 << 14);
        let report = tx_data(60, true, true, TxOffload::default().data(60));
        assert_eq!(report ^ word, 1 << 27);
    }

    #[test]
    fn a_segmented_frame_counts_its_payload_without_headers() {
        let offload = TxOffload {
            vlan: Some(0x2064),
            checksum: Some(TxChecksum {
                mac_len: 14,
                ip_len: 20,
                ipv4: true,
                l4: L4::Tcp,
            }),
            mss: Some(TxSegments {
                mss: 1460,
                tcp_len: 32,
            }),
        };
        assert_eq!(offload.check(9066), Ok(()));
        let [low, high] = offload.context();
        assert_eq!(low, 0x2064_0000 | 14 << 9 | 20);
        assert_eq!(high as u32, 0x2020_0000 | 0x400 | 0x800);
        assert_eq!((high >> 32) as u32, 1460 << 16 | 32 << 8);
        let word = tx_data(2048, false, false, offload.data(9066));
        assert_eq!(word as u32, 0xE230_0800);
        assert_eq!((word >> 32) as u32, 9000 << 14 | 0x300 | 0x80);
    }

    #[test]
    fn offloads_the_device_cannot_do_are_refused() {
        let sum = TxChecksum {
            mac_len: 14,
            ip_len: 20,
            ipv4: true,
            l4: L4::Udp,
        };
        let with = |sum, mss| TxOffload {
            vlan: None,
            checksum: sum,
            mss,
        };
        let cut = TxSegments {
            mss: 1460,
            tcp_len: 20,
        };
        assert!(with(None, Some(cut)).check(100).is_err());
        assert!(with(Some(sum), Some(cut)).check(100).is_err());
        assert!(with(Some(sum), None).check(34).is_err());
        assert!(
            with(
                Some(TxChecksum {
                    mac_len: 128,
                    ..sum
                }),
                None
            )
            .check(999)
            .is_err()
        );
        assert!(
            with(Some(TxChecksum { ip_len: 512, ..sum }), None)
                .check(999)
                .is_err()
        );
        assert!(with(Some(sum), None).check(42).is_ok());
    }
}
