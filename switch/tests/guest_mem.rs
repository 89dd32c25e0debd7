//! Guest memory: what the gate refuses, what a table translates, and what happens when memory vanishes under a reader.
//! Real memfds and, where the host has some, real hugepages.
#![allow(unsafe_code)] // reads and writes foreign memory, and takes it away

use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use proptest::prelude::*;
use ringway::virtio::guest_mem::{
    FillBudget, GuestMem, Hit, MapOptions, MemError, MemoryKind, Poison, PoisonCause, RegionSpec,
};
use ringway::virtio::{guest_fault, guest_mem};
use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags};

const PAGE: u64 = 4096;
const HUGE: u64 = 2 << 20;
const GPA: u64 = 0x1_0000_0000;
const UVA: u64 = 0x7f00_0000_0000;

/// Tests here count the maps and fds of the process: one at a time.
fn alone() -> MutexGuard<'static, ()> {
    static LOCK: Mutex<()> = Mutex::new(());
    LOCK.lock().unwrap_or_else(PoisonError::into_inner)
}

fn memfd(size: u64) -> File {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file = File::from(rustix::fs::memfd_create("guest", flags).unwrap());
    file.set_len(size).unwrap();
    file
}

/// A memfd all of whose pages exist.
fn full_memfd(size: u64) -> File {
    let file = memfd(size);
    rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, size).unwrap();
    file
}

/// Hugepages, all there, or `None` with a loud word.
fn hugepages(pages: u64) -> Option<File> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING | MemfdFlags::HUGETLB;
    let file = rustix::fs::memfd_create("huge", flags).map(File::from);
    let file = file.ok().filter(|f| {
        f.set_len(pages * HUGE).is_ok()
            && rustix::fs::fallocate(f, FallocateFlags::empty(), 0, pages * HUGE).is_ok()
    });
    if file.is_none() {
        eprintln!("SKIPPED: no {pages} free hugepages (echo 64 > /proc/sys/vm/nr_hugepages)");
    }
    file
}

fn spec(file: &File, gpa: u64, len: u64) -> RegionSpec {
    spec_at(file, gpa, len, 0)
}

fn spec_at(file: &File, gpa: u64, len: u64, offset: u64) -> RegionSpec {
    let fd = OwnedFd::from(file.try_clone().unwrap());
    RegionSpec {
        gpa,
        len,
        uva: UVA + gpa,
        fd,
        offset,
    }
}

fn map(specs: Vec<RegionSpec>) -> Result<GuestMem, MemError> {
    GuestMem::map(specs, &Poison::new(), &MapOptions::default())
}

fn map_one(file: &File, len: u64) -> GuestMem {
    map(vec![spec(file, GPA, len)]).unwrap()
}

fn with_budget(file: &File, len: u64, bytes: u64) -> GuestMem {
    let options = MapOptions {
        fill_budget: FillBudget::new(bytes),
        ..MapOptions::default()
    };
    GuestMem::map(vec![spec(file, GPA, len)], &Poison::new(), &options).unwrap()
}

fn at(mem: &GuestMem, offset: u64) -> NonNull<u8> {
    mem.translate(&mut Hit::default(), GPA + offset, 1).unwrap()
}

fn read(mem: &GuestMem, offset: u64) -> u8 {
    // SAFETY: `at` translated it, and `mem` is held.
    unsafe { at(mem, offset).as_ptr().read_volatile() }
}

fn write(mem: &GuestMem, offset: u64, value: u8) {
    // SAFETY: as in `read`.
    unsafe { at(mem, offset).as_ptr().write_volatile(value) }
}

fn punch(file: &File, offset: u64, len: u64) {
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    rustix::fs::fallocate(file, flags, offset, len).unwrap();
}

fn allocated(file: &File) -> u64 {
    rustix::fs::fstat(file).unwrap().st_blocks as u64 * 512
}

// ---- the gate ----

#[test]
fn refuses_a_file_of_a_disk() {
    let _alone = alone();
    let dir =
        std::env::var("CARGO_TARGET_TMPDIR").unwrap_or_else(|_| env!("CARGO_TARGET_TMPDIR").into());
    let file = tempfile::tempfile_in(dir).unwrap();
    file.set_len(PAGE).unwrap();
    let seals = rustix::fs::fcntl_get_seals(&file);
    if seals.is_ok() {
        eprintln!("SKIPPED: the target folder lies on tmpfs");
        return;
    }
    assert!(matches!(
        map(vec![spec(&file, GPA, PAGE)]),
        Err(MemError::NotMemory { gpa: GPA })
    ));
}

