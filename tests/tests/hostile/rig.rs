//! The rig: a switch with innocent pairs under load, and an attacker on a fresh port for every seed.

use std::cell::RefCell;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::ScopedJoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, ensure};
use ringway::control::config::{Config, Workers};
use ringway::control::state::{Idle, PortSpec, PortState, PortStatus, StatsReport};
use ringway::guest::traffic::{Mac, station};
use ringway::guest::{Guest, Layout, Options, QueuePair};
use ringway::virtio::own_mem::OwnMem;
use testkit::process::target_dir;
use testkit::ringway::{Ringway, server_port};
use testkit::topology::{BROADCAST, frame, last_cpu};

use super::api::{self, PATIENCE};
use super::innocents::{Innocent, Innocents, Seen, address};
use super::talk::Talk;
use super::usage::{Usage, wait_back_at};

/// Seeds per case unless `HOSTILE_SEEDS` says otherwise.
const SEEDS: u64 = 20;
/// Frames that the innocents must move between two attackers' visits.
const BESIDE: u64 = 200;

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

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A case of the catalogue.
pub(super) struct Case {
    number: &'static str,
    /// Attackers at the same time.
    at_once: u64,
    seeds: u64,
    /// The attackers' bridge.
    bridge: &'static str,
    config: fn(&mut Config),
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
            "{}\t{seeds}\t{:.1}\t{}\t{:.0}\t{:.1}\t{after}\n",
            self.number,
            began.elapsed().as_secs_f64(),
            result.frames,
            result.p99,
            result.gap,
        );
        drop(alone);
        report(&line)
    }
}

/// A number from the environment.
fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

/// case, seeds, seconds, innocents' frames, their p99 in microseconds, their longest gap in milliseconds, what the switch holds
fn report(line: &str) -> Result<()> {
    let path = target_dir().join("hostile.tsv");
    let file = std::fs::File::options()
        .append(true)
        .create(true)
        .open(path);
    file?.write_all(line.as_bytes())?;
    Ok(())
}

/// A running switch with its innocents.
pub(super) struct Rig {
    switch: Mutex<Ringway>,
    pub(super) api: PathBuf,
    pub(super) dir: PathBuf,
    pub(super) pid: u32,
    innocents: Innocents,
    friend: Mutex<Friend>,
    visits: AtomicU64,
}

