//! What the model saw: drops by reason, DMA faults, things no driver should do, and the mailbox's conversation.

use std::fmt;

use crate::dma::DmaFault;

/// Entries of each list that are kept; what comes later is only counted.
const KEPT: usize = 512;

/// Frames that did not reach a VF or did not leave it, by reason.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Drops {
    /// Receive: too few free descriptors.
    pub no_descriptors: u64,
    /// Receive: the queue that RSS chose is off or stopped.
    pub queue_off: u64,
    /// Receive: the PF has closed the VF's receive path.
    pub receive_closed: u64,
    /// Receive: longer than the port allows.
    pub too_long: u64,
    /// Transmit: the PF has closed the VF's transmit path, or the link is down.
    pub transmit_closed: u64,
    /// Transmit: a source address that is not the VF's.
    pub spoofed: u64,
    /// Transmit: a tag beside a port VLAN, or one the VF may not use.
    pub vlan_refused: u64,
    /// Transmit: headers that are not where the context says, or a frame too short to switch.
    pub malformed: u64,
    /// Transmit: the wire's other end does not keep up or is gone.
    pub wire: u64,
}

/// An access to memory that was not mapped. The queue stands still since then.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Transmit, else receive.
    pub transmits: bool,
    /// The queue.
    pub queue: usize,
    /// Where, how much and in which direction.
    pub access: DmaFault,
}

/// What a driver does against the device's rules. The device does something with it; a correct driver never sees what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Misuse {
    /// A tail other than 0 was written while the queue was off: such descriptors are lost.
    TailOfDisabledQueue {
        /// Transmit, else receive.
        transmits: bool,
        /// The queue.
        queue: usize,
    },
    /// Base not on 128 bytes, or a length that is 0 or no multiple of 8 descriptors.
    RingLayout {
        /// Transmit, else receive.
        transmits: bool,
        /// The queue.
        queue: usize,
    },
    /// SRRCTL does not say "advanced, one buffer".
    BufferType {
        /// The queue.
        queue: usize,
    },
    /// Head or tail outside the ring.
    RingIndices {
        /// Transmit, else receive.
        transmits: bool,
        /// The queue.
        queue: usize,
        /// RDH or TDH.
        head: u32,
        /// RDT or TDT.
        tail: u32,
        /// Descriptors in the ring.
        size: u32,
    },
    /// A transmit descriptor that is neither advanced data nor a context.
    DescriptorType {
        /// The queue.
        queue: usize,
        /// Its second word.
        word: u64,
    },
    /// More data descriptors in a frame than the device takes.
    ChainTooLong {
        /// The queue.
        queue: usize,
    },
    /// PAYLEN is not the frame's length.
    PayloadLength {
        /// The queue.
        queue: usize,
        /// What the descriptor says.
        said: u32,
        /// What the buffers hold.
        found: u32,
    },
    /// Receive buffers of 0 bytes.
    NoBuffer {
        /// The queue.
        queue: usize,
    },
    /// A register access that is not 32 bits at a multiple of 4.
    RegisterAccess {
        /// Where.
        offset: u32,
        /// Bytes.
        len: u32,
    },
    /// An unmapping of what was not mapped like that.
    Unmap {
        /// From where.
        iova: u64,
        /// Bytes.
        len: u64,
    },
    /// A mapping that could not be had.
    Map {
        /// From where.
        iova: u64,
        /// Bytes.
        len: u64,
    },
}

/// A request and what the PF said to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exchange {
    /// The request's words, as many as its type has.
    pub request: Vec<u32>,
    /// The answer's.
    pub answer: Vec<u32>,
}

impl fmt::Display for Exchange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let line = |words: &[u32]| {
            let words: Vec<String> = words.iter().map(|word| format!("{word:08x}")).collect();
            words.join(" ")
        };
        write!(f, "{} -> {}", line(&self.request), line(&self.answer))
    }
}

/// What was seen of one VF.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// DMA faults, the first of them.
    pub faults: Vec<Fault>,
    /// Misuses, the first of them.
    pub misuses: Vec<Misuse>,
    /// The mailbox's conversation since the start, or since [`crate::Nic::take_conversation`].
    pub conversation: Vec<Exchange>,
    /// Resets of the function.
    pub resets: u64,
}

impl Report {
    pub(crate) fn fault(&mut self, fault: Fault) {
        log::warn!("DMA fault: {fault:x?}");
        keep(&mut self.faults, fault);
    }

    pub(crate) fn misuse(&mut self, misuse: Misuse) {
        log::warn!("misuse: {misuse:x?}");
        keep(&mut self.misuses, misuse);
    }

    pub(crate) fn exchange(&mut self, exchange: Exchange) {
        log::debug!("mailbox: {exchange}");
        keep(&mut self.conversation, exchange);
    }
}

fn keep<T>(list: &mut Vec<T>, entry: T) {
    if list.len() < KEPT {
        list.push(entry);
    }
}
