//! H42 to H62: rings.

use std::os::fd::AsFd as _;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use ringway::guest::messages::addresses;
use ringway::guest::{Layout, Options, Rx, Tx};
use ringway::virtio::driver::Raw;
use ringway::virtio::own_mem::OwnMem;
use ringway::virtio::ring::flag;
use testkit::topology::frame;

use super::api::PATIENCE;
use super::case::Case;
use super::rig::friend_mac;
use super::talk::{event, pair, req};
use super::x::{Wild, X};

/// Words of the reasons for which a guest with a lying ring is put out.
pub(super) const LIES: [&str; 5] = ["index", "descriptor", "chain", "direction", "indirect"];

/// Posts buffers by hand into a transmit ring that nothing was sent through before.
pub(super) struct Hand {
    packed: bool,
    size: u16,
    /// Descriptors and buffers posted so far.
    next: u32,
    posted: u16,
}

impl Hand {
    pub(super) fn new(options: &Options) -> Hand {
        Hand {
            packed: options.layout == Layout::Packed,
            size: options.ring_size,
            next: 0,
            posted: 0,
        }
    }

    /// A chain of (address, length, flags), and a kick.
    pub(super) fn post(&mut self, tx: &mut Tx, chain: &[(u64, u32, u16)]) {
        let raw = tx.raw();
        match self.packed {
            true => self.post_packed(&raw, chain),
            false => self.post_split(&raw, chain),
        }
        tx.kick_anyway();
    }

    fn post_split(&mut self, raw: &Raw<'_>, chain: &[(u64, u32, u16)]) {
        let size = u32::from(self.size);
        let head = (self.next % size) as u16;
        for (index, &(addr, len, flags)) in chain.iter().enumerate() {
            let slot = ((self.next + index as u32) % size) as u16;
            let next = ((self.next + index as u32 + 1) % size) as u16;
            let more = if index + 1 < chain.len() {
                flag::NEXT
            } else {
                0
            };
            raw.set_desc(slot, (addr, len, flags | more, next));
        }
        raw.set_avail(self.posted, head);
        self.posted = self.posted.wrapping_add(1);
        raw.set_avail_idx(self.posted);
        self.next += chain.len() as u32;
    }

    fn post_packed(&mut self, raw: &Raw<'_>, chain: &[(u64, u32, u16)]) {
        let size = u32::from(self.size);
        // The first one last: the switch looks there.
        for (index, &(addr, len, flags)) in chain.iter().enumerate().rev() {
            let at = self.next + index as u32;
            let lap = if (at / size).is_multiple_of(2) {
                flag::AVAIL
            } else {
                flag::USED
            };
            let more = if index + 1 < chain.len() {
                flag::NEXT
            } else {
                0
            };
            let slot = (at % size) as u16;
            raw.set_desc(slot, (addr, len, slot, flags | more | lap));
        }
        self.posted = self.posted.wrapping_add(1);
        self.next += chain.len() as u32;
    }

    /// Whether the switch has given enough back to post one descriptor more.
    pub(super) fn has_room(&self, tx: &Tx) -> bool {
        let (raw, size) = (tx.raw(), u32::from(self.size));
        if self.next < size {
            return true;
        }
        if self.packed {
            // The oldest one: used in the last lap.
            let (_, _, _, flags) = raw.desc((self.next % size) as u16);
            let lap = (self.next / size - 1).is_multiple_of(2);
            return (flags & flag::AVAIL != 0) == lap && (flags & flag::USED != 0) == lap;
        }
        self.posted.wrapping_sub(raw.used_idx()) < self.size
    }
}

/// A guest whose transmit ring is free for a hand, in the layout of the seed.
fn by_hand(x: &X<'_>) -> Result<(Wild, Hand)> {
    let options = Options {
        in_order: false,
        ..x.options()
    };
    let hand = Hand::new(&options);
    Ok((x.attach(options)?, hand))
}

/// The same with split rings.
fn split_by_hand(x: &X<'_>) -> Result<(Wild, Hand)> {
    let options = Options {
        in_order: false,
        ..x.plain()
    };
    let hand = Hand::new(&options);
    Ok((x.attach(options)?, hand))
}

/// Where frames of the attacker's may lie: behind its rings, well inside its memory.
pub(super) fn room(memory: &OwnMem) -> u64 {
    memory.gpa() + memory.len() - 256 * 1024
}

/// Writes a virtio-net header and a frame, and says where and how long.
pub(super) fn lay(memory: &OwnMem, at: u64, header: [u8; 12], bytes: &[u8]) -> (u64, u32, u16) {
    let all = [&header[..], bytes].concat();
    assert!(memory.write(at, &all), "inside the memory");
    (at, all.len() as u32, 0)
}

