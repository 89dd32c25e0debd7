//! Cycles per frame of the driver alone: receive, copy to another VF's transmit ring, give back, publish.
//!
//! `cargo bench -p vfio-pmd`. Two VFs of the model (`model/`) lie in one process. The driver runs on the first CPU and forwards what
//! VF B receives through VF A, which is looped back to B; the model moves the frames on the second CPU. Only our calls are timed,
//! with the TSC, and only when the model says that a whole burst waits: no turn is empty, none waits. "own core" lets the model
//! run on the driver's CPU between the timed calls: its lines are then warm, and what is left are our instructions.
//!
//! A virtual machine moves its CPUs. Before and after each sample a cache line goes to the other core and back, 20,000 times: `near` are
//! samples with less than 140 ns at both ends, `far` those with more than 300; others are thrown away.
//!
//! `cargo bench -p vfio-pmd -- 60/64 60/64/own` measures these rows only.
#![allow(unsafe_code)] // the time stamp counter

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::*};
use std::time::{Duration, Instant};

use vf_model::{Config, InProcess, Nic, VfPolicy};
use vfio_pmd::{Options, QueuePair, Vf};

const A: [u8; 6] = [2, 0, 0, 0, 0, 0xA];
const B: [u8; 6] = [2, 0, 0, 0, 0, 0xB];
/// Frames on their way round.
const DEPTH: usize = 256;
const SAMPLE: Duration = Duration::from_millis(50);
const SAMPLES: usize = 31;
/// A line goes to the other core and back in less than so many nanoseconds: both belong to one cluster.
const NEAR: f64 = 140.0;
/// In more: they belong to different ones.
const FAR: f64 = 300.0;

/// `(frame, burst, the model runs on the other core)`
const ROWS: &[(usize, usize, bool)] = &[
    (60, 64, true),
    (60, 32, true),
    (60, 16, true),
    (60, 8, true),
    (60, 1, true),
    (256, 64, true),
    (1514, 64, true),
    (60, 64, false),
    (60, 8, false),
    (1514, 64, false),
];

/// What the two cores tell one another, each word on lines of its own.
#[derive(Default)]
struct Board {
    /// Frames the model has moved so far.
    moved: Line<AtomicU64>,
    order: Line<AtomicUsize>,
    ball: Line<AtomicU64>,
}

#[derive(Default)]
#[repr(align(128))]
struct Line<T>(T);

// What the second core does.
const REST: usize = 0;
const MOVE: usize = 1;
const RETURN_BALL: usize = 2;
const END: usize = 3;

fn main() {
    let cpus = core_affinity::get_core_ids().unwrap_or_default();
    let [first, second, ..] = cpus[..] else {
        println!("SKIPPED: two CPUs are needed");
        return;
    };
    core_affinity::set_for_current(first);
    let mhz = tsc_mhz();
    let wanted: Vec<String> = std::env::args()
        .skip(1)
        .filter(|word| !word.starts_with('-'))
        .collect();
    println!("TSC {mhz} MHz; cycles per frame, median [least-most] of the samples");
    println!("frame  burst model       line    n |      total           |   lend   push   rest");
    for &(frame, burst, apart) in ROWS {
        let name = format!("{frame}/{burst}{}", if apart { "" } else { "/own" });
        if wanted.is_empty() || wanted.contains(&name) {
            for (line, samples) in measure(frame, burst, apart, second, mhz) {
                show(
                    &format!(
                        "{frame:5} {burst:6} {:10} {line:5}",
                        if apart { "other core" } else { "own core" }
                    ),
                    &samples,
                );
            }
        }
    }
}

/// Cycles per frame: all, lend, push, and the rest: give back and publish.
type Sample = [f64; 4];

fn show(row: &str, samples: &[Sample]) {
    let [mut total, mut lend, mut push, mut rest] = [0, 1, 2, 3].map(|part| {
        samples
            .iter()
            .map(|sample| sample[part])
            .collect::<Vec<f64>>()
    });
    if total.is_empty() {
        return;
    }
    let middle = median(&mut total);
    println!(
        "{row} {:4} | {middle:6.1} [{:6.1}-{:6.1}] | {:6.1} {:6.1} {:6.1}",
        total.len(),
        total[0],
        total[total.len() - 1],
        median(&mut lend),
        median(&mut push),
        median(&mut rest),
    );
}

