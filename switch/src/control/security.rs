//! What this host offers against intruders, and what of it is in force in a running switch: `ringway doctor --security`.

use std::path::Path;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::doctor::{Check, Verdict};
use super::sandbox::{self, Mode, Sandbox};
use crate::virtio::guest_mem::can_arm;

/// How the switch that answers is guarded, as the kernel tells it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SecurityReport {
    /// Its user id.
    pub uid: u32,
    /// Capabilities in effect in any of its threads, by number.
    pub capabilities: Vec<u8>,
    /// Capabilities that any thread could still gain.
    pub bounding: Vec<u8>,
    /// Whether executing a program can gain it anything in no thread.
    pub no_new_privs: bool,
    /// Its threads, with the seccomp filters on each.
    pub threads: Vec<ThreadGuard>,
    /// What it gave up when it started; none: it was started by something else than `ringway run`.
    pub sandbox: Option<Sandbox>,
    /// Whether holes in guests' memory are caught.
    pub userfaultfd: bool,
    /// Whether guests can be called; if not, why.
    pub calls: Option<String>,
}

/// One thread.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ThreadGuard {
    /// Its name.
    pub name: String,
    /// Seccomp filters that all its calls pass; none: this kernel (before 5.9) does not count them.
    pub filters: Option<u32>,
    /// Whether its calls are filtered at all.
    pub filtered: bool,
}

impl SecurityReport {
    /// Of this process.
    pub fn here() -> SecurityReport {
        let mut report = SecurityReport {
            uid: rustix::process::geteuid().as_raw(),
            no_new_privs: true,
            sandbox: sandbox::in_force().cloned(),
            userfaultfd: can_arm(),
            calls: crate::port::call::prepare()
                .err()
                .map(|error| error.to_string()),
            ..SecurityReport::default()
        };
        let (mut effective, mut bounding) = (0, 0);
        for task in std::fs::read_dir("/proc/self/task")
            .into_iter()
            .flatten()
            .flatten()
        {
            let Ok(text) = std::fs::read_to_string(task.path().join("status")) else {
                continue; // it has ended
            };
            let field = |name: &str| {
                let mut lines = text.lines();
                lines
                    .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
                    .map(str::trim)
            };
            let bits = |name| {
                field(name)
                    .and_then(|hex| u64::from_str_radix(hex, 16).ok())
                    .unwrap_or(0)
            };
            effective |= bits("CapEff");
            bounding |= bits("CapBnd");
            report.no_new_privs &= field("NoNewPrivs") == Some("1");
            report.threads.push(ThreadGuard {
                name: field("Name").unwrap_or_default().to_owned(),
                filters: field("Seccomp_filters").and_then(|number| number.parse().ok()),
                filtered: field("Seccomp") == Some("2"),
            });
        }
        let numbers = |bits: u64| (0..64).filter(|bit| bits >> bit & 1 == 1).collect();
        (report.capabilities, report.bounding) = (numbers(effective), numbers(bounding));
        report.threads.sort_by(|a, b| a.name.cmp(&b.name));
        report
    }

    /// The same as checks, for people.
    pub fn checks(&self) -> Vec<Check> {
        vec![
            self.user(),
            self.privileges(),
            self.calls_filtered(),
            self.files(),
            self.holes(),
            self.guests_called(),
        ]
    }

    fn user(&self) -> Check {
        let name = "switch: user";
        let kept: Vec<String> = self
            .capabilities
            .iter()
            .map(|number| capability(*number))
            .collect();
        match (self.uid, kept.as_slice()) {
            (0, kept) => Check::advice(
                name,
                format!(
                    "root, with {}",
                    if kept.is_empty() {
                        "no capability".to_owned()
                    } else {
                        kept.join(", ")
                    }
                ),
                "whoever breaks in is not root: as an ordinary user it needs no capability at all",
                "run it as a user of its own: configs/ringway.service does, with User= set",
            ),
            (uid, []) => Check::ok(name, format!("{uid}, no capability")),
            (uid, kept) => Check::advice(
                name,
                format!("{uid}, with {}", kept.join(", ")),
                "less for an intruder to use",
                "take the capabilities away (AmbientCapabilities= and CapabilityBoundingSet= empty, --cap-drop ALL)",
            ),
        }
    }

    fn privileges(&self) -> Check {
        if self.no_new_privs {
            return Check::ok("switch: new privileges", "none can be gained");
        }
        let gain = "a set-user-id program gives an intruder nothing";
        Check::advice(
            "switch: new privileges",
            "executing a program may gain some",
            gain,
            self.remedy(),
        )
    }

    fn calls_filtered(&self) -> Check {
        let name = "switch: seccomp";
        let (bare, all) = (
            self.threads
                .iter()
                .filter(|thread| !thread.filtered)
                .count(),
            self.threads.len(),
        );
        let workers = self
            .threads
            .iter()
            .filter(|thread| thread.name.starts_with("worker-"));
        let counted: Vec<u32> = workers.filter_map(|thread| thread.filters).collect();
        let ours = self.sandbox.as_ref().is_some_and(|sandbox| sandbox.seccomp);
        if bare == 0 && ours {
            let least = counted.iter().min().map_or(String::new(), |least| {
                format!("; workers have {least} filters")
            });
            return Check::ok(name, format!("all {all} threads are filtered{least}"));
        }
        let found = match (bare, ours) {
            (0, _) => "only filters of somebody else are in force".to_owned(),
            _ => format!("{bare} of {all} threads are not filtered"),
        };
        Check::advice(
            name,
            found,
            "an intruder can make no call that the switch does not make",
            self.remedy(),
        )
    }

