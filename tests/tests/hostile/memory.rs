//! H31 to H41: memory.

use std::os::fd::{AsFd as _, BorrowedFd};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use ringway::guest::messages::{RegionEntry, addresses, mem_table};
use ringway::guest::{MemoryKind, Options};
use ringway::virtio::own_mem::OwnMem;
use rustix::fs::{FallocateFlags, MemfdFlags, fallocate, fstat, ftruncate, memfd_create};
use rustix::process::{Pid, Resource, Rlimit, getrlimit, prlimit};

use super::api::PATIENCE;
use super::case::Case;
use super::rig::friend_mac;
use super::rings::{Hand, LIES};
use super::sockets::is_refused;
use super::talk::{event, pair, req, whole};
use super::x::{Wild, X};
use testkit::topology::frame;

/// Words of the reasons for which a guest that takes memory away is put out. Zeros of ours in the place of its ring may also look
/// like a lie.
const MEMORY: [&str; 2] = ["memory", "pages it never touched"];

/// Sends a burst without waiting for anything.
fn burst(wild: &mut Wild, x: &X<'_>) {
    let bytes = frame(friend_mac(), x.mac(), b"on the way");
    wild.queues.tx.send(64, |slot| {
        slot.write(0, &bytes);
        bytes.len()
    });
}

#[test]
pub(super) fn h31_memory_that_is_truncated_costs_its_own_port_alone() -> Result<()> {
    Case::of("H31").run(|x| {
        let mut wild = x.attach(x.options())?;
        wild.announce(x)?;
        let memory = wild.memory()?;
        let left = x.one_of(&[0, 4096, memory.len() / 2]);
        match x.below(3) {
            0 => {}
            1 => burst(&mut wild, x),
            _ => x.gets_frames(32, 200)?,
        }
        ftruncate(memory.fd(), left)?;
        // From here on nothing of ours may touch it either.
        x.gets_frames(300, 200)?;
        wild.queues.tx.kick_anyway();
        if left == 0 {
            return x.is_put_out(&MEMORY);
        }
        x.is_kept_or_put_out(&MEMORY)
    })
}

#[test]
pub(super) fn h31_memory_that_is_truncated_during_the_handshake() -> Result<()> {
    Case::of("H31 handshake").run(|x| {
        let memory = OwnMem::new(1 << 20, 0x1000_0000, false)?;
        let talk = x.connect()?;
        talk.shake(false, 0)?;
        talk.share(&memory)?;
        let early = x.below(2) == 0;
        if early {
            ftruncate(memory.fd(), 0)?;
        }
        let (kick, at) = (event()?, memory.uva());
        for ring in 0..2 {
            talk.say(req::SET_VRING_NUM, &pair(ring, 256))?;
            talk.say(req::SET_VRING_BASE, &pair(ring, 0))?;
            let at = at + u64::from(ring) * 65_536;
            talk.say(
                req::SET_VRING_ADDR,
                &addresses(ring, at, at + 16_384, at + 8192),
            )?;
            talk.say_with(req::SET_VRING_KICK, &pair(ring, 0), &[kick.as_fd()])?;
            talk.say(req::SET_VRING_ENABLE, &pair(ring, 1))?;
        }
        if !early {
            ftruncate(memory.fd(), 0)?;
        }
        rustix::io::write(&kick, &1u64.to_ne_bytes())?;
        x.is_put_out(&MEMORY)
    })
}

/// Does something over and over for some time, while the friend sends to the attacker.
fn meanwhile(x: &X<'_>, time: Duration, mut act: impl FnMut() -> Result<()> + Send) -> Result<()> {
    std::thread::scope(|scope| {
        let end = Instant::now() + time;
        let acts = scope.spawn(move || -> Result<()> {
            while Instant::now() < end {
                act()?;
            }
            Ok(())
        });
        while Instant::now() < end {
            x.gets_frames(16, 200)?;
        }
        acts.join().map_err(|_| anyhow::anyhow!("a panic"))?
    })
}

#[test]
pub(super) fn h32_memory_that_comes_and_goes_is_never_trusted_again() -> Result<()> {
    Case::of("H32").run(|x| {
        let mut wild = x.attach(x.options())?;
        wild.announce(x)?;
        let memory = wild.memory()?;
        meanwhile(x, Duration::from_millis(20), || {
            ftruncate(memory.fd(), 0)?;
            ftruncate(memory.fd(), memory.len())?;
            Ok(())
        })?;
        x.is_kept_or_put_out(&[&MEMORY[..], &LIES[..]].concat())
    })
}

