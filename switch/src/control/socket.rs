//! Unix sockets that appear with their final owner and permissions, replace what a dead process left, and leave nothing behind.

use std::fs;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, Uid};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use super::keys::ConfigError;
use super::sandbox;
use super::state::{Owner, Permissions};

/// Connections that may wait to be accepted.
const BACKLOG: i32 = 128;

/// A listening socket whose file goes away with it.
#[derive(Debug)]
pub struct OwnedSocket {
    /// The socket itself.
    pub listener: UnixListener,
    path: PathBuf,
    file: (u64, u64),
}

impl OwnedSocket {
    /// Listens at `path`. Makes the directory if it is missing, replaces the socket of a dead process, refuses that of a living one.
    pub fn listen(
        path: &Path,
        mode: Permissions,
        owner: Option<Owner>,
    ) -> Result<OwnedSocket, ConfigError> {
        let fail = |what: &str, error: io::Error| {
            let denied = error.kind() == io::ErrorKind::PermissionDenied;
            let hint = if denied {
                sandbox::hint(path)
            } else {
                String::new()
            };
            ConfigError(format!("{}: {what}: {error}{hint}", path.display()))
        };
        no_links_of_others(path)?;
        if let Some(parent) = path.parent() {
            make_dir(parent)?;
        }
        make_room(path)?;
        let address = SocketAddrUnix::new(path)
            .map_err(|error| fail("is no path for a socket", error.into()))?;
        let socket = rustix::net::socket_with(
            AddressFamily::UNIX,
            SocketType::STREAM,
            SocketFlags::CLOEXEC,
            None,
        )
        .map_err(|error| fail("no socket to be had", error.into()))?;
        rustix::net::bind(&socket, &address).map_err(|error| {
            fail(
                "cannot be made, choose a path you may write to",
                error.into(),
            )
        })?;
        // Before `listen` nobody can connect, so nobody slips in under the permissions of the umask.
        let ready = hand_over(path, mode, owner)
            .and_then(|file| rustix::net::listen(&socket, BACKLOG).map(|()| file));
        match ready {
            Ok(file) => Ok(OwnedSocket {
                listener: UnixListener::from(socket),
                path: path.to_owned(),
                file,
            }),
            Err(error) => {
                let _ = fs::remove_file(path);
                Err(fail(
                    "its owner and permissions cannot be set, drop them or run as root",
                    error.into(),
                ))
            }
        }
    }
}

impl OwnedSocket {
    /// Whether the socket is still where it was made.
    pub fn in_place(&self) -> bool {
        let now = fs::symlink_metadata(&self.path).map(|file| (file.dev(), file.ino()));
        now.is_ok_and(|file| file == self.file)
    }

    /// Removes its file: only our own, somebody may have put another one there meanwhile.
    pub fn remove_file(&self) {
        if self.in_place() {
            let _ = fs::remove_file(&self.path);
        }
    }
}

impl Drop for OwnedSocket {
    fn drop(&mut self) {
        self.remove_file();
    }
}

/// Gives the socket just made to its owner. Returns its device and inode.
///
/// Its directory may be shared with the guest it is for: what is at the path by now may be a link to some other file, which
/// must not get these permissions. So the path is opened without following it, and the very file that is open is changed.
fn hand_over(
    path: &Path,
    mode: Permissions,
    owner: Option<Owner>,
) -> rustix::io::Result<(u64, u64)> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = rustix::fs::open(path, flags, Mode::empty())?;
    let stat = rustix::fs::fstat(&file)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::Socket {
        return Err(Errno::NOTSOCK);
    }
    let bits = Mode::from_bits_truncate(mode.0);
    rustix::fs::chmod(format!("/proc/self/fd/{}", file.as_raw_fd()), bits)?;
    if let Some(owner) = owner {
        let (user, group) = (owner.uid.map(Uid::from_raw), owner.gid.map(Gid::from_raw));
        rustix::fs::chownat(&file, "", user, group, AtFlags::EMPTY_PATH)?;
    }
    Ok((stat.st_dev, stat.st_ino))
}

/// Refuses a path that leads through a symbolic link which neither we nor root made: whoever made it could lead the socket, and the
/// removal of an old one, to any place that we may write to.
///
/// A directory of somebody else's may still be replaced by a link between this look and the use; what then is at the end of the path gets
/// neither permissions nor an owner from us unless it is the socket just made ([`hand_over`]).
fn no_links_of_others(path: &Path) -> Result<(), ConfigError> {
    let us = rustix::process::geteuid().as_raw();
    for part in path.ancestors().skip(1) {
        let Ok(file) = fs::symlink_metadata(part) else {
            continue; // made later, by us
        };
        if file.is_symlink() && file.uid() != us && file.uid() != 0 {
            return Err(ConfigError(format!(
                "{}: leads through the symbolic link {} of user {}, who could lead the socket anywhere: write the path without it",
                path.display(),
                part.display(),
                file.uid()
            )));
        }
    }
    Ok(())
}

/// Makes a directory for sockets, and those above it, where they are missing.
pub fn make_dir(dir: &Path) -> Result<(), ConfigError> {
    let made = fs::DirBuilder::new()
        .recursive(true)
        .mode(0o755)
        .create(dir);
    made.map_err(|error| {
        let hint = sandbox::hint(dir);
        ConfigError(format!(
            "{}: cannot be made, choose a path you may write to: {error}{hint}",
            dir.display()
        ))
    })
}

