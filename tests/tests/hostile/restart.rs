//! H89: the switch is killed, and attackers corrupt their rings before the next one is there.
//!
//! Guests that listen outlive the switch. The new one finds their rings as they are and judges them afresh; honest ones go on where
//! they were, but for the frames that were in flight: those may come twice.

use std::path::Path;
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use ringway::control::config::{Config, Workers};
use ringway::control::state::{Idle, PortSpec, PortState, PortStatus};
use ringway::guest::traffic::{Mac, station};
use ringway::guest::{Guest, Options, QueuePair};
use testkit::ringway::{Ringway, client_port};
use testkit::topology::{BROADCAST, exchange, frame, last_cpu};

use super::api::{self, PATIENCE};
use super::case::{alone, number};
use super::rig::{reach, send};
use super::rings::{LIES, reshape};
use super::x::Dice;

/// Attackers at a time: one for each thing that can be done to a ring.
const ATTACKERS: usize = 8;
/// Frames of the innocents between two kills, each way.
const FRAMES: u64 = 2000;
/// Frames whose buffers the switch may hold back in a ring of 512 (`Ring::complete_lazily`).
const HELD: usize = 2 * 32 - 1;

/// A guest that listens.
struct Listener {
    port: String,
    mac: Mac,
    guest: Guest,
    queues: QueuePair,
}

impl Listener {
    fn attach(dir: &Path, port: &str, number: u32) -> Result<Listener> {
        Listener::with_rings(256, dir, port, number)
    }

    fn with_rings(ring_size: u16, dir: &Path, port: &str, number: u32) -> Result<Listener> {
        let mut guest = Guest::new(Options {
            patience: PATIENCE,
            wait: PATIENCE,
            ring_size,
            in_order: false,
            ..Options::new(dir.join(format!("{port}.sock"))).listen()
        })?;
        Ok(Listener {
            port: port.to_owned(),
            mac: station(number),
            queues: guest.attach()?.remove(0),
            guest,
        })
    }

    /// Attaches with fresh rings; what the switch has in the backlog of its socket may be a connection that is over.
    fn attach_again(&mut self) -> Result<()> {
        let end = Instant::now() + PATIENCE;
        loop {
            match self.guest.attach() {
                Ok(mut queues) => {
                    self.queues = queues.remove(0);
                    return Ok(());
                }
                Err(error) => ensure!(Instant::now() < end, "{}: {error}", self.port),
            }
        }
    }
}

/// What an attacker did, and what the new switch has to make of it.
enum Judgement {
    /// Put out, with one of these words.
    Out(&'static [&'static str]),
    /// Kept, a frame of it dropped for this reason.
    Drops(&'static str),
    /// Kept: what it shows is a ring like others.
    Kept,
    /// One or the other.
    Either,
}

/// Does one of eight things to rings that nobody looks at.
fn corrupt(x: &mut Listener, dice: &mut Dice) -> Result<Judgement> {
    let far = 257 + dice.below(60_000) as u16;
    let at = x.guest.memory().context("attached")?.gpa();
    let (rx, tx) = (x.queues.rx.raw(), x.queues.tx.raw());
    let (avail, slot) = (tx.avail_idx(), tx.avail_idx() % 256);
    let one_more = |desc| {
        tx.set_desc(slot, desc);
        tx.set_avail(slot, slot);
        tx.set_avail_idx(avail.wrapping_add(1));
    };
    Ok(match dice.below(ATTACKERS as u64) {
        0 => {
            tx.set_avail_idx(avail.wrapping_add(far));
            Judgement::Out(&["available index"])
        }
        1 => {
            rx.set_avail_idx(rx.avail_idx().wrapping_add(far));
            Judgement::Out(&["available index"])
        }
        2 => {
            tx.set_used_idx(avail.wrapping_add(far));
            Judgement::Out(&["available index"])
        }
        3 => {
            one_more((at, 72, 0, 0));
            tx.set_avail(slot, far);
            Judgement::Out(&["descriptor"])
        }
        4 => {
            reshape(&x.queues.rx, 2048, false, false);
            Judgement::Out(&["direction"])
        }
        5 => {
            one_more((8, 72, 0, 0));
            Judgement::Drops("bad_address")
        }
        6 => {
            tx.set_avail_idx(tx.used_idx());
            Judgement::Kept
        }
        _ => {
            for raw in [&rx, &tx] {
                for slot in 0..256 {
                    let (any, more) = (dice.any(), dice.any());
                    raw.set_desc(
                        slot,
                        (any, more as u32, (more >> 32) as u16, (more >> 48) as u16),
                    );
                    raw.set_avail(slot, dice.any() as u16);
                }
                raw.set_avail_idx(dice.any() as u16);
                raw.set_used_idx(dice.any() as u16);
            }
            Judgement::Either
        }
    })
}

