//! A thin filter between a frontend and the `vhost` crate.
//!
//! It reads one whole message with its descriptors, never blocking and never half; hands it on to `vhost` through a socket
//! pair, where `vhost` finds all of it at once; and sends the answer on. What `vhost` 0.18 would drop the connection for,
//! although real frontends send it, is answered here: SET_VRING_ENABLE before SET_FEATURES (QEMU at realize, virtio_user when
//! it reconnects), SET_STATUS and GET_STATUS, SEND_RARP, NET_SET_MTU, and requests nobody knows.

use std::fmt;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::cmsg_space;
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};
use vhost::vhost_user::BackendReqHandler;
use vhost::vhost_user::message::FrontendReq;

use super::vhost_device::Device;

/// How long a frontend may take over a message it has begun, and over an answer it has asked for.
pub(super) const PATIENCE: Duration = Duration::from_secs(1);
/// Largest payload `vhost` reads, and larger than any message has.
const PAYLOAD_MAX: usize = 4096;
/// request, flags, size: u32 each, in the host's byte order.
const HEADER: usize = 12;
/// Descriptors with one message: what `vhost` takes, more than the 8 the protocol allows.
const FDS_MAX: usize = 32;

/// Header flags.
const VERSION: u32 = 1;
const REPLY: u32 = 4;
const NEED_REPLY: u32 = 8;

/// The connection cannot go on: why, in a sentence.
#[derive(Debug)]
pub(super) struct Broken(pub(super) String);

impl Broken {
    fn new(why: impl fmt::Display) -> Broken {
        Broken(format!("{why}; the frontend is at fault"))
    }
}

/// What there was to read.
#[derive(PartialEq, Eq, Debug)]
pub(super) enum Heard {
    /// A message, and it was dealt with.
    Message,
    /// Nothing, or not yet all of a message.
    Nothing,
    /// The other side hung up.
    End,
}

/// One connection.
pub(super) struct Filter {
    stream: UnixStream,
    /// Our end of the pair; `vhost` has the other.
    inner: UnixStream,
    vhost: BackendReqHandler<Mutex<Device>>,
    device: Arc<Mutex<Device>>,
    /// The message being read.
    message: Message,
    /// What the frontend has not taken yet of an answer. Until it has, nothing more is read.
    unsent: Vec<u8>,
    /// When the frontend's time is up.
    deadline: Option<Instant>,
}

/// A message, or the beginning of one.
struct Message {
    bytes: Box<[u8; HEADER + PAYLOAD_MAX]>,
    have: usize,
    fds: Vec<OwnedFd>,
}

impl Message {
    fn word(&self, index: usize) -> u32 {
        let at = 4 * index;
        let mut word = [0; 4];
        word.copy_from_slice(&self.bytes[at..at + 4]);
        u32::from_ne_bytes(word)
    }

    fn request(&self) -> u32 {
        self.word(0)
    }

    fn flags(&self) -> u32 {
        self.word(1)
    }

    fn size(&self) -> usize {
        self.word(2) as usize
    }

    fn needs_reply(&self) -> bool {
        self.flags() & NEED_REPLY != 0
    }

    /// Bytes of the message, as far as is known: of the header, then of all.
    fn length(&self) -> usize {
        if self.have < HEADER {
            HEADER
        } else {
            HEADER + self.size()
        }
    }

    fn check_header(&self) -> Result<(), Broken> {
        let flags = self.flags();
        if flags & 3 != VERSION {
            return Err(Broken::new(format_args!(
                "it speaks version {} of vhost-user, not {VERSION}",
                flags & 3
            )));
        }
        if flags & !(3 | NEED_REPLY) != 0 {
            let what = if flags & REPLY == 0 {
                "reserved flags"
            } else {
                "an answer nobody asked for"
            };
            return Err(Broken::new(format_args!("{}: {what}", self.name())));
        }
        if self.size() > PAYLOAD_MAX {
            let (name, size) = (self.name(), self.size());
            return Err(Broken::new(format_args!(
                "{name} announces {size} bytes, no message has more than {PAYLOAD_MAX}"
            )));
        }
        Ok(())
    }

