//! Causes, masks and MSI-X vectors.

use std::os::fd::OwnedFd;

use crate::regs::VECTORS;

/// All vectors' bits.
const ALL: u32 = (1 << VECTORS) - 1;

/// EICR and its companions, and the eventfds behind the vectors.
#[derive(Default)]
pub(crate) struct Interrupts {
    cause: u32,
    mask: u32,
    pub(crate) auto_clear: u32,
    pub(crate) auto_mask: u32,
    signals: [Option<OwnedFd>; VECTORS],
    /// Interrupts sent per vector.
    pub(crate) sent: [u64; VECTORS],
}

impl Interrupts {
    /// EICR: reading clears.
    pub(crate) fn take_causes(&mut self) -> u32 {
        std::mem::take(&mut self.cause)
    }

    /// EICR: writing ones clears them.
    pub(crate) fn clear_causes(&mut self, bits: u32) {
        self.cause &= !bits;
    }

    /// EIMS as read.
    pub(crate) fn enabled(&self) -> u32 {
        self.mask
    }

    /// EIMS: what is pending fires now.
    pub(crate) fn enable(&mut self, bits: u32) {
        self.mask |= bits & ALL;
        self.fire();
    }

    /// EIMC.
    pub(crate) fn disable(&mut self, bits: u32) {
        self.mask &= !bits;
    }

    /// Something happened that vector `vector` reports.
    pub(crate) fn raise(&mut self, bits: u32) {
        self.cause |= bits & ALL;
        self.fire();
    }

    fn fire(&mut self) {
        let now = self.cause & self.mask;
        for (vector, signal) in self.signals.iter().enumerate() {
            if now & (1 << vector) == 0 {
                continue;
            }
            self.sent[vector] += 1;
            if let Some(signal) = signal {
                // An eventfd that is full has been signalled often enough.
                let _ = rustix::io::write(signal, &1u64.to_ne_bytes());
            }
        }
        self.cause &= !(now & self.auto_clear);
        self.mask &= !(now & self.auto_mask);
    }

    /// Vector `vector` signals this eventfd from now on, or nothing.
    pub(crate) fn connect(&mut self, vector: usize, signal: Option<OwnedFd>) {
        if let Some(slot) = self.signals.get_mut(vector) {
            *slot = signal;
        }
    }

    /// Reset of the function; the eventfds belong to the host and stay.
    pub(crate) fn reset(&mut self) {
        self.cause = 0;
        self.mask = 0;
        self.auto_clear = 0;
        self.auto_mask = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_masked_cause_waits_and_fires_when_it_is_enabled() {
        let mut interrupts = Interrupts {
            auto_clear: 1,
            auto_mask: 1,
            ..Interrupts::default()
        };
        interrupts.raise(1);
        assert_eq!(interrupts.sent[0], 0);
        interrupts.enable(1);
        assert_eq!((interrupts.sent[0], interrupts.enabled()), (1, 0));
        assert_eq!(interrupts.take_causes(), 0, "auto-clear");
    }

    #[test]
    fn reading_the_causes_clears_them() {
        let mut interrupts = Interrupts::default();
        interrupts.raise(0b110);
        assert_eq!((interrupts.take_causes(), interrupts.take_causes()), (6, 0));
        interrupts.raise(0b110);
        interrupts.clear_causes(0b010);
        assert_eq!(interrupts.take_causes(), 4);
    }
}
