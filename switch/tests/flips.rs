//! A driver that changes what it has said while the switch reads it: each field is read once, and what was checked is delivered.
//!
//! One thread takes turns at a transmit ring whose buffers stay available, another flips one class of fields from another core as
//! fast as it can. Whatever is lent must lie inside the shared memory, be no longer than a frame may be, and its first 64 bytes must
//! be delivered as they were checked. `FLIP_FRAMES=1000000000` asks for so many frames per class, `FLIP_CLASSES=packed` or
//! `FLIP_CLASSES="split Table"` for the classes with that in their name only.
#![allow(unsafe_code)] // copies frames out, as a port does

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use ringway::dataplane::frame::{BURST_MAX, Slots};
use ringway::dataplane::queue::RxQueue as _;
use ringway::port::vhost::FromGuest;
use ringway::virtio::driver::{DriverRing, DriverSetup};
use ringway::virtio::guest_mem::{GuestMem, MapOptions, Poison};
use ringway::virtio::own_mem::OwnMem;
use ringway::virtio::ring::{Ring, RingSetup, Way, feature, flag};

const GPA: u64 = 0x4000_0000;
const SIZE: u16 = 256;
const FRAME_MAX: u32 = 2000;
/// Frames per class unless `FLIP_FRAMES` says otherwise.
const FRAMES: u64 = 100_000;
/// Where buffers begin, and from one to the next.
const BUFFERS: u64 = GPA + (64 << 10);
const STRIDE: u64 = 4096;

/// What is flipped.
#[derive(Clone, Copy, Debug)]
enum Class {
    Address,
    Length,
    Flags,
    NextOrId,
    Index,
    Entry,
    NetHeader,
    EthernetHead,
    Table,
}

const CLASSES: [Class; 9] = [
    Class::Address,
    Class::Length,
    Class::Flags,
    Class::NextOrId,
    Class::Index,
    Class::Entry,
    Class::NetHeader,
    Class::EthernetHead,
    Class::Table,
];

struct Rig {
    mem: Arc<OwnMem>,
    /// Descriptors, available ring or driver area, used ring or device area.
    places: (u64, u64, u64),
    features: u64,
    packed: bool,
}

impl Rig {
    fn new(packed: bool) -> Rig {
        let layout = if packed { feature::RING_PACKED } else { 0 };
        let features = feature::VERSION_1 | feature::INDIRECT_DESC | layout;
        let mem = OwnMem::new(1 << 20, GPA, false).expect("memory");
        let setup = DriverSetup {
            mem: mem.clone(),
            at: GPA,
            size: SIZE,
            features,
            way: Way::FromGuest,
        };
        let mut guest = DriverRing::new(setup).expect("a ring");
        let buffers: Vec<_> = (0..64).map(|n| (BUFFERS + n * STRIDE, 212)).collect();
        assert_eq!(guest.post(&buffers), 64);
        Rig {
            mem,
            places: guest.addresses(),
            features,
            packed,
        }
    }

    /// The switch's side, from the beginning.
    fn device(&self) -> FromGuest {
        let region = self.mem.region().expect("a descriptor");
        let mapped = GuestMem::map(vec![region], &Poison::new(), &MapOptions::default());
        let (desc, avail, used) = self.places;
        let ring = Ring::new(RingSetup {
            mem: Arc::new(mapped.expect("a mapping")),
            size: SIZE,
            desc,
            avail,
            used,
            base: if self.packed { 1 << 15 } else { 0 },
            features: self.features,
            way: Way::FromGuest,
        });
        FromGuest::new(ring.expect("a ring"), None, None, FRAME_MAX)
    }

