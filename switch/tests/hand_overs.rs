//! What threads hand over without locks, each in its smallest form, under loom: every order in which two threads can meet, weak
//! memory included. Each model is also run with one of its orders weakened, and then has to fail: what can be left out is not
//! proved. The forwarding database has its own models (`src/dataplane/fdb/model.rs`), the rings theirs (`src/virtio/tests/litmus.rs`).
#![allow(unsafe_code)] // cells that loom watches

use std::panic;

use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::sync::atomic::{AtomicBool, AtomicUsize, Ordering, fence};
use loom::thread;

/// True if loom finds an order in which the model fails.
fn fails(model: impl FnOnce() + panic::UnwindSafe) -> bool {
    panic::catch_unwind(model).is_err()
}

/// How the worker takes the flag down (`mailbox.rs`, `open`).
#[derive(Clone, Copy)]
enum Down {
    Swap,
    Store,
}

/// Control posts two letters, the worker looks until it has both: a flag that is taken down over a letter nobody saw is a
/// letter that is never answered.
fn mailbox(post: Ordering, see: Ordering, down: Down) {
    loom::model(move || {
        // Letters in the channel; whatever the channel is, a send happens before the receipt of what it sent, no more.
        let mail = Arc::new((AtomicUsize::new(0), AtomicBool::new(false)));
        let other = mail.clone();
        let control = thread::spawn(move || {
            let (letters, flag) = &*other;
            for letter in 1..=2 {
                letters.store(letter, Ordering::Release);
                flag.swap(true, post);
            }
        });
        let (letters, flag) = &*mail;
        let mut taken = 0;
        let mut look = || {
            if flag.load(see) {
                match down {
                    Down::Swap => drop(flag.swap(false, see)),
                    Down::Store => flag.store(false, Ordering::SeqCst),
                }
                taken = letters.load(Ordering::Relaxed);
            }
        };
        look();
        control.join().expect("control");
        // The flags of the last letter are visible by now; a poll that comes later must find what is left.
        look();
        assert_eq!(taken, 2, "a letter without a flag");
    });
}

#[test]
fn no_letter_stays_in_the_mailbox_without_a_flag() {
    mailbox(Ordering::Release, Ordering::Acquire, Down::Swap);
    assert!(fails(|| mailbox(
        Ordering::Release,
        Ordering::Acquire,
        Down::Store
    )));
    assert!(fails(|| mailbox(
        Ordering::Relaxed,
        Ordering::Acquire,
        Down::Swap
    )));
    assert!(fails(|| mailbox(
        Ordering::Release,
        Ordering::Relaxed,
        Down::Swap
    )));
}

/// Two workers and one receive ring (`port/shared.rs`): whoever has it sees it as the last one left it.
fn one_at_a_time(take: Ordering, give: Ordering) {
    loom::model(move || {
        let ring = Arc::new((AtomicBool::new(false), UnsafeCell::new(0)));
        let worker = |ring: Arc<(AtomicBool, UnsafeCell<u32>)>| {
            move || {
                let (taken, position) = &*ring;
                let free = taken.compare_exchange(false, true, take, Ordering::Relaxed);
                if free.is_ok() {
                    // SAFETY: that nobody else is here is what loom checks.
                    position.with_mut(|at| unsafe { *at += 1 });
                    taken.store(false, give);
                }
            }
        };
        let one = thread::spawn(worker(ring.clone()));
        let two = thread::spawn(worker(ring.clone()));
        one.join().expect("a worker");
        two.join().expect("a worker");
    });
}

#[test]
fn a_ring_that_workers_share_is_used_by_one_at_a_time() {
    one_at_a_time(Ordering::Acquire, Ordering::Release);
    assert!(fails(|| one_at_a_time(
        Ordering::Relaxed,
        Ordering::Release
    )));
    assert!(fails(|| one_at_a_time(
        Ordering::Acquire,
        Ordering::Relaxed
    )));
}

