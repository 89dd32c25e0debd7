//! The orders that both sides of a ring rely on, each in its smallest form, under loom: every order in which two threads
//! can meet, weak memory included. Ring memory is foreign, so this is not the ring's code but its loads, stores and fences
//! by name; each model is also run with one of them weakened, and then has to fail: what can be left out is not proved.
//!
//! loom has fences that are sequentially consistent, but no such loads and stores: so has the ring code.

use std::panic;

use loom::sync::Arc;
use loom::sync::atomic::{AtomicBool, AtomicU16, Ordering, fence};
use loom::thread;

/// Memory of a ring and what it tells of.
struct Shared {
    /// A buffer, a descriptor, a used element.
    told: AtomicU16,
    second: AtomicU16,
    /// `avail.idx`, `used.idx`, flags of a packed descriptor.
    index: AtomicU16,
    second_flags: AtomicU16,
    /// `avail.flags`, `used.flags`, event index, event area: 1 asks to be told.
    wish: AtomicU16,
    bell: AtomicBool,
}

fn shared() -> Arc<Shared> {
    Arc::new(Shared {
        told: AtomicU16::new(0),
        second: AtomicU16::new(0),
        index: AtomicU16::new(0),
        second_flags: AtomicU16::new(0),
        wish: AtomicU16::new(0),
        bell: AtomicBool::new(false),
    })
}

/// Split: element, then index (`complete` and `take`; `post` and `fetch`).
fn publish(store: Ordering, load: Ordering) {
    loom::model(move || {
        let ring = shared();
        let other = ring.clone();
        let writer = thread::spawn(move || {
            other.told.store(7, Ordering::Relaxed);
            other.index.store(1, store);
        });
        if ring.index.load(load) == 1 {
            assert_eq!(ring.told.load(Ordering::Relaxed), 7);
        }
        writer.join().expect("writer");
    });
}

/// Packed: further descriptors, then the flags of the first, which show them all.
fn publish_batch(store: Ordering, load: Ordering) {
    loom::model(move || {
        let ring = shared();
        let other = ring.clone();
        let writer = thread::spawn(move || {
            other.second.store(8, Ordering::Relaxed);
            other.second_flags.store(1, Ordering::Relaxed);
            other.told.store(7, Ordering::Relaxed);
            other.index.store(1, store);
        });
        if ring.index.load(load) == 1 {
            assert_eq!(ring.told.load(Ordering::Relaxed), 7);
            assert_eq!(ring.second_flags.load(load), 1, "a hole in the batch");
            assert_eq!(ring.second.load(Ordering::Relaxed), 8);
        }
        writer.join().expect("writer");
    });
}

/// A fence, or none.
fn fence_if(there: bool) {
    if there {
        fence(Ordering::SeqCst);
    }
}

/// One side goes to sleep (`arm`), the other has something to tell (`call_wanted`, `kick_wanted`): one of them must
/// notice the other.
fn sleep(sleeper: bool, teller: bool) {
    loom::model(move || {
        let ring = shared();
        let other = ring.clone();
        let tell = thread::spawn(move || {
            other.index.store(1, Ordering::Release);
            fence_if(teller);
            if other.wish.load(Ordering::Relaxed) == 1 {
                other.bell.store(true, Ordering::Release);
            }
        });
        ring.wish.store(1, Ordering::Relaxed);
        fence_if(sleeper);
        let seen = ring.index.load(Ordering::Relaxed) == 1;
        tell.join().expect("teller");
        assert!(seen || ring.bell.load(Ordering::Acquire), "asleep for ever");
    });
}

/// True if loom finds an order in which the model fails.
fn fails(model: impl FnOnce() + panic::UnwindSafe) -> bool {
    panic::catch_unwind(model).is_err()
}

#[test]
fn what_an_index_announces_is_written() {
    publish(Ordering::Release, Ordering::Acquire);
    assert!(fails(|| publish(Ordering::Relaxed, Ordering::Acquire)));
    assert!(fails(|| publish(Ordering::Release, Ordering::Relaxed)));
}

#[test]
fn the_first_flags_show_a_whole_packed_batch() {
    publish_batch(Ordering::Release, Ordering::Acquire);
    assert!(fails(|| publish_batch(
        Ordering::Relaxed,
        Ordering::Acquire
    )));
    assert!(fails(|| publish_batch(
        Ordering::Release,
        Ordering::Relaxed
    )));
}

#[test]
fn nobody_sleeps_while_something_waits() {
    sleep(true, true);
    assert!(fails(|| sleep(false, true)));
    assert!(fails(|| sleep(true, false)));
}
