//! A worker: one thread on one core that takes its receive queues in turns. Start reading here.
//!
//! A turn: (1) *lend* up to 64 frames; (2) *decide* the whole burst from private copies of the heads; (3) *send*, once per
//! egress port: copy ring to ring, check that nobody's memory vanished, publish; (4) *give back* the burst to its
//! sender in the same turn. Nothing here allocates, blocks, logs or calls the kernel, except a worker that is allowed to
//! sleep and has nothing to do ([`Doze`]).

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::time::Duration;

use super::clock::tsc;
use super::counters::{QueueCounters, Reason, WorkerCounters};
use super::eth;
use super::fdb::{Fdb, Hash, Key, Learned, Path, Station};
use super::frame::{BURST_MAX, Burst, Head, Slots};
use super::guard::Guard;
use super::mailbox::{Letter, QueueId, Slot};
use super::port_set::{Domain, PortId, Topology};
use super::queue::RxQueue;
use super::schedule::{NONE, Schedule};

/// Copies that flooding may make in one turn: bounds a turn to about 0.2 ms; frames beyond stay in their sender's ring.
pub const FLOOD_BUDGET: usize = 4096;
/// Bytes that may be copied in one turn, floods multiplied; at least one frame goes. Bounds a turn of the longest frames to some 0.2 ms;
/// a full burst of 16 KiB frames still fits, so that only floods and the chains of 64 KiB are ever cut.
pub const BYTE_BUDGET: u64 = 1 << 20;

/// One receive queue with what a worker must know of its port. Moved between control and workers in a `Box`.
pub struct RxSlot {
    /// Whose frames these are.
    pub source: Source,
    /// The queue.
    pub queue: Box<dyn RxQueue>,
    /// The way of the last burst that was all between two known stations.
    path: Option<Path>,
}

impl RxSlot {
    /// A queue from which nothing has come yet.
    pub fn new(source: Source, queue: Box<dyn RxQueue>) -> RxSlot {
        RxSlot {
            source,
            queue,
            path: None,
        }
    }
}

/// The port a queue belongs to.
pub struct Source {
    /// Which queue of which port.
    pub id: QueueId,
    /// The port's broadcast domain.
    pub domain: Domain,
    /// The port number's present owner; see [`super::port_set::Exit`].
    pub generation: u16,
    /// The queue's counters, shared with control.
    pub counters: Arc<QueueCounters>,
    /// The port's limits, if it has any.
    pub guard: Option<Arc<Guard>>,
}

/// How a worker sleeps. The implementation calls the kernel, so it lives with the ports.
pub trait Doze: Send {
    /// Adds a queue's wake descriptor to what ends a sleep.
    fn watch(&mut self, queue: &dyn RxQueue);
    /// Removes it.
    fn unwatch(&mut self, queue: &dyn RxQueue);
    /// Sleeps until a watched queue or the mailbox wakes it, or for `most`.
    fn sleep(&mut self, most: Duration);
}

/// What workers of one switch share.
pub struct Shared {
    /// The forwarding database.
    pub fdb: Fdb,
    /// Coarse clock in seconds, advanced by control; wraps.
    pub seconds: AtomicU32,
}

/// When a worker may sleep.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Idle {
    /// Never: lowest latency, one core fully used.
    Poll,
    /// After `after` without a frame, until a guest announces one.
    Adaptive {
        /// TSC cycles without a frame before a sleep.
        after: u64,
    },
}

/// What happens to one frame: a port to send to, or one of the values below.
type Verdict = u32;
const FLOOD: Verdict = 1 << 16;
const DROP: Verdict = 1 << 17;

/// The state of a worker's thread.
pub struct Worker {
    /// This worker's number: the queue of each port it sends to.
    number: usize,
    schedule: Schedule,
    topology: Arc<Topology>,
    shared: Arc<Shared>,
    counters: Arc<WorkerCounters>,
    mail: Slot,
    slots: Box<Slots>,
    verdicts: Box<[Verdict; BURST_MAX]>,
    idle: Idle,
    doze: Box<dyn Doze>,
}