#[test]
fn refuses_devices_and_eventfds_and_sockets_and_pipes() {
    let _alone = alone();
    let zero = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/zero")
        .unwrap();
    let eventfd = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap();
    let (socket, _other) = std::os::unix::net::UnixStream::pair().unwrap();
    let (pipe, _writer) = std::io::pipe().unwrap();
    let dir = File::open("/dev/shm").unwrap();
    for fd in [zero.into(), eventfd, socket.into(), pipe.into(), dir.into()] {
        let spec = RegionSpec {
            gpa: GPA,
            len: PAGE,
            uva: UVA,
            fd,
            offset: 0,
        };
        let error = map(vec![spec]).unwrap_err();
        assert!(
            matches!(
                error,
                MemError::NotMemory { .. } | MemError::NotWritable { .. }
            ),
            "{error}"
        );
    }
}

#[test]
fn refuses_memory_opened_for_reading() {
    let _alone = alone();
    let file = memfd(PAGE);
    let reader = File::open(format!("/proc/self/fd/{}", file.as_raw_fd())).unwrap();
    assert!(matches!(
        map(vec![spec(&reader, GPA, PAGE)]),
        Err(MemError::NotWritable { .. })
    ));
}

#[test]
fn refuses_a_file_shorter_than_announced() {
    let _alone = alone();
    let file = memfd(4 * PAGE);
    let short = Err::<(), _>(map(vec![spec(&file, GPA, 4 * PAGE + 1)]).unwrap_err());
    assert!(matches!(
        short,
        Err(MemError::FileTooShort {
            size: 16384,
            announced: 16385,
            ..
        })
    ));
    let behind = map(vec![spec_at(&file, GPA, PAGE, 4 * PAGE)]).unwrap_err();
    assert!(matches!(behind, MemError::FileTooShort { .. }), "{behind}");
    map(vec![spec_at(&file, GPA, PAGE, 3 * PAGE)]).unwrap();
}

#[test]
fn takes_memory_sealed_against_shrinking_and_refuses_memory_sealed_against_writing() {
    let _alone = alone();
    let file = full_memfd(PAGE);
    rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW).unwrap();
    write(&map_one(&file, PAGE), 0, 7);
    rustix::fs::fcntl_add_seals(&file, SealFlags::WRITE).unwrap();
    let error = map(vec![spec(&file, GPA, PAGE)]).unwrap_err();
    assert!(matches!(error, MemError::MapFailed { .. }), "{error}");
}

#[test]
fn refuses_tables_of_impossible_shape() {
    let _alone = alone();
    let file = memfd(16 * PAGE);
    let one = |gpa, len, uva, offset| {
        let fd = file.as_fd().try_clone_to_owned().unwrap();
        map(vec![RegionSpec {
            gpa,
            len,
            uva,
            fd,
            offset,
        }])
        .unwrap_err()
    };
    let top = u64::MAX - PAGE + 1;
    assert!(matches!(one(GPA, 0, UVA, 0), MemError::Empty { .. }));
    assert!(matches!(one(top, 2 * PAGE, UVA, 0), MemError::Wraps { .. }));
    assert!(matches!(one(GPA, 2 * PAGE, top, 0), MemError::Wraps { .. }));
    assert!(matches!(
        one(GPA, 2 * PAGE, UVA, top),
        MemError::Wraps { .. }
    ));
    assert!(matches!(
        one(GPA, u64::MAX, UVA, 0),
        MemError::TooLarge { .. }
    ));
    assert!(matches!(
        one(GPA + 8, PAGE, UVA, 0),
        MemError::Misaligned { .. }
    ));
    assert!(matches!(
        one(GPA, PAGE, UVA + 8, 0),
        MemError::Misaligned { .. }
    ));
    assert!(matches!(
        one(GPA, PAGE, UVA, 8),
        MemError::Misaligned { .. }
    ));
}