/// Samples of one row, by how far the cores were from one another before and after each.
fn measure(
    frame: usize,
    burst: usize,
    apart: bool,
    second: core_affinity::CoreId,
    mhz: u64,
) -> [(&'static str, Vec<Sample>); 2] {
    let policy = |mac| VfPolicy {
        mac: Some(mac),
        trusted: true,
        spoof_check: false,
        ..VfPolicy::default()
    };
    let nic = Nic::new(Config::for_tests(vec![policy(A), policy(B)]));
    let board = Arc::new(Board::default());
    let model = {
        let (nic, board) = (Arc::clone(&nic), Arc::clone(&board));
        std::thread::spawn(move || {
            core_affinity::set_for_current(second);
            serve(&nic, &board);
        })
    };
    let mut ring = Loop::new(&nic, frame);
    let (mut near, mut far) = (Vec::new(), Vec::new());
    let mut before = round_trip(&board) * 1000.0 / mhz as f64;
    for _ in 0..SAMPLES {
        board
            .order
            .0
            .store(if apart { MOVE } else { REST }, Release);
        let sample = ring.sample(burst, || {
            if apart {
                board.moved.0.load(Acquire)
            } else {
                board.moved.0.fetch_add(nic.step() as u64, Relaxed) // one call behind, which does no harm
            }
        });
        let after = round_trip(&board) * 1000.0 / mhz as f64;
        if before.max(after) < NEAR {
            near.push(sample);
        } else if before.min(after) > FAR {
            far.push(sample);
        }
        before = after;
    }
    board.order.0.store(END, Release);
    model.join().expect("the model's thread");
    [("near", near), ("far", far)]
}

/// The second core.
fn serve(nic: &Nic, board: &Board) {
    loop {
        match board.order.0.load(Acquire) {
            MOVE => match nic.step() {
                0 => std::hint::spin_loop(),
                moved => {
                    board.moved.0.fetch_add(moved as u64, Release);
                }
            },
            RETURN_BALL => {
                let ball = board.ball.0.load(Acquire);
                if ball % 2 == 1 {
                    board.ball.0.store(ball + 1, Release);
                }
            }
            END => return,
            _ => std::hint::spin_loop(),
        }
    }
}

/// Cycles for a cache line to go to the other core and back.
fn round_trip(board: &Board) -> f64 {
    const TURNS: u64 = 20_000;
    board.order.0.store(RETURN_BALL, Release);
    let mut cycles = 0;
    for turn in 0..2 * TURNS {
        if turn == TURNS {
            cycles = cycles_now();
        }
        let ball = board.ball.0.load(Acquire);
        board.ball.0.store(ball + 1, Release);
        while board.ball.0.load(Acquire) != ball + 2 {}
    }
    (cycles_now() - cycles) as f64 / TURNS as f64
}

/// Two VFs and the frames that go round between them.
struct Loop {
    a: QueuePair,
    b: QueuePair,
    taken: u64,
    _vfs: [Vf; 2],
}

impl Loop {
    fn new(nic: &Arc<Nic>, frame: usize) -> Loop {
        let open = |vf| {
            let transport = InProcess::open(nic, vf).expect("a VF of the model");
            let mut vf = Vf::open(transport, &Options::default()).expect("opens");
            let pair = vf.start().expect("starts").remove(0);
            (vf, pair)
        };
        let ((vf_a, mut a), (vf_b, b)) = (open(0), open(1));
        let bytes = [&B[..], &A, &[0x88, 0xB5], &vec![0x5A; frame - 14]].concat();
        for _ in 0..DEPTH {
            a.tx.push_bytes(&bytes).expect("room");
        }
        a.tx.publish();
        Loop {
            a,
            b,
            taken: 0,
            _vfs: [vf_a, vf_b],
        }
    }

    /// Forwards for a while; cycles per frame of each part. `moved` says how many frames the model has moved.
    fn sample(&mut self, burst: usize, mut moved: impl FnMut() -> u64) -> [f64; 4] {
        let (mut parts, mut frames) = ([0u64; 4], 0u64);
        let start = Instant::now();
        while start.elapsed() < SAMPLE {
            while moved() < self.taken + burst as u64 {
                std::hint::spin_loop();
            }
            let at = cycles_now();
            let lent = self.b.rx.lend(burst);
            let count = lent.count();
            let lend = cycles_now();
            for frame in lent.iter() {
                let _ = self.a.tx.push_frame(&frame);
            }
            let push = cycles_now();
            self.b.rx.give_back(count);
            self.a.tx.publish();
            // Stores wait for their lines behind our back: that is our time, too.
            std::sync::atomic::fence(SeqCst);
            let back = cycles_now();
            assert_eq!(count, burst, "the model said that a burst waits");
            self.taken += count as u64;
            // The first bursts of a sample find what the round trip before left behind.
            if start.elapsed() > SAMPLE / 10 {
                frames += count as u64;
                for (part, cycles) in
                    parts
                        .iter_mut()
                        .zip([back - at, lend - at, push - lend, back - push])
                {
                    *part += cycles;
                }
            }
        }
        parts.map(|cycles| cycles as f64 / frames.max(1) as f64)
    }
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn cycles_now() -> u64 {
    // SAFETY: reads a counter that every x86-64 has; nothing is accessed.
    unsafe { core::arch::x86_64::_rdtsc() }
}

fn tsc_mhz() -> u64 {
    let (start, cycles) = (Instant::now(), cycles_now());
    std::thread::sleep(Duration::from_millis(50));
    (cycles_now() - cycles) / start.elapsed().as_micros().max(1) as u64
}