impl Worker {
    /// A worker without queues.
    pub fn new(
        number: usize,
        shared: Arc<Shared>,
        counters: Arc<WorkerCounters>,
        mail: Slot,
        idle: Idle,
        doze: Box<dyn Doze>,
    ) -> Worker {
        Worker {
            number,
            schedule: Schedule::new(),
            topology: Arc::new(Topology::default()),
            shared,
            counters,
            mail,
            slots: Slots::new(),
            verdicts: Box::new([DROP; BURST_MAX]),
            idle,
            doze,
        }
    }

    /// Polls until control says stop; returns the queues it still has, for control to drop.
    pub fn run(mut self) -> Vec<RxSlot> {
        self.work();
        self.schedule.into_slots()
    }

    /// Polls until control says stop. Nothing that this calls can panic (`tests/tests/no_panic.rs`).
    #[inline(never)]
    fn work(&mut self) {
        let mut before = tsc();
        let mut last_frame = before;
        for pass in 0usize.. {
            if !self.read_mail() {
                break;
            }
            let frames = self.pass(pass);
            let now = tsc();
            self.account(frames, now.wrapping_sub(before));
            before = now;
            if frames > 0 {
                last_frame = now;
            } else if let Idle::Adaptive { after } = self.idle
                && now.wrapping_sub(last_frame) > after
            {
                self.sleep();
            }
        }
    }

    /// Does what control asks; false to stop.
    #[inline]
    fn read_mail(&mut self) -> bool {
        while let Some(letter) = self.mail.next() {
            match letter {
                Letter::Attach(slot) => {
                    self.doze.watch(&*slot.queue);
                    self.schedule.insert(slot);
                }
                Letter::Detach(id, answer) => {
                    let slot = self.schedule.remove(id);
                    if let Some(slot) = &slot {
                        self.doze.unwatch(&*slot.queue);
                    }
                    answer.give(slot);
                }
                Letter::Show(topology, answer) => {
                    answer.give(std::mem::replace(&mut self.topology, topology));
                }
                Letter::Idle(idle) => self.idle = idle,
                Letter::Stop => return false,
            }
        }
        true
    }

    /// Polls every queue that is due in this pass; returns the frames taken.
    #[inline]
    fn pass(&mut self, pass: usize) -> u64 {
        let mut frames = 0;
        let mut at = 0;
        while let Some(index) = self.schedule.busy_at(at) {
            let taken = self.turn(index);
            frames += taken as u64;
            if self.schedule.rest(at, taken > 0) {
                continue; // another queue has taken its place in the list
            }
            at += 1;
        }
        let mut index = self.schedule.unhook(pass);
        while index != NONE {
            let next = self.schedule.next(index);
            let taken = self.turn(index);
            frames += taken as u64;
            self.schedule.hook(index, pass, taken > 0);
            index = next;
        }
        frames
    }

    /// One turn of one queue; returns the frames taken.
    #[inline]
    fn turn(&mut self, index: u16) -> usize {
        let Some(slot) = self.schedule.slot(index) else {
            return 0;
        };
        let RxSlot {
            source: rx,
            queue,
            path,
        } = slot;

        // 1. Lend.
        let burst = queue.lend(&mut self.slots);
        if burst.count() == 0 {
            return 0;
        }
        let way = Way {
            shared: &self.shared,
            topology: &self.topology,
            number: self.number,
            counters: &self.counters,
        };

        // 2. Decide, the whole burst. A flood that would take too long is cut; its frames stay where they are.
        let one = way.one_exit(&burst, rx, path);
        let floods = match one {
            Some(_) => 0,
            None => way.decide(&burst, rx, &mut self.verdicts),
        };
        let targets = self.topology.flood(rx.domain);
        let done = within_budget(floods, targets.len(), burst.count());
        let (done, bytes) = within_bytes(&burst, floods, targets.len(), done);
        let taken = u64::MAX >> (BURST_MAX - done);
        let floods = match &rx.guard {
            Some(guard) if floods & taken != 0 => {
                way.limit(guard, floods & taken, &mut self.verdicts)
            }
            _ => floods,
        };

        // 3. Send, once per egress port.
        match one {
            Some(port) => way.exit_to(&burst, port, taken),
            None => {
                way.flood(&burst, rx, floods & taken, targets);
                way.send(&burst, rx, taken & !floods, &self.verdicts);
            }
        }

        // 4. Give back.
        queue.give_back(done);
        rx.counters.count(done as u64, bytes);
        self.counters.received.count(done as u64, bytes);
        WorkerCounters::add(&self.counters.bursts, 1);
        done
    }