#[test]
fn refuses_overlaps_in_guest_and_in_frontend_addresses() {
    let _alone = alone();
    let file = memfd(16 * PAGE);
    let overlap = |second: RegionSpec| map(vec![spec(&file, GPA, 4 * PAGE), second]).unwrap_err();
    for gpa in [GPA, GPA + PAGE, GPA + 3 * PAGE, GPA - PAGE] {
        let uva = UVA + (1 << 40);
        let error = overlap(RegionSpec {
            uva,
            ..spec(&file, gpa, 2 * PAGE)
        });
        assert!(
            matches!(error, MemError::Overlap { space: "guest", .. }),
            "{error}"
        );
        let error = overlap(RegionSpec {
            gpa: GPA << 1,
            ..spec(&file, gpa, 2 * PAGE)
        });
        assert!(
            matches!(
                error,
                MemError::Overlap {
                    space: "frontend",
                    ..
                }
            ),
            "{error}"
        );
    }
    let touching = [
        spec(&file, GPA, 4 * PAGE),
        spec(&file, GPA + 4 * PAGE, PAGE),
    ];
    map(touching.into()).unwrap();
}

#[test]
fn refuses_more_regions_or_bytes_than_the_port_takes() {
    let _alone = alone();
    let file = memfd(PAGE);
    let specs = |n: u64| {
        (0..n)
            .map(|i| spec(&file, GPA + i * PAGE, PAGE))
            .collect::<Vec<_>>()
    };
    let mem = map(specs(64)).unwrap();
    let error = map(specs(65)).unwrap_err();
    assert!(matches!(
        error,
        MemError::TooManyRegions { count: 65, max: 64 }
    ));
    assert!(error.to_string().contains("--single-file-segments"));
    let added = mem.with_added(spec(&file, GPA << 1, PAGE));
    assert!(matches!(added, Err(MemError::TooManyRegions { .. })));
    let options = MapOptions {
        max_bytes: 2 * PAGE,
        ..MapOptions::default()
    };
    let error = GuestMem::map(specs(3), &Poison::new(), &options).unwrap_err();
    assert!(matches!(error, MemError::TooLarge { .. }));
}

#[test]
fn demands_hugepages_where_the_port_does() {
    let _alone = alone();
    let options = MapOptions {
        require_hugetlb: true,
        ..MapOptions::default()
    };
    let specs = vec![spec(&memfd(PAGE), GPA, PAGE)];
    let error = GuestMem::map(specs, &Poison::new(), &options).unwrap_err();
    assert!(matches!(error, MemError::HugetlbRequired { .. }));
    let Some(file) = hugepages(2) else { return };
    let specs = vec![spec(&file, GPA, 2 * HUGE)];
    let mem = GuestMem::map(specs, &Poison::new(), &options).unwrap();
    let region = mem.regions().next().unwrap();
    assert_eq!(
        (region.page_size(), region.kind()),
        (HUGE, MemoryKind::Hugetlb)
    );
    let error = map(vec![spec(&file, GPA, HUGE + PAGE)]).unwrap_err();
    assert!(
        matches!(error, MemError::Misaligned { page: HUGE, .. }),
        "{error}"
    );
    let error = map(vec![spec_at(&file, GPA, HUGE, PAGE)]).unwrap_err();
    assert!(
        matches!(error, MemError::Misaligned { page: HUGE, .. }),
        "{error}"
    );
}

// ---- the table ----

#[test]
fn translates_to_the_bytes_of_the_file() {
    use std::os::unix::fs::FileExt;
    let _alone = alone();
    let file = full_memfd(16 * PAGE);
    file.write_all_at(b"here", 5 * PAGE + 10).unwrap();
    let mem = map(vec![spec_at(&file, GPA, 8 * PAGE, 4 * PAGE)]).unwrap();
    let by_gpa = mem
        .translate(&mut Hit::default(), GPA + PAGE + 10, 4)
        .unwrap();
    let by_uva = mem.translate_uva(UVA + GPA + PAGE + 10, 4).unwrap();
    assert_eq!(by_gpa, by_uva);
    // SAFETY: translated for four bytes, and `mem` is held.
    let bytes = unsafe { by_gpa.cast::<[u8; 4]>().read_volatile() };
    assert_eq!(&bytes, b"here");
    write(&mem, PAGE + 10, b'H');
    let mut bytes = [0; 4];
    file.read_exact_at(&mut bytes, 5 * PAGE + 10).unwrap();
    assert_eq!(&bytes, b"Here");
}

