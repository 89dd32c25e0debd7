//! The device's counters: they wrap at 32 and 36 bits and are never cleared, so that only differences count.

use crate::mmio::Bar;
use crate::regs;

/// Frames and bytes since the device was opened, resets included. The VF does not count what it misses: it has no register for it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Statistics {
    /// Frames received.
    pub rx_frames: u64,
    /// Bytes received, as the device counts them.
    pub rx_bytes: u64,
    /// Multicast frames received.
    pub rx_multicast: u64,
    /// Frames sent.
    pub tx_frames: u64,
    /// Bytes sent, as the device counts them.
    pub tx_bytes: u64,
}

/// Sums up the counters. Read them at least every half minute: at line rate bytes wrap after 55 s, frames after 4.8 minutes.
pub(crate) struct Counters {
    last: [u64; 5],
    sum: [u64; 5],
}

/// Width of each counter in bits.
const BITS: [u32; 5] = [32, 36, 32, 32, 36];

impl Counters {
    pub(crate) fn new() -> Counters {
        Counters {
            last: [0; 5],
            sum: [0; 5],
        }
    }

    /// Starts over from what the registers say now, after a reset; what was counted stays.
    pub(crate) fn rebase(&mut self, bar: &Bar) {
        self.last = read(bar);
    }

    /// Adds what happened since the last time.
    pub(crate) fn update(&mut self, bar: &Bar) -> Statistics {
        self.add(read(bar));
        self.last_known()
    }

    /// The sums as of the last time.
    pub(crate) fn last_known(&self) -> Statistics {
        let [rx_frames, rx_bytes, rx_multicast, tx_frames, tx_bytes] = self.sum;
        Statistics {
            rx_frames,
            rx_bytes,
            rx_multicast,
            tx_frames,
            tx_bytes,
        }
    }

    fn add(&mut self, now: [u64; 5]) {
        for index in 0..5 {
            let mask = (1 << BITS[index]) - 1;
            self.sum[index] += now[index].wrapping_sub(self.last[index]) & mask;
        }
        self.last = now;
    }
}

fn read(bar: &Bar) -> [u64; 5] {
    [
        u64::from(bar.read(regs::VFGPRC)),
        wide(bar, regs::VFGORC_LOW, regs::VFGORC_HIGH),
        u64::from(bar.read(regs::VFMPRC)),
        u64::from(bar.read(regs::VFGPTC)),
        wide(bar, regs::VFGOTC_LOW, regs::VFGOTC_HIGH),
    ]
}

/// 36 bits in two registers; read again if the low half wrapped in between.
fn wide(bar: &Bar, low: u32, high: u32) -> u64 {
    let mut upper = bar.read(high);
    let mut lower = bar.read(low);
    let again = bar.read(high);
    if again != upper {
        upper = again;
        lower = bar.read(low);
    }
    u64::from(upper & 0xF) << 32 | u64::from(lower)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn counters_count_on_when_their_registers_wrap(
            start in any::<u64>(), steps in prop::collection::vec(0u64..1 << 32, 1..40)
        ) {
            let at = |total: u64| BITS.map(|bits| total & ((1 << bits) - 1));
            let mut counters = Counters::new();
            counters.last = at(start);
            let mut total = start;
            for step in &steps {
                total = total.wrapping_add(*step);
                counters.add(at(total));
            }
            prop_assert_eq!(counters.sum, [steps.iter().sum::<u64>(); 5]);
        }
    }

    #[test]
    fn a_reset_neither_loses_nor_invents_frames() {
        let mut counters = Counters::new();
        counters.add([100, 6400, 1, 50, 3200]);
        // What `rebase` does with registers that a reset cleared.
        counters.last = [0; 5];
        counters.add([7, 448, 0, 0, 0]);
        assert_eq!(counters.sum, [107, 6848, 1, 50, 3200]);
    }
}