/// Connects, or says at once why not: somebody who listens but does not accept cannot hold us.
fn try_connect(path: &Path) -> rustix::io::Result<()> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)
}

/// Removes the socket of a dead process; refuses anything else that is in the way.
fn make_room(path: &Path) -> Result<(), ConfigError> {
    let shown = path.display();
    let Ok(file) = fs::symlink_metadata(path) else {
        return Ok(());
    };
    if !file.file_type().is_socket() {
        return Err(ConfigError(format!(
            "{shown}: is there and is no socket: remove it, or choose another path"
        )));
    }
    match try_connect(path) {
        Ok(()) | Err(Errno::AGAIN) => Err(ConfigError(format!("{shown}: address already in use: stop the process that listens there, or choose another path"))),
        Err(Errno::CONNREFUSED) => fs::remove_file(path).map_err(|error| {
            ConfigError(format!("{shown}: a dead process left it and it cannot be removed: {error}: remove it as its owner"))
        }),
        Err(error) => Err(ConfigError(format!("{shown}: is there and cannot be tried: {error}: remove it, or choose another path"))),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn appears_with_its_permissions_and_goes_with_its_owner() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("deep/er/s.sock");
        let socket = OwnedSocket::listen(&path, Permissions(0o640), None).expect("listens");
        assert_eq!(
            fs::metadata(&path).expect("there").permissions().mode() & 0o777,
            0o640
        );
        UnixStream::connect(&path).expect("somebody listens");
        drop(socket);
        assert!(!path.exists());
    }

    #[test]
    fn replaces_the_socket_of_the_dead_and_refuses_that_of_the_living() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("s.sock");
        drop(UnixListener::bind(&path).expect("bound"));
        assert!(path.exists(), "left behind, as by kill -9");
        let living =
            OwnedSocket::listen(&path, Permissions(0o600), None).expect("replaces the dead one");
        let refusal = OwnedSocket::listen(&path, Permissions(0o600), None)
            .expect_err("alive")
            .to_string();
        assert!(refusal.ends_with(
            "address already in use: stop the process that listens there, or choose another path"
        ));
        drop(living);
    }

    #[test]
    fn is_not_held_by_one_who_listens_but_accepts_nobody() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("s.sock");
        let _lazy = UnixListener::bind(&path).expect("bound");
        let mut waiting = Vec::new();
        while let Ok(()) = {
            let flags = SocketFlags::NONBLOCK;
            let socket =
                rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None);
            waiting.push(socket.expect("a socket"));
            let address = SocketAddrUnix::new(&path).expect("an address");
            rustix::net::connect(&waiting[waiting.len() - 1], &address)
        } {}
        let refusal = OwnedSocket::listen(&path, Permissions(0o600), None).expect_err("in use");
        assert!(refusal.to_string().contains("address already in use"));
    }

    #[test]
    fn gives_nobody_elses_file_its_permissions() {
        let dir = tempfile::tempdir().expect("a directory");
        let (precious, path) = (dir.path().join("precious"), dir.path().join("s.sock"));
        fs::write(&precious, "").expect("written");
        let mode = || fs::metadata(&precious).expect("there").permissions().mode();
        let before = mode();
        std::os::unix::fs::symlink(&precious, &path).expect("planted");
        assert_eq!(
            hand_over(&path, Permissions(0o666), None),
            Err(Errno::NOTSOCK)
        );
        assert_eq!(mode(), before);
    }

    #[test]
    fn is_led_nowhere_by_a_link_of_somebody_else() {
        let dir = tempfile::tempdir().expect("a directory");
        let (real, link) = (dir.path().join("real"), dir.path().join("link"));
        fs::create_dir(&real).expect("made");
        std::os::unix::fs::symlink(&real, &link).expect("planted");
        let path = link.join("deep/s.sock");
        drop(OwnedSocket::listen(&path, Permissions(0o600), None).expect("a link of our own"));
        if std::os::unix::fs::lchown(&link, Some(65_534), Some(65_534)).is_err() {
            eprintln!("SKIPPED: another user's link: only root can make one; run as root");
            return;
        }
        let refusal = OwnedSocket::listen(&path, Permissions(0o600), None)
            .expect_err("led astray")
            .to_string();
        assert!(refusal.contains("of user 65534"), "{refusal}");
        assert!(!real.join("deep/s.sock").exists());
    }

    #[test]
    fn never_removes_what_is_not_its_own() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("s.sock");
        fs::write(&path, "precious").expect("written");
        let refusal = OwnedSocket::listen(&path, Permissions(0o600), None)
            .expect_err("a file")
            .to_string();
        assert!(refusal.ends_with("is there and is no socket: remove it, or choose another path"));
        fs::remove_file(&path).expect("removed");
        let first = OwnedSocket::listen(&path, Permissions(0o600), None).expect("listens");
        fs::remove_file(&path).expect("removed by somebody");
        let _second = UnixListener::bind(&path).expect("somebody else's");
        drop(first);
        assert!(path.exists());
    }
}
