//! A switch with the generator's ports attached: trials, and what is saved of them.

use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use indicatif::ProgressBar;
use tempfile::TempDir;

use super::fleet::Fleet;
use super::frames::Frames;
use super::frontends::Frontends;
use super::outcome::Outcome;
use super::target::{Started, Target};
use super::trial::Trial;
use crate::client::Cpus;
use crate::host::Host;
use crate::peers::{Setup, Work};
use crate::process::{Priority, pin};
use crate::results::{self, Distribution, FORMAT, Load, Saved, Version};
use crate::sentinel::{Placement, look};

/// From stopping the switch to the sentinel, and how long that plays.
const SETTLE: Duration = Duration::from_millis(20);
pub(crate) const SENTINEL: Duration = Duration::from_millis(15);

/// A switch with the generator's ports attached, wired and announced.
pub(crate) struct Session {
    // Dropped before the switch: the farewell needs one that runs.
    pub(crate) fleet: Fleet,
    pub(crate) started: Option<Started>,
    pub(crate) saved: Saved,
    /// Name of the switch.
    pub(crate) peer: String,
    pub(crate) ports: usize,
    /// Where the two CPUs were, before and after the last trial.
    pub(crate) placement: Option<Placement>,
    bar: ProgressBar,
    #[allow(dead_code, reason = "holds until the end")]
    priority: Option<Priority>,
    /// Where the containers listen, for a switch of ours to connect.
    pub(crate) listening: Option<Listening>,
}

impl Session {
    /// Starts the switch if one is named, attaches a port to each socket, wires and announces.
    pub(crate) fn open(target: &Target, frontends: &Frontends, frames: &Frames) -> Result<Self> {
        let mut session = Self::attached(target, frontends, frames, None)?;
        let wires = frames.wires(session.ports)?;
        session
            .fleet
            .wire(&wires, frames.stations, frames.broadcast)?;
        session.fleet.announce(frames.stations)?;
        Ok(session)
    }

    /// The same without streams, on a switch that has more ports than the generator takes: `take` of them.
    pub(crate) fn attached(
        target: &Target,
        frontends: &Frontends,
        frames: &Frames,
        take: Option<usize>,
    ) -> Result<Self> {
        let cpus = target.cpus()?;
        let priority = target.name().map(|_| Priority::raise(target.nice));
        let mut frontends = frontends.clone();
        if frontends.cpus.is_empty() && cpus.client != cpus.switch {
            frontends.cpus = vec![cpus.client];
        }
        let bar = super::bar();
        if let Some(name) = target.name() {
            bar.set_message(format!("starting {name} with {} ports", target.ports));
        }
        let setup = Setup {
            ports: target.ports as usize,
            jumbo: frames.size.longest() > 1518,
            stations: frames.stations > 8000,
            queues: frontends.queues,
        };
        let listening = listening(target, &frontends)?;
        let containers = listening.as_ref().map_or(&[][..], |it| &it.sockets);
        let mut started = target
            .name()
            .map(|name| target.start(name, setup, containers))
            .transpose()?;
        let sockets = match &started {
            Some(started) => started.switch.sockets(),
            None => &target.sockets,
        };
        let take = take.unwrap_or(sockets.len()).min(sockets.len());
        pin(&[cpus.control]).context("the coordinator's CPU")?;
        let fleet = super::attach(&frontends, &sockets[..take], frames)?;
        if let Some(started) = &mut started {
            started.switch.settle(take)?;
        }
        let nice = priority.as_ref().map_or(0, Priority::nice);
        let mut saved = saved(fleet.tsc_hz, cpus, nice);
        saved.caveats.clone_from(&fleet.caveats);
        let peer = target.name().unwrap_or("switch").to_owned();
        if let Some(started) = &started {
            saved.versions.push(Version {
                name: peer.clone(),
                version: started.switch.version().to_owned(),
            });
        }
        Ok(Self {
            ports: take,
            fleet,
            started,
            saved,
            peer,
            placement: None,
            bar,
            priority,
            listening,
        })
    }

