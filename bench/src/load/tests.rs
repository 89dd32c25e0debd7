//! The generator against backends that do what is known: what it reports must be exactly that.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::fleet::Fleet;
use super::frames::{Frames, Pattern};
use super::frontends::{Frontends, Rings};
use super::outcome::Outcome;
use super::sender::{Lengths, Pace};
use super::trial::Trial;
use crate::backend::{Action, Backend, Fate, Kind};
use crate::results::Count;

struct Bed {
    _directory: tempfile::TempDir,
    sockets: Vec<PathBuf>,
    _backend: Backend,
}

fn bed(kind: Kind) -> Bed {
    let directory = tempfile::tempdir().unwrap();
    let sockets: Vec<_> = (0..2)
        .map(|n| directory.path().join(n.to_string()))
        .collect();
    let backend = Backend::start(&sockets, kind, None).unwrap();
    Bed {
        _directory: directory,
        sockets,
        _backend: backend,
    }
}

fn fleet(bed: &Bed, frontends: &Frontends, frames: &Frames) -> Fleet {
    let mut fleet = super::attach(frontends, &bed.sockets, frames).unwrap();
    let wires = frames.wires(2).unwrap();
    fleet
        .wire(&wires, frames.stations, frames.broadcast)
        .unwrap();
    fleet.announce(frames.stations).unwrap();
    fleet
}

fn run(fleet: &mut Fleet, pace: Pace, seconds: f64) -> Outcome {
    let mut trial = Trial::new(pace, seconds);
    (trial.quiet, trial.stall) = (Duration::from_secs(2), Duration::from_secs(20));
    let outcome = fleet.run(&trial, &mut |_, _| ()).unwrap();
    assert_eq!(outcome.partial, None);
    outcome
}

/// Frames of a burst per direction in the tests of faults.
const BURST: u64 = 20_000;

/// Runs a burst both ways through a backend that does `fate` to the frames of either port; returns what was reported, and how often
/// `fate` did something.
fn faults(frames: &Frames, fate: fn(u64, &mut Vec<u8>) -> Action) -> (Count, u64) {
    let done = Arc::<AtomicU64>::default();
    let fates = (0..2).map(|_| -> Fate {
        let done = done.clone();
        Box::new(move |number, frame| {
            let before = frame.clone();
            let action = fate(number, frame);
            done.fetch_add(
                u64::from(action != Action::Pass || *frame != before),
                Ordering::Relaxed,
            );
            action
        })
    });
    let bed = bed(Kind::Faulty(Duration::ZERO, fates.collect()));
    let mut fleet = fleet(&bed, &Frontends::plain(), frames);
    let outcome = run(&mut fleet, Pace::Burst(BURST), 0.1);
    (outcome.count, done.load(Ordering::Relaxed))
}

fn expect(count: &Count, expected: Count) {
    let counted = Count {
        seconds: 0.0,
        bytes: 0,
        verified: 0,
        ..count.clone()
    };
    let sent = 2 * BURST;
    let expected = Count {
        offered: sent,
        sent,
        ..expected
    };
    assert_eq!(counted, expected);
}

#[test]
fn a_faultless_backend_is_reported_as_faultless() {
    let frames = Frames::plain(64);
    let (count, done) = faults(&frames, |_, _| Action::Pass);
    assert_eq!(done, 0);
    let received = 2 * BURST;
    expect(
        &count,
        Count {
            received,
            ..Count::default()
        },
    );
    assert_eq!(count.bytes, 64 * received);
    assert!(count.verified >= received / 64);
}

#[test]
fn dropped_frames_are_counted_exactly_the_last_ones_too() {
    let (count, done) = faults(&Frames::plain(64), |number, _| match number {
        0 | 17 | 18 | 5000..5100 | 19_990.. => Action::Drop,
        _ => Action::Pass,
    });
    assert_eq!(done, 2 * 113);
    expect(
        &count,
        Count {
            received: 2 * BURST - done,
            lost: done,
            ..Count::default()
        },
    );
}

#[test]
fn frames_that_come_twice_are_counted_exactly() {
    let (count, done) = faults(&Frames::plain(300), |number, _| {
        if number % 777 == 5 {
            Action::Twice
        } else {
            Action::Pass
        }
    });
    assert!(done > 40);
    expect(
        &count,
        Count {
            received: 2 * BURST,
            duplicated: done,
            ..Count::default()
        },
    );
}

