//! What happens behind the VFs: requests to the PF, frames from queue to queue, the wire, and what waits for the clock.

use std::time::Duration;

use crate::inject::spend;
use crate::mailbox::{Words, spoken};
use crate::packet::{Offload, be16, finish};
use crate::pf::{CastMode, Mac, NACK, Pf, multicast_hash};
use crate::regs::*;
use crate::report::Exchange;
use crate::rings::{Delivery, Taken};
use crate::vf::Vf;
use crate::wire::{WIRE_FRAME_MAX, Wire};

/// Frames a queue may send before others have their turn.
const TURN: usize = 64;

pub(crate) struct State {
    pub(crate) vfs: Vec<Vf>,
    pub(crate) pf: Pf,
    pub(crate) wire: Option<Wire>,
    /// The cable is plugged in.
    pub(crate) cable: bool,
    /// The PF's reset ends then.
    pub(crate) reset_until: Option<Duration>,
    /// Answers on their way: when, to whom, what.
    pub(crate) answers: Vec<(Duration, usize, Vec<u32>)>,
    pub(crate) clock: Option<Duration>,
    /// Frames from the wire that no VF wanted.
    pub(crate) unwanted: u64,
}

impl State {
    /// What the VF's link register shows.
    pub(crate) fn link(&self, vf: usize) -> bool {
        self.cable && self.reset_until.is_none() && self.pf.grants[vf].link_enabled
    }

    pub(crate) fn reset_vf(&mut self, vf: usize) {
        self.vfs[vf].reset();
        self.vfs[vf].report.resets += 1;
        self.pf.forget(vf);
        self.answers.retain(|(_, to, _)| *to != vf);
    }

    /// A request is in the mailbox.
    pub(crate) fn request(&mut self, vf: usize, now: Duration) {
        if self.reset_until.is_some() {
            return; // nobody is at home
        }
        let entry = &mut self.vfs[vf];
        let message: Words = entry.mailbox.memory;
        let lost = spend(&mut entry.injected.lose_answers);
        let refused = spend(&mut entry.injected.refuse);
        let (queues, delay) = (entry.injected.queues, entry.injected.delay);
        let mut answer = self.pf.answer(vf, &message);
        if refused {
            answer[0] = answer[0] & !(1 << 31) | 1 << 30;
        }
        if let (Some(queues), 9, Some(words)) = (queues, message[0] & 0xffff, answer.get_mut(1..3))
        {
            words.fill(queues);
        }
        let entry = &mut self.vfs[vf];
        entry.report.exchange(Exchange {
            request: spoken(&message, false),
            answer: spoken(&answer, true),
        });
        if message[0] & 0xffff == 1 {
            // The reset clears the words of the conversation before.
            entry.mailbox.memory.fill(0);
        }
        if lost {
            return;
        }
        if delay.is_zero() {
            self.deliver(vf, answer);
        } else {
            self.answers.push((now + delay, vf, answer));
        }
    }

    pub(crate) fn deliver(&mut self, vf: usize, words: Vec<u32>) {
        self.vfs[vf].mailbox.acknowledge();
        self.vfs[vf].mailbox.post(words);
        self.vfs[vf].interrupt_mailbox();
    }

    /// A VF has read the PF's message. Without leave to send it should not even read: Linux's PF refuses again, from which Linux's
    /// VF learns that it has to start over.
    pub(crate) fn acknowledged(&mut self, vf: usize) {
        if self.reset_until.is_none() && !self.pf.vfs[vf].cts {
            self.vfs[vf].mailbox.post(vec![NACK]);
            self.vfs[vf].interrupt_mailbox();
        }
    }

    pub(crate) fn ping(&mut self, vf: usize) {
        let word = self.pf.ping(vf);
        self.vfs[vf].mailbox.post(vec![word]);
        self.vfs[vf].interrupt_mailbox();
    }

    pub(crate) fn ping_all(&mut self) {
        (0..self.vfs.len()).for_each(|vf| self.ping(vf));
    }

    /// What the time has come for.
    pub(crate) fn timers(&mut self, now: Duration) {
        if self.reset_until.is_some_and(|end| end <= now) {
            self.reset_until = None;
            self.vfs.iter_mut().for_each(|vf| vf.mailbox.reset_done());
            self.ping_all();
        }
        while let Some(at) = self.answers.iter().position(|(when, ..)| *when <= now) {
            let (_, vf, words) = self.answers.remove(at);
            self.deliver(vf, words);
        }
    }

    /// A turn of one transmit queue; how many frames it sent.
    pub(crate) fn transmit(&mut self, vf: usize, queue: usize) -> usize {
        let mut buffer = Vec::with_capacity(2048);
        for sent in 0..TURN {
            if self.vfs[vf].injected.removed {
                return sent;
            }
            match self.vfs[vf].take(queue, &mut buffer) {
                Taken::Nothing => return sent,
                Taken::Malformed => self.vfs[vf].drops.malformed += 1,
                Taken::Frame(offload) => self.send(vf, &mut buffer, offload),
            }
        }
        TURN
    }

    pub(crate) fn send(&mut self, vf: usize, frame: &mut Vec<u8>, offload: Offload) {
        if !self.pf.vfs[vf].transmits || !self.cable || self.reset_until.is_some() {
            self.vfs[vf].drops.transmit_closed += 1;
            return;
        }
        if finish(frame, &offload, |piece| self.leave(vf, piece)).is_none() {
            self.vfs[vf].drops.malformed += 1;
        }
    }

