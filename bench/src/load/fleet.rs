//! The generator's ports: frontends attached to a switch, wired with streams.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use ringway::guest::{Guest, Options, QueuePair};

use super::frontends::{Frontends, Memory};
use super::relay::Relay;
use super::sender::{Lengths, Pace, Sender};
use super::sink::{ANNOUNCEMENTS, Arrived, Sink};
use super::stream::{Expected, FLOWS_MAX, Stream, Target};
use crate::host;
use crate::interrupt;
use crate::sentinel::tsc_hz;

/// Stations of one port begin so far from those of the next: room for all flows of it.
const STATIONS: u32 = 1 << 20;
const _: () = assert!(FLOWS_MAX <= STATIONS);
/// The most ports: their stations have numbers of 32 bits.
const PORTS_MAX: usize = 4095;
/// Length of an announcement.
const HELLO: usize = 64;

/// One pair of queues with its sender.
pub(crate) struct Queue {
    pub(crate) pair: QueuePair,
    pub(crate) sender: Sender,
}

/// What one thread needs of a port.
pub(crate) struct Lane {
    pub(crate) queues: Vec<Queue>,
    pub(crate) sink: Sink,
    /// Passes frames on instead of keeping them.
    pub(crate) relay: Option<Relay>,
    /// Takes no frames: its receive ring is never refilled.
    pub(crate) deaf: bool,
}

/// Ports attached to a switch.
pub(crate) struct Fleet {
    pub(crate) guests: Vec<Guest>,
    pub(crate) lanes: Vec<Lane>,
    /// CPUs of the threads; none: they go where the kernel puts them.
    pub(crate) cpus: Vec<usize>,
    pub(crate) tsc_hz: f64,
    pub(crate) lengths: Lengths,
    verify_every: u64,
    next_stream: u16,
    /// Receivers of each stream.
    pub(crate) receivers: Vec<u64>,
    pub(crate) caveats: Vec<String>,
}

/// Who sends to whom.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Wire {
    pub(crate) from: usize,
    pub(crate) to: usize,
}

impl Fleet {
    /// Attaches a port to each socket; nothing is sent yet.
    pub(crate) fn attach(
        frontends: &Frontends,
        sockets: &[PathBuf],
        lengths: &Lengths,
        verify_every: u64,
    ) -> Result<Self> {
        ensure!(
            sockets.len() <= PORTS_MAX,
            "{} ports: the generator plays at most {PORTS_MAX}",
            sockets.len()
        );
        let longest = u32::from(lengths.longest());
        let mut fleet = Self {
            guests: Vec::new(),
            lanes: Vec::new(),
            cpus: frontends.cpus.clone(),
            tsc_hz: tsc_hz(),
            lengths: lengths.clone(),
            verify_every,
            next_stream: 0,
            receivers: Vec::new(),
            caveats: Vec::new(),
        };
        let hugepages = fleet.choose_memory(frontends, sockets.len(), longest);
        let at = |port: usize| format!("port {port} at {}", sockets[port].display());
        // Those that listen do so before any of them waits for the switch.
        for (port, socket) in sockets.iter().enumerate() {
            let options = frontends.options(socket.clone(), longest, hugepages);
            let guest = Guest::new(options).with_context(|| at(port))?;
            fleet.guests.push(guest);
        }
        for port in 0..sockets.len() {
            interrupt::check()?;
            let pairs = fleet.guests[port].attach().with_context(|| at(port))?;
            fleet.check(port)?;
            fleet.lanes.push(fleet.lane(pairs));
        }
        Ok(fleet)
    }

    /// A port leaves and comes back as another kind of container. It has to be wired again.
    pub(crate) fn attach_again(
        &mut self,
        port: usize,
        change: impl FnOnce(&mut Options),
    ) -> Result<()> {
        let mut before = self.guests.remove(port);
        let mut options = before.options().clone();
        change(&mut options);
        let _ = before.detach();
        // One that listened gives up its socket before the next one makes it.
        drop(before);
        let mut guest = Guest::new(options)?;
        let pairs = guest.attach();
        self.guests.insert(port, guest);
        self.lanes[port] = self.lane(pairs.with_context(|| format!("port {port}, again"))?);
        Ok(())
    }

