//! How guests come in: through a socket of ours that they connect to, or through theirs, to which we connect.

use std::ffi::OsStr;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags};
use rustix::fs::{FileType, Mode, OFlags};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use super::keys::ConfigError;
use super::socket::OwnedSocket;
use super::state::{Permissions, PortSpec, PortState};

/// Permissions of a socket that names none: owner and group.
const PERMISSIONS: Permissions = Permissions(0o660);
/// How often a listening socket is looked after: somebody may have removed its file.
const LOOK: Duration = Duration::from_secs(2);
/// Between two attempts to connect where somebody may listen at any moment.
const PAUSE_MIN: Duration = Duration::from_millis(5);
/// The same after many attempts.
const PAUSE_MAX: Duration = Duration::from_millis(100);
/// The same while there is nothing to connect to and the kernel tells us when there is.
const PAUSE_WATCHED: Duration = Duration::from_secs(1);

/// What came of one look at the door.
pub(super) enum Look {
    /// A guest.
    Guest(UnixStream),
    /// Nobody: how the port is, why, and until when to wait.
    Nobody(PortState, Option<String>, Instant),
}

/// One of the two.
pub(super) enum Door {
    /// `mode = "server"`
    Ours(Listen),
    /// `mode = "client"`
    Theirs(Connect),
}

impl Door {
    /// Listens, or gets ready to connect.
    pub(super) fn new(spec: &PortSpec) -> Result<Door, ConfigError> {
        match spec.mode {
            super::state::SocketMode::Server => Listen::new(spec).map(Door::Ours),
            super::state::SocketMode::Client => Ok(Door::Theirs(Connect::new(&spec.socket))),
        }
    }

    /// Looks for a guest. Does not wait.
    pub(super) fn look(&mut self) -> Look {
        match self {
            Door::Ours(listen) => listen.look(),
            Door::Theirs(connect) => connect.look(),
        }
    }

    /// What becomes readable when it is worth looking again.
    pub(super) fn bell(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Door::Ours(listen) => Some(listen.socket.listener.as_fd()),
            Door::Theirs(connect) => connect.watch.as_ref().map(AsFd::as_fd),
        }
    }

    /// Our socket.
    pub(super) fn socket(&self) -> Option<&Arc<OwnedSocket>> {
        match self {
            Door::Ours(listen) => Some(&listen.socket),
            Door::Theirs(_) => None,
        }
    }

    /// The last guest is gone; whether frames had flowed.
    pub(super) fn left(&mut self, served: bool) {
        if let Door::Theirs(connect) = self {
            connect.left(served);
        }
    }
}

/// A socket of ours.
pub(super) struct Listen {
    spec: PortSpec,
    socket: Arc<OwnedSocket>,
}

impl Listen {
    fn new(spec: &PortSpec) -> Result<Listen, ConfigError> {
        let socket = open(spec)?;
        Ok(Listen {
            spec: spec.clone(),
            socket: Arc::new(socket),
        })
    }

    fn look(&mut self) -> Look {
        match self.socket.listener.accept() {
            Ok((stream, _)) => return Look::Guest(stream),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => {
                let why = format!(
                    "no guest can be let in: {error}: see `ringway doctor` for the limits of this host"
                );
                return Look::Nobody(PortState::Error, Some(why), Instant::now() + PAUSE_MAX);
            }
        }
        if self.socket.in_place() {
            return Look::Nobody(PortState::Listening, None, Instant::now() + LOOK);
        }
        match open(&self.spec) {
            Ok(socket) => {
                self.socket = Arc::new(socket);
                Look::Nobody(PortState::Listening, None, Instant::now() + LOOK)
            }
            Err(why) => {
                let why = format!("somebody removed the socket, and a new one is refused: {why}");
                Look::Nobody(PortState::Error, Some(why), Instant::now() + PAUSE_WATCHED)
            }
        }
    }
}

