//! Memory that vanishes under a reader, or was never there: what is filled, what costs the guest its port.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use ringway::virtio::guest_mem::{self, GuestMem, MapOptions, Poison, PoisonCause};

use super::{
    GPA, HUGE, PAGE, allocated, alone, at, full_memfd, hugepages, map_one, memfd, punch, read,
    spec, with_budget, write,
};

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
