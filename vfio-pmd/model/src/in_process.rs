//! The device as a transport of the driver in the same process.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use vfio_pmd::mmio::Bar;
use vfio_pmd::transport::{DmaRange, Registers, Transport};

use crate::config_space::ConfigSpace;
use crate::nic::Nic;
use crate::regs::VECTORS;

/// One VF, opened. Dropping it ends its mappings and interrupts, as closing a VFIO device does; the device itself stays.
pub struct InProcess {
    nic: Arc<Nic>,
    vf: usize,
    config: Mutex<ConfigSpace>,
}

impl InProcess {
    /// Opens a VF.
    pub fn open(nic: &Arc<Nic>, vf: usize) -> io::Result<Arc<InProcess>> {
        if vf >= nic.vfs() {
            return Err(io::Error::new(
                io::ErrorKind::NotFound,
                format!("the model has {} VFs, none with the number {vf}", nic.vfs()),
            ));
        }
        Ok(Arc::new(InProcess {
            nic: Arc::clone(nic),
            vf,
            config: Mutex::default(),
        }))
    }
}

struct Window {
    nic: Arc<Nic>,
    vf: usize,
}

impl Registers for Window {
    fn read(&self, offset: u32) -> u32 {
        self.nic.read(self.vf, offset)
    }

    fn write(&self, offset: u32, value: u32) {
        self.nic.write(self.vf, offset, value);
    }
}

impl Transport for InProcess {
    fn name(&self) -> String {
        format!("model VF {}", self.vf)
    }

    fn read_config(&self, offset: u32, bytes: &mut [u8]) -> io::Result<()> {
        let config = self.config.lock().unwrap_or_else(|e| e.into_inner());
        config.read(offset.into(), bytes);
        Ok(())
    }

    fn write_config(&self, offset: u32, bytes: &[u8]) -> io::Result<()> {
        let mut config = self.config.lock().unwrap_or_else(|e| e.into_inner());
        if config.write(offset.into(), bytes) {
            self.nic.reset(self.vf);
        }
        Ok(())
    }

    fn registers(self: Arc<Self>) -> io::Result<Bar> {
        Ok(Bar::called(Arc::new(Window {
            nic: Arc::clone(&self.nic),
            vf: self.vf,
        })))
    }

    fn map_dma(&self, range: &DmaRange<'_>) -> io::Result<()> {
        let DmaRange {
            fd,
            offset,
            len,
            iova,
            ..
        } = *range;
        self.nic.map(self.vf, fd, offset, len, iova, true)
    }

    fn unmap_dma(&self, iova: u64, len: u64) -> io::Result<()> {
        if self.nic.unmap(self.vf, iova, len) {
            return Ok(());
        }
        Err(io::Error::new(
            io::ErrorKind::NotFound,
            format!("nothing is mapped at {iova:#x} with {len} bytes"),
        ))
    }

    fn vectors(&self) -> u32 {
        VECTORS as u32
    }

    fn set_interrupts(&self, signals: &[Option<BorrowedFd<'_>>]) -> io::Result<()> {
        for vector in 0..VECTORS {
            let signal = signals.get(vector).copied().flatten();
            let own = signal.map(|fd| fd.try_clone_to_owned()).transpose()?;
            self.nic.connect_interrupt(self.vf, vector, own);
        }
        Ok(())
    }

    fn reset(&self) -> io::Result<()> {
        self.nic.reset(self.vf);
        Ok(())
    }

    fn pause(&self, time: Duration) {
        self.nic.advance(time);
    }
}

impl Drop for InProcess {
    fn drop(&mut self) {
        self.nic.unmap_all(self.vf);
        for vector in 0..VECTORS {
            self.nic.connect_interrupt(self.vf, vector, None);
        }
    }
}
