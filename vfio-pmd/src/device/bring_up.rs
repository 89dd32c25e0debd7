//! The device's own registers: silence, what a reset leaves alone, queues, vectors (82599 §4.6).

use std::ffi::CStr;
use std::time::Duration;

use super::{MAILBOX_VECTOR, QueuePair, TAG, Vf};
use crate::dma::Ring;
use crate::error::{Error, Result};
use crate::regs;
use crate::rx::RxQueue;
use crate::tx::TxQueue;

impl Vf {
    pub(super) fn start_pair(&self, queue: u32) -> Result<QueuePair> {
        let ring = |size, name: &CStr| {
            Ring::new(&self.transport, &self.space, size, name).map_err(|source| Error::Io {
                device: self.transport.name(),
                what: "memory for the rings (memlock limit, hugepages?)",
                source,
            })
        };
        let stuck = |what| Error::Stuck {
            device: self.transport.name(),
            what,
        };
        let vector = self.queue_vector(queue);
        let mut rx = RxQueue::new(
            ring(self.options.rx_ring, c"vfio-pmd-rx")?,
            self.bar.clone(),
            queue,
            (vector, self.signals.get(vector as usize).cloned()),
            self.transport.clone(),
            self.lease.clone(),
        );
        let mut tx = TxQueue::new(
            ring(self.options.tx_ring, c"vfio-pmd-tx")?,
            self.bar.clone(),
            queue,
            self.max_frame + TAG,
            self.transport.clone(),
            self.lease.clone(),
        );
        tx.start().map_err(stuck)?;
        rx.start(self.options.strip_vlan).map_err(stuck)?;
        Ok(QueuePair { rx, tx })
    }

    pub(super) fn quiesce(&self) {
        for q in 0..regs::QUEUES_MAX {
            self.bar.modify(regs::vfrxdctl(q), regs::DCTL_ENABLE, 0);
        }
        self.bar.write(regs::VTEIMC, regs::VECTORS_ALL);
        let _ = self.bar.read(regs::VTEICR);
        for q in 0..regs::QUEUES_MAX {
            self.bar.write(regs::vftxdctl(q), regs::TXDCTL_SWFLSH);
        }
    }

    pub(super) fn wait_for_pf(&mut self) -> Result<()> {
        for _ in 0..200 {
            if !self.mailbox.pf_in_reset() {
                return Ok(());
            }
            self.transport.pause(Duration::from_micros(500));
        }
        Err(Error::Stuck {
            device: self.transport.name(),
            what: "its PF is in reset",
        })
    }

    /// Registers that neither a VF reset nor a function-level reset clears, for all queues a VF can have.
    pub(super) fn write_defaults(&self) {
        let bar = &self.bar;
        bar.write(regs::VFPSRTYPE, 0);
        for q in 0..regs::QUEUES_MAX {
            bar.write(regs::vfrdh(q), 0);
            bar.write(regs::vfrdt(q), 0);
            bar.write(regs::vfrxdctl(q), 0);
            bar.write(regs::vfsrrctl(q), regs::SRRCTL_DEFAULT);
            bar.write(regs::vfdca_rxctrl(q), regs::DCA_RXCTRL_DEFAULT);
            bar.write(regs::vftdh(q), 0);
            bar.write(regs::vftdt(q), 0);
            bar.write(regs::vftxdctl(q), 0);
            bar.write(regs::vftdwbal(q), 0);
            bar.write(regs::vftdwbah(q), 0);
            bar.write(regs::vfdca_txctrl(q), regs::DCA_TXCTRL_DEFAULT);
        }
    }

    fn queue_vector(&self, queue: u32) -> u32 {
        queue % MAILBOX_VECTOR
    }

    /// Receive queues to vectors 0 and 1, the mailbox to 2. What is sent interrupts nobody.
    pub(super) fn route_interrupts(&self, queues: u32) {
        for pair in 0..queues.div_ceil(2) {
            let entry = |queue: u32, shift: u32| {
                if queue < queues {
                    (self.queue_vector(queue) | regs::IVAR_VALID) << shift
                } else {
                    0
                }
            };
            self.bar.write(
                regs::vtivar(2 * pair),
                entry(2 * pair, 0) | entry(2 * pair + 1, 16),
            );
        }
        self.bar
            .write(regs::VTIVAR_MISC, MAILBOX_VECTOR | regs::IVAR_VALID);
        for vector in 0..=MAILBOX_VECTOR {
            self.bar.write(regs::vteitr(vector), 0);
        }
        // A cause clears and masks itself when its message leaves: whoever waits asks again.
        self.bar.write(regs::VTEIAC, regs::VECTORS_ALL);
        self.bar.write(regs::VTEIAM, regs::VECTORS_ALL);
        self.bar.write(regs::VTEIMS, 1 << MAILBOX_VECTOR);
    }
}
