//! vhost-user messages as a frontend sends them, each within a deadline.
//!
//! The `vhost` crate has a frontend too. It waits for an answer without end, and a generator must survive a backend that
//! hangs in the handshake; it also cannot send what the tests of lying guests send: half a message.

use std::io::{self, ErrorKind, IoSlice, Read};
use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

/// File descriptors per message (vhost-user: VHOST_MEMORY_MAX_NREGIONS).
const FDS_MAX: usize = 8;
/// Bytes of a message before its payload.
pub const HEADER: usize = 12;
/// Version 1, in the lowest bits of the flags.
const VERSION: u32 = 1;
const REPLY: u32 = 1 << 2;
const NEED_REPLY: u32 = 1 << 3;

/// Protocol feature bits (vhost-user, "Protocol features").
pub mod protocol {
    /// Several queue pairs.
    pub const MQ: u64 = 1 << 0;
    /// Any request can ask for an answer.
    pub const REPLY_ACK: u64 = 1 << 3;
}

/// Requests of a frontend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
#[allow(missing_docs)] // the names of the specification say it
pub enum Request {
    GetFeatures = 1,
    SetFeatures = 2,
    SetOwner = 3,
    SetMemTable = 5,
    SetVringNum = 8,
    SetVringAddr = 9,
    SetVringBase = 10,
    GetVringBase = 11,
    SetVringKick = 12,
    SetVringCall = 13,
    GetProtocolFeatures = 15,
    SetProtocolFeatures = 16,
    GetQueueNum = 17,
    SetVringEnable = 18,
}

impl Request {
    /// The name of the specification.
    pub fn name(self) -> &'static str {
        match self {
            Request::GetFeatures => "GET_FEATURES",
            Request::SetFeatures => "SET_FEATURES",
            Request::SetOwner => "SET_OWNER",
            Request::SetMemTable => "SET_MEM_TABLE",
            Request::SetVringNum => "SET_VRING_NUM",
            Request::SetVringAddr => "SET_VRING_ADDR",
            Request::SetVringBase => "SET_VRING_BASE",
            Request::GetVringBase => "GET_VRING_BASE",
            Request::SetVringKick => "SET_VRING_KICK",
            Request::SetVringCall => "SET_VRING_CALL",
            Request::GetProtocolFeatures => "GET_PROTOCOL_FEATURES",
            Request::SetProtocolFeatures => "SET_PROTOCOL_FEATURES",
            Request::GetQueueNum => "GET_QUEUE_NUM",
            Request::SetVringEnable => "SET_VRING_ENABLE",
        }
    }
}

/// A message could not be exchanged.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// No answer within the deadline.
    #[error("{} was not answered within {after:?}", .request.name())]
    Timeout {
        /// The request.
        request: Request,
        /// The deadline.
        after: Duration,
    },
    /// The backend closed the connection instead of answering.
    #[error("the backend closed the connection at {}", .0.name())]
    Closed(Request),
    /// The backend's answer is not one.
    #[error("the answer to {} is malformed: {what}", .request.name())]
    Malformed {
        /// The request.
        request: Request,
        /// What is wrong with it.
        what: String,
    },
    /// The backend answered with an error.
    #[error("the backend refused {}", .0.name())]
    Refused(Request),
    /// The socket failed.
    #[error("{}: {cause}", .request.name())]
    Socket {
        /// The request.
        request: Request,
        /// What the kernel said.
        cause: io::Error,
    },
}

/// A connection to a backend.
#[derive(Debug)]
pub struct Link {
    stream: UnixStream,
    /// How long one request may take.
    patience: Duration,
    /// REPLY_ACK was negotiated.
    pub acks: bool,
}

impl Link {
    /// Speaks over `stream`; no request takes longer than `patience`.
    pub fn new(stream: UnixStream, patience: Duration) -> Link {
        Link {
            stream,
            patience,
            acks: false,
        }
    }

    /// The socket itself, for those who want to say something else.
    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// Sends a request that is not answered.
    pub fn tell(
        &self,
        request: Request,
        payload: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), LinkError> {
        self.send(request, VERSION, payload, fds)
    }

    /// Sends a request and waits until the backend has said that it was carried out, where it can say so.
    pub fn tell_acked(
        &self,
        request: Request,
        payload: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), LinkError> {
        if !self.acks {
            return self.tell(request, payload, fds);
        }
        self.send(request, VERSION | NEED_REPLY, payload, fds)?;
        match u64::from_le_bytes(self.answer(request)?) {
            0 => Ok(()),
            _ => Err(LinkError::Refused(request)),
        }
    }

