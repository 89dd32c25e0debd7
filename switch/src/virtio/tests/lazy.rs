//! Used buffers that are held back from a driver that polls: some are always missing, none for good, and the order stays.

use super::*;

const SPLIT: u64 = feature::VERSION_1 | feature::INDIRECT_DESC;

/// A transmit ring and the count of what went through it.
struct Lazy {
    pair: Pair,
    posted: u64,
    /// Given back by the device.
    used: u64,
    /// Taken by the driver.
    taken: u64,
}

impl Lazy {
    fn new(size: u16, features: u64) -> Lazy {
        Lazy {
            pair: Pair::new(size, features, Way::FromGuest),
            posted: 0,
            used: 0,
            taken: 0,
        }
    }

    /// The driver posts up to so many, the device uses them all.
    fn send(&mut self, count: usize) {
        let new: Vec<_> = (0..count as u64)
            .map(|n| (self.pair.buffer(self.posted + n), 64))
            .collect();
        self.posted += self.pair.guest.post(&new) as u64;
        let count = self.pair.device.fetch(&mut self.pair.buffers, BATCH);
        let count = count.expect("honest");
        self.pair.device.complete_lazily(count);
        self.used += count as u64;
        assert_eq!(self.used, self.posted);
    }

    /// With IN_ORDER the element in the slot after what the driver was told of before names the last buffer it is told of now.
    fn check_element(&self) {
        let raw = self.pair.guest.raw();
        let (size, told) = (self.pair.guest.size(), raw.used_idx());
        let before = (self.pair.device.base() as u16).wrapping_sub((self.used - self.taken) as u16);
        if self.pair.features & feature::IN_ORDER != 0 && told != before {
            let (id, _) = raw.used(before % size);
            assert_eq!(id, u32::from(told.wrapping_sub(1) % size));
        }
    }

    /// The driver takes what it is told of; returns how many buffers are missing.
    fn missing(&mut self) -> u64 {
        let mut out = [Used::default(); BATCH];
        loop {
            let count = self.pair.guest.take(&mut out);
            for used in &out[..count] {
                assert_eq!(used.addr, self.pair.buffer(self.taken), "out of order");
                self.taken += 1;
            }
            if count == 0 {
                break;
            }
        }
        assert!(!self.pair.guest.lied());
        let missing = self.used - self.taken;
        assert_eq!(self.pair.device.holds(), missing > 0);
        missing
    }
}

#[test]
fn a_driver_that_polls_always_misses_some_and_gets_them_when_all_is_settled() {
    for in_order in [0, feature::IN_ORDER] {
        for (size, hold) in [(512, 32), (1024, 64), (32768, 64)] {
            let mut lazy = Lazy::new(size, SPLIT | in_order);
            for turn in 0..4000 {
                lazy.send(1 + turn * 7 % BATCH);
                lazy.check_element();
                let missing = lazy.missing();
                assert!(missing < 2 * hold, "{missing} of {size} missing");
                assert!(missing >= hold.min(lazy.used), "only {missing} of {size}");
                assert!(!lazy.pair.device.call_wanted(), "it polls");
                if turn % 1000 == 999 {
                    lazy.pair.device.settle();
                    assert_eq!(lazy.missing(), 0);
                    // As if nothing had been held back: that is where a ring set up anew goes on.
                    let (mem, base) = (lazy.pair.mem(), lazy.pair.device.base());
                    lazy.pair.again(base, &[&mem]).unwrap();
                    assert_eq!(lazy.pair.device.base(), base);
                    lazy.used = 0;
                    (lazy.posted, lazy.taken) = (0, 0);
                }
            }
        }
    }
}

#[test]
fn nothing_is_held_back_where_it_would_be_missed() {
    let none = [
        (256, SPLIT),
        (1024, SPLIT | feature::EVENT_IDX),
        (1024, SPLIT | feature::RING_PACKED),
        (1024, SPLIT | feature::RING_PACKED | feature::IN_ORDER),
    ];
    for (size, features) in none {
        let mut lazy = Lazy::new(size, features);
        for turn in 0..200 {
            lazy.send(1 + turn % BATCH);
            assert_eq!(lazy.missing(), 0, "of {size} with {features:#x}");
        }
    }
}

#[test]
fn a_driver_that_wants_calls_gets_all_at_once() {
    for in_order in [0, feature::IN_ORDER] {
        let mut lazy = Lazy::new(512, SPLIT | in_order);
        lazy.send(50);
        assert_eq!(lazy.missing(), 50);
        assert!(!lazy.pair.device.call_wanted(), "it polls");
        assert!(!lazy.pair.guest.arm(), "nothing for it yet");
        lazy.send(1);
        assert!(lazy.pair.device.call_wanted());
        assert_eq!(lazy.missing(), 0);
        // It begins to wait for what was held back while it polled, and sends no more.
        lazy.pair.guest.disarm();
        lazy.send(20);
        assert!(!lazy.pair.device.call_wanted(), "it polls");
        assert!(!lazy.pair.guest.arm(), "nothing for it yet");
        assert!(lazy.pair.device.call_wanted());
        assert_eq!(lazy.missing(), 0);
        assert!(!lazy.pair.device.call_wanted(), "a call about nothing");
        // The same, but it is told before it is asked whether it waits.
        lazy.pair.guest.disarm();
        lazy.send(20);
        assert!(!lazy.pair.guest.arm(), "nothing for it yet");
        lazy.pair.device.settle();
        assert!(lazy.pair.device.call_wanted());
        assert_eq!(lazy.missing(), 0);
    }
}

/// A chain takes many descriptors, and a ring runs out of those.
#[test]
fn a_chain_brings_everything_back() {
    let mut lazy = Lazy::new(512, SPLIT);
    for _ in 0..100 {
        lazy.send(40);
        assert!(lazy.missing() >= 40);
        let pieces: Vec<_> = (0..6).map(|n| (lazy.pair.buffer(n), 64)).collect();
        assert!(lazy.pair.guest.post_chain(&pieces));
        let count = lazy.pair.device.fetch(&mut lazy.pair.buffers, BATCH);
        lazy.pair.device.complete_lazily(count.expect("honest"));
        assert!(!lazy.pair.device.holds());
        assert_eq!(lazy.pair.guest.reclaim(), 41);
        (lazy.posted, lazy.used, lazy.taken) = (0, 0, 0);
    }
}
