//! The placement sentinel: how far apart are the two CPUs right now?
//!
//! A hypervisor moves virtual CPUs between physical cores, some of which share a cache and some of which do not. It
//! tells nobody, it does so within seconds, and it changes every figure of a switch by 1.4 to 3 times, the ranking of
//! the switches included. Two pinned threads that hand one cache line back and forth see it at once.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Barrier, OnceLock};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use ringway::dataplane::clock::tsc;
use serde::{Deserialize, Serialize};

use crate::process::pin;

/// Below this many nanoseconds per round trip the CPUs share a cache (75–105 were measured).
pub(crate) const NEAR_BELOW_NS: f64 = 140.0;
/// Above this many they do not (340–430 were measured). In between nothing is known.
pub(crate) const FAR_ABOVE_NS: f64 = 300.0;
/// No cache line takes that long: something else ran on one of the CPUs.
const BUSY_ABOVE_NS: f64 = 2000.0;

/// Round trips per chunk: 10 µs near, 40 µs far. The median of the chunks forgives a thread that was preempted.
const CHUNK: u64 = 100;
/// Steps of the clock chain in each of its pieces: four cycles each, so 10 M cycles or about 2.5 ms a piece.
const CHAIN_STEPS: u64 = 2_500_000;
/// Cycles of one step of the clock chain: an xor (1) that waits for a 64-bit multiplication (3).
const CHAIN_CYCLES: f64 = 4.0;
/// Written into the ball to end the game.
const STOP: u64 = u64::MAX;

/// What two CPUs are to each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Placement {
    /// They share a cache.
    Near,
    /// They do not.
    Far,
    /// In between, or it changed: such a sample says nothing.
    Mixed,
}

impl Placement {
    /// One reading's placement.
    pub(crate) fn of(round_trip_ns: f64) -> Self {
        if round_trip_ns < NEAR_BELOW_NS {
            Self::Near
        } else if round_trip_ns > FAR_ABOVE_NS && round_trip_ns < BUSY_ABOVE_NS {
            Self::Far
        } else {
            Self::Mixed
        }
    }

    /// The placement of what happened between two readings.
    pub(crate) fn between(before: f64, after: f64) -> Self {
        match (Self::of(before), Self::of(after)) {
            (before, after) if before == after => before,
            _ => Self::Mixed,
        }
    }

    /// Its name in tables.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Near => "near",
            Self::Far => "far",
            Self::Mixed => "mixed",
        }
    }
}

/// One look at the two CPUs.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Reading {
    /// Nanoseconds per round trip of a cache line, the median of the chunks.
    pub(crate) round_trip_ns: f64,
    /// The real clock of each core while both work: low means throttled, or a busy sibling.
    pub(crate) clock_ghz: [f64; 2],
}

/// The line that goes back and forth, alone in the pair of lines that a prefetcher fetches together.
#[repr(align(128))]
struct Ball(AtomicU64);

/// Measures for about `time`, with a thread pinned to each of the two CPUs.
pub(crate) fn look(cpus: [usize; 2], time: Duration) -> Result<Reading> {
    if cpus[0] == cpus[1] {
        bail!(
            "the sentinel needs two different CPUs, not CPU {} twice",
            cpus[0]
        );
    }
    let ball = Ball(AtomicU64::new(0));
    let places = Places {
        taken: Barrier::new(2),
        missing: AtomicBool::new(false),
    };
    let (here, there) = std::thread::scope(|scope| {
        let server = scope.spawn(|| -> Result<(f64, f64)> {
            places.take(cpus[0])?;
            Ok((core_clock_ghz(), serve(&ball.0, time)))
        });
        let other = scope.spawn(|| -> Result<f64> {
            places.take(cpus[1])?;
            let clock = core_clock_ghz();
            give_back(&ball.0);
            Ok(clock)
        });
        (server.join(), other.join())
    });
    let here = here.expect("the sentinel's threads do not panic");
    let other_clock = there.expect("the sentinel's threads do not panic");
    let ((clock, round_trip_ns), other_clock) = match (here, other_clock) {
        (Ok(here), Ok(there)) => (here, there),
        (Err(error), Ok(_)) | (Ok(_), Err(error)) => return Err(error),
        (Err(one), Err(other)) => {
            return Err(if one.to_string() == OTHER_FAILED {
                other
            } else {
                one
            });
        }
    };
    if round_trip_ns.is_nan() {
        bail!(
            "CPUs {} and {} were too busy for the sentinel",
            cpus[0],
            cpus[1]
        );
    }
    Ok(Reading {
        round_trip_ns,
        clock_ghz: [clock, other_clock],
    })
}

/// Both threads pin themselves before the game; if one cannot, none plays.
struct Places {
    taken: Barrier,
    missing: AtomicBool,
}

impl Places {
    fn take(&self, cpu: usize) -> Result<()> {
        let pinned = pin(&[cpu]).with_context(|| format!("CPU {cpu}: cannot be used"));
        // Relaxed: the barrier orders it.
        self.missing.fetch_or(pinned.is_err(), Ordering::Relaxed);
        self.taken.wait();
        pinned?;
        if self.missing.load(Ordering::Relaxed) {
            Err(anyhow!(OTHER_FAILED))
        } else {
            Ok(())
        }
    }
}

