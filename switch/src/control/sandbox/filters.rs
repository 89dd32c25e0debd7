//! seccomp: which calls can be made.

use std::io;
use std::sync::OnceLock;

use seccompiler::{BpfMap, BpfProgram, TargetArch, compile_from_json};

use super::Mode;
use super::kernel::{install, keep_signals_away};

/// The lists: `control`, `intruder` and `worker`.
#[cfg(target_arch = "x86_64")]
const LISTS: Option<&str> = Some(include_str!("x86_64.json"));
#[cfg(not(target_arch = "x86_64"))]
const LISTS: Option<&str> = None;

/// What a worker gives up besides, if control has given up anything.
static WORKER: OnceLock<BpfProgram> = OnceLock::new();

/// Restricts this thread, and all that it will start.
pub(super) fn restrict_control(mode: Mode) -> Result<(), String> {
    let mut lists = compile(mode)?;
    let mut list = |name: &str| lists.remove(name).ok_or(format!("no list named {name}"));
    let (control, intruder, worker) = (list("control")?, list("intruder")?, list("worker")?);
    install(&intruder).map_err(|error| error.to_string())?;
    install(&control).map_err(|error| error.to_string())?;
    let _ = WORKER.set(worker); // once per process, as its caller
    Ok(())
}

/// Restricts a worker's thread, when it has done what it does once. What is left is for: frames (`io_submit`), sleep (`epoll_*`, `read`),
/// answers (`futex`, `sched_yield`), memory that vanished (`ioctl`, `mmap`, `fstat`, `newfstatat`, `rt_sigreturn`), an uplink over
/// vfio-user (`read`, `write`), small memory (`brk`), the thread's end (`exit`, `madvise`, `munmap`, `rt_sigprocmask`, `sigaltstack`), and
/// a death that leaves a trace (`exit_group`, `rt_sigaction`, `getpid`, `gettid`, `tgkill`, `write`).
pub fn restrict_worker() -> io::Result<()> {
    keep_signals_away();
    WORKER.get().map_or(Ok(()), install)
}

fn compile(mode: Mode) -> Result<BpfMap, String> {
    let lists = LISTS.ok_or("there is no list of calls for this processor")?;
    let mut lists: serde_json::Value =
        serde_json::from_str(lists).map_err(|error| error.to_string())?;
    if mode == Mode::Strict {
        for list in ["control", "worker"] {
            lists[list]["mismatch_action"] = "kill_process".into();
        }
    }
    let arch = TargetArch::try_from(std::env::consts::ARCH).map_err(|error| error.to_string())?;
    compile_from_json(lists.to_string().as_bytes(), arch).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lists_compile_and_workers_may_nothing_that_control_may_not() {
        for mode in [Mode::On, Mode::Strict] {
            let lists = compile(mode).expect("lists");
            assert_eq!(lists.len(), 3);
        }
        let lists: serde_json::Value = serde_json::from_str(LISTS.expect("x86-64")).expect("JSON");
        let names = |list: &str| -> Vec<String> {
            let filter = lists[list]["filter"].as_array().expect("a list");
            filter
                .iter()
                .map(|rule| rule["syscall"].as_str().expect("a name").to_owned())
                .collect()
        };
        let (control, worker) = (names("control"), names("worker"));
        let beyond: Vec<_> = worker
            .iter()
            .filter(|name| !control.contains(name))
            .collect();
        assert!(
            beyond.is_empty(),
            "control's filter is in force in workers too: {beyond:?}"
        );
        assert!(names("intruder").iter().all(|name| !control.contains(name)));
    }
}
