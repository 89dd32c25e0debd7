//! The rig: a switch with innocent pairs under load, and an attacker on a fresh port for every seed.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::ScopedJoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, ensure};
use ringway::control::config::{Config, Workers};
use ringway::control::state::{PortSpec, PortState, PortStatus, StatsReport};
use ringway::guest::traffic::Mac;
use ringway::guest::{Guest, Layout, Options, QueuePair};
use testkit::ringway::{Ringway, server_port};
use testkit::topology::{BROADCAST, frame, last_cpu};

use super::api::{self, PATIENCE};
use super::case::Case;
use super::innocents::{Innocent, Innocents, Seen, address};
use super::quiet;
use super::x::X;

/// Frames that the innocents must move between two attackers' visits.
pub(super) const BESIDE: u64 = 200;

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A running switch with its innocents.
pub(super) struct Rig {
    switch: Mutex<Ringway>,
    pub(super) api: PathBuf,
    pub(super) dir: PathBuf,
    pub(super) pid: u32,
    innocents: Innocents,
    pub(super) friend: Mutex<Friend>,
    visits: AtomicU64,
}

/// Somebody in the attackers' bridge who is honest.
pub(super) struct Friend {
    pub(super) guest: Guest,
    pub(super) queues: QueuePair,
}

/// The friend's address.
pub(super) fn friend_mac() -> Mac {
    address(9)
}

impl Rig {
    pub(super) fn start(case: &Case) -> Result<Rig> {
        let mut ports: Vec<PortSpec> = ["a", "b", "c", "d"].map(server_port).into();
        ports.push(PortSpec {
            bridge: case.bridge.to_owned(),
            ..server_port("friend")
        });
        let mut config = Config {
            workers: Workers::Cpus(vec![last_cpu()]),
            idle: quiet::idle(),
            ports,
            ..Config::default()
        };
        (case.config)(&mut config);
        let mut switch = Ringway::start_with(config)?;
        let (dir, api, pid) = (
            switch.dir().to_owned(),
            switch.api(),
            switch.process().pid(),
        );
        let innocent = |port: &str, layout| attach(&api, &dir, port, layout);
        let guests = [
            innocent("a", Layout::Split)?,
            innocent("b", Layout::Split)?,
            innocent("c", Layout::Packed)?,
            innocent("d", Layout::Packed)?,
        ];
        let Innocent { guest, mut queues } = innocent("friend", Layout::Split)?;
        send(&mut queues, &frame(BROADCAST, friend_mac(), b"a friend"))?;
        let innocents = Innocents::start(guests);
        innocents.wait_more(BESIDE)?;
        Ok(Rig {
            switch: Mutex::new(switch),
            api,
            dir,
            pid,
            innocents,
            friend: Mutex::new(Friend { guest, queues }),
            visits: AtomicU64::new(0),
        })
    }

