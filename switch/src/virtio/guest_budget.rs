//! How much of the guests' untouched memory we fill on our own account.
//!
//! A page that we are the first to touch is charged to *our* memory limit for as long as the guest keeps its file, be it
//! attached or not. So there are two bounds, and a fill must pass both: the budget of the port, and a pool of the
//! process, a quarter of its memory limit. What is still charged to us cannot be told from our own records; the cgroup
//! knows it, if we have one to ourselves (a systemd unit and a container have). Then both bounds are set anew at each
//! memory table from what is really alive. Else there is no limit of ours to defend: no pool, and a port gets its
//! budget again after a while, so that guests that come and go by dozens do not use it up.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How many bytes of its guests' untouched memory a port has filled. Any thread may use it, a signal handler too (except
/// to renew it).
#[derive(Debug)]
pub struct FillBudget {
    size: u64,
    left: AtomicU64,
    renewed: Mutex<Instant>,
}

/// What all ports together may still fill, in bytes. Above [`POOL_MAX`]: no bound.
static POOL: AtomicU64 = AtomicU64::new(u64::MAX);
/// When the pool was last set from the cgroup.
static POOL_SET: Mutex<Option<Instant>> = Mutex::new(None);
/// The pool where the cgroup has no limit, in bytes.
const POOL_MAX: u64 = 4 << 30;
/// The cgroup is asked at most this often; its numbers are some seconds old anyway.
const ASK_AGAIN: Duration = Duration::from_secs(1);
/// A port without a cgroup to ask gets its budget again after this time.
const RENEW_AFTER: Duration = Duration::from_secs(600);

impl FillBudget {
    /// A budget of `bytes`.
    #[must_use]
    pub fn new(bytes: u64) -> Arc<FillBudget> {
        Arc::new(FillBudget {
            size: bytes,
            left: AtomicU64::new(bytes),
            renewed: Mutex::new(Instant::now()),
        })
    }

    /// What is left of it, in bytes.
    #[must_use]
    pub fn left(&self) -> u64 {
        self.left.load(Ordering::Relaxed)
    }

    /// Takes `bytes`, or nothing if less is left to the port or to all. Async-signal-safe.
    pub(super) fn take(&self, bytes: u64) -> bool {
        if !take(&self.left, bytes) {
            return false;
        }
        let taken = take(&POOL, bytes);
        if !taken {
            add(&self.left, bytes);
        }
        taken
    }

    /// Undoes `take`. Async-signal-safe.
    pub(super) fn give_back(&self, bytes: u64) {
        add(&self.left, bytes);
        add(&POOL, bytes);
    }

    /// Sets what is left by what is really charged to us. For control threads, at each memory table.
    pub(super) fn renew(&self) {
        let mut asked = POOL_SET.lock().unwrap_or_else(PoisonError::into_inner);
        let mut renewed = self.renewed.lock().unwrap_or_else(PoisonError::into_inner);
        if asked.is_none_or(|at| at.elapsed() >= ASK_AGAIN) {
            *asked = Some(Instant::now());
            let own = Charge::of_this_process(
                Path::new("/proc/self/cgroup"),
                Path::new("/sys/fs/cgroup"),
            );
            POOL.store(own.map_or(u64::MAX, |own| own.pool()), Ordering::Relaxed);
        }
        let pool = POOL.load(Ordering::Relaxed);
        if pool <= POOL_MAX || renewed.elapsed() >= RENEW_AFTER {
            *renewed = Instant::now();
            self.left.store(self.size, Ordering::Relaxed);
        }
    }
}

/// Relaxed: counts of their own, they order nothing.
fn take(left: &AtomicU64, bytes: u64) -> bool {
    left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| {
        left.checked_sub(bytes)
    })
    .is_ok()
}

/// Saturating: the count may have been renewed since it was taken from.
fn add(left: &AtomicU64, bytes: u64) {
    let _ = left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| {
        Some(left.saturating_add(bytes))
    });
}

/// What the cgroup of this process says of its memory.
#[derive(Debug, PartialEq, Eq)]
struct Charge {
    /// Shared memory charged to it, in bytes: what was filled and still exists, and the little that is our own.
    shmem: u64,
    limit: u64,
}

impl Charge {
    fn pool(&self) -> u64 {
        (self.limit / 4).min(POOL_MAX).saturating_sub(self.shmem)
    }

