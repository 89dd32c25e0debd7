//! One VF: its registers, rings, mailbox, interrupts and memory.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use crate::dma::Dma;
use crate::inject::Injected;
use crate::interrupts::Interrupts;
use crate::mailbox::{Mailbox, Raised};
use crate::packet::Context;
use crate::regs::*;
use crate::report::{Drops, Fault, Misuse, Report};

/// Tail registers, written by the driver without any lock; by direction, 1 transmits.
#[derive(Default)]
pub(crate) struct Bells {
    tails: [[Bell; QUEUES]; 2],
    /// The queue's switch is on: only then a tail goes straight to its bell.
    enabled: [[AtomicBool; QUEUES]; 2],
}

/// On a line of its own: the tail next to it is written by another thread.
#[derive(Default)]
#[repr(align(64))]
struct Bell(AtomicU32);

impl Bells {
    pub(crate) fn tail(&self, transmits: bool, queue: usize) -> &AtomicU32 {
        &self.tails[usize::from(transmits)][queue].0
    }

    pub(crate) fn enabled(&self, transmits: bool, queue: usize) -> &AtomicBool {
        &self.enabled[usize::from(transmits)][queue]
    }

    pub(crate) fn all(&self) -> impl Iterator<Item = &AtomicU32> {
        self.tails.iter().flatten().map(|bell| &bell.0)
    }
}

/// What the device counts; the registers show it modulo their width.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Frames received.
    pub rx_frames: u64,
    /// Bytes received, without FCS.
    pub rx_bytes: u64,
    /// Multicast frames received.
    pub rx_multicast: u64,
    /// Frames sent.
    pub tx_frames: u64,
    /// Bytes sent, without FCS.
    pub tx_bytes: u64,
}

/// A transmit queue's state that no register shows.
#[derive(Clone, Copy, Default)]
pub(crate) struct TxState {
    pub(crate) contexts: [Context; 2],
}

pub(crate) struct Vf {
    file: Box<[u32]>,
    pub(crate) bells: Arc<Bells>,
    pub(crate) mailbox: Mailbox,
    pub(crate) interrupts: Interrupts,
    pub(crate) dma: Dma,
    pub(crate) tx: [TxState; QUEUES],
    /// Queues that met a fault: they stand still until they are enabled again.
    pub(crate) stopped: [[bool; QUEUES]; 2],
    pub(crate) counters: Counters,
    pub(crate) drops: Drops,
    pub(crate) injected: Injected,
    pub(crate) report: Report,
}

/// What a register write asks of the world outside the VF.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Asked {
    Nothing,
    /// The function was reset.
    Reset,
    /// The PF is told something about the mailbox.
    Mailbox(Raised),
    /// This transmit queue has descriptors.
    Transmit(usize),
}

impl Vf {
    pub(crate) fn new() -> Self {
        Self {
            file: vec![0; (BAR0_LEN / 4) as usize].into(),
            bells: Arc::default(),
            mailbox: Mailbox::default(),
            interrupts: Interrupts::default(),
            dma: Dma::default(),
            tx: Default::default(),
            stopped: Default::default(),
            counters: Counters::default(),
            drops: Drops::default(),
            injected: Injected::default(),
            report: Report::default(),
        }
    }

    /// A plain register.
    pub(crate) fn get(&self, offset: u32) -> u32 {
        self.file.get((offset / 4) as usize).copied().unwrap_or(0)
    }

    pub(crate) fn set(&mut self, offset: u32, value: u32) {
        if let Some(slot) = self.file.get_mut((offset / 4) as usize) {
            *slot = value;
        }
    }

