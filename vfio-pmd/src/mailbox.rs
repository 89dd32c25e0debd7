//! VF to PF messages: sixteen dwords of shared memory and a register that says whose they are.
//!
//! Word 0 is type (15:0), a small argument (23:16) and the PF's verdict: ACK (31), NACK (30), CTS (29: the VF may send).
//! Two protocols: the old one drops the ownership bit when it raises the request; the new one (API 1.5 on) keeps it until the PF
//! acknowledged. Every wait has the deadline of the vendor's driver: one second.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use crate::mmio::{Bar, GONE};
use crate::regs;
use crate::transport::Transport;

const ACK: u32 = 1 << 31;
const NACK: u32 = 1 << 30;
const CTS: u32 = 1 << 29;
const TYPE: u32 = 0xFFFF;

const RESET: u32 = 0x01;
const SET_MAC_ADDR: u32 = 0x02;
const SET_MULTICAST: u32 = 0x03;
const SET_VLAN: u32 = 0x04;
const SET_LPE: u32 = 0x05;
const SET_MACVLAN: u32 = 0x06;
const API_NEGOTIATE: u32 = 0x08;
const GET_QUEUES: u32 = 0x09;
const UPDATE_XCAST_MODE: u32 = 0x0C;
const GET_LINK_STATE: u32 = 0x10;
const PF_CONTROL: u32 = 0x0100;

/// Between two looks at the mailbox.
const LOOK: Duration = Duration::from_micros(500);
/// Looks before the PF counts as silent: one second.
const LOOKS: u32 = 2000;
/// PF messages of its own that may come in front of an answer.
const INTERRUPTIONS: u32 = 8;
/// Hashes that one SET_MULTICAST carries, and that a PF keeps for a VF.
pub(crate) const MULTICAST_MAX: usize = 30;

/// An Ethernet address.
pub type Mac = [u8; 6];

/// A version of the mailbox protocol, in the order of its features.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Api {
    /// 1.0: what every PF understands after a reset.
    V1_0,
    /// 1.1: queues, jumbo frames.
    V1_1,
    /// 1.2: multicast modes, link state, RSS table.
    V1_2,
    /// 1.3: promiscuous mode.
    V1_3,
    /// 1.4: IPsec.
    V1_4,
    /// 1.5: the new mailbox protocol.
    V1_5,
}

impl Api {
    /// From the newest to the oldest that is negotiated.
    const DOWNWARDS: [Api; 6] = [
        Api::V1_5,
        Api::V1_4,
        Api::V1_3,
        Api::V1_2,
        Api::V1_1,
        Api::V1_0,
    ];

    /// The number on the wire: 1 was 2.0 of another system's driver.
    fn wire(self) -> u32 {
        match self {
            Api::V1_0 => 0,
            Api::V1_1 => 2,
            Api::V1_2 => 3,
            Api::V1_3 => 4,
            Api::V1_4 => 5,
            Api::V1_5 => 6,
        }
    }
}

impl fmt::Display for Api {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "1.{}", *self as u8)
    }
}

/// Which frames the PF lets through besides those for a registered address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Cast {
    /// Own unicast and broadcast only.
    None,
    /// And registered multicast.
    Multi,
    /// And all multicast; the PF grants it to a trusted VF.
    AllMulti,
    /// Everything; an 82599's PF refuses it.
    Promiscuous,
}

/// Why a message did not do its work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MailboxError {
    /// The PF holds the mailbox and does not let go.
    #[error("the PF did not release the mailbox within a second")]
    Busy,
    /// No answer.
    #[error("the PF did not answer within a second (is its driver loaded and the port up?)")]
    Silent,
    /// The PF said no.
    #[error("the PF refused")]
    Refused,
    /// The PF forgot this VF (it was reset, or its settings were changed): everything has to be negotiated again.
    #[error("the PF was reset or reconfigured")]
    Forgotten,
    /// An answer to something else.
    #[error("the PF answered with {0:#010x}, which is no answer to the question")]
    Garbled(u32),
    /// All registers read as ones.
    #[error("the device is gone")]
    Gone,
}

