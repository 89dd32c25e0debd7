//! The device a guest sees: what each vhost-user message changes, and which of them take the rings from the workers first.
//!
//! One pattern for all of them: *quiesce* (take every ring back), change, *publish* (hand out the rings that run now). A
//! message that touches no running ring and starts none leaves the workers alone.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig,
    VhostUserSharedMsg, VhostUserSingleMemoryRegion, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{Error, GpuBackend, Result, VhostUserBackendReqHandlerMut};

use super::port_handle::{PortHandle, RingReport, Rings, SessionReport};
use super::port_state::{GuestState, RingAddr, RingState, way};
use super::state::{Direction, Hugepages, MemoryRegion, Peer, PortSpec, PortState, RingKind};
use crate::port::call::{Call, is_eventfd};
use crate::port::vhost::{FromGuest, ToGuest};
use crate::virtio::guest_mem::{GuestMem, MapOptions, Poison, PoisonCause, Region, RegionSpec};
use crate::virtio::ring::{Ring, Way, feature};

/// Memory regions a guest may have at one time (GET_MAX_MEM_SLOTS).
const SLOTS: u64 = 64;
/// Largest ring (virtio 1.2 §2.7, §2.8.10.1).
const RING_MAX: u32 = 32768;
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
    /// What a worker found wrong with a ring.
    lie: Option<String>,
    /// Something changed that a report tells.
    changed: bool,
}