    #[inline]
    fn account(&mut self, frames: u64, cycles: u64) {
        let counters = &*self.counters;
        WorkerCounters::add(&counters.passes, 1);
        WorkerCounters::add(&counters.total_cycles, cycles);
        counters.count_length(cycles);
        if frames > 0 {
            WorkerCounters::add(&counters.busy_cycles, cycles);
        }
    }

    /// Asks every guest to announce its next frame, looks a last time, and sleeps.
    #[cold]
    fn sleep(&mut self) {
        let mut waiting = false;
        for slot in self.schedule.slots() {
            waiting |= slot.queue.arm();
        }
        if !waiting && !self.mail.waiting() {
            WorkerCounters::add(&self.counters.sleeps, 1);
            self.doze.sleep(Duration::from_millis(500));
        }
        for slot in self.schedule.slots() {
            slot.queue.disarm();
        }
        self.schedule.wake_all();
    }
}

/// How many of `count` frames this turn takes, so that its floods make at most [`FLOOD_BUDGET`] copies; at least one.
#[inline]
fn within_budget(floods: u64, targets: usize, count: usize) -> usize {
    let copies = floods.count_ones() as usize * targets;
    if copies <= FLOOD_BUDGET {
        return count;
    }
    let mut left = FLOOD_BUDGET.checked_div(targets).unwrap_or(0).max(1);
    for index in 0..count {
        if floods >> index & 1 == 1 {
            if left == 0 {
                return index;
            }
            left -= 1;
        }
    }
    count
}

/// How many of `count` frames this turn takes, so that it copies at most [`BYTE_BUDGET`] bytes, and their bytes; at least one.
#[inline]
fn within_bytes(burst: &Burst<'_>, floods: u64, targets: usize, count: usize) -> (usize, u64) {
    let bytes = (0..count).map(|i| u64::from(burst.frame_len(i))).sum();
    // Floods of ordinary frames to few ports need no closer look either.
    let most = if floods == 0 { 1 } else { targets.max(1) };
    if bytes * most as u64 <= BYTE_BUDGET {
        return (count, bytes);
    }
    cut_bytes(burst, floods, targets, count)
}

#[cold]
#[inline(never)]
fn cut_bytes(burst: &Burst<'_>, floods: u64, targets: usize, count: usize) -> (usize, u64) {
    let (mut copied, mut bytes) = (0, 0);
    for index in 0..count {
        let len = u64::from(burst.frame_len(index));
        let copies = if floods >> index & 1 == 1 {
            targets as u64
        } else {
            1
        };
        copied += len * copies;
        if copied > BYTE_BUDGET && index > 0 {
            return (index, bytes);
        }
        bytes += len;
    }
    (count, bytes)
}

/// What a turn reads while the burst is lent.
struct Way<'a> {
    shared: &'a Shared,
    topology: &'a Topology,
    number: usize,
    counters: &'a WorkerCounters,
}

