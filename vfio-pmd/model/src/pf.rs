//! The PF's driver: what each VF may, what it asked for, and the answers of Linux's ixgbe.
//!
//! Policy is data ([`PfPolicy`], [`VfPolicy`]); the code knows only the protocol.

use std::collections::BTreeSet;

use crate::mailbox::Words;

/// A MAC address.
pub type Mac = [u8; 6];

// Message types (word 0, bits 15:0).
const RESET: u32 = 0x01;
const SET_MAC: u32 = 0x02;
const SET_MULTICAST: u32 = 0x03;
const SET_VLAN: u32 = 0x04;
const SET_LPE: u32 = 0x05;
const SET_MACVLAN: u32 = 0x06;
const NEGOTIATE: u32 = 0x08;
const GET_QUEUES: u32 = 0x09;
const GET_RETA: u32 = 0x0a;
const GET_RSS_KEY: u32 = 0x0b;
const XCAST_MODE: u32 = 0x0c;
const GET_LINK_STATE: u32 = 0x10;
const CONTROL: u32 = 0x0100;
// Flags of word 0.
const ACK: u32 = 1 << 31;
pub(crate) const NACK: u32 = 1 << 30;
const CTS: u32 = 1 << 29;

/// Receive address registers of the port.
const RAR_ENTRIES: usize = 128;
/// Of these, the PF keeps so many for itself.
const PF_RARS: usize = 16;
/// VLANs the port can filter.
const VLVF_ENTRIES: usize = 64;
/// Largest frame of the device, FCS included.
const FRAME_MAX: u32 = 9728;
const FRAME_MIN: u32 = 68;
/// Largest frame at MTU 1500, without FCS.
const ETH_FRAME: u32 = 1514;

/// A version of the mailbox protocol, in the order of features (the wire numbers are not in that order).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Default)]
pub enum Api {
    /// 1.0, what every PF speaks and every reset returns to.
    #[default]
    V10,
    /// 1.1: queues, jumbo frames.
    V11,
    /// 1.2: RSS queries, cast modes, link state.
    V12,
    /// 1.3: promiscuous mode.
    V13,
    /// 1.4: IPsec.
    V14,
    /// 1.5: the mailbox is kept until the acknowledgement.
    V15,
}

impl Api {
    /// The number on the wire, if it is one of these.
    fn from_wire(wire: u32) -> Option<Api> {
        Some(match wire {
            0 => Api::V10,
            2 => Api::V11,
            3 => Api::V12,
            4 => Api::V13,
            5 => Api::V14,
            6 => Api::V15,
            _ => return None,
        })
    }
}

/// What the PF's administrator has set for the port.
#[derive(Clone, Debug)]
pub struct PfPolicy {
    /// The newest protocol the PF's driver speaks. Linux: 1.4.
    pub api: Api,
    /// MTU of the PF's interface.
    pub mtu: u32,
    /// Queues per VF, as GET_QUEUES says: 4 with at most 31 VFs, 2 with more.
    pub queues: u32,
    /// Queues over which the redirection table spreads.
    pub rss_queues: u32,
    /// How the multicast hash is taken from an address (0..=3).
    pub multicast_filter: u32,
}

impl Default for PfPolicy {
    fn default() -> Self {
        Self {
            api: Api::V14,
            mtu: 1500,
            queues: 4,
            rss_queues: 2,
            multicast_filter: 0,
        }
    }
}

/// What the PF's administrator has set for one VF (`ip link set PF vf N ...`).
#[derive(Clone, Debug)]
pub struct VfPolicy {
    /// The address the administrator gave; without one, the VF makes up its own.
    pub mac: Option<Mac>,
    /// `trust on`.
    pub trusted: bool,
    /// `spoofchk on`, the default.
    pub spoof_check: bool,
    /// A port VLAN the VF does not see.
    pub port_vlan: Option<u16>,
    /// `query_rss on`.
    pub query_rss: bool,
    /// `state enable|auto`; false is `state disable`.
    pub link_enabled: bool,
}

