//! A device served by another process over a vfio-user socket: a model of the device, for tests and for trying things out.
//!
//! A small client of its own: it has a deadline on every exchange, posts register writes without waiting, and treats a server that
//! vanishes, errs or falls silent like a device that was pulled out: reads give all ones.
//!
//! Threads: exchanges take turns on a mutex. A tail write of a worker therefore waits for an exchange of the control side; it is a
//! path for tests, a real device's registers are mapped.

use std::io::{self, IoSlice, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

use crate::mmio::{Bar, GONE};
use crate::regs;
use crate::transport::{DmaRange, Registers, Transport};

/// How long a server may take for one exchange. Mapping memory or resetting is what takes long.
const DEADLINE: Duration = Duration::from_secs(5);
const HEADER: usize = 16;
/// Longest message that makes sense from a server.
const MESSAGE_MAX: usize = 64 << 10;

const VERSION: u16 = 1;
const DMA_MAP: u16 = 2;
const DMA_UNMAP: u16 = 3;
const GET_REGION_INFO: u16 = 5;
const GET_IRQ_INFO: u16 = 7;
const SET_IRQS: u16 = 8;
const REGION_READ: u16 = 9;
const REGION_WRITE: u16 = 10;
const DEVICE_RESET: u16 = 13;

const REPLY: u32 = 1;
const TYPE_MASK: u32 = 0xF;
const NO_REPLY: u32 = 1 << 4;
const ERROR: u32 = 1 << 5;

const BAR0: u32 = 0;
const CONFIG: u32 = 7;
const MSIX: u32 = 2;
/// DATA_EVENTFD and ACTION_TRIGGER.
const IRQ_EVENTFD: u32 = 0x24;
/// DATA_NONE and ACTION_TRIGGER: with a count of 0, all off.
const IRQ_OFF: u32 = 0x21;
/// Memory space and bus master, in the command register at offset 4.
const COMMAND: u32 = 4;
const COMMAND_ON: u16 = 0x6;

/// A VF behind a vfio-user socket.
pub struct VfioUser {
    path: String,
    link: Mutex<Link>,
    dead: AtomicBool,
    vectors: u32,
}

struct Link {
    stream: UnixStream,
    next: u16,
}

impl VfioUser {
    /// Connects to the server at `path`.
    pub fn open(path: &Path) -> io::Result<Arc<VfioUser>> {
        Self::new(UnixStream::connect(path)?, path.display().to_string())
    }

    /// Speaks over a connected socket; `name` is for messages.
    pub fn new(stream: UnixStream, name: String) -> io::Result<Arc<VfioUser>> {
        stream.set_read_timeout(Some(DEADLINE))?;
        stream.set_write_timeout(Some(DEADLINE))?;
        let mut device = VfioUser {
            path: name,
            link: Mutex::new(Link { stream, next: 0 }),
            dead: AtomicBool::new(false),
            vectors: 0,
        };
        device.agree()?;
        let bar0 = device.region_size(BAR0)?;
        if bar0 < regs::BAR0_LEN {
            return Err(wrong(format!("BAR0 has {bar0} bytes, a VF has 16384")));
        }
        device.vectors = device.irq_count(MSIX)?;
        let mut command = [0; 2];
        device.read_region(CONFIG, u64::from(COMMAND), &mut command)?;
        let command = u16::from_le_bytes(command) | COMMAND_ON;
        device.write_region(CONFIG, u64::from(COMMAND), &command.to_le_bytes(), false)?;
        Ok(Arc::new(device))
    }

    fn agree(&self) -> io::Result<()> {
        let mut body = vec![0, 0, 0, 0];
        body.extend_from_slice(
            b"{\"capabilities\":{\"max_msg_fds\":1,\"max_data_xfer_size\":1048576}}\0",
        );
        let reply = self.exchange(VERSION, &body, None)?;
        match u16_at(&reply, 0)? {
            0 => Ok(()),
            major => Err(wrong(format!("the server speaks version {major}, not 0"))),
        }
    }

    fn region_size(&self, index: u32) -> io::Result<u64> {
        let body = Words::new().u32(32).u32(0).u32(index).u32(0).u64(0).u64(0);
        u64_at(&self.exchange(GET_REGION_INFO, &body.0, None)?, 16)
    }

    fn irq_count(&self, index: u32) -> io::Result<u32> {
        let body = Words::new().u32(16).u32(0).u32(index).u32(0);
        u32_at(&self.exchange(GET_IRQ_INFO, &body.0, None)?, 12)
    }

    fn read_region(&self, region: u32, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        let body = Words::new().u64(offset).u32(region).u32(bytes.len() as u32);
        let reply = self.exchange(REGION_READ, &body.0, None)?;
        let data = reply.get(16..16 + bytes.len());
        bytes.copy_from_slice(data.ok_or_else(|| wrong("a short answer".into()))?);
        Ok(())
    }

    fn write_region(&self, region: u32, offset: u64, bytes: &[u8], posted: bool) -> io::Result<()> {
        let mut body = Words::new().u64(offset).u32(region).u32(bytes.len() as u32);
        body.0.extend_from_slice(bytes);
        if posted {
            return self
                .with_link(|link| link.send(REGION_WRITE, &body.0, None, NO_REPLY).map(drop));
        }
        self.exchange(REGION_WRITE, &body.0, None).map(drop)
    }

    fn exchange(
        &self,
        command: u16,
        body: &[u8],
        fd: Option<BorrowedFd<'_>>,
    ) -> io::Result<Vec<u8>> {
        self.with_link(|link| {
            let id = link.send(command, body, fd, 0)?;
            link.receive(id, command)
        })
    }

    /// After an error of the connection nothing of it can be believed: the device counts as gone. An error the server reports in
    /// good order is passed on.
    fn with_link<T>(&self, work: impl FnOnce(&mut Link) -> Result<T, Failure>) -> io::Result<T> {
        let mut link = self.link.lock().unwrap_or_else(PoisonError::into_inner);
        if self.dead.load(Relaxed) {
            return Err(io::ErrorKind::NotConnected.into());
        }
        work(&mut link).map_err(|failure| match failure {
            Failure::Server(error) => error,
            Failure::Link(error) => {
                self.dead.store(true, Relaxed);
                if error.kind() == io::ErrorKind::WouldBlock {
                    return io::Error::new(
                        io::ErrorKind::TimedOut,
                        "the vfio-user server did not answer within 5 s",
                    );
                }
                error
            }
        })
    }
}

/// What can fail in an exchange.
enum Failure {
    /// The connection, or what came over it.
    Link(io::Error),
    /// The request: the server said so.
    Server(io::Error),
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Failure {
        Failure::Link(error)
    }
}

impl Link {
    /// Sends a message; gives its number.
    fn send(
        &mut self,
        command: u16,
        body: &[u8],
        fd: Option<BorrowedFd<'_>>,
        flags: u32,
    ) -> Result<u16, Failure> {
        let id = self.next;
        self.next = self.next.wrapping_add(1);
        let mut message = Vec::with_capacity(HEADER + body.len());
        message.extend_from_slice(&id.to_le_bytes());
        message.extend_from_slice(&command.to_le_bytes());
        message.extend_from_slice(&((HEADER + body.len()) as u32).to_le_bytes());
        message.extend_from_slice(&flags.to_le_bytes());
        message.extend_from_slice(&0u32.to_le_bytes());
        message.extend_from_slice(body);
        let mut sent = 0;
        if let Some(fd) = fd {
            let fds = [fd];
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            control.push(SendAncillaryMessage::ScmRights(&fds));
            sent = sendmsg(
                &self.stream,
                &[IoSlice::new(&message)],
                &mut control,
                SendFlags::NOSIGNAL,
            )
            .map_err(io::Error::from)?;
        }
        // A plain write: a worker that is confined to few system calls has this one.
        while sent < message.len() {
            match rustix::io::write(&self.stream, &message[sent..]) {
                Ok(0) => return Err(io::Error::from(io::ErrorKind::WriteZero).into()),
                Ok(count) => sent += count,
                Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(io::Error::from(errno).into()),
            }
        }
        Ok(id)
    }

    /// Receives the reply to message `id`; gives its body.
    fn receive(&mut self, id: u16, command: u16) -> Result<Vec<u8>, Failure> {
        let mut header = [0; HEADER];
        self.stream.read_exact(&mut header)?;
        let size = u32_at(&header, 4)? as usize;
        let (flags, errno) = (u32_at(&header, 8)?, u32_at(&header, 12)?);
        if u16_at(&header, 0)? != id
            || u16_at(&header, 2)? != command
            || flags & TYPE_MASK != REPLY
            || !(HEADER..=MESSAGE_MAX).contains(&size)
        {
            return Err(wrong("the server's answer is not one".into()).into());
        }
        let mut body = vec![0; size - HEADER];
        self.stream.read_exact(&mut body)?;
        if flags & ERROR != 0 {
            return Err(Failure::Server(io::Error::from_raw_os_error(errno as i32)));
        }
        Ok(body)
    }
}

impl Registers for VfioUser {
    fn read(&self, offset: u32) -> u32 {
        let mut bytes = [0; 4];
        match self.read_region(BAR0, u64::from(offset), &mut bytes) {
            Ok(()) => u32::from_le_bytes(bytes),
            Err(_) => GONE,
        }
    }

    fn write(&self, offset: u32, value: u32) {
        // A device that is gone swallows writes; the next read tells.
        let _ = self.write_region(BAR0, u64::from(offset), &value.to_le_bytes(), true);
    }
}

impl Transport for VfioUser {
    fn name(&self) -> String {
        self.path.clone()
    }

    fn read_config(&self, offset: u32, bytes: &mut [u8]) -> io::Result<()> {
        self.read_region(CONFIG, u64::from(offset), bytes)
    }

    fn write_config(&self, offset: u32, bytes: &[u8]) -> io::Result<()> {
        self.write_region(CONFIG, u64::from(offset), bytes, false)
    }

    fn registers(self: Arc<Self>) -> io::Result<Bar> {
        Ok(Bar::called(self))
    }

    fn map_dma(&self, range: &DmaRange<'_>) -> io::Result<()> {
        let body = Words::new()
            .u32(32)
            .u32(3)
            .u64(range.offset)
            .u64(range.iova)
            .u64(range.len);
        self.exchange(DMA_MAP, &body.0, Some(range.fd)).map(drop)
    }

    fn unmap_dma(&self, iova: u64, len: u64) -> io::Result<()> {
        let body = Words::new().u32(24).u32(0).u64(iova).u64(len);
        match self.exchange(DMA_UNMAP, &body.0, None) {
            // Nobody is there who could use the mapping on our behalf, and this connection maps nothing again.
            Err(_) if self.dead.load(Relaxed) => Ok(()),
            result => result.map(drop),
        }
    }

    fn vectors(&self) -> u32 {
        self.vectors
    }

    fn set_interrupts(&self, signals: &[Option<BorrowedFd<'_>>]) -> io::Result<()> {
        let irqs = |flags, start, count| {
            Words::new()
                .u32(20)
                .u32(flags)
                .u32(MSIX)
                .u32(start)
                .u32(count)
        };
        match self.exchange(SET_IRQS, &irqs(IRQ_OFF, 0, 0).0, None) {
            Err(_) if signals.is_empty() && self.dead.load(Relaxed) => return Ok(()),
            result => result?,
        };
        for (vector, signal) in signals.iter().enumerate() {
            if let Some(fd) = signal {
                let body = irqs(IRQ_EVENTFD, vector as u32, 1);
                self.exchange(SET_IRQS, &body.0, Some(fd.as_fd()))?;
            }
        }
        Ok(())
    }

    fn reset(&self) -> io::Result<()> {
        self.exchange(DEVICE_RESET, &[], None).map(drop)
    }
}

/// A message's body, little endian (the protocol says: native; servers run on the same host).
struct Words(Vec<u8>);

impl Words {
    fn new() -> Words {
        Words(Vec::with_capacity(40))
    }

    fn u32(mut self, value: u32) -> Words {
        self.0.extend_from_slice(&value.to_le_bytes());
        self
    }

    fn u64(mut self, value: u64) -> Words {
        self.0.extend_from_slice(&value.to_le_bytes());
        self
    }
}

fn wrong(what: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

fn bytes_at<const N: usize>(bytes: &[u8], at: usize) -> io::Result<[u8; N]> {
    bytes
        .get(at..at + N)
        .and_then(|part| part.try_into().ok())
        .ok_or_else(|| wrong("a short answer".into()))
}

fn u16_at(bytes: &[u8], at: usize) -> io::Result<u16> {
    bytes_at(bytes, at).map(u16::from_le_bytes)
}

fn u32_at(bytes: &[u8], at: usize) -> io::Result<u32> {
    bytes_at(bytes, at).map(u32::from_le_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> io::Result<u64> {
    bytes_at(bytes, at).map(u64::from_le_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    /// A server that answers with whatever bytes it was given, one piece per message.
    fn server(answers: Vec<Vec<u8>>) -> (UnixStream, std::thread::JoinHandle<()>) {
        let (client, mut server) = UnixStream::pair().unwrap();
        let thread = std::thread::spawn(move || {
            for answer in answers {
                let mut header = [0; HEADER];
                if server.read_exact(&mut header).is_err() {
                    return;
                }
                let size = u32_at(&header, 4).unwrap() as usize;
                let mut body = vec![0; size - HEADER];
                server.read_exact(&mut body).unwrap();
                let mut reply = answer.clone();
                if reply.len() >= HEADER {
                    reply[..4].copy_from_slice(&header[..4]);
                }
                server.write_all(&reply).unwrap();
            }
        });
        (client, thread)
    }

    fn reply(flags: u32, errno: u32, body: &[u8]) -> Vec<u8> {
        let mut words = Words::new().u32(0).u32((HEADER + body.len()) as u32);
        words = words.u32(flags).u32(errno);
        words.0.extend_from_slice(body);
        words.0
    }

    fn open(answers: Vec<Vec<u8>>) -> io::Result<Arc<VfioUser>> {
        let (client, thread) = server(answers);
        let result = VfioUser::new(client, "test".into());
        if result.is_err() {
            thread.join().unwrap();
        }
        result
    }

    fn greeting() -> Vec<u8> {
        reply(REPLY, 0, b"\0\0\0\0{}\0")
    }

    fn region(size: u64) -> Vec<u8> {
        reply(REPLY, 0, &Words::new().u64(0).u64(0).u64(size).u64(0).0)
    }

    #[test]
    fn a_bar_that_is_too_small_is_refused() {
        let error = open(vec![greeting(), region(4096)]).err().unwrap();
        assert!(error.to_string().contains("BAR0 has 4096 bytes"), "{error}");
    }

    #[test]
    fn answers_that_are_none_end_the_connection() {
        for nonsense in [
            reply(0, 0, &[0; 8]),
            Words::new().u32(0).u32(8).u32(REPLY).u32(0).0,
            Words::new().u32(0).u32(u32::MAX).u32(REPLY).u32(0).0,
            reply(REPLY, 0, &[]),
            reply(REPLY | ERROR, 22, &[]),
            reply(REPLY, 0, &[9, 0, 0, 0]),
            vec![0; 3],
        ] {
            assert!(open(vec![nonsense]).is_err());
        }
    }

    #[test]
    fn a_server_that_vanishes_is_a_device_that_was_pulled_out() {
        let irqs = reply(REPLY, 0, &Words::new().u32(16).u32(1).u32(2).u32(3).0);
        let command = reply(
            REPLY,
            0,
            &[Words::new().u64(4).u32(7).u32(2).0, vec![0, 0]].concat(),
        );
        let written = reply(REPLY, 0, &Words::new().u64(4).u32(7).u32(2).0);
        let device = open(vec![greeting(), region(16384), irqs, command, written]).unwrap();
        assert_eq!(device.vectors(), 3);
        assert_eq!(device.read(regs::VFSTATUS), GONE);
        device.write(regs::VFCTRL, 1);
        assert!(device.unmap_dma(0x1000, 0x1000).is_ok());
        assert!(device.set_interrupts(&[]).is_ok());
        assert!(device.reset().is_err());
    }
}