/// Waits until the switch has judged rightly. The port's state does not tell: the switch connects to a socket again at once.
fn judged(api: &Path, x: &Listener, right: &Judgement) -> Result<()> {
    let out = |port: &PortStatus| port.put_out.guests > 0;
    let forwards = |port: &PortStatus| port.state == PortState::Forwarding;
    let port = match right {
        Judgement::Out(_) => api::wait_port(api, &x.port, "put out", out)?,
        Judgement::Kept => api::wait_port(api, &x.port, "forwarding", forwards)?,
        Judgement::Either => {
            api::wait_port(api, &x.port, "judged", |port| out(port) || forwards(port))?
        }
        Judgement::Drops(reason) => api::wait_port(api, &x.port, reason, |port| {
            port.counters.dropped.contains_key(*reason)
        })?,
    };
    let words: &[&str] = match right {
        Judgement::Out(words) => words,
        Judgement::Either => &LIES,
        _ => &[],
    };
    let why = port.put_out.last.unwrap_or_default();
    let rightly = why.is_empty() || words.iter().any(|word| why.contains(word));
    ensure!(rightly, "put out because of {why:?}, not of {words:?}");
    Ok(())
}

fn config(xs: &[String]) -> Config {
    let wild = |name: &str| PortSpec {
        bridge: "wild".to_owned(),
        ..client_port(name)
    };
    let mut ports = vec![client_port("a"), client_port("b"), wild("friend")];
    ports.extend(xs.iter().map(|name| wild(name)));
    Config {
        workers: Workers::Cpus(vec![last_cpu()]),
        idle: Idle::Adaptive,
        ports,
        ..Config::default()
    }
}

/// Waits until the switch has given all buffers back.
fn at_rest(queues: &mut QueuePair) -> Result<()> {
    let end = Instant::now() + PATIENCE;
    while queues.tx.in_flight() > 0 {
        ensure!(Instant::now() < end, "the switch keeps buffers");
        std::thread::yield_now();
    }
    Ok(())
}

/// Kills the switch, corrupts, starts it again, and asks what became of all.
fn round(
    switch: &mut Ringway,
    honest: &mut [Listener; 3],
    xs: &mut [Listener],
    dice: &mut Dice,
) -> Result<()> {
    let api = switch.api();
    for guest in honest.iter_mut().chain(xs.iter_mut()) {
        at_rest(&mut guest.queues).with_context(|| guest.port.clone())?;
    }
    switch.process().kill();
    let right: Vec<Judgement> = (xs.iter_mut())
        .map(|x| corrupt(x, dice))
        .collect::<Result<_>>()?;
    switch.crash_and_restart()?;
    for x in &mut *xs {
        let _ = x.guest.resume(); // it may be put out before it has said all
    }
    for honest in &mut *honest {
        honest.guest.resume().context("an honest guest")?;
    }
    let [a, b, friend] = honest;
    exchange(&mut a.queues, &mut b.queues, FRAMES, 200, 48)?;
    exchange(&mut b.queues, &mut a.queues, FRAMES, 200, 48)?;
    // An index that cannot be is seen at once. What else is in a receive ring nobody looks at until somebody sends.
    let at_once = |right: &Judgement| matches!(right, Judgement::Out(["available index"]));
    for now in [true, false] {
        for (x, right) in xs
            .iter()
            .zip(&right)
            .filter(|(_, right)| at_once(right) == now)
        {
            judged(&api, x, right).with_context(|| x.port.clone())?;
        }
        for _ in 0..4 {
            send(
                &mut friend.queues,
                &frame(BROADCAST, friend.mac, b"anybody?"),
            )?;
        }
    }
    // Free again for who behaves.
    for x in xs {
        x.attach_again()?;
        let hello = frame(friend.mac, x.mac, x.port.as_bytes());
        reach(&mut x.queues, &mut friend.queues, &hello)?;
        let answer = frame(x.mac, friend.mac, x.port.as_bytes());
        reach(&mut friend.queues, &mut x.queues, &answer)?;
    }
    exchange(&mut a.queues, &mut b.queues, FRAMES, 200, 48)?;
    exchange(&mut b.queues, &mut a.queues, FRAMES, 200, 48)
}

