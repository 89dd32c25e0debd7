//! The port's other end: something that takes and gives one frame per read and write.
//!
//! An island of `unsafe`: one ioctl makes a TAP interface.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{Mode, OFlags};
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, socket_with, socketpair,
};

/// Largest frame a wire carries, without FCS.
pub const WIRE_FRAME_MAX: usize = 9728;

/// A descriptor that carries frames: a TAP interface, or a socket that keeps message boundaries.
#[derive(Debug)]
pub struct Wire(OwnedFd);

impl Wire {
    /// A pair of wires that are each other's end: two models, or a model and a test.
    pub fn pair() -> io::Result<(Wire, Wire)> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (a, b) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
        Ok((Wire(a), Wire(b)))
    }

    /// An open descriptor that keeps message boundaries.
    pub fn from_fd(fd: OwnedFd) -> io::Result<Wire> {
        rustix::io::ioctl_fionbio(&fd, true)?;
        Ok(Wire(fd))
    }

    /// Connects to a listening `SOCK_SEQPACKET` socket: the wire of another model.
    pub fn connect(path: &Path) -> io::Result<Wire> {
        let fd = socket()?;
        rustix::net::connect(&fd, &SocketAddrUnix::new(path)?)?;
        Wire::from_fd(fd)
    }

    /// Listens at `path` and takes the first that connects.
    pub fn accept(path: &Path) -> io::Result<Wire> {
        let fd = socket()?;
        rustix::net::bind(&fd, &SocketAddrUnix::new(path)?)?;
        rustix::net::listen(&fd, 1)?;
        let wire = rustix::net::accept_with(&fd, SocketFlags::CLOEXEC)?;
        Wire::from_fd(wire)
    }

    /// A TAP interface of this name, made now; it vanishes with the wire.
    pub fn tap(name: &str) -> io::Result<Wire> {
        let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let fd = rustix::fs::open("/dev/net/tun", flags, Mode::empty())?;
        // SAFETY: all-zero bytes are a valid `ifreq`.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        if name.is_empty() || name.len() >= request.ifr_name.len() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "an interface's name has 1 to 15 characters",
            ));
        }
        for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
            *to = from as libc::c_char;
        }
        request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI) as i16;
        // SAFETY: TUNSETIFF reads and writes an `ifreq`, which outlives the call.
        if unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETIFF, &raw mut request) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Wire(fd))
    }

    /// Sends a frame; false if the other end does not take it now, or not any more.
    pub fn send(&self, frame: &[u8]) -> bool {
        matches!(rustix::io::write(&self.0, frame), Ok(n) if n == frame.len())
    }

    /// Receives a frame into `buffer`; none if there is nothing.
    pub fn receive<'a>(&self, buffer: &'a mut [u8]) -> Option<&'a [u8]> {
        match rustix::io::read(&self.0, &mut *buffer) {
            Ok(n @ 1..) => Some(&buffer[..n]),
            _ => None,
        }
    }

    /// Another handle of the same wire.
    pub fn try_clone(&self) -> io::Result<Wire> {
        Ok(Wire(self.0.try_clone()?))
    }
}

/// A socket that keeps message boundaries.
fn socket() -> io::Result<OwnedFd> {
    Ok(socket_with(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )?)
}

impl AsFd for Wire {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_keep_their_boundaries_and_an_empty_wire_gives_nothing() {
        let (a, b) = Wire::pair().unwrap();
        assert!(a.send(&[1; 60]) && a.send(&[2; 9000]));
        let mut buffer = [0; WIRE_FRAME_MAX];
        assert_eq!(b.receive(&mut buffer).map(<[u8]>::len), Some(60));
        assert_eq!(b.receive(&mut buffer).map(<[u8]>::len), Some(9000));
        assert!(b.receive(&mut buffer).is_none());
        drop(b);
        assert!(!a.send(&[1; 60]));
    }

    #[test]
    fn two_processes_meet_at_a_path() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("wire");
        let listener = {
            let path = path.clone();
            std::thread::spawn(move || Wire::accept(&path).unwrap())
        };
        let end = std::time::Instant::now() + std::time::Duration::from_secs(20);
        let near = loop {
            match Wire::connect(&path) {
                Ok(wire) => break wire,
                Err(error) if std::time::Instant::now() > end => panic!("{error}"),
                Err(_) => std::thread::sleep(std::time::Duration::from_millis(1)),
            }
        };
        let far = listener.join().unwrap();
        assert!(near.send(b"over the wire"));
        let mut buffer = [0; 64];
        assert_eq!(far.receive(&mut buffer), Some(&b"over the wire"[..]));
    }

    #[test]
    fn a_name_too_long_for_an_interface_is_refused() {
        if let Err(error) = Wire::tap("a-name-much-too-long") {
            // Without the device or the right to open it, that is what is said.
            let kind = error.kind();
            assert!(matches!(
                kind,
                io::ErrorKind::InvalidInput
                    | io::ErrorKind::NotFound
                    | io::ErrorKind::PermissionDenied
            ));
        } else {
            panic!("a name of 20 characters was taken");
        }
    }
}
