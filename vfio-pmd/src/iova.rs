//! Hands out the addresses under which the device sees memory.
//!
//! IOVAs are numbers of our own, not addresses of this process: a restarted process that maps the same rings elsewhere gives the
//! device the same IOVAs. Lowest first, whole pages.

use std::ops::RangeInclusive;

/// Granularity of a mapping, in bytes.
pub const PAGE: u64 = 4096;

/// The free IOVAs of one device.
#[derive(Debug)]
pub struct IovaSpace {
    /// Free ranges `(first, len)`, ascending, never touching each other.
    free: Vec<(u64, u64)>,
}

impl IovaSpace {
    /// The space of a device that can be given `ranges`. Address 0 is never handed out: a forgotten address shall fault.
    pub fn new(ranges: &[RangeInclusive<u64>]) -> IovaSpace {
        let mut free: Vec<(u64, u64)> = ranges
            .iter()
            .filter_map(|range| {
                let first = range.start().max(&PAGE).checked_next_multiple_of(PAGE)?;
                let end =
                    (range.end() & !(PAGE - 1)).saturating_add(if range.end() % PAGE == PAGE - 1 {
                        PAGE
                    } else {
                        0
                    });
                (end > first).then(|| (first, end - first))
            })
            .collect();
        free.sort_unstable();
        IovaSpace { free }
    }

    /// Takes `len` bytes aligned to `align` (a power of two, at least a page); `None` if no free range holds them.
    pub fn take(&mut self, len: u64, align: u64) -> Option<u64> {
        assert!(align.is_power_of_two() && align >= PAGE, "IOVA alignment");
        let len = len.max(1).checked_next_multiple_of(PAGE)?;
        for index in 0..self.free.len() {
            let (first, room) = self.free[index];
            let Some(at) = first.checked_next_multiple_of(align) else {
                continue;
            };
            let gap = at - first;
            if gap >= room || room - gap < len {
                continue;
            }
            let behind = room - gap - len;
            self.free.remove(index);
            if behind > 0 {
                self.free.insert(index, (at + len, behind));
            }
            if gap > 0 {
                self.free.insert(index, (first, gap));
            }
            return Some(at);
        }
        None
    }

    /// Gives back what [`IovaSpace::take`] handed out.
    pub fn give_back(&mut self, at: u64, len: u64) {
        let len = len.max(1).next_multiple_of(PAGE);
        let index = self.free.partition_point(|&(first, _)| first < at);
        let after = self.free.get(index).copied();
        let before = index.checked_sub(1).map(|i| self.free[i]);
        assert!(
            after.is_none_or(|(first, _)| at + len <= first)
                && before.is_none_or(|(first, room)| first + room <= at),
            "IOVA {at:#x} given back twice"
        );
        self.free.insert(index, (at, len));
        if after.is_some_and(|(first, _)| at + len == first) {
            self.free[index].1 += self.free.remove(index + 1).1;
        }
        if before.is_some_and(|(first, room)| first + room == at) {
            self.free[index - 1].1 += self.free.remove(index).1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_first_page_and_the_holes_between_ranges_are_never_handed_out() {
        let mut space = IovaSpace::new(&[0..=0xFFFF, 0x2_0800..=0x3_07FF]);
        assert_eq!(space.take(0xF000, PAGE), Some(0x1000));
        assert_eq!(space.take(0x1000, PAGE), Some(0x2_1000));
        assert_eq!(space.take(0xF000, PAGE), None);
        assert_eq!(space.take(0xE000, PAGE), Some(0x2_2000));
        assert_eq!(space.take(1, PAGE), None);
    }

    #[test]
    fn the_top_of_the_address_space_overflows_nothing() {
        let mut space = IovaSpace::new(&[u64::MAX - 0x1FFF..=u64::MAX]);
        assert_eq!(space.take(0x1000, 1 << 30), None);
        assert_eq!(space.take(u64::MAX, PAGE), None);
        assert_eq!(space.take(0x1000, PAGE), Some(u64::MAX - 0x1FFF));
    }

    proptest! {
        #[test]
        fn what_is_handed_out_is_aligned_never_overlaps_and_comes_back_whole(
            steps in prop::collection::vec((any::<bool>(), 1u64..200_000, 12u32..22), 1..80)
        ) {
            let whole = 0x1000..=0x3FF_FFFFu64;
            let mut space = IovaSpace::new(std::slice::from_ref(&whole));
            let mut held: Vec<(u64, u64)> = Vec::new();
            for (take, len, shift) in steps {
                if take {
                    if let Some(at) = space.take(len, 1 << shift) {
                        prop_assert_eq!(at % (1 << shift), 0);
                        prop_assert!(whole.contains(&at) && whole.contains(&(at + len - 1)));
                        let clear = held.iter().all(|&(h, l)| at + len <= h || h + l <= at);
                        prop_assert!(clear, "{:#x}+{:#x} overlaps", at, len);
                        held.push((at, len.next_multiple_of(PAGE)));
                    }
                } else if !held.is_empty() {
                    let (at, len) = held.swap_remove(len as usize % held.len());
                    space.give_back(at, len);
                }
            }
            for (at, len) in held.drain(..) {
                space.give_back(at, len);
            }
            prop_assert_eq!(space.free, vec![(0x1000, 0x3FF_F000)]);
        }
    }
}
