//! A vhost-user frontend that says what a test wants said, byte by byte, and a switch that only remembers.
#![allow(dead_code, unreachable_pub)] // each test binary uses its part

use std::io::{ErrorKind, IoSlice, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use ringway::control::port_handle::{PortHandle, Rings, SessionReport};
use ringway::control::state::{PortSpec, PortState};
use ringway::control::vhost_user::Session;
use rustix::event::{EventfdFlags, eventfd};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};

pub const VERSION: u32 = 1;
pub const REPLY: u32 = 4;
pub const NEED_REPLY: u32 = 8;

/// Requests by number (vhost-user specification).
pub mod req {
    pub const GET_FEATURES: u32 = 1;
    pub const SET_FEATURES: u32 = 2;
    pub const SET_OWNER: u32 = 3;
    pub const SET_MEM_TABLE: u32 = 5;
    pub const SET_VRING_NUM: u32 = 8;
    pub const SET_VRING_ADDR: u32 = 9;
    pub const SET_VRING_BASE: u32 = 10;
    pub const GET_VRING_BASE: u32 = 11;
    pub const SET_VRING_KICK: u32 = 12;
    pub const SET_VRING_CALL: u32 = 13;
    pub const SET_VRING_ERR: u32 = 14;
    pub const GET_PROTOCOL_FEATURES: u32 = 15;
    pub const SET_PROTOCOL_FEATURES: u32 = 16;
    pub const GET_QUEUE_NUM: u32 = 17;
    pub const SET_VRING_ENABLE: u32 = 18;
    pub const SEND_RARP: u32 = 19;
    pub const NET_SET_MTU: u32 = 20;
    pub const GET_CONFIG: u32 = 24;
    pub const GET_MAX_MEM_SLOTS: u32 = 36;
    pub const ADD_MEM_REG: u32 = 37;
    pub const REM_MEM_REG: u32 = 38;
    pub const SET_STATUS: u32 = 39;
    pub const GET_STATUS: u32 = 40;
}

/// What DPDK's virtio_user chooses by default, and with `packed_vq=1`.
pub const DPDK_SPLIT: u64 = 0x9_5000_8000;
pub const DPDK_PACKED: u64 = 0xd_5000_8000;
/// MQ, REPLY_ACK, STATUS.
pub const DPDK_PROTOCOL: u64 = 0x1_0009;

/// A switch that keeps the rings it gets.
#[derive(Default)]
pub struct Recorder {
    seen: Mutex<Seen>,
    change: Condvar,
}

#[derive(Default)]
pub struct Seen {
    pub rings: Option<Rings>,
    pub attached: usize,
    pub detached: usize,
    pub report: SessionReport,
    pub reports: usize,
}

impl PortHandle for Recorder {
    fn attach(&self, rings: Rings) -> anyhow::Result<()> {
        let mut seen = self.seen.lock().unwrap();
        assert!(seen.rings.is_none(), "attached twice without detaching");
        seen.rings = Some(rings);
        seen.attached += 1;
        Ok(())
    }

    fn detach(&self) -> Rings {
        let mut seen = self.seen.lock().unwrap();
        seen.detached += 1;
        seen.rings.take().unwrap_or_default()
    }

    fn report(&self, report: SessionReport) {
        let mut seen = self.seen.lock().unwrap();
        seen.report = report;
        seen.reports += 1;
        self.change.notify_all();
    }
}

impl Recorder {
    /// Waits for a report that `wanted` likes.
    pub fn wait(&self, what: &str, wanted: impl Fn(&SessionReport) -> bool) -> SessionReport {
        self.wait_for(what, Duration::from_secs(10), wanted)
    }

    pub fn wait_for(
        &self,
        what: &str,
        most: Duration,
        wanted: impl Fn(&SessionReport) -> bool,
    ) -> SessionReport {
        let seen = self.seen.lock().unwrap();
        let (seen, time) = self
            .change
            .wait_timeout_while(seen, most, |seen| !wanted(&seen.report))
            .unwrap();
        assert!(
            !time.timed_out(),
            "waited for {what}, have {:?}",
            seen.report
        );
        seen.report.clone()
    }

    pub fn wait_state(&self, state: PortState) -> SessionReport {
        self.wait(&state.to_string(), |report| report.state == state)
    }

    pub fn look<T>(&self, at: impl FnOnce(&mut Seen) -> T) -> T {
        at(&mut self.seen.lock().unwrap())
    }

    /// How often rings were attached, and how many are.
    pub fn attached(&self) -> (usize, usize) {
        self.look(|seen| {
            let now = seen
                .rings
                .as_ref()
                .map_or(0, |rings| rings.from_guest.len() + rings.to_guest.len());
            (seen.attached, now)
        })
    }
}

/// A port with its session, in a directory of its own.
pub struct Port {
    pub dir: tempfile::TempDir,
    pub spec: PortSpec,
    pub switch: Arc<Recorder>,
    pub session: Session,
}

