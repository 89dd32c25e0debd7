//! One connection to a switch: found or awaited, negotiated, told about memory and rings, ended.
//!
//! The order of the messages is that of DPDK's virtio_user, whose containers are what these guests stand for.

use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::RecvFlags;

use super::messages::{
    Link, LinkError, RegionEntry, Request, addresses, mem_table, protocol, state,
};
use super::{GuestError, Options, Role};
use crate::virtio::own_mem::OwnMem;
use crate::virtio::ring::feature;

/// Waits for the other side to appear.
const RETRY: Duration = Duration::from_millis(5);

/// Where a connection comes from.
#[derive(Debug)]
pub(super) enum Source {
    /// The switch listens there.
    Connect,
    /// The guest listens.
    Accept(Listener),
}

/// A listening socket, whose file goes with it.
#[derive(Debug)]
pub(super) struct Listener {
    socket: UnixListener,
    path: PathBuf,
}

impl Drop for Listener {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

impl Source {
    pub(super) fn new(options: &Options) -> Result<Source, GuestError> {
        match options.role {
            Role::Client => Ok(Source::Connect),
            Role::Server => listen(&options.socket).map_err(|cause| GuestError::Listen {
                path: options.socket.clone(),
                cause,
            }),
        }
    }

    pub(super) fn connection(&self, options: &Options) -> Result<UnixStream, GuestError> {
        match self {
            Source::Connect => connect(&options.socket, options.wait),
            Source::Accept(listener) => {
                accept(&listener.socket, options.wait)?.ok_or(GuestError::NobodyCame {
                    path: options.socket.clone(),
                    after: options.wait,
                })
            }
        }
    }
}

fn listen(path: &Path) -> io::Result<Source> {
    let socket = match UnixListener::bind(path) {
        // A guest that was killed left its socket behind.
        Err(cause)
            if cause.kind() == ErrorKind::AddrInUse && UnixStream::connect(path).is_err() =>
        {
            std::fs::remove_file(path)?;
            UnixListener::bind(path)?
        }
        other => other?,
    };
    socket.set_nonblocking(true)?;
    let path = path.to_owned();
    Ok(Source::Accept(Listener { socket, path }))
}

fn connect(path: &Path, within: Duration) -> Result<UnixStream, GuestError> {
    let end = Instant::now() + within;
    loop {
        match UnixStream::connect(path) {
            Ok(stream) => return Ok(stream),
            Err(cause) => {
                let may_come = matches!(
                    cause.kind(),
                    ErrorKind::NotFound | ErrorKind::ConnectionRefused
                );
                if !may_come || Instant::now() >= end {
                    let path = path.to_owned();
                    return Err(GuestError::Connect { path, cause });
                }
            }
        }
        std::thread::sleep(RETRY);
    }
}

fn accept(socket: &UnixListener, within: Duration) -> Result<Option<UnixStream>, GuestError> {
    readable(socket, within);
    match socket.accept() {
        Ok((stream, _)) => {
            stream.set_nonblocking(false).map_err(GuestError::Socket)?;
            Ok(Some(stream))
        }
        Err(cause) if cause.kind() == ErrorKind::WouldBlock => Ok(None),
        Err(cause) => Err(GuestError::Socket(cause)),
    }
}

/// Waits until `fd` can be read, for at most `within`; true if it can.
pub(super) fn readable(fd: &impl AsFd, within: Duration) -> bool {
    let mut fds = [PollFd::new(fd, PollFlags::IN)];
    let timeout = Timespec {
        tv_sec: within.as_secs() as i64,
        tv_nsec: i64::from(within.subsec_nanos()),
    };
    poll(&mut fds, Some(&timeout)).is_ok_and(|ready| ready > 0)
}

/// A ring as the messages name it.
#[derive(Debug)]
pub(super) struct RingPlace {
    /// Descriptors.
    pub(super) size: u16,
    /// SET_VRING_BASE.
    pub(super) base: u32,
    /// Addresses here: descriptors, available ring, used ring; of packed rings: ring, driver area, device area.
    pub(super) desc: u64,
    pub(super) avail: u64,
    pub(super) used: u64,
    pub(super) kick: Arc<OwnedFd>,
    pub(super) call: Arc<OwnedFd>,
}

/// An open session.
#[derive(Debug)]
pub(super) struct Session {
    pub(super) link: Link,
    /// What the switch offered.
    pub(super) offered: u64,
    /// What was agreed upon.
    pub(super) features: u64,
}

impl Session {
    /// Agrees on features.
    pub(super) fn negotiate(options: &Options, link: Link) -> Result<Session, GuestError> {
        let mut session = Session {
            link,
            offered: 0,
            features: 0,
        };
        session.link.tell(Request::SetOwner, &[], &[])?;
        session.features(options)?;
        Ok(session)
    }

