//! The device a guest sees: what each vhost-user message changes, and which of them take the rings from the workers first.
//!
//! One pattern for all of them: *quiesce* (take every ring back), change, *publish* (hand out the rings that run now). A
//! message that touches no running ring and starts none leaves the workers alone.

mod messages;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vhost::vhost_user::{Error, Result};

use super::port_handle::{FileId, PeerId, PortHandle, RingReport, Rings, SessionReport};
use super::port_state::{GuestState, RingState, way};
use super::state::{Direction, Hugepages, MemoryRegion, Peer, PortSpec, PortState, RingKind};
use crate::port::vhost::{FromGuest, ToGuest};
use crate::virtio::guest_mem::{GuestMem, MapOptions, Poison, PoisonCause};
use crate::virtio::ring::{Ring, Way, feature};

/// Memory regions a guest may have at one time (GET_MAX_MEM_SLOTS).
const SLOTS: u64 = 64;
/// Rings that vhost-user can name: the index of a kick or call has 8 bits.
const RINGS_MAX: u32 = 256;
/// VIRTIO_CONFIG_S_FEATURES_OK: the device takes the features the driver chose (virtio 1.2 §2.1).
const FEATURES_OK: u8 = 8;

/// Virtio features offered, with their names. A guest that reconnects must be offered the same ones again.
const FEATURES: [(u64, &str); 9] = [
    (feature::MRG_RXBUF, "MRG_RXBUF"),
    (feature::CTRL_VQ, "CTRL_VQ"),
    (feature::GUEST_ANNOUNCE, "GUEST_ANNOUNCE"),
    (feature::INDIRECT_DESC, "INDIRECT_DESC"),
    (feature::EVENT_IDX, "EVENT_IDX"),
    (feature::PROTOCOL_FEATURES, "PROTOCOL_FEATURES"),
    (feature::VERSION_1, "VERSION_1"),
    (feature::RING_PACKED, "RING_PACKED"),
    (feature::IN_ORDER, "IN_ORDER"),
];

/// Protocol features offered, with their names.
const PROTOCOL_FEATURES: [(VhostUserProtocolFeatures, &str); 6] = [
    (VhostUserProtocolFeatures::MQ, "MQ"),
    (VhostUserProtocolFeatures::REPLY_ACK, "REPLY_ACK"),
    (VhostUserProtocolFeatures::MTU, "MTU"),
    (VhostUserProtocolFeatures::RESET_DEVICE, "RESET_DEVICE"),
    (
        VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS,
        "CONFIGURE_MEM_SLOTS",
    ),
    (VhostUserProtocolFeatures::STATUS, "STATUS"),
];

/// One guest's device, from the moment it connects until it leaves.
///
/// Used by the session's thread alone; the lock around it is what the `vhost` crate asks for.
pub(super) struct Device {
    handle: Arc<dyn PortHandle>,
    stopping: Arc<AtomicBool>,
    peer: Option<PeerId>,
    pairs: u16,
    mtu: u32,
    frame_max: u32,
    options: MapOptions,
    poison: Arc<Poison>,
    guest: GuestState,
    /// The workers have rings of this guest.
    live: bool,
    /// What was wrong with a message, in a sentence with the remedy. Goes when rings run.
    complaint: Option<String>,
    /// Queue pairs the guest has spoken of, where they are more than the port has.
    asked_pairs: u16,
    /// Why the guest cannot be called, if so.
    uncalled: Option<String>,
    /// What a worker found wrong with a ring.
    lie: Option<String>,
    /// Something changed that a report tells.
    changed: bool,
    /// Workers had to give rings back.
    handed_over: bool,
}

impl Device {
    pub(super) fn new(
        spec: &PortSpec,
        handle: Arc<dyn PortHandle>,
        stopping: Arc<AtomicBool>,
        peer: Option<PeerId>,
        options: &MapOptions,
    ) -> Device {
        Device {
            handle,
            stopping,
            peer,
            pairs: spec.queues,
            mtu: spec.mtu,
            frame_max: spec.frame_max() as u32,
            options: options.clone(),
            poison: Poison::new(),
            guest: GuestState::new(spec.queues),
            live: false,
            complaint: None,
            asked_pairs: 0,
            uncalled: None,
            lie: None,
            changed: true,
            handed_over: false,
        }
    }

