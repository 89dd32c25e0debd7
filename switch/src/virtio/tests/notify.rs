//! Who is told, and when: no call or kick is lost, none is made that nobody wants.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use super::super::packed::{Place, told};
use super::super::ring::passed;
use super::*;

#[test]
fn the_index_rule_says_yes_exactly_if_the_event_was_passed() {
    // (event, old, new): told?
    for (event, old, new, want) in [
        (0u16, 0u16, 0u16, false),
        (0, 0, 1, true),
        (1, 0, 1, false),
        (1, 0, 2, true),
        (5, 0, 6, true),
        (5, 6, 7, false),
        (5, 5, 6, true),
        (0xffff, 0xfff0, 0, true),
        (0xffff, 0xfff0, 0xffff, false),
        (0, 0xfff0, 1, true),
        (0xfff0, 0xfff0, 5, true),
        (0xffef, 0xfff0, 5, false),
        (3, 10, 20, false),
        (20, 10, 20, false),
        (19, 10, 20, true),
        (10, 10, 20, true),
        (9, 10, 20, false),
    ] {
        let got = passed(event, new, new.wrapping_sub(old));
        assert_eq!(got, want, "event {event} old {old} new {new}");
    }
}

#[test]
fn the_packed_rule_agrees_with_counting_places_one_by_one() {
    for size in [1u16, 2, 3, 7, 8, 300, 32767, 32768] {
        let starts = [0, 1, size / 2, size - 1].map(|at| at.min(size - 1));
        for (start, wrap) in starts.into_iter().flat_map(|s| [(s, false), (s, true)]) {
            let from = Place { index: start, wrap };
            for since in [1, 2, size / 2, size.saturating_sub(1), size] {
                if since == 0 || since > size {
                    continue;
                }
                let new = from.ahead(since, size);
                // The places passed, in a lap's worth of candidates before and after.
                let mut place = from;
                for step in 0..u32::from(size).min(700) {
                    let area = 2 << 16 | u32::from(place.word());
                    let want = step < u32::from(since);
                    let got = told(area, true, new, since, size);
                    assert_eq!(
                        got, want,
                        "size {size} from {from:?} since {since} step {step}"
                    );
                    place = place.ahead(1, size);
                }
            }
        }
    }
}

#[test]
fn packed_event_flags_mean_what_they_say_and_garbage_means_yes() {
    let new = Place {
        index: 3,
        wrap: true,
    };
    for event_idx in [false, true] {
        assert!(told(0, event_idx, new, 1, 8));
        assert!(!told(1 << 16, event_idx, new, 1, 8));
        assert!(told(3 << 16, event_idx, new, 1, 8));
    }
    let elsewhere = 2 << 16 | 0x8006;
    assert!(!told(elsewhere, true, new, 1, 8));
    assert!(told(elsewhere, false, new, 1, 8), "not negotiated");
    for garbage in [0x7fff, 0xffff, 0x8000 | 9] {
        let _ = told(2 << 16 | garbage, true, new, 8, 8);
    }
}

#[test]
fn calls_are_made_while_wanted_and_only_then() {
    for features in all_features() {
        let mut pair = Pair::new(8, features, Way::ToGuest);
        let mut out = [Used::default(); BATCH];
        let mut forward = |pair: &mut Pair, count: usize| {
            let new: Vec<_> = (0..count as u64).map(|n| (pair.buffer(n), 64)).collect();
            assert_eq!(pair.guest.post(&new), count);
            assert_eq!(pair.device.fetch(&mut pair.buffers, BATCH), Ok(count));
            pair.device.complete(count, &[64; 8]);
            let wanted = pair.device.call_wanted();
            assert!(!pair.device.call_wanted(), "asked twice about the same");
            (wanted, pair.guest.take(&mut out))
        };
        assert!(!pair.device.call_wanted(), "nothing happened yet");
        assert_eq!(
            forward(&mut pair, 3),
            (false, 3),
            "a polling guest is never called"
        );
        assert!(!pair.guest.arm());
        assert_eq!(forward(&mut pair, 5), (true, 5));
        if features & feature::EVENT_IDX != 0 {
            assert_eq!(forward(&mut pair, 1), (false, 1), "one event, one call");
            assert!(!pair.guest.arm());
            for _ in 0..7 {
                assert_eq!(forward(&mut pair, 1).1, 1);
            }
        } else {
            assert_eq!(forward(&mut pair, 1), (true, 1));
        }
        pair.guest.disarm();
        for _ in 0..20 {
            assert_eq!(forward(&mut pair, 7), (false, 7));
        }
    }
}