/// Somebody in the attackers' bridge who is honest.
struct Friend {
    guest: Guest,
    queues: QueuePair,
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
            idle: Idle::Adaptive,
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
    fn attack(
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
    fn visit(
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
    fn state(&self) -> String {
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

fn attach(api: &Path, dir: &Path, port: &str, layout: Layout) -> Result<Innocent> {
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
fn comes(queues: &mut QueuePair, bytes: &[u8], within: Duration) -> bool {
    let (end, mut found) = (Instant::now() + within, false);
    while !found && Instant::now() < end {
        queues
            .rx
            .receive(|frame| found |= frame.len() == bytes.len() && frame.matches(0, bytes));
        std::thread::yield_now();
    }
    found
}

/// An attacker with a port of its own, and its dice.
pub(super) struct X<'r> {
    pub(super) rig: &'r Rig,
    pub(super) port: String,
    pub(super) seed: u64,
    bridge: String,
    state: u64,
}

/// An attacker that has attached.
pub(super) struct Wild {
    pub(super) guest: Guest,
    pub(super) queues: QueuePair,
}

impl<'r> X<'r> {
    fn new(rig: &'r Rig, port: String, bridge: &str, seed: u64) -> X<'r> {
        X {
            rig,
            port,
            seed,
            bridge: bridge.to_owned(),
            state: seed,
        }
    }

    /// Its port, with further keys (`,key=value`).
    pub(super) fn add_port(&self, more: &str) -> Result<()> {
        let socket = self.socket().display().to_string();
        let (port, bridge) = (&self.port, &self.bridge);
        let spec = format!("vhost-user:{port},socket={socket},bridge={bridge}{more}");
        api::add_port(&self.rig.api, &spec)
    }

    /// The port again, with other keys.
    pub(super) fn port_again(&self, more: &str) -> Result<()> {
        api::del_port(&self.rig.api, &self.port)?;
        self.add_port(more)
    }

    pub(super) fn socket(&self) -> PathBuf {
        self.rig.dir.join(format!("{}.sock", self.port))
    }

    /// The address of whoever is at the port.
    pub(super) fn mac(&self) -> Mac {
        let number = self.port[1..].parse().unwrap_or(0u32);
        station(0x20_0000 + number)
    }

    /// The next of its dice (SplitMix64).
    pub(super) fn any(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.state;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    pub(super) fn below(&mut self, limit: u64) -> u64 {
        self.any() % limit
    }

    /// One of several.
    pub(super) fn one_of<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len() as u64) as usize]
    }

    /// Split and packed, mergeable or not, in order or not, by seed.
    pub(super) fn options(&self) -> Options {
        Options {
            layout: if self.seed & 1 == 0 {
                Layout::Split
            } else {
                Layout::Packed
            },
            mergeable: self.seed & 2 == 0,
            in_order: self.seed & 4 == 0,
            ..self.plain()
        }
    }

    /// A small guest with split rings.
    pub(super) fn plain(&self) -> Options {
        Options {
            ring_size: 256,
            patience: PATIENCE,
            ..Options::new(self.socket())
        }
    }

    /// Attaches as an honest guest would.
    pub(super) fn attach(&self, options: Options) -> Result<Wild> {
        let mut guest = Guest::new(options)?;
        let mut pairs = guest.attach().context("the attacker, still honest")?;
        api::wait_port(&self.rig.api, &self.port, "forwarding", |port| {
            port.state == PortState::Forwarding
        })?;
        let queues = pairs.remove(0);
        Ok(Wild { guest, queues })
    }

    /// Connects without a word.
    pub(super) fn connect(&self) -> Result<Talk> {
        Talk::to(&self.socket())
    }

    /// The port has put the attacker out, and the reason has one of these words in it.
    pub(super) fn is_put_out(&self, words: &[&str]) -> Result<()> {
        let why = api::wait_put_out(&self.rig.api, &self.port)?;
        ensure!(
            words.iter().any(|word| why.contains(word)),
            "the reason is {why:?}, one of {words:?} was expected in it"
        );
        Ok(())
    }

    /// The port forwards still, or has put the attacker out for one of these reasons: which one is a matter of who was faster.
    pub(super) fn is_kept_or_put_out(&self, words: &[&str]) -> Result<()> {
        let settled = |port: &PortStatus| {
            port.state == PortState::Forwarding
                || port.state != PortState::Connected && port.reason.is_some()
        };
        let port = api::wait_port(&self.rig.api, &self.port, "kept or put out", settled)?;
        let why = port.reason.unwrap_or_default();
        ensure!(
            port.state == PortState::Forwarding || words.iter().any(|word| why.contains(word)),
            "the reason is {why:?}, one of {words:?} was expected in it"
        );
        Ok(())
    }

    /// The port forwards still.
    pub(super) fn is_kept(&self) -> Result<()> {
        let port = api::port(&self.rig.api, &self.port)?;
        ensure!(
            port.state == PortState::Forwarding,
            "the port is {}, {:?}",
            port.state,
            port.reason
        );
        Ok(())
    }

    /// Frames of the port dropped for this reason so far.
    pub(super) fn dropped(&self, reason: &str) -> Result<u64> {
        let port = api::port(&self.rig.api, &self.port)?;
        Ok(port.counters.dropped.get(reason).copied().unwrap_or(0))
    }

    /// Waits until so many frames of the port were dropped for this reason.
    pub(super) fn wait_dropped(&self, reason: &str, frames: u64) -> Result<()> {
        api::wait_port(&self.rig.api, &self.port, reason, |port| {
            port.counters.dropped.get(reason).copied().unwrap_or(0) >= frames
        })?;
        Ok(())
    }

    /// The friend sends frames to the attacker.
    pub(super) fn gets_frames(&self, frames: usize, len: usize) -> Result<()> {
        let mut bytes = frame(self.mac(), friend_mac(), b"for you");
        bytes.resize(len.max(60), 0x5a);
        let mut friend = lock(&self.rig.friend);
        for _ in 0..frames {
            send(&mut friend.queues, &bytes)?;
        }
        Ok(())
    }

    /// Runs `act`; after it this very frame must come to the friend, within the time an attacker's frame may take.
    pub(super) fn friend_gets(&self, bytes: &[u8], act: impl FnOnce() -> Result<()>) -> Result<()> {
        let mut friend = lock(&self.rig.friend);
        while friend.queues.rx.receive(|_| ()) > 0 {}
        act()?;
        ensure!(
            comes(&mut friend.queues, bytes, PATIENCE),
            "the friend does not get the frame"
        );
        Ok(())
    }

    /// Runs `act` with the friend's queues.
    pub(super) fn with_friend<T>(
        &self,
        act: impl FnOnce(&Guest, &mut QueuePair) -> Result<T>,
    ) -> Result<T> {
        let mut friend = lock(&self.rig.friend);
        let Friend { guest, queues } = &mut *friend;
        while queues.rx.receive(|_| ()) > 0 {}
        act(guest, queues)
    }

    /// The innocents have moved many frames more.
    pub(super) fn innocents_go_on(&self) -> Result<()> {
        self.rig.innocents.wait_more(BESIDE)
    }
}

impl Wild {
    /// Says who it is, so that the friend's frames find it.
    pub(super) fn announce(&mut self, x: &X<'_>) -> Result<()> {
        let hello = frame(friend_mac(), x.mac(), b"an attacker");
        x.with_friend(|_, friend| reach(&mut self.queues, friend, &hello))
    }

    /// Speaks over its connection.
    pub(super) fn talk(&self) -> Result<Talk> {
        Talk::over(self.guest.link().context("attached")?.stream())
    }

    /// Its memory.
    pub(super) fn memory(&self) -> Result<Arc<OwnMem>> {
        Ok(self.guest.memory().context("attached")?.clone())
    }
}