    fn lane(&self, pairs: Vec<QueuePair>) -> Lane {
        let silent = || {
            let none = (Vec::new(), Vec::new());
            Sender::new(none.0, none.1, self.lengths.clone(), 0, Arrived::default())
        };
        Lane {
            queues: pairs
                .into_iter()
                .map(|pair| Queue {
                    pair,
                    sender: silent(),
                })
                .collect(),
            sink: Sink::new(self.verify_every),
            relay: None,
            deaf: false,
        }
    }

    fn choose_memory(&mut self, frontends: &Frontends, ports: usize, longest: u32) -> bool {
        let pages = frontends.bytes(ports, longest).div_ceil(2 << 20);
        match frontends.memory {
            Memory::Memfd => false,
            Memory::Hugepages => true,
            Memory::Auto => {
                let free = host::free_hugepages();
                if free < pages {
                    self.caveats.push(format!(
                        "ordinary memory, as {pages} hugepages of 2 MiB are not free ({free} are): with hugepages both sides miss \
                         the TLB less, which is worth up to 15 %"
                    ));
                }
                free >= pages
            }
        }
    }

    /// What the switch did not grant.
    fn check(&mut self, port: usize) -> Result<()> {
        let guest = &self.guests[port];
        let options = guest.options();
        let wanted = [
            (options.in_order, ringway::virtio::ring::feature::IN_ORDER),
            (options.mergeable, ringway::virtio::ring::feature::MRG_RXBUF),
        ];
        let missing: u64 = wanted
            .iter()
            .filter(|(wanted, bit)| *wanted && guest.features() & bit == 0)
            .map(|(_, bit)| bit)
            .sum();
        if missing & ringway::virtio::ring::feature::MRG_RXBUF != 0
            && options.receive_buffer < options.frame_max + 12
        {
            bail!(
                "the switch does not offer MRG_RXBUF, and receive buffers of {} bytes are too short for frames of {}",
                options.receive_buffer,
                options.frame_max
            );
        }
        if missing != 0 {
            let caveat = format!(
                "not offered by the switch: {}",
                ringway::guest::feature_names(missing)
            );
            if !self.caveats.contains(&caveat) {
                self.caveats.push(caveat);
            }
        }
        Ok(())
    }

    /// Wires streams anew: `stations` flows on each wire (shared among the queues), and `broadcast` per cent of each sender's
    /// frames to all.
    pub(crate) fn wire(&mut self, wires: &[Wire], stations: u32, broadcast: u32) -> Result<()> {
        self.next_stream = 0;
        self.receivers.clear();
        let ports = self.lanes.len();
        for lane in &mut self.lanes {
            lane.sink.forget();
            (lane.relay, lane.deaf) = (None, false);
        }
        for from in 0..ports {
            let queues = self.lanes[from].queues.len();
            for queue in 0..queues {
                let arrived = Arrived::default();
                let flows = stations.div_ceil(queues as u32);
                let source = base(from) + flows * queue as u32;
                let (mut streams, mut turns) = (Vec::new(), Vec::new());
                for wire in wires.iter().filter(|wire| wire.from == from) {
                    let target = Target::Stations(base(wire.to) + flows * queue as u32);
                    turns.push(streams.len() as u16);
                    let stream = self.stream(source, target, flows, 1)?;
                    self.lanes[wire.to].sink.expect(
                        stream.id,
                        Expected::new(&stream),
                        Some(arrived.clone()),
                    );
                    streams.push(stream);
                }
                if broadcast > 0 && !turns.is_empty() {
                    let stream = self.stream(source, Target::All, 1, ports as u64 - 1)?;
                    let others = (0..ports).filter(|&port| port != from);
                    for (number, port) in others.enumerate() {
                        let sender = (number == 0).then(|| arrived.clone());
                        let sink = &mut self.lanes[port].sink;
                        sink.expect(stream.id, Expected::new(&stream), sender);
                    }
                    turns = mixed(&turns, streams.len() as u16, broadcast);
                    streams.push(stream);
                }
                let salt = salt(from, queue);
                self.lanes[from].queues[queue].sender =
                    Sender::new(streams, turns, self.lengths.clone(), salt, arrived);
            }
        }
        Ok(())
    }

