//! The generator's ports: frontends attached to a switch. `wiring` says who sends to whom.

use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};
use ringway::guest::{Guest, Options, QueuePair};

use super::frontends::{Frontends, Memory};
use super::relay::Relay;
use super::sender::{Lengths, Pace, Sender};
use super::sink::{Arrived, Sink};
use crate::host;
use crate::interrupt;
use crate::sentinel::tsc_hz;

/// The most ports: their stations have numbers of 32 bits.
pub(super) const PORTS_MAX: usize = 4095;

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
    pub(super) next_stream: u16,
    /// Receivers of each stream.
    pub(crate) receivers: Vec<u64>,
    pub(crate) caveats: Vec<String>,
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

    /// All senders of a port send at a pace of their own.
    pub(crate) fn set_pace(&mut self, port: usize, pace: Pace) {
        for queue in &mut self.lanes[port].queues {
            queue.sender.set_pace(pace);
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
