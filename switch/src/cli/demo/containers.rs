//! The demo's containers: guests on one thread, each sending to its neighbour, every frame checked.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use crossbeam::channel::Sender;
use hdrhistogram::Histogram;

use super::Stage;
use crate::control::cpu;
use crate::dataplane::clock::tsc;
use crate::guest::traffic::{Checker, Flow, Tally, station};
use crate::guest::{Guest, Options, QueuePair};

/// Frames per burst.
const BURST: usize = 64;
/// Memory for the frames of one ring.
const RING_MEMORY: usize = 4 << 20;
/// Length of the broadcast frame by which a container announces itself.
const HELLO: usize = 42;
/// How often the containers report.
const REPORT: Duration = Duration::from_millis(250);
/// A frame that has not come after this never will.
const LOST_AFTER: Duration = Duration::from_millis(200);
/// The content of every frame is compared whole up to this length, of every 64th frame beyond.
const VERIFY_ALL: usize = 1518;

/// What happened since the last report.
pub(super) struct Sample {
    /// The stage it belongs to.
    pub(super) stage: Stage,
    /// How long it took.
    pub(super) time: Duration,
    /// What the receivers found in it.
    pub(super) received: u64,
    pub(super) bytes: u64,
    /// Latencies in TSC cycles.
    pub(super) latency: Histogram<u64>,
}

/// What happened in all.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Total {
    pub(super) sent: u64,
    pub(super) announced: u64,
    pub(super) announcements: u64,
    pub(super) tally: Tally,
}

struct Container {
    guest: Guest,
    pair: QueuePair,
    flow: Flow,
    checker: Checker,
    in_flight: u64,
}

/// All containers; they live on one thread.
pub(super) struct Containers {
    list: Vec<Container>,
    announced: u64,
    announcements: u64,
    /// Frames a container may have on their way under full load: enough to keep the switch's bursts full, few enough that no
    /// ring overflows, whoever else sends to it.
    window: u64,
    /// The containers share the only CPU with the switch.
    shares_cpu: bool,
    progress: Instant,
}

impl Containers {
    /// Attaches one container to each socket.
    pub(super) fn attach(
        sockets: &[impl AsRef<Path>],
        frame_size: usize,
        packed: bool,
    ) -> anyhow::Result<Containers> {
        let count = sockets.len() as u32;
        let most = (RING_MEMORY / frame_size).clamp(128, 1024);
        let ring_size = 1u16 << most.ilog2();
        let attach = |(number, socket): (u32, &_)| {
            let socket: &Path = AsRef::as_ref(socket);
            let guest = container(socket, (number, count), (frame_size, ring_size), packed);
            guest.with_context(|| format!("container {} at {}", number + 1, socket.display()))
        };
        Ok(Containers {
            list: (0..).zip(sockets).map(attach).collect::<Result<_, _>>()?,
            announced: 0,
            announcements: 0,
            window: u64::from(ring_size) / 4,
            shares_cpu: false,
            progress: Instant::now(),
        })
    }

    /// Moves to `cpu`, if there is one to move to.
    pub(super) fn settle(&mut self, cpu: Option<usize>) -> anyhow::Result<()> {
        self.shares_cpu = cpu.is_none();
        Ok(cpu.map_or(Ok(()), cpu::pin)?)
    }

    /// Each container sends one broadcast frame, as an ARP announcement would be, and all others get it: now the switch knows them.
    pub(super) fn announce(&mut self) -> anyhow::Result<()> {
        let others = self.list.len() as u64 - 1;
        let end = Instant::now() + Duration::from_secs(2);
        for number in 0..self.list.len() {
            let id = u32::MAX - number as u32;
            let mut hello = Flow::new(id, station(number as u32), [0xff; 6], HELLO);
            let sent = self.list[number]
                .pair
                .tx
                .send(1, |slot| hello.write(slot, 0));
            ensure!(sent == 1, "container {} could not send", number + 1);
            self.announced += 1;
            let expected = self.announcements + others;
            while self.announcements < expected {
                ensure!(
                    Instant::now() < end,
                    "a broadcast of container {} did not reach all others",
                    number + 1
                );
                for container in &mut self.list {
                    let got = container.pair.rx.receive(|_| ());
                    self.announcements += got as u64;
                }
                std::thread::yield_now();
            }
        }
        Ok(())
    }

