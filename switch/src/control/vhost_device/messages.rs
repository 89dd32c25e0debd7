//! The messages of vhost-user that the `vhost` crate parses, each as a change of the [`Device`].

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};

use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig,
    VhostUserSharedMsg, VhostUserSingleMemoryRegion, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{Error, GpuBackend, Result, VhostUserBackendReqHandlerMut};

use super::super::port_state::{RingAddr, RingState};
use super::{Device, PROTOCOL_FEATURES, SLOTS};

use crate::port::call::{Call, is_eventfd};
use crate::virtio::guest_mem::{GuestMem, Region, RegionSpec};
use crate::virtio::ring::feature;

/// Largest ring (virtio 1.2 §2.7, §2.8.10.1).
const RING_MAX: u32 = 32768;

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
        self.adopt(mem, offsets)?;
        Ok(None)
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        let Some(index) = self.place(index, "SET_VRING_NUM")? else {
            return Ok(());
        };
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
        let Some(index) = self.place(index, "SET_VRING_ADDR")? else {
            return Ok(());
        };
        let at = RingAddr { desc, avail, used };
        self.check_addr(index, at)?;
        self.alter(index, |ring| ring.at = Some(at))
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        let Some(index) = self.place(index, "SET_VRING_BASE")? else {
            return Ok(());
        };
        self.alter(index, |ring| ring.base = base)
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        let Some(place) = self.place(index, "GET_VRING_BASE")? else {
            return Ok(VhostUserVringState::new(index, 0));
        };
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
        let Some(index) = self.place(index.into(), "SET_VRING_KICK")? else {
            return Ok(());
        };
        let kick = self.eventfd(fd, "SET_VRING_KICK")?;
        self.alter(index, |ring| (ring.started, ring.kick) = (true, kick))
    }

    fn set_vring_call(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let Some(index) = self.place(index.into(), "SET_VRING_CALL")? else {
            return Ok(());
        };
        let fd = self.eventfd(fd, "SET_VRING_CALL")?;
        let call = match fd.map(Call::new).transpose() {
            Ok(call) => call,
            // Known to be an eventfd: so it is the host that has no way to signal it.
            Err(error) => {
                self.uncalled = Some(format!(
                    "guests that poll are served, others hear of no frame: this host has no kernel AIO for us ({error}): raise the \
                     sysctl fs.aio-max-nr, or allow io_setup and io_submit in the seccomp profile, then restart the guest"
                ));
                None
            }
        };
        self.alter(index, |ring| ring.call = call)
    }

    fn set_vring_err(&mut self, index: u8, _: Option<File>) -> Result<()> {
        self.place(index.into(), "SET_VRING_ERR").map(drop) // a lie is told by closing the connection
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
        self.adopt(mem, offsets)?;
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
        self.adopt(mem, offsets)
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

impl Device {
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
        if is_eventfd(fd.as_fd()) {
            return Ok(Some(fd));
        }
        Err(self.refuse(format!(
            "{message} came with a descriptor that is no eventfd; the frontend is at fault"
        )))
    }
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
