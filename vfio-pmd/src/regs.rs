//! Registers of the VF (BAR0) under their datasheet names: byte offsets and bits. `q` is a queue, 0..8.

/// Control: [`CTRL_RST`].
pub const VFCTRL: u32 = 0x000;
/// Resets this VF; the device clears it.
pub const CTRL_RST: u32 = 1 << 26;
/// Status; reading it pushes posted writes to the device.
pub const VFSTATUS: u32 = 0x008;
/// Link: [`LINKS_UP`], speed in bits 29:28.
pub const VFLINKS: u32 = 0x010;
/// The port's link is up.
pub const LINKS_UP: u32 = 1 << 30;

/// Interrupt causes, one bit per vector; cleared by reading.
pub const VTEICR: u32 = 0x100;
/// Mask set: vectors whose bit is written may signal.
pub const VTEIMS: u32 = 0x108;
/// Mask clear.
pub const VTEIMC: u32 = 0x10C;
/// Causes that are cleared when their MSI-X message leaves.
pub const VTEIAC: u32 = 0x110;
/// Vectors that mask themselves when their message leaves.
pub const VTEIAM: u32 = 0x114;
/// All three vectors of a VF.
pub const VECTORS_ALL: u32 = 7;
/// Vector of a queue pair: one register per two queues, a byte for each direction.
pub const fn vtivar(q: u32) -> u32 {
    0x120 + 4 * (q / 2)
}
/// Vector of the mailbox, low byte.
pub const VTIVAR_MISC: u32 = 0x140;
/// An entry of [`vtivar`] or [`VTIVAR_MISC`] counts.
pub const IVAR_VALID: u32 = 0x80;
/// Least time between two messages of a vector, bits 11:3 in units of 2 us at 10 Gbit/s.
pub const fn vteitr(vector: u32) -> u32 {
    0x820 + 4 * vector
}

/// Mailbox memory, 16 dwords.
pub const VFMBMEM: u32 = 0x200;
/// Dwords in [`VFMBMEM`].
pub const MAILBOX_WORDS: usize = 16;
/// Mailbox control and state.
pub const VFMAILBOX: u32 = 0x2FC;
/// To the PF: a message is waiting.
pub const MAILBOX_REQ: u32 = 1 << 0;
/// To the PF: its message was read.
pub const MAILBOX_ACK: u32 = 1 << 1;
/// The VF owns the mailbox memory.
pub const MAILBOX_VFU: u32 = 1 << 2;
/// The PF owns the mailbox memory.
pub const MAILBOX_PFU: u32 = 1 << 3;
/// The PF wrote a message; cleared by reading.
pub const MAILBOX_PFSTS: u32 = 1 << 4;
/// The PF took our message; cleared by reading.
pub const MAILBOX_PFACK: u32 = 1 << 5;
/// The PF is in reset.
pub const MAILBOX_RSTI: u32 = 1 << 6;
/// The PF's reset is done; cleared by reading.
pub const MAILBOX_RSTD: u32 = 1 << 7;
/// What reading [`VFMAILBOX`] clears, and software must remember.
pub const MAILBOX_READ_TO_CLEAR: u32 = MAILBOX_PFSTS | MAILBOX_PFACK | MAILBOX_RSTD;

/// Header split and receive queues; has to be written on the 82599.
pub const VFPSRTYPE: u32 = 0x300;
/// More than one receive queue: field RQPL.
pub const PSRTYPE_RQPL_SHIFT: u32 = 29;