    /// Frames of other lengths, from the next wiring on; none longer than those the ports were attached with.
    pub(crate) fn set_lengths(&mut self, lengths: Lengths) {
        self.lengths = lengths;
    }

    fn stream(
        &mut self,
        source: u32,
        target: Target,
        flows: u32,
        receivers: u64,
    ) -> Result<Stream> {
        let id = self.next_stream;
        ensure!(id < ANNOUNCEMENTS, "more than {ANNOUNCEMENTS} streams");
        self.next_stream += 1;
        self.receivers.push(receivers);
        Ok(Stream::new(id, source, target, flows))
    }

    /// Every station of every port sends one broadcast frame: the switch knows them from now on. Waits until they came out
    /// somewhere, or a moment if they do not.
    pub(crate) fn announce(&mut self, stations: u32) -> Result<()> {
        for port in 0..self.lanes.len() {
            self.announce_port(port, stations, None)?;
        }
        Ok(())
    }

    /// The same for one port, at so many stations per second.
    pub(crate) fn announce_port(
        &mut self,
        port: usize,
        stations: u32,
        rate: Option<f64>,
    ) -> Result<()> {
        let flows = stations.max(1);
        let mut hello = Stream::new(ANNOUNCEMENTS, base(port), Target::All, flows);
        let (began, mut sent_last) = (Instant::now(), Instant::now());
        let (mut left, mut moved) = (u64::from(flows), Instant::now());
        while left > 0 {
            interrupt::check()?;
            ensure!(
                sent_last.elapsed() < Duration::from_secs(5),
                "port {port}: the switch takes no frames (its ring is full and stays so)"
            );
            let due = rate.map_or(64, |rate| {
                let due = (began.elapsed().as_secs_f64() * rate) as u64 + 1;
                due.saturating_sub(u64::from(flows) - left).min(64)
            });
            let tx = &mut self.lanes[port].queues[0].pair.tx;
            // With the payload that the port's frames of this length have: it stays in the buffers.
            let sent = tx.send(left.min(due) as usize, |slot| {
                hello.fill(slot, HELLO.min(slot.room()), salt(port, 0), 0)
            });
            if sent > 0 {
                (left, sent_last) = (left - sent as u64, Instant::now());
            }
            if rate.is_some() {
                self.look();
                continue;
            }
            moved = Instant::now();
            while self.look() == 0 && moved.elapsed() < Duration::from_millis(1) {
                std::thread::yield_now();
            }
        }
        while moved.elapsed() < Duration::from_millis(3) {
            if self.look() > 0 {
                moved = Instant::now();
            }
        }
        Ok(())
    }

    /// All frames of a port are from its first station.
    pub(crate) fn one_source(&mut self, port: usize) {
        for queue in &mut self.lanes[port].queues {
            queue.sender.one_source();
        }
    }

    /// Receives what there is on all ports.
    pub(crate) fn look(&mut self) -> usize {
        let heard = self.lanes.iter_mut().filter(|lane| !lane.deaf);
        heard.map(Self::look_at).sum()
    }

    /// Receives what there is on one port.
    pub(crate) fn look_at(lane: &mut Lane) -> usize {
        let mut got = 0;
        for queue in &mut lane.queues {
            got += lane.sink.receive(&mut queue.pair.rx);
        }
        got
    }

