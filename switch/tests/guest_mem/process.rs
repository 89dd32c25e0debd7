//! The process: what guests cost it in memory, mappings and descriptors, its threads, and faults that are no guest's.

use std::os::fd::AsRawFd;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use ringway::virtio::guest_mem::PoisonCause;
use ringway::virtio::{guest_fault, guest_mem};

use super::{
    GPA, PAGE, allocated, alone, full_memfd, map, map_lines, map_one, memfd, read, spec, write,
};

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

fn open_fds() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
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

/// Runs one of these tests again in a process of its own, where `how` tells it what to do.
fn child(test: &str, how: &str) -> ExitStatus {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", &format!("process::{test}"), "--nocapture"])
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