/// A counter with one writer at a time, which hands its queue on (`counters.rs`), and one that several may add to at once.
fn counters(hand_over: bool, several: bool) {
    loom::model(move || {
        let books = Arc::new((
            AtomicUsize::new(0),
            AtomicUsize::new(0),
            AtomicBool::new(false),
        ));
        let other = books.clone();
        let first = thread::spawn(move || {
            let (own, shared, handed) = &*other;
            own.store(own.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
            add(shared, several);
            handed.store(true, Ordering::Release);
        });
        let (own, shared, handed) = &*books;
        let seen = own.load(Ordering::Relaxed);
        if handed.load(Ordering::Acquire) || !hand_over {
            own.store(own.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
        } else {
            add(shared, several);
        }
        assert!(own.load(Ordering::Relaxed) >= seen, "a counter went back");
        first.join().expect("the first writer");
        let total = own.load(Ordering::Relaxed) + shared.load(Ordering::Relaxed);
        assert_eq!(total, 3, "a frame that is in no book");
    });
}

fn add(counter: &AtomicUsize, at_once: bool) {
    if at_once {
        counter.fetch_add(1, Ordering::Relaxed);
    } else {
        counter.store(counter.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
    }
}

#[test]
fn no_frame_is_counted_by_nobody() {
    counters(true, true);
    assert!(fails(|| counters(false, true)), "two writers at once");
    assert!(fails(|| counters(true, false)), "no locked addition");
}

/// The table of watched mappings (`virtio/guest_fault.rs`): a slot that goes from one mapping to another is never read as half of
/// each. `None` stands for a fence that is missing.
fn watched_slot(write: Option<Ordering>, publish: Ordering, read: Option<Ordering>) {
    loom::model(move || {
        let slot = Arc::new((
            AtomicUsize::new(0),
            AtomicUsize::new(1),
            AtomicUsize::new(1),
        ));
        let other = slot.clone();
        let control = thread::spawn(move || {
            let (seq, start, watched) = &*other;
            seq.store(1, Ordering::Relaxed);
            if let Some(order) = write {
                fence(order);
            }
            start.store(2, Ordering::Relaxed);
            watched.store(2, Ordering::Relaxed);
            seq.store(2, publish);
        });
        let (seq, start, watched) = &*slot;
        let before = seq.load(Ordering::Acquire);
        let (start, watched) = (
            start.load(Ordering::Relaxed),
            watched.load(Ordering::Relaxed),
        );
        if let Some(order) = read {
            fence(order);
        }
        if before.is_multiple_of(2) && seq.load(Ordering::Relaxed) == before {
            assert_eq!(start, watched, "half of each");
        }
        control.join().expect("control");
    });
}

#[test]
fn the_fault_handler_never_sees_half_a_mapping() {
    let (release, acquire) = (Some(Ordering::Release), Some(Ordering::Acquire));
    watched_slot(release, Ordering::Release, acquire);
    assert!(fails(|| watched_slot(None, Ordering::Release, acquire)));
    assert!(fails(|| watched_slot(release, Ordering::Relaxed, acquire)));
    assert!(fails(|| watched_slot(release, Ordering::Release, None)));
}

/// A picture of the topology that is replaced (`mailbox.rs`, `show`): control may free the old one when the answer has come.
fn picture(answer: Ordering, wait: Ordering) {
    loom::model(move || {
        let shown = Arc::new((UnsafeCell::new(1), AtomicBool::new(false)));
        let other = shown.clone();
        let worker = thread::spawn(move || {
            let (old, answered) = &*other;
            // SAFETY: that nobody writes meanwhile is what loom checks.
            old.with(|old| assert_eq!(unsafe { *old }, 1));
            answered.store(true, answer);
        });
        let (old, answered) = &*shown;
        if answered.load(wait) {
            // SAFETY: as above: freed, and used for something else.
            old.with_mut(|old| unsafe { *old = 2 });
        }
        worker.join().expect("worker");
    });
}

#[test]
fn a_picture_is_freed_when_no_worker_looks_at_it() {
    picture(Ordering::Release, Ordering::Acquire);
    assert!(fails(|| picture(Ordering::Relaxed, Ordering::Acquire)));
    assert!(fails(|| picture(Ordering::Release, Ordering::Relaxed)));
}

/// A worker that answers and then ends (`mailbox.rs`, `ask`): control looks for the end first and for the answer then, so that an
/// answer given at the last moment is not lost.
fn last_answer(end: Ordering, see: Ordering, end_first: bool) {
    loom::model(move || {
        let shared = Arc::new((AtomicUsize::new(0), AtomicBool::new(false)));
        let other = shared.clone();
        let worker = thread::spawn(move || {
            let (answer, stopped) = &*other;
            answer.store(1, Ordering::Release);
            stopped.store(true, end);
        });
        let (answer, stopped) = &*shared;
        let (over, given) = if end_first {
            let over = stopped.load(see);
            (over, answer.load(Ordering::Acquire))
        } else {
            let given = answer.load(Ordering::Acquire);
            (stopped.load(see), given)
        };
        assert!(!over || given == 1, "an answer that nobody gets");
        worker.join().expect("worker");
    });
}

#[test]
fn the_last_answer_of_a_worker_is_heard() {
    last_answer(Ordering::Release, Ordering::Acquire, true);
    assert!(fails(|| last_answer(
        Ordering::Relaxed,
        Ordering::Acquire,
        true
    )));
    assert!(fails(|| last_answer(
        Ordering::Release,
        Ordering::Relaxed,
        true
    )));
    assert!(fails(|| last_answer(
        Ordering::Release,
        Ordering::Acquire,
        false
    )));
}
