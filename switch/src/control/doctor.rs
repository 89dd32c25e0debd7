//! Looks at the host and says what could be better, what that would gain, and the command that does it. Nothing here is needed to run:
//! Ringway works without any preparation; a prepared host only makes it faster or steadier.

mod memory;
mod processors;
mod vfio;

use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::cpu::HostCpus;

/// What a check came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// As good as it gets.
    Ok,
    /// It works and could be better.
    Advice,
    /// Ringway cannot run.
    Blocks,
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Check {
    /// What.
    pub name: String,
    /// How it is.
    pub verdict: Verdict,
    /// What was found.
    pub found: String,
    /// What a repair would gain.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gain: Option<String>,
    /// The command that repairs it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub repair: Option<String>,
}

impl Check {
    pub(super) fn ok(name: &str, found: impl Into<String>) -> Check {
        Check {
            name: name.to_owned(),
            verdict: Verdict::Ok,
            found: found.into(),
            gain: None,
            repair: None,
        }
    }

    pub(super) fn advice(
        name: &str,
        found: impl Into<String>,
        gain: &str,
        repair: impl Into<String>,
    ) -> Check {
        let (gain, repair) = (Some(gain.to_owned()), Some(repair.into()));
        Check {
            verdict: Verdict::Advice,
            gain,
            repair,
            ..Check::ok(name, found)
        }
    }

    fn blocks(name: &str, found: impl Into<String>, repair: impl Into<String>) -> Check {
        Check {
            verdict: Verdict::Blocks,
            repair: Some(repair.into()),
            ..Check::ok(name, found)
        }
    }
}

/// The host, seen through `root`: `/`, or a tree with `proc` and `sys` in it.
struct Host<'a> {
    root: &'a Path,
    cpus: HostCpus,
    /// The CPUs that workers have, or that one worker would be given.
    workers: Vec<usize>,
    flags: Vec<String>,
}

/// Checks the host for workers on these CPUs; for one on the CPU it would be given if there are none.
pub fn examine(root: &Path, workers: &[usize]) -> Vec<Check> {
    let cpus = HostCpus::read(root);
    let workers = if workers.is_empty() {
        cpus.choose(1)
    } else {
        workers.to_vec()
    };
    let host = Host {
        root,
        workers,
        flags: cpu_flags(root),
        cpus,
    };
    let checks: [fn(&Host<'_>) -> Check; 22] = [
        kernel,
        processors::cpuset,
        processors::cpu_quota,
        processors::isolated,
        processors::nohz_full,
        processors::rcu_nocbs,
        processors::siblings,
        processors::governor,
        processors::tsc,
        processors::vector,
        memory::hugepages_2m,
        memory::hugepages_1g,
        memory::hugetlb_limit,
        memory::transparent,
        memory::memlock,
        memory::userfaultfd,
        memory::seccomp,
        memory::descriptors,
        |host| aio(host.root),
        vfio::iommu,
        vfio::groups,
        vfio::vfio,
    ];
    checks.iter().map(|check| check(&host)).collect()
}

impl Host<'_> {
    fn text(&self, path: &str) -> Option<String> {
        fs::read_to_string(self.root.join(path))
            .ok()
            .map(|text| text.trim().to_owned())
    }

    fn number(&self, path: &str) -> Option<u64> {
        self.text(path)?.parse().ok()
    }

    /// A parameter of the kernel's command line.
    fn boot(&self, name: &str) -> Option<String> {
        let line = self.text("proc/cmdline")?;
        line.split_whitespace().find_map(|word| {
            word.strip_prefix(name)?
                .strip_prefix('=')
                .map(str::to_owned)
        })
    }

    fn has(&self, flag: &str) -> bool {
        self.flags.iter().any(|found| found == flag)
    }

    /// The soft limit of a resource in `proc/self/limits`; `None` in the inner option: unlimited.
    fn limit(&self, name: &str) -> Option<Option<u64>> {
        let limits = self.text("proc/self/limits")?;
        let line = limits.lines().find_map(|line| line.strip_prefix(name))?;
        match line.split_whitespace().next()? {
            "unlimited" => Some(None),
            number => number.parse().ok().map(Some),
        }
    }

    fn worker_list(&self) -> String {
        self.workers
            .iter()
            .map(ToString::to_string)
            .collect::<Vec<_>>()
            .join(",")
    }

    /// The command that adds parameters to the kernel's command line, in this distribution's way.
    fn boot_with(&self, parameters: &str) -> String {
        if self.root.join("etc/default/grub").exists() {
            format!(
                "sed -i 's/^GRUB_CMDLINE_LINUX=\"/&{parameters} /' /etc/default/grub && update-grub && reboot"
            )
        } else if self.root.join("usr/sbin/grubby").exists() {
            format!("grubby --update-kernel=ALL --args=\"{parameters}\" && reboot")
        } else {
            format!("add to the kernel's command line and reboot: {parameters}")
        }
    }
}

fn cpu_flags(root: &Path) -> Vec<String> {
    let info = fs::read_to_string(root.join("proc/cpuinfo")).unwrap_or_default();
    let line = info.lines().find(|line| line.starts_with("flags"));
    line.and_then(|line| line.split_once(':'))
        .map(|(_, flags)| flags.split_whitespace().map(str::to_owned).collect())
        .unwrap_or_default()
}

fn kernel(host: &Host<'_>) -> Check {
    let release = host.text("proc/sys/kernel/osrelease").unwrap_or_default();
    let mut parts = release
        .split(['.', '-'])
        .map_while(|part| part.parse::<u32>().ok());
    let version = (parts.next().unwrap_or(0), parts.next().unwrap_or(0));
    let name = "kernel";
    if version < (4, 14) {
        let found = if release.is_empty() {
            "unknown: is /proc mounted?".to_owned()
        } else {
            release
        };
        return Check::blocks(name, found, "boot Linux 4.14 or later, with /proc mounted");
    }
    if version < (5, 11) {
        let gain = "faults of a guest's memory caught without privileges (5.11); sockets opened without following links (5.6)";
        return Check::advice(name, release, gain, "boot Linux 5.11 or later");
    }
    Check::ok(name, release)
}

/// Contexts of kernel AIO, of which the switch takes one to call guests.
pub(super) fn aio(root: &Path) -> Check {
    let number = |path: &str| -> Option<u64> {
        fs::read_to_string(root.join(path))
            .ok()?
            .trim()
            .parse()
            .ok()
    };
    let name = "kernel AIO";
    let (used, most) = (
        number("proc/sys/fs/aio-nr"),
        number("proc/sys/fs/aio-max-nr"),
    );
    let gain =
        "guests that do not poll (virtual machines, DPDK with interrupts) hear of their frames";
    match (used, most) {
        // The kernel counts some more than were asked for.
        (Some(used), Some(most)) if used + 1024 <= most => {
            Check::ok(name, format!("{used} of {most} requests taken"))
        }
        (Some(used), Some(most)) => Check::advice(
            name,
            format!("{used} of {most} requests taken: little or nothing is left"),
            gain,
            format!("sysctl -w fs.aio-max-nr={}", most.max(65_536) * 4),
        ),
        _ => Check::advice(
            name,
            "not in the kernel",
            gain,
            "boot a kernel with CONFIG_AIO=y (every large distribution's)",
        ),
    }
}

#[cfg(test)]
mod tests;
