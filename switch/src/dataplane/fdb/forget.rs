//! Forgets stations: one, those of a port or a domain, those not heard for too long. For control; workers never wait for it.

use std::sync::atomic::Ordering::Relaxed;

use crossbeam::utils::Backoff;

use super::bucket::{Record, SLOTS};
use super::station::{Flush, Key};
use super::{AGE_MAX_SECONDS, Fdb, age_of};

impl Fdb {
    /// Forgets a station, static or not; false if it was unknown.
    pub fn remove(&self, key: Key) -> bool {
        let hash = self.hash(key);
        [self.home(hash), self.away(hash)]
            .into_iter()
            .any(|index| self.forget_in(index, &mut |record| record.key == key.0) > 0)
    }

    /// Forgets stations; returns how many. A worker that still has the port attached learns them anew.
    pub fn flush(&self, what: Flush) -> usize {
        self.sweep(|record| match what {
            Flush::All => !record.is_static,
            Flush::Port(port) => !record.is_static && record.port() == port.0,
            Flush::Domain(domain) => !record.is_static && Key(record.key).domain() == domain,
            Flush::Gone(port) => record.port() == port.0,
        })
    }

    /// Forgets learnt stations that were not heard for `max_age_seconds` (0: none; at most [`AGE_MAX_SECONDS`]); returns
    /// how many. To be called at least once per half hour, for the clock has 16 bits.
    pub fn age(&self, now: u32, max_age_seconds: u32) -> usize {
        self.max_age
            .store(max_age_seconds.min(AGE_MAX_SECONDS), Relaxed);
        let oldest = (now as u16).wrapping_sub(AGE_MAX_SECONDS as u16);
        for bucket in &self.buckets {
            for (slot, record) in bucket.glance().into_iter().enumerate() {
                if record
                    .is_some_and(|record| u32::from(age_of(record.stamp, now)) > AGE_MAX_SECONDS)
                {
                    bucket.touch(slot, oldest);
                }
            }
        }
        let aged = self.sweep(|record| self.has_expired(record, now));
        self.load.aged.fetch_add(aged as u64, Relaxed);
        aged
    }

    /// Forgets stations of one bucket; returns how many.
    pub(super) fn forget_in(
        &self,
        index: usize,
        doomed: &mut impl FnMut(&Record) -> bool,
    ) -> usize {
        let bucket = self.bucket(index);
        if !bucket.glance().iter().flatten().any(&mut *doomed) {
            return 0;
        }
        let backoff = Backoff::new();
        let mut claim = loop {
            match bucket.claim() {
                Some(claim) => break claim,
                None => backoff.snooze(),
            }
        };
        let mut gone = 0;
        for slot in 0..SLOTS {
            if let Some(record) = claim.record(slot).filter(&mut *doomed) {
                claim.clear(slot);
                self.has_left(&claim, &record);
                gone += 1;
            }
        }
        self.load.len.fetch_sub(gone, Relaxed);
        gone
    }

    /// Forgets stations everywhere; again if stations were pushed from bucket to bucket meanwhile, as often as makes sense.
    pub(super) fn sweep(&self, mut doomed: impl FnMut(&Record) -> bool) -> usize {
        let mut gone = 0;
        for _ in 0..3 {
            let pushed = self.load.pushed.load(Relaxed);
            gone += (0..self.buckets.len())
                .map(|index| self.forget_in(index, &mut doomed))
                .sum::<usize>();
            if pushed == self.load.pushed.load(Relaxed) {
                break;
            }
        }
        gone
    }

    pub(super) fn has_expired(&self, record: &Record, now: u32) -> bool {
        let max_age = self.max_age.load(Relaxed);
        !record.is_static && max_age > 0 && u32::from(age_of(record.stamp, now)) >= max_age
    }
}
