//! A VF per vfio-user socket: for QEMU's `vfio-user-pci`, or for a driver in another process.
//!
//! Every access is trapped: a guest's tail write arrives as a message and the frames have moved when it is answered. One thread per
//! VF reads messages; one more looks after the wire and the clock.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vfio_bindings::bindings::vfio::{
    VFIO_IRQ_INFO_EVENTFD, VFIO_IRQ_INFO_NORESIZE, VFIO_IRQ_SET_DATA_EVENTFD,
    VFIO_PCI_CONFIG_REGION_INDEX, VFIO_PCI_MSIX_IRQ_INDEX, VFIO_PCI_NUM_IRQS, VFIO_PCI_NUM_REGIONS,
    VFIO_REGION_INFO_FLAG_READ, VFIO_REGION_INFO_FLAG_WRITE, vfio_region_info,
};
use vfio_user::{DmaMapFlags, DmaUnmapFlags, IrqInfo, Server, ServerBackend, ServerRegion};

use crate::config_space::{BAR3_LEN, CONFIG_LEN, ConfigSpace};
use crate::nic::Nic;
use crate::regs::{BAR0_LEN, VECTORS};
use crate::report::Misuse;
use crate::wire::Wire;

/// How long the clock may stand still: answers that were delayed on purpose and the end of a PF's reset wait for it.
const TICK: Duration = Duration::from_millis(5);

/// Serves a VF at `path` to one client after the other, for ever.
///
/// When a client goes, its memory is unmapped, its interrupts are off and the VF is reset, as VFIO does.
pub fn serve_vf(nic: Arc<Nic>, vf: usize, path: &Path) -> Result<()> {
    let server = listen(path)?;
    let mut backend = Backend {
        nic,
        vf,
        config: ConfigSpace::default(),
    };
    std::thread::Builder::new()
        .name(format!("vf{vf}"))
        .spawn(move || {
            loop {
                if let Err(error) = server.run(&mut backend) {
                    log::warn!("VF {vf}: {error}");
                }
                backend.close();
            }
        })?;
    Ok(())
}

fn listen(path: &Path) -> Result<Server> {
    if path.exists() {
        if UnixStream::connect(path).is_ok() {
            bail!("{}: somebody listens there already", path.display());
        }
        // What a killed server left behind; anything but a socket stays.
        use std::os::unix::fs::FileTypeExt;
        let kind = std::fs::symlink_metadata(path)?.file_type();
        if !kind.is_socket() {
            bail!("{}: is there and is no socket", path.display());
        }
        std::fs::remove_file(path).with_context(|| path.display().to_string())?;
    }
    let server = Server::new(path, true, interrupts(), regions());
    server.map_err(|error| anyhow::anyhow!("{}: cannot listen: {error}", path.display()))
}

fn interrupts() -> Vec<IrqInfo> {
    let of = |index| {
        let msix = index == VFIO_PCI_MSIX_IRQ_INDEX;
        IrqInfo {
            index,
            flags: if msix {
                VFIO_IRQ_INFO_EVENTFD | VFIO_IRQ_INFO_NORESIZE
            } else {
                0
            },
            count: if msix { VECTORS as u32 } else { 0 },
        }
    };
    (0..VFIO_PCI_NUM_IRQS).map(of).collect()
}

fn regions() -> Vec<ServerRegion> {
    let of = |index| {
        let size = match index {
            0 => u64::from(BAR0_LEN),
            3 => BAR3_LEN,
            VFIO_PCI_CONFIG_REGION_INDEX => CONFIG_LEN as u64,
            _ => 0,
        };
        let region_info = vfio_region_info {
            argsz: size_of::<vfio_region_info>() as u32,
            flags: if size > 0 {
                VFIO_REGION_INFO_FLAG_READ | VFIO_REGION_INFO_FLAG_WRITE
            } else {
                0
            },
            index,
            cap_offset: 0,
            size,
            offset: 0,
        };
        ServerRegion {
            region_info,
            sparse_areas: Vec::new(),
            mmap_fd: None,
        }
    };
    (0..VFIO_PCI_NUM_REGIONS).map(of).collect()
}