impl Default for VfPolicy {
    fn default() -> Self {
        Self {
            mac: None,
            trusted: false,
            spoof_check: true,
            port_vlan: None,
            query_rss: false,
            link_enabled: true,
        }
    }
}

/// What a VF hears besides its own addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Default)]
pub enum CastMode {
    /// Broadcast only.
    None,
    /// Broadcast and the multicast hashes it registered.
    #[default]
    Multi,
    /// All multicast.
    AllMulti,
}

/// The PF's books about one VF.
#[derive(Clone, Debug, Default)]
pub struct VfState {
    /// Given or requested; none before the first.
    pub mac: Option<Mac>,
    /// Addresses from SET_MACVLAN.
    pub macvlans: Vec<Mac>,
    /// Hashes from SET_MULTICAST.
    pub multicast: BTreeSet<u16>,
    /// VLANs from SET_VLAN.
    pub vlans: BTreeSet<u16>,
    /// The cast mode in force.
    pub cast: CastMode,
    /// The negotiated protocol.
    pub api: Api,
    /// The VF may send requests: it has been reset since the PF was.
    pub cts: bool,
    /// Its receive path is on.
    pub receives: bool,
    /// Its transmit path is on.
    pub transmits: bool,
    /// Source addresses are checked right now.
    pub spoof_check: bool,
    /// Largest frame it asked for, FCS included.
    pub frame_max: u32,
}

/// The PF.
pub(crate) struct Pf {
    pub(crate) policy: PfPolicy,
    pub(crate) grants: Vec<VfPolicy>,
    pub(crate) vfs: Vec<VfState>,
    /// Largest frame the port takes, FCS included: it only grows until the PF is reset.
    pub(crate) frame_max: u32,
    pub(crate) rss_key: [u32; 10],
}

impl Pf {
    pub(crate) fn new(policy: PfPolicy, grants: Vec<VfPolicy>) -> Self {
        let vfs = grants
            .iter()
            .map(|grant| VfState {
                mac: grant.mac,
                spoof_check: grant.spoof_check,
                ..VfState::default()
            })
            .collect();
        Self {
            frame_max: policy.mtu + 18,
            policy,
            grants,
            vfs,
            rss_key: crate::rss::KEY_WORDS,
        }
    }

    /// The PF's port starts over: every VF loses its leave to send.
    pub(crate) fn reset(&mut self) {
        self.frame_max = self.policy.mtu + 18;
        for vf in 0..self.vfs.len() {
            self.forget(vf);
        }
    }

    /// The VF was reset, or its leave to send is taken.
    pub(crate) fn forget(&mut self, vf: usize) {
        let state = &mut self.vfs[vf];
        state.cts = false;
        state.receives = false;
        state.transmits = false;
    }

    /// The word the PF sends by itself to make a VF look: with CTS if the VF may go on.
    pub(crate) fn ping(&self, vf: usize) -> u32 {
        CONTROL | if self.vfs[vf].cts { CTS } else { 0 }
    }

    /// Answers a request.
    pub(crate) fn answer(&mut self, vf: usize, message: &Words) -> Vec<u32> {
        let kind = message[0] & 0xffff;
        if kind == RESET {
            return self.reset_vf(vf);
        }
        if !self.vfs[vf].cts {
            return vec![message[0] | NACK];
        }
        let mut reply = message.to_vec();
        let granted = self.handle(vf, kind, &mut reply);
        reply[0] |= CTS | if granted { ACK } else { NACK };
        reply
    }

