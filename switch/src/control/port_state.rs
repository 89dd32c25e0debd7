//! All that a port needs to go on with its guest, in a form that can outlive the process: plain numbers and descriptors.
//!
//! A session changes it message by message; rings are built from it and fall back into it. Whoever has this, the connection
//! and the descriptors can serve the guest without the guest noticing.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use crate::port::call::Call;
use crate::virtio::guest_mem::GuestMem;
use crate::virtio::ring::{RingSetup, Way, feature};

/// What a guest and the switch have agreed on, and how far their rings have come.
#[derive(Default)]
pub struct GuestState {
    /// SET_FEATURES; none: not yet.
    pub features: Option<u64>,
    /// SET_PROTOCOL_FEATURES.
    pub protocol_features: u64,
    /// Device status (virtio 1.2 §2.1).
    pub status: u8,
    /// The shared memory. Holds the files.
    pub mem: Option<Arc<GuestMem>>,
    /// Where in its file each region of `mem` lies, by guest address.
    pub offsets: Vec<(u64, u64)>,
    /// Every ring the port offers: the receive ring of pair p is 2p, its transmit ring 2p + 1.
    pub rings: Vec<RingState>,
}

impl GuestState {
    /// A guest that has said nothing yet.
    pub fn new(pairs: u16) -> GuestState {
        GuestState {
            rings: (0..2 * pairs).map(|_| RingState::default()).collect(),
            ..GuestState::default()
        }
    }

    /// Whether all of `bits` were negotiated.
    pub fn has(&self, bits: u64) -> bool {
        self.features
            .is_some_and(|features| features & bits == bits)
    }

    /// Whether the ring is set up, started and enabled. Without vhost-user's protocol features there is no enabling.
    pub fn runs(&self, index: usize) -> bool {
        let Some(ring) = self.rings.get(index) else {
            return false;
        };
        let enabled = ring.enabled || !self.has(feature::PROTOCOL_FEATURES);
        let agreed = self.has(feature::VERSION_1) && self.mem.is_some();
        agreed && enabled && ring.ready()
    }

    /// What the ring is built from, if it is set up.
    pub fn setup(&self, index: usize) -> Option<RingSetup> {
        let ring = self.rings.get(index)?;
        let at = ring.at?;
        Some(RingSetup {
            mem: self.mem.clone()?,
            size: ring.size?,
            desc: at.desc,
            avail: at.avail,
            used: at.used,
            base: ring.base,
            features: self.features?,
            way: way(index),
        })
    }
}

/// Which way the frames of ring `index` go.
pub fn way(index: usize) -> Way {
    if index.is_multiple_of(2) {
        Way::ToGuest
    } else {
        Way::FromGuest
    }
}

/// One ring.
#[derive(Default)]
pub struct RingState {
    /// SET_VRING_NUM.
    pub size: Option<u16>,
    /// SET_VRING_ADDR, as the frontend gave it: translated anew for every memory table.
    pub at: Option<RingAddr>,
    /// SET_VRING_BASE, then how far the ring has come.
    pub base: u32,
    /// SET_VRING_KICK came: the ring is started. GET_VRING_BASE stops it.
    pub started: bool,
    /// The guest's kick eventfd, while no worker has it. A started ring without one is polled.
    pub kick: Option<OwnedFd>,
    /// The guest's call eventfd, while no worker has it.
    pub call: Option<Call>,
    /// SET_VRING_ENABLE; remembered if it comes before SET_FEATURES (QEMU does that).
    pub enabled: bool,
    /// A worker has it.
    pub live: bool,
}

impl RingState {
    /// Whether the frontend has said all about it.
    pub fn ready(&self) -> bool {
        self.size.is_some() && self.at.is_some() && self.started
    }

    /// Forgets everything but the call descriptor, which frontends send once.
    pub fn reset(&mut self) {
        *self = RingState {
            call: self.call.take(),
            ..RingState::default()
        };
    }
}

/// Where a ring lies, in the frontend's addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingAddr {
    /// Descriptor table, or the packed ring.
    pub desc: u64,
    /// Available ring; packed: what the driver wants to be told.
    pub avail: u64,
    /// Used ring; packed: what the device wants to be told.
    pub used: u64,
}
