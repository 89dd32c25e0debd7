//! What a process holds: descriptors, mappings of guests' memory, threads, memory of its own.

use std::fmt;
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};

use super::api::PATIENCE;

/// Memory the allocator may keep beyond what it had, in KiB. 20 attachments that leak one ring each would be more.
const RSS_SLACK: u64 = 1024;

/// One look at `/proc/PID`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Usage {
    pub(super) fds: usize,
    /// Mappings of guests' files.
    pub(super) guest_maps: usize,
    /// Mappings of any kind.
    pub(super) maps: usize,
    /// Threads, without those that answer the API: they come and go.
    pub(super) threads: usize,
    /// Memory of its own, in KiB: guests' memory is theirs.
    pub(super) rss: u64,
    /// Locked memory, in KiB.
    pub(super) locked: u64,
}

impl fmt::Display for Usage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} descriptors, {} mappings ({} of guests), {} threads, {} KiB own, {} KiB locked",
            self.fds, self.maps, self.guest_maps, self.threads, self.rss, self.locked
        )
    }
}

impl Usage {
    pub(super) fn of(pid: u32) -> Result<Usage> {
        let at = |name: &str| format!("/proc/{pid}/{name}");
        let maps = std::fs::read_to_string(at("maps"))?;
        let of_guests = |line: &&str| line.contains("/memfd:") || line.contains("/dev/hugepages");
        let status = std::fs::read_to_string(at("status"))?;
        let field = |name: &str| -> Result<u64> {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            let number = line.and_then(|rest| rest.split_whitespace().next());
            number
                .context("a field of /proc/PID/status")?
                .parse()
                .context("a number")
        };
        let names = std::fs::read_dir(at("task"))?
            .filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("comm")).ok());
        Ok(Usage {
            fds: std::fs::read_dir(at("fd"))?.count(),
            guest_maps: maps.lines().filter(of_guests).count(),
            maps: maps.lines().count(),
            threads: names.filter(|name| name.trim() != "api-ask").count(),
            rss: field("RssAnon:")?,
            locked: field("VmLck:")?,
        })
    }

    /// No more than `before`, apart from what the allocator keeps.
    fn is_back_at(&self, before: &Usage) -> bool {
        self.fds <= before.fds
            && self.guest_maps <= before.guest_maps
            && self.threads <= before.threads
            && self.locked <= before.locked
            && self.rss <= before.rss + RSS_SLACK
            && self.maps <= before.maps + 16
    }
}

/// Waits until a process holds no more than before: the last connection is closed by a thread of its own.
pub(super) fn wait_back_at(pid: u32, before: &Usage) -> Result<Usage> {
    let end = Instant::now() + PATIENCE;
    loop {
        let now = Usage::of(pid)?;
        if now.is_back_at(before) {
            return Ok(now);
        }
        ensure!(
            Instant::now() < end,
            "the switch keeps things: {now}; before: {before}"
        );
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
}
