//! How a VF is set up, and what no VF can do.

use super::{FRAME_JUMBO, FRAME_STANDARD};
use crate::mailbox::Mac;

/// How a VF is set up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// Queue pairs wanted: 1, 2 or 4; the PF may grant fewer.
    pub queues: u32,
    /// Receive descriptors per queue, a power of two from 128 to 4096.
    pub rx_ring: u32,
    /// Transmit descriptors per queue, a power of two from 128 to 4096.
    pub tx_ring: u32,
    /// Longest untagged frame without FCS, up to [`FRAME_JUMBO`].
    pub max_frame: u32,
    /// The VF's address; without it the PF's, or a random one.
    pub mac: Option<Mac>,
    /// VLAN tags are moved from received frames to [`crate::rx::RxFrame::vlan`].
    pub strip_vlan: bool,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            queues: 1,
            rx_ring: 512,
            tx_ring: 512,
            max_frame: FRAME_STANDARD,
            mac: None,
            strip_vlan: false,
        }
    }
}

impl Options {
    pub(super) fn check(&self) -> Result<(), String> {
        if ![1, 2, 4].contains(&self.queues) {
            return Err(format!("queues = {}: use 1, 2 or 4", self.queues));
        }
        for size in [self.rx_ring, self.tx_ring] {
            if !size.is_power_of_two() || !(128..=4096).contains(&size) {
                return Err(format!(
                    "a ring of {size}: use a power of two from 128 to 4096"
                ));
            }
        }
        if !(64..=FRAME_JUMBO).contains(&self.max_frame) {
            return Err(format!(
                "frames of {} bytes: use 64 to {FRAME_JUMBO}",
                self.max_frame
            ));
        }
        match self.mac {
            Some(mac) if mac[0] & 1 != 0 || mac == [0; 6] => {
                Err("its address must be a unicast address".into())
            }
            _ => Ok(()),
        }
    }
}
