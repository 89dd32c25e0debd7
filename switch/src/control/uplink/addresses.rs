//! Which stations the PF delivers frames for, which it refused, and what to do about those.

use std::time::{Duration, Instant};

use vfio_pmd::{Vf, mailbox};

use super::super::state::RefusedAddress;
use crate::dataplane::eth::Mac;

/// Before a refused address is asked for again: the operator may have said `trust on`.
const ASK_AGAIN: Duration = Duration::from_secs(30);
/// Refused addresses that are named one by one in a sentence.
const NAMED: usize = 8;

/// The list of addresses at the PF.
pub(super) struct Addresses {
    /// Stations that the PF refused, as of `asked`.
    refused: Vec<Mac>,
    /// How often it refused any since the port was added.
    refusals: u64,
    /// What would help.
    remedy: &'static str,
    asked: Instant,
}

impl Addresses {
    pub(super) fn new() -> Addresses {
        Addresses {
            refused: Vec::new(),
            refusals: 0,
            remedy: "",
            asked: Instant::now(),
        }
    }

    /// The PF is asked anew.
    pub(super) fn begin(&mut self) {
        self.refused.clear();
    }

    /// How often the PF refused an address.
    pub(super) fn refusals(&self) -> u64 {
        self.refusals
    }

    /// Registers the stations behind the other ports; forgets those that have gone when there is no room for new ones.
    pub(super) fn register(&mut self, vf: &mut Vf, stations: &[Mac]) -> vfio_pmd::Result<()> {
        if self.asked.elapsed() >= ASK_AGAIN {
            self.asked = Instant::now();
            self.refused.clear();
        }
        let known = |vf: &Vf, mac: &Mac| {
            vf.addresses().contains(&mac.to_bytes()) || vf.mac() == mac.to_bytes()
        };
        self.refused.retain(|mac| stations.contains(mac));
        let gone = vf
            .addresses()
            .iter()
            .any(|mac| !stations.contains(&Mac::from_bytes(*mac)));
        let fresh: Vec<Mac> = stations
            .iter()
            .filter(|mac| !known(vf, mac) && !self.refused.contains(mac))
            .copied()
            .collect();
        for mac in fresh {
            if !vf.add_address(mac.to_bytes())? {
                self.refuse(vf, mac);
            }
        }
        // The pool may be full of stations that have left: the list is sent anew, once.
        if gone && !self.refused.is_empty() {
            self.refused.clear();
            let wanted: Vec<mailbox::Mac> = stations
                .iter()
                .filter(|mac| vf.mac() != mac.to_bytes())
                .map(|mac| mac.to_bytes())
                .collect();
            let granted = vf.set_addresses(&wanted)?;
            for (mac, _) in wanted.iter().zip(granted).filter(|(_, granted)| !granted) {
                self.refuse(vf, Mac::from_bytes(*mac));
            }
        }
        Ok(())
    }

    fn refuse(&mut self, vf: &Vf, mac: Mac) {
        self.refused.push(mac);
        self.refusals += 1;
        // A PF that has taken some does not mind this VF: it has no room.
        self.remedy = if vf.addresses().is_empty() {
            "set trust on and spoofchk off for this VF (ip link set PF vf N trust on spoofchk off); if they are, other VFs have used \
             up the addresses that all VFs of the port share"
        } else {
            "the addresses that all VFs of the port share, about a hundred, are used up: have fewer stations behind this switch or at \
             the other VFs"
        };
    }

    /// One by one, with the remedy.
    pub(super) fn refused(&self) -> Vec<RefusedAddress> {
        let remedy = self.remedy.to_owned();
        let refused = self.refused.iter().map(|mac| RefusedAddress {
            mac: *mac,
            remedy: remedy.clone(),
        });
        refused.collect()
    }

    /// A sentence about those the PF refused, if there are any.
    pub(super) fn complaint(&self) -> Option<String> {
        let named: Vec<String> = self
            .refused
            .iter()
            .take(NAMED)
            .map(Mac::to_string)
            .collect();
        let more = if self.refused.len() > NAMED {
            ", ..."
        } else {
            ""
        };
        let count = self.refused.len();
        (count > 0).then(|| {
            format!(
                "{count} stations cannot be reached from the wire, the PF refused their addresses ({}{more}): {}",
                named.join(", "),
                self.remedy
            )
        })
    }
}