/// What the PF said to RESET.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ResetReply {
    /// The address the PF's administrator gave this VF, if any.
    pub(crate) mac: Option<Mac>,
    /// Which bits of a multicast address the PF hashes.
    pub(crate) filter_type: u32,
}

/// What the PF said to GET_QUEUES.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct QueueGrant {
    /// Transmit queues.
    pub(crate) tx: u32,
    /// Receive queues.
    pub(crate) rx: u32,
}

/// The mailbox of one VF. One thread at a time: it is part of the device's control side.
pub(crate) struct Mailbox {
    bar: Bar,
    transport: Arc<dyn Transport>,
    /// Bits of VFMAILBOX that a read cleared and that nobody has used yet.
    seen: u32,
    api: Api,
}

impl Mailbox {
    pub(crate) fn new(bar: Bar, transport: Arc<dyn Transport>) -> Mailbox {
        Mailbox {
            bar,
            transport,
            seen: 0,
            api: Api::V1_0,
        }
    }

    /// The version in use.
    pub(crate) fn api(&self) -> Api {
        self.api
    }

    /// Forgets what was negotiated, for a device that is about to be reset.
    pub(crate) fn forget(&mut self) {
        self.api = Api::V1_0;
        self.seen = 0;
    }

    /// True while the PF says that it is in reset.
    pub(crate) fn pf_in_reset(&mut self) -> bool {
        let state = self.look();
        self.seen &= !regs::MAILBOX_RSTD;
        state != GONE && state & regs::MAILBOX_RSTI != 0
    }

    /// Looks for something the PF says on its own: `Forgotten` if it was reset or withdrew its clear-to-send.
    pub(crate) fn listen(&mut self) -> Result<(), MailboxError> {
        let state = self.look();
        if state == GONE {
            return Err(MailboxError::Gone);
        }
        if state & (regs::MAILBOX_RSTI | regs::MAILBOX_RSTD) != 0 {
            self.seen &= !regs::MAILBOX_RSTD;
            return Err(MailboxError::Forgotten);
        }
        if state & regs::MAILBOX_PFSTS == 0 {
            return Ok(());
        }
        let mut word = [0];
        self.read(&mut word)?;
        // A late answer to a question we gave up is dropped here, too.
        if word[0] & CTS == 0 {
            return Err(MailboxError::Forgotten);
        }
        Ok(())
    }

    /// RESET: the PF drops all filters of this VF and says which address it has. A refusal only means: none was set.
    pub(crate) fn reset(&mut self) -> Result<ResetReply, MailboxError> {
        self.write(&[RESET])?;
        self.transport.pause(Duration::from_millis(10));
        let mut reply = [0; 4];
        self.answer(RESET, &mut reply)?;
        let [b0, b1, b2, b3] = reply[1].to_le_bytes();
        let [b4, b5, _, _] = reply[2].to_le_bytes();
        let mac = [b0, b1, b2, b3, b4, b5];
        let given = reply[0] & ACK != 0 && mac != [0; 6] && mac[0] & 1 == 0;
        Ok(ResetReply {
            mac: given.then_some(mac),
            filter_type: reply[3],
        })
    }

