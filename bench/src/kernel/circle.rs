//! The helper that generates: two containers, a polling thread each. A number of frames circulates, or one sends and the other counts.

use std::fs::File;
use std::io::{BufRead, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use anyhow::{Context, Result, ensure};
use crossbeam::utils::CachePadded;
use ringway::dataplane::clock::tsc;
use serde::{Deserialize, Serialize};

use super::namespaces::INTERFACE;
use super::socket::{self, BURST_MAX, Burst, Packets};
use super::wire;
use crate::process::pin;

/// Plays two containers in these namespaces until its standard input ends.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Circle {
    /// Their namespaces
    #[arg(long = "container", required = true)]
    containers: Vec<PathBuf>,
    /// The CPU of each
    #[arg(long = "cpu", required = true)]
    cpus: Vec<usize>,
    /// The CPU of the commands
    #[arg(long)]
    control_cpu: usize,
    /// Bytes of a frame
    #[arg(long)]
    frame: usize,
    /// Frames per system call
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=BURST_MAX as i64))]
    burst: u16,
    /// Frames that each container puts into the circle
    #[arg(long, default_value_t = 0)]
    in_flight: u64,
    /// Instead of a circle: the first sends from so many stations, the second receives
    #[arg(long, default_value_t = 0)]
    stations: u32,
}

/// What it says when asked.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Look {
    /// Time stamp counter.
    pub(crate) now: u64,
    /// Frames received by each container.
    pub(crate) received: Vec<u64>,
    /// Frames sent by both.
    pub(crate) sent: u64,
    /// TSC cycles of turns with frames, the kernel's work included, both threads together.
    pub(crate) busy: u64,
    /// Why a thread ended.
    pub(crate) failed: Option<String>,
}

/// What a thread counts.
#[derive(Default)]
struct Counters {
    received: AtomicU64,
    sent: AtomicU64,
    busy: AtomicU64,
}

/// What the threads share with the one that is asked.
#[derive(Default)]
struct Shared {
    begin: AtomicBool,
    counters: [CachePadded<Counters>; 2],
    failed: std::sync::Mutex<Option<String>>,
}

/// Runs the subcommand.
pub(crate) fn run(options: &Circle) -> Result<()> {
    ensure!(
        options.containers.len() == 2 && options.cpus.len() == 2,
        "two containers and two CPUs"
    );
    ensure!(
        options.frame >= wire::HEAD,
        "frames of {} bytes at least",
        wire::HEAD
    );
    let shared = Arc::<Shared>::default();
    for me in 0..2 {
        let (options, shared) = (options.clone(), shared.clone());
        let packets = open(&options.containers[me])?;
        std::thread::Builder::new()
            .name(format!("container{me}"))
            .spawn(move || {
                if let Err(error) = play(me, &packets, &options, &shared) {
                    let mut failed = shared.failed.lock().unwrap_or_else(|it| it.into_inner());
                    failed.get_or_insert(format!("{error:#}"));
                }
            })
            .context("a thread")?;
    }
    pin(&[options.control_cpu])?;
    println!("ready");
    std::io::stdout().flush()?;
    for line in std::io::stdin().lock().lines() {
        if line? == "begin" {
            // Release: nothing else is published with it, the sockets are open.
            shared.begin.store(true, Ordering::Release);
        }
        println!("{}", serde_json::to_string(&look(&shared))?);
        std::io::stdout().flush()?;
    }
    Ok(())
}

/// Opens a packet socket in a namespace, from a thread of its own: the caller stays where it is.
pub(crate) fn open(namespace: &Path) -> Result<Packets> {
    let path = namespace.to_owned();
    let opened = std::thread::spawn(move || -> Result<Packets> {
        let namespace = File::open(&path).with_context(|| path.display().to_string())?;
        socket::enter(namespace.as_fd()).context("entering a container's namespace")?;
        Packets::open(INTERFACE).context("a packet socket")
    });
    opened
        .join()
        .unwrap_or_else(|_| anyhow::bail!("the thread that opens sockets ended"))
}

fn look(shared: &Shared) -> Look {
    let sum = |value: fn(&Counters) -> &AtomicU64| -> u64 {
        // Relaxed: statistics.
        let values = shared
            .counters
            .iter()
            .map(|it| value(it).load(Ordering::Relaxed));
        values.sum()
    };
    let received = shared
        .counters
        .iter()
        .map(|it| it.received.load(Ordering::Relaxed));
    Look {
        now: tsc(),
        received: received.collect(),
        sent: sum(|it| &it.sent),
        busy: sum(|it| &it.busy),
        failed: shared
            .failed
            .lock()
            .unwrap_or_else(|it| it.into_inner())
            .clone(),
    }
}

/// A container's thread; it ends with the process.
fn play(me: usize, packets: &Packets, options: &Circle, shared: &Shared) -> Result<()> {
    pin(&[options.cpus[me]])?;
    while !shared.begin.load(Ordering::Acquire) {
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    let mine = &shared.counters[me];
    let mut burst = Burst::new(options.frame);
    if options.stations > 0 && me == 0 {
        return flood(packets, &mut burst, options, mine);
    }
    if options.stations == 0 {
        let mut left = options.in_flight;
        while left > 0 {
            let some = left.min(u64::from(options.burst)) as usize;
            for at in 0..some {
                wire::write(burst.resize(at, options.frame), me, 1 - me);
            }
            send(packets, &mut burst, some, mine)?;
            left -= some as u64;
        }
    }
    loop {
        let began = tsc();
        let got = packets.receive(&mut burst, usize::from(options.burst))?;
        if got == 0 {
            std::hint::spin_loop();
            continue;
        }
        mine.received.fetch_add(got as u64, Ordering::Relaxed);
        if options.stations == 0 {
            for at in 0..got {
                wire::turn_round(burst.frame(at));
            }
            send(packets, &mut burst, got, mine)?;
        }
        mine.busy.fetch_add(tsc() - began, Ordering::Relaxed);
    }
}

/// Sends all of them; what the kernel does not take yet is tried again.
fn send(packets: &Packets, burst: &mut Burst, count: usize, mine: &Counters) -> Result<()> {
    // Counted before: the other container may have them before this call is over.
    mine.sent.fetch_add(count as u64, Ordering::Relaxed);
    let mut sent = 0;
    while sent < count {
        sent += packets.send(burst, sent..count)?;
    }
    Ok(())
}

/// As fast as it can, from ever other stations, in no order.
fn flood(packets: &Packets, burst: &mut Burst, options: &Circle, mine: &Counters) -> Result<()> {
    let count = usize::from(options.burst);
    for at in 0..count {
        wire::write(burst.resize(at, options.frame), 0, 1);
    }
    let mut number = 0u32;
    loop {
        let began = tsc();
        for at in 0..count {
            // An odd multiplier visits every number below 2^32 once; the remainder spreads them over the stations.
            let station = number.wrapping_mul(0x9e37_79b1) % options.stations;
            wire::set_station(burst.frame(at), station);
            number = number.wrapping_add(1);
        }
        send(packets, burst, count, mine)?;
        mine.busy.fetch_add(tsc() - began, Ordering::Relaxed);
    }
}