    /// The payload as a u64, which is all there is of it.
    fn u64(&self) -> Result<u64, Broken> {
        match self.bytes[HEADER..self.have].try_into() {
            Ok(bytes) => Ok(u64::from_ne_bytes(bytes)),
            Err(_) => Err(Broken::new(format_args!(
                "{} has {} bytes of payload",
                self.name(),
                self.size()
            ))),
        }
    }

    fn name(&self) -> String {
        FrontendReq::try_from(self.request()).map_or_else(
            |_| format!("request {}", self.request()),
            |name| format!("{name:?}"),
        )
    }
}

impl Filter {
    pub(super) fn new(stream: UnixStream, device: Device) -> io::Result<Filter> {
        let (inner, outer) = UnixStream::pair()?;
        let device = Arc::new(Mutex::new(device));
        Ok(Filter {
            stream,
            inner,
            vhost: BackendReqHandler::from_stream(outer, device.clone()),
            device,
            message: Message {
                bytes: Box::new([0; HEADER + PAYLOAD_MAX]),
                have: 0,
                fds: Vec::new(),
            },
            unsent: Vec::new(),
            deadline: None,
        })
    }

    /// The guest's device. Not kept across calls of the filter.
    pub(super) fn device(&self) -> MutexGuard<'_, Device> {
        self.device.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What to wait for, besides `deadline`: the descriptor, and whether for writing.
    pub(super) fn waits_for(&self) -> (BorrowedFd<'_>, bool) {
        (self.stream.as_fd(), !self.unsent.is_empty())
    }

    /// When the frontend's time is up, if it owes something.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    /// Deals with what has come, one message at most. Never blocks on the frontend.
    pub(super) fn listen(&mut self) -> Result<Heard, Broken> {
        if self
            .deadline
            .is_some_and(|deadline| Instant::now() >= deadline)
        {
            return Err(self.late());
        }
        if !self.unsent.is_empty() {
            self.send()?;
            return Ok(Heard::Nothing);
        }
        match self.read()? {
            Heard::Message => {}
            other => return Ok(other),
        }
        self.deadline = None;
        let handled = self.handle();
        self.message.have = 0;
        self.message.fds.clear();
        handled.map(|()| Heard::Message)
    }

    fn late(&self) -> Broken {
        let seconds = PATIENCE.as_secs();
        if self.unsent.is_empty() {
            Broken::new(format_args!(
                "it began a message and did not end it within {seconds} s"
            ))
        } else {
            Broken::new(format_args!("it did not read an answer within {seconds} s"))
        }
    }

    /// Reads on. `Message`: there is a whole one.
    fn read(&mut self) -> Result<Heard, Broken> {
        loop {
            if self.message.have == HEADER {
                self.message.check_header()?;
            }
            let length = self.message.length();
            if self.message.have == length {
                return Ok(Heard::Message);
            }
            match self.receive(length)? {
                Heard::Message => {}
                Heard::End if self.message.have > 0 => {
                    return Err(Broken::new("it hung up in the middle of a message"));
                }
                other => return Ok(other),
            }
            self.deadline
                .get_or_insert_with(|| Instant::now() + PATIENCE);
        }
    }

