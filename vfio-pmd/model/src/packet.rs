//! What the device understands of a frame: where its headers are, whether its checksums hold, how to cut it.

/// Internet checksum arithmetic: the sum of 16-bit words, not yet folded.
pub(crate) fn sum(bytes: &[u8]) -> u64 {
    let (words, rest) = bytes.as_chunks::<2>();
    let whole: u64 = words
        .iter()
        .map(|word| u64::from(u16::from_be_bytes(*word)))
        .sum();
    whole + rest.first().map_or(0, |last| u64::from(*last) << 8)
}

/// Folds a sum to 16 bits.
pub(crate) fn fold(mut sum: u64) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

pub(crate) fn be16(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes([*bytes.get(at)?, *bytes.get(at + 1)?]))
}

pub(crate) fn put16(bytes: &mut [u8], at: usize, value: u16) -> Option<()> {
    bytes
        .get_mut(at..at + 2)?
        .copy_from_slice(&value.to_be_bytes());
    Some(())
}

/// What a frame carries.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Parsed {
    /// 4 or 6; 0 for neither.
    pub(crate) ip: u8,
    /// Where the IP header starts.
    pub(crate) l3: usize,
    /// Where the layer 4 header starts, unless this is a later fragment.
    pub(crate) l4: Option<usize>,
    /// 6, 17, 132 or something the device does not look into.
    pub(crate) protocol: u8,
    /// Where the IP packet ends: Ethernet may have padded the frame.
    pub(crate) end: usize,
    /// One of several fragments.
    pub(crate) fragment: bool,
}

/// Looks into a frame; everything about it is taken from its own claims, checked against its length.
pub(crate) fn parse(frame: &[u8]) -> Parsed {
    parse_checked(frame).unwrap_or_default()
}

fn parse_checked(frame: &[u8]) -> Option<Parsed> {
    let (mut kind, mut l3) = (be16(frame, 12)?, 14);
    if kind == 0x8100 {
        (kind, l3) = (be16(frame, 16)?, 18);
    }
    match kind {
        0x0800 => {
            let first = *frame.get(l3)?;
            let header = usize::from(first & 15) * 4;
            let total = usize::from(be16(frame, l3 + 2)?);
            if first >> 4 != 4 || header < 20 || total < header || l3 + total > frame.len() {
                return None;
            }
            let place = be16(frame, l3 + 6)?;
            Some(Parsed {
                ip: 4,
                l3,
                l4: (place & 0x1fff == 0).then_some(l3 + header),
                protocol: frame[l3 + 9],
                end: l3 + total,
                fragment: place & 0x3fff != 0,
            })
        }
        0x86dd => {
            let payload = usize::from(be16(frame, l3 + 4)?);
            let end = l3 + 40 + payload;
            (end <= frame.len()).then_some(Parsed {
                ip: 6,
                l3,
                l4: Some(l3 + 40),
                protocol: *frame.get(l3 + 6)?,
                end,
                fragment: false,
            })
        }
        _ => None,
    }
}

