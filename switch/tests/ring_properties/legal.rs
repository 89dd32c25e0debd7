//! Legal traffic: steps in any order, each checked against what was posted and against `virtio-queue`.

use std::collections::VecDeque;

use proptest::prelude::*;
use ringway::virtio::buffers::BATCH;
use ringway::virtio::driver::Used;
use ringway::virtio::ring::Way;

use super::judges::ask_oracle;
use super::rig::{POOL, Rig};

/// A step of legal traffic.
#[derive(Clone, Debug)]
pub(super) enum Step {
    Post(usize),
    Chain(usize),
    Table(usize),
    /// Fetch so many, complete so many of them.
    Turn(usize, usize),
    Take(usize),
}

pub(super) fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        (1usize..80).prop_map(Step::Post),
        (1usize..9).prop_map(Step::Chain),
        (1usize..9).prop_map(Step::Table),
        (0usize..=BATCH, 0usize..=BATCH).prop_map(|(most, done)| Step::Turn(most, done)),
        (1usize..80).prop_map(Step::Take),
    ];
    prop::collection::vec(step, 1..120)
}

pub(super) fn legal_traffic(rig: &mut Rig, steps: &[Step], in_order: bool) {
    let (mut waiting, mut completed) = (VecDeque::new(), VecDeque::new());
    let mut posted = 0;
    let mut out = [Used::default(); 80];
    for step in steps {
        match *step {
            Step::Turn(most, done) => turn(rig, most, done, &mut waiting, &mut completed),
            Step::Take(most) => {
                let count = rig.guest.take(&mut out[..most]);
                assert_eq!(count, most.min(completed.len()));
                for used in &out[..count] {
                    let (addr, len) = completed.pop_front().expect("counted");
                    assert_eq!(used.addr, addr);
                    // One element may stand for a batch of transmit buffers: lengths say nothing there.
                    assert!(used.len == len || in_order && rig.way == Way::FromGuest);
                }
            }
            _ => post(rig, step, &mut posted, &mut waiting),
        }
        let _ = rig.guest.kick_wanted();
    }
}

/// Posts what a step says; what was posted goes to `waiting`.
fn post(rig: &mut Rig, step: &Step, count: &mut u64, waiting: &mut VecDeque<Vec<(u64, u32)>>) {
    let mut piece = |pool: u64| {
        *count += 1;
        (pool + *count * 37 % (POOL / 2), 1 + (*count % 300) as u32)
    };
    let pool = rig.pool();
    match *step {
        Step::Post(n) => {
            let all: Vec<_> = (0..n).map(|_| piece(pool)).collect();
            let posted = rig.guest.post(&all);
            waiting.extend(all[..posted].iter().map(|piece| vec![*piece]));
        }
        Step::Chain(n) => {
            let all: Vec<_> = (0..n).map(|_| piece(pool)).collect();
            if rig.guest.post_chain(&all) {
                waiting.push_back(all);
            }
        }
        Step::Table(n) => {
            let all: Vec<_> = (0..n).map(|_| piece(pool)).collect();
            // More places than tables in flight: none is written over.
            let table = pool + POOL / 2 + rig.tables % 32 * 128;
            rig.tables += 1;
            if waiting.len() < 20 && rig.guest.post_indirect(table, &all) {
                waiting.push_back(all);
            }
        }
        _ => {}
    }
}

/// Fetches and completes; what is completed moves from `waiting` to `done` with its length.
fn turn(
    rig: &mut Rig,
    most: usize,
    done: usize,
    waiting: &mut VecDeque<Vec<(u64, u32)>>,
    completed: &mut VecDeque<(u64, u32)>,
) {
    let split = rig.device.layout() == "split";
    let base = rig.device.base();
    let count = rig.device.fetch(&mut rig.buffers, most).expect("honest");
    assert_eq!(
        rig.device.fetch(&mut rig.buffers, most),
        Ok(count),
        "asked again"
    );
    // Pieces may fill the batch before the count does.
    assert!(count == most.min(waiting.len()) || count >= 12, "{count}");
    for (index, want) in waiting.iter().take(count).enumerate() {
        assert_eq!(rig.pieces(index).as_ref(), Some(want));
    }
    if split {
        let oracle = ask_oracle(rig, base as u16).expect("honest");
        assert_eq!(oracle.len(), waiting.len());
        for (theirs, want) in oracle.iter().zip(waiting.iter()) {
            let pieces: Vec<_> = theirs.descs.iter().map(|d| (d.0, d.1)).collect();
            assert!(theirs.whole && pieces == *want);
        }
    }
    let done = done.min(count);
    let written: Vec<u32> = (0..done as u32).map(|n| n * 7).collect();
    rig.device.complete(done, &written);
    for (pieces, len) in waiting.drain(..done).zip(written) {
        completed.push_back((pieces[0].0, len));
    }
    let called = rig.device.call_wanted();
    assert!(done > 0 || !called, "a call about nothing");
}