/// A frame to the friend that no other one is like.
fn hello(x: &mut X<'_>) -> Vec<u8> {
    frame(friend_mac(), x.mac(), &x.any().to_le_bytes())
}

#[test]
pub(super) fn h42_an_available_index_ahead_of_the_ring() -> Result<()> {
    Case::of("H42").run(|x| {
        let mut wild = x.attach(Options {
            in_order: false,
            ..x.plain()
        })?;
        wild.announce(x)?;
        let jump = 257 + x.below(65_000) as u16;
        if x.below(2) == 0 {
            let raw = wild.queues.tx.raw();
            raw.set_avail_idx(raw.avail_idx().wrapping_add(jump));
            wild.queues.tx.kick_anyway();
        } else {
            while wild.queues.rx.receive(|_| ()) > 0 {}
            let raw = wild.queues.rx.raw();
            raw.set_avail_idx(raw.avail_idx().wrapping_add(jump));
            x.gets_frames(300, 60)?;
        }
        x.is_put_out(&["available index"])
    })
}

#[test]
pub(super) fn h43_descriptors_beyond_the_table() -> Result<()> {
    Case::of("H43").run(|x| {
        let (mut wild, _) = split_by_hand(x)?;
        let at = room(&*wild.memory()?);
        let beyond = 256 + x.below(65_000) as u16;
        let raw = wild.queues.tx.raw();
        if x.below(2) == 0 {
            raw.set_avail(0, beyond);
        } else {
            raw.set_desc(7, (at, 20, flag::NEXT, beyond));
            raw.set_avail(0, 7);
        }
        raw.set_avail_idx(1);
        wild.queues.tx.kick_anyway();
        x.is_put_out(&["descriptor"])
    })
}

#[test]
pub(super) fn h44_chains_without_end() -> Result<()> {
    Case::of("H44").run(|x| {
        let (mut wild, mut hand) = by_hand(x)?;
        let at = room(&*wild.memory()?);
        if hand.packed {
            hand.post(&mut wild.queues.tx, &vec![(at, 60, flag::NEXT); 256]);
            return x.is_put_out(&["chain"]);
        }
        let raw = wild.queues.tx.raw();
        match x.below(3) {
            0 => raw.set_desc(7, (at, 60, flag::NEXT, 7)),
            1 => {
                raw.set_desc(7, (at, 0, flag::NEXT, 8));
                raw.set_desc(8, (at, 0, flag::NEXT, 7));
            }
            _ => (0..256).for_each(|n| raw.set_desc(n, (at, 1, flag::NEXT, (n + 1) % 256))),
        }
        raw.set_avail(0, 7);
        raw.set_avail_idx(1);
        wild.queues.tx.kick_anyway();
        x.is_put_out(&["chain"])
    })
}

#[test]
pub(super) fn h46_indirect_tables_that_are_none() -> Result<()> {
    Case::of("H46").run(|x| {
        let what = x.below(7);
        let options = Options {
            in_order: false,
            indirect: what != 6,
            ..x.options()
        };
        let mut hand = Hand::new(&options);
        let mut wild = x.attach(options)?;
        let memory = wild.memory()?;
        let at = room(&memory);
        let entry = |flags: u16| -> Vec<u8> {
            let words = [at + 4096, u64::from(flags) << 32 | 72];
            words.iter().flat_map(|word| word.to_le_bytes()).collect()
        };
        memory.write(at, &entry(0));
        let chain = match what {
            0 => vec![(at, 17, flag::INDIRECT)],
            1 => vec![(at, 0, flag::INDIRECT)],
            2 => vec![(at, 15, flag::INDIRECT)],
            3 => vec![(memory.gpa() + memory.len() - 16, 64, flag::INDIRECT)],
            4 => {
                memory.write(at, &entry(flag::INDIRECT));
                vec![(at, 16, flag::INDIRECT)]
            }
            5 => vec![(at, 16, flag::INDIRECT), (at, 16, 0)],
            _ => vec![(at, 16, flag::INDIRECT)],
        };
        hand.post(&mut wild.queues.tx, &chain);
        // A packed table has ids and flags the other way round: nested or not is a matter of its flags.
        if hand.packed && what == 4 {
            return x.is_kept_or_put_out(&LIES);
        }
        x.is_put_out(&["indirect"])
    })
}