    /// A finished frame leaves a VF: checks of the source, then to whoever is meant.
    pub(crate) fn leave(&mut self, vf: usize, frame: &mut Vec<u8>) {
        let state = &self.pf.vfs[vf];
        let source: Mac = frame[6..12].try_into().unwrap_or_default();
        let known = state.mac == Some(source) || state.macvlans.contains(&source);
        if state.spoof_check && !known {
            self.vfs[vf].drops.spoofed += 1;
            return;
        }
        let tag = tag(frame);
        if let Some(port_vlan) = self.pf.grants[vf].port_vlan {
            if tag.is_some() {
                self.vfs[vf].drops.vlan_refused += 1;
                return;
            }
            let [high, low] = port_vlan.to_be_bytes();
            frame.splice(12..12, [0x81, 0, high, low]);
        } else if state.spoof_check && tag.is_some_and(|tag| !state.vlans.contains(&(tag & 0xfff)))
        {
            self.vfs[vf].drops.vlan_refused += 1;
            return;
        }
        self.vfs[vf].counters.tx_frames += 1;
        self.vfs[vf].counters.tx_bytes += frame.len() as u64;
        let local = self.deliver_to_vfs(frame, Some(vf));
        // A unicast address of this port stays inside; everything else leaves.
        if frame[0] & 1 == 1 || local == 0 {
            frame.resize(frame.len().max(60), 0);
            match &self.wire {
                Some(wire) if !wire.send(frame) => self.vfs[vf].drops.wire += 1,
                _ => {}
            }
        }
    }

    /// Frames from the wire, as many as there are now (within a bound).
    pub(crate) fn take_from_wire(&mut self) -> usize {
        let mut buffer = [0; WIRE_FRAME_MAX + 64];
        let mut moved = 0;
        while moved < TURN * 4 {
            let Some(wire) = &self.wire else { break };
            let Some(frame) = wire.receive(&mut buffer) else {
                break;
            };
            moved += 1;
            let up = self.cable && self.reset_until.is_none();
            if frame.len() < 14 || !up || self.deliver_to_vfs(frame, None) == 0 {
                self.unwanted += 1;
            }
        }
        moved
    }

    /// Gives a frame to every VF that hears it; how many that were.
    pub(crate) fn deliver_to_vfs(&mut self, frame: &[u8], from: Option<usize>) -> usize {
        let mut heard = 0;
        for vf in 0..self.vfs.len() {
            if !self.hears(vf, frame) {
                continue;
            }
            heard += 1;
            if self.vfs[vf].injected.removed {
                continue;
            }
            let state = &self.pf.vfs[vf];
            let hidden = self.pf.grants[vf].port_vlan.is_some();
            let limit = self.pf.frame_max as usize - 4 + if tag(frame).is_some() { 4 } else { 0 };
            let entry = &mut self.vfs[vf];
            if !state.receives {
                entry.drops.receive_closed += 1;
            } else if frame.len() > limit {
                entry.drops.too_long += 1;
            } else {
                let bare = hidden.then(|| [&frame[..12], &frame[16..]].concat());
                let frame = bare.as_deref().unwrap_or(frame);
                match entry.receive(frame, from.is_some(), self.pf.policy.rss_queues) {
                    Delivery::Done => {}
                    Delivery::NoDescriptors => entry.drops.no_descriptors += 1,
                    Delivery::QueueOff => entry.drops.queue_off += 1,
                }
            }
        }
        heard
    }

    /// The filters of a VF: VLAN, then address. A VF that is down hears nothing.
    pub(crate) fn hears(&self, vf: usize, frame: &[u8]) -> bool {
        let (state, grant) = (&self.pf.vfs[vf], &self.pf.grants[vf]);
        if !state.cts {
            return false;
        }
        let vlan = tag(frame).map(|tag| tag & 0xfff);
        let vlan_fits = match (grant.port_vlan, vlan) {
            (Some(own), vlan) => vlan == Some(own & 0xfff),
            (None, None | Some(0)) => true,
            (None, Some(vlan)) => state.vlans.contains(&vlan),
        };
        let to: Mac = frame[..6].try_into().unwrap_or_default();
        vlan_fits
            && match to {
                [0xff, 0xff, 0xff, 0xff, 0xff, 0xff] => true,
                _ if to[0] & 1 == 0 => state.mac == Some(to) || state.macvlans.contains(&to),
                _ => match state.cast {
                    CastMode::None => false,
                    CastMode::AllMulti => true,
                    // One table of hashes for the port: whoever listens to multicast hears what any VF registered.
                    CastMode::Multi => {
                        let hash = multicast_hash(self.pf.policy.multicast_filter, to);
                        self.pf.vfs.iter().any(|vf| vf.multicast.contains(&hash))
                    }
                },
            }
    }
}

/// The tag of a frame, priority included.
fn tag(frame: &[u8]) -> Option<u16> {
    (be16(frame, 12) == Some(0x8100)).then(|| be16(frame, 14))?
}

/// What a predecessor that never cleaned up leaves in the registers a reset does not touch.
pub(crate) fn soil(vf: &mut Vf) {
    for queue in 0..QUEUES as u32 {
        let (rx, tx) = (RX + queue * QUEUE_STRIDE, TX + queue * QUEUE_STRIDE);
        vf.set(rx + HEAD, 17);
        vf.set(rx + SRRCTL, 0x1f);
        vf.set(rx + DCTL, RXDCTL_VME);
        vf.set(tx + HEAD, 23);
        // Head write-back to a place that is not mapped.
        vf.set(tx + TDWBAL, 0xdead_0001);
        vf.set(tx + TDWBAH, 0x7f);
        vf.set(tx + DCTL, 0x007f_7f7f);
    }
    vf.set(PSRTYPE, 3 << PSRTYPE_RQPL);
    for bell in vf.bells.all() {
        bell.store(5, std::sync::atomic::Ordering::Relaxed);
    }
}