    /// What a port accepts as memory. One per port: all its guests draw on one budget.
    pub(super) fn map_options(spec: &PortSpec) -> MapOptions {
        MapOptions {
            require_hugetlb: spec.hugepages == Hugepages::Required,
            max_regions: SLOTS as usize,
            ..MapOptions::default()
        }
    }

    /// Why this guest must go, if it must: it took memory away, or lied in a ring.
    pub(super) fn broken(&mut self) -> Option<String> {
        if !self.poison.is_set() {
            return None;
        }
        self.quiesce();
        let (cause, lie) = (self.poison.cause(), self.lie.take());
        match cause {
            // Where memory was taken away there are zeros of our own: what rings then seem to say is no lie of the guest's.
            Some(PoisonCause::Lie) if lie.is_some() => lie,
            cause => cause.map(|cause| format!("the guest is at fault: {cause}")),
        }
    }

    /// Takes back all rings: the end of this guest's service.
    pub(super) fn leave(&mut self) {
        self.quiesce();
        self.guest = GuestState::new(self.pairs);
        let nothing = self.handle.claim(self.peer, &[]);
        debug_assert_eq!(nothing, Ok(()), "giving up is never refused");
    }

    pub(super) fn has_memory(&self) -> bool {
        self.guest.mem.is_some()
    }

    pub(super) fn acknowledges(&self) -> bool {
        self.guest.protocol_features & VhostUserProtocolFeatures::REPLY_ACK.bits() != 0
    }

    pub(super) fn has_protocol_features(&self) -> bool {
        self.guest.has(feature::PROTOCOL_FEATURES)
    }

    pub(super) fn complaint(&self) -> Option<&str> {
        self.complaint.as_deref()
    }

    /// Remembers what is wrong.
    pub(super) fn complain(&mut self, why: String) {
        self.complaint = Some(why);
        self.changed = true;
    }

    /// True once after each change.
    pub(super) fn take_changed(&mut self) -> bool {
        std::mem::take(&mut self.changed)
    }

    /// True once after each time that workers had to give rings back.
    pub(super) fn take_handed_over(&mut self) -> bool {
        std::mem::take(&mut self.handed_over)
    }

    pub(super) fn report(&self, peer: Option<Peer>) -> SessionReport {
        let legacy = self.guest.features.is_some() && !self.guest.has(feature::VERSION_1);
        let state = match (self.live, legacy) {
            (true, _) => PortState::Forwarding,
            (_, true) => PortState::Error,
            _ => PortState::Connected,
        };
        let features = self.guest.features.unwrap_or(0);
        SessionReport {
            state,
            reason: self.complaint.clone().or_else(|| self.restriction()),
            peer,
            features: named(&FEATURES, |bit| features & bit != 0)
                .chain((features & feature::MQ != 0).then(|| "MQ".to_owned()))
                .collect(),
            protocol_features: named(&PROTOCOL_FEATURES, |bit| {
                self.guest.protocol_features & bit.bits() != 0
            })
            .collect(),
            memory: self.guest.mem.iter().flat_map(|mem| memory(mem)).collect(),
            rings: self.rings().collect(),
            uplink: None,
        }
    }

    /// What a guest that is served has to do without.
    fn restriction(&self) -> Option<String> {
        let (asked, pairs) = (self.asked_pairs, self.pairs);
        let fewer = (asked > pairs).then(|| {
            format!(
                "the guest has set up {asked} queue pairs, the port has {pairs}: it is served as long as it uses no more; \
                 queues={asked} gives it all"
            )
        });
        fewer.or_else(|| self.uncalled.clone())
    }

    fn rings(&self) -> impl Iterator<Item = RingReport> {
        let kind = if self.guest.has(feature::RING_PACKED) {
            RingKind::Packed
        } else {
            RingKind::Split
        };
        let implicit = !self.guest.has(feature::PROTOCOL_FEATURES);
        let set_up = self.guest.rings.iter().enumerate();
        set_up
            .filter(|(_, ring)| ring.ready())
            .map(move |(index, ring)| RingReport {
                pair: index as u16 / 2,
                direction: match way(index) {
                    Way::FromGuest => Direction::FromGuest,
                    Way::ToGuest => Direction::ToGuest,
                },
                kind,
                size: ring.size.unwrap_or(0),
                enabled: ring.enabled || implicit,
            })
    }