impl Parsed {
    /// Source and destination address.
    fn addresses<'a>(&self, frame: &'a [u8]) -> &'a [u8] {
        match self.ip {
            4 => &frame[self.l3 + 12..self.l3 + 20],
            _ => &frame[self.l3 + 8..self.l3 + 40],
        }
    }

    /// The IP header's checksum holds; none where there is no such thing.
    pub(crate) fn ip_checksum_good(&self, frame: &[u8]) -> Option<bool> {
        let header = usize::from(frame.get(self.l3)? & 15) * 4;
        (self.ip == 4).then(|| fold(sum(&frame[self.l3..self.l3 + header])) == 0xffff)
    }

    /// The TCP or UDP checksum holds; none where the device does not check.
    pub(crate) fn l4_checksum_good(&self, frame: &[u8]) -> Option<bool> {
        let l4 = self.l4?;
        let minimum = match self.protocol {
            6 => 20,
            17 => 8,
            _ => return None,
        };
        if self.fragment
            || l4 + minimum > self.end
            || (self.protocol == 17 && be16(frame, l4 + 6)? == 0)
        {
            return None;
        }
        let length = (self.end - l4) as u64;
        let pseudo = sum(self.addresses(frame)) + u64::from(self.protocol) + length;
        Some(fold(pseudo + sum(&frame[l4..self.end])) == 0xffff)
    }

    /// RSS type and hash, as the receive descriptor carries them; type 0 for what is not hashed.
    pub(crate) fn rss(&self, frame: &[u8]) -> (u32, u32) {
        if self.ip == 0 {
            return (0, 0);
        }
        let mut input = [0; 36];
        let addresses = self.addresses(frame);
        input[..addresses.len()].copy_from_slice(addresses);
        let mut used = addresses.len();
        let ports = self.l4.filter(|_| self.protocol == 6 && !self.fragment);
        if let Some(ports) = ports.and_then(|l4| frame.get(l4..l4 + 4)) {
            input[used..used + 4].copy_from_slice(ports);
            used += 4;
        }
        // Linux's PF hashes TCP by ports, everything else by addresses.
        let kind = match (self.ip, used > addresses.len()) {
            (4, true) => 1,
            (4, false) => 2,
            (_, true) => 3,
            (_, false) => 5,
        };
        (kind, crate::rss::toeplitz(&input[..used]))
    }

    /// The packet type of the receive descriptor.
    pub(crate) fn packet_type(&self) -> u32 {
        let ip = match self.ip {
            4 => 0x10,
            6 => 0x40,
            _ => return 0,
        };
        let l4 = match (self.l4, self.protocol) {
            (None, _) => 0,
            (_, 6) => 0x100,
            (_, 17) => 0x200,
            (_, 132) => 0x400,
            _ => 0,
        };
        ip | l4
    }
}

/// What the driver asked to be done to a frame before it leaves: the context descriptor and the data descriptor's options.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Offload {
    pub(crate) ip_checksum: bool,
    pub(crate) l4_checksum: bool,
    pub(crate) segment: bool,
    pub(crate) vlan: Option<u16>,
    pub(crate) context: Context,
}

/// A transmit context.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Context {
    pub(crate) vlan: u16,
    pub(crate) mac_len: usize,
    pub(crate) ip_len: usize,
    pub(crate) l4_len: usize,
    pub(crate) mss: usize,
    pub(crate) ipv4: bool,
    /// 6, 17 or 132.
    pub(crate) protocol: u8,
}

/// Hands every frame that leaves the wire side to `each`; none if the headers are not where the driver said.
pub(crate) fn finish(
    frame: &mut Vec<u8>,
    offload: &Offload,
    mut each: impl FnMut(&mut Vec<u8>),
) -> Option<()> {
    if offload.segment {
        segment(frame, offload, each)
    } else {
        if offload.ip_checksum {
            ip_checksum(frame, offload)?;
        }
        if offload.l4_checksum {
            l4_checksum(frame, offload, 0)?;
        }
        insert_tag(frame, offload);
        each(frame);
        Some(())
    }
}

fn insert_tag(frame: &mut Vec<u8>, offload: &Offload) {
    if let Some(tag) = offload.vlan {
        let [high, low] = tag.to_be_bytes();
        let at = 12.min(frame.len());
        frame.splice(at..at, [0x81, 0x00, high, low]);
    }
}

fn ip_checksum(frame: &mut [u8], offload: &Offload) -> Option<()> {
    let at = offload.context.mac_len;
    put16(frame, at + 10, 0)?;
    let total = !fold(sum(frame.get(at..at + offload.context.ip_len)?));
    put16(frame, at + 10, total)
}