#[test]
fn frames_that_come_late_are_counted_exactly_and_are_no_loss() {
    let (count, done) = faults(&Frames::plain(64), |number, _| {
        if number % 501 == 100 {
            Action::Hold
        } else {
            Action::Pass
        }
    });
    assert!(done > 60);
    expect(
        &count,
        Count {
            received: 2 * BURST,
            reordered: done,
            ..Count::default()
        },
    );
}

#[test]
fn a_changed_bit_anywhere_is_counted_when_all_is_compared() {
    let frames = Frames {
        verify: true,
        ..Frames::plain(200)
    };
    let (count, done) = faults(&frames, |number, frame| {
        // Everywhere but in the EtherType: a frame with another one is somebody else's.
        let at = (number as usize / 10 * 7) % 200;
        if number % 10 == 3 && !(12..14).contains(&at) {
            frame[at] ^= 0x40;
        }
        Action::Pass
    });
    assert!(done > 3000);
    expect(
        &count,
        Count {
            received: 2 * BURST - done,
            corrupted: done,
            ..Count::default()
        },
    );
    // Where only the payload was hit, the head was right: it was compared whole, and did not count.
    assert!(count.verified > count.received);
}

#[test]
fn many_stations_are_checked_flow_by_flow() {
    let frames = Frames {
        stations: 1000,
        ..Frames::plain(64)
    };
    let (count, done) = faults(&frames, |number, _| match number {
        100..200 => Action::Drop,
        5000 => Action::Twice,
        _ => Action::Pass,
    });
    assert_eq!(done, 2 * 101);
    expect(
        &count,
        Count {
            received: 2 * BURST - 200,
            lost: 200,
            duplicated: 2,
            ..Count::default()
        },
    );
}

#[test]
fn a_known_delay_stands_in_the_histogram() {
    let pass = || -> Fate { Box::new(|_, _| Action::Pass) };
    let delay = Duration::from_millis(40);
    let bed = bed(Kind::Faulty(delay, vec![pass(), pass()]));
    let mut fleet = fleet(&bed, &Frontends::plain(), &Frames::plain(64));
    let rate = fleet.every(2000.0).unwrap();
    for pace in [Pace::Window(1), rate] {
        let outcome = run(&mut fleet, pace, 1.0);
        let times = outcome.latency("all");
        assert!(times.count > 20, "{times:?}");
        assert_eq!(outcome.count.lost, 0);
        // Two digits: 1 %. Upwards a busy machine adds some slices of a few milliseconds, but not the delay again.
        assert!(times.min >= 39.6e6, "{times:?}");
        assert!((39.6e6..68e6).contains(&times.p50), "{times:?}");
    }
}

#[test]
fn frames_that_wait_for_a_standing_switch_are_late_not_forgotten() {
    // Of one second the backend stands still for 300 ms: at a constant rate 30 % of the frames were due meanwhile and waited 150 ms
    // on average. A generator that waits itself would see a handful of late frames.
    let mut stood = false;
    let stand: Fate = Box::new(move |number, _| {
        if number > 200 && !stood {
            stood = true;
            std::thread::sleep(Duration::from_millis(300));
        }
        Action::Pass
    });
    let bed = bed(Kind::Faulty(
        Duration::ZERO,
        vec![stand, Box::new(|_, _| Action::Pass)],
    ));
    let mut fleet = fleet(&bed, &Frontends::plain(), &Frames::plain(64));
    let rate = fleet.every(2000.0).unwrap();
    let outcome = run(&mut fleet, rate, 1.0);
    let times = outcome.latency("all");
    let late = times.cdf.iter().find(|point| point[0] > 50e6).unwrap();
    let before = times.cdf.iter().rfind(|point| point[0] <= 50e6).unwrap();
    assert!(before[1] < 0.85, "{before:?} {late:?} {times:?}");
    assert!(times.max > 280e6, "{times:?}");
}

