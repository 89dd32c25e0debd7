//! Two VFs, one loop: every frame that arrives on one leaves on the other.
//!
//! ```text
//! cargo run --release -p vfio-pmd --example forward -- 0000:81:10.0 0000:81:10.2
//! cargo run --release -p vfio-pmd --example forward -- /tmp/vf0.sock /tmp/vf1.sock
//! ```
//!
//! A name with a `/` is a vfio-user socket, anything else a PCI address bound to `vfio-pci` (see README.md). The 82599 delivers to a
//! VF only frames for its addresses, broadcast, and the multicast it asked for: send to the addresses this prints.

use std::env;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vfio_pmd::transport::Transport;
use vfio_pmd::vfio::VfioPci;
use vfio_pmd::vfio_user::VfioUser;
use vfio_pmd::{Health, Options, QueuePair, Vf};

/// Frames per burst: 64 descriptors are sixteen cache lines.
const BURST: usize = 64;
/// How often link and mailbox are looked at.
const LOOK: Duration = Duration::from_millis(200);
/// Loops between two looks at the clock, which costs more than an empty loop.
const LOOPS: u32 = 1024;

/// One end: its device, and its queues while the PF lets it have them.
struct End {
    vf: Vf,
    pair: Option<QueuePair>,
    health: Option<Health>,
}

fn main() {
    let names: Vec<String> = env::args().skip(1).collect();
    let [left, right] = &names[..] else {
        eprintln!("usage: forward VF VF    (PCI address, or path of a vfio-user socket)");
        std::process::exit(2);
    };
    match (End::open(left), End::open(right)) {
        (Ok(left), Ok(right)) => forward([left, right]),
        (left, right) => {
            for error in [left.err(), right.err()].into_iter().flatten() {
                eprintln!("{error}");
            }
            std::process::exit(1);
        }
    }
}

fn forward(mut ends: [End; 2]) {
    let (mut forwarded, mut dropped) = (0u64, 0u64);
    let (mut looked, mut reported) = (Instant::now(), Instant::now());
    loop {
        // 1. Move frames: a burst from each end to the other.
        for _ in 0..LOOPS {
            let [left, right] = &mut ends;
            let (Some(left), Some(right)) = (&mut left.pair, &mut right.pair) else {
                break;
            };
            let (there, back) = (burst(left, right), burst(right, left));
            forwarded += there.0 + back.0;
            dropped += there.1 + back.1;
        }
        // 2. From time to time: how are the link and the PF?
        if looked.elapsed() >= LOOK {
            looked = Instant::now();
            ends.iter_mut().for_each(End::look);
        }
        // 3. Now and then: say what happened.
        if reported.elapsed() >= Duration::from_secs(5) {
            reported = Instant::now();
            println!("{forwarded} forwarded, {dropped} dropped");
            for end in &mut ends {
                println!("  {}: {:?}", end.vf.name(), end.vf.statistics());
            }
        }
    }
}

/// Lends a burst, copies it out, gives it back; two register writes, however many frames.
fn burst(from: &mut QueuePair, to: &mut QueuePair) -> (u64, u64) {
    let frames = from.rx.lend(BURST);
    let count = frames.count();
    if count == 0 {
        return (0, 0);
    }
    let mut sent = 0;
    for frame in frames.iter() {
        if to.tx.push_frame(&frame).is_ok() {
            sent += 1;
        }
    }
    from.rx.give_back(count);
    to.tx.publish();
    (sent, count as u64 - sent)
}

impl End {
    fn open(name: &str) -> Result<End, String> {
        let failed = |error: std::io::Error| format!("{name}: {error}");
        let transport: Arc<dyn Transport> = if name.contains('/') {
            VfioUser::open(Path::new(name)).map_err(failed)?
        } else {
            VfioPci::open(name).map_err(failed)?
        };
        let vf = Vf::open(transport, &Options::default()).map_err(|error| error.to_string())?;
        let mac = vf.mac().map(|byte| format!("{byte:02x}")).join(":");
        println!(
            "{name}: address {mac}, mailbox API {}, {} queues granted, frames up to {} bytes",
            vf.api(),
            vf.queues_granted(),
            vf.max_frame()
        );
        let mut end = End {
            vf,
            pair: None,
            health: None,
        };
        end.start().map_err(|error| error.to_string())?;
        Ok(end)
    }

    fn start(&mut self) -> vfio_pmd::Result<()> {
        self.pair = self.vf.start()?.into_iter().next();
        Ok(())
    }

    /// Looks after the device: if the PF forgot it, everything starts over.
    fn look(&mut self) {
        let health = self.vf.health();
        if self.health != Some(health) {
            println!("{}: {health:?}", self.vf.name());
            self.health = Some(health);
        }
        if let Health::Lost(_) = health {
            // The queues go first: their memory is taken from the device before it is reset.
            self.pair = None;
            if let Err(error) = self.vf.reset().and_then(|()| self.start()) {
                eprintln!("{error}");
            }
        }
    }
}