#[test]
pub(super) fn h33_h39_tables_that_cannot_be_are_refused_and_nothing_stays_mapped() -> Result<()> {
    Case::of("H33 H39").run(|x| {
        let talk = x.connect()?;
        talk.shake(true, 0)?;
        let memory = OwnMem::new(1 << 20, 0x1000_0000, false)?;
        let good = whole(&memory);
        let regions = match x.below(8) {
            0 => vec![RegionEntry {
                size: good.size + 4096,
                ..good
            }],
            1 => vec![RegionEntry {
                offset: 4096,
                ..good
            }],
            2 => vec![],
            3 => vec![RegionEntry { size: 0, ..good }],
            4 => vec![RegionEntry {
                offset: 8,
                size: 4096,
                ..good
            }],
            5 => vec![RegionEntry {
                guest: u64::MAX - 4095,
                ..good
            }],
            6 => vec![RegionEntry {
                user: !4095,
                ..good
            }],
            _ => vec![RegionEntry {
                size: 1 << 47,
                ..good
            }],
        };
        let fds = vec![memory.fd(); regions.len()];
        let words = ["memory", "at fault"];
        is_refused(
            x,
            &talk,
            (req::SET_MEM_TABLE, &mem_table(&regions)),
            &fds,
            &words,
        )
    })
}

#[test]
pub(super) fn h39_more_regions_than_the_message_has_room_for() -> Result<()> {
    Case::of("H39 many").run(|x| {
        let talk = x.connect()?;
        talk.shake(true, 0)?;
        let memory = OwnMem::new(1 << 20, 0x1000_0000, false)?;
        let region = |n: u64| RegionEntry {
            guest: 0x1000_0000 + n * 4096,
            user: memory.uva() + n * 4096,
            size: 4096,
            offset: n * 4096,
        };
        let count = x.one_of(&[8, 33, 48]);
        let mut table = mem_table(&(0..count).map(region).collect::<Vec<_>>());
        if count == 8 {
            // A number of regions that is not theirs.
            table[..8].copy_from_slice(&(x.any() | 64).to_le_bytes());
        }
        let fds = vec![memory.fd(); (count as usize).min(32)];
        is_refused(
            x,
            &talk,
            (req::SET_MEM_TABLE, &table),
            &fds,
            &["memory", "at fault"],
        )
    })
}

#[test]
pub(super) fn h34_a_sparse_file_is_not_filled_at_our_expense() -> Result<()> {
    const SPARSE: u64 = 0x100_0000_0000;
    Case::of("H34").seeds(8).run(|x| {
        let options = Options {
            in_order: false,
            ..x.options()
        };
        let mut hand = Hand::new(&options);
        let mut wild = x.attach(options)?;
        let (memory, size) = (wild.memory()?, 64u64 << 30);
        let file = memfd_create("sparse", MemfdFlags::CLOEXEC)?;
        ftruncate(&file, size)?;
        let sparse = RegionEntry {
            guest: SPARSE,
            user: 0x6000_0000_0000,
            size,
            offset: 0,
        };
        let table = mem_table(&[whole(&memory), sparse]);
        let talk = wild.talk()?;
        talk.say_with(req::SET_MEM_TABLE, &table, &[memory.fd(), file.as_fd()])?;
        talk.say(req::GET_FEATURES, &[])?;
        talk.hear()?;
        // One frame per page that nobody ever touched: more pages than 64 MiB have.
        for page in 0..20_000 {
            let end = Instant::now() + PATIENCE;
            let at = SPARSE + page * (4 << 20) % size + page / 16_384 * 4096;
            hand.post(&mut wild.queues.tx, &[(at, 72, 0)]);
            while !hand.has_room(&wild.queues.tx) && wild.guest.connected() {
                ensure!(Instant::now() < end, "the switch takes no more frames");
                std::thread::yield_now();
            }
            if !wild.guest.connected() {
                break;
            }
        }
        x.is_put_out(&["never touched"])?;
        let filled = fstat(&file)?.st_blocks as u64 * 512;
        ensure!(filled <= 65 << 20, "{filled} bytes were filled");
        Ok(())
    })
}

#[test]
pub(super) fn h35_h36_holes_punched_under_rings_and_buffers_stay_the_attackers_own() -> Result<()> {
    Case::of("H35 H36").run(|x| {
        let mut wild = x.attach(x.options())?;
        wild.announce(x)?;
        let memory = wild.memory()?;
        let (from, len) = match x.below(3) {
            0 => (0, memory.len()),
            // The rings alone, the buffers alone.
            1 => (0, 8192),
            _ => (65_536, memory.len() - 65_536),
        };
        meanwhile(x, Duration::from_millis(20), || {
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            Ok(fallocate(memory.fd(), flags, from, len)?)
        })?;
        x.is_kept_or_put_out(&[&MEMORY[..], &LIES[..]].concat())
    })
}

