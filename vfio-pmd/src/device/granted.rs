//! What a VF asks its PF for and is granted or refused: addresses, VLANs, modes, the longest frame; and all of it again after a reset.

use std::hash::{BuildHasher, Hasher, RandomState};

use super::{ADDRESSES_MAX, FCS, FRAME_STANDARD, Vf};
use crate::error::Result;
use crate::mailbox::{Api, Cast, MULTICAST_MAX, Mac, Mailbox, MailboxError, multicast_hash};

impl Vf {
    /// Registers further unicast addresses in place of those before; says for each whether the PF took it.
    pub fn set_addresses(&mut self, wanted: &[Mac]) -> Result<Vec<bool>> {
        self.note(Mailbox::clear_addresses)
            .map_err(|error| self.pf("clearing addresses", error))?;
        self.addresses.clear();
        wanted.iter().map(|mac| self.add_address(*mac)).collect()
    }

    /// Registers one more unicast address; false if the PF refuses. PFs share one pool of about a hundred among all VFs of a port,
    /// and refuse an untrusted VF whose own address they set.
    pub fn add_address(&mut self, mac: Mac) -> Result<bool> {
        if self.addresses.contains(&mac) {
            return Ok(true);
        }
        // The first of a list has number 1, which makes the PF forget the list before.
        let index = self.addresses.len() + 1;
        if index > ADDRESSES_MAX {
            return Ok(false);
        }
        match self.note(|mailbox| mailbox.add_address(index as u32, mac)) {
            Ok(()) => {
                self.addresses.push(mac);
                Ok(true)
            }
            Err(MailboxError::Refused) => Ok(false),
            Err(error) => Err(self.pf("registering an address", error)),
        }
    }

    /// The further addresses that are registered.
    pub fn addresses(&self) -> &[Mac] {
        &self.addresses
    }

    /// Replaces the multicast addresses; asks for all multicast if they are more than a PF keeps.
    pub fn set_multicast(&mut self, wanted: &[Mac]) -> Result<()> {
        self.multicast = wanted.to_vec();
        let mut hashes: Vec<u16> = wanted
            .iter()
            .map(|mac| multicast_hash(*mac, self.filter_type))
            .collect();
        hashes.sort_unstable();
        hashes.dedup();
        if hashes.len() > MULTICAST_MAX {
            hashes.truncate(MULTICAST_MAX);
            self.set_cast(self.cast.max(Cast::AllMulti))?;
        }
        self.note(|mailbox| mailbox.set_multicast(&hashes))
            .map_err(|error| self.pf("registering multicast addresses", error))
    }

    /// Asks for more frames than those for registered addresses; says what was granted, which may be less. Without an answer to be
    /// had (old PFs, a refusal) it is what every VF has.
    pub fn set_cast(&mut self, wanted: Cast) -> Result<Cast> {
        self.cast = wanted;
        match self.note(|mailbox| mailbox.cast(wanted)) {
            Ok(granted) => Ok(granted),
            Err(MailboxError::Refused) if wanted == Cast::Promiscuous => {
                self.cast = Cast::AllMulti;
                self.set_cast(Cast::AllMulti)
            }
            Err(MailboxError::Refused) => Ok(Cast::Multi),
            Err(error) => Err(self.pf("asking for a multicast mode", error)),
        }
    }

    /// Lets frames of a VLAN through, or no longer; false if the PF refuses (it gave this VF a VLAN of its own).
    pub fn set_vlan(&mut self, vid: u16, on: bool) -> Result<bool> {
        match self.note(|mailbox| mailbox.set_vlan(vid, on)) {
            Ok(()) if on => self.vlans.insert(vid),
            Ok(()) => self.vlans.remove(&vid),
            Err(MailboxError::Refused) => return Ok(false),
            Err(error) => return Err(self.pf("registering a VLAN", error)),
        };
        Ok(true)
    }

    /// Whether the PF's administrator lets the link be up, where the PF says it.
    pub fn link_enabled(&mut self) -> Result<Option<bool>> {
        self.note(Mailbox::link_enabled)
            .map_err(|error| self.pf("asking for the link state", error))
    }

    pub(super) fn settle_mac(&mut self, given: Option<Mac>) -> Result<()> {
        self.mac_from_pf = given.is_some();
        let wanted = match (self.options.mac, given) {
            (Some(mac), _) | (None, Some(mac)) => mac,
            // Nobody chose: once random, then always the same.
            (None, None) if self.mac != [0; 6] => self.mac,
            (None, None) => random_mac(),
        };
        match self.mailbox.set_mac(wanted) {
            Ok(()) => {}
            Err(MailboxError::Refused) if given == Some(wanted) => {}
            Err(error) => return Err(self.pf("setting the VF's address", error)),
        }
        self.mac = wanted;
        Ok(())
    }

    /// Tells the longest frame, always: a PF with a larger MTU lets a VF receive nothing before that.
    pub(super) fn settle_max_frame(&mut self) -> Result<()> {
        let wanted = self.options.max_frame;
        for bytes in [wanted, FRAME_STANDARD] {
            match self.mailbox.set_max_frame(bytes + FCS) {
                Ok(()) => {
                    self.max_frame = bytes;
                    return Ok(());
                }
                Err(MailboxError::Refused) => {}
                Err(error) => return Err(self.pf("setting the longest frame", error)),
            }
        }
        Err(self.pf("setting the longest frame", MailboxError::Refused))
    }

    pub(super) fn register_again(&mut self) -> Result<()> {
        let addresses = std::mem::take(&mut self.addresses);
        self.set_addresses(&addresses)?;
        if self.api() >= Api::V1_2 {
            self.set_cast(self.cast)?;
        }
        if !self.multicast.is_empty() {
            self.set_multicast(&self.multicast.clone())?;
        }
        for vid in self.vlans.clone() {
            if !self.set_vlan(vid, true)? {
                self.vlans.remove(&vid);
            }
        }
        Ok(())
    }
}

/// A locally administered unicast address. What keys hash maps is the kernel's randomness, by a system call: a confined process may
/// have no file for it.
fn random_mac() -> Mac {
    let [mut mac @ .., _, _] = RandomState::new().build_hasher().finish().to_le_bytes();
    mac[0] = mac[0] & !1 | 2;
    mac
}