    fn handle(&mut self, vf: usize, kind: u32, words: &mut [u32]) -> bool {
        let info = words[0] >> 16 & 0xff;
        match kind {
            SET_MAC => self.set_mac(vf, mac(words)),
            SET_MULTICAST => self.set_multicast(vf, info as usize, words),
            SET_VLAN => self.set_vlan(vf, info == 1, words[1]),
            SET_LPE => self.set_frame_max(vf, words[1]),
            SET_MACVLAN => self.set_macvlan(vf, info, mac(words)),
            NEGOTIATE => self.negotiate(vf, words[1]),
            GET_QUEUES => self.queues(vf, words),
            GET_RETA => self.redirection(vf, words),
            GET_RSS_KEY => self.key(vf, words),
            XCAST_MODE => self.cast_mode(vf, words),
            GET_LINK_STATE if self.vfs[vf].api >= Api::V12 => {
                words[1] = u32::from(self.grants[vf].link_enabled);
                true
            }
            _ => false,
        }
    }

    fn reset_vf(&mut self, vf: usize) -> Vec<u32> {
        let jumbo = self.policy.mtu > 1500;
        let grant = &self.grants[vf];
        let state = &mut self.vfs[vf];
        *state = VfState {
            mac: grant.mac,
            cast: CastMode::Multi,
            cts: true,
            // A PF that takes jumbo frames keeps a VF's receive path closed until it has said that it takes them too.
            receives: !jumbo,
            transmits: true,
            // Only a port VLAN arms the check again; what a granted address switched off stays off.
            spoof_check: if grant.port_vlan.is_some() {
                grant.spoof_check
            } else {
                state.spoof_check
            },
            ..VfState::default()
        };
        // No administrative address: refused, and that is no error.
        let (answer, mac) = match grant.mac {
            Some(mac) => (ACK, mac),
            None => (NACK, [0; 6]),
        };
        let low = u32::from_le_bytes([mac[0], mac[1], mac[2], mac[3]]);
        let high = u32::from_le_bytes([mac[4], mac[5], 0, 0]);
        vec![RESET | answer, low, high, self.policy.multicast_filter]
    }

    /// The administrator's address may be replaced only by a VF he trusts.
    fn may_choose_address(&self, vf: usize) -> bool {
        self.grants[vf].mac.is_none() || self.grants[vf].trusted
    }

    fn set_mac(&mut self, vf: usize, mac: Mac) -> bool {
        if !is_unicast(mac) || (!self.may_choose_address(vf) && self.grants[vf].mac != Some(mac)) {
            return false;
        }
        self.vfs[vf].mac = Some(mac);
        true
    }

    fn set_multicast(&mut self, vf: usize, count: usize, words: &[u32]) -> bool {
        let hashes = words[1..]
            .iter()
            .flat_map(|word| [*word as u16, (word >> 16) as u16]);
        self.vfs[vf].multicast = hashes
            .take(count.min(30))
            .map(|hash| hash & 0xfff)
            .collect();
        true
    }

    fn set_vlan(&mut self, vf: usize, add: bool, vid: u32) -> bool {
        if self.grants[vf].port_vlan.is_some() || vid > 4095 {
            return false;
        }
        let vid = vid as u16;
        if !add {
            self.vfs[vf].vlans.remove(&vid);
            return true;
        }
        let used: BTreeSet<u16> = self.vfs.iter().flat_map(|vf| &vf.vlans).copied().collect();
        if !used.contains(&vid) && used.len() >= VLVF_ENTRIES {
            return false;
        }
        self.vfs[vf].vlans.insert(vid);
        true
    }

    fn set_frame_max(&mut self, vf: usize, frame: u32) -> bool {
        if !(FRAME_MIN..=FRAME_MAX).contains(&frame) {
            return false;
        }
        let pf_jumbo = self.policy.mtu > 1500;
        let legacy = self.vfs[vf].api < Api::V11;
        let refused = (legacy || !pf_jumbo) && (pf_jumbo || frame > ETH_FRAME + 4);
        let state = &mut self.vfs[vf];
        state.receives = !refused;
        if refused {
            return false;
        }
        state.frame_max = frame;
        self.frame_max = self.frame_max.max(frame);
        true
    }