    fn files(&self) -> Check {
        let name = "switch: Landlock";
        let gain = "an intruder reaches no file but the switch's own";
        match self
            .sandbox
            .as_ref()
            .map(|sandbox| (sandbox.landlock, sandbox))
        {
            Some((Some(version), sandbox)) => {
                let dirs: Vec<_> = sandbox
                    .socket_dirs
                    .iter()
                    .map(|dir| dir.display().to_string())
                    .collect();
                Check::ok(
                    name,
                    format!("version {version}; sockets only below {}", dirs.join(", ")),
                )
            }
            _ => Check::advice(name, "not in force", gain, self.remedy()),
        }
    }

    fn holes(&self) -> Check {
        if self.userfaultfd {
            return Check::ok("switch: userfaultfd", "holes in guests' memory are caught");
        }
        let gain = "a hole in a guest's memory costs that guest its port; without, it is filled on the switch's account";
        Check::advice("switch: userfaultfd", "refused to the switch", gain, UFFD)
    }

    fn guests_called(&self) -> Check {
        match &self.calls {
            None => Check::ok(
                "switch: calls",
                "guests that sleep are called, and none can block that",
            ),
            Some(why) => Check::advice(
                "switch: calls",
                format!("no guest can be called: {why}"),
                "guests that do not poll (virtual machines, DPDK with interrupts) hear of their frames",
                AIO,
            ),
        }
    }

    fn remedy(&self) -> String {
        match &self.sandbox {
            Some(sandbox) if sandbox.mode == Mode::Off => {
                "start it without --sandbox off".to_owned()
            }
            Some(sandbox) if !sandbox.missing.is_empty() => sandbox.missing.join("; "),
            _ => "start it with `ringway run`".to_owned(),
        }
    }
}

const UFFD: &str = "Linux 5.11 or later with CONFIG_USERFAULTFD=y; Docker: --security-opt seccomp=configs/docker-seccomp.json";
const AIO: &str =
    "sysctl -w fs.aio-max-nr=1048576; or allow io_setup and io_submit in the seccomp profile";

/// Checks what the host offers; `root` as for [`super::doctor::examine`].
pub fn offers(root: &Path) -> Vec<Check> {
    let text = |path: &str| std::fs::read_to_string(root.join(path)).unwrap_or_default();
    let actions = text("proc/sys/kernel/seccomp/actions_avail");
    let seccomp = if actions.contains("kill_process") {
        Check::ok("host: seccomp", actions.trim())
    } else {
        Check::advice(
            "host: seccomp",
            "not in the kernel, or too old",
            "an intruder can make no call that the switch does not make",
            "boot Linux 4.14 or later with CONFIG_SECCOMP_FILTER=y",
        )
    };
    let landlock = match sandbox::landlock_abi() {
        Some(version) if version >= 3 => Check::ok("host: Landlock", format!("version {version}")),
        found => Check::advice(
            "host: Landlock",
            found.map_or("none".to_owned(), |version| format!("version {version}")),
            "an intruder reaches no file but the switch's own; version 3 (Linux 6.2) guards against truncation, 4 against TCP",
            "boot Linux 6.2 or later with CONFIG_SECURITY_LANDLOCK=y and landlock in lsm=",
        ),
    };
    let userfaultfd = if can_arm() {
        Check::ok("host: userfaultfd", "granted to this user")
    } else {
        Check::advice(
            "host: userfaultfd",
            "refused to this user",
            "a hole in a guest's memory costs that guest its port; without, it is filled on the switch's account",
            UFFD,
        )
    };
    vec![seccomp, landlock, userfaultfd, super::doctor::aio(root)]
}

/// A check of a switch that could not be asked.
pub fn nobody(why: &str) -> Check {
    Check {
        verdict: Verdict::Advice,
        ..Check::ok("switch", format!("not asked: {why}"))
    }
}

/// A capability's name (capabilities(7)), or its number where it has none here.
fn capability(number: u8) -> String {
    const NAMES: [&str; 41] = [
        "CHOWN",
        "DAC_OVERRIDE",
        "DAC_READ_SEARCH",
        "FOWNER",
        "FSETID",
        "KILL",
        "SETGID",
        "SETUID",
        "SETPCAP",
        "LINUX_IMMUTABLE",
        "NET_BIND_SERVICE",
        "NET_BROADCAST",
        "NET_ADMIN",
        "NET_RAW",
        "IPC_LOCK",
        "IPC_OWNER",
        "SYS_MODULE",
        "SYS_RAWIO",
        "SYS_CHROOT",
        "SYS_PTRACE",
        "SYS_PACCT",
        "SYS_ADMIN",
        "SYS_BOOT",
        "SYS_NICE",
        "SYS_RESOURCE",
        "SYS_TIME",
        "SYS_TTY_CONFIG",
        "MKNOD",
        "LEASE",
        "AUDIT_WRITE",
        "AUDIT_CONTROL",
        "SETFCAP",
        "MAC_OVERRIDE",
        "MAC_ADMIN",
        "SYSLOG",
        "WAKE_ALARM",
        "BLOCK_SUSPEND",
        "AUDIT_READ",
        "PERFMON",
        "BPF",
        "CHECKPOINT_RESTORE",
    ];
    NAMES
        .get(usize::from(number))
        .map_or_else(|| format!("CAP_{number}"), |name| format!("CAP_{name}"))
}