#[test]
fn h89_rings_corrupted_while_the_switch_is_dead_are_judged_afresh_and_honest_guests_go_on()
-> Result<()> {
    let _alone = alone();
    let names: Vec<String> = (0..ATTACKERS).map(|n| format!("x{n}")).collect();
    let mut switch = Ringway::start_with(config(&names))?;
    let dir = switch.dir().to_owned();
    let listener = |(name, number): (&str, u32)| Listener::attach(&dir, name, number);
    let mut honest = [
        listener(("a", 1))?,
        listener(("b", 2))?,
        listener(("friend", 3))?,
    ];
    let numbered = names.iter().map(String::as_str).zip(10..);
    let mut xs: Vec<Listener> = numbered.map(listener).collect::<Result<_>>()?;
    let first = number("HOSTILE_FIRST_SEED").unwrap_or(1);
    for seed in first..first + number("HOSTILE_SEEDS").unwrap_or(20).div_ceil(4) {
        round(&mut switch, &mut honest, &mut xs, &mut Dice::new(seed))
            .with_context(|| format!("seed {seed}"))?;
    }
    let said = switch.process().output();
    ensure!(!said.contains("panicked"), "the switch said:\n{said}");
    drop((honest, xs));
    api::balanced(&switch.api())?;
    switch.stop().map(drop)
}

#[test]
fn frames_that_a_killed_switch_held_back_may_come_once_more_and_no_others() -> Result<()> {
    let _alone = alone();
    let mut switch = Ringway::start_with(config(&[]))?;
    let dir = switch.dir().to_owned();
    let mut a = Listener::with_rings(512, &dir, "a", 1)?;
    let mut b = Listener::with_rings(512, &dir, "b", 2)?;
    for (round, rests) in [false, true, false, true].into_iter().enumerate() {
        let numbered = |n| frame(b.mac, a.mac, format!("{round} {n:03}").as_bytes());
        let sent: Vec<_> = (0..200).map(numbered).collect();
        for bytes in &sent {
            reach(&mut a.queues, &mut b.queues, bytes)?;
        }
        if rests {
            at_rest(&mut a.queues)?;
        }
        switch.crash_and_restart()?;
        for guest in [&mut b, &mut a] {
            guest.guest.resume()?;
        }
        let last = frame(b.mac, a.mac, b"the last");
        let (mut again, mut over, end) = (Vec::new(), false, Instant::now() + PATIENCE);
        while !over {
            ensure!(Instant::now() < end, "a frame does not come");
            send(&mut a.queues, &last)?;
            b.queues.rx.receive(|frame| {
                over |= frame.matches(0, &last);
                again.extend(sent.iter().position(|bytes| frame.matches(0, bytes)));
            });
        }
        // The first of them may have come when b was not there yet.
        let tail: Vec<_> = (sent.len() - again.len()..sent.len()).collect();
        ensure!(again == tail, "round {round}: {again:?}");
        let most = if rests { 0 } else { HELD };
        ensure!(again.len() <= most, "round {round}: {} again", again.len());
    }
    switch.stop().map(drop)
}