    /// `None` unless this process is alone in a cgroup. `cgroups`: /proc/self/cgroup; `mount`: /sys/fs/cgroup.
    fn of_this_process(cgroups: &Path, mount: &Path) -> Option<Charge> {
        let cgroups = fs::read_to_string(cgroups).ok()?;
        // "4:memory:/path" is version 1, "0::/path" version 2; both may be there, then version 1 has the memory.
        let path = |kind: &str| {
            let mut lines = cgroups.lines().map(|line| line.splitn(3, ':').skip(1));
            lines.find_map(|mut l| (l.next()? == kind).then(|| l.next())?)
        };
        let (root, path, limit) = match (path("memory"), path("")) {
            (Some(path), _) => (mount.join("memory"), path, None),
            (None, Some(path)) => (mount.to_path_buf(), path, Some(u64::MAX)),
            _ => return None,
        };
        // In a container the path may be the host's, and the mount our own part of the tree.
        let folder = [root.join(path.trim_start_matches('/')), root.clone()];
        let folder = folder.into_iter().find(|folder| alone_in(folder))?;
        let stat = fs::read_to_string(folder.join("memory.stat")).ok()?;
        let stat = |key: &str| {
            let mut words = stat.lines().filter_map(|line| line.split_once(' '));
            words.find(|(k, _)| *k == key)?.1.trim().parse().ok()
        };
        let limit = match limit {
            None => stat("hierarchical_memory_limit")?,
            Some(_) => lowest_limit(&folder, &root),
        };
        Some(Charge {
            shmem: stat("shmem")?,
            limit,
        })
    }
}

fn alone_in(folder: &Path) -> bool {
    fs::read_to_string(folder.join("cgroup.procs"))
        .is_ok_and(|procs| procs.trim() == std::process::id().to_string())
}

/// Version 2 has no file for the lowest limit on the way up.
fn lowest_limit(folder: &Path, root: &Path) -> u64 {
    let up = folder
        .ancestors()
        .take_while(|at| at.starts_with(root))
        .map(PathBuf::from);
    up.filter_map(|at| {
        fs::read_to_string(at.join("memory.max"))
            .ok()?
            .trim()
            .parse()
            .ok()
    })
    .min()
    .unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Files as the kernel writes them, in a folder of the test's own.
    fn tree(files: &[(&str, &str)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let path = dir.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text.replace("PID", &std::process::id().to_string())).unwrap();
        }
        dir
    }

    fn charge(dir: &tempfile::TempDir) -> Option<Charge> {
        Charge::of_this_process(&dir.path().join("self"), &dir.path().join("fs"))
    }

    #[test]
    fn reads_what_is_charged_to_a_cgroup_of_version_two() {
        let dir = tree(&[
            ("self", "0::/a.slice/b.service\n"),
            ("fs/memory.stat", "anon 1\n"),
            ("fs/a.slice/memory.max", "1000\n"),
            ("fs/a.slice/b.service/memory.max", "max\n"),
            (
                "fs/a.slice/b.service/memory.stat",
                "anon 5\nfile 900\nshmem 77\n",
            ),
            ("fs/a.slice/b.service/cgroup.procs", "PID\n"),
        ]);
        assert_eq!(
            charge(&dir),
            Some(Charge {
                shmem: 77,
                limit: 1000
            })
        );
        assert_eq!(charge(&dir).unwrap().pool(), 173);
    }

    #[test]
    fn reads_what_is_charged_to_a_cgroup_of_version_one() {
        let dir = tree(&[
            ("self", "4:memory:/host/path\n0::/\n"),
            (
                "fs/memory/memory.stat",
                "shmem 77\nhierarchical_memory_limit 4000\n",
            ),
            ("fs/memory/cgroup.procs", "PID\n"),
        ]);
        assert_eq!(
            charge(&dir),
            Some(Charge {
                shmem: 77,
                limit: 4000
            }),
            "seen from a container"
        );
    }

    #[test]
    fn says_nothing_of_a_cgroup_shared_with_others() {
        let dir = tree(&[
            ("self", "0::/\n"),
            ("fs/memory.stat", "shmem 77\n"),
            ("fs/cgroup.procs", "1\nPID\n"),
        ]);
        assert_eq!(charge(&dir), None);
    }
}