/// Finishes the checksum that the driver has begun with the pseudo header's sum; `length` is what of it the driver could not know.
fn l4_checksum(frame: &mut [u8], offload: &Offload, length: usize) -> Option<()> {
    let l4 = offload.context.mac_len + offload.context.ip_len;
    let body = frame.get(l4..)?;
    match offload.context.protocol {
        132 => {
            let at = l4 + 8;
            frame.get_mut(at..at + 4)?.fill(0);
            let crc = crc32c(&frame[l4..]);
            frame[at..at + 4].copy_from_slice(&crc.to_le_bytes());
            Some(())
        }
        protocol => {
            let total = !fold(sum(body) + length as u64);
            let (at, total) = match protocol {
                6 => (16, total),
                // Zero means "no checksum" in UDP.
                _ => (6, if total == 0 { 0xffff } else { total }),
            };
            put16(frame, l4 + at, total)
        }
    }
}

/// Cuts a large TCP or UDP frame into frames of `mss` bytes of payload.
fn segment(whole: &[u8], offload: &Offload, mut each: impl FnMut(&mut Vec<u8>)) -> Option<()> {
    let Context {
        mac_len,
        ip_len,
        l4_len,
        mss,
        ipv4,
        protocol,
        ..
    } = offload.context;
    let (l4, headers) = (mac_len + ip_len, mac_len + ip_len + l4_len);
    let minimum = if protocol == 6 { 20 } else { 8 };
    if mss == 0 || l4_len < minimum || ip_len < 20 || mac_len < 14 || headers > whole.len() {
        return None;
    }
    let pieces = whole[headers..].chunks(mss);
    let last = pieces.len().saturating_sub(1);
    let first_id = be16(whole, mac_len + 4)?;
    let sequence = u32::from_be_bytes(whole.get(l4 + 4..l4 + 8)?.try_into().ok()?);
    let mut frame = Vec::with_capacity(headers + mss + 4);
    for (at, piece) in pieces.enumerate() {
        frame.clear();
        frame.extend_from_slice(&whole[..headers]);
        frame.extend_from_slice(piece);
        let l3_len = (frame.len() - mac_len) as u16;
        if ipv4 {
            put16(&mut frame, mac_len + 2, l3_len)?;
            put16(&mut frame, mac_len + 4, first_id.wrapping_add(at as u16))?;
            ip_checksum(&mut frame, offload)?;
        } else {
            put16(&mut frame, mac_len + 4, l3_len - 40)?;
        }
        let l4_total = frame.len() - l4;
        if protocol == 6 {
            let here = sequence.wrapping_add((at * mss) as u32);
            frame[l4 + 4..l4 + 8].copy_from_slice(&here.to_be_bytes());
            // FIN and PSH belong to the last segment, CWR to the first.
            frame[l4 + 13] &= if at == last { 0xff } else { !0x09 };
            frame[l4 + 13] &= if at == 0 { 0xff } else { !0x80 };
        } else {
            put16(&mut frame, l4 + 4, l4_total as u16)?;
        }
        l4_checksum(&mut frame, offload, l4_total)?;
        insert_tag(&mut frame, offload);
        each(&mut frame);
    }
    Some(())
}

