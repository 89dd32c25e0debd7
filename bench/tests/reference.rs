//! The same frames through Ringway and through the reference switch: both must deliver them to the same ports, unchanged.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use ringway::guest::traffic::station;
use ringway::guest::{Guest, Options, QueuePair};
use testkit::topology::{BROADCAST, Net, PATIENCE, frame};

const PORTS: usize = 4;

/// `ringway-bench reference` with a guest at each port.
struct Oracle {
    child: Child,
    guests: Vec<(Guest, QueuePair)>,
    _directory: tempfile::TempDir,
}

impl Oracle {
    fn start() -> Result<Oracle> {
        let directory = tempfile::tempdir()?;
        let sockets: Vec<PathBuf> = (0..PORTS)
            .map(|port| directory.path().join(port.to_string()))
            .collect();
        let mut command = Command::new(env!("CARGO_BIN_EXE_ringway-bench"));
        command.arg("reference");
        for socket in &sockets {
            command.arg("--socket").arg(socket);
        }
        let mut oracle = Oracle {
            child: command.spawn().context("ringway-bench reference")?,
            guests: Vec::new(),
            _directory: directory,
        };
        for socket in sockets {
            let mut options = Options::new(socket);
            (options.wait, options.patience) = (PATIENCE, PATIENCE);
            let mut guest = Guest::new(options)?;
            let pair = guest.attach()?.remove(0);
            oracle.guests.push((guest, pair));
        }
        Ok(oracle)
    }

    /// Sends a frame and returns the ports that got it. It has been forwarded when its buffer comes back.
    fn send(&mut self, from: usize, bytes: &[u8]) -> Result<BTreeSet<usize>> {
        let tx = &mut self.guests[from].1.tx;
        let sent = tx.send(1, |slot| {
            slot.write(0, bytes);
            bytes.len()
        });
        ensure!(sent == 1, "no room");
        let end = Instant::now() + PATIENCE;
        while tx.in_flight() > 0 {
            ensure!(Instant::now() < end, "the reference does not take a frame");
            std::thread::yield_now();
        }
        let mut got = BTreeSet::new();
        for (port, (_, pair)) in self.guests.iter_mut().enumerate() {
            let mut wrong = false;
            while pair.rx.receive(|frame| wrong |= frame.to_vec() != bytes) > 0 {
                ensure!(got.insert(port), "port {port} got a frame twice");
            }
            ensure!(!wrong, "port {port} got something else");
        }
        Ok(got)
    }
}

impl Drop for Oracle {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn ringway_delivers_where_the_reference_does() -> Result<()> {
    let names = ["a", "b", "c", "d"];
    let net = Net::with_ports(&names)?;
    let mut stations = net.attach(names)?;
    // Only known once both have seen every port: a guest that has just attached has not been kicked at yet.
    let mut oracle = Oracle::start()?;
    let end = Instant::now() + PATIENCE;
    for from in 0..PORTS {
        let hello = frame(BROADCAST, station(900 + from as u32), b"hello");
        while oracle.send(from, &hello)?.len() < PORTS - 1 {
            ensure!(
                Instant::now() < end,
                "port {from} does not reach all others"
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }
    let mut random = 0x2545_f491_4f6c_dd1du64;
    let mut next = |below: u64| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random % below
    };
    for number in 0..3000u32 {
        // Stations move between ports, unknown ones are asked for, some frames are to everybody, lengths differ.
        let (from, source) = (next(PORTS as u64) as usize, station(next(12) as u32));
        let to = match next(10) {
            0 => BROADCAST,
            1 => station(5000 + number),
            _ => station(next(12) as u32),
        };
        let mut payload = number.to_le_bytes().to_vec();
        payload.resize(50 + next(1400) as usize, number as u8);
        let bytes = frame(to, source, &payload);
        let expected = oracle.send(from, &bytes)?;
        stations[from].send(&bytes)?;
        net.settle()?;
        for (port, station) in stations.iter_mut().enumerate() {
            let what =
                format!("frame {number} from port {from}, port {port}; reference: {expected:?}");
            if expected.contains(&port) {
                station.expect(&bytes).context(what.clone())?;
            }
            station.expect_nothing().context(what)?;
        }
    }
    Ok(())
}