#[test]
fn a_table_that_grows_and_shrinks_keeps_host_addresses() {
    let _alone = alone();
    let (a, b) = (full_memfd(4 * PAGE), full_memfd(4 * PAGE));
    let before = map_lines(false);
    let first = map_one(&a, 4 * PAGE);
    let both = first.with_added(spec(&b, GPA << 1, 4 * PAGE)).unwrap();
    assert_eq!(at(&first, 9), at(&both, 9));
    let mut hit = Hit::default();
    let in_b = both.translate(&mut hit, GPA << 1, 8).unwrap();
    assert!(
        first.translate(&mut hit, GPA << 1, 8).is_none(),
        "a hit of one table is none in another"
    );
    assert!(both.with_removed(GPA << 1, PAGE, UVA).is_err());
    let second = both.with_removed(GPA, 4 * PAGE, UVA + GPA).unwrap();
    drop((first, both));
    assert_eq!(second.translate(&mut hit, GPA << 1, 8), Some(in_b));
    assert!(second.translate(&mut hit, GPA, 8).is_none());
    // SAFETY: translated for eight bytes, and `second` is held.
    unsafe { in_b.as_ptr().write_volatile(1) };
    drop(second);
    assert_eq!(map_lines(false), before);
}

#[test]
fn names_the_files_behind_the_regions() {
    let _alone = alone();
    let (a, b) = (memfd(PAGE), memfd(PAGE));
    let mem = map(vec![spec(&b, GPA + PAGE, PAGE), spec(&a, GPA, PAGE)]).unwrap();
    let stat = |f: &File| rustix::fs::fstat(f).map(|s| (s.st_dev, s.st_ino)).unwrap();
    assert_eq!(mem.inodes().collect::<Vec<_>>(), [stat(&a), stat(&b)]);
    assert_ne!(stat(&a), stat(&b));
}

/// Region lengths and gaps in pages, and accesses near their borders.
fn any_table() -> impl Strategy<Value = Vec<(u64, u64)>> {
    prop::collection::vec((0u64..3, 1u64..4), 0..12)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn translate_agrees_with_a_slow_reference(
        table in any_table(),
        accesses in prop::collection::vec((any::<prop::sample::Index>(), -9i64..9, 0u32..9000), 1..200),
    ) {
        let _alone = alone();
        let file = memfd(4 * PAGE);
        let mut gpa = 0;
        let mut bounds = vec![0, u64::MAX - 4];
        let mut specs = Vec::new();
        for (gap, len) in &table {
            gpa += gap * PAGE;
            specs.push(spec(&file, gpa, len * PAGE));
            bounds.extend([gpa, gpa + len * PAGE]);
            gpa += len * PAGE;
        }
        specs.reverse();
        let options = MapOptions { arm: false, prefault: false, ..MapOptions::default() };
        let mem = GuestMem::map(specs, &Poison::new(), &options).unwrap();
        let regions: Vec<_> = mem.regions().collect();
        let mut hit = Hit::default();
        for (border, delta, len) in accesses {
            let gpa = border.get(&bounds).wrapping_add_signed(delta);
            let slow = regions.iter().find(|r| {
                gpa >= r.gpa() && u128::from(gpa) + u128::from(len) <= u128::from(r.gpa()) + u128::from(r.len())
                    && gpa - r.gpa() < r.len()
            });
            let slow = slow.map(|r| {
                let base = mem.translate(&mut Hit::default(), r.gpa(), 0).unwrap();
                base.as_ptr() as u64 + (gpa - r.gpa())
            });
            prop_assert_eq!(mem.translate(&mut hit, gpa, len).map(|p| p.as_ptr() as u64), slow);
            let uva = gpa.wrapping_add(UVA);
            prop_assert_eq!(mem.translate_uva(uva, len.into()).map(|p| p.as_ptr() as u64), slow);
        }
    }
}

// ---- memory that vanishes ----

/// A worker that turns through an honest and a hostile guest until told to stop; counts the honest frames that were
/// damaged, and stops touching the hostile one once it is poisoned, as a worker does.
fn turn_until(stop: &AtomicBool, turns: &AtomicU64, honest: &GuestMem, hostile: &GuestMem) -> u64 {
    let mut damaged = 0;
    let mut turn = 0u64;
    while !stop.load(Ordering::Relaxed) {
        turn += 1;
        for page in 0..16 {
            let value = (turn + page) as u8;
            write(honest, page * PAGE + 8, value);
            damaged += u64::from(read(honest, page * PAGE + 8) != value);
            if !hostile.poison().is_set() {
                write(hostile, page * PAGE + 8, value);
                let _ = read(hostile, page * PAGE);
            }
        }
        turns.store(turn, Ordering::Release);
    }
    damaged
}