impl Port {
    pub fn new(change: impl FnOnce(&mut PortSpec)) -> Port {
        let dir = tempfile::tempdir().unwrap();
        let mut spec = PortSpec::vhost_user("blue", dir.path().join("vhost.sock"));
        change(&mut spec);
        let switch = Arc::new(Recorder::default());
        let session = Session::start(&spec, switch.clone()).unwrap();
        Port {
            dir,
            spec,
            switch,
            session,
        }
    }

    pub fn server() -> Port {
        Port::new(|_| ())
    }

    pub fn connect(&self) -> Frontend {
        Frontend::new(UnixStream::connect(&self.spec.socket).unwrap())
    }
}

/// The guest's side of a connection.
pub struct Frontend {
    pub stream: UnixStream,
}

impl Frontend {
    pub fn new(stream: UnixStream) -> Frontend {
        stream
            .set_read_timeout(Some(Duration::from_secs(5)))
            .unwrap();
        Frontend { stream }
    }

    pub fn raw(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> rustix::io::Result<usize> {
        let mut space = [MaybeUninit::uninit(); 2048];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
        }
        rustix::net::sendmsg(
            &self.stream,
            &[IoSlice::new(bytes)],
            &mut control,
            SendFlags::NOSIGNAL,
        )
    }

    pub fn message(request: u32, flags: u32, payload: &[u8]) -> Vec<u8> {
        let words = [request, VERSION | flags, payload.len() as u32];
        words
            .iter()
            .flat_map(|word| word.to_ne_bytes())
            .chain(payload.iter().copied())
            .collect()
    }

    pub fn send(&self, request: u32, flags: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) {
        let message = Frontend::message(request, flags, payload);
        let sent = self.raw(&message, fds).expect("sent");
        assert_eq!(sent, message.len());
    }

    pub fn tell(&self, request: u32, value: u64) {
        self.send(request, 0, &value.to_ne_bytes(), &[]);
    }

    /// Index and number.
    pub fn ring(&self, request: u32, index: u32, number: u32) {
        self.tell(request, u64::from(index) | u64::from(number) << 32);
    }

    pub fn ring_fd(&self, request: u32, index: u64, fd: &OwnedFd) {
        self.send(request, 0, &index.to_ne_bytes(), &[fd.as_fd()]);
    }

    /// An answer: its flags must be VERSION|REPLY, its request that of the question.
    pub fn answer(&mut self, request: u32) -> Vec<u8> {
        let mut header = [0; 12];
        self.stream
            .read_exact(&mut header)
            .unwrap_or_else(|error| panic!("no answer to {request}: {error}"));
        let word = |at: usize| u32::from_ne_bytes(header[at..at + 4].try_into().unwrap());
        assert_eq!((word(0), word(4)), (request, VERSION | REPLY));
        let mut payload = vec![0; word(8) as usize];
        self.stream.read_exact(&mut payload).unwrap();
        payload
    }

    pub fn answer_u64(&mut self, request: u32) -> u64 {
        u64::from_ne_bytes(self.answer(request).try_into().expect("eight bytes"))
    }

    pub fn ask(&mut self, request: u32) -> u64 {
        self.send(request, 0, &[], &[]);
        self.answer_u64(request)
    }

    pub fn ask_base(&mut self, index: u32) -> u32 {
        self.ring(req::GET_VRING_BASE, index, 0);
        (self.answer_u64(req::GET_VRING_BASE) >> 32) as u32
    }

    /// The first messages of a frontend that knows no protocol features.
    pub fn open_plainly(&mut self, memory: &Memory) {
        self.ask(req::GET_FEATURES);
        self.tell(req::SET_FEATURES, 1 << 32);
        let fds = [memory.file.as_fd()];
        self.send(req::SET_MEM_TABLE, 0, &memory.table(), &fds);
    }

    /// Waits until everything sent has been dealt with.
    pub fn sync(&mut self) {
        self.ask(req::GET_FEATURES);
    }

    /// Whether the switch hangs up within `most`. What it says before is thrown away.
    pub fn hung_up_within(&mut self, most: Duration) -> bool {
        let end = Instant::now() + most;
        self.stream
            .set_read_timeout(Some(Duration::from_millis(20)))
            .unwrap();
        while Instant::now() < end {
            match self.stream.read(&mut [0; 4096]) {
                Ok(0) => return true,
                Ok(_) => {}
                Err(error)
                    if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
                Err(_) => return true,
            }
        }
        false
    }
}

/// A guest's memory with rings in it, each in 64 KiB of its own.
pub struct Memory {
    pub file: std::fs::File,
    pub gpa: u64,
    pub uva: u64,
    pub len: u64,
}

impl Memory {
    /// As DPDK has it: both addresses are the same.
    pub fn dpdk() -> Memory {
        Memory::at(0x1_0000_0000, 0x1_0000_0000)
    }