#[test]
pub(super) fn h47_addresses_outside_the_memory_cost_that_frame_alone() -> Result<()> {
    Case::of("H47").run(|x| {
        let (mut wild, mut hand) = by_hand(x)?;
        let memory = wild.memory()?;
        let end = memory.gpa() + memory.len();
        for at in [0, 0x7fff_ffff_f000, u64::MAX - 10, end, memory.gpa() - 1] {
            hand.post(&mut wild.queues.tx, &[(at, 100, 0)]);
        }
        // In the middle of a chain, and with nothing in it.
        let good = lay(&memory, room(&memory), [0; 12], &hello(x));
        hand.post(&mut wild.queues.tx, &[good, (end + 4096, 60, 0)]);
        x.wait_dropped("bad_address", 6)?;
        let bytes = hello(x);
        let good = lay(&memory, room(&memory), [0; 12], &bytes);
        x.friend_gets(&bytes, || {
            hand.post(&mut wild.queues.tx, &[(room(&memory), 0, 0), good]);
            Ok(())
        })?;
        x.is_kept()
    })
}

#[test]
pub(super) fn h48_a_buffer_that_ends_where_the_memory_ends_is_used_and_one_byte_more_is_not()
-> Result<()> {
    Case::of("H48").run(|x| {
        let (mut wild, mut hand) = by_hand(x)?;
        let memory = wild.memory()?;
        let bytes = hello(x);
        let at = memory.gpa() + memory.len() - 12 - bytes.len() as u64;
        let last = lay(&memory, at, [0; 12], &bytes);
        x.friend_gets(&bytes, || {
            hand.post(&mut wild.queues.tx, &[last]);
            Ok(())
        })?;
        hand.post(&mut wild.queues.tx, &[(at, last.1 + 1, 0)]);
        hand.post(&mut wild.queues.tx, &[(at + 1, last.1, 0)]);
        x.wait_dropped("bad_address", 2)?;
        x.is_kept()
    })
}

#[test]
pub(super) fn h49_buffers_that_are_rings_harm_their_owner_alone() -> Result<()> {
    Case::of("H49").run(|x| {
        let mut wild = x.attach(Options {
            in_order: false,
            ..x.plain()
        })?;
        wild.announce(x)?;
        let memory = wild.memory()?;
        // What comes for the attacker is written over its own rings.
        let raw = wild.queues.rx.raw();
        for slot in 0..256 {
            let at = memory.gpa() + x.below(8192);
            raw.set_desc(slot, (at, 2048, flag::WRITE, 0));
        }
        let len = 60 + x.below(1400) as usize;
        x.gets_frames(300, len)?;
        wild.queues.tx.kick_anyway();
        x.innocents_go_on()?;
        x.is_kept_or_put_out(&LIES)
    })
}

#[test]
pub(super) fn h50_frames_too_long_or_in_too_many_pieces_are_dropped() -> Result<()> {
    Case::of("H50").run(|x| {
        x.port_again(",mtu=1500")?;
        let (mut wild, mut hand) = by_hand(x)?;
        let at = room(&*wild.memory()?);
        let (chain, reason): (Vec<(u64, u32, u16)>, _) = match x.below(5) {
            0 => (vec![(at, u32::MAX, 0)], "bad_address"),
            1 => (vec![(at, 12 + 1519, 0)], "oversize"),
            2 => (vec![(at, 4096, 0); 17], "oversize"),
            3 => (vec![(at, 20, 0); 60], "too_many_segments"),
            _ => (vec![(at, 1, 0); 100], "too_many_segments"),
        };
        hand.post(&mut wild.queues.tx, &chain);
        x.wait_dropped(reason, 1)?;
        x.is_kept()
    })
}

#[test]
pub(super) fn h51_h52_headers_in_pieces_are_read_rightly_and_chains_of_headers_alone_dropped()
-> Result<()> {
    Case::of("H51 H52").run(|x| {
        let (mut wild, mut hand) = by_hand(x)?;
        let memory = wild.memory()?;
        for cuts in [
            vec![4, 8],
            vec![12],
            vec![11, 12, 13],
            vec![1, 2, 3, 20],
            vec![26],
        ] {
            let bytes = hello(x);
            let (at, len, _) = lay(&memory, room(&memory), [0xff; 12], &bytes);
            let ends = cuts.iter().copied().chain([len]);
            let starts = std::iter::once(0).chain(cuts.iter().copied());
            let chain: Vec<_> = starts
                .zip(ends)
                .map(|(from, to)| (at + u64::from(from), to - from, 0))
                .collect();
            x.friend_gets(&bytes, || {
                hand.post(&mut wild.queues.tx, &chain);
                Ok(())
            })?;
        }
        let at = room(&memory);
        for len in [0, 1, 11, 12] {
            hand.post(&mut wild.queues.tx, &[(at, len, 0)]);
        }
        hand.post(&mut wild.queues.tx, &[(at, 6, 0), (at, 6, 0)]);
        for short in 1..14 {
            hand.post(&mut wild.queues.tx, &[(at, 12 + short, 0)]);
        }
        x.wait_dropped("runt", 18)?;
        x.is_kept()
    })
}