    /// Receives up to byte `length` of the message. Never more: descriptors belong to the bytes they came with.
    fn receive(&mut self, length: usize) -> Result<Heard, Broken> {
        let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(FDS_MAX))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let message = &mut self.message;
        let mut into = [IoSliceMut::new(&mut message.bytes[message.have..length])];
        let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        let got = match rustix::net::recvmsg(&self.stream, &mut into, &mut control, flags) {
            Ok(got) => got,
            Err(Errno::AGAIN | Errno::INTR) => return Ok(Heard::Nothing),
            Err(Errno::CONNRESET) => return Ok(Heard::End),
            Err(error) => return Err(Broken(format!("the connection failed: {error}"))),
        };
        for part in control.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = part {
                message.fds.extend(fds);
            }
        }
        if got.flags.contains(ReturnFlags::CTRUNC) || message.fds.len() > FDS_MAX {
            return Err(Broken::new(format_args!(
                "a message came with more than {FDS_MAX} descriptors, or we may open no more of them"
            )));
        }
        message.have += got.bytes;
        Ok(if got.bytes == 0 {
            Heard::End
        } else {
            Heard::Message
        })
    }

    /// Deals with a whole message.
    fn handle(&mut self) -> Result<(), Broken> {
        use FrontendReq as Req;
        let (fds, most) = (self.message.fds.len(), fds_of(self.message.request()));
        if fds > most {
            return Err(Broken::new(format_args!(
                "{} came with {fds} descriptors, it may have {most}",
                self.message.name()
            )));
        }
        match FrontendReq::try_from(self.message.request()) {
            Ok(Req::SET_VRING_ENABLE) if !self.device().has_protocol_features() => self.enable(),
            Ok(Req::SET_STATUS) => {
                let status = self.message.u64()? as u8;
                let done = self.device().set_status(status).is_ok();
                self.acknowledge(done)
            }
            Ok(Req::GET_STATUS) => {
                let status = self.device().status();
                self.answer(&u64::from(status).to_ne_bytes())
            }
            Ok(Req::NET_SET_MTU) => {
                let mtu = self.message.u64()?;
                let done = self.device().set_mtu(mtu).is_ok();
                self.acknowledge(done)
            }
            // Never offered, and there is nothing to do: guests announce themselves.
            Ok(Req::SEND_RARP) => self.acknowledge(true),
            Ok(known) if is_served(known) => self.pass_on(),
            _ => {
                let name = self.message.name();
                self.device()
                    .complain(format!("{name} was not offered; the frontend is at fault"));
                self.acknowledge(false)
            }
        }
    }

    /// SET_VRING_ENABLE before the features are known.
    fn enable(&mut self) -> Result<(), Broken> {
        let both = self.message.u64()?.to_ne_bytes();
        let (index, enable) = both.split_at(4);
        let word = |bytes: &[u8]| bytes.try_into().map(u32::from_ne_bytes).unwrap_or(u32::MAX);
        let (index, enable) = (word(index), word(enable));
        let done = enable <= 1 && self.device().enable(index, enable == 1).is_ok();
        self.acknowledge(done)
    }

    /// Says how a message that needs no answer went, if the frontend asks. A failure that cannot be told ends the connection.
    fn acknowledge(&mut self, done: bool) -> Result<(), Broken> {
        if self.message.needs_reply() && self.device().acknowledges() {
            self.answer(&u64::from(!done).to_ne_bytes())
        } else if done {
            Ok(())
        } else {
            let why = self.device().complaint().map(str::to_owned);
            Err(why.map_or_else(
                || Broken::new(format_args!("{} was refused", self.message.name())),
                Broken,
            ))
        }
    }

    fn answer(&mut self, payload: &[u8]) -> Result<(), Broken> {
        for word in [
            self.message.request(),
            VERSION | REPLY,
            payload.len() as u32,
        ] {
            self.unsent.extend(word.to_ne_bytes());
        }
        self.unsent.extend(payload);
        self.send()
    }

    /// Lets `vhost` deal with the message, and sends its answer on.
    fn pass_on(&mut self) -> Result<(), Broken> {
        let ours = |error: Errno| {
            Broken(format!(
                "no way to pass a message on inside Ringway: {error}"
            ))
        };
        self.forward().map_err(ours)?;
        let handled = self.vhost.handle_request();
        let mut reply = [0; HEADER + PAYLOAD_MAX];
        let (got, _) = match rustix::net::recv(&self.inner, &mut reply[..], RecvFlags::DONTWAIT) {
            Err(Errno::AGAIN) => (0, 0),
            other => other.map_err(ours)?,
        };
        self.unsent.extend(&reply[..got]);
        let answered = got > 0;
        self.send()?;
        match handled {
            // The frontend knows, and the connection is sound.
            Err(error) if answered => {
                log::debug!("{}: {error}", self.message.name());
                Ok(())
            }
            Err(error) => {
                let why = self.device().complaint().map(str::to_owned);
                Err(why.map_or_else(
                    || Broken::new(format_args!("{}: {error}", self.message.name())),
                    Broken,
                ))
            }
            // Without GET_FEATURES on this very connection `vhost` believes that nobody asks for acknowledgements.
            Ok(()) if !answered => self.acknowledge(true),
            Ok(()) => Ok(()),
        }
    }

    fn forward(&self) -> Result<(), Errno> {
        let fds: Vec<BorrowedFd<'_>> = self.message.fds.iter().map(AsFd::as_fd).collect();
        let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(FDS_MAX))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            control.push(SendAncillaryMessage::ScmRights(&fds));
        }
        let bytes = &self.message.bytes[..self.message.have];
        // The pair is empty, and a message is far smaller than its buffer: all of it goes, at once.
        let sent = rustix::net::sendmsg(
            &self.inner,
            &[IoSlice::new(bytes)],
            &mut control,
            SendFlags::DONTWAIT | SendFlags::NOSIGNAL,
        )?;
        if sent == bytes.len() {
            Ok(())
        } else {
            Err(Errno::NOBUFS)
        }
    }

    /// Sends what is to be sent, as far as the frontend lets us. An answer leaves in one piece: DPDK takes no less.
    fn send(&mut self) -> Result<(), Broken> {
        if self.unsent.is_empty() {
            return Ok(());
        }
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        match rustix::net::send(&self.stream, &self.unsent, flags) {
            Ok(sent) => drop(self.unsent.drain(..sent)),
            Err(Errno::AGAIN | Errno::INTR) => {}
            // It hung up; the next read says so, after what it may have sent before.
            Err(Errno::PIPE | Errno::CONNRESET) => self.unsent.clear(),
            Err(error) => return Err(Broken(format!("the connection failed: {error}"))),
        }
        if self.unsent.is_empty() {
            self.deadline = None;
        } else {
            self.deadline
                .get_or_insert_with(|| Instant::now() + PATIENCE);
        }
        Ok(())
    }
}

