//! Processes that the harness starts: where they run, how they are paused, what their threads got, that they end.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, getpriority_process, kill_process, setpriority_process};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

/// How many CPUs the harness was started on. Asked for the first time before any thread is pinned: a pinned one has but its own.
pub(crate) fn cpus() -> usize {
    static CPUS: OnceLock<usize> = OnceLock::new();
    *CPUS.get_or_init(|| std::thread::available_parallelism().map_or(1, usize::from))
}

/// Pins the calling thread (and what it starts from now on) to these CPUs.
pub(crate) fn pin(cpus: &[usize]) -> Result<()> {
    let mut set = CpuSet::new();
    for &cpu in cpus {
        if cpu >= CpuSet::MAX_CPU {
            bail!("there is no CPU {cpu}");
        }
        set.set(cpu);
    }
    sched_setaffinity(None, &set).with_context(|| format!("pinning to CPU {cpus:?}"))
}

/// The command that runs `program` so that the kernel ends it should the harness die without a word, in a session of
/// its own: Ctrl-C in the terminal reaches the harness alone, and the scheduler weighs it by itself.
pub(crate) fn command(program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new("setpriv");
    command
        .args(["--pdeathsig", "KILL", "--", "setsid"])
        .arg(program);
    command
}

/// Raises the harness, and what it starts from now on, above the other tasks of the machine while it lives.
pub(crate) struct Priority {
    nice: i32,
}

impl Priority {
    /// Without the right to do so nothing changes.
    pub(crate) fn raise(nice: i32) -> Self {
        let nice = setpriority_process(None, nice).map_or(0, |()| nice);
        weigh("self", nice);
        Self { nice }
    }

    /// What it came to.
    pub(crate) fn nice(&self) -> i32 {
        self.nice
    }
}

impl Drop for Priority {
    fn drop(&mut self) {
        weigh("self", 0); // the group is that of the user's shell too
    }
}

/// Where the kernel groups tasks by session (`sched_autogroup`), nice counts within a session only: a build in another
/// terminal takes half a core however nice it is. The session's own weight is what counts.
fn weigh(pid: &str, nice: i32) {
    let _ = fs::write(format!("/proc/{pid}/autogroup"), nice.to_string());
}

