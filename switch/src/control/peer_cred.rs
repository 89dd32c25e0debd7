//! Who is at the other end of a unix socket.
#![allow(unsafe_code)] // SO_PEERCRED: rustix takes a process id of 0, which a peer in a foreign pid namespace has, for impossible

use std::mem::size_of;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;

use super::state::Peer;

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