/// Receive descriptors: address, low half.
pub const fn vfrdbal(q: u32) -> u32 {
    0x1000 + 0x40 * q
}
/// Receive descriptors: address, high half.
pub const fn vfrdbah(q: u32) -> u32 {
    0x1004 + 0x40 * q
}
/// Receive descriptors: bytes.
pub const fn vfrdlen(q: u32) -> u32 {
    0x1008 + 0x40 * q
}
/// Cache and ordering hints for receive.
pub const fn vfdca_rxctrl(q: u32) -> u32 {
    0x100C + 0x40 * q
}
/// Relaxed ordering for descriptor reads (9), data (13) and header (15) writes; bit 12 has to be 0.
pub const DCA_RXCTRL_DEFAULT: u32 = 1 << 9 | 1 << 13 | 1 << 15;
/// The descriptor the device fills next.
pub const fn vfrdh(q: u32) -> u32 {
    0x1010 + 0x40 * q
}
/// Shape of receive buffers.
pub const fn vfsrrctl(q: u32) -> u32 {
    0x1014 + 0x40 * q
}
/// Buffer size field of [`vfsrrctl`]: KiB.
pub const SRRCTL_KIB_MASK: u32 = 0x7F;
/// Advanced descriptors, one buffer each.
pub const SRRCTL_ADV_ONE_BUFFER: u32 = 1 << 25;
/// Without free descriptors a frame is dropped, so that no other VF waits.
pub const SRRCTL_DROP_EN: u32 = 1 << 28;
/// What a reset leaves in [`vfsrrctl`] by the datasheet: 2 KiB buffers, 256-byte headers.
pub const SRRCTL_DEFAULT: u32 = 4 << 8 | 2;
/// The first descriptor the device must not use.
pub const fn vfrdt(q: u32) -> u32 {
    0x1018 + 0x40 * q
}
/// Receive queue: [`DCTL_ENABLE`], [`RXDCTL_VME`].
pub const fn vfrxdctl(q: u32) -> u32 {
    0x1028 + 0x40 * q
}
/// A queue runs (both directions).
pub const DCTL_ENABLE: u32 = 1 << 25;
/// VLAN tags are moved from the frame to its descriptor.
pub const RXDCTL_VME: u32 = 1 << 30;

/// Transmit descriptors: address, low half.
pub const fn vftdbal(q: u32) -> u32 {
    0x2000 + 0x40 * q
}
/// Transmit descriptors: address, high half.
pub const fn vftdbah(q: u32) -> u32 {
    0x2004 + 0x40 * q
}
/// Transmit descriptors: bytes.
pub const fn vftdlen(q: u32) -> u32 {
    0x2008 + 0x40 * q
}
/// Cache and ordering hints for transmit.
pub const fn vfdca_txctrl(q: u32) -> u32 {
    0x200C + 0x40 * q
}
/// Relaxed ordering for descriptor (9) and data (13) reads; relaxed write-back (11) stays off.
pub const DCA_TXCTRL_DEFAULT: u32 = 1 << 9 | 1 << 13;
/// The descriptor the device sends next.
pub const fn vftdh(q: u32) -> u32 {
    0x2010 + 0x40 * q
}
/// The first descriptor the device must not send.
pub const fn vftdt(q: u32) -> u32 {
    0x2018 + 0x40 * q
}
/// Transmit queue: thresholds and [`DCTL_ENABLE`].
pub const fn vftxdctl(q: u32) -> u32 {
    0x2028 + 0x40 * q
}
/// Throws away what the queue still holds.
pub const TXDCTL_SWFLSH: u32 = 1 << 26;
/// Prefetch 32 descriptors, no host threshold, write back at once: batched RS needs a write-back threshold of 0.
pub const TXDCTL_THRESHOLDS: u32 = 32;
/// Head write-back address, low half; survives a function-level reset, so it is written as 0.
pub const fn vftdwbal(q: u32) -> u32 {
    0x2038 + 0x40 * q
}
/// Head write-back address, high half.
pub const fn vftdwbah(q: u32) -> u32 {
    0x203C + 0x40 * q
}

/// Good frames received; 32 bits, wraps.
pub const VFGPRC: u32 = 0x101C;
/// Good bytes received, low 32 of 36 bits.
pub const VFGORC_LOW: u32 = 0x1020;
/// Good bytes received, high 4 of 36 bits.
pub const VFGORC_HIGH: u32 = 0x1024;
/// Multicast frames received; 32 bits, wraps.
pub const VFMPRC: u32 = 0x1034;
/// Good frames sent; 32 bits, wraps.
pub const VFGPTC: u32 = 0x201C;
/// Good bytes sent, low 32 of 36 bits.
pub const VFGOTC_LOW: u32 = 0x2020;
/// Good bytes sent, high 4 of 36 bits.
pub const VFGOTC_HIGH: u32 = 0x2024;

/// Queues a VF has registers for; a PF grants 2 or 4 of them.
pub const QUEUES_MAX: u32 = 8;
/// Bytes of BAR0.
pub const BAR0_LEN: u64 = 16 << 10;