/// Runs the worker while `attack` does its work; checks that only the attacker's attachment was lost.
fn only_the_attacker_is_lost(hostile: &GuestMem, attack: impl FnOnce()) {
    let honest = map_one(&full_memfd(16 * PAGE), 16 * PAGE);
    let (stop, turns) = (AtomicBool::new(false), AtomicU64::new(0));
    let wait = |n: u64| {
        let (goal, start) = (turns.load(Ordering::Acquire) + n, Instant::now());
        while turns.load(Ordering::Acquire) < goal {
            assert!(
                start.elapsed() < Duration::from_secs(20),
                "the worker stands still"
            );
            std::thread::yield_now();
        }
    };
    std::thread::scope(|scope| {
        let worker = scope.spawn(|| turn_until(&stop, &turns, &honest, hostile));
        wait(10);
        assert!(!hostile.poison().is_set());
        attack();
        wait(100);
        stop.store(true, Ordering::Relaxed);
        assert_eq!(worker.join().unwrap(), 0, "damaged honest frames");
    });
    assert_eq!(hostile.poison().cause(), Some(PoisonCause::Withdrawn));
    assert!(hostile.poison().patched() >= 1);
    assert_eq!(honest.poison().cause(), None);
    assert_eq!(honest.poison().patched(), 0);
}

#[test]
fn truncation_poisons_the_truncating_guest_alone_and_the_worker_goes_on() {
    let _alone = alone();
    for _ in 0..20 {
        let file = full_memfd(16 * PAGE);
        let mem = map_one(&file, 16 * PAGE);
        only_the_attacker_is_lost(&mem, || file.set_len(0).unwrap());
    }
}

#[test]
fn truncation_is_survived_without_userfaultfd() {
    let _alone = alone();
    let file = full_memfd(16 * PAGE);
    let options = MapOptions {
        arm: false,
        ..MapOptions::default()
    };
    let specs = vec![spec(&file, GPA, 16 * PAGE)];
    let mem = GuestMem::map(specs, &Poison::new(), &options).unwrap();
    assert!(!mem.armed());
    only_the_attacker_is_lost(&mem, || file.set_len(PAGE).unwrap());
}

#[test]
fn truncated_hugepages_poison_the_truncating_guest_alone() {
    let _alone = alone();
    for arm in [true, false] {
        let Some(file) = hugepages(2) else { return };
        let options = MapOptions {
            arm,
            ..MapOptions::default()
        };
        let specs = vec![spec(&file, GPA, 2 * HUGE)];
        let mem = GuestMem::map(specs, &Poison::new(), &options).unwrap();
        only_the_attacker_is_lost(&mem, || file.set_len(0).unwrap());
    }
}

#[test]
fn a_hole_is_filled_while_the_budget_lasts_and_poisons_beyond() {
    let _alone = alone();
    if !guest_mem::can_arm() {
        eprintln!(
            "SKIPPED: no userfaultfd here (holes are allocated by the kernel, without limit)"
        );
        return;
    }
    let file = memfd(16 * PAGE);
    let mem = with_budget(&file, 16 * PAGE, 4 * PAGE);
    assert!(mem.armed());
    for page in 0..4 {
        assert_eq!(read(&mem, page * PAGE), 0);
        write(&mem, page * PAGE, 0x5a);
    }
    assert!(!mem.poison().is_set());
    assert_eq!((mem.poison().filled(), allocated(&file)), (4, 4 * PAGE));
    use std::os::unix::fs::FileExt;
    let mut seen = [0];
    file.read_exact_at(&mut seen, 3 * PAGE).unwrap();
    assert_eq!(seen, [0x5a], "a filled page is shared with the guest");
    write(&mem, 5 * PAGE, 1);
    assert_eq!(mem.poison().cause(), Some(PoisonCause::OverBudget));
    for page in 4..16 {
        let _ = read(&mem, page * PAGE);
    }
    assert_eq!(
        allocated(&file),
        4 * PAGE,
        "nothing more was allocated for the guest"
    );
}

