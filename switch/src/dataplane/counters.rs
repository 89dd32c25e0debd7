//! What is counted, and a name for every reason to drop a frame.
//!
//! The books of the switch: over all ports, Σ received + Σ replicated = Σ sent + Σ dropped. A frame is *received* once it
//! was taken from its queue; a flooded frame that goes to k ports adds k−1 to *replicated*; each copy is then sent or
//! dropped under one of these reasons.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

macro_rules! reasons {
    ($($(#[$doc:meta])* $variant:ident = $name:literal,)*) => {
        /// Why a frame was dropped.
        #[derive(Clone, Copy, PartialEq, Eq, Debug)]
        #[repr(u8)]
        pub enum Reason { $($(#[$doc])* $variant,)* }

        impl Reason {
            /// Every reason, in the order of their counters.
            pub const ALL: &'static [Reason] = &[$(Reason::$variant,)*];

            /// The reason's name in tables, JSON and metrics.
            pub fn name(self) -> &'static str {
                match self { $(Reason::$variant => $name,)* }
            }
        }
    };
}

reasons! {
    /// Shorter than an Ethernet header (14 bytes).
    Runt = "runt",
    /// Longer than the port's largest frame.
    Oversize = "oversize",
    /// A buffer outside the memory the sender shared.
    BadAddress = "bad_address",
    /// More pieces than a frame may have.
    TooManySegments = "too_many_segments",
    /// The source address is a group address (IEEE 802.3 §3.2.3).
    SourceMulticast = "source_multicast",
    /// The destination is one of 01:80:c2:00:00:00 to 0f, which bridges do not forward (IEEE 802.1Q §8.6.3).
    ReservedMac = "reserved_mac",
    /// The source is a station that belongs to another port, by `mac` or as a static one.
    Spoofed = "spoofed",
    /// The source is one station more than may be behind the port.
    StationLimit = "station_limit",
    /// The source was behind another port, and too many have moved in this second.
    MoveLimit = "move_limit",
    /// To be flooded, and too many were in this second.
    FloodLimit = "flood_limit",
    /// The destination is behind the port the frame came from.
    Hairpin = "hairpin",
    /// Flooded, and no other port of its bridge is there.
    NoDestination = "no_destination",
    /// The destination's port has nobody attached.
    PortDown = "port_down",
    /// The sender's memory vanished while the frame was on its way.
    SenderGone = "sender_gone",
    /// The NIC says that the frame arrived damaged, or gives it a shape no frame has.
    Damaged = "damaged",
    /// A broadcast of this bridge's own that the NIC sent back.
    Echo = "echo",
    /// The receiver had no free buffer.
    TxFull = "tx_full",
    /// Another worker held the receiver's queue for longer than a burst takes.
    TxContended = "tx_contended",
    /// The receiver's free buffers cannot hold a frame of this length.
    TxBufferSmall = "tx_buffer_small",
    /// The receiver's ring is broken or its memory vanished: the port is in quarantine.
    TxBroken = "tx_broken",
}

/// The counters of one queue, in one direction.
///
/// Threads: one writer at a time (the worker that owns the receive queue, or whoever holds the transmit queue), any
/// number of readers. Relaxed throughout: a reader may see a burst's frames before its bytes, never a torn number.
#[derive(Default)]
#[repr(align(128))]
pub struct QueueCounters {
    frames: AtomicU64,
    bytes: AtomicU64,
    replicated: AtomicU64,
    drops: [AtomicU64; Reason::ALL.len()],
}

/// Adds without a locked instruction: correct because there is one writer.
#[inline]
fn bump(counter: &AtomicU64, by: u64) {
    counter.store(counter.load(Relaxed).wrapping_add(by), Relaxed);
}

impl QueueCounters {
    /// Counts `frames` frames of `bytes` bytes (from destination address to the end of the payload, without FCS).
    #[inline]
    pub fn count(&self, frames: u64, bytes: u64) {
        bump(&self.frames, frames);
        bump(&self.bytes, bytes);
    }

    /// Counts the copies beyond the first that flooding made.
    #[inline]
    pub fn replicate(&self, copies: u64) {
        bump(&self.replicated, copies);
    }

    /// Counts `frames` frames dropped for `reason`.
    #[inline]
    pub fn count_drop(&self, reason: Reason, frames: u64) {
        bump(&self.drops[reason as usize], frames);
    }

    /// Counts drops where several workers may do so at once (nobody holds the queue).
    #[cold]
    pub fn count_drop_shared(&self, reason: Reason, frames: u64) {
        self.drops[reason as usize].fetch_add(frames, Relaxed);
    }

    /// Frames counted so far.
    pub fn frames(&self) -> u64 {
        self.frames.load(Relaxed)
    }

    /// Bytes counted so far.
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Relaxed)
    }

    /// Copies beyond the first that flooding made.
    pub fn replicated(&self) -> u64 {
        self.replicated.load(Relaxed)
    }

    /// Frames dropped for `reason` so far.
    pub fn dropped(&self, reason: Reason) -> u64 {
        self.drops[reason as usize].load(Relaxed)
    }
}

/// What a worker tells about itself, with books of its own: received + replicated = sent + dropped.
///
/// Threads: written by the worker, read by control.
#[derive(Default)]
#[repr(align(128))]
pub struct WorkerCounters {
    /// TSC cycles of the passes in which at least one frame was moved.
    pub busy_cycles: AtomicU64,
    /// TSC cycles since the worker began, asleep or awake.
    pub total_cycles: AtomicU64,
    /// Passes over the queues.
    pub passes: AtomicU64,
    /// Bursts with at least one frame.
    pub bursts: AtomicU64,
    /// Times the worker went to sleep (`idle = "adaptive"`).
    pub sleeps: AtomicU64,
    /// Passes by their length: entry `n` counts those of 2^n to 2^(n+1) - 1 TSC cycles, the last one all longer ones too.
    pub lengths: [AtomicU64; LENGTHS],
    /// Frames and bytes taken from receive queues, copies made, and frames dropped on either side.
    pub received: QueueCounters,
    /// Frames handed to receivers.
    pub sent: AtomicU64,
}

/// Classes of lengths of passes: the last one begins at 2^31 cycles, about a second.
pub const LENGTHS: usize = 32;

impl WorkerCounters {
    /// Counts a pass of so many TSC cycles; for its worker alone. Once per pass, whatever the number of frames.
    #[inline]
    pub fn count_length(&self, cycles: u64) {
        let class = (cycles | 1).ilog2() as usize;
        bump(&self.lengths[class.min(LENGTHS - 1)], 1);
    }

    /// Adds to one of the counters; for their worker alone.
    #[inline]
    pub fn add(counter: &AtomicU64, by: u64) {
        bump(counter, by);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_has_a_counter_and_a_name_of_its_own() {
        let counters = QueueCounters::default();
        let mut names = std::collections::HashSet::new();
        for (index, reason) in Reason::ALL.iter().enumerate() {
            assert_eq!(*reason as usize, index);
            assert!(names.insert(reason.name()), "{} twice", reason.name());
            counters.count_drop(*reason, index as u64 + 1);
            assert_eq!(counters.dropped(*reason), index as u64 + 1);
        }
    }
}