    pub(crate) fn read(&mut self, offset: u32, now: Duration, link: bool) -> u32 {
        if self.injected.removed {
            return u32::MAX;
        }
        if let Some((transmits, queue, register)) = queue_register(offset)
            && register == TAIL
        {
            return self.bells.tail(transmits, queue).load(Ordering::Relaxed);
        }
        let wide = |count: u64| (count as u32, (count >> 32) as u32 & 0xf);
        match offset {
            LINKS => {
                if link {
                    LINKS_UP_10G
                } else {
                    0
                }
            }
            FRTIMER => now.as_micros() as u32,
            EICR => self.interrupts.take_causes(),
            EIMS => self.interrupts.enabled(),
            CTRL | STATUS | EICS | EIMC => 0,
            MAILBOX => self.mailbox.read(),
            o if (MBMEM..MBMEM + 4 * MAILBOX_WORDS as u32).contains(&o) => {
                self.mailbox.memory[((o - MBMEM) / 4) as usize]
            }
            GPRC => self.counters.rx_frames as u32,
            MPRC => self.counters.rx_multicast as u32,
            GPTC => self.counters.tx_frames as u32,
            GORC_LO => wide(self.counters.rx_bytes).0,
            GORC_HI => wide(self.counters.rx_bytes).1,
            GOTC_LO => wide(self.counters.tx_bytes).0,
            GOTC_HI => wide(self.counters.tx_bytes).1,
            _ => self.get(offset),
        }
    }

    pub(crate) fn write(&mut self, offset: u32, value: u32) -> Asked {
        if self.injected.removed {
            return Asked::Nothing;
        }
        if let Some((transmits, queue, register)) = queue_register(offset) {
            return self.write_queue(offset, transmits, queue, register, value);
        }
        match offset {
            CTRL if value & CTRL_RST != 0 => return Asked::Reset,
            EICR => self.interrupts.clear_causes(value),
            EICS => self.interrupts.raise(value),
            EIMS => self.interrupts.enable(value),
            EIMC => self.interrupts.disable(value),
            EIAC => self.interrupts.auto_clear = value,
            EIAM => self.interrupts.auto_mask = value,
            MAILBOX => return Asked::Mailbox(self.mailbox.write(value)),
            o if (MBMEM..MBMEM + 4 * MAILBOX_WORDS as u32).contains(&o) => {
                self.mailbox.memory[((o - MBMEM) / 4) as usize] = value;
            }
            o => self.set(o, value),
        }
        // Interrupt masks read back what was written.
        if matches!(offset, EIAC | EIAM) {
            self.set(offset, value);
        }
        Asked::Nothing
    }

    fn write_queue(
        &mut self,
        offset: u32,
        transmits: bool,
        queue: usize,
        register: u32,
        value: u32,
    ) -> Asked {
        let direction = usize::from(transmits);
        match register {
            TAIL => {
                self.bells
                    .tail(transmits, queue)
                    .store(value, Ordering::Release);
                let enabled = self.enabled(transmits, queue);
                if !enabled && value != 0 {
                    self.report
                        .misuse(Misuse::TailOfDisabledQueue { transmits, queue });
                }
                if transmits && enabled {
                    return Asked::Transmit(queue);
                }
            }
            DCTL => {
                let on = value & DCTL_ENABLE != 0;
                let was = self.enabled(transmits, queue);
                let flush = if transmits { TXDCTL_SWFLSH } else { 0 };
                self.set(offset, value & !flush);
                self.bells
                    .enabled(transmits, queue)
                    .store(on, Ordering::Relaxed);
                if on && !was {
                    self.stopped[direction][queue] = false;
                    self.check_ring(transmits, queue);
                }
            }
            _ => self.set(offset, value),
        }
        Asked::Nothing
    }

    /// The queue's switch is on, and nothing has stopped it.
    pub(crate) fn runs(&self, transmits: bool, queue: usize) -> bool {
        self.enabled(transmits, queue) && !self.stopped[usize::from(transmits)][queue]
    }

    pub(crate) fn enabled(&self, transmits: bool, queue: usize) -> bool {
        self.get(queue_base(transmits, queue) + DCTL) & DCTL_ENABLE != 0
    }