#[test]
fn kicks_are_made_while_wanted_and_only_then() {
    for features in all_features() {
        let mut pair = Pair::new(8, features, Way::FromGuest);
        let send = |pair: &mut Pair| {
            assert_eq!(pair.guest.post(&[(pair.buffer(0), 64)]), 1);
            let wanted = pair.guest.kick_wanted();
            assert!(!pair.guest.kick_wanted(), "asked twice about the same");
            assert_eq!(pair.device.fetch(&mut pair.buffers, BATCH), Ok(1));
            pair.device.complete(1, &[]);
            assert_eq!(pair.guest.reclaim(), 1);
            wanted
        };
        // A split ring with EVENT_IDX starts with avail_event 0: the first frame kicks.
        let first = send(&mut pair);
        let split = !is_packed(features) && features & feature::EVENT_IDX != 0;
        assert_eq!(first, split);
        for _ in 0..20 {
            assert!(!send(&mut pair), "a polling device is never kicked");
        }
        for _ in 0..20 {
            assert!(!pair.device.arm());
            assert!(send(&mut pair));
            pair.device.disarm();
            assert!(!send(&mut pair));
        }
        pair.guest.post(&[(pair.buffer(0), 64)]);
        assert!(pair.device.arm(), "one is there already");
    }
}

/// Two threads, each of which sleeps when it sees nothing to do: a lost kick or call stops the traffic.
#[test]
fn no_kick_and_no_call_is_lost_between_two_sleepers() {
    const ROUNDS: usize = 60_000;
    for features in all_features() {
        let Pair {
            mut guest,
            mut device,
            mut buffers,
            ..
        } = Pair::new(4, features, Way::FromGuest);
        let (kick, call) = (AtomicBool::new(false), AtomicBool::new(false));
        let done = AtomicUsize::new(0);
        let wait = |bell: &AtomicBool| {
            let start = Instant::now();
            while !bell.swap(false, Ordering::Acquire) {
                assert!(start.elapsed() < Duration::from_secs(20), "lost");
                thread::yield_now();
            }
        };
        let addr = GPA + guest.mem().len() - POOL;
        thread::scope(|scope| {
            scope.spawn(|| {
                while done.load(Ordering::Relaxed) < ROUNDS {
                    let count = device.fetch(&mut buffers, 2).unwrap();
                    device.complete(count, &[]);
                    done.fetch_add(count, Ordering::Relaxed);
                    if device.call_wanted() {
                        call.store(true, Ordering::Release);
                    }
                    if count == 0 {
                        if !device.arm() {
                            wait(&kick);
                        }
                        device.disarm();
                    }
                }
            });
            let mut posted = 0;
            while posted < ROUNDS {
                let count = guest.post(&[(addr, 64); 3][..(ROUNDS - posted).min(3)]);
                posted += count;
                if guest.kick_wanted() {
                    kick.store(true, Ordering::Release);
                }
                if guest.reclaim() == 0 && guest.free() == 0 {
                    if !guest.arm() {
                        wait(&call);
                    }
                    guest.disarm();
                }
            }
        });
        assert_eq!(done.load(Ordering::Relaxed), ROUNDS);
    }
}
