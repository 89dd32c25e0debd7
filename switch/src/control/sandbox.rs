//! Takes from the process what it does not need, once and for good, before its first thread starts.
//!
//! Whoever finds a way to run code of his in here shall find nothing to do with it. Layers, each of use alone:
//!
//! 1. **Capabilities**: none for an ordinary user; root keeps [`rights::KEPT`]. The bounding set goes with them.
//! 2. **No new privileges**: what is executed gains nothing.
//! 3. **Landlock** (Linux 5.13): files are read where the switch reads, sockets made where ports have theirs, and no TCP.
//! 4. **seccomp**: the calls in `sandbox/x86_64.json`, a list that tests keep exact. Workers have a far shorter one.
//!
//! A call that only an intruder makes (`execve`, `ptrace` ...) kills the process. Any other unlisted call is answered ENOSYS: the C
//! library knows what to do without a call that is newer than the list, while a switch that dies of a new C library, or of a
//! heap that shrinks in an unusual moment, takes every container's network with it.
//!
//! Threads inherit all of it, so [`enter`] is called on the main thread while it is the only one.

mod filters;
mod kernel;
mod paths;
mod rights;

use std::path::PathBuf;
use std::sync::OnceLock;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

pub use filters::restrict_worker;
pub use kernel::landlock_abi;

/// How much is taken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// All that can be.
    #[default]
    On,
    /// The same, and every unlisted call kills the process: for tests of the list.
    Strict,
    /// Nothing: for debuggers.
    Off,
}

/// What is in force.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Sandbox {
    /// What was asked for.
    pub mode: Mode,
    /// Whether calls are filtered.
    pub seccomp: bool,
    /// Version of Landlock that is in force; none: it is not.
    pub landlock: Option<u32>,
    /// Directories below which sockets may be made, if Landlock is in force.
    #[schema(value_type = Vec<String>)]
    pub socket_dirs: Vec<PathBuf>,
    /// What could not be done, and why.
    pub missing: Vec<String>,
}

static IN_FORCE: OnceLock<Sandbox> = OnceLock::new();

/// What this process gave up; none: [`enter`] was never called.
pub fn in_force() -> Option<&'static Sandbox> {
    IN_FORCE.get()
}

/// Gives up what `mode` says. Sockets can be made below `socket_dirs` from now on and nowhere else; files in `readable` can be read.
///
/// What the host refuses is left out and told: an old kernel is no reason not to run.
pub fn enter(mode: Mode, socket_dirs: Vec<PathBuf>, readable: &[PathBuf]) -> &'static Sandbox {
    IN_FORCE.get_or_init(|| {
        let mut sandbox = Sandbox {
            mode,
            ..Sandbox::default()
        };
        if mode == Mode::Off {
            log::warn!("THE SANDBOX IS OFF: no seccomp, no Landlock, every capability kept. For debugging only");
            return sandbox;
        }
        kernel::one_heap();
        let mut missing = Vec::new();
        let mut tell = |what: &str, done: Result<(), String>| {
            let failed = done.err().map(|why| format!("{what}: {why}"));
            missing.extend(failed.clone());
            failed.is_none()
        };
        tell("capabilities", rights::drop_capabilities());
        tell("no_new_privs", rights::no_new_privileges());
        match paths::restrict(&socket_dirs, readable) {
            Ok(abi) => (sandbox.landlock, sandbox.socket_dirs) = (Some(abi), socket_dirs),
            Err(why) => drop(tell("Landlock", Err(why))),
        }
        sandbox.seccomp = tell("seccomp", filters::restrict_control(mode));
        for why in &missing {
            log::warn!("sandbox: not in force: {why}");
        }
        sandbox.missing = missing;
        sandbox
    })
}

/// What to say of a place that may not be written to, if it is we who gave that up.
pub(super) fn hint(path: &std::path::Path) -> String {
    match in_force() {
        Some(sandbox) if sandbox.landlock.is_some() => {
            let allowed = sandbox.socket_dirs.iter().any(|dir| path.starts_with(dir));
            if allowed {
                return String::new();
            }
            let dirs: Vec<_> = sandbox
                .socket_dirs
                .iter()
                .map(|dir| dir.display().to_string())
                .collect();
            format!(
                " (this switch gave up all directories but {} when it started: name the new one with --socket-dir and restart)",
                dirs.join(", ")
            )
        }
        _ => String::new(),
    }
}