    fn offered(&self) -> u64 {
        let bits = FEATURES.iter().fold(0, |bits, (bit, _)| bits | bit);
        // Offered to all, it would make a guest with more queues than the port set those up in vain.
        bits | if self.pairs > 1 { feature::MQ } else { 0 }
    }

    /// Takes all rings from the workers. Their indices and descriptors fall back into the state.
    fn quiesce(&mut self) {
        if !std::mem::take(&mut self.live) {
            return;
        }
        self.handed_over = true;
        let rings = self.handle.detach();
        for (pair, queue) in rings.from_guest {
            self.note_lie(pair, "transmit", queue.lie().map(|lie| lie.to_string()));
            let (ring, call, kick) = queue.into_parts();
            if let Some(state) = self.guest.rings.get_mut(2 * usize::from(pair) + 1) {
                (state.base, state.call, state.kick) = (ring.base(), call, kick);
            }
        }
        for (pair, queue) in rings.to_guest {
            self.note_lie(pair, "receive", queue.lie().map(|lie| lie.to_string()));
            let (ring, call) = queue.into_parts();
            if let Some(state) = self.guest.rings.get_mut(2 * usize::from(pair)) {
                (state.base, state.call) = (ring.base(), call);
            }
        }
        self.guest
            .rings
            .iter_mut()
            .for_each(|ring| ring.live = false);
        self.changed = true;
    }

    fn note_lie(&mut self, pair: u16, ring: &str, lie: Option<String>) {
        if let Some(lie) = lie {
            self.lie = Some(format!(
                "the guest's driver is at fault: {ring} ring of queue pair {pair}: {lie}"
            ));
        }
    }

    /// Hands every ring that runs to the workers. Not done if one of them cannot be built: nothing runs then.
    fn publish(&mut self) -> std::result::Result<(), String> {
        debug_assert!(!self.live, "detach comes before attach");
        self.changed = true;
        if self.poison.is_set() || self.stopping.load(Ordering::Acquire) {
            return Ok(());
        }
        let mut built = Vec::new();
        for index in (0..self.guest.rings.len()).filter(|index| self.guest.runs(*index)) {
            let Some(setup) = self.guest.setup(index) else {
                continue;
            };
            let ring = Ring::new(setup).map_err(|bad| {
                format!("ring {index}: {bad}; the frontend is at fault, or its memory table lacks the ring")
            })?;
            built.push((index, ring));
        }
        if built.is_empty() {
            return Ok(());
        }
        let rings = self.equip(built);
        if let Err(error) = self.handle.attach(rings) {
            self.guest
                .rings
                .iter_mut()
                .for_each(|ring| ring.live = false);
            return Err(format!("no worker takes the rings: {error}"));
        }
        self.live = true;
        self.complaint = None;
        Ok(())
    }

    /// Gives each ring its descriptors.
    fn equip(&mut self, built: Vec<(usize, Ring)>) -> Rings {
        let mergeable = self.guest.has(feature::MRG_RXBUF);
        let mut rings = Rings::default();
        for (index, ring) in built {
            let (state, pair) = (&mut self.guest.rings[index], index as u16 / 2);
            state.live = true;
            let call = state.call.take();
            match way(index) {
                Way::FromGuest => {
                    let queue = FromGuest::new(ring, call, state.kick.take(), self.frame_max);
                    rings.from_guest.push((pair, queue));
                }
                Way::ToGuest => {
                    let mut queue = ToGuest::new(ring, call, mergeable);
                    queue.look();
                    rings.to_guest.push((pair, queue));
                }
            }
        }
        rings
    }

    /// Quiesce, change all, publish.
    fn alter_all(&mut self, change: impl FnOnce(&mut GuestState)) -> Result<()> {
        self.quiesce();
        change(&mut self.guest);
        self.publish().map_err(|why| self.refuse(why))
    }

    /// Quiesce, change one ring, publish; or only change it, if no worker has it or will have it.
    fn alter(&mut self, index: usize, change: impl FnOnce(&mut RingState)) -> Result<()> {
        if self.guest.rings[index].live {
            return self.alter_all(|guest| change(&mut guest.rings[index]));
        }
        change(&mut self.guest.rings[index]);
        self.changed = true;
        if self.guest.runs(index) {
            return self.alter_all(|_| ());
        }
        Ok(())
    }