/// The error of the thread whose own CPU was fine; the other one's tells more.
const OTHER_FAILED: &str = "the other CPU cannot be used";

/// Serves odd numbers and waits for the even answer; nanoseconds per round trip, NaN without one finished chunk.
fn serve(ball: &AtomicU64, time: Duration) -> f64 {
    let begin = Instant::now();
    let mut chunks = Vec::with_capacity(4096);
    let mut value = 0;
    // Acquire, Release: the other thread's stores and loads in `give_back`.
    'game: while begin.elapsed() < time && chunks.len() < chunks.capacity() {
        let chunk = Instant::now();
        for _ in 0..CHUNK {
            ball.store(value + 1, Ordering::Release);
            value += 2;
            // Bare loads: with a pause instruction near and far lie closer together.
            loop {
                let seen = ball.load(Ordering::Acquire);
                if seen == value {
                    break;
                } else if seen == STOP {
                    break 'game;
                }
            }
        }
        chunks.push(chunk.elapsed().as_nanos() as f64 / CHUNK as f64);
    }
    ball.store(STOP, Ordering::Release);
    median(&mut chunks).unwrap_or(f64::NAN)
}

/// Answers every odd number with the next even one until the game ends.
fn give_back(ball: &AtomicU64) {
    // Acquire, Release: the other thread's stores and loads in `serve`.
    loop {
        let seen = ball.load(Ordering::Acquire);
        if seen == STOP {
            return;
        }
        // A failed exchange means that the game ended meanwhile: the next load sees it.
        if seen & 1 == 1 {
            let _ = ball.compare_exchange(seen, seen + 1, Ordering::Release, Ordering::Relaxed);
        }
    }
}

/// The clock of the core it runs on, from a chain of instructions that wait for each other.
fn core_clock_ghz() -> f64 {
    let mut pieces: Vec<f64> = (0..4)
        .map(|_| {
            let begin = Instant::now();
            let mut x = std::hint::black_box(1u64);
            for step in 0..CHAIN_STEPS {
                x = (x ^ step).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            }
            std::hint::black_box(x);
            CHAIN_STEPS as f64 * CHAIN_CYCLES / begin.elapsed().as_nanos() as f64
        })
        .collect();
    median(&mut pieces).unwrap_or(f64::NAN)
}

/// The middle value (the mean of the two in the middle); none of nothing.
pub(crate) fn median(values: &mut [f64]) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => None,
        odd if odd % 2 == 1 => Some(values[middle]),
        _ => Some(f64::midpoint(values[middle - 1], values[middle])),
    }
}

/// Cycles per second of the time stamp counter, the unit of every "cycles per frame"; measured once, for 50 ms.
pub(crate) fn tsc_hz() -> f64 {
    static HZ: OnceLock<f64> = OnceLock::new();
    *HZ.get_or_init(|| {
        let (begin, first) = (Instant::now(), tsc());
        std::thread::sleep(Duration::from_millis(50));
        let (time, last) = (begin.elapsed(), tsc());
        last.wrapping_sub(first) as f64 / time.as_secs_f64()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reading_is_near_far_or_unknown() {
        assert_eq!(Placement::of(75.0), Placement::Near);
        assert_eq!(Placement::of(139.9), Placement::Near);
        assert_eq!(Placement::of(140.0), Placement::Mixed);
        assert_eq!(Placement::of(300.0), Placement::Mixed);
        assert_eq!(Placement::of(430.0), Placement::Far);
        assert_eq!(
            Placement::of(20_000.0),
            Placement::Mixed,
            "somebody else was on the CPU"
        );
    }

    #[test]
    fn a_sample_is_near_only_if_both_readings_are() {
        assert_eq!(Placement::between(80.0, 100.0), Placement::Near);
        assert_eq!(Placement::between(350.0, 420.0), Placement::Far);
        assert_eq!(Placement::between(80.0, 380.0), Placement::Mixed);
        assert_eq!(Placement::between(200.0, 200.0), Placement::Mixed);
    }

    #[test]
    fn the_median_of_an_even_count_is_the_mean_of_the_middle_two() {
        assert_eq!(median(&mut []), None);
        assert_eq!(median(&mut [3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(&mut [4.0, 1.0, 3.0, 2.0]), Some(2.5));
    }

    #[test]
    fn the_sentinel_refuses_one_cpu_twice_and_a_cpu_that_does_not_exist() {
        assert!(look([0, 0], Duration::from_millis(1)).is_err());
        let error = look([0, 1023], Duration::from_millis(1)).unwrap_err();
        assert_eq!(error.to_string(), "CPU 1023: cannot be used");
    }

    #[test]
    fn a_look_at_two_cpus_gives_a_time_and_two_clocks() {
        if std::thread::available_parallelism().map_or(1, |n| n.get()) < 2 {
            eprintln!("skipped: one CPU only");
            return;
        }
        let reading = look([0, 1], Duration::from_millis(20)).unwrap();
        assert!(reading.round_trip_ns > 10.0, "{reading:?}");
        assert!(
            reading
                .clock_ghz
                .iter()
                .all(|clock| (0.1..10.0).contains(clock)),
            "{reading:?}"
        );
    }
}