    pub fn at(gpa: u64, uva: u64) -> Memory {
        let len = 4 << 20;
        let fd = rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let file = std::fs::File::from(fd);
        file.set_len(len).unwrap();
        Memory {
            file,
            gpa,
            uva,
            len,
        }
    }

    fn region(&self) -> Vec<u8> {
        [self.gpa, self.len, self.uva, 0]
            .iter()
            .flat_map(|word| word.to_ne_bytes())
            .collect()
    }

    pub fn table(&self) -> Vec<u8> {
        [&1u64.to_ne_bytes()[..], &self.region()].concat()
    }

    pub fn single(&self) -> Vec<u8> {
        [&0u64.to_ne_bytes()[..], &self.region()].concat()
    }

    /// Offset of a ring in the file.
    pub fn offset(ring: u32) -> u64 {
        u64::from(ring) * 0x1_0000
    }

    /// SET_VRING_ADDR's payload. Descriptors, then at 0x4000 the available ring, at 0x8000 the used ring.
    pub fn addr(&self, ring: u32) -> Vec<u8> {
        let at = self.uva + Memory::offset(ring);
        let parts = [u64::from(ring), at, at + 0x8000, at + 0x4000, 0];
        parts.iter().flat_map(|word| word.to_ne_bytes()).collect()
    }

    /// What both sides believe the split ring's used index to be, with nothing on its way.
    pub fn set_used_idx(&self, ring: u32, idx: u16) {
        for part in [0x4002, 0x8002] {
            self.file
                .write_all_at(&idx.to_le_bytes(), Memory::offset(ring) + part)
                .unwrap();
        }
    }
}

pub fn event() -> OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC).unwrap()
}

/// One start of virtio_user, as DPDK 22.11 sends it.
pub fn dpdk_start(guest: &mut Frontend, memory: &Memory, pairs: u32, features: u64) {
    guest.send(req::SET_OWNER, 0, &[], &[]);
    let offered = guest.ask(req::GET_FEATURES);
    assert_eq!(
        features & !offered,
        0,
        "not offered: {:#x}",
        features & !offered
    );
    let protocol = guest.ask(req::GET_PROTOCOL_FEATURES);
    assert_eq!(DPDK_PROTOCOL & !protocol, 0);
    guest.tell(req::SET_PROTOCOL_FEATURES, DPDK_PROTOCOL);
    let order: Vec<u32> = (0..pairs)
        .map(|pair| 2 * pair)
        .chain((0..pairs).map(|pair| 2 * pair + 1))
        .collect();
    for index in &order {
        guest.ring_fd(req::SET_VRING_CALL, u64::from(*index), &event());
    }
    guest.tell(req::SET_FEATURES, features);
    guest.send(req::SET_STATUS, NEED_REPLY, &0xbu64.to_ne_bytes(), &[]);
    assert_eq!(guest.answer_u64(req::SET_STATUS), 0);
    assert_eq!(guest.ask(req::GET_STATUS), 0xb);
    dpdk_rings(guest, memory, &order, features);
    guest.ring(req::SET_VRING_ENABLE, 0, 1);
    guest.ring(req::SET_VRING_ENABLE, 1, 1);
    guest.send(req::SET_STATUS, NEED_REPLY, &0xfu64.to_ne_bytes(), &[]);
    assert_eq!(guest.answer_u64(req::SET_STATUS), 0);
    for index in 2..2 * pairs {
        guest.ring(req::SET_VRING_ENABLE, index, 1);
    }
    guest.sync();
}

/// Memory table and rings.
pub fn dpdk_rings(guest: &mut Frontend, memory: &Memory, order: &[u32], features: u64) {
    send_table(guest, memory);
    let base = if features & 1 << 34 == 0 { 0 } else { 0x8000 };
    for index in order {
        guest.ring(req::SET_VRING_NUM, *index, 256);
        guest.ring(req::SET_VRING_BASE, *index, base);
        guest.send(req::SET_VRING_ADDR, 0, &memory.addr(*index), &[]);
        guest.ring_fd(req::SET_VRING_KICK, u64::from(*index), &event());
    }
}

pub fn send_table(guest: &mut Frontend, memory: &Memory) {
    guest.send(
        req::SET_MEM_TABLE,
        NEED_REPLY,
        &memory.table(),
        &[memory.file.as_fd()],
    );
    assert_eq!(guest.answer_u64(req::SET_MEM_TABLE), 0);
}

/// Open descriptors of this process.
pub fn open_fds() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

/// What this process has open, as `/proc/self/fd` names it.
pub fn open_files() -> Vec<String> {
    let open = std::fs::read_dir("/proc/self/fd").unwrap();
    open.filter_map(|entry| std::fs::read_link(entry.ok()?.path()).ok())
        .map(|file| file.to_string_lossy().into_owned())
        .collect()
}

pub fn exists(path: &Path) -> bool {
    path.symlink_metadata().is_ok()
}
