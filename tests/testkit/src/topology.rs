//! A switch in this process, with guests of our own at its ports, over real vhost-user sockets.
//!
//! ```no_run
//! # fn main() -> anyhow::Result<()> {
//! use testkit::topology::{Net, frame};
//! let net = Net::with_ports(&["blue", "red"])?;
//! let [mut blue, mut red] = net.attach(["blue", "red"])?;
//! let hello = frame(red.mac(), blue.mac(), b"hello");
//! blue.send(&hello)?;
//! red.expect(&hello)?;
//! net.settle()?;
//! # Ok(()) }
//! ```

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use ringway::control::config::{Config, Workers};
use ringway::control::state::{Idle, PortSpec, PortState, PortStatus};
use ringway::control::switch::Switch;
use ringway::guest::traffic::{Checker, Flow, Mac, station};
use ringway::guest::{Guest, Options, QueuePair};
use tempfile::TempDir;

/// How long anything may take: generous, as tests share two CPUs with polling workers.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// Everybody.
pub const BROADCAST: Mac = [0xff; 6];

/// A running switch, its sockets in a folder of their own.
pub struct Net {
    switch: Arc<Switch>,
    dir: TempDir,
    sent: Arc<AtomicU64>,
}

impl Net {
    /// A switch with these ports in one bridge, on one worker that sleeps when there is nothing to do.
    pub fn with_ports(names: &[&str]) -> Result<Net> {
        Net::start(names, |_| ())
    }

    /// The same, with a configuration that `change` has had a hand in.
    pub fn start(names: &[&str], change: impl FnOnce(&mut Config)) -> Result<Net> {
        let dir = tempfile::tempdir()?;
        let spec =
            |name: &&str| PortSpec::vhost_user(*name, dir.path().join(format!("{name}.sock")));
        let mut config = Config {
            workers: Workers::Cpus(vec![last_cpu()]),
            idle: Idle::Adaptive,
            ports: names.iter().map(spec).collect(),
            ..Config::default()
        };
        change(&mut config);
        let cpus = match &config.workers {
            Workers::Cpus(cpus) => cpus.clone(),
            Workers::Count(count) => (0..*count).collect(),
        };
        let switch = Switch::start(config, &cpus)?;
        Ok(Net {
            switch,
            dir,
            sent: Arc::default(),
        })
    }

    /// The switch itself.
    pub fn switch(&self) -> &Arc<Switch> {
        &self.switch
    }

    /// The socket of a port.
    pub fn socket(&self, name: &str) -> PathBuf {
        self.dir.path().join(format!("{name}.sock"))
    }

    /// A guest with default options at each of these ports.
    pub fn attach<const N: usize>(&self, names: [&str; N]) -> Result<[Station; N]> {
        let stations: Vec<Station> = names
            .iter()
            .map(|name| self.attach_as(name, |options| options))
            .collect::<Result<_>>()?;
        stations
            .try_into()
            .map_err(|_| anyhow::anyhow!("as many stations as names"))
    }

    /// A guest with options that `change` has had a hand in. When this returns the port forwards.
    pub fn attach_as(
        &self,
        name: &str,
        change: impl FnOnce(Options) -> Options,
    ) -> Result<Station> {
        self.attach_at(name, change(Options::new(self.socket(name))))
    }

    /// A guest with these options, which name the socket of port `name`.
    pub fn attach_at(&self, name: &str, options: Options) -> Result<Station> {
        let mut guest = Guest::new(options)?;
        let pairs = guest
            .attach()
            .with_context(|| format!("guest at port {name:?}"))?;
        self.wait_state(name, PortState::Forwarding)?;
        let number = name.bytes().fold(7u32, |sum, byte| {
            sum.wrapping_mul(31).wrapping_add(byte.into())
        });
        let (sent, inbox) = (self.sent.clone(), VecDeque::new());
        Ok(Station {
            guest,
            pairs,
            name: name.to_owned(),
            mac: station(number),
            sent,
            inbox,
        })
    }

    /// Counts what a station sends from now on in this switch's books: it came from another switch.
    pub fn adopt(&self, station: &mut Station) {
        station.sent = self.sent.clone();
    }

    /// A port as `ringway port show` would tell it.
    pub fn port(&self, name: &str) -> Result<PortStatus> {
        Ok(self.switch.port(name)?)
    }