    fn set_macvlan(&mut self, vf: usize, index: u32, mac: Mac) -> bool {
        if index > 0 && (!self.may_choose_address(vf) || !is_unicast(mac)) {
            return false;
        }
        if index <= 1 {
            self.vfs[vf].macvlans.clear();
        }
        if index == 0 {
            return true;
        }
        let used: usize = self.vfs.iter().map(|vf| vf.macvlans.len()).sum();
        if used >= self.macvlan_pool() {
            return false;
        }
        self.vfs[vf].macvlans.push(mac);
        // A VF with several addresses sends from all of them.
        self.vfs[vf].spoof_check = false;
        true
    }

    /// Addresses that all VFs together may register besides their own.
    pub(crate) fn macvlan_pool(&self) -> usize {
        RAR_ENTRIES.saturating_sub(PF_RARS + self.vfs.len())
    }

    fn negotiate(&mut self, vf: usize, wire: u32) -> bool {
        match Api::from_wire(wire) {
            Some(api) if api <= self.policy.api => {
                self.vfs[vf].api = api;
                true
            }
            _ => false,
        }
    }

    fn queues(&self, vf: usize, words: &mut [u32]) -> bool {
        if self.vfs[vf].api < Api::V11 {
            return false;
        }
        words[1] = self.policy.queues;
        words[2] = self.policy.queues;
        words[3] = u32::from(self.grants[vf].port_vlan.is_some());
        words[4] = 0;
        true
    }

    fn may_query_rss(&self, vf: usize) -> bool {
        self.vfs[vf].api >= Api::V12 && self.grants[vf].query_rss
    }

    fn redirection(&self, vf: usize, words: &mut [u32]) -> bool {
        if !self.may_query_rss(vf) {
            return false;
        }
        // 128 entries of two bits.
        for (at, word) in words[1..9].iter_mut().enumerate() {
            let entries = (0..16)
                .map(|entry| ((at as u32 * 16 + entry) % self.policy.rss_queues) << (2 * entry));
            *word = entries.fold(0, |all, entry| all | entry);
        }
        true
    }

    fn key(&self, vf: usize, words: &mut [u32]) -> bool {
        if !self.may_query_rss(vf) {
            return false;
        }
        words[1..11].copy_from_slice(&self.rss_key);
        true
    }

    fn cast_mode(&mut self, vf: usize, words: &mut [u32]) -> bool {
        let api = self.vfs[vf].api;
        let asked = words[1];
        if api < Api::V12 || (asked == 3 && api < Api::V13) || asked > 3 {
            return false;
        }
        // An untrusted VF silently gets less than it asked for: the answer's word says how much.
        let mode = if asked > 1 && !self.grants[vf].trusted {
            1
        } else {
            asked
        };
        let cast = match mode {
            0 => CastMode::None,
            1 => CastMode::Multi,
            2 => CastMode::AllMulti,
            // The 82599 has no unicast promiscuous mode for VFs.
            _ => return false,
        };
        self.vfs[vf].cast = cast;
        words[1] = mode;
        true
    }
}

fn mac(words: &[u32]) -> Mac {
    let (low, high) = (words[1].to_le_bytes(), words[2].to_le_bytes());
    [low[0], low[1], low[2], low[3], high[0], high[1]]
}

fn is_unicast(mac: Mac) -> bool {
    mac[0] & 1 == 0 && mac != [0; 6]
}

/// The 12-bit hash under which a multicast address is filtered.
pub fn multicast_hash(filter: u32, mac: Mac) -> u16 {
    let (low, high) = (u16::from(mac[4]), u16::from(mac[5]));
    let hash = match filter {
        0 => low >> 4 | high << 4,
        1 => low >> 3 | high << 5,
        2 => low >> 2 | high << 6,
        _ => low | high << 8,
    };
    hash & 0xfff
}

#[cfg(test)]
mod tests;