/// Gives every buffer of a receive ring another length and other flags.
pub(super) fn reshape(rx: &Rx, len: u32, packed: bool, writable: bool) {
    let raw = rx.raw();
    for slot in 0..256 {
        let (addr, _, third, fourth) = raw.desc(slot);
        let flags = if packed { fourth } else { third };
        let flags = if writable {
            flags
        } else {
            flags & !flag::WRITE
        };
        let rest = if packed {
            (third, flags)
        } else {
            (flags, fourth)
        };
        raw.set_desc(slot, (addr, len, rest.0, rest.1));
    }
}

#[test]
pub(super) fn h53_receive_buffers_too_small_for_anything() -> Result<()> {
    Case::of("H53").run(|x| {
        let options = x.options();
        let packed = options.layout == Layout::Packed;
        let wild = x.attach(options)?;
        let mut wild = wild;
        wild.announce(x)?;
        reshape(&wild.queues.rx, x.one_of(&[0, 1, 11, 12, 13]), packed, true);
        x.gets_frames(300, 200)?;
        x.innocents_go_on()?;
        x.is_kept()
    })
}

#[test]
pub(super) fn h53_receive_buffers_for_the_wrong_direction() -> Result<()> {
    Case::of("H53 direction").at_once(1).run(|x| {
        let options = x.options();
        let packed = options.layout == Layout::Packed;
        let mut wild = x.attach(options)?;
        wild.announce(x)?;
        while wild.queues.rx.receive(|_| ()) > 0 {}
        reshape(&wild.queues.rx, 2048, packed, false);
        x.gets_frames(600, 200)?;
        x.is_put_out(&["direction"])
    })
}

#[test]
pub(super) fn h54_ids_flags_and_events_of_a_packed_ring_at_random() -> Result<()> {
    Case::of("H54").run(|x| {
        let mut wild = x.attach(x.plain().packed())?;
        let memory = wild.memory()?;
        let at = room(&memory);
        let mask = x.one_of(&[flag::AVAIL, flag::AVAIL | flag::USED, 0xffff]);
        for slot in 0..256 {
            let flags = x.any() as u16 & mask | if x.below(2) == 0 { flag::AVAIL } else { 0 };
            let desc = (at + x.below(1000), 72, x.any() as u16, flags);
            wild.queues.tx.raw().set_desc(slot, desc);
            wild.queues.rx.raw().set_driver_event(x.any() as u32);
        }
        wild.queues.tx.kick_anyway();
        x.gets_frames(100, 60)?;
        x.innocents_go_on()?;
        x.is_kept_or_put_out(&LIES)
    })
}

#[test]
pub(super) fn h55_one_bad_buffer_in_a_batch_does_not_cost_the_others() -> Result<()> {
    Case::of("H55").run(|x| {
        let (mut wild, mut hand) = by_hand(x)?;
        let memory = wild.memory()?;
        let bad = x.below(3);
        let bytes = hello(x);
        x.friend_gets(&bytes, || {
            for n in 0..4 {
                let at = room(&memory) + n * 4096;
                let good = lay(&memory, at, [0; 12], &bytes);
                let piece = if n == bad { (8, 72, 0) } else { good };
                hand.post(&mut wild.queues.tx, &[piece]);
            }
            Ok(())
        })?;
        x.wait_dropped("bad_address", 1)?;
        ensure!(x.dropped("bad_address")? == 1, "others were dropped too");
        x.is_kept()
    })
}

#[test]
pub(super) fn h56_h57_what_the_switch_wrote_is_never_read_back_and_wishes_are_only_wishes()
-> Result<()> {
    Case::of("H56 H57").run(|x| {
        let options = Options {
            in_order: false,
            event_idx: x.below(2) == 0,
            ..x.plain()
        };
        let mut hand = Hand::new(&options);
        let mut wild = x.attach(options)?;
        let memory = wild.memory()?;
        for _ in 0..10 {
            let raw = wild.queues.tx.raw();
            raw.set_used_idx(x.any() as u16);
            raw.set_used(x.any() as u16, (x.any() as u32, x.any() as u32));
            raw.set_used_event(x.any() as u16);
            raw.set_avail_flags(x.any() as u16);
            let raw = wild.queues.rx.raw();
            raw.set_used_event(x.any() as u16);
            raw.set_avail_flags(x.any() as u16);
            let bytes = hello(x);
            let good = lay(&memory, room(&memory), [0; 12], &bytes);
            x.friend_gets(&bytes, || {
                hand.post(&mut wild.queues.tx, &[good]);
                Ok(())
            })?;
        }
        x.is_kept()
    })
}