    /// Every port sends one broadcast frame.
    pub(crate) fn hello(&mut self) {
        for (port, lane) in self.lanes.iter_mut().enumerate() {
            let mut hello = Stream::new(ANNOUNCEMENTS, base(port), Target::All, 1);
            let tx = &mut lane.queues[0].pair.tx;
            tx.send(1, |slot| {
                hello.fill(slot, HELLO.min(slot.room()), salt(port, 0), 0)
            });
        }
    }

    /// Wires a chain: the first port sends to the second, each passes on to the next, the last one checks.
    pub(crate) fn wire_chain(&mut self) -> Result<()> {
        self.wire(&[Wire { from: 0, to: 1 }], 1, 0)?;
        let last = self.lanes.len() - 1;
        if let Some((expected, sender)) = self.lanes[1].sink.release(0) {
            self.lanes[last].sink.expect(0, expected, sender);
        }
        for port in 1..last {
            self.lanes[port].relay = Some(Relay::new(base(port), base(port + 1)));
        }
        Ok(())
    }

    /// All senders of a port send at a pace of their own.
    pub(crate) fn set_pace(&mut self, port: usize, pace: Pace) {
        for queue in &mut self.lanes[port].queues {
            queue.sender.set_pace(pace);
        }
    }

    /// A port's first streams go elsewhere, where nobody expects them.
    pub(crate) fn retarget(&mut self, port: usize, target: Target, flows: u32) {
        for queue in &mut self.lanes[port].queues {
            queue.sender.retarget(target, flows);
        }
    }

    /// Senders that have something to send.
    pub(crate) fn senders(&self) -> usize {
        let queues = self.lanes.iter().flat_map(|lane| &lane.queues);
        queues
            .filter(|queue| !queue.sender.streams().is_empty() && !queue.sender.has_own_pace())
            .count()
    }

    /// The number of the first port whose switch has closed the connection.
    pub(crate) fn gone(guests: &[Guest]) -> Option<usize> {
        guests.iter().position(|guest| !guest.connected())
    }

    /// Says goodbye in order.
    pub(crate) fn detach(mut self) {
        for guest in &mut self.guests {
            let _ = guest.detach();
        }
    }

    /// TSC cycles from one frame of a sender to the next, if all together send `pps` frames per second.
    pub(crate) fn every(&self, pps: f64) -> Result<Pace> {
        let senders = self.senders().max(1) as f64;
        let cycles = self.tsc_hz * senders / pps;
        if !cycles.is_finite() || cycles < 1.0 || pps <= 0.0 {
            bail!(
                "a rate of {pps:.0} frames/s is impossible: it must be above 0 and at most {:.0} million for {senders} senders",
                self.tsc_hz * senders / 1e6
            );
        }
        Ok(Pace::Every(cycles))
    }
}

/// Tells the payloads of rings apart.
fn salt(port: usize, queue: usize) -> u32 {
    (port * 977 + queue * 131) as u32
}

/// The first station of a port.
pub(crate) fn base(port: usize) -> u32 {
    (port as u32 + 1).wrapping_mul(STATIONS)
}

/// Turns in which `per_cent` of the frames are those of stream `all`, evenly spread.
fn mixed(turns: &[u16], all: u16, per_cent: u32) -> Vec<u16> {
    let (mut mixed, mut rest) = (Vec::new(), turns.iter().cycle());
    for number in 0..100 * turns.len() as u32 {
        let before = number * per_cent / 100;
        if (number + 1) * per_cent / 100 > before {
            mixed.push(all);
        } else {
            mixed.extend(rest.next());
        }
    }
    mixed
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_of_the_turns_is_broadcast() {
        let turns = mixed(&[0, 1], 2, 10);
        assert_eq!(turns.len(), 200);
        assert_eq!(turns.iter().filter(|&&turn| turn == 2).count(), 20);
        assert_eq!(turns.iter().filter(|&&turn| turn == 0).count(), 90);
    }

    #[test]
    fn stations_of_ports_do_not_overlap() {
        assert!(base(1) - base(0) >= FLOWS_MAX);
        assert!(base(PORTS_MAX - 1) > base(PORTS_MAX - 2));
    }
}
