//! Registers of the VF as the device sees them: offsets in BAR0 and their bits.
//!
//! Written from the device's description and not shared with the driver on purpose: a wrong number in one of the two shows when they
//! meet.

/// BAR0 in bytes.
pub const BAR0_LEN: u32 = 0x4000;
/// Queues whose registers exist, whatever the PF grants.
pub const QUEUES: usize = 8;
/// MSI-X vectors.
pub const VECTORS: usize = 3;

pub(crate) const CTRL: u32 = 0x000;
pub(crate) const CTRL_RST: u32 = 1 << 26;
pub(crate) const STATUS: u32 = 0x008;
pub(crate) const LINKS: u32 = 0x010;
/// Link up at 10 Gbit/s.
pub(crate) const LINKS_UP_10G: u32 = 0x7000_0000;
pub(crate) const FRTIMER: u32 = 0x048;

pub(crate) const EICR: u32 = 0x100;
pub(crate) const EICS: u32 = 0x104;
pub(crate) const EIMS: u32 = 0x108;
pub(crate) const EIMC: u32 = 0x10c;
pub(crate) const EIAC: u32 = 0x110;
pub(crate) const EIAM: u32 = 0x114;
pub(crate) const IVAR: u32 = 0x120;
pub(crate) const IVAR_MISC: u32 = 0x140;
/// An IVAR byte that is in use; the low bits are the vector.
pub(crate) const IVAR_VALID: u8 = 0x80;

pub(crate) const MBMEM: u32 = 0x200;
pub(crate) const MAILBOX: u32 = 0x2fc;
/// Words in the mailbox.
pub(crate) const MAILBOX_WORDS: usize = 16;

pub(crate) const PSRTYPE: u32 = 0x300;
/// PSRTYPE.RQPL: how many bits of the RSS output choose the queue.
pub(crate) const PSRTYPE_RQPL: u32 = 29;

/// Distance between the registers of two queues.
pub(crate) const QUEUE_STRIDE: u32 = 0x40;
/// First register of receive queue 0, and of transmit queue 0.
pub(crate) const RX: u32 = 0x1000;
pub(crate) const TX: u32 = 0x2000;
// Within a queue, both directions:
pub(crate) const BAL: u32 = 0x00;
pub(crate) const BAH: u32 = 0x04;
pub(crate) const LEN: u32 = 0x08;
pub(crate) const DCA: u32 = 0x0c;
pub(crate) const HEAD: u32 = 0x10;
pub(crate) const TAIL: u32 = 0x18;
pub(crate) const DCTL: u32 = 0x28;
pub(crate) const DCTL_ENABLE: u32 = 1 << 25;
// Receive only:
pub(crate) const SRRCTL: u32 = 0x14;
/// Buffer size in KiB.
pub(crate) const SRRCTL_BSIZE: u32 = 0x7f;
pub(crate) const SRRCTL_TYPE: u32 = 7 << 25;
pub(crate) const SRRCTL_ONE_BUFFER: u32 = 1 << 25;
pub(crate) const RXDCTL_VME: u32 = 1 << 30;
// Transmit only:
pub(crate) const TXDCTL_SWFLSH: u32 = 1 << 26;
/// Head write-back: address low (bit 0 enables) and high.
pub(crate) const TDWBAL: u32 = 0x38;
pub(crate) const TDWBAH: u32 = 0x3c;

// Statistics: of queue 0's registers, but of the whole VF.
pub(crate) const GPRC: u32 = 0x101c;
pub(crate) const GORC_LO: u32 = 0x1020;
pub(crate) const GORC_HI: u32 = 0x1024;
pub(crate) const MPRC: u32 = 0x1034;
pub(crate) const GPTC: u32 = 0x201c;
pub(crate) const GOTC_LO: u32 = 0x2020;
pub(crate) const GOTC_HI: u32 = 0x2024;

/// Bits of VFMAILBOX.
pub(crate) mod mailbox {
    pub(crate) const REQ: u32 = 1 << 0;
    pub(crate) const ACK: u32 = 1 << 1;
    pub(crate) const VFU: u32 = 1 << 2;
    pub(crate) const PFU: u32 = 1 << 3;
    pub(crate) const PFSTS: u32 = 1 << 4;
    pub(crate) const PFACK: u32 = 1 << 5;
    pub(crate) const RSTI: u32 = 1 << 6;
    pub(crate) const RSTD: u32 = 1 << 7;
}

/// The queue and the register within it that an offset means: (transmits, queue, register).
pub(crate) fn queue_register(offset: u32) -> Option<(bool, usize, u32)> {
    let block = QUEUE_STRIDE * QUEUES as u32;
    let (transmits, from) = match offset {
        o if (RX..RX + block).contains(&o) => (false, o - RX),
        o if (TX..TX + block).contains(&o) => (true, o - TX),
        _ => return None,
    };
    Some((
        transmits,
        (from / QUEUE_STRIDE) as usize,
        from % QUEUE_STRIDE,
    ))
}

/// What a reset leaves as it was: a driver that does not write these itself runs with its predecessor's values.
pub(crate) fn survives_reset(offset: u32) -> bool {
    if offset == PSRTYPE {
        return true;
    }
    match queue_register(offset) {
        Some((false, _, register)) => matches!(register, HEAD | TAIL | SRRCTL | DCTL | DCA),
        Some((true, _, register)) => matches!(register, HEAD | TAIL | DCTL | TDWBAL | TDWBAH | DCA),
        None => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_queue_register_is_found_in_its_block() {
        assert_eq!(queue_register(0x1018), Some((false, 0, TAIL)));
        assert_eq!(queue_register(0x20a8), Some((true, 2, DCTL)));
        assert_eq!(queue_register(0x1200), None);
        assert_eq!(queue_register(0x0ffc), None);
    }

    #[test]
    fn ring_addresses_do_not_survive_a_reset_but_tails_do() {
        assert!(!survives_reset(0x1000) && !survives_reset(0x2008));
        assert!(survives_reset(0x1018) && survives_reset(0x2038 + 0x40));
    }
}