    /// One flip.
    fn flip(&self, class: Class, dice: u64) {
        let (slot, any) = (dice % 64, dice >> 8);
        let desc = GPA + slot * 16;
        let one_of = |choices: &[u64]| choices[(any % choices.len() as u64) as usize];
        let avail = self.places.1 - self.mem.uva() + GPA;
        let available = if self.packed { flag::AVAIL } else { 0 };
        // Flags stand in another place there.
        let flags_at = if self.packed { 14 } else { 12 };
        match class {
            Class::Address => {
                let end = GPA + self.mem.len();
                let near = BUFFERS + any % 60_000;
                let addr = one_of(&[near, end - 100, end, 0, u64::MAX - 50, near]);
                self.mem.write(desc, &addr.to_le_bytes());
            }
            Class::Length => {
                let len = one_of(&[0, 11, 12, 13, 76, 212, 2012, 2013, 65_536, 0xffff_ffff]);
                self.mem.write(desc + 8, &(len as u32).to_le_bytes());
            }
            Class::Flags => {
                let flags = one_of(&[0, 0, 0, 1]) as u16 | available;
                self.mem.write(desc + flags_at, &flags.to_le_bytes());
            }
            Class::NextOrId => {
                let at = if self.packed { 12 } else { 14 };
                self.mem.write(desc + at, &(any as u16).to_le_bytes());
            }
            Class::Index if self.packed => {
                let flags = if any & 7 == 0 { 0 } else { available };
                self.mem.write(desc + 14, &flags.to_le_bytes());
            }
            Class::Index => {
                self.mem.write(avail + 2, &(any as u16 % 64).to_le_bytes());
            }
            Class::Entry if self.packed => {
                self.mem
                    .write(desc + 12, &(any as u16 % SIZE).to_le_bytes());
            }
            Class::Entry => {
                self.mem
                    .write(avail + 4 + 2 * slot, &(any as u16 % 64).to_le_bytes());
            }
            Class::NetHeader => {
                self.mem.write(BUFFERS + slot * STRIDE, &any.to_le_bytes());
            }
            Class::EthernetHead => {
                let at = BUFFERS + slot * STRIDE + 12 + dice % 50;
                self.mem.write(at, &any.to_le_bytes());
            }
            Class::Table => {
                // Every buffer a table of one to three, in the last quarter of the memory.
                let table = BUFFERS + 600_000 + slot * 64;
                let entry = BUFFERS + any % 600_000;
                let (goes_on, next) = (u64::from(any & 1023 == 1023), any % 3);
                let tail = one_of(&[212, 100, 0, 3000]) | (goes_on << 32) | (next << 48);
                self.mem.write(table + any % 3 * 16, &entry.to_le_bytes());
                self.mem
                    .write(table + any % 3 * 16 + 8, &tail.to_le_bytes());
                self.mem.write(desc, &table.to_le_bytes());
                self.mem.write(desc + 8, &48u32.to_le_bytes());
                let flags = flag::INDIRECT | available;
                self.mem.write(desc + flags_at, &flags.to_le_bytes());
            }
        }
    }
}

/// SplitMix64.
fn next(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (*state ^ (*state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// Takes turns until so many frames were lent; says how many lies ended a ring meanwhile.
fn turns(rig: &Rig, frames: u64) -> u64 {
    let (mut device, mut slots, mut lies, mut seen) = (rig.device(), Slots::new(), 0, 0);
    let mut copy = vec![0u8; 1 << 16];
    while seen < frames {
        let burst = device.lend(&mut slots);
        assert!(burst.count() <= BURST_MAX);
        for index in 0..burst.count() {
            if burst.fault(index).is_some() {
                continue;
            }
            let len = burst.frame_len(index);
            assert!((1..=FRAME_MAX).contains(&len), "a frame of {len} bytes");
            // SAFETY: there is room for more than `FRAME_MAX` bytes.
            unsafe { burst.copy(index, copy.as_mut_ptr()) };
            let head = 64.min(len as usize);
            assert_eq!(
                copy[..head],
                burst.heads()[index].0[..head],
                "delivered is not what was checked"
            );
        }
        let count = burst.count() as u64;
        seen += count;
        if device.poison().is_set() {
            lies += 1;
            seen += 1; // the buffer that the lie was in
            device = rig.device();
        }
    }
    lies
}

#[test]
fn h45_h61_whatever_changes_meanwhile_what_was_checked_is_delivered() {
    let frames = std::env::var("FLIP_FRAMES").map_or(FRAMES, |n| n.parse().expect("a number"));
    let only = std::env::var("FLIP_CLASSES").unwrap_or_default();
    for packed in [false, true] {
        for class in CLASSES {
            let name = format!("{} {class:?}", if packed { "packed" } else { "split" });
            if !name.contains(&only) {
                continue;
            }
            let rig = Rig::new(packed);
            let over = AtomicBool::new(false);
            let (lies, flips) = std::thread::scope(|scope| {
                let flipper = scope.spawn(|| {
                    let (mut state, mut flips) = (class as u64, 0u64);
                    while !over.load(Ordering::Relaxed) {
                        rig.flip(class, next(&mut state));
                        flips += 1;
                    }
                    flips
                });
                let lies = turns(&rig, frames);
                over.store(true, Ordering::Relaxed);
                (lies, flipper.join().expect("the flipper"))
            });
            println!("{name}: {frames} frames, {flips} flips, {lies} lies found");
        }
    }
}
