//! The gate: what is no memory of a guest, and tables of impossible shape.

use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, AsRawFd};

use ringway::virtio::guest_mem::{GuestMem, MapOptions, MemError, MemoryKind, Poison, RegionSpec};
use rustix::fs::SealFlags;

use super::{
    GPA, HUGE, PAGE, UVA, alone, full_memfd, hugepages, map, map_one, memfd, spec, spec_at, write,
};

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