    /// Runs a trial with a progress bar, and looks how far apart the CPUs are before and after it, if the switch is ours to stop.
    pub(crate) fn trial(&mut self, trial: &Trial) -> Result<Outcome> {
        let before = self.look();
        let bar = self.bar.clone();
        let what = format!(
            "{}, {} ports, {}",
            self.peer,
            self.ports,
            trial.describe(self.fleet.tsc_hz)
        );
        let outcome = self.fleet.run(trial, &mut |share, mpps| {
            bar.set_position((share * 1000.0) as u64);
            bar.set_message(format!("{what}: {mpps:.2} Mpps"));
        });
        if let Ok(outcome) = &outcome
            && let Some(why) = &outcome.partial
        {
            self.saved
                .caveats
                .push(format!("{what}: the last figure is partial: {why}"));
            self.saved.complete = false;
        }
        let after = self.look();
        self.placement = match (before, after) {
            (Some(before), Some(after)) => Some(Placement::between(before, after)),
            _ => None,
        };
        outcome
    }

    /// The sentinel's round trip in nanoseconds.
    pub(crate) fn look(&self) -> Option<f64> {
        let started = self.started.as_ref()?;
        let pair = started.cpus.pair();
        if pair[0] == pair[1] || started.switch.proc().pause().is_err() {
            return None;
        }
        std::thread::sleep(SETTLE);
        let reading = look(pair, SENTINEL);
        let resumed = started.switch.proc().resume();
        // What came to rest gets going again.
        std::thread::sleep(SETTLE / 4);
        resumed
            .and(reading)
            .ok()
            .map(|reading| reading.round_trip_ns)
    }

    /// A run of the generator, to be kept: `work` at this pace.
    pub(crate) fn load(
        &self,
        work: results::Work,
        pace: String,
        outcome: &Outcome,
        latencies: Vec<Distribution>,
    ) -> Load {
        Load {
            peer: self.peer.clone(),
            work,
            pace,
            count: outcome.count.clone(),
            steps: outcome.steps.clone(),
            generator_cycles: outcome.cycles,
            generator_busy: outcome.busy,
            gaps_ns: outcome.gaps_ns.clone(),
            placement: self.placement,
            partial: outcome.partial.clone(),
            latencies,
        }
    }

    /// What the switch has done so far, if it tells.
    pub(crate) fn work(&mut self) -> Option<Work> {
        self.started.as_mut()?.switch.work().ok()?
    }

    /// The switch's cycles per frame since then.
    pub(crate) fn cycles_since(&mut self, before: Option<Work>) -> Option<f64> {
        let (before, after) = (before?, self.work()?);
        let frames = after
            .frames
            .checked_sub(before.frames)
            .filter(|&frames| frames > 0)?;
        Some((after.busy - before.busy) / frames as f64)
    }

    /// Shows how far something is that is no trial.
    pub(crate) fn progress(&self, share: f64, what: &str) {
        self.bar.set_position((share * 1000.0) as u64);
        self.bar.set_message(format!("{}: {what}", self.peer));
    }

    /// Says something above the bar.
    pub(crate) fn say(&self, line: &str) {
        self.bar.suspend(|| eprintln!("{line}"));
    }

    /// Takes leave of the switch.
    pub(crate) fn close(mut self, complete: bool) -> Saved {
        self.bar.finish_and_clear();
        self.saved.complete &= complete;
        self.fleet.detach();
        self.saved
    }
}

/// Sockets of containers, in a directory that lives as long as they do.
pub(crate) struct Listening {
    pub(crate) sockets: Vec<PathBuf>,
    #[allow(dead_code, reason = "removed with the session")]
    directory: TempDir,
}

/// Places for the containers' sockets, if they listen and the switch is ours.
fn listening(target: &Target, frontends: &Frontends) -> Result<Option<Listening>> {
    if target.switch.is_empty() || !frontends.listen {
        return Ok(None);
    }
    let directory = tempfile::Builder::new()
        .prefix("rwc")
        .tempdir()
        .context("a directory for the containers' sockets")?;
    let sockets = (0..target.ports).map(|port| directory.path().join(port.to_string()));
    Ok(Some(Listening {
        sockets: sockets.collect(),
        directory,
    }))
}

/// An empty run on this machine.
pub(crate) fn saved(tsc_hz: f64, cpus: Cpus, nice: i32) -> Saved {
    Saved {
        format: FORMAT,
        version: env!("CARGO_PKG_VERSION").to_owned(),
        command: std::env::args().collect(),
        started: SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default()
            .as_secs(),
        host: Host::look(tsc_hz),
        cpus: [cpus.switch, cpus.client, cpus.control],
        nice,
        complete: true,
        versions: vec![Version {
            name: "client".to_owned(),
            version: format!("ringway-bench {}", env!("CARGO_PKG_VERSION")),
        }],
        caveats: Vec::new(),
        measurements: Vec::new(),
    }
}
