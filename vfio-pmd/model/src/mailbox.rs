//! The mailbox between a VF and the PF: sixteen words and a register of semaphores.

use crate::regs::MAILBOX_WORDS;
use crate::regs::mailbox::{ACK, PFACK, PFSTS, PFU, REQ, RSTD, RSTI, VFU};

/// A message as it lies in the mailbox memory.
pub(crate) type Words = [u32; MAILBOX_WORDS];

/// What a write to VFMAILBOX tells the PF.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Raised {
    Nothing,
    /// A message is there.
    Request,
    /// Its own message was read.
    Acknowledgement,
}

/// The VF's side of the mailbox.
#[derive(Default)]
pub(crate) struct Mailbox {
    /// The shared words. Whoever writes fewer than all leaves the others' old words behind them.
    pub(crate) memory: Words,
    /// The VF owns the words.
    held_by_vf: bool,
    /// So many attempts of the VF to take the words fail because the PF has them.
    pub(crate) busy: u32,
    /// Set until the next read: PFSTS, PFACK and RSTD.
    once: u32,
    /// The PF is in reset.
    pub(crate) in_reset: bool,
    /// What the PF will write as soon as the VF lets go of the words.
    waiting: Option<Vec<u32>>,
}

impl Mailbox {
    /// VFMAILBOX as the VF reads it. Reading clears PFSTS, PFACK and RSTD.
    pub(crate) fn read(&mut self) -> u32 {
        let held = if self.held_by_vf { VFU } else { 0 };
        let busy = if self.busy > 0 { PFU } else { 0 };
        let reset = if self.in_reset { RSTI } else { 0 };
        std::mem::take(&mut self.once) | held | busy | reset
    }

    /// The VF writes VFMAILBOX: which interrupt of the PF that raises.
    pub(crate) fn write(&mut self, value: u32) -> Raised {
        if value & VFU == 0 {
            self.held_by_vf = false;
            self.hand_over();
        } else if self.busy > 0 {
            self.busy -= 1;
        } else {
            self.held_by_vf = true;
        }
        match value {
            _ if value & REQ != 0 => Raised::Request,
            _ if value & ACK != 0 => Raised::Acknowledgement,
            _ => Raised::Nothing,
        }
    }

    /// The PF has read the VF's message.
    pub(crate) fn acknowledge(&mut self) {
        self.once |= PFACK;
    }

    /// The PF writes a message as soon as the VF does not own the words; true if it is there already.
    pub(crate) fn post(&mut self, words: Vec<u32>) -> bool {
        self.waiting = Some(words);
        self.hand_over()
    }

    fn hand_over(&mut self) -> bool {
        if self.held_by_vf {
            return false;
        }
        let Some(words) = self.waiting.take() else {
            return false;
        };
        for (slot, word) in self.memory.iter_mut().zip(words) {
            *slot = word;
        }
        self.once |= PFSTS;
        true
    }

    /// Reset of the function: the words are free, nothing is on its way.
    pub(crate) fn reset(&mut self) {
        self.held_by_vf = false;
        self.once = 0;
        self.waiting = None;
    }

    /// The PF's reset has ended.
    pub(crate) fn reset_done(&mut self) {
        self.in_reset = false;
        self.once |= RSTD;
    }
}

/// The words of a message that carry something: the mailbox keeps those of the messages before behind a short one.
pub(crate) fn spoken(words: &[u32], answer: bool) -> Vec<u32> {
    let kind = words.first().map_or(0, |word| word & 0xffff);
    let count = words.first().map_or(0, |word| word >> 16 & 0xff) as usize;
    let len = match (kind, answer) {
        (0x01, true) => 4,
        (0x02 | 0x06, _) => 3,
        (0x03, _) => 1 + count.min(30).div_ceil(2),
        (0x04 | 0x05 | 0x08 | 0x0c | 0x10, _) => 2,
        (0x09, true) => 5,
        (0x0a, true) => 9,
        (0x0b, true) => 11,
        _ => 1,
    };
    words[..len.min(words.len())].to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn status_bits_are_gone_once_they_were_read() {
        let mut mailbox = Mailbox::default();
        mailbox.acknowledge();
        assert!(mailbox.post(vec![7]));
        assert_eq!(mailbox.read(), PFSTS | PFACK);
        assert_eq!(mailbox.read(), 0);
        mailbox.in_reset = true;
        assert_eq!((mailbox.read(), mailbox.read()), (RSTI, RSTI));
        mailbox.reset_done();
        assert_eq!((mailbox.read(), mailbox.read()), (RSTD, 0));
    }

    #[test]
    fn the_pf_answers_only_when_the_vf_has_let_go() {
        let mut mailbox = Mailbox::default();
        assert_eq!(mailbox.write(VFU), Raised::Nothing);
        assert_eq!(mailbox.write(VFU | REQ), Raised::Request);
        mailbox.acknowledge();
        assert!(!mailbox.post(vec![1, 2]));
        assert_eq!(mailbox.read(), VFU | PFACK);
        mailbox.write(0);
        assert_eq!((mailbox.read(), mailbox.memory[1]), (PFSTS, 2));
        assert_eq!(mailbox.write(ACK), Raised::Acknowledgement);
    }

    #[test]
    fn a_busy_mailbox_refuses_the_lock_for_a_while() {
        let mut mailbox = Mailbox {
            busy: 2,
            ..Mailbox::default()
        };
        for _ in 0..2 {
            mailbox.write(VFU);
            assert_eq!(mailbox.read() & VFU, 0);
        }
        mailbox.write(VFU);
        assert_eq!(mailbox.read(), VFU);
    }

    #[test]
    fn a_short_answer_leaves_the_old_words_behind_it() {
        let mut mailbox = Mailbox {
            memory: [9; MAILBOX_WORDS],
            ..Mailbox::default()
        };
        mailbox.post(vec![1]);
        assert_eq!(mailbox.memory[..3], [1, 9, 9]);
    }
}
