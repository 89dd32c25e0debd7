//! A case of the catalogue: an attack, once per seed, and what is asked afterwards.

use std::cell::RefCell;
use std::io::Write as _;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Instant;

use anyhow::{Context as _, Result};
use ringway::control::config::Config;
use testkit::process::target_dir;

use super::quiet;
use super::rig::{Rig, lock};
use super::usage::{Usage, wait_back_at};
use super::x::X;

/// Seeds per case unless `HOSTILE_SEEDS` says otherwise.
const SEEDS: u64 = 20;
/// One case at a time: each has a polling worker, and innocents under load.
static ALONE: Mutex<()> = Mutex::new(());

thread_local! {
    /// While set, every case that this thread runs is one visit to this rig, with this seed.
    pub(super) static SOAK: RefCell<Option<(Arc<Rig>, u64)>> = const { RefCell::new(None) };
}

/// Nobody else's cases run while this is held.
pub(super) fn alone() -> MutexGuard<'static, ()> {
    lock(&ALONE)
}

/// A case of the catalogue.
pub(super) struct Case {
    pub(super) number: &'static str,
    /// Attackers at the same time.
    pub(super) at_once: u64,
    seeds: u64,
    /// The attackers' bridge.
    pub(super) bridge: &'static str,
    pub(super) config: fn(&mut Config),
}

impl Case {
    pub(super) fn of(number: &'static str) -> Case {
        Case {
            number,
            at_once: 4,
            seeds: SEEDS,
            bridge: "wild",
            config: |_| (),
        }
    }

    /// So many attackers at the same time, each on a port of its own: 4 unless told otherwise.
    pub(super) fn at_once(mut self, attackers: u64) -> Case {
        self.at_once = attackers;
        self
    }

    /// Fewer seeds, for a case that takes long or has no chance in it.
    pub(super) fn seeds(mut self, seeds: u64) -> Case {
        self.seeds = seeds;
        self
    }

    /// The attackers are in the innocents' bridge. Else they are not: what others send to an attacker that was put out is
    /// flooded, in any quantity, and would fill the innocents' rings.
    pub(super) fn beside(mut self) -> Case {
        self.bridge = "default";
        self
    }

    /// A switch with another configuration.
    pub(super) fn config(mut self, change: fn(&mut Config)) -> Case {
        self.config = change;
        self
    }

    /// Lets the attack loose once per seed and asks afterwards what it cost.
    pub(super) fn run(self, attack: impl Fn(&mut X<'_>) -> Result<()> + Sync) -> Result<()> {
        if let Some((rig, seed)) = SOAK.with_borrow(Clone::clone) {
            let visit = rig.visit("wild", seed, &attack);
            return visit.with_context(|| format!("{}: seed {seed}", self.number));
        }
        let alone = lock(&ALONE);
        if std::env::var_os(quiet::LATENCY).is_some() {
            return quiet::compare(&self, attack).with_context(|| self.number.to_owned());
        }
        let began = Instant::now();
        let rig = Rig::start(&self).with_context(|| format!("{}: start", self.number))?;
        let before = Usage::of(rig.pid)?;
        let first = number("HOSTILE_FIRST_SEED").unwrap_or(1);
        let seeds = number("HOSTILE_SEEDS").unwrap_or(self.seeds);
        // What the allocator takes for so many attackers at once it may keep.
        rig.attack(&self, first, self.at_once.min(seeds), &attack)?;
        let settled = Usage::of(rig.pid)?;
        rig.attack(&self, first, seeds, &attack)?;
        let limit = Usage {
            rss: settled.rss.max(before.rss),
            maps: settled.maps.max(before.maps),
            ..before
        };
        let after = wait_back_at(rig.pid, &limit).with_context(|| self.number.to_owned())?;
        let result = rig.end().with_context(|| self.number.to_owned())?;
        let line = format!(
            "{}\t{seeds}\t{:.1}\t{}\t{:.0}\t{:.1}\t{:.1}\t{after}\n",
            self.number,
            began.elapsed().as_secs_f64(),
            result.frames,
            result.p99,
            result.longest,
            result.gap,
        );
        drop(alone);
        report("hostile.tsv", &line)
    }
}

/// A number from the environment.
pub(super) fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

/// case, seeds, seconds, innocents' frames, p99 and longest of their ways in microseconds and milliseconds without their own pauses,
/// their longest gap in milliseconds with them, what the switch holds
pub(super) fn report(file: &str, line: &str) -> Result<()> {
    let path = target_dir().join(file);
    let file = std::fs::File::options()
        .append(true)
        .create(true)
        .open(path);
    file?.write_all(line.as_bytes())?;
    Ok(())
}