    /// Sends a request without payload and reads its answer of one number.
    pub fn ask(&self, request: Request) -> Result<u64, LinkError> {
        self.send(request, VERSION, &[], &[])?;
        self.answer(request).map(u64::from_le_bytes)
    }

    /// GET_VRING_BASE: stops ring `index` and reads where it stopped.
    pub fn vring_base(&self, index: u32) -> Result<u32, LinkError> {
        let request = Request::GetVringBase;
        self.send(request, VERSION, &state(index, 0), &[])?;
        let answer: [u8; 8] = self.answer(request)?;
        Ok(u64::from_le_bytes(answer).wrapping_shr(32) as u32)
    }

    fn send(
        &self,
        request: Request,
        flags: u32,
        payload: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), LinkError> {
        let socket = |cause: io::Error| self.failed(request, cause);
        self.stream
            .set_write_timeout(Some(self.patience))
            .map_err(socket)?;
        let message = encode(request, flags, payload);
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(socket(io::Error::other("too many file descriptors")));
        }
        let sent = sendmsg(
            &self.stream,
            &[IoSlice::new(&message)],
            &mut control,
            SendFlags::NOSIGNAL,
        )
        .map_err(|errno| socket(errno.into()))?;
        match sent == message.len() {
            true => Ok(()),
            false => Err(socket(io::Error::other("sent in part only"))),
        }
    }

    fn failed(&self, request: Request, cause: io::Error) -> LinkError {
        match cause.kind() {
            ErrorKind::WouldBlock | ErrorKind::TimedOut => LinkError::Timeout {
                request,
                after: self.patience,
            },
            ErrorKind::BrokenPipe | ErrorKind::ConnectionReset | ErrorKind::UnexpectedEof => {
                LinkError::Closed(request)
            }
            _ => LinkError::Socket { request, cause },
        }
    }

    /// Reads the answer to `request`: a header and `N` bytes.
    fn answer<const N: usize>(&self, request: Request) -> Result<[u8; N], LinkError> {
        let end = Instant::now() + self.patience;
        let mut header = [0; HEADER];
        self.read(request, &mut header, end)?;
        let word =
            |i: usize| u32::from_le_bytes([header[i], header[i + 1], header[i + 2], header[i + 3]]);
        let (code, flags, size) = (word(0), word(4), word(8));
        let malformed = |what| Err(LinkError::Malformed { request, what });
        if code != request as u32 {
            return malformed(format!("it answers request {code}"));
        }
        if flags & (REPLY | 3) != REPLY | VERSION {
            return malformed(format!("its flags are {flags:#x}"));
        }
        if size as usize != N {
            return malformed(format!("it has {size} bytes instead of {N}"));
        }
        let mut payload = [0; N];
        self.read(request, &mut payload, end)?;
        Ok(payload)
    }

    fn read(&self, request: Request, mut into: &mut [u8], end: Instant) -> Result<(), LinkError> {
        while !into.is_empty() {
            let left = end.saturating_duration_since(Instant::now());
            let outcome = if left.is_zero() {
                Err(ErrorKind::TimedOut.into())
            } else {
                self.stream
                    .set_read_timeout(Some(left))
                    .and_then(|()| (&self.stream).read(into))
            };
            match outcome {
                Ok(0) => return Err(LinkError::Closed(request)),
                Ok(read) => into = &mut into[read..],
                Err(cause) if cause.kind() == ErrorKind::Interrupted => {}
                Err(cause) => return Err(self.failed(request, cause)),
            }
        }
        Ok(())
    }
}

/// A whole message.
pub fn encode(request: Request, flags: u32, payload: &[u8]) -> Vec<u8> {
    let mut message = Vec::with_capacity(HEADER + payload.len());
    for word in [request as u32, flags, payload.len() as u32] {
        message.extend_from_slice(&word.to_le_bytes());
    }
    message.extend_from_slice(payload);
    message
}

/// Payload of SET_VRING_NUM, BASE, ENABLE: ring and number.
pub fn state(index: u32, number: u32) -> [u8; 8] {
    (u64::from(number) << 32 | u64::from(index)).to_le_bytes()
}