/// Looks after the wire and the clock from a thread of its own, for ever.
pub fn tend(nic: Arc<Nic>, wire: Option<Wire>) -> Result<()> {
    let watched = wire.as_ref().map(Wire::try_clone).transpose()?;
    if let Some(wire) = wire {
        nic.attach_wire(wire);
    }
    std::thread::Builder::new()
        .name("wire".to_owned())
        .spawn(move || {
            let mut watched = watched;
            loop {
                if wait(watched.as_ref()) {
                    // The other end is gone: nothing will come any more.
                    watched = None;
                }
                nic.poll_wire();
                nic.tick();
            }
        })?;
    Ok(())
}

/// Waits for a frame or a tick; true if the wire's other end is gone.
fn wait(wire: Option<&Wire>) -> bool {
    let timeout = Timespec {
        tv_sec: 0,
        tv_nsec: TICK.as_nanos() as i64,
    };
    let Some(wire) = wire else {
        std::thread::sleep(TICK);
        return false;
    };
    let mut fds = [PollFd::from_borrowed_fd(wire.as_fd(), PollFlags::IN)];
    let _ = poll(&mut fds, Some(&timeout));
    fds[0].revents().intersects(PollFlags::HUP | PollFlags::ERR)
}

struct Backend {
    nic: Arc<Nic>,
    vf: usize,
    config: ConfigSpace,
}

impl Backend {
    fn close(&mut self) {
        self.nic.unmap_all(self.vf);
        self.disconnect(0..VECTORS);
        self.nic.reset(self.vf);
        self.config = ConfigSpace::default();
    }

    fn disconnect(&self, vectors: std::ops::Range<usize>) {
        vectors.for_each(|vector| self.nic.connect_interrupt(self.vf, vector, None));
    }

    fn bad_access(&self, offset: u64, len: usize) {
        self.nic.note(
            self.vf,
            Misuse::RegisterAccess {
                offset: offset as u32,
                len: len as u32,
            },
        );
    }
}

// No method returns an error: the crate's server would lose its place in the stream. What is wrong is written into the report.
impl ServerBackend for Backend {
    fn region_read(&mut self, region: u32, offset: u64, data: &mut [u8]) -> io::Result<()> {
        data.fill(0);
        match region {
            0 => {
                let (words, rest) = data.as_chunks_mut::<4>();
                if !rest.is_empty() || !offset.is_multiple_of(4) {
                    self.bad_access(offset, words.len() * 4 + rest.len());
                    return Ok(());
                }
                for (at, word) in words.iter_mut().enumerate() {
                    *word = self
                        .nic
                        .read(self.vf, offset as u32 + at as u32 * 4)
                        .to_le_bytes();
                }
            }
            VFIO_PCI_CONFIG_REGION_INDEX => self.config.read(offset, data),
            // The MSI-X table is the host's; nothing is ever pending.
            _ => {}
        }
        Ok(())
    }

    fn region_write(&mut self, region: u32, offset: u64, data: &[u8]) -> io::Result<()> {
        match region {
            0 => {
                let (words, rest) = data.as_chunks::<4>();
                if !rest.is_empty() || !offset.is_multiple_of(4) {
                    self.bad_access(offset, data.len());
                    return Ok(());
                }
                for (at, word) in words.iter().enumerate() {
                    self.nic.write(
                        self.vf,
                        offset as u32 + at as u32 * 4,
                        u32::from_le_bytes(*word),
                    );
                }
            }
            VFIO_PCI_CONFIG_REGION_INDEX if self.config.write(offset, data) => {
                self.nic.reset(self.vf)
            }
            _ => {}
        }
        Ok(())
    }

    fn dma_map(
        &mut self,
        flags: DmaMapFlags,
        offset: u64,
        address: u64,
        size: u64,
        fd: Option<File>,
    ) -> io::Result<()> {
        let Some(fd) = fd else {
            self.nic.map_out_of_reach(self.vf, address, size); // a ROM
            return Ok(());
        };
        let writable = flags.contains(DmaMapFlags::WRITE);
        if let Err(error) = self.nic.map(self.vf, fd, offset, size, address, writable) {
            log::warn!("VF {}: map {address:#x}+{size:#x}: {error}", self.vf);
        }
        Ok(())
    }

    fn dma_unmap(&mut self, flags: DmaUnmapFlags, address: u64, size: u64) -> io::Result<()> {
        if flags.contains(DmaUnmapFlags::UNMAP_ALL) {
            self.nic.unmap_all(self.vf);
        } else {
            self.nic.unmap_range(self.vf, address, size);
        }
        Ok(())
    }

    fn reset(&mut self) -> io::Result<()> {
        self.nic.reset(self.vf);
        Ok(())
    }