    /// Agrees on the newest version that the PF accepts. A PF that accepts none speaks 1.0.
    pub(crate) fn negotiate(&mut self) -> Result<Api, MailboxError> {
        for api in Api::DOWNWARDS {
            match self.ask(&[API_NEGOTIATE, api.wire()]) {
                Ok(_) => {
                    self.api = api;
                    return Ok(api);
                }
                Err(MailboxError::Refused) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(Api::V1_0)
    }

    /// How many queues the PF grants; `None` before API 1.1.
    pub(crate) fn queues(&mut self) -> Result<Option<QueueGrant>, MailboxError> {
        if self.api < Api::V1_1 {
            return Ok(None);
        }
        let mut reply = [0; 5];
        self.exchange(&[GET_QUEUES, 0, 0, 0, 0], &mut reply)?;
        // A PF that says nothing sensible means "all you have", as the vendor's driver reads it.
        let sane = |count| match count {
            1..=regs::QUEUES_MAX => count,
            _ => regs::QUEUES_MAX,
        };
        Ok(Some(QueueGrant {
            tx: sane(reply[1]),
            rx: sane(reply[2]),
        }))
    }

    /// Sets this VF's address.
    pub(crate) fn set_mac(&mut self, mac: Mac) -> Result<(), MailboxError> {
        let [low, high] = words(mac);
        self.ask(&[SET_MAC_ADDR, low, high])
    }

    /// Clears the list of further addresses.
    pub(crate) fn clear_addresses(&mut self) -> Result<(), MailboxError> {
        self.ask(&[SET_MACVLAN, 0, 0])
    }

    /// Adds the `index`th further address, from 1; 1 starts a new list.
    pub(crate) fn add_address(&mut self, index: u32, mac: Mac) -> Result<(), MailboxError> {
        let [low, high] = words(mac);
        self.ask(&[SET_MACVLAN | index.clamp(1, 0xFF) << 16, low, high])
    }

    /// Replaces the multicast hashes; at most [`MULTICAST_MAX`] count.
    pub(crate) fn set_multicast(&mut self, hashes: &[u16]) -> Result<(), MailboxError> {
        let hashes = &hashes[..hashes.len().min(MULTICAST_MAX)];
        let mut message = [0; regs::MAILBOX_WORDS];
        message[0] = SET_MULTICAST | (hashes.len() as u32) << 16;
        for (index, hash) in hashes.iter().enumerate() {
            message[1 + index / 2] |= u32::from(*hash) << (16 * (index % 2));
        }
        self.ask(&message[..1 + hashes.len().div_ceil(2)])
    }

    /// Lets frames of a VLAN through, or no longer.
    pub(crate) fn set_vlan(&mut self, vid: u16, on: bool) -> Result<(), MailboxError> {
        self.ask(&[SET_VLAN | u32::from(on) << 16, u32::from(vid)])
    }

    /// Longest frame, with FCS.
    pub(crate) fn set_max_frame(&mut self, bytes: u32) -> Result<(), MailboxError> {
        self.ask(&[SET_LPE, bytes])
    }

    /// Asks for `wanted` and says what was granted, which may be less.
    pub(crate) fn cast(&mut self, wanted: Cast) -> Result<Cast, MailboxError> {
        let least = match wanted {
            Cast::Promiscuous => Api::V1_3,
            _ => Api::V1_2,
        };
        if self.api < least {
            return Err(MailboxError::Refused);
        }
        let mut reply = [0; 2];
        self.exchange(&[UPDATE_XCAST_MODE, wanted as u32], &mut reply)?;
        Ok(match reply[1] {
            0 => Cast::None,
            1 => Cast::Multi,
            2 => Cast::AllMulti,
            3 => Cast::Promiscuous,
            _ => return Err(MailboxError::Garbled(reply[1])),
        })
    }

    /// Whether the PF's administrator lets this VF's link be up; `None` before API 1.2 and from a PF that does not say.
    pub(crate) fn link_enabled(&mut self) -> Result<Option<bool>, MailboxError> {
        if self.api < Api::V1_2 {
            return Ok(None);
        }
        let mut reply = [0; 2];
        match self.exchange(&[GET_LINK_STATE, 0], &mut reply) {
            Ok(()) => Ok(Some(reply[1] != 0)),
            Err(MailboxError::Refused) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Sends a message whose answer is yes or no.
    fn ask(&mut self, message: &[u32]) -> Result<(), MailboxError> {
        self.exchange(message, &mut [0])
    }

    /// Sends a message and reads its answer; only the answer's own words count, old ones may follow in the mailbox.
    fn exchange(&mut self, message: &[u32], reply: &mut [u32]) -> Result<(), MailboxError> {
        self.write(message)?;
        self.answer(message[0], reply)?;
        match (reply[0] & ACK != 0, reply[0] & CTS != 0) {
            // Before a RESET (or after its own reset) the PF refuses everything, without clear-to-send.
            (_, false) => Err(MailboxError::Forgotten),
            (true, true) => Ok(()),
            (false, true) => Err(MailboxError::Refused),
        }
    }

    /// Waits for the answer to `question` and reads it; what the PF says on its own meanwhile is heard and passed over.
    fn answer(&mut self, question: u32, reply: &mut [u32]) -> Result<(), MailboxError> {
        for _ in 0..INTERRUPTIONS {
            if !self.wait_for(regs::MAILBOX_PFSTS)? {
                return Err(MailboxError::Silent);
            }
            self.read(reply)?;
            let word = reply[0];
            if word & TYPE == question & TYPE && word & (ACK | NACK) != 0 {
                return Ok(());
            }
            if word & TYPE != PF_CONTROL {
                return Err(MailboxError::Garbled(word));
            }
            if word & CTS == 0 && question & TYPE != RESET {
                return Err(MailboxError::Forgotten);
            }
        }
        Err(MailboxError::Garbled(reply[0]))
    }

    /// Reads VFMAILBOX without losing what the read clears.
    fn look(&mut self) -> u32 {
        let state = self.bar.read(regs::VFMAILBOX);
        if state != GONE {
            self.seen |= state & regs::MAILBOX_READ_TO_CLEAR;
        }
        state | self.seen
    }

    /// Waits until one of `bits` was seen, and forgets that it was; false after the deadline.
    fn wait_for(&mut self, bits: u32) -> Result<bool, MailboxError> {
        for _ in 0..LOOKS {
            let state = self.look();
            if state == GONE {
                return Err(MailboxError::Gone);
            }
            if state & bits != 0 {
                self.seen &= !bits;
                return Ok(true);
            }
            self.transport.pause(LOOK);
        }
        Ok(false)
    }

    /// Takes the mailbox. The PF may hold it at this moment: one failure means nothing.
    fn lock(&mut self) -> Result<(), MailboxError> {
        for _ in 0..LOOKS {
            self.bar.write(regs::VFMAILBOX, regs::MAILBOX_VFU);
            let state = self.look();
            if state == GONE {
                return Err(MailboxError::Gone);
            }
            if state & regs::MAILBOX_VFU != 0 {
                return Ok(());
            }
            self.transport.pause(LOOK);
        }
        Err(MailboxError::Busy)
    }

    fn write(&mut self, message: &[u32]) -> Result<(), MailboxError> {
        self.lock()?;
        // The message takes the place of whatever the PF had said; its signals would be taken for our answer.
        self.seen &= !(regs::MAILBOX_PFSTS | regs::MAILBOX_PFACK);
        for (index, word) in message.iter().enumerate() {
            self.bar.write(regs::VFMBMEM + 4 * index as u32, *word);
        }
        if self.api < Api::V1_5 {
            self.bar.write(regs::VFMAILBOX, regs::MAILBOX_REQ);
            return Ok(());
        }
        self.bar
            .write(regs::VFMAILBOX, regs::MAILBOX_REQ | regs::MAILBOX_VFU);
        let taken = self.wait_for(regs::MAILBOX_PFACK)?;
        self.bar.write(regs::VFMAILBOX, 0);
        if taken {
            Ok(())
        } else {
            Err(MailboxError::Silent)
        }
    }

    /// Reads the message that PFSTS announced and tells the PF so.
    fn read(&mut self, words: &mut [u32]) -> Result<(), MailboxError> {
        self.lock()?;
        self.seen &= !regs::MAILBOX_PFSTS;
        for (index, word) in words.iter_mut().enumerate() {
            *word = self.bar.read(regs::VFMBMEM + 4 * index as u32);
        }
        self.bar.write(regs::VFMAILBOX, regs::MAILBOX_ACK);
        Ok(())
    }
}

/// An address as the mailbox carries it: first byte lowest.
fn words(mac: Mac) -> [u32; 2] {
    [
        u32::from_le_bytes([mac[0], mac[1], mac[2], mac[3]]),
        u32::from_le_bytes([mac[4], mac[5], 0, 0]),
    ]
}

/// The 12 bits of a multicast address that the PF's filter of this type looks at.
pub(crate) fn multicast_hash(mac: Mac, filter_type: u32) -> u16 {
    let (low, high) = (u16::from(mac[4]), u16::from(mac[5]));
    let hash = match filter_type {
        1 => low >> 3 | high << 5,
        2 => low >> 2 | high << 6,
        3 => low | high << 8,
        _ => low >> 4 | high << 4,
    };
    hash & 0xFFF
}

#[cfg(test)]
mod tests;