    /// Puts a new memory table in the place of the old one, unless it holds another guest's memory. Rings whose addresses it
    /// does not hold wait for the next one.
    fn adopt(&mut self, mem: GuestMem, offsets: Vec<(u64, u64)>) -> Result<()> {
        let mut files: Vec<FileId> = mem.inodes().collect();
        files.sort_unstable();
        files.dedup();
        if let Err(why) = self.handle.claim(self.peer, &files) {
            return Err(self.refuse(why));
        }
        self.quiesce();
        // The workers have left the old table: its last holder, this line, unmaps it before the frontend gets its answer.
        self.guest.mem = Some(Arc::new(mem));
        self.guest.offsets = offsets;
        if let Err(why) = self.publish() {
            self.complaint = Some(why);
        }
        Ok(())
    }

    /// The same; the error to return.
    fn refuse(&mut self, why: String) -> Error {
        self.complain(why);
        Error::InvalidParam
    }

    /// The place of a ring, if the port has it.
    fn index(&mut self, index: u32, message: &str) -> Result<usize> {
        let known = usize::try_from(index)
            .ok()
            .filter(|index| *index < self.guest.rings.len());
        known.ok_or_else(|| {
            let pairs = self.pairs;
            self.refuse(format!(
                "{message} for ring {index}, but the port has {pairs} queue pairs: give the port as many queues as its guest \
                 uses (queues=...)"
            ))
        })
    }

    /// The same; `None`: a ring of a queue pair that the port lacks and the guest has, but may never use.
    ///
    /// DPDK's virtio_user learns from nobody how many pairs there are: it sets up all that its own options name, and enables
    /// those the application uses. Nothing is kept of the others. A port with one pair does not offer MQ, and such a guest
    /// falls back to one pair by itself.
    fn place(&mut self, index: u32, message: &str) -> Result<Option<usize>> {
        let spare = usize::try_from(index).is_ok_and(|at| at >= self.guest.rings.len());
        let many = self.pairs > 1
            && self
                .guest
                .features
                .is_none_or(|features| features & feature::MQ != 0);
        if !(spare && many && index < RINGS_MAX) {
            return self.index(index, message).map(Some);
        }
        let pairs = index as u16 / 2 + 1;
        if pairs > self.asked_pairs {
            self.asked_pairs = pairs;
            self.changed = true;
        }
        Ok(None)
    }

    pub(super) fn enable(&mut self, index: u32, enable: bool) -> Result<()> {
        if !enable && self.place(index, "SET_VRING_ENABLE")?.is_none() {
            return Ok(());
        }
        let index = self.index(index, "SET_VRING_ENABLE")?;
        if self.guest.rings[index].enabled == enable {
            return Ok(());
        }
        self.alter(index, |ring| ring.enabled = enable)
    }

    pub(super) fn status(&self) -> u8 {
        self.guest.status
    }

    /// 0 resets: the rings stop. Their indices stay, frontends ask for them afterwards.
    pub(super) fn set_status(&mut self, status: u8) -> Result<()> {
        if status == 0 {
            self.stop_rings()?;
        }
        let legacy = self.guest.features.is_some() && !self.guest.has(feature::VERSION_1);
        self.guest.status = if legacy {
            status & !FEATURES_OK
        } else {
            status
        };
        Ok(())
    }

    fn stop_rings(&mut self) -> Result<()> {
        self.alter_all(|guest| {
            for ring in &mut guest.rings {
                ring.started = false;
                ring.kick = None;
            }
        })
    }

    pub(super) fn set_mtu(&mut self, mtu: u64) -> Result<()> {
        let most = self.mtu;
        if mtu > u64::from(most) {
            return Err(self.refuse(format!(
                "the guest wants an MTU of {mtu}, the port takes {most}: raise the port's mtu, or lower the guest's host_mtu"
            )));
        }
        Ok(())
    }
}

fn named<'a, B: Copy>(
    table: &'a [(B, &str)],
    set: impl Fn(B) -> bool + 'a,
) -> impl Iterator<Item = String> + 'a {
    let set = table.iter().filter(move |(bit, _)| set(*bit));
    set.map(|(_, name)| (*name).to_owned())
}

fn memory(mem: &GuestMem) -> impl Iterator<Item = MemoryRegion> + '_ {
    mem.regions().map(|region| MemoryRegion {
        guest_address: region.gpa(),
        size: region.len(),
        page_size: region.page_size(),
        armed: region.armed(),
    })
}
