//! Who is at the other end of a unix socket.
#![allow(unsafe_code)] // SO_PEERCRED: rustix takes a process id of 0, which a peer in a foreign pid namespace has, for impossible

use std::mem::size_of;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;

use super::port_handle::PeerId;
use super::state::Peer;

/// `linux/magic.h`; the file system of pidfds, where the kernel has it (6.9): an inode there is one process, for ever.
const PID_FS_MAGIC: u64 = 0x5049_4446;
/// `asm-generic/socket.h`, Linux 6.5.
const SO_PEERPIDFD: libc::c_int = 77;

/// The process that connected, or that listened when we connected; its id is 0 if it cannot be seen from here.
pub(super) fn peer_of(stream: &UnixStream) -> Option<Peer> {
    let mut cred = libc::ucred {
        pid: 0,
        uid: 0,
        gid: 0,
    };
    let mut len = size_of::<libc::ucred>() as libc::socklen_t;
    let (level, name) = (libc::SOL_SOCKET, libc::SO_PEERCRED);
    // SAFETY: `cred` and `len` are valid for writes, and `len` says how large `cred` is.
    let done = unsafe {
        libc::getsockopt(
            stream.as_raw_fd(),
            level,
            name,
            (&raw mut cred).cast(),
            &raw mut len,
        )
    };
    (done == 0).then_some(Peer {
        pid: cred.pid,
        uid: cred.uid,
        gid: cred.gid,
    })
}

/// Which process is at the other end, in a form that can be compared; none: the kernel does not tell.
pub(super) fn identity_of(stream: &UnixStream, peer: Option<Peer>) -> Option<PeerId> {
    let by_number = || {
        peer.filter(|peer| peer.pid > 0)
            .map(|peer| PeerId::Process(peer.pid))
    };
    by_pidfd(stream).map(PeerId::Pidfd).or_else(by_number)
}

/// The number of the process in the file system of pidfds: known even if the process has no id in our pid namespace.
fn by_pidfd(stream: &UnixStream) -> Option<u64> {
    let mut fd: libc::c_int = -1;
    let mut len = size_of::<libc::c_int>() as libc::socklen_t;
    let (level, name) = (libc::SOL_SOCKET, SO_PEERPIDFD);
    // SAFETY: `fd` and `len` are valid for writes, and `len` says how large `fd` is.
    let done = unsafe {
        libc::getsockopt(
            stream.as_raw_fd(),
            level,
            name,
            (&raw mut fd).cast(),
            &raw mut len,
        )
    };
    if done != 0 || fd < 0 {
        return None;
    }
    // SAFETY: the kernel has just made this descriptor for us.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    let of_pidfs = rustix::fs::fstatfs(&fd).ok()?.f_type as u64 == PID_FS_MAGIC;
    of_pidfs.then_some(rustix::fs::fstat(&fd).ok()?.st_ino)
}