fn open(spec: &PortSpec) -> Result<OwnedSocket, ConfigError> {
    let named = |why: &dyn std::fmt::Display| ConfigError(format!("port {:?}: {why}", spec.name));
    let mode = spec.socket_mode.unwrap_or(PERMISSIONS);
    let socket =
        OwnedSocket::listen(&spec.socket, mode, spec.socket_owner).map_err(|why| named(&why))?;
    socket
        .listener
        .set_nonblocking(true)
        .map_err(|why| named(&why))?;
    Ok(socket)
}

/// A socket of the guest's.
pub(super) struct Connect {
    path: PathBuf,
    pause: Duration,
    next: Instant,
    watch: Option<OwnedFd>,
}

/// Why there is no connection.
enum Miss {
    /// Nothing there.
    Absent,
    /// A socket, but nobody accepts.
    Closed(String),
    /// Something that will not do.
    Wrong(String),
}

impl Connect {
    fn new(path: &Path) -> Connect {
        Connect {
            path: path.to_owned(),
            pause: PAUSE_MIN,
            next: Instant::now(),
            watch: None,
        }
    }

    fn look(&mut self) -> Look {
        let path = self.path.display().to_string();
        let now = Instant::now();
        // Whatever changed in the directory, and however often: not more than one attempt in `PAUSE_MIN`.
        if self.changed() {
            self.pause = PAUSE_MIN;
            self.next = self.next.min(now + PAUSE_MIN);
        }
        // Watched first, then tried: what comes between the two is not missed.
        if self.watch.is_none() {
            self.watch = self.watch_directory();
        }
        let miss = match connect(&self.path) {
            Ok(stream) => {
                self.watch = None;
                return Look::Guest(stream);
            }
            Err(miss) => miss,
        };
        let watched = self.watch.is_some();
        let (state, why, pause) = match miss {
            Miss::Absent => {
                let why = format!(
                    "{path} is not there yet: let the guest listen there (virtio_user: path={path},server=1); Ringway goes on trying"
                );
                (PortState::Connecting, why, watched.then_some(PAUSE_WATCHED))
            }
            Miss::Closed(why) => (
                PortState::Connecting,
                format!("{path}: {why}; Ringway goes on trying"),
                None,
            ),
            Miss::Wrong(why) => (
                PortState::Error,
                format!("{path}: {why}; Ringway goes on trying"),
                watched.then_some(PAUSE_WATCHED),
            ),
        };
        self.next = now + pause.unwrap_or(self.pause);
        self.pause = (self.pause * 3 / 2).min(PAUSE_MAX);
        Look::Nobody(state, Some(why), self.next)
    }

    fn left(&mut self, served: bool) {
        self.pause = if served {
            PAUSE_MIN
        } else {
            (self.pause * 2).min(PAUSE_MAX)
        };
    }

    /// Watches the directory, if it is there and the kernel grants it (it grants 128 per user unless told otherwise).
    fn watch_directory(&self) -> Option<OwnedFd> {
        let watch = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK).ok()?;
        let what = WatchFlags::CREATE | WatchFlags::MOVED_TO | WatchFlags::ONLYDIR;
        inotify::add_watch(&watch, self.path.parent()?, what).ok()?;
        Some(watch)
    }

    /// Whether something came to our path since the last look.
    fn changed(&mut self) -> bool {
        let Some(watch) = &self.watch else {
            return false;
        };
        let (mut ours, mut gone) = (false, false);
        let mut space = [MaybeUninit::uninit(); 4096];
        let mut events = inotify::Reader::new(watch, &mut space);
        while let Ok(event) = events.next() {
            let name = event.file_name().map(std::ffi::CStr::to_bytes);
            ours |= name == self.path.file_name().map(|name| name.as_encoded_bytes());
            gone |= event.events().contains(ReadFlags::IGNORED); // the directory was removed
        }
        if gone {
            self.watch = None;
        }
        ours || gone
    }
}