    /// Exchanges frames until `stage` says that it is over, and reports.
    pub(super) fn run(&mut self, stage: impl Fn() -> Stage, report: &Sender<Sample>) -> Total {
        let mut now = stage();
        while now != Stage::Over {
            let (began, before) = (Instant::now(), self.tally());
            let window = if now == Stage::Load { self.window } else { 1 };
            while began.elapsed() < REPORT && stage() == now {
                // The clock is read once per 64 rounds: it costs as much as three frames.
                for _ in 0..64 {
                    self.round(window);
                }
            }
            let after = self.tally();
            let sample = Sample {
                stage: now,
                time: began.elapsed(),
                received: after.received - before.received,
                bytes: after.bytes - before.bytes,
                latency: self.latency(),
            };
            if report.send(sample).is_err() {
                break;
            }
            let next = stage();
            if next != now {
                self.drain();
                drop(self.latency());
                now = next;
            }
        }
        self.drain();
        Total {
            sent: self
                .list
                .iter()
                .map(|container| container.flow.sent())
                .sum(),
            announced: self.announced,
            announcements: self.announcements,
            tally: self.tally(),
        }
    }

    /// Says goodbye in order.
    pub(super) fn detach(mut self) {
        for container in &mut self.list {
            let _ = container.guest.detach();
        }
    }

    fn round(&mut self, window: u64) {
        let (count, mut moved) = (self.list.len(), false);
        for number in 0..count {
            let Container { pair, checker, .. } = &mut self.list[number];
            let now = tsc();
            let got = pair.rx.receive(|frame| checker.check(frame, now)) as u64;
            if got > 0 {
                let sender = &mut self.list[(number + count - 1) % count];
                sender.in_flight = sender.in_flight.saturating_sub(got);
                moved = true;
            }
            self.list[number].send(window);
        }
        if moved {
            self.progress = Instant::now();
        } else {
            self.wait();
        }
    }

    /// Nothing came. On one CPU the switch gets it; frames that are lost make room for others.
    #[cold]
    fn wait(&mut self) {
        if self.shares_cpu {
            std::thread::yield_now();
        }
        if self.progress.elapsed() > LOST_AFTER {
            self.list
                .iter_mut()
                .for_each(|container| container.in_flight = 0);
            self.progress = Instant::now();
        }
    }

    /// Receives what is still on its way.
    fn drain(&mut self) {
        let mut last = Instant::now();
        while self.list.iter().any(|container| container.in_flight > 0)
            && last.elapsed() < LOST_AFTER
        {
            let before = self.tally().received;
            self.round(0);
            if self.tally().received > before {
                last = Instant::now();
            }
        }
        self.list
            .iter_mut()
            .for_each(|container| container.in_flight = 0);
    }

    fn tally(&self) -> Tally {
        let mut sum = Tally::default();
        self.list
            .iter()
            .for_each(|container| sum += container.checker.tally());
        sum
    }

    fn latency(&mut self) -> Histogram<u64> {
        let mut all = self
            .list
            .iter_mut()
            .map(|container| container.checker.take_latency());
        let mut sum = all.next().expect("there are at least two containers");
        all.for_each(|one| sum.add(one).expect("all have the same bounds"));
        sum
    }
}

impl Container {
    #[inline]
    fn send(&mut self, window: u64) {
        let room = window.saturating_sub(self.in_flight).min(BURST as u64);
        // Half bursts at least, unless the window is smaller: a closed loop of single frames would measure nothing but itself.
        if room == 0 || (room < BURST as u64 / 2 && window > room) {
            return;
        }
        let (flow, now) = (&mut self.flow, tsc());
        let len = flow.frame_len();
        let sent = self
            .pair
            .tx
            .send(room as usize, |slot| match slot.sent_len() == len {
                true => flow.renew(slot, now),
                false => flow.write(slot, now),
            });
        self.in_flight += sent as u64;
    }
}

fn container(
    socket: &Path,
    (number, count): (u32, u32),
    (frame_size, ring_size): (usize, u16),
    packed: bool,
) -> anyhow::Result<Container> {
    let mut options = Options::new(socket);
    options.ring_size = ring_size;
    options.frame_max = frame_size as u32;
    options.receive_buffer = frame_size as u32 + 12;
    if packed {
        options = options.packed();
    }
    let mut guest = Guest::new(options)?;
    let pair = guest.attach()?.remove(0);
    let to = (number + 1) % count;
    let verify_every = if frame_size <= VERIFY_ALL { 1 } else { 64 };
    Ok(Container {
        guest,
        pair,
        flow: Flow::new(number, station(number), station(to), frame_size),
        checker: Checker::new((number + count - 1) % count, 1, verify_every),
        in_flight: 0,
    })
}