    /// Waits until a port is in this state.
    pub fn wait_state(&self, name: &str, state: PortState) -> Result<PortStatus> {
        let end = Instant::now() + PATIENCE;
        loop {
            let port = self.port(name)?;
            if port.state == state {
                return Ok(port);
            }
            ensure!(
                Instant::now() < end,
                "port {name:?} did not become {state}: {port:?}"
            );
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Waits until the switch has taken every frame that was sent, and checks the books: nothing was lost that it did not count.
    pub fn settle(&self) -> Result<()> {
        let end = Instant::now() + PATIENCE;
        loop {
            let (total, sent) = (self.switch.stats().total, self.sent.load(Ordering::Relaxed));
            let dropped: u64 = total.dropped.values().sum();
            let balanced = total.received + total.replicated == total.sent + dropped;
            if balanced && total.received == sent {
                return Ok(());
            }
            if Instant::now() >= end {
                bail!("the guests sent {sent} frames, the books do not balance: {total:?}");
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Waits until a port has put its guest out, and returns the reason it gives.
    pub fn wait_put_out(&self, name: &str) -> Result<String> {
        let end = Instant::now() + PATIENCE;
        loop {
            let port = self.port(name)?;
            let there = matches!(port.state, PortState::Forwarding | PortState::Connected);
            if !there && let Some(reason) = port.reason {
                return Ok(reason);
            }
            ensure!(
                Instant::now() < end,
                "port {name:?} kept its guest: {:?}, {:?}",
                port.state,
                port.reason
            );
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Sends from one station to another, without pause and from a thread of its own, until [`Stream::finish`].
    pub fn stream(&self, from: Station, to: Station) -> Stream {
        let stop = Arc::new(AtomicBool::new(false));
        let (told, frames) = (stop.clone(), Arc::new(AtomicU64::new(0)));
        let counted = frames.clone();
        let thread = std::thread::spawn(move || stream(from, to, &told, &counted));
        Stream {
            stop,
            frames,
            thread,
        }
    }

    /// Frames that guests sent without a [`Station`].
    pub fn count_sent(&self, frames: u64) {
        self.sent.fetch_add(frames, Ordering::Relaxed);
    }

    /// Frames dropped for this reason so far.
    pub fn dropped(&self, reason: &str) -> u64 {
        self.switch
            .stats()
            .total
            .dropped
            .get(reason)
            .copied()
            .unwrap_or(0)
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        self.switch.stop();
    }
}

/// Sends `frames` frames of `len` bytes from one guest's queue to another's, at most `window` of them on their way. Every one must
/// come, once, in order and unchanged, and nothing else.
pub fn exchange(
    from: &mut QueuePair,
    to: &mut QueuePair,
    frames: u64,
    len: usize,
    window: u64,
) -> Result<()> {
    let foreign = exchange_among_others(from, to, frames, len, window)?;
    ensure!(foreign == 0, "{foreign} frames of others");
    Ok(())
}

/// The same where others are heard too; says how many frames were theirs.
pub fn exchange_among_others(
    from: &mut QueuePair,
    to: &mut QueuePair,
    frames: u64,
    len: usize,
    window: u64,
) -> Result<u64> {
    let mut flow = Flow::new(1, station(1), station(2), len);
    let mut checker = Checker::new(1, 1, 1);
    let end = Instant::now() + 3 * PATIENCE;
    while checker.tally().received < frames {
        let room = (frames - flow.sent()).min(window - (flow.sent() - checker.tally().received));
        from.tx.send(room as usize, |slot| flow.write(slot, 1));
        to.rx.receive(|frame| checker.check(frame, 2));
        ensure!(
            Instant::now() < end,
            "{} sent, found {:?}",
            flow.sent(),
            checker.tally()
        );
    }
    faultless(&checker, &flow)?;
    Ok(checker.tally().foreign)
}

fn faultless(checker: &Checker, flow: &Flow) -> Result<()> {
    let tally = checker.tally();
    let wrong = tally.missing + tally.corrupted + tally.duplicated + tally.reordered;
    ensure!(wrong == 0, "{} sent, found {tally:?}", flow.sent());
    Ok(())
}

/// Innocent neighbours: a stream of frames between two ports, of which none may be lost whatever other ports do.
pub struct Stream {
    stop: Arc<AtomicBool>,
    frames: Arc<AtomicU64>,
    thread: JoinHandle<Result<()>>,
}

impl Stream {
    /// Waits until the stream has moved a good many frames more.
    pub fn wait_more(&self) -> Result<()> {
        let (end, goal) = (
            Instant::now() + PATIENCE,
            self.frames.load(Ordering::Relaxed) + 1000,
        );
        while self.frames.load(Ordering::Relaxed) < goal {
            ensure!(
                Instant::now() < end && !self.thread.is_finished(),
                "the innocents' stream stands still"
            );
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    /// Ends the stream: every frame must have come, once, in order and unchanged.
    pub fn finish(self) -> Result<()> {
        self.wait_more()?;
        self.stop.store(true, Ordering::Relaxed);
        let ended = self
            .thread
            .join()
            .map_err(|_| anyhow::anyhow!("the stream panicked"))?;
        ended.context("an innocent pair")
    }
}

fn stream(mut from: Station, mut to: Station, stop: &AtomicBool, frames: &AtomicU64) -> Result<()> {
    const WINDOW: u64 = 64;
    let mut flow = Flow::new(1, from.mac, to.mac, 128);
    let mut checker = Checker::new(1, 1, 1);
    let mut progress = Instant::now();
    loop {
        let received = checker.tally().received;
        let over = stop.load(Ordering::Relaxed);
        let room = if over {
            0
        } else {
            WINDOW - (flow.sent() - received)
        };
        let sent = from.pairs[0]
            .tx
            .send(room as usize, |slot| flow.write(slot, 1));
        from.sent.fetch_add(sent as u64, Ordering::Relaxed);
        let got = to.pairs[0].rx.receive(|frame| checker.check(frame, 2));
        from.pairs[0].rx.receive(|_| ());
        frames.fetch_add(got as u64, Ordering::Relaxed);
        if over && received == flow.sent() {
            break;
        }
        if got > 0 {
            progress = Instant::now();
        } else {
            ensure!(
                progress.elapsed() < PATIENCE,
                "{} sent, then silence: {:?}",
                flow.sent(),
                checker.tally()
            );
            std::thread::yield_now();
        }
    }
    faultless(&checker, &flow)
}

/// The CPU of workers in tests: the last one, as the kernel keeps house on the first.
pub fn last_cpu() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from) - 1
}

/// A guest with an address and an inbox.
pub struct Station {
    /// The guest.
    pub guest: Guest,
    /// Its queues.
    pub pairs: Vec<QueuePair>,
    name: String,
    mac: Mac,
    sent: Arc<AtomicU64>,
    inbox: VecDeque<Vec<u8>>,
}

impl Station {
    /// Its address.
    pub fn mac(&self) -> Mac {
        self.mac
    }

    /// Sends a frame through the first queue.
    pub fn send(&mut self, frame: &[u8]) -> Result<()> {
        self.send_through(0, frame)
    }

    /// Sends a frame through queue `pair`.
    pub fn send_through(&mut self, pair: usize, frame: &[u8]) -> Result<()> {
        let end = Instant::now() + PATIENCE;
        let tx = &mut self.pairs[pair].tx;
        while tx.send(1, |slot| {
            slot.write(0, frame);
            frame.len()
        }) == 0
        {
            ensure!(
                Instant::now() < end,
                "{}: no free buffer to send from",
                self.name
            );
            std::thread::yield_now();
        }
        self.sent.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    /// Connects the same guest again, with fresh rings.
    pub fn attach_again(&mut self) -> Result<()> {
        self.pairs = self.guest.attach()?;
        Ok(())
    }

    /// Whatever has come by now, through any queue.
    pub fn look(&mut self) {
        for pair in &mut self.pairs {
            while pair
                .rx
                .receive(|frame| self.inbox.push_back(frame.to_vec()))
                > 0
            {}
        }
    }

    /// The next frame.
    pub fn receive(&mut self) -> Result<Vec<u8>> {
        let end = Instant::now() + PATIENCE;
        loop {
            self.look();
            if let Some(frame) = self.inbox.pop_front() {
                return Ok(frame);
            }
            ensure!(Instant::now() < end, "{} received nothing", self.name);
            std::thread::yield_now();
        }
    }

    /// The next frame must be this one.
    pub fn expect(&mut self, frame: &[u8]) -> Result<()> {
        let got = self.receive()?;
        ensure!(
            got == frame,
            "{}: received {}, expected {}",
            self.name,
            short(&got),
            short(frame)
        );
        Ok(())
    }

    /// Nothing has come. Only after [`Net::settle`] this means that nothing will.
    pub fn expect_nothing(&mut self) -> Result<()> {
        self.look();
        match self.inbox.front() {
            Some(frame) => bail!("{}: received {}, expected nothing", self.name, short(frame)),
            None => Ok(()),
        }
    }
}

fn short(frame: &[u8]) -> String {
    let head: Vec<String> = frame
        .iter()
        .take(24)
        .map(|byte| format!("{byte:02x}"))
        .collect();
    format!("{} bytes {}…", frame.len(), head.join(" "))
}

/// A frame with this payload, 60 bytes at least, of the EtherType for local experiments.
pub fn frame(to: Mac, from: Mac, payload: &[u8]) -> Vec<u8> {
    let mut bytes = [&to[..], &from, &[0x88, 0xb5], payload].concat();
    bytes.resize(bytes.len().max(60), 0);
    bytes
}