/// Descriptors a request may come with. What comes beyond is closed, and so is the connection: nobody sends them by mistake.
fn fds_of(request: u32) -> usize {
    use FrontendReq as Req;
    match FrontendReq::try_from(request) {
        Ok(Req::SET_MEM_TABLE) => FDS_MAX,
        Ok(Req::SET_VRING_KICK | Req::SET_VRING_CALL | Req::SET_VRING_ERR) => 1,
        // The specification asks to bear with one at REM_MEM_REG. The last is refused below, with a better sentence.
        Ok(Req::ADD_MEM_REG | Req::REM_MEM_REG | Req::SET_BACKEND_REQ_FD) => 1,
        _ => 0,
    }
}

/// Requests that `vhost` handles for us; of the others it would say no word.
fn is_served(request: FrontendReq) -> bool {
    use FrontendReq as Req;
    matches!(
        request,
        Req::GET_FEATURES
            | Req::SET_FEATURES
            | Req::SET_OWNER
            | Req::RESET_OWNER
            | Req::SET_MEM_TABLE
            | Req::SET_VRING_NUM
            | Req::SET_VRING_ADDR
            | Req::SET_VRING_BASE
            | Req::GET_VRING_BASE
            | Req::SET_VRING_KICK
            | Req::SET_VRING_CALL
            | Req::SET_VRING_ERR
            | Req::GET_PROTOCOL_FEATURES
            | Req::SET_PROTOCOL_FEATURES
            | Req::GET_QUEUE_NUM
            | Req::SET_VRING_ENABLE
            | Req::RESET_DEVICE
            | Req::GET_MAX_MEM_SLOTS
            | Req::ADD_MEM_REG
            | Req::REM_MEM_REG
    )
}
