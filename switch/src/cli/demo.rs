//! `ringway demo`: the whole switch in one process, and containers that need none of its host's preparation.
//!
//! Nothing in it is simulated but the containers' walls: their rings lie in memfds of their own, they speak vhost-user over real
//! sockets, and the switch treats them as it treats any stranger.

mod containers;
mod view;

use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use clap::Args;
use crossbeam::channel::{Receiver, RecvTimeoutError, unbounded};
use signal_hook::consts::{SIGINT, SIGTERM};

use super::table::Output;
use crate::control::config::{Config, Workers};
use crate::control::cpu::HostCpus;
use crate::control::state::{Idle, PortSpec, StatsReport};
use crate::control::switch::Switch;
use containers::{Containers, Sample, Total};
use view::{Books, Live, Second, Summary};

/// What a line covers: four reports of the containers.
const LINE: Duration = Duration::from_millis(990);

/// What to show.
#[derive(Debug, Args)]
#[command(after_help = "\
Ctrl-C ends it early, with the summary. The exit code is 1 if a frame was lost that the switch did not count, or came changed.

Examples:
  ringway demo
  ringway demo --ports 8 --frame-size 1518
  ringway demo --packed --seconds 1 --json")]
pub(super) struct DemoArgs {
    /// How long frames are exchanged.
    #[arg(long, default_value_t = 5.0, value_name = "N", value_parser = seconds)]
    seconds: f64,
    /// Containers.
    #[arg(long, default_value_t = 2, value_name = "N", value_parser = clap::value_parser!(u16).range(2..=64))]
    ports: u16,
    /// Bytes per frame, without FCS.
    #[arg(long, default_value_t = 64, value_name = "N", value_parser = clap::value_parser!(u32).range(64..=65_535))]
    frame_size: u32,
    /// Packed rings instead of split ones.
    #[arg(long)]
    packed: bool,
}

fn seconds(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(seconds) if (0.5..=86_400.0).contains(&seconds) => Ok(seconds),
        _ => Err("write a number of seconds from 0.5 to 86400".to_owned()),
    }
}

/// What the containers are doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Stage {
    /// As many frames as go through.
    Load,
    /// One frame at a time, each way.
    Quiet,
    /// Nothing any more.
    Over,
}

/// The stage, set by one thread and obeyed by another.
struct Baton(AtomicU8);

impl Baton {
    fn stage(&self) -> Stage {
        match self.0.load(Ordering::Relaxed) {
            0 => Stage::Load,
            1 => Stage::Quiet,
            _ => Stage::Over,
        }
    }

    fn set(&self, stage: Stage) {
        self.0.store(stage as u8, Ordering::Relaxed);
    }
}

/// Who runs where.
#[derive(Clone, Copy, Debug)]
struct Places {
    switch: usize,
    containers: Option<usize>,
}

impl Places {
    fn choose(host: &HostCpus) -> Places {
        let two = host.choose(2);
        Places {
            switch: two.first().copied().unwrap_or(0),
            containers: two.get(1).copied(),
        }
    }
}

/// How much of the demo's CPUs the demo had: its threads poll, so on a quiet machine that is all of them.
struct CpuShare {
    cpus: f64,
    began: (Instant, f64),
}

impl CpuShare {
    fn begin(places: Places) -> CpuShare {
        CpuShare {
            cpus: if places.containers.is_some() {
                2.0
            } else {
                1.0
            },
            began: (Instant::now(), cpu_seconds()),
        }
    }

    fn percent(&self) -> f64 {
        let wall = self.began.0.elapsed().as_secs_f64() * self.cpus;
        (100.0 * (cpu_seconds() - self.began.1) / wall).min(100.0)
    }
}

/// CPU time of this process.
fn cpu_seconds() -> f64 {
    let used = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    used.tv_sec as f64 + used.tv_nsec as f64 / 1e9
}

/// A directory for the sockets that nobody else may enter, gone when the demo is.
struct PrivateDir(PathBuf);

impl PrivateDir {
    fn new() -> anyhow::Result<PrivateDir> {
        let path = std::env::temp_dir().join(format!("ringway-demo-{}", std::process::id()));
        std::fs::DirBuilder::new()
            .mode(0o700)
            .create(&path)
            .with_context(|| format!("{}: no place for the sockets: set TMPDIR", path.display()))?;
        Ok(PrivateDir(path))
    }
}

