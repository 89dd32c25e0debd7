//! Used buffers that a guest's transmit ring holds back while its driver polls: when the guest gets them all the same.
//!
//! How many are held back, and from whom, is tested with the rings (`src/virtio/tests/lazy.rs`).

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ringway::dataplane::frame::Slots;
use ringway::dataplane::queue::RxQueue as _;
use ringway::port::call::Call;
use ringway::port::vhost::FromGuest;
use ringway::virtio::driver::{DriverRing, DriverSetup};
use ringway::virtio::guest_mem::{GuestMem, MapOptions, Poison};
use ringway::virtio::own_mem::OwnMem;
use ringway::virtio::ring::{Ring, RingSetup, Way, feature};
use rustix::event::{EventfdFlags, eventfd};

const GPA: u64 = 0x4000_0000;
const SIZE: u16 = 512;
const FEATURES: u64 = feature::VERSION_1;
const FRAMES: usize = 20;

/// A guest with its transmit ring, the switch's side of it, and the bell between them.
struct Rig {
    guest: DriverRing,
    switch: FromGuest,
    slots: Box<Slots>,
    bell: OwnedFd,
}

impl Rig {
    /// Frames are sent, and the switch has given their buffers back: not so that the guest sees it.
    fn new() -> Rig {
        let mem = OwnMem::new(1 << 20, GPA, false).expect("memory");
        let setup = DriverSetup {
            mem: mem.clone(),
            at: GPA,
            size: SIZE,
            features: FEATURES,
            way: Way::FromGuest,
        };
        let guest = DriverRing::new(setup).expect("a ring");
        let region = mem.region().expect("a descriptor");
        let mapped = GuestMem::map(vec![region], &Poison::new(), &MapOptions::default());
        let (desc, avail, used) = guest.addresses();
        let ring = Ring::new(RingSetup {
            mem: Arc::new(mapped.expect("a mapping")),
            size: SIZE,
            desc,
            avail,
            used,
            base: guest.base(),
            features: FEATURES,
            way: Way::FromGuest,
        });
        let bell = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).expect("an eventfd");
        let call = Call::new(bell.try_clone().expect("a copy")).expect("an eventfd");
        let mut rig = Rig {
            guest,
            switch: FromGuest::new(ring.expect("a ring"), Some(call), None, 2000),
            slots: Slots::new(),
            bell,
        };
        rig.send(FRAMES);
        assert_eq!(rig.guest.reclaim(), 0, "not held back");
        rig
    }

    fn send(&mut self, frames: usize) {
        let buffer = (GPA + (512 << 10), 212);
        assert_eq!(self.guest.post(&vec![buffer; frames]), frames);
        assert_eq!(self.poll(), frames);
    }

    /// A worker's turn: frames taken.
    fn poll(&mut self) -> usize {
        let count = self.switch.lend(&mut self.slots).count();
        if count > 0 {
            self.switch.give_back(count);
        }
        count
    }

    /// Polls the silent ring until `done`.
    fn poll_until(&mut self, mut done: impl FnMut(&mut Rig) -> bool) {
        let start = Instant::now();
        while !done(self) {
            assert!(start.elapsed() < Duration::from_secs(20), "held for good");
            assert_eq!(self.poll(), 0);
        }
    }

    fn is_called(&self) -> bool {
        rustix::io::read(&self.bell, &mut [0; 8]).is_ok()
    }
}

#[test]
fn a_guest_that_falls_silent_gets_its_buffers() {
    let mut rig = Rig::new();
    rig.poll_until(|rig| rig.guest.reclaim() == FRAMES);
    assert!(!rig.is_called(), "it polls");
}

#[test]
fn a_guest_that_sends_now_and_then_gets_them_in_each_silence() {
    let mut rig = Rig::new();
    for _ in 0..5 {
        rig.poll_until(|rig| rig.guest.reclaim() == FRAMES);
        rig.send(FRAMES);
    }
}

#[test]
fn a_guest_that_begins_to_wait_is_called_at_the_next_poll() {
    let mut rig = Rig::new();
    assert!(!rig.guest.arm(), "nothing for it yet");
    assert_eq!(rig.poll(), 0);
    assert!(rig.is_called());
    assert_eq!(rig.guest.reclaim(), FRAMES);
}

/// A thread that is kept from its CPU hears a long silence where there was none: one undisturbed trial is enough.
#[test]
#[cfg(target_arch = "x86_64")]
fn a_guest_that_goes_on_sending_gets_none_for_a_moment_of_silence() {
    let trial = || {
        let mut rig = Rig::new();
        let end = Instant::now() + Duration::from_millis(20);
        let mut sent = FRAMES;
        while Instant::now() < end && sent < 63 {
            let last = Instant::now();
            while last.elapsed() < Duration::from_micros(300) {
                assert_eq!(rig.poll(), 0);
            }
            rig.send(1);
            sent += 1;
        }
        rig.guest.reclaim() == 0
    };
    assert!((0..50).any(|_| trial()), "none is held back");
}

/// It has as many buffers as are held back, and no more.
#[test]
fn a_guest_with_few_buffers_is_spared() {
    let mut rig = Rig::new();
    let start = Instant::now();
    let mut free = 0;
    loop {
        free += rig.guest.reclaim();
        if free == FRAMES {
            rig.send(FRAMES);
            free = rig.guest.reclaim();
            if free == FRAMES {
                return; // at once
            }
        }
        rig.poll();
        assert!(
            start.elapsed() < Duration::from_secs(20),
            "made to wait for good"
        );
    }
}

#[test]
fn nothing_is_held_back_while_the_worker_sleeps() {
    let mut rig = Rig::new();
    assert!(!rig.switch.arm(), "no frames");
    assert_eq!(rig.guest.reclaim(), FRAMES);
}

#[test]
fn nothing_is_held_back_by_a_queue_that_is_taken_apart() {
    let mut rig = Rig::new();
    let (ring, ..) = rig.switch.into_parts();
    assert_eq!(rig.guest.reclaim(), FRAMES);
    assert_eq!(ring.base(), FRAMES as u32);
}

#[test]
fn nothing_is_given_back_into_memory_that_vanished() {
    let mut rig = Rig::new();
    rig.switch.poison().set();
    assert!(!rig.switch.arm());
    drop(rig.switch.into_parts());
    assert_eq!(rig.guest.reclaim(), 0);
}