/// Gives a child's session, once it has one, the weight of the own priority.
fn weigh_child(pid: u32) {
    let group = |pid: &str| {
        let text = fs::read_to_string(format!("/proc/{pid}/autogroup")).ok()?;
        text.split_whitespace().next().map(str::to_owned)
    };
    let (Some(own), Ok(nice)) = (group("self"), getpriority_process(None)) else {
        return;
    };
    let pid = pid.to_string();
    for _ in 0..100 {
        if group(&pid).is_none_or(|of_child| of_child != own) {
            break;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    weigh(&pid, nice);
}

/// Where a program is, if it is there: a path as given, a name in `PATH` or among the places for daemons.
pub(crate) fn find(program: &str) -> Option<PathBuf> {
    if program.contains('/') {
        return Some(PathBuf::from(program)).filter(|path| path.is_file());
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let daemons = ["/usr/sbin", "/sbin", "/usr/local/sbin"].map(PathBuf::from);
    std::env::split_paths(&path)
        .chain(daemons)
        .map(|dir| dir.join(program))
        .find(|path| path.is_file())
}

/// A child of the harness. Dropping it ends it.
pub(crate) struct Proc {
    name: String,
    child: Child,
}

impl Proc {
    /// Starts a command (made by [`command`]) on these CPUs. Must be called from a thread that lives on: the kernel ends
    /// the child when the thread that started it ends.
    pub(crate) fn start(name: &str, cpus: &[usize], command: &mut Command) -> Result<Self> {
        let own = sched_getaffinity(None).context("asking for the own CPUs")?;
        pin(cpus)?;
        let child = command
            .spawn()
            .with_context(|| format!("{name}: cannot be started"));
        sched_setaffinity(None, &own).context("going back to the own CPUs")?;
        let child = child?;
        weigh_child(child.id());
        Ok(Self {
            name: name.to_owned(),
            child,
        })
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Stops it where it is until [`Proc::resume`].
    pub(crate) fn pause(&self) -> Result<()> {
        self.signal(Signal::STOP)
    }

    pub(crate) fn resume(&self) -> Result<()> {
        self.signal(Signal::CONT)
    }

    /// Ends it without a word, as a crash does.
    pub(crate) fn kill(&self) -> Result<()> {
        self.signal(Signal::KILL)
    }

    fn signal(&self, signal: Signal) -> Result<()> {
        kill_process(Pid::from_child(&self.child), signal)
            .with_context(|| format!("{}: signalling it", self.name))
    }

    /// Whether it has ended, and how.
    pub(crate) fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().ok().flatten()
    }

    /// Waits until it ended by itself, at most `patience`.
    pub(crate) fn wait(&mut self, patience: Duration) -> Option<ExitStatus> {
        let begin = Instant::now();
        loop {
            if let Some(status) = self.ended() {
                return Some(status);
            }
            if begin.elapsed() > patience {
                return None;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Asks it to end and waits a little; `drop` does the rest.
    pub(crate) fn terminate(&mut self) {
        let _ = self.resume();
        if self.ended().is_none() && self.signal(Signal::TERM).is_ok() {
            let _ = self.wait(Duration::from_secs(2));
        }
    }

    /// What each of its threads got so far.
    pub(crate) fn threads(&self) -> HashMap<u32, Thread> {
        let Ok(tasks) = fs::read_dir(format!("/proc/{}/task", self.pid())) else {
            return HashMap::new();
        };
        tasks
            .flatten()
            .filter_map(|task| {
                let id = task.file_name().to_str()?.parse().ok()?;
                Some((id, Thread::read(&task.path())?))
            })
            .collect()
    }
}

impl Drop for Proc {
    fn drop(&mut self) {
        if self.ended().is_none() {
            // KILL works on a stopped process too.
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// What a thread got from the scheduler.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Thread {
    /// Time on a CPU.
    pub(crate) cpu: Duration,
    /// How often it was taken off the CPU although it wanted to go on.
    pub(crate) preempted: u64,
}

impl Thread {
    fn read(task: &Path) -> Option<Self> {
        let schedstat = fs::read_to_string(task.join("schedstat")).ok()?;
        let status = fs::read_to_string(task.join("status")).ok()?;
        Self::parse(&schedstat, &status)
    }

    fn parse(schedstat: &str, status: &str) -> Option<Self> {
        let nanoseconds = schedstat.split_whitespace().next()?.parse().ok()?;
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix("nonvoluntary_ctxt_switches:"))?;
        Some(Self {
            cpu: Duration::from_nanos(nanoseconds),
            preempted: line.trim().parse().ok()?,
        })
    }
}

/// The thread that ran most between two looks: the pinned worker of a poll-mode switch or client.
pub(crate) fn busiest(before: &HashMap<u32, Thread>, after: &HashMap<u32, Thread>) -> Thread {
    let grown = after.iter().map(|(id, after)| {
        let before = before.get(id).copied().unwrap_or_default();
        Thread {
            cpu: after.cpu.saturating_sub(before.cpu),
            preempted: after.preempted.saturating_sub(before.preempted),
        }
    });
    grown.max_by_key(|thread| thread.cpu).unwrap_or_default()
}

/// Waits until all these paths exist, while `alive` says that it is worth waiting.
pub(crate) fn wait_for_paths(
    paths: &[PathBuf],
    patience: Duration,
    mut alive: impl FnMut() -> Result<()>,
) -> Result<()> {
    let begin = Instant::now();
    while let Some(missing) = paths.iter().find(|path| !path.exists()) {
        alive()?;
        if begin.elapsed() > patience {
            bail!("{}: did not appear within {patience:?}", missing.display());
        }
        crate::interrupt::sleep(Duration::from_millis(10))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const SCHEDSTAT: &str = "4021357043 18734212 1053\n";
    const STATUS: &str =
        "Name:\tdpdk-worker1\nvoluntary_ctxt_switches:\t12\nnonvoluntary_ctxt_switches:\t1041\n";

    #[test]
    fn a_threads_time_and_preemptions_are_read_from_proc() {
        let thread = Thread::parse(SCHEDSTAT, STATUS).unwrap();
        assert_eq!(
            thread,
            Thread {
                cpu: Duration::from_nanos(4_021_357_043),
                preempted: 1041
            }
        );
        assert_eq!(Thread::parse("", STATUS), None);
    }

    #[test]
    fn the_busiest_thread_is_the_one_that_ran_most_in_between_not_in_total() {
        let thread = |ms, preempted| Thread {
            cpu: Duration::from_millis(ms),
            preempted,
        };
        let before = HashMap::from([(1, thread(90_000, 500)), (2, thread(10, 3))]);
        let after = HashMap::from([
            (1, thread(90_020, 500)),
            (2, thread(2008, 9)),
            (3, thread(5, 0)),
        ]);
        assert_eq!(busiest(&before, &after), thread(1998, 6));
    }

    #[test]
    fn a_child_can_be_paused_and_ends_when_dropped() {
        let child = Proc::start("sleep", &[0], command("sleep").arg("100")).unwrap();
        let pid = child.pid();
        child.pause().unwrap();
        assert!(Path::new(&format!("/proc/{pid}")).exists());
        drop(child);
        assert!(!Path::new(&format!("/proc/{pid}")).exists());
    }
}
