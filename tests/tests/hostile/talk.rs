//! vhost-user as an attacker speaks it: any bytes, any descriptors, any order.

use std::io::{ErrorKind, IoSlice, Read as _};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use ringway::guest::messages::{RegionEntry, mem_table};
use ringway::virtio::own_mem::OwnMem;
use ringway::virtio::ring::feature;
use rustix::event::{EventfdFlags, eventfd};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

use super::api::PATIENCE;

/// Requests by number: an attacker also sends those that do not exist.
pub(super) mod req {
    pub(in super::super) const GET_FEATURES: u32 = 1;
    pub(in super::super) const SET_FEATURES: u32 = 2;
    pub(in super::super) const SET_OWNER: u32 = 3;
    pub(in super::super) const RESET_OWNER: u32 = 4;
    pub(in super::super) const SET_MEM_TABLE: u32 = 5;
    pub(in super::super) const SET_LOG_BASE: u32 = 6;
    pub(in super::super) const SET_LOG_FD: u32 = 7;
    pub(in super::super) const SET_VRING_NUM: u32 = 8;
    pub(in super::super) const SET_VRING_ADDR: u32 = 9;
    pub(in super::super) const SET_VRING_BASE: u32 = 10;
    pub(in super::super) const GET_VRING_BASE: u32 = 11;
    pub(in super::super) const SET_VRING_KICK: u32 = 12;
    pub(in super::super) const SET_VRING_CALL: u32 = 13;
    pub(in super::super) const SET_VRING_ERR: u32 = 14;
    pub(in super::super) const GET_PROTOCOL_FEATURES: u32 = 15;
    pub(in super::super) const SET_PROTOCOL_FEATURES: u32 = 16;
    pub(in super::super) const SET_VRING_ENABLE: u32 = 18;
    pub(in super::super) const SET_BACKEND_REQ_FD: u32 = 21;
    pub(in super::super) const GET_INFLIGHT_FD: u32 = 31;
    pub(in super::super) const SET_INFLIGHT_FD: u32 = 32;
}

/// Header flags: version 1, and "tell me how it went".
pub(super) const PLAIN: u32 = 1;
pub(super) const NEED_REPLY: u32 = 1 | 8;
/// MQ and REPLY_ACK.
const ACKS: u64 = 1 | 8;

/// A connection on which anything may be said.
pub(super) struct Talk {
    stream: UnixStream,
}

impl Talk {
    /// Connects; the port may still be busy with somebody else.
    pub(super) fn to(socket: &Path) -> Result<Talk> {
        let end = Instant::now() + PATIENCE;
        loop {
            match UnixStream::connect(socket) {
                Ok(stream) => return Talk::over(&stream),
                Err(error) if Instant::now() > end => return Err(error).context("to the port"),
                Err(_) => std::thread::sleep(Duration::from_millis(2)),
            }
        }
    }

    /// Speaks over a guest's connection.
    pub(super) fn over(stream: &UnixStream) -> Result<Talk> {
        let stream = stream.try_clone()?;
        stream.set_write_timeout(Some(PATIENCE))?;
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(Talk { stream })
    }

    /// The socket.
    pub(super) fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// Sends bytes with descriptors; false if the switch has hung up.
    pub(super) fn bytes(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<bool> {
        let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
            bail!("too many descriptors");
        }
        match sendmsg(
            &self.stream,
            &[IoSlice::new(bytes)],
            &mut control,
            SendFlags::NOSIGNAL,
        ) {
            Ok(sent) => Ok(sent == bytes.len()),
            Err(_) => Ok(false),
        }
    }

    /// Sends a message; false if the switch has hung up.
    pub(super) fn say(&self, request: u32, payload: &[u8]) -> Result<bool> {
        self.bytes(&message(request, PLAIN, payload), &[])
    }

    /// Sends a message with descriptors.
    pub(super) fn say_with(
        &self,
        request: u32,
        payload: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<bool> {
        self.bytes(&message(request, PLAIN, payload), fds)
    }

    /// Sends a message that asks for an answer, and returns its number; none if the switch hangs up instead.
    pub(super) fn ask(
        &self,
        request: u32,
        payload: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<Option<u64>> {
        if !self.bytes(&message(request, NEED_REPLY, payload), fds)? {
            return Ok(None);
        }
        self.hear()
    }

    /// The number in the next answer; none if the switch hangs up.
    pub(super) fn hear(&self) -> Result<Option<u64>> {
        let (mut header, mut stream) = ([0; 12], &self.stream);
        let over = |error: std::io::Error| match error.kind() {
            ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset | ErrorKind::BrokenPipe => {
                Ok(None)
            }
            _ => Err(error).context("no answer and no end"),
        };
        if let Err(error) = stream.read_exact(&mut header) {
            return over(error);
        }
        let size = u32::from_le_bytes([header[8], header[9], header[10], header[11]]);
        let mut payload = vec![0; size as usize];
        if let Err(error) = stream.read_exact(&mut payload) {
            return over(error);
        }
        payload.resize(8, 0);
        Ok(Some(
            payload
                .iter()
                .rev()
                .fold(0, |number, byte| number << 8 | u64::from(*byte)),
        ))
    }

    /// Waits until the switch has hung up.
    pub(super) fn wait_closed(&self) -> Result<()> {
        while self.hear()?.is_some() {}
        Ok(())
    }

    /// Owner, features and protocol features, as an honest frontend agrees on them. With `acks` refusals are answers.
    pub(super) fn shake(&self, acks: bool, features: u64) -> Result<()> {
        self.say(req::SET_OWNER, &[])?;
        self.say(req::GET_FEATURES, &[])?;
        let offered = self.hear()?.context("the switch hung up at GET_FEATURES")?;
        self.say(req::GET_PROTOCOL_FEATURES, &[])?;
        self.hear()?;
        let chosen = if acks { ACKS } else { 1 };
        self.say(req::SET_PROTOCOL_FEATURES, &u64::to_le_bytes(chosen))?;
        let features = (features | feature::VERSION_1 | feature::PROTOCOL_FEATURES) & offered;
        self.say(req::SET_FEATURES, &features.to_le_bytes())?;
        Ok(())
    }

    /// Shares a memory, the whole of it, as an honest frontend does.
    pub(super) fn share(&self, memory: &OwnMem) -> Result<bool> {
        self.say_with(
            req::SET_MEM_TABLE,
            &mem_table(&[whole(memory)]),
            &[memory.fd()],
        )
    }
}

/// A memory as one region.
pub(super) fn whole(memory: &OwnMem) -> RegionEntry {
    RegionEntry {
        guest: memory.gpa(),
        size: memory.len(),
        user: memory.uva(),
        offset: 0,
    }
}

/// A message with any request and flags.
pub(super) fn message(request: u32, flags: u32, payload: &[u8]) -> Vec<u8> {
    let head = [request, flags, payload.len() as u32];
    let mut bytes: Vec<u8> = head.into_iter().flat_map(u32::to_le_bytes).collect();
    bytes.extend(payload);
    bytes
}

/// Payload of two u32: ring and number.
pub(super) fn pair(index: u32, number: u32) -> [u8; 8] {
    (u64::from(number) << 32 | u64::from(index)).to_le_bytes()
}

/// An eventfd.
pub(super) fn event() -> Result<OwnedFd> {
    Ok(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?)
}

/// Many references to the same descriptors.
pub(super) fn times<'a>(fd: &'a impl AsFd, count: usize) -> Vec<BorrowedFd<'a>> {
    vec![fd.as_fd(); count]
}