fn crc32c(bytes: &[u8]) -> u32 {
    let mut crc = u32::MAX;
    for byte in bytes {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = crc >> 1 ^ if crc & 1 == 1 { 0x82f6_3b78 } else { 0 };
        }
    }
    !crc
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Ethernet, IPv4, TCP with that much payload; checksums as a driver leaves them for the device.
    fn tcp(payload: usize, length_in_seed: bool) -> (Vec<u8>, Offload) {
        let mut frame = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 8, 0];
        let total = (40 + payload) as u16;
        frame.extend([
            0x45,
            0,
            (total >> 8) as u8,
            total as u8,
            0x12,
            0xff,
            0x40,
            0,
            64,
            6,
            0,
            0,
        ]);
        frame.extend([10, 0, 0, 1, 10, 0, 0, 2]);
        let length = if length_in_seed {
            20 + payload as u64
        } else {
            0
        };
        let seed = fold(sum(&[10, 0, 0, 1, 10, 0, 0, 2]) + 6 + length);
        frame.extend([
            0, 80, 1, 0, 0xff, 0xff, 0xff, 0x00, 0, 0, 0, 0, 0x50, 0x99, 1, 0,
        ]);
        frame.extend([(seed >> 8) as u8, seed as u8, 0, 0]);
        frame.extend((0..payload).map(|n| n as u8));
        let context = Context {
            mac_len: 14,
            ip_len: 20,
            l4_len: 20,
            mss: 1000,
            ipv4: true,
            protocol: 6,
            vlan: 0,
        };
        let offload = Offload {
            ip_checksum: true,
            l4_checksum: true,
            context,
            ..Offload::default()
        };
        (frame, offload)
    }

    #[test]
    fn a_begun_checksum_is_finished_and_then_holds() {
        let (mut frame, offload) = tcp(5, true);
        finish(&mut frame, &offload, |frame| {
            let parsed = parse(frame);
            assert_eq!(parsed.ip_checksum_good(frame), Some(true));
            assert_eq!(parsed.l4_checksum_good(frame), Some(true));
            frame[60 - 6] ^= 1;
            assert_eq!(parsed.l4_checksum_good(frame), Some(false));
        })
        .unwrap();
    }

    #[test]
    fn a_large_frame_is_cut_and_every_piece_is_right() {
        let (mut frame, mut offload) = tcp(2500, false);
        offload.segment = true;
        offload.vlan = Some(7);
        let mut pieces = Vec::new();
        finish(&mut frame, &offload, |frame| pieces.push(frame.clone())).unwrap();
        assert_eq!(
            pieces.iter().map(Vec::len).collect::<Vec<_>>(),
            [1058, 1058, 558]
        );
        let mut payload = Vec::new();
        for (at, piece) in pieces.iter().enumerate() {
            let parsed = parse(piece);
            assert_eq!((parsed.l3, parsed.end), (18, piece.len()));
            assert_eq!(parsed.ip_checksum_good(piece), Some(true), "{at}");
            assert_eq!(parsed.l4_checksum_good(piece), Some(true), "{at}");
            assert_eq!(be16(piece, 18 + 4), Some(0x12ff + at as u16));
            let sequence = u32::from_be_bytes(piece[42..46].try_into().unwrap());
            assert_eq!(sequence, 0xffff_ff00u32.wrapping_add(1000 * at as u32));
            assert_eq!(
                piece[51],
                [0x90, 0x10, 0x19][at],
                "CWR first, FIN and PSH last"
            );
            payload.extend_from_slice(&piece[58..]);
        }
        assert_eq!(payload, frame[54..]);
    }

    #[test]
    fn contexts_that_point_outside_the_frame_do_nothing() {
        let (frame, offload) = tcp(100, true);
        for context in [
            Context {
                ip_len: 500,
                ..offload.context
            },
            Context {
                mac_len: 127,
                ip_len: 511,
                ..offload.context
            },
            Context {
                mss: 0,
                ..offload.context
            },
            Context {
                l4_len: 0,
                ..offload.context
            },
        ] {
            let broken = Offload {
                context,
                segment: true,
                ..offload
            };
            assert_eq!(
                finish(&mut frame.clone(), &broken, |_| ()),
                None,
                "{context:?}"
            );
        }
    }

    #[test]
    fn sctp_ends_in_its_crc() {
        // The check value of CRC-32C.
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
    }

    proptest::proptest! {
        #[test]
        fn looks_into_any_bytes_without_falling(bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..200), kind in 0usize..4) {
            let mut frame = bytes;
            if frame.len() > 18 {
                frame[12..14].copy_from_slice(&[[8, 0], [0x86, 0xdd], [0x81, 0], [0, 0]][kind]);
                frame[14] = 0x45;
            }
            let parsed = parse(&frame);
            let _ = (parsed.ip_checksum_good(&frame), parsed.l4_checksum_good(&frame), parsed.rss(&frame), parsed.packet_type());
            let offload = Offload { l4_checksum: true, ip_checksum: true, segment: kind == 0, ..tcp(1, true).1 };
            let _ = finish(&mut frame, &offload, |_| ());
        }
    }
}
