//! The table: what it translates, while it grows and shrinks.

use std::fs::File;

use proptest::prelude::*;
use ringway::virtio::guest_mem::{GuestMem, Hit, MapOptions, Poison};

use super::{
    GPA, PAGE, UVA, alone, at, full_memfd, map, map_lines, map_one, memfd, spec, spec_at, write,
};

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