#[test]
fn truncation_with_an_empty_budget_is_named_as_what_it_is() {
    let _alone = alone();
    let file = full_memfd(4 * PAGE);
    let mem = with_budget(&file, 4 * PAGE, 0);
    file.set_len(PAGE).unwrap();
    let _ = read(&mem, PAGE);
    assert_eq!(mem.poison().cause(), Some(PoisonCause::Withdrawn));
}

#[test]
fn a_punched_page_costs_budget_and_then_the_port() {
    let _alone = alone();
    if !guest_mem::can_arm() {
        eprintln!("SKIPPED: no userfaultfd here");
        return;
    }
    let file = full_memfd(16 * PAGE);
    let mem = with_budget(&file, 16 * PAGE, 2 * PAGE);
    for round in 0..3 {
        write(&mem, 0, 1);
        assert!(!mem.poison().is_set(), "round {round}");
        punch(&file, 0, PAGE);
    }
    write(&mem, 0, 1);
    assert_eq!(mem.poison().cause(), Some(PoisonCause::OverBudget));
    assert_eq!(allocated(&file), 15 * PAGE);
}

#[test]
fn a_hole_in_hugepages_is_filled_from_the_budget() {
    let _alone = alone();
    let Some(file) = hugepages(4) else { return };
    if !guest_mem::can_arm() {
        eprintln!("SKIPPED: no userfaultfd here");
        return;
    }
    let mem = with_budget(&file, 4 * HUGE, HUGE);
    assert!(mem.armed());
    punch(&file, HUGE, 2 * HUGE);
    write(&mem, HUGE + 5, 9);
    assert_eq!((read(&mem, HUGE + 5), read(&mem, HUGE + 6)), (9, 0));
    assert!(!mem.poison().is_set());
    let _ = read(&mem, 2 * HUGE);
    assert_eq!(mem.poison().cause(), Some(PoisonCause::OverBudget));
    assert_eq!(allocated(&file), 3 * HUGE);
}

#[test]
fn mapping_a_sparse_file_allocates_nothing_of_it() {
    let _alone = alone();
    for arm in [true, false] {
        let file = memfd(256 << 20);
        use std::os::unix::fs::FileExt;
        for page in [0, 1, 7, 4095, 4096, 65535] {
            file.write_all_at(&[1], page * PAGE).unwrap();
        }
        let before = allocated(&file);
        let options = MapOptions {
            arm,
            ..MapOptions::default()
        };
        let specs = vec![spec(&file, GPA, 256 << 20)];
        let mem = GuestMem::map(specs, &Poison::new(), &options).unwrap();
        assert_eq!(allocated(&file), before);
        assert_eq!(read(&mem, 7 * PAGE), 1);
    }
}

#[test]
fn pages_that_exist_are_mapped_before_a_worker_meets_them() {
    use std::os::unix::fs::FileExt;
    let _alone = alone();
    let reserved = full_memfd(1 << 20);
    let with_holes = memfd(1 << 20);
    for page in (0..256).filter(|page| !(3..5).contains(page)) {
        with_holes.write_all_at(&[1], page * PAGE).unwrap();
    }
    for file in [reserved, with_holes] {
        let mem = map_one(&file, 1 << 20);
        let before = minor_faults();
        for page in (0..256).filter(|page| !(3..5).contains(page)) {
            write(&mem, page * PAGE, 1);
        }
        assert!(
            minor_faults() - before < 4,
            "{} faults",
            minor_faults() - before
        );
    }
}

fn minor_faults() -> i64 {
    // SAFETY: rusage is plain data, filled by the call.
    unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        libc::getrusage(libc::RUSAGE_THREAD, &mut usage);
        usage.ru_minflt
    }
}