#[test]
pub(super) fn h37_memory_that_can_be_swapped_is_refused_where_the_port_demands_hugepages()
-> Result<()> {
    Case::of("H37").run(|x| {
        x.port_again(",hugepages=required")?;
        let talk = x.connect()?;
        talk.shake(true, 0)?;
        let memory = OwnMem::new(1 << 20, 0x1000_0000, false)?;
        let table = mem_table(&[whole(&memory)]);
        is_refused(
            x,
            &talk,
            (req::SET_MEM_TABLE, &table),
            &[memory.fd()],
            &["hugepages"],
        )?;
        x.port_again("")
    })
}

/// 64 MiB of memory whose pages vanish over and over, while the friend sends to the attacker and the attacker sends.
fn storm(x: &mut X<'_>, memory: MemoryKind) -> Result<()> {
    let mut wild = x.attach(Options {
        ring_size: 1024,
        receive_buffer: 32 << 10,
        frame_max: 32 << 10,
        memory,
        ..x.options()
    })?;
    wild.announce(x)?;
    let memory = wild.memory()?;
    meanwhile(x, Duration::from_millis(60), || {
        burst(&mut wild, x);
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        Ok(fallocate(memory.fd(), flags, 0, memory.len())?)
    })?;
    x.is_kept_or_put_out(&[&MEMORY[..], &LIES[..]].concat())
}

#[test]
pub(super) fn h36_a_storm_of_holes_in_small_pages_stays_the_attackers_own() -> Result<()> {
    Case::of("H36 4 KiB").run(|x| storm(x, MemoryKind::Memfd))
}

#[test]
pub(super) fn h36_a_storm_of_holes_in_hugepages_stays_the_attackers_own() -> Result<()> {
    testkit::require!(testkit::skip::hugepages(256));
    Case::of("H36 hugetlb").run(|x| storm(x, MemoryKind::Hugepages))
}

#[test]
fn h101_a_switch_that_can_map_no_more_refuses_and_goes_on() -> Result<()> {
    Case::of("H101").at_once(1).seeds(5).run(|x| {
        let talk = x.connect()?;
        talk.shake(false, 0)?;
        talk.say(req::GET_FEATURES, &[])?;
        talk.hear()?;
        // Room for what the switch does itself, and not for 256 MiB of a guest's.
        let memory = OwnMem::new(256 << 20, 0x1000_0000, false)?;
        let (pid, now) = (
            Pid::from_raw(x.rig.pid as i32).context("a pid")?,
            std::fs::read_to_string(format!("/proc/{}/statm", x.rig.pid))?,
        );
        let pages: u64 = now.split(' ').next().unwrap_or("").parse()?;
        let little = Rlimit {
            current: Some(pages * 4096 + (32 << 20)),
            maximum: getrlimit(Resource::As).maximum,
        };
        let before = prlimit(Some(pid), Resource::As, little)?;
        talk.share(&memory)?;
        let ended = x.is_put_out(&["memory"]);
        prlimit(Some(pid), Resource::As, before)?;
        ended
    })
}

#[test]
pub(super) fn h40_tables_told_over_and_over_in_full_traffic() -> Result<()> {
    Case::of("H40").run(|x| {
        let mut wild = x.attach(x.options())?;
        wild.announce(x)?;
        for _ in 0..40 {
            burst(&mut wild, x);
            wild.guest.share_again()?;
            x.gets_frames(8, 200)?;
            while wild.queues.rx.receive(|_| ()) > 0 {}
        }
        x.is_kept()
    })
}

#[test]
pub(super) fn h41_regions_that_overlap_are_refused() -> Result<()> {
    Case::of("H41").run(|x| {
        let talk = x.connect()?;
        talk.shake(true, 0)?;
        let memory = OwnMem::new(1 << 20, 0x1000_0000, false)?;
        let one = whole(&memory);
        let far = 1 << 40;
        let other = match x.below(4) {
            0 => one,
            1 => RegionEntry {
                guest: one.guest + 4096,
                user: one.user + far,
                ..one
            },
            2 => RegionEntry {
                guest: one.guest + far,
                user: one.user + 4096,
                ..one
            },
            _ => RegionEntry {
                guest: one.guest - 4096,
                user: one.user + far,
                ..one
            },
        };
        let table = mem_table(&[one, other]);
        let fds: [BorrowedFd<'_>; 2] = [memory.fd(), memory.fd()];
        is_refused(x, &talk, (req::SET_MEM_TABLE, &table), &fds, &["overlap"])
    })
}
