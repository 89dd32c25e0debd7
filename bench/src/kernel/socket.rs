//! Packet sockets, many frames per system call, and the one call that makes a network namespace.

#![allow(unsafe_code)] // sendmmsg, recvmmsg, unshare: no crate of ours wraps them

use std::io;
use std::mem::{size_of, zeroed};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr::{from_ref, null_mut};

use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space, unshare_unsafe};

/// EtherType for local experiments (IEEE 802 §9.2.3): nothing else on these links has it.
pub(crate) const ETHERTYPE: u16 = 0x88b5;
/// Frames per system call at most.
pub(crate) const BURST_MAX: usize = 64;
/// Room for what waits in a socket: a circle of frames and the kernel's own overhead fit many times.
const BUFFER: libc::c_int = 64 << 20;

/// The calling thread goes to a new, empty network namespace, which it returns.
pub(crate) fn new_namespace() -> io::Result<OwnedFd> {
    // SAFETY: the caveat of `unshare_unsafe` is about `FILES`, which is not asked for.
    unsafe { unshare_unsafe(UnshareFlags::NEWNET) }?;
    Ok(std::fs::File::open("/proc/thread-self/ns/net")?.into())
}

/// The calling thread goes to this network namespace.
pub(crate) fn enter(namespace: BorrowedFd<'_>) -> io::Result<()> {
    Ok(move_into_link_name_space(
        namespace,
        Some(LinkNameSpaceType::Network),
    )?)
}

/// Tries, on a thread that ends with it: a namespace, and a packet socket in it.
pub(crate) fn may_make_namespaces() -> io::Result<()> {
    let trial = std::thread::spawn(|| {
        let _namespace = new_namespace()?;
        Packets::open("lo").map(drop)
    });
    trial
        .join()
        .unwrap_or_else(|_| Err(io::Error::other("the thread that tried ended")))
}

/// A packet socket, bound to an interface of the namespace it was opened in.
pub(crate) struct Packets {
    socket: OwnedFd,
}