#[test]
fn a_memory_error_of_the_machine_costs_the_guest_that_has_the_page() {
    let _alone = alone();
    let file = full_memfd(2 * PAGE);
    let mem = map_one(&file, 2 * PAGE);
    write(&mem, 0, 1);
    write(&mem, PAGE, 1);
    // Raised by hand, as the kernel would: signal, errno, code, padding, address.
    let mut info = [0u8; 128];
    info[0..4].copy_from_slice(&libc::SIGBUS.to_ne_bytes());
    info[8..12].copy_from_slice(&libc::BUS_MCEERR_AR.to_ne_bytes());
    info[16..24].copy_from_slice(&(at(&mem, PAGE + 77).as_ptr() as u64).to_ne_bytes());
    // SAFETY: a signal to this thread, with a siginfo of full size.
    let done = unsafe {
        let (pid, tid) = (libc::getpid(), libc::gettid());
        libc::syscall(
            libc::SYS_rt_tgsigqueueinfo,
            pid,
            tid,
            libc::SIGBUS,
            info.as_ptr(),
        )
    };
    assert_eq!(done, 0);
    assert_eq!(mem.poison().cause(), Some(PoisonCause::Hardware));
    assert_eq!(
        (read(&mem, 0), read(&mem, PAGE)),
        (1, 0),
        "the page was replaced, its neighbour not"
    );
}

/// A cgroup of memory below ours with a limit of 48 MiB, if we may make one.
fn memory_cgroup() -> Option<PathBuf> {
    let ours = std::fs::read_to_string("/proc/self/cgroup").ok()?;
    let path = |kind: &str| {
        let line = ours.lines().find(|l| l.split(':').nth(1) == Some(kind))?;
        Some(
            line.splitn(3, ':')
                .nth(2)?
                .trim_start_matches('/')
                .to_owned(),
        )
    };
    let (root, limit) = match path("memory") {
        Some(path) => (
            Path::new("/sys/fs/cgroup/memory").join(path),
            "memory.limit_in_bytes",
        ),
        None => (Path::new("/sys/fs/cgroup").join(path("")?), "memory.max"),
    };
    let group = root.join(format!("ringway-test-{}", std::process::id()));
    std::fs::create_dir(&group).ok()?;
    if std::fs::write(group.join(limit), (48 << 20).to_string()).is_err() {
        let _ = std::fs::remove_dir(&group);
        return None;
    }
    Some(group)
}

#[test]
fn sparse_memory_of_many_guests_cannot_exhaust_our_memory_limit() {
    const TEST: &str = "sparse_memory_of_many_guests_cannot_exhaust_our_memory_limit";
    if let Ok(group) = std::env::var("GUEST_MEM_CHILD") {
        let own = std::process::id().to_string();
        std::fs::write(Path::new(&group).join("cgroup.procs"), own).unwrap();
        return touch_all_holes();
    }
    let _alone = alone();
    let group = guest_mem::can_arm().then(memory_cgroup).flatten();
    let Some(group) = group else {
        eprintln!("SKIPPED: needs userfaultfd and the right to make a memory cgroup (root)");
        return;
    };
    let status = child(TEST, group.to_str().unwrap());
    std::fs::remove_dir(&group).unwrap();
    assert!(status.success(), "{status}");
}

/// Eight guests of 64 MiB that never touched a page, one after the other, each with a budget of 64 MiB.
fn touch_all_holes() {
    let mut guests = Vec::new();
    for _ in 0..8 {
        let file = memfd(64 << 20);
        let mem = map_one(&file, 64 << 20);
        (0..(64 << 20) / PAGE).for_each(|page| {
            read(&mem, page * PAGE);
        });
        assert_eq!(mem.poison().cause(), Some(PoisonCause::OverBudget));
        drop(mem); // it keeps its file, and with it what we were charged
        guests.push(file);
    }
    let filled: u64 = guests.iter().map(allocated).sum();
    assert!(filled > 4 << 20, "the first guest got its share: {filled}");
}

// ---- the process ----

/// Lines of the process's map: areas of guests, and (with `guards`) those without access, which threads have too.
fn map_lines(guards: bool) -> usize {
    std::fs::read_to_string("/proc/self/maps")
        .unwrap()
        .lines()
        .filter(|l| l.contains("memfd:guest") || guards && l.contains("---p"))
        .count()
}

fn open_fds() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

#[test]
fn a_thousand_attachments_leave_nothing_behind() {
    // In a process without other tests' threads.
    match std::env::var("GUEST_MEM_CHILD") {
        Ok(_) => attach_a_thousand_times(),
        Err(_) => {
            let child = child("a_thousand_attachments_leave_nothing_behind", "");
            assert!(child.success(), "{child}");
        }
    }
}