#[test]
fn every_kind_of_frontend_gets_its_frames_back() {
    for bits in 0..16u32 {
        let on = |bit: u32| bits >> bit & 1 == 1;
        let frontends = Frontends {
            rings: if on(0) { Rings::Packed } else { Rings::Split },
            no_in_order: on(1),
            no_mergeable: on(2),
            ring_size: if on(3) { 64 } else { 512 },
            ..Frontends::plain()
        };
        let bed = bed(Kind::Cross);
        for (size, pace) in [
            (Lengths::one(64), Pace::Window(128)),
            (Lengths::imix(), Pace::Window(100)),
            (Lengths::one(1518), Pace::Burst(3000)),
        ] {
            let frames = Frames {
                size,
                verify: true,
                ..Frames::plain(64)
            };
            let mut fleet = fleet(&bed, &frontends, &frames);
            let outcome = run(&mut fleet, pace, 0.15);
            let count = &outcome.count;
            assert!(count.received > 100, "{frontends:?}: {count:?}");
            assert_eq!(count.received, count.sent, "{frontends:?}: {count:?}");
            assert_eq!(
                (
                    count.duplicated,
                    count.reordered,
                    count.corrupted,
                    count.foreign
                ),
                (0, 0, 0, 0),
                "{frontends:?}"
            );
            fleet.detach();
        }
    }
}

#[test]
fn large_frames_spread_over_several_receive_buffers() {
    let frontends = Frontends {
        receive_buffer: Some(2048),
        ring_size: 256,
        ..Frontends::plain()
    };
    let frames = Frames {
        verify: true,
        ..Frames::plain(9000)
    };
    let bed = bed(Kind::Cross);
    let mut fleet = fleet(&bed, &frontends, &frames);
    let outcome = run(&mut fleet, Pace::Window(16), 0.3);
    assert!(outcome.count.received > 10, "{:?}", outcome.count);
    assert_eq!(outcome.count.received, outcome.count.sent);
    assert_eq!(outcome.count.verified, outcome.count.received);
}

#[test]
fn a_backend_that_never_answers_or_dies_ends_a_trial_with_a_sentence() {
    let drop_all = || -> Fate { Box::new(|_, _| Action::Drop) };
    let lossy = bed(Kind::Faulty(Duration::ZERO, vec![drop_all(), drop_all()]));
    let mut silent = fleet(&lossy, &Frontends::plain(), &Frames::plain(64));
    let mut trial = Trial::new(Pace::Window(64), 30.0);
    trial.stall = Duration::from_millis(300);
    let outcome = silent.run(&trial, &mut |_, _| ()).unwrap();
    assert_eq!(outcome.partial.unwrap(), "no frame came back for 0.3 s");
    assert_eq!(outcome.count.received, 0);

    let dying = bed(Kind::Cross);
    let mut orphan = fleet(&dying, &Frontends::plain(), &Frames::plain(64));
    let trial = Trial::new(Pace::Window(64), 30.0);
    let killer = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(500));
        drop(dying);
    });
    let outcome = orphan.run(&trial, &mut |_, _| ()).unwrap();
    killer.join().unwrap();
    let why = outcome.partial.unwrap();
    assert!(why.starts_with("the switch closed the connection"), "{why}");
    assert!(outcome.count.received > 0 && outcome.count.seconds < 25.0);
}

#[test]
fn impossible_wishes_are_sentences() {
    let bed = bed(Kind::Cross);
    let fleet = fleet(&bed, &Frontends::plain(), &Frames::plain(64));
    let said = fleet.every(1e12).unwrap_err().to_string();
    assert!(said.contains("impossible"), "{said}");
    drop(fleet);
    let mesh = Frames {
        pattern: Pattern::Pairs,
        ..Frames::plain(64)
    };
    assert!(mesh.wires(3).is_err());
    let frontends = Frontends {
        patience: 0.05,
        ..Frontends::plain()
    };
    let nowhere = [PathBuf::from("/nonexistent/socket")];
    let said = format!(
        "{:#}",
        super::attach(&frontends, &nowhere, &Frames::plain(64))
            .err()
            .unwrap()
    );
    assert!(said.contains("/nonexistent/socket"), "{said}");
}

#[test]
fn a_switch_that_hangs_in_the_handshake_is_a_sentence_in_time() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("0");
    let silent = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let frontends = Frontends {
        patience: 0.2,
        ..Frontends::plain()
    };
    let began = std::time::Instant::now();
    let error = super::attach(
        &frontends,
        std::slice::from_ref(&socket),
        &Frames::plain(64),
    )
    .err();
    let said = format!("{:#}", error.unwrap());
    assert!(said.contains(&socket.display().to_string()), "{said}");
    assert!(said.contains("was not answered within"), "{said}");
    assert!(began.elapsed() < Duration::from_secs(30));
    drop(silent);
}