/// Payload of SET_VRING_ADDR.
pub fn addresses(index: u32, desc: u64, used: u64, avail: u64) -> Vec<u8> {
    // The flags and the log address are 0: no logging.
    [u64::from(index), desc, used, avail, 0]
        .iter()
        .flat_map(|word| word.to_le_bytes())
        .collect()
}

/// A memory region in SET_MEM_TABLE.
#[derive(Clone, Copy, Debug)]
pub struct RegionEntry {
    /// Guest address.
    pub guest: u64,
    /// Bytes.
    pub size: u64,
    /// Frontend's address.
    pub user: u64,
    /// Offset in its file.
    pub offset: u64,
}

/// Payload of SET_MEM_TABLE.
pub fn mem_table(regions: &[RegionEntry]) -> Vec<u8> {
    let entries = regions
        .iter()
        .flat_map(|region| [region.guest, region.size, region.user, region.offset]);
    std::iter::once(regions.len() as u64)
        .chain(entries)
        .flat_map(u64::to_le_bytes)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn link(patience: u64) -> (Link, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (Link::new(ours, Duration::from_millis(patience)), theirs)
    }

    fn reply(theirs: &mut UnixStream, code: u32, flags: u32, payload: &[u8]) {
        let mut message = Vec::new();
        for word in [code, flags, payload.len() as u32] {
            message.extend_from_slice(&word.to_le_bytes());
        }
        message.extend_from_slice(payload);
        theirs.write_all(&message).unwrap();
    }

    #[test]
    fn a_backend_that_does_not_answer_is_a_sentence_not_a_hang() {
        let (link, _theirs) = link(20);
        let said = link.ask(Request::GetFeatures).unwrap_err().to_string();
        assert_eq!(said, "GET_FEATURES was not answered within 20ms");
    }

    #[test]
    fn an_answer_that_trickles_in_does_not_extend_the_deadline() {
        let (link, mut theirs) = link(60);
        let trickle = std::thread::spawn(move || {
            for byte in encode(Request::GetFeatures, VERSION | REPLY, &[0; 8]) {
                std::thread::sleep(Duration::from_millis(10));
                if theirs.write_all(&[byte]).is_err() {
                    break;
                }
            }
        });
        let began = Instant::now();
        assert!(matches!(
            link.ask(Request::GetFeatures),
            Err(LinkError::Timeout { .. })
        ));
        assert!(began.elapsed() < Duration::from_millis(160));
        drop(link);
        trickle.join().unwrap();
    }

    #[test]
    fn a_closed_connection_names_the_step() {
        let (link, theirs) = link(1000);
        drop(theirs);
        let said = link.ask(Request::GetQueueNum).unwrap_err().to_string();
        assert!(said.contains("GET_QUEUE_NUM"), "{said}");
    }

    #[test]
    fn answers_are_checked_before_they_are_believed() {
        let wrong = [(2, 5, 8usize), (1, 1, 8), (1, 5, 4), (1, 6, 8)];
        for (code, flags, size) in wrong {
            let (link, mut theirs) = link(1000);
            reply(&mut theirs, code, flags, &vec![0; size]);
            assert!(matches!(
                link.ask(Request::GetFeatures),
                Err(LinkError::Malformed { .. })
            ));
        }
        let (link, mut theirs) = link(1000);
        reply(&mut theirs, 1, 5, &77u64.to_le_bytes());
        assert_eq!(link.ask(Request::GetFeatures).unwrap(), 77);
    }

    #[test]
    fn a_refusal_is_told_where_the_backend_can_refuse() {
        let (mut link, mut theirs) = link(1000);
        link.acks = true;
        reply(&mut theirs, 5, 5, &1u64.to_le_bytes());
        assert!(matches!(
            link.tell_acked(Request::SetMemTable, &[], &[]),
            Err(LinkError::Refused(Request::SetMemTable))
        ));
    }

    #[test]
    fn payloads_have_the_sizes_of_the_specification() {
        assert_eq!(state(3, 9), [3, 0, 0, 0, 9, 0, 0, 0]);
        assert_eq!(addresses(1, 2, 3, 4).len(), 40);
        let region = RegionEntry {
            guest: 1,
            size: 2,
            user: 3,
            offset: 4,
        };
        assert_eq!(mem_table(&[region; 2]).len(), 8 + 2 * 32);
    }
}