impl Packets {
    /// Receives and sends frames of our EtherType; never waits.
    pub(crate) fn open(interface: &str) -> io::Result<Self> {
        let index = rustix::net::netdevice::name_to_index(
            &rustix::net::socket(
                rustix::net::AddressFamily::UNIX,
                rustix::net::SocketType::DGRAM,
                None,
            )?,
            interface,
        )?;
        let kind = libc::SOCK_RAW | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
        let protocol = ETHERTYPE.to_be();
        // SAFETY: no memory is passed.
        let fd = unsafe { libc::socket(libc::AF_PACKET, kind, i32::from(protocol)) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: `fd` was opened above and belongs to nobody else.
        let socket = unsafe { OwnedFd::from_raw_fd(fd) };
        let packets = Self { socket };
        packets.set(libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, BUFFER)?;
        packets.set(libc::SOL_SOCKET, libc::SO_SNDBUFFORCE, BUFFER)?;
        // As DPDK's driver does: frames skip the queueing discipline, and what we send does not come back to us.
        packets.set(libc::SOL_PACKET, libc::PACKET_QDISC_BYPASS, 1)?;
        packets.set(libc::SOL_PACKET, libc::PACKET_IGNORE_OUTGOING, 1)?;
        // SAFETY: all zeroes is a valid value of this C structure.
        let mut address: libc::sockaddr_ll = unsafe { zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = protocol;
        address.sll_ifindex = index as i32;
        let fd = packets.socket.as_raw_fd();
        // SAFETY: `address` is a sockaddr_ll, its size is passed, and the kernel only reads it.
        let bound = unsafe {
            libc::bind(
                fd,
                from_ref(&address).cast(),
                size_of::<libc::sockaddr_ll>() as u32,
            )
        };
        if bound < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(packets)
    }

    fn set(&self, level: libc::c_int, option: libc::c_int, value: libc::c_int) -> io::Result<()> {
        let len = size_of::<libc::c_int>() as u32;
        let fd = self.socket.as_fd().as_raw_fd();
        // SAFETY: the kernel reads `len` bytes at `value`, which is that large.
        let done = unsafe { libc::setsockopt(fd, level, option, from_ref(&value).cast(), len) };
        if done < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    /// Fills the burst with what has come, `most` frames at most; returns how many.
    pub(crate) fn receive(&self, burst: &mut Burst, most: usize) -> io::Result<usize> {
        let most = most.min(BURST_MAX);
        burst.aim(0..most, |burst, _| burst.room);
        // SAFETY: `aim` has pointed `most` headers at one vector each, and these at `room` bytes each of `bytes`, which nobody
        // else uses while `burst` is borrowed.
        let got = unsafe {
            libc::recvmmsg(
                self.socket.as_raw_fd(),
                burst.heads.as_mut_ptr(),
                most as u32,
                libc::MSG_DONTWAIT,
                null_mut(),
            )
        };
        let got = count(got)?;
        for at in 0..got {
            burst.lens[at] = (burst.heads[at].msg_len as usize).min(burst.room);
        }
        Ok(got)
    }

    /// Sends frames `range` of the burst; returns how many of them the kernel took.
    pub(crate) fn send(
        &self,
        burst: &mut Burst,
        range: std::ops::Range<usize>,
    ) -> io::Result<usize> {
        let most = range.len() as u32;
        burst.aim(range, |burst, at| burst.lens[at]);
        // SAFETY: as in `receive`; the kernel only reads the frames, and no length exceeds `room`.
        let sent = unsafe {
            libc::sendmmsg(
                self.socket.as_raw_fd(),
                burst.heads.as_mut_ptr(),
                most,
                libc::MSG_DONTWAIT,
            )
        };
        count(sent)
    }
}

/// "Nothing now" is no error.
fn count(result: libc::c_int) -> io::Result<usize> {
    if let Ok(count) = usize::try_from(result) {
        return Ok(count);
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::EAGAIN | libc::EINTR | libc::ENOBUFS) => Ok(0),
        _ => Err(error),
    }
}

/// Frames of the harness's own, each in a buffer of `room` bytes.
pub(crate) struct Burst {
    room: usize,
    bytes: Vec<u8>,
    lens: [usize; BURST_MAX],
    vectors: Vec<libc::iovec>,
    heads: Vec<libc::mmsghdr>,
}

impl Burst {
    /// Buffers for frames of up to `room` bytes.
    pub(crate) fn new(room: usize) -> Self {
        // SAFETY: all zeroes is a valid value of both C structures: null pointers with lengths of 0.
        let (vector, head) = unsafe { (zeroed::<libc::iovec>(), zeroed::<libc::mmsghdr>()) };
        Self {
            room,
            bytes: vec![0; room * BURST_MAX],
            lens: [0; BURST_MAX],
            vectors: vec![vector; BURST_MAX],
            heads: vec![head; BURST_MAX],
        }
    }

    /// Points the first headers at these frames' buffers, each as long as `len` says (never longer than the buffer).
    fn aim(&mut self, frames: std::ops::Range<usize>, len: impl Fn(&Self, usize) -> usize) {
        for (head, frame) in frames.enumerate() {
            let len = len(self, frame).min(self.room);
            let buffer = &mut self.bytes[frame * self.room..][..len];
            self.vectors[head] = libc::iovec {
                iov_base: buffer.as_mut_ptr().cast(),
                iov_len: len,
            };
        }
        let vectors = self.vectors.as_mut_ptr();
        for (at, head) in self.heads.iter_mut().enumerate() {
            head.msg_hdr.msg_iov = vectors.wrapping_add(at);
            head.msg_hdr.msg_iovlen = 1;
        }
    }

    /// A frame.
    pub(crate) fn frame(&mut self, at: usize) -> &mut [u8] {
        &mut self.bytes[at * self.room..][..self.lens[at]]
    }

    /// Moves those of the first `count` frames that `wanted` names to the front; returns how many.
    pub(crate) fn keep(&mut self, count: usize, wanted: impl Fn(&[u8]) -> bool) -> usize {
        let mut kept = 0;
        for at in 0..count {
            if !wanted(self.frame(at)) {
                continue;
            }
            if kept < at {
                let from = at * self.room..at * self.room + self.lens[at];
                self.bytes.copy_within(from, kept * self.room);
                self.lens[kept] = self.lens[at];
            }
            kept += 1;
        }
        kept
    }

    /// A frame that is `len` bytes long from now on.
    pub(crate) fn resize(&mut self, at: usize, len: usize) -> &mut [u8] {
        self.lens[at] = len.min(self.room);
        self.frame(at)
    }
}
