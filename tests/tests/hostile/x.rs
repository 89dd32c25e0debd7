//! The attacker: its port, its dice, and what is asked of the switch after it did its worst.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use ringway::control::state::{PortState, PortStatus};
use ringway::guest::traffic::{Mac, station};
use ringway::guest::{Guest, Layout, Options, QueuePair};
use ringway::virtio::own_mem::OwnMem;
use testkit::topology::frame;

use super::api::{self, PATIENCE};
use super::case::SOAK;
use super::rig::{BESIDE, Friend, Rig, comes, friend_mac, lock, reach, send};
use super::talk::Talk;

/// An attacker with a port of its own, and its dice.
pub(super) struct X<'r> {
    pub(super) rig: &'r Rig,
    pub(super) port: String,
    pub(super) seed: u64,
    bridge: String,
    dice: Dice,
}

/// Numbers that a seed decides (SplitMix64).
pub(super) struct Dice(u64);

impl Dice {
    pub(super) fn new(seed: u64) -> Dice {
        Dice(seed)
    }

    pub(super) fn any(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    pub(super) fn below(&mut self, limit: u64) -> u64 {
        self.any() % limit
    }
}

/// An attacker that has attached.
pub(super) struct Wild {
    pub(super) guest: Guest,
    pub(super) queues: QueuePair,
}

impl<'r> X<'r> {
    pub(super) fn new(rig: &'r Rig, port: String, bridge: &str, seed: u64) -> X<'r> {
        X {
            rig,
            port,
            seed,
            bridge: bridge.to_owned(),
            dice: Dice::new(seed),
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

    /// The next of its dice.
    pub(super) fn any(&mut self) -> u64 {
        self.dice.any()
    }

    pub(super) fn below(&mut self, limit: u64) -> u64 {
        self.dice.below(limit)
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

    /// Runs `act`; after it this very frame must come to the friend, within the time an attacker's frame may take. In a soak others
    /// flood the friend's bridge at the same time: if its ring was full meanwhile, the frame may be among those that were dropped.
    pub(super) fn friend_gets(&self, bytes: &[u8], act: impl FnOnce() -> Result<()>) -> Result<()> {
        let dropped =
            || -> Result<u64> { Ok(api::port(&self.rig.api, "friend")?.counters.dropped_total()) };
        let mut friend = lock(&self.rig.friend);
        while friend.queues.rx.receive(|_| ()) > 0 {}
        let before = dropped()?;
        act()?;
        let (mut came, end) = (false, Instant::now() + PATIENCE);
        while !came && Instant::now() < end {
            came = comes(&mut friend.queues, bytes, Duration::from_millis(200));
            let crowded = !came && SOAK.with_borrow(Option::is_some) && dropped()? > before;
            if crowded {
                return Ok(());
            }
        }
        ensure!(
            came,
            "the friend does not get the frame; {}",
            self.rig.state()
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
        self.rig.innocents().wait_more(BESIDE)
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