    /// What a driver must have set before it enables a queue.
    fn check_ring(&mut self, transmits: bool, queue: usize) {
        let base = queue_base(transmits, queue);
        let (len, low) = (self.get(base + LEN), self.get(base + BAL));
        if len == 0 || !len.is_multiple_of(128) || !low.is_multiple_of(128) {
            self.report.misuse(Misuse::RingLayout { transmits, queue });
        }
        if !transmits && self.get(base + SRRCTL) & SRRCTL_TYPE != SRRCTL_ONE_BUFFER {
            self.report.misuse(Misuse::BufferType { queue });
        }
    }

    /// The ring's address, its descriptors, its head and its tail; stops the queue if that makes no sense.
    pub(crate) fn ring(&mut self, transmits: bool, queue: usize) -> Option<Ring> {
        let base = queue_base(transmits, queue);
        let ring = Ring {
            at: u64::from(self.get(base + BAH)) << 32 | u64::from(self.get(base + BAL) & !127),
            size: self.get(base + LEN) / 16,
            head: self.get(base + HEAD),
            tail: self.bells.tail(transmits, queue).load(Ordering::Acquire),
        };
        if ring.size == 0 || ring.head >= ring.size || ring.tail >= ring.size {
            self.stopped[usize::from(transmits)][queue] = true;
            self.report.misuse(Misuse::RingIndices {
                transmits,
                queue,
                head: ring.head,
                tail: ring.tail,
                size: ring.size,
            });
            return None;
        }
        Some(ring)
    }

    /// The queue met memory it may not reach: it stands still, and the fault is kept.
    pub(crate) fn fault(&mut self, transmits: bool, queue: usize, fault: crate::DmaFault) {
        self.stopped[usize::from(transmits)][queue] = true;
        self.report.fault(Fault {
            transmits,
            queue,
            access: fault,
        });
    }

    /// Raises the interrupt that the IVAR registers give to this queue and direction.
    pub(crate) fn interrupt_queue(&mut self, transmits: bool, queue: usize) {
        let register = self.get(IVAR + 4 * (queue as u32 / 2));
        let shift = 16 * (queue as u32 & 1) + 8 * u32::from(transmits);
        self.interrupt((register >> shift) as u8);
    }

    /// Raises the mailbox's interrupt.
    pub(crate) fn interrupt_mailbox(&mut self) {
        self.interrupt(self.get(IVAR_MISC) as u8);
    }

    fn interrupt(&mut self, entry: u8) {
        if entry & IVAR_VALID != 0 {
            self.interrupts.raise(1 << (entry & 0x1f));
        }
    }

    /// Function-level or software reset: most registers return to 0, some keep what they had.
    pub(crate) fn reset(&mut self) {
        for at in 0..self.file.len() {
            let offset = at as u32 * 4;
            if !survives_reset(offset) {
                self.file[at] = 0;
            } else if let Some((_, _, DCTL)) = queue_register(offset) {
                self.file[at] &= !DCTL_ENABLE;
            }
        }
        for switch in self.bells.enabled.iter().flatten() {
            switch.store(false, Ordering::Relaxed);
        }
        self.interrupts.reset();
        self.mailbox.reset();
        self.tx = Default::default();
        self.stopped = Default::default();
    }
}

/// A ring's place and state at one moment.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ring {
    pub(crate) at: u64,
    pub(crate) size: u32,
    pub(crate) head: u32,
    pub(crate) tail: u32,
}

impl Ring {
    /// Descriptors the driver has handed over.
    pub(crate) fn pending(&self) -> u32 {
        (self.tail + self.size - self.head) % self.size
    }

    pub(crate) fn next(&self, index: u32) -> u32 {
        (index + 1) % self.size
    }

    pub(crate) fn descriptor(&self, index: u32) -> u64 {
        self.at.wrapping_add(u64::from(index) * 16)
    }
}

pub(crate) fn queue_base(transmits: bool, queue: usize) -> u32 {
    (if transmits { TX } else { RX }) + QUEUE_STRIDE * queue as u32
}
