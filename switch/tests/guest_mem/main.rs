//! Guest memory: what the gate refuses, what a table translates, and what happens when memory vanishes under a reader.
//! Real memfds and, where the host has some, real hugepages.
#![allow(unsafe_code)] // reads and writes foreign memory, and takes it away

mod gate;
mod process;
mod table;
mod vanishing;

use std::fs::File;
use std::os::fd::OwnedFd;
use std::ptr::NonNull;
use std::sync::{Mutex, MutexGuard, PoisonError};

use ringway::virtio::guest_mem::{
    FillBudget, GuestMem, Hit, MapOptions, MemError, Poison, RegionSpec,
};
use rustix::fs::{FallocateFlags, MemfdFlags};

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

/// Lines of the process's map: areas of guests, and (with `guards`) those without access, which threads have too.
fn map_lines(guards: bool) -> usize {
    std::fs::read_to_string("/proc/self/maps")
        .unwrap()
        .lines()
        .filter(|l| l.contains("memfd:guest") || guards && l.contains("---p"))
        .count()
}
