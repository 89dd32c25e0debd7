//! What a port may do to the others beyond sending them frames: pose as a station, move one, fill the table, flood.
//!
//! All of it is off unless the operator asks for it, and then costs nothing per frame either: a station that is known to be where it
//! is passes unseen, and frames that are flooded are the rare ones.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use super::counters::Reason;
use super::eth::Mac;

/// The limits of one port.
///
/// Threads: any worker may ask. Two that do so at the same moment may let one frame too many pass: a limit, not an account.
#[derive(Debug, Default)]
pub struct Guard {
    /// The only stations that may be behind the port; empty: any.
    pub macs: Box<[Mac]>,
    /// Stations that may be learnt there at one time; 0: any number.
    pub stations: u32,
    /// Stations of other ports that may move here, per second.
    pub moves: Rate,
    /// Frames per second that may be flooded: broadcast, multicast, and to unknown stations.
    pub floods: Rate,
}

impl Guard {
    /// Why a station that is not known here may not be, if so. `elsewhere`: it is known behind another port.
    pub(super) fn refuses(
        &self,
        mac: Mac,
        elsewhere: bool,
        stations: u32,
        now: u32,
    ) -> Option<Reason> {
        if !self.macs.is_empty() && !self.macs.contains(&mac) {
            return Some(Reason::Spoofed);
        }
        if self.stations != 0 && stations >= self.stations {
            return Some(Reason::StationLimit);
        }
        (elsewhere && self.moves.take(1, now) == 0).then_some(Reason::MoveLimit)
    }
}

/// So many a second, of the coarse clock.
#[derive(Debug, Default)]
pub struct Rate {
    most: u32,
    /// The second of the last one, and how many there were in it.
    spent: AtomicU64,
}

impl Rate {
    /// At most so many; 0: any number.
    pub fn new(most: u32) -> Rate {
        Rate {
            most,
            spent: AtomicU64::new(0),
        }
    }

    /// How many of `wanted` may be.
    pub(super) fn take(&self, wanted: u32, now: u32) -> u32 {
        if self.most == 0 {
            return wanted;
        }
        let spent = self.spent.load(Relaxed);
        let before = if (spent >> 32) as u32 == now {
            spent as u32
        } else {
            0
        };
        let granted = wanted.min(self.most.saturating_sub(before));
        self.spent
            .store(u64::from(now) << 32 | u64::from(before + granted), Relaxed);
        granted
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_is_granted_each_second_and_not_saved_up() {
        let rate = Rate::new(10);
        assert_eq!(
            (rate.take(4, 7), rate.take(64, 7), rate.take(1, 7)),
            (4, 6, 0)
        );
        assert_eq!((rate.take(64, 9), rate.take(1, 9)), (10, 0));
        assert_eq!(Rate::new(0).take(64, 9), 64, "no limit");
    }

    #[test]
    fn the_first_rule_that_is_broken_names_the_drop() {
        let guard = Guard {
            macs: [Mac::from_bits(2)].into(),
            stations: 1,
            moves: Rate::new(1),
            ..Guard::default()
        };
        let (ours, other) = (Mac::from_bits(2), Mac::from_bits(4));
        assert_eq!(guard.refuses(other, true, 0, 1), Some(Reason::Spoofed));
        assert_eq!(guard.refuses(ours, true, 1, 1), Some(Reason::StationLimit));
        assert_eq!(guard.refuses(ours, true, 0, 1), None);
        assert_eq!(guard.refuses(ours, true, 0, 1), Some(Reason::MoveLimit));
        assert_eq!(guard.refuses(ours, false, 0, 1), None, "nobody else's");
        assert_eq!(Guard::default().refuses(other, true, 1 << 20, 1), None);
    }
}