fn attach_a_thousand_times() {
    let files = [
        full_memfd(64 * PAGE),
        memfd(64 * PAGE),
        full_memfd(64 * PAGE),
    ];
    let specs = || {
        (0..)
            .zip(&files)
            .map(|(i, f)| spec(f, GPA + i * 64 * PAGE, 64 * PAGE))
            .collect()
    };
    let cycle = |i: u64| {
        let mem = map(specs()).unwrap();
        write(&mem, (i % 128) * PAGE, 1);
        let more = mem.with_added(spec(&files[0], GPA << 1, PAGE)).unwrap();
        // Refused half-way: what was mapped before the refusal goes too.
        assert!(
            map(vec![
                spec(&files[0], GPA, PAGE),
                spec(&files[1], GPA << 1, 1 << 30)
            ])
            .is_err()
        );
        drop(mem);
        drop(more);
    };
    cycle(0);
    let before = (map_lines(true), open_fds());
    (0..1000).for_each(cycle);
    assert_eq!((map_lines(true), open_fds()), before);
    // Also after a recovery has split the mapping.
    let victim = full_memfd(64 * PAGE);
    let mem = map_one(&victim, 64 * PAGE);
    victim.set_len(0).unwrap();
    let _ = (read(&mem, 5 * PAGE), read(&mem, 9 * PAGE));
    drop(mem);
    drop(victim);
    assert_eq!((map_lines(true), open_fds()), before);
}

#[test]
fn two_threads_that_meet_the_same_vanished_page_both_go_on() {
    let _alone = alone();
    for _ in 0..50 {
        let file = full_memfd(16 * PAGE);
        let mem = Arc::new(map_one(&file, 16 * PAGE));
        file.set_len(0).unwrap();
        let threads: Vec<_> = (0..4)
            .map(|_| {
                let mem = Arc::clone(&mem);
                std::thread::spawn(move || (0..16).for_each(|page| write(&mem, page * PAGE, 1)))
            })
            .collect();
        threads.into_iter().for_each(|t| t.join().unwrap());
        assert_eq!(mem.poison().cause(), Some(PoisonCause::Withdrawn));
    }
}

#[test]
fn mappings_come_and_go_while_another_thread_recovers() {
    let _alone = alone();
    let stop = AtomicBool::new(false);
    let other = full_memfd(PAGE);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                drop(map_one(&other, PAGE));
            }
        });
        for _ in 0..300 {
            let file = full_memfd(4 * PAGE);
            let mem = map_one(&file, 4 * PAGE);
            file.set_len(0).unwrap();
            (0..4).for_each(|page| write(&mem, page * PAGE, 1));
            assert_eq!(mem.poison().cause(), Some(PoisonCause::Withdrawn));
        }
        stop.store(true, Ordering::Relaxed);
    });
}

/// Runs a test again in a process of its own, where `how` tells it what to do.
fn child(test: &str, how: &str) -> ExitStatus {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture"])
        .env("GUEST_MEM_CHILD", how)
        .stdout(Stdio::null())
        .stderr(if how.is_empty() {
            Stdio::inherit()
        } else {
            Stdio::null()
        })
        .status()
        .unwrap()
}

#[test]
fn a_sigbus_that_is_not_a_guests_still_kills() {
    let test = "a_sigbus_that_is_not_a_guests_still_kills";
    match std::env::var("GUEST_MEM_CHILD").as_deref() {
        Ok("fault") => fault_elsewhere(),
        Ok("raise") => {
            guest_fault::install();
            // SAFETY: raise has no preconditions.
            unsafe { libc::raise(libc::SIGBUS) };
        }
        _ => {
            assert_eq!(child(test, "fault").signal(), Some(libc::SIGBUS));
            assert_eq!(child(test, "raise").signal(), Some(libc::SIGBUS));
        }
    }
}

/// Touches a vanished page of a mapping that is no guest's, with a guest's around.
fn fault_elsewhere() {
    let guest = map_one(&full_memfd(PAGE), PAGE);
    let file = full_memfd(PAGE);
    // SAFETY: a new mapping of a page; the read below is the crash this process is for.
    unsafe {
        let rw = libc::PROT_READ | libc::PROT_WRITE;
        let p = libc::mmap(
            std::ptr::null_mut(),
            4096,
            rw,
            libc::MAP_SHARED,
            file.as_raw_fd(),
            0,
        );
        assert_ne!(p, libc::MAP_FAILED);
        file.set_len(0).unwrap();
        p.cast::<u8>().read_volatile();
    }
    drop(guest);
}