impl Device {
    pub(super) fn new(
        spec: &PortSpec,
        handle: Arc<dyn PortHandle>,
        stopping: Arc<AtomicBool>,
        options: &MapOptions,
    ) -> Device {
        Device {
            handle,
            stopping,
            pairs: spec.queues,
            mtu: spec.mtu,
            frame_max: spec.frame_max() as u32,
            options: options.clone(),
            poison: Poison::new(),
            guest: GuestState::new(spec.queues),
            live: false,
            complaint: None,
            lie: None,
            changed: true,
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
            reason: self.complaint.clone(),
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
        }
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
                Way::ToGuest => rings
                    .to_guest
                    .push((pair, ToGuest::new(ring, call, mergeable))),
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

    /// Puts a new memory table in the place of the old one. Rings whose addresses it does not hold wait for the next one.
    fn adopt(&mut self, mem: GuestMem, offsets: Vec<(u64, u64)>) {
        self.quiesce();
        // The workers have left the old table: its last holder, this line, unmaps it before the frontend gets its answer.
        self.guest.mem = Some(Arc::new(mem));
        self.guest.offsets = offsets;
        if let Err(why) = self.publish() {
            self.complaint = Some(why);
        }
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

    /// Whether the parts of a ring lie in memory that was shared, if any was. How far they reach is seen when it is built.
    fn check_addr(&mut self, index: usize, at: RingAddr) -> Result<()> {
        let Some(mem) = &self.guest.mem else {
            return Ok(());
        };
        let parts = [at.desc, at.avail, at.used];
        match parts.iter().find(|part| mem.translate_uva(**part, 1).is_none()) {
            None => Ok(()),
            Some(part) => Err(self.refuse(format!(
                "ring {index}: {part:#x} is outside the shared memory; the frontend is at fault, or its memory table lacks the \
                 ring"
            ))),
        }
    }

    fn eventfd(&mut self, file: Option<File>, message: &str) -> Result<Option<OwnedFd>> {
        let Some(fd) = file.map(owned) else {
            return Ok(None);
        };
        match is_eventfd(fd.as_fd()) {
            Ok(true) => Ok(Some(fd)),
            Ok(false) => Err(self.refuse(format!(
                "{message} came with a descriptor that is no eventfd; the frontend is at fault"
            ))),
            Err(error) => Err(self.refuse(format!(
                "this host has no kernel AIO for us ({error}), guests cannot be called: raise the sysctl fs.aio-max-nr, or \
                 allow io_setup and io_submit in the seccomp profile"
            ))),
        }
    }

    pub(super) fn enable(&mut self, index: u32, enable: bool) -> Result<()> {
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

/// A descriptor as it should have come: the `vhost` crate receives without close-on-exec.
fn owned(file: File) -> OwnedFd {
    let fd = OwnedFd::from(file);
    let _ = rustix::io::fcntl_setfd(&fd, rustix::io::FdFlags::CLOEXEC);
    fd
}

/// One region as announced.
fn region(region: &VhostUserMemoryRegion, file: File) -> RegionSpec {
    RegionSpec {
        gpa: region.guest_phys_addr,
        len: region.memory_size,
        uva: region.user_addr,
        fd: owned(file),
        offset: region.mmap_offset,
    }
}

impl VhostUserBackendReqHandlerMut for Device {
    fn set_owner(&mut self) -> Result<()> {
        Ok(())
    }

    fn reset_owner(&mut self) -> Result<()> {
        self.reset_device()
    }

    fn reset_device(&mut self) -> Result<()> {
        self.guest.status = 0;
        self.alter_all(|guest| guest.rings.iter_mut().for_each(RingState::reset))
    }

    fn get_features(&mut self) -> Result<u64> {
        Ok(self.offered())
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        let strange = features & !self.offered();
        if strange != 0 {
            return Err(self.refuse(format!(
                "the frontend chose virtio features that were not offered ({strange:#x}); the frontend is at fault"
            )));
        }
        if self.guest.features == Some(features) {
            return Ok(());
        }
        self.alter_all(|guest| guest.features = Some(features))?;
        self.complaint = (features & feature::VERSION_1 == 0).then(|| {
            "the guest's driver speaks legacy virtio only (no VERSION_1): use a driver of virtio 1.0 or later, with QEMU \
             disable-legacy=on"
                .to_owned()
        });
        Ok(())
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _: Option<bool>,
    ) -> Result<Option<Vec<u64>>> {
        let offsets = regions
            .iter()
            .map(|r| (r.guest_phys_addr, r.mmap_offset))
            .collect();
        let specs = regions
            .iter()
            .zip(files)
            .map(|(r, file)| region(r, file))
            .collect();
        let mem = GuestMem::map(specs, &self.poison, &self.options)
            .map_err(|error| self.refuse(error.to_string()))?;
        self.adopt(mem, offsets);
        Ok(None)
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        let index = self.index(index, "SET_VRING_NUM")?;
        let split = self.guest.features.is_some() && !self.guest.has(feature::RING_PACKED);
        if num == 0 || num > RING_MAX || (split && !num.is_power_of_two()) {
            return Err(self.refuse(format!(
                "ring {index}: a size of {num} is not allowed: let the guest use a power of two up to {RING_MAX}"
            )));
        }
        self.alter(index, |ring| ring.size = Some(num as u16))
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        _: VhostUserVringAddrFlags,
        desc: u64,
        used: u64,
        avail: u64,
        _: u64,
    ) -> Result<()> {
        let index = self.index(index, "SET_VRING_ADDR")?;
        let at = RingAddr { desc, avail, used };
        self.check_addr(index, at)?;
        self.alter(index, |ring| ring.at = Some(at))
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        let index = self.index(index, "SET_VRING_BASE")?;
        self.alter(index, |ring| ring.base = base)
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        let place = self.index(index, "GET_VRING_BASE")?;
        let was_live = self.guest.rings[place].live;
        if was_live {
            self.quiesce();
        }
        let ring = &mut self.guest.rings[place];
        (ring.started, ring.kick) = (false, None);
        let base = ring.base;
        if was_live {
            self.publish().map_err(|why| self.refuse(why))?;
        }
        Ok(VhostUserVringState::new(index, base))
    }

    fn set_vring_kick(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let index = self.index(index.into(), "SET_VRING_KICK")?;
        let kick = self.eventfd(fd, "SET_VRING_KICK")?;
        self.alter(index, |ring| (ring.started, ring.kick) = (true, kick))
    }

    fn set_vring_call(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let index = self.index(index.into(), "SET_VRING_CALL")?;
        let fd = self.eventfd(fd, "SET_VRING_CALL")?;
        let call = fd.map(Call::new).transpose();
        let call = call.map_err(|error| self.refuse(format!("SET_VRING_CALL: {error}")))?;
        self.alter(index, |ring| ring.call = call)
    }

    fn set_vring_err(&mut self, index: u8, _: Option<File>) -> Result<()> {
        self.index(index.into(), "SET_VRING_ERR").map(drop) // a lie is told by closing the connection
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        let none = VhostUserProtocolFeatures::empty();
        Ok(PROTOCOL_FEATURES
            .iter()
            .fold(none, |bits, (bit, _)| bits | *bit))
    }

    fn set_protocol_features(&mut self, features: u64) -> Result<()> {
        let strange = features & !self.get_protocol_features()?.bits();
        if strange != 0 {
            return Err(self.refuse(format!(
                "the frontend chose protocol features that were not offered ({strange:#x}); the frontend is at fault"
            )));
        }
        self.guest.protocol_features = features;
        self.changed = true;
        Ok(())
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(self.pairs.into())
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        self.enable(index, enable)
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        Ok(SLOTS)
    }

    fn add_mem_region(
        &mut self,
        added: &VhostUserSingleMemoryRegion,
        fd: File,
        _: Option<bool>,
    ) -> Result<Option<u64>> {
        let spec = region(added, fd);
        // QEMU 7.2 tells each region once per queue pair. That the file is the same too is the guest's own affair.
        let same = |r: &Region| (r.gpa(), r.len(), r.uva()) == (spec.gpa, spec.len, spec.uva);
        let mem = self.guest.mem.as_ref();
        let mapped = mem.is_some_and(|mem| mem.regions().any(same));
        if mapped && self.guest.offsets.contains(&(spec.gpa, spec.offset)) {
            return Ok(None);
        }
        let mut offsets = self.guest.offsets.clone();
        offsets.push((spec.gpa, spec.offset));
        let mem = match &self.guest.mem {
            Some(mem) => mem.with_added(spec),
            None => GuestMem::map(vec![spec], &self.poison, &self.options),
        };
        let mem = mem.map_err(|error| self.refuse(error.to_string()))?;
        self.adopt(mem, offsets);
        Ok(None)
    }

    fn remove_mem_region(&mut self, removed: &VhostUserSingleMemoryRegion) -> Result<()> {
        let (gpa, len, uva) = (
            removed.guest_phys_addr,
            removed.memory_size,
            removed.user_addr,
        );
        let Some(mem) = &self.guest.mem else {
            return Err(self.refuse("REM_MEM_REG, but no memory was added".to_owned()));
        };
        if !mem.regions().any(|region| region.gpa() == gpa) {
            return Ok(()); // taken away already: QEMU 7.2 asks once per queue pair
        }
        let mem = mem.with_removed(gpa, len, uva);
        let mem = mem.map_err(|error| self.refuse(error.to_string()))?;
        let mut offsets = self.guest.offsets.clone();
        offsets.retain(|(region, _)| *region != gpa);
        self.adopt(mem, offsets);
        Ok(())
    }

    // What follows belongs to protocol features that are never offered: the filter lets none of it through.

    fn get_config(&mut self, _: u32, _: u32, _: VhostUserConfigFlags) -> Result<Vec<u8>> {
        Err(Error::InvalidMessage)
    }

    fn set_config(&mut self, _: u32, _: &[u8], _: VhostUserConfigFlags) -> Result<()> {
        Err(Error::InvalidMessage)
    }

    fn set_gpu_socket(&mut self, _: GpuBackend) -> Result<()> {
        Err(Error::InvalidMessage)
    }

    fn get_shared_object(&mut self, _: VhostUserSharedMsg) -> Result<File> {
        Err(Error::InvalidMessage)
    }

    fn get_inflight_fd(&mut self, _: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        Err(Error::InvalidMessage)
    }

    fn set_inflight_fd(&mut self, _: &VhostUserInflight, _: File) -> Result<()> {
        Err(Error::InvalidMessage)
    }

    fn set_device_state_fd(
        &mut self,
        _: VhostTransferStateDirection,
        _: VhostTransferStatePhase,
        _: File,
    ) -> Result<Option<File>> {
        Err(Error::InvalidMessage)
    }

    fn check_device_state(&mut self) -> Result<()> {
        Err(Error::InvalidMessage)
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        Err(Error::InvalidMessage)
    }

    fn set_log_base(&mut self, _: &VhostUserLog, _: File) -> Result<()> {
        Err(Error::InvalidMessage)
    }
}
