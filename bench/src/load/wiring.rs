//! Who sends to whom: streams between the ports of a fleet, and the announcements that teach a switch where stations are.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use super::fleet::Fleet;
use super::relay::Relay;
use super::sender::{Lengths, Sender};
use super::sink::{ANNOUNCEMENTS, Arrived};
use super::stream::{Expected, FLOWS_MAX, Stream, Target};
use crate::interrupt;

/// Stations of one port begin so far from those of the next: room for all flows of it.
const STATIONS: u32 = 1 << 20;
const _: () = assert!(FLOWS_MAX <= STATIONS);
/// Length of an announcement.
const HELLO: usize = 64;

/// Who sends to whom.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Wire {
    pub(crate) from: usize,
    pub(crate) to: usize,
}

impl Fleet {
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

    /// A port's first streams go elsewhere, where nobody expects them.
    pub(crate) fn retarget(&mut self, port: usize, target: Target, flows: u32) {
        for queue in &mut self.lanes[port].queues {
            queue.sender.retarget(target, flows);
        }
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
    use crate::load::fleet::PORTS_MAX;

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