#[test]
pub(super) fn h58_a_frame_that_needs_more_buffers_than_there_are_is_dropped_at_once() -> Result<()>
{
    Case::of("H58").run(|x| {
        let mut wild = x.attach(Options {
            ring_size: 4,
            receive_buffer: 256,
            mergeable: true,
            ..x.options()
        })?;
        wild.announce(x)?;
        while wild.queues.rx.receive(|_| ()) > 0 {}
        x.gets_frames(100, 1200)?;
        x.wait_dropped("tx_full", 100)?;
        x.innocents_go_on()?;
        x.is_kept()
    })
}

#[test]
pub(super) fn h60_h82_h87_who_never_takes_its_frames_loses_them_and_nobody_waits() -> Result<()> {
    Case::of("H60 H82 H87").run(|x| {
        let mut wild = x.attach(x.options())?;
        wild.announce(x)?;
        x.gets_frames(2000, 200)?;
        x.wait_dropped("tx_full", 1000)?;
        x.innocents_go_on()?;
        x.is_kept()
    })
}

#[test]
pub(super) fn h62_rings_switched_on_and_off_in_full_traffic() -> Result<()> {
    Case::of("H62").run(|x| {
        let mut wild = x.attach(x.options())?;
        wild.announce(x)?;
        let talk = wild.talk()?;
        for round in 0..40 {
            wild.guest.enable(0, round % 2 == 1)?;
            x.gets_frames(4, 60)?;
        }
        let (ring, end) = (x.below(2) as u32, Instant::now() + PATIENCE);
        talk.say(req::GET_VRING_BASE, &pair(ring, 0))?;
        let base = talk.hear()?;
        ensure!(base.is_some() && Instant::now() < end, "no answer");
        x.gets_frames(20, 60)?;
        std::thread::sleep(Duration::from_millis(2));
        // Asked again: nothing has moved since.
        talk.say(req::GET_VRING_BASE, &pair(ring, 0))?;
        ensure!(talk.hear()? == base, "the ring moved after it was stopped");
        Ok(())
    })
}

#[test]
pub(super) fn h90_rings_that_do_not_fit_their_indices_after_a_restart() -> Result<()> {
    Case::of("H90").run(|x| {
        let memory = OwnMem::new(1 << 20, 0x1000_0000, false)?;
        let talk = x.connect()?;
        talk.shake(false, 0)?;
        talk.share(&memory)?;
        let kick = event()?;
        // The used index is where no switch left it, and more is available from there than the ring holds.
        let (used, ahead) = (x.any() as u16, 257 + x.below(60_000) as u16);
        for ring in 0..2u32 {
            let at = u64::from(ring) * 65_536;
            let (desc, avail, taken) = (at, at + 8192, at + 16_384);
            memory.write(
                memory.gpa() + avail + 2,
                &used.wrapping_add(ahead).to_le_bytes(),
            );
            memory.write(memory.gpa() + taken + 2, &used.to_le_bytes());
            let uva = memory.uva();
            let places = addresses(ring, uva + desc, uva + taken, uva + avail);
            talk.say(req::SET_VRING_NUM, &pair(ring, 256))?;
            talk.say(req::SET_VRING_BASE, &pair(ring, 0))?;
            talk.say(req::SET_VRING_ADDR, &places)?;
            talk.say_with(req::SET_VRING_KICK, &pair(ring, 0), &[kick.as_fd()])?;
            talk.say(req::SET_VRING_ENABLE, &pair(ring, 1))?;
        }
        rustix::io::write(&kick, &1u64.to_ne_bytes())?;
        x.is_put_out(&["available index"])
    })
}

/// A processor that guesses the outcome of the check must not read beyond the table either: every index that a guest wrote is masked
/// where it is used (Spectre, variant 1). Packed rings are walked by an index of our own.
#[test]
fn h103_indices_that_guests_write_are_masked_besides_the_check() -> Result<()> {
    let code = std::fs::read_to_string("../switch/src/virtio/split.rs")?;
    let reads: Vec<&str> = (code.lines().map(str::trim))
        .filter(|line| line.contains("table.read("))
        .collect();
    ensure!(
        reads.len() >= 2,
        "the table is read in another way: {reads:?}"
    );
    for line in reads {
        let masked = line.contains("& mask)") || line.contains("& (table.size - 1))");
        ensure!(masked, "not masked: {line}");
    }
    Ok(())
}