impl Way<'_> {
    /// The port that all frames of the burst go to, if they are between the same two stations: one look-up for all of them.
    #[inline]
    fn one_exit(&self, burst: &Burst<'_>, rx: &Source, path: &mut Option<Path>) -> Option<PortId> {
        let first = burst.heads().first()?;
        let mut same = true;
        for (index, head) in burst.heads().iter().enumerate() {
            same &= eth::same_stations(head, first) & (burst.frame_len(index) >= eth::HEADER_LEN);
        }
        if !same {
            return None;
        }
        let (fdb, now) = (&self.shared.fdb, self.shared.seconds.load(Relaxed));
        let from = Key::new(rx.domain, eth::source(first));
        let to = Key::new(rx.domain, eth::destination(first));
        let known = path
            .as_ref()
            .and_then(|path| fdb.recall(path, from, to, now));
        let known = known.or_else(|| {
            *path = fdb.path(from, to, rx.id.port, rx.generation, now);
            path.map(|path| path.station())
        });
        let verdict = match known {
            Some(station) => self.way_to(station, rx),
            None => self.look_up(first, rx, now),
        };
        (verdict < FLOOD).then_some(PortId(verdict as u16))
    }

    /// Gives every frame its verdict; returns which frames are flooded.
    #[inline]
    fn decide(&self, burst: &Burst<'_>, rx: &Source, verdicts: &mut [Verdict; BURST_MAX]) -> u64 {
        let heads = burst.heads();
        let fdb = &self.shared.fdb;
        let now = self.shared.seconds.load(Relaxed);
        for head in heads {
            fdb.prefetch(fdb.hash(Key::new(rx.domain, eth::destination(head))));
            fdb.prefetch(fdb.hash(Key::new(rx.domain, eth::source(head))));
        }
        let mut floods = 0u64;
        let mut memo: Option<(&Head, Verdict)> = None;
        for (index, head) in heads.iter().enumerate() {
            // What stands behind a runt's end is not its own: nothing is learnt from it.
            let verdict = if burst.frame_len(index) < eth::HEADER_LEN {
                DROP | burst.fault(index).unwrap_or(Reason::Runt) as u32
            } else {
                let verdict = match memo {
                    Some((same, verdict)) if eth::same_stations(head, same) => verdict,
                    _ => self.look_up(head, rx, now),
                };
                memo = Some((head, verdict));
                verdict
            };
            floods |= u64::from(verdict == FLOOD) << index;
            verdicts[index % BURST_MAX] = verdict;
        }
        floods
    }

    /// Learns the source, finds the destination (IEEE 802.1Q §8.6, §8.7).
    #[inline]
    fn look_up(&self, head: &Head, rx: &Source, now: u32) -> Verdict {
        let fdb = &self.shared.fdb;
        let (to, from) = (eth::destination(head), eth::source(head));
        if from.is_multicast() || from.is_zero() {
            return DROP | Reason::SourceMulticast as u32;
        }
        let key = Key::new(rx.domain, from);
        let hash = fdb.hash(key);
        if !fdb.heard_again(key, hash, rx.id.port, rx.generation, now)
            && let Some(reason) = self.newcomer(key, hash, rx, now)
        {
            return DROP | reason as u32;
        }
        if to.is_multicast() {
            return if eth::is_reserved(to) {
                DROP | Reason::ReservedMac as u32
            } else {
                FLOOD
            };
        }
        let key = Key::new(rx.domain, to);
        match fdb.lookup(key, fdb.hash(key)) {
            Some(station) => self.way_to(station, rx),
            None => FLOOD,
        }
    }

    /// A frame's way to a station that is known.
    #[inline]
    fn way_to(&self, station: Station, rx: &Source) -> Verdict {
        if station.port == rx.id.port {
            return DROP | Reason::Hairpin as u32;
        }
        match self.topology.exit(station.port) {
            Some(exit) if exit.generation == station.generation => u32::from(station.port.0),
            // The port number has another owner now: what was learnt of the earlier one is void.
            Some(_) if !station.is_static => FLOOD,
            _ => DROP | Reason::PortDown as u32,
        }
    }

    /// Learns a station that is not known to be here, if it may be.
    #[cold]
    #[inline(never)]
    fn newcomer(&self, key: Key, hash: Hash, rx: &Source, now: u32) -> Option<Reason> {
        let (fdb, port) = (&self.shared.fdb, rx.id.port);
        if let Some(guard) = &rx.guard {
            let seen = fdb.lookup(key, hash);
            let here = |seen: &Station| seen.port == port && seen.generation == rx.generation;
            if !seen.as_ref().is_some_and(here) {
                let (elsewhere, stations) = (seen.is_some(), fdb.stations_of(port));
                if let Some(reason) = guard.refuses(key.mac(), elsewhere, stations, now) {
                    return Some(reason);
                }
            }
        }
        match fdb.learn(key, hash, port, rx.generation, now) {
            Learned::Static => Some(Reason::Spoofed),
            _ => None,
        }
    }

    /// Takes from `floods` the frames beyond what the port may flood, and drops them; returns the rest.
    #[cold]
    #[inline(never)]
    fn limit(&self, guard: &Guard, floods: u64, verdicts: &mut [Verdict; BURST_MAX]) -> u64 {
        let now = self.shared.seconds.load(Relaxed);
        let mut granted = guard.floods.take(floods.count_ones(), now);
        let mut kept = 0;
        for (index, verdict) in verdicts.iter_mut().enumerate() {
            if floods >> index & 1 == 0 {
                continue;
            }
            if granted > 0 {
                granted -= 1;
                kept |= 1 << index;
            } else {
                *verdict = DROP | Reason::FloodLimit as u32;
            }
        }
        kept
    }

    /// Sends the frames in `picks` to their verdicts: one call per egress port, one count per drop reason.
    #[inline]
    fn send(
        &self,
        burst: &Burst<'_>,
        rx: &Source,
        mut picks: u64,
        verdicts: &[Verdict; BURST_MAX],
    ) {
        while picks != 0 {
            let verdict = verdicts[picks.trailing_zeros() as usize % BURST_MAX];
            let mut same = 0u64;
            for (index, other) in verdicts.iter().enumerate() {
                same |= u64::from(*other == verdict) << index;
            }
            let same = same & picks;
            picks &= !same;
            if verdict & DROP != 0 {
                self.drop(rx, verdict, same);
            } else {
                self.exit_to(burst, PortId(verdict as u16), same);
            }
        }
    }

    /// Sends the frames in `floods` to every other port of the domain.
    #[cold]
    fn flood(&self, burst: &Burst<'_>, rx: &Source, floods: u64, targets: &[PortId]) {
        if floods == 0 {
            return;
        }
        let mut copies = 0;
        for port in targets.iter().filter(|port| **port != rx.id.port) {
            self.exit_to(burst, *port, floods);
            copies += 1;
        }
        let frames = u64::from(floods.count_ones());
        match copies {
            0 => self.drop(rx, DROP | Reason::NoDestination as u32, floods),
            _ => {
                rx.counters.replicate(frames * (copies - 1));
                self.counters.received.replicate(frames * (copies - 1));
            }
        }
    }

    #[cold]
    fn drop(&self, rx: &Source, verdict: Verdict, picks: u64) {
        let frames = u64::from(picks.count_ones());
        if let Some(reason) = Reason::ALL.get((verdict & !DROP) as usize) {
            rx.counters.count_drop(*reason, frames);
            self.counters.received.count_drop(*reason, frames);
        }
    }

    #[inline]
    fn exit_to(&self, burst: &Burst<'_>, port: PortId, picks: u64) {
        // `look_up` and `Topology::flood` name only ports that have an exit in this very picture.
        if let Some(queue) = self
            .topology
            .exit(port)
            .and_then(|exit| exit.queue(self.number))
        {
            let outcome = queue.send(burst, picks);
            WorkerCounters::add(&self.counters.sent, u64::from(outcome.sent));
            if outcome.small > 0 {
                self.counters
                    .received
                    .count_drop(Reason::TxBufferSmall, u64::from(outcome.small));
            }
            if outcome.left > 0 {
                self.counters
                    .received
                    .count_drop(outcome.reason, u64::from(outcome.left));
            }
        }
    }
}