/// Opens what is at a path, without using it and without following a symbolic link anywhere on the way.
///
/// Component by component rather than by `openat2`, which Linux has since 5.6 and older sandboxes refuse.
fn open_straight(path: &Path) -> Result<OwnedFd, Miss> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let names = path.components().filter_map(|part| match part {
        Component::Normal(name) => Some(name),
        _ => None, // the root; a checked path has nothing else
    });
    let mut at = open_part(rustix::fs::CWD, OsStr::new("/"), flags)?;
    let mut so_far = PathBuf::from("/");
    for name in names {
        if is_a(&at, FileType::Symlink)? {
            return Err(Miss::Wrong(format!(
                "{} is a symbolic link, which could lead to another guest's socket: write the path without it",
                so_far.display()
            )));
        }
        at = open_part(&at, name, flags)?;
        so_far.push(name);
    }
    Ok(at)
}

fn is_a(file: &OwnedFd, kind: FileType) -> Result<bool, Miss> {
    let stat = rustix::fs::fstat(file).map_err(|error| {
        Miss::Wrong(format!("cannot be looked at: {error}: choose another path"))
    })?;
    Ok(FileType::from_raw_mode(stat.st_mode) == kind)
}

fn open_part(at: impl AsFd, name: &OsStr, flags: OFlags) -> Result<OwnedFd, Miss> {
    match rustix::fs::openat(at, name, flags, Mode::empty()) {
        Ok(file) => Ok(file),
        Err(Errno::NOENT | Errno::NOTDIR) => Err(Miss::Absent),
        Err(Errno::ACCESS) => Err(Miss::Wrong(
            "Ringway may not look there: let its user search the directories".into(),
        )),
        Err(error) => Err(Miss::Wrong(format!(
            "cannot be looked at: {error}: choose another path"
        ))),
    }
}

/// Connects to a socket, however long its path is, that is reached through no symbolic link.
///
/// Whoever is behind the path may have put anything there; a link to another container's socket would give them its port.
/// So the path is opened without following or using what is there, what came of it is checked, and the connection is made
/// to that very file.
fn connect(path: &Path) -> Result<UnixStream, Miss> {
    let file = open_straight(path)?;
    let stat = rustix::fs::fstat(&file).map_err(|error| {
        Miss::Wrong(format!("cannot be looked at: {error}: choose another path"))
    })?;
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::Socket => {}
        FileType::Symlink => return Err(Miss::Wrong("is a symbolic link, which could lead to another guest's socket: let the guest listen there itself".into())),
        _ => return Err(Miss::Wrong("is no socket: let the guest remove it and listen there (server=1)".into())),
    }
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None);
    let socket = socket.map_err(|error| Miss::Wrong(format!("no socket to be had: {error}")))?;
    let place = format!("/proc/self/fd/{}", file.as_raw_fd());
    let address = SocketAddrUnix::new(place).map_err(|error| Miss::Wrong(error.to_string()))?;
    match rustix::net::connect(&socket, &address) {
        Ok(()) => Ok(UnixStream::from(socket)),
        Err(Errno::CONNREFUSED) => Err(Miss::Closed(
            "nobody listens there, the process that did is gone: start the guest".into(),
        )),
        Err(Errno::AGAIN) => Err(Miss::Closed(
            "somebody listens but accepts nobody: the guest is busy with another connection".into(),
        )),
        Err(Errno::ACCESS | Errno::PERM) => Err(Miss::Wrong(
            "may not be connected to: let Ringway's user write to it".into(),
        )),
        Err(Errno::NOENT) => Err(Miss::Wrong(
            "cannot be reached without /proc: mount it".into(),
        )),
        Err(Errno::PROTOTYPE) => Err(Miss::Wrong(
            "is a socket of another kind, vhost-user takes SOCK_STREAM: choose another path".into(),
        )),
        Err(error) => Err(Miss::Wrong(format!("cannot be connected to: {error}"))),
    }
}