    fn set_irqs(
        &mut self,
        index: u32,
        flags: u32,
        start: u32,
        count: u32,
        fds: Vec<File>,
    ) -> io::Result<()> {
        if index != VFIO_PCI_MSIX_IRQ_INDEX {
            return Ok(());
        }
        let first = (start as usize).min(VECTORS);
        let end = if count == 0 {
            VECTORS
        } else {
            (start.saturating_add(count) as usize).min(VECTORS)
        };
        self.disconnect(first..end.max(first));
        if flags & VFIO_IRQ_SET_DATA_EVENTFD != 0 {
            for (vector, fd) in (first..end).zip(fds) {
                self.nic
                    .connect_interrupt(self.vf, vector, Some(OwnedFd::from(fd)));
            }
        }
        Ok(())
    }
}

/// Where a VF is served and what it may: `PATH[,mac=..][,trust][,spoofchk=off][,vlan=N][,query-rss][,link=off]`.
#[derive(Clone, Debug)]
pub struct Served {
    /// The socket.
    pub path: PathBuf,
    /// The PF's policy.
    pub policy: crate::VfPolicy,
}

impl std::str::FromStr for Served {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut parts = text.split(',');
        let path = PathBuf::from(parts.next().unwrap_or_default());
        if path.as_os_str().is_empty() {
            return Err("the path of the socket is missing".to_owned());
        }
        let mut policy = crate::VfPolicy::default();
        for part in parts {
            match part.split_once('=').unwrap_or((part, "on")) {
                ("mac", mac) => policy.mac = Some(parse_mac(mac)?),
                ("trust", on) => policy.trusted = switch(part, on)?,
                ("spoofchk", on) => policy.spoof_check = switch(part, on)?,
                ("query-rss", on) => policy.query_rss = switch(part, on)?,
                ("link", on) => policy.link_enabled = switch(part, on)?,
                ("vlan", vid) => {
                    let vid = vid.parse().ok().filter(|vid| (1..4095).contains(vid));
                    policy.port_vlan =
                        Some(vid.ok_or_else(|| format!("`{part}`: a VLAN is 1 to 4094"))?);
                }
                _ => {
                    return Err(format!(
                        "`{part}`: known are mac, trust, spoofchk, query-rss, link and vlan"
                    ));
                }
            }
        }
        Ok(Self { path, policy })
    }
}

fn switch(part: &str, value: &str) -> Result<bool, String> {
    match value {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err(format!("`{part}`: on or off")),
    }
}

fn parse_mac(text: &str) -> Result<crate::Mac, String> {
    let bytes: Vec<u8> = text
        .split(':')
        .map_while(|part| u8::from_str_radix(part, 16).ok())
        .collect();
    let mac = crate::Mac::try_from(bytes)
        .ok()
        .filter(|mac| mac[0] & 1 == 0);
    mac.ok_or_else(|| format!("`{text}` is no MAC address of a station, like 02:00:00:00:00:01"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vf_is_described_by_its_path_and_its_policy() {
        let served: Served = "/run/vf0.sock,mac=02:00:00:00:00:01,trust,spoofchk=off,vlan=7"
            .parse()
            .unwrap();
        assert_eq!(served.path, Path::new("/run/vf0.sock"));
        assert_eq!(served.policy.mac, Some([2, 0, 0, 0, 0, 1]));
        assert!(served.policy.trusted && !served.policy.spoof_check);
        assert_eq!(served.policy.port_vlan, Some(7));
    }

    #[test]
    fn what_is_wrong_with_a_vf_is_named() {
        for (text, part) in [
            ("", "path"),
            ("/a,mac=01:00:00:00:00:01", "no MAC address"),
            ("/a,mac=02:00", "no MAC address"),
            ("/a,vlan=4095", "1 to 4094"),
            ("/a,trust=maybe", "on or off"),
            ("/a,promisc", "known are"),
        ] {
            let error = text.parse::<Served>().unwrap_err();
            assert!(error.contains(part), "{text}: {error}");
        }
    }

    #[test]
    fn a_socket_that_a_killed_server_left_is_replaced_and_a_file_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vf0");
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        drop(listen(&path).unwrap());
        std::fs::write(&path, "data").unwrap();
        let error = listen(&path).err().unwrap().to_string();
        assert!(error.contains("no socket"), "{error}");
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "data");
    }
}