impl Drop for PrivateDir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Runs the demo; the exit code says whether the books balance.
pub(super) fn run(args: &DemoArgs, output: Output) -> anyhow::Result<ExitCode> {
    let interrupted = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        // The first one ends the demo with its summary, a second one at once.
        signal_hook::flag::register_conditional_shutdown(signal, 1, interrupted.clone())?;
        signal_hook::flag::register(signal, interrupted.clone())?;
    }
    let places = Places::choose(&HostCpus::read(Path::new("/")));
    let dir = PrivateDir::new()?;
    let (switch, sockets) = start(args, places, &dir.0)?;
    let outcome = show(args, output, places, (&switch, &sockets), &interrupted);
    switch.stop();
    let summary = outcome?;
    output.show(&summary, Summary::text)?;
    Ok(if summary.fine() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn start(
    args: &DemoArgs,
    places: Places,
    dir: &Path,
) -> anyhow::Result<(Arc<Switch>, Vec<PathBuf>)> {
    let sockets: Vec<PathBuf> = (1..=args.ports)
        .map(|number| dir.join(format!("c{number}.sock")))
        .collect();
    let ports = (1..).zip(&sockets);
    let config = Config {
        workers: Workers::Cpus(vec![places.switch]),
        idle: if places.containers.is_some() {
            Idle::Poll
        } else {
            Idle::Adaptive
        },
        ports: ports
            .map(|(number, socket): (u32, _)| PortSpec::vhost_user(format!("c{number}"), socket))
            .collect(),
        ..Config::default()
    };
    Ok((Switch::start(config, &[places.switch])?, sockets))
}

/// The demo between start and stop of the switch.
fn show(
    args: &DemoArgs,
    output: Output,
    places: Places,
    (switch, sockets): (&Arc<Switch>, &[PathBuf]),
    interrupted: &AtomicBool,
) -> anyhow::Result<Summary> {
    let mut live = Live::new(args, places, output);
    let baton = Arc::new(Baton(AtomicU8::new(Stage::Load as u8)));
    let (report, samples) = unbounded();
    let (frame_size, packed) = (args.frame_size as usize, args.packed);
    let (theirs, sockets) = (baton.clone(), sockets.to_vec());
    let thread = std::thread::Builder::new()
        .name("containers".to_owned())
        .spawn(move || {
            let mut containers = Containers::attach(&sockets, frame_size, packed)?;
            containers.settle(places.containers)?;
            containers.announce()?;
            let total = containers.run(|| theirs.stage(), &report);
            anyhow::Ok((containers, total))
        })?;
    let share = CpuShare::begin(places);
    let mut seen = watch(args, switch, &baton, &samples, (&mut live, interrupted));
    seen.cpu_percent = share.percent();
    let joined = thread
        .join()
        .map_err(|_| anyhow::anyhow!("the containers' thread panicked"))?;
    let (containers, total) = joined?;
    let stats = switch.stats();
    containers.detach();
    live.end();
    Ok(summary(args, places, &stats, total, seen))
}

/// What was seen while frames flowed.
#[derive(Default)]
struct Seen {
    load: Vec<Second>,
    quiet: Vec<Second>,
    last: Vec<Sample>,
    cut_short: bool,
    cpu_percent: f64,
}

impl Seen {
    fn lasted(&self) -> Duration {
        self.last.iter().map(|sample| sample.time).sum()
    }

    fn end_line(&mut self, stage: Stage, second: Second) {
        self.last.clear();
        match stage {
            Stage::Load => self.load.push(second),
            Stage::Quiet | Stage::Over => self.quiet.push(second),
        }
    }
}

fn watch(
    args: &DemoArgs,
    switch: &Switch,
    baton: &Baton,
    samples: &Receiver<Sample>,
    (live, interrupted): (&mut Live, &AtomicBool),
) -> Seen {
    let (mut seen, began) = (Seen::default(), Instant::now());
    // The last tenth, at most a second, shows how long a frame takes that need not queue.
    let quiet = (args.seconds / 10.0).min(1.0);
    let load_end = Duration::from_secs_f64(args.seconds - quiet);
    let mut end = Duration::from_secs_f64(args.seconds);
    let mut before = switch.stats();
    loop {
        let elapsed = began.elapsed();
        if interrupted.load(Ordering::Relaxed) && baton.stage() != Stage::Over {
            seen.cut_short = true;
            baton.set(Stage::Over);
        } else if elapsed >= end {
            baton.set(Stage::Over);
        } else if elapsed >= load_end && baton.stage() == Stage::Load {
            baton.set(Stage::Quiet);
            end = elapsed + Duration::from_secs_f64(quiet); // all of it, even if a busy machine came late to it
        }
        match samples.recv_timeout(Duration::from_millis(20)) {
            Ok(sample) => {
                live.tick(elapsed, &sample);
                let (stage, now) = (sample.stage, baton.stage());
                seen.last.push(sample);
                if seen.lasted() >= LINE || stage != now {
                    let now = switch.stats();
                    let second = Second::new(&seen.last, &before, &now);
                    live.second(elapsed, stage, &second);
                    before = now;
                    seen.end_line(stage, second);
                }
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return seen,
        }
    }
}

fn summary(
    args: &DemoArgs,
    places: Places,
    stats: &StatsReport,
    total: Total,
    seen: Seen,
) -> Summary {
    let dropped: u64 = stats.total.dropped.values().sum();
    let tally = total.tally;
    Summary {
        containers: args.ports,
        frame_size: args.frame_size,
        rings: if args.packed { "packed" } else { "split" },
        switch_cpu: places.switch,
        containers_cpu: places.containers.unwrap_or(places.switch),
        interrupted: seen.cut_short,
        cpu_percent: seen.cpu_percent,
        load: Second::whole(&seen.load),
        one_at_a_time: Second::whole(&seen.quiet),
        sent: total.sent,
        received: tally.received,
        verified: tally.verified,
        corrupted: tally.corrupted,
        duplicated: tally.duplicated,
        reordered: tally.reordered,
        foreign: tally.foreign,
        lost: total
            .sent
            .saturating_sub(tally.received.saturating_sub(tally.duplicated)),
        books: Books {
            received: stats.total.received,
            replicated: stats.total.replicated,
            sent: stats.total.sent,
            dropped,
            reasons: stats.total.dropped.clone(),
            // Every announcement went to all but its sender.
            containers_sent: total.sent + total.announced,
            containers_received: tally.received
                + tally.corrupted
                + tally.foreign
                + total.announcements,
        },
    }
}
