//! A container in the middle of a chain: it takes each frame, addresses it to the next one, and sends it on.

use ringway::guest::QueuePair;
use ringway::guest::traffic::{HEAD, check};

use super::stream::address;

/// Frames per turn.
const BURST: usize = 64;

/// What it remembers.
pub(crate) struct Relay {
    own: u32,
    next: u32,
    /// Frames taken and not sent yet: the new head, and what follows.
    held: Vec<([u64; 5], Vec<u8>)>,
    /// How many of them there are; the rest is room that is used again.
    count: usize,
}

impl Relay {
    /// Station `own` passes on to station `next`.
    pub(crate) fn new(own: u32, next: u32) -> Self {
        Self {
            own,
            next,
            held: (0..BURST).map(|_| ([0; 5], Vec::new())).collect(),
            count: 0,
        }
    }

    /// Takes and sends a burst; returns how many frames moved.
    pub(crate) fn turn(&mut self, pair: &mut QueuePair) -> u64 {
        let (own, next) = (address(self.own), address(self.next));
        let mut moved = 0;
        if self.count == 0 {
            let (held, count) = (&mut self.held, &mut self.count);
            pair.rx.receive(|frame| {
                // What is not addressed to this container is not passed on: a flooded frame would go round.
                let Some([first, second, third, number, stamp]) = frame.words::<5>() else {
                    return;
                };
                if first & 0xffff_ffff_ffff != own || *count == held.len() {
                    return;
                }
                let place = third as u32;
                let first = next | own << 48;
                let second = (second & !0xffff_ffff) | own >> 16;
                let sum = check(first, second, place, number, stamp);
                let third = u64::from(sum) << 32 | u64::from(place);
                let (words, rest) = &mut held[*count];
                *words = [first, second, third, number, stamp];
                rest.resize(frame.len() - HEAD, 0);
                frame.copy(HEAD, rest);
                *count += 1;
            });
            moved += self.count as u64;
        }
        if self.count > 0 {
            let mut at = 0;
            let held = &self.held;
            let sent = pair.tx.send(self.count, |slot| {
                let (words, rest) = &held[at];
                at += 1;
                for (index, word) in words.iter().enumerate() {
                    slot.put(8 * index, *word);
                }
                slot.write(HEAD, rest);
                HEAD + rest.len()
            });
            self.held[..self.count].rotate_left(sent);
            self.count -= sent;
        }
        moved
    }
}