    /// All seeds, as many at once as the case wants.
    pub(super) fn attack(
        &self,
        case: &Case,
        first: u64,
        seeds: u64,
        attack: &(impl Fn(&mut X<'_>) -> Result<()> + Sync),
    ) -> Result<()> {
        let next = AtomicU64::new(first);
        let visits = || -> Result<()> {
            loop {
                let seed = next.fetch_add(1, Ordering::Relaxed);
                if seed >= first + seeds {
                    return Ok(());
                }
                self.visit(case.bridge, seed, attack)
                    .with_context(|| format!("{}: seed {seed}", case.number))?;
            }
        };
        std::thread::scope(|scope| {
            let attackers: Vec<_> = (0..case.at_once).map(|_| scope.spawn(visits)).collect();
            let join = |attacker: ScopedJoinHandle<'_, Result<()>>| {
                let ended = attacker.join();
                ended.map_err(|_| anyhow!("an attacker panicked"))?
            };
            attackers.into_iter().try_for_each(join)
        })
    }

    /// One attacker, and an honest guest after it.
    pub(super) fn visit(
        &self,
        bridge: &str,
        seed: u64,
        attack: &impl Fn(&mut X<'_>) -> Result<()>,
    ) -> Result<()> {
        let port = format!("x{}", self.visits.fetch_add(1, Ordering::Relaxed));
        let mut x = X::new(self, port, bridge, seed);
        x.add_port("")?;
        attack(&mut x)?;
        self.serves_the_honest(&x)
            .with_context(|| format!("an honest guest after the attacker; {}", self.state()))?;
        api::del_port(&self.api, &x.port)?;
        self.innocents
            .wait_more(BESIDE)
            .with_context(|| self.state())
    }

    /// For a failure: what each port dropped, and what the workers are at.
    pub(super) fn state(&self) -> String {
        let Ok(before) = api::stats(&self.api) else {
            return "the API does not answer".to_owned();
        };
        std::thread::sleep(Duration::from_millis(100));
        let turns = |stats: &StatsReport| stats.workers.iter().map(|w| w.turns).sum::<u64>();
        let Ok(after) = api::stats(&self.api) else {
            return "the API does not answer any more".to_owned();
        };
        let dropped: Vec<String> = (after.ports.iter())
            .map(|(name, counters)| {
                format!(
                    "{name}: {} received {} sent {:?}",
                    counters.received, counters.sent, counters.dropped
                )
            })
            .collect();
        let (turns, total) = (turns(&after) - turns(&before), &after.total);
        format!("{turns} turns in 0.1 s; {total:?}; {}", dropped.join(", "))
    }

    /// An honest guest gets the port and can talk with the friend.
    fn serves_the_honest(&self, x: &X<'_>) -> Result<()> {
        let mut honest = loop_attach(&self.api, &x.socket(), &x.port, Layout::Split)?;
        let queues = &mut honest.queues;
        let hello = frame(friend_mac(), x.mac(), x.port.as_bytes());
        let mut friend = lock(&self.friend);
        reach(queues, &mut friend.queues, &hello).context("to the friend")?;
        let answer = frame(x.mac(), friend_mac(), x.port.as_bytes());
        reach(&mut friend.queues, queues, &answer).context("from the friend")
    }

    /// Frames of the innocents so far.
    pub(super) fn innocents(&self) -> &Innocents {
        &self.innocents
    }

    /// Attackers so far.
    pub(super) fn visits(&self) -> u64 {
        self.visits.load(Ordering::Relaxed)
    }

    /// The innocents lost nothing, the books balance, nobody panicked, and the switch leaves when told.
    pub(super) fn end(self) -> Result<Seen> {
        let seen = self.innocents.finish()?;
        self.friend
            .into_inner()
            .unwrap_or_else(PoisonError::into_inner)
            .guest
            .detach()?;
        api::balanced(&self.api)?;
        let mut switch = self
            .switch
            .into_inner()
            .unwrap_or_else(PoisonError::into_inner);
        ensure!(switch.process().alive(), "the switch has died");
        ensure!(switch.process().pid() == self.pid, "another process");
        let said = switch.process().output();
        ensure!(!said.contains("panicked"), "the switch said:\n{said}");
        // How quickly is asked elsewhere (`lifecycle.rs`, h88), alone.
        let (status, _) = switch.process().terminate(PATIENCE)?;
        ensure!(status.success(), "the switch left with {status}");
        Ok(seen)
    }
}

pub(super) fn attach(api: &Path, dir: &Path, port: &str, layout: Layout) -> Result<Innocent> {
    loop_attach(api, &dir.join(format!("{port}.sock")), port, layout)
}

/// Attaches an honest guest; tries again while the port is still busy with whoever was there.
fn loop_attach(api: &Path, socket: &Path, port: &str, layout: Layout) -> Result<Innocent> {
    let end = Instant::now() + PATIENCE;
    loop {
        let mut guest = Guest::new(Options {
            layout,
            patience: PATIENCE,
            // Room for what is flooded when an attacker that others send to is put out.
            ring_size: 2048,
            ..Options::new(socket)
        })?;
        match guest.attach() {
            Ok(mut pairs) => {
                let forwards = |status: &PortStatus| status.state == PortState::Forwarding;
                api::wait_port(api, port, "forwarding", forwards)?;
                let queues = pairs.remove(0);
                return Ok(Innocent { guest, queues });
            }
            Err(error) if Instant::now() > end => return Err(error.into()),
            Err(_) => std::thread::sleep(Duration::from_millis(3)),
        }
    }
}

/// Sends one frame.
pub(super) fn send(queues: &mut QueuePair, bytes: &[u8]) -> Result<()> {
    let end = Instant::now() + PATIENCE;
    while queues.tx.send(1, |slot| {
        slot.write(0, bytes);
        bytes.len()
    }) == 0
    {
        ensure!(Instant::now() < end, "no free buffer to send from");
        std::thread::yield_now();
    }
    Ok(())
}

/// Sends a frame until it has come: the receiver's ring may be full of what attackers flooded.
pub(super) fn reach(from: &mut QueuePair, to: &mut QueuePair, bytes: &[u8]) -> Result<()> {
    let end = Instant::now() + PATIENCE;
    while to.rx.receive(|_| ()) > 0 {}
    loop {
        send(from, bytes)?;
        if comes(to, bytes, Duration::from_millis(200)) {
            return Ok(());
        }
        ensure!(Instant::now() < end, "a frame does not come");
    }
}

/// Whether this very frame comes within the time.
pub(super) fn comes(queues: &mut QueuePair, bytes: &[u8], within: Duration) -> bool {
    let (end, mut found) = (Instant::now() + within, false);
    while !found && Instant::now() < end {
        queues
            .rx
            .receive(|frame| found |= frame.len() == bytes.len() && frame.matches(0, bytes));
        std::thread::yield_now();
    }
    found
}