    fn features(&mut self, options: &Options) -> Result<(), GuestError> {
        self.offered = self.link.ask(Request::GetFeatures)?;
        let missing = options.required() & !self.offered;
        if missing != 0 {
            return Err(GuestError::NotOffered(missing));
        }
        let mut pairs = 1;
        if self.offered & feature::PROTOCOL_FEATURES != 0 {
            let offered = self.link.ask(Request::GetProtocolFeatures)?;
            let agreed = offered & (protocol::MQ | protocol::REPLY_ACK);
            self.link
                .tell(Request::SetProtocolFeatures, &agreed.to_le_bytes(), &[])?;
            self.link.acks = agreed & protocol::REPLY_ACK != 0;
            if agreed & protocol::MQ != 0 {
                pairs = self.link.ask(Request::GetQueueNum)?;
            }
        }
        if pairs < u64::from(options.queue_pairs) {
            return Err(GuestError::FewQueues {
                wanted: options.queue_pairs,
                offered: pairs,
            });
        }
        self.features = self.offered & options.wanted();
        self.link
            .tell(Request::SetFeatures, &self.features.to_le_bytes(), &[])?;
        Ok(())
    }

    /// virtio_user in server mode, connected again: first stops the rings of a device that the new switch does not know.
    pub(super) fn renegotiate(
        options: &Options,
        link: Link,
        rings: usize,
    ) -> Result<Session, GuestError> {
        let mut session = Session {
            link,
            offered: 0,
            features: 0,
        };
        session.stop(rings)?;
        session.features(options)?;
        Ok(session)
    }

    /// Hands over memory and rings, and lets them run. When this returns the switch has seen it all.
    pub(super) fn start(&self, memory: &OwnMem, rings: &[RingPlace]) -> Result<(), GuestError> {
        self.share(memory)?;
        for (index, ring) in (0..).zip(rings) {
            self.ring(index, ring)?;
        }
        if self.features & feature::PROTOCOL_FEATURES != 0 {
            for index in 0..rings.len() as u32 {
                self.link
                    .tell(Request::SetVringEnable, &state(index, 1), &[])?;
            }
        }
        // Requests are carried out in order: an answer means that all before it were.
        self.link.ask(Request::GetFeatures)?;
        Ok(())
    }

    /// SET_MEM_TABLE.
    pub(super) fn share(&self, memory: &OwnMem) -> Result<(), LinkError> {
        let region = RegionEntry {
            guest: memory.gpa(),
            size: memory.len(),
            user: memory.uva(),
            offset: 0,
        };
        self.link
            .tell_acked(Request::SetMemTable, &mem_table(&[region]), &[memory.fd()])
    }

    fn ring(&self, index: u32, ring: &RingPlace) -> Result<(), LinkError> {
        let link = &self.link;
        let fd_of = u64::from(index).to_le_bytes();
        link.tell(Request::SetVringCall, &fd_of, &[ring.call.as_fd()])?;
        link.tell(
            Request::SetVringNum,
            &state(index, u32::from(ring.size)),
            &[],
        )?;
        link.tell(Request::SetVringBase, &state(index, ring.base), &[])?;
        let place = addresses(index, ring.desc, ring.used, ring.avail);
        link.tell(Request::SetVringAddr, &place, &[])?;
        link.tell(Request::SetVringKick, &fd_of, &[ring.kick.as_fd()])
    }

    /// Stops the rings: when this returns the switch does not touch them any more.
    pub(super) fn stop(&self, rings: usize) -> Result<(), LinkError> {
        for index in 0..rings as u32 {
            self.link
                .tell(Request::SetVringEnable, &state(index, 0), &[])?;
        }
        for index in 0..rings as u32 {
            self.link.vring_base(index)?;
        }
        Ok(())
    }

    /// True until the switch has closed the connection.
    pub(super) fn alive(&self) -> bool {
        let mut byte = [0];
        let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
        match rustix::net::recv(self.link.stream(), &mut byte, flags) {
            Ok((_, read)) => read > 0,
            Err(errno) => errno == rustix::io::Errno::AGAIN,
        }
    }
}
