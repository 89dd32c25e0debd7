//! Finds a place for a station that is new or has moved, and forgets others for it. All under claims; see the module above for
//! who makes place for whom.

use std::sync::atomic::Ordering::Relaxed;

use super::bucket::{Claim, Record, SLOTS};
use super::{Fdb, Key, Learned, age_of, count};

/// Buckets searched for somebody to evict when the table is full and the newcomer's own two offer nobody.
const HAND_STEPS: usize = 8;

/// New stations that are refused unseen after one for which there was no place.
const UNSEEN: u32 = 15;

/// Who goes first: the class, then the stations of its port, then the age.
type Rank = (u8, u32, u16);
const EXPIRED: u8 = 4;
const OWN: u8 = 3;
const RICHER: u8 = 2;
const OWN_BELOW_RESERVE: u8 = 1;
const FOR_THE_OPERATOR: u8 = 0;
/// Down to this class only when there is no slot at all, or the operator wants one.
const LAST_RESORT: u8 = 0;

impl Fdb {
    /// True if `settle` would refuse: the table is full and the port has its share, here too, and none of it is older than this
    /// second. Reads only: this is what a flood costs.
    pub(super) fn is_hopeless(&self, new: &Record, now: u32) -> bool {
        if self.len() < self.capacity || self.share(new) < self.reserved() {
            return false;
        }
        let Some(share) = self.shares.get(usize::from(new.port())) else {
            return true;
        };
        let unseen = share.unseen.load(Relaxed);
        if unseen > 0 {
            share.unseen.store(unseen - 1, Relaxed); // another worker's may be lost: it is a rough count
            return true;
        }
        let hash = self.hash(Key(new.key));
        let held = [self.home(hash), self.away(hash)].map(|index| self.bucket(index).glance());
        let mut records = held.iter().flatten().flatten();
        let ours = records.any(|record| !record.is_static && record.port() == new.port());
        let hopeless = ours && self.victim(&held, new, RICHER, now).is_none();
        if hopeless {
            share.unseen.store(UNSEEN, Relaxed);
        }
        hopeless
    }

    /// Writes a station. Whoever adds or moves a station holds the claim on its home, so that it never appears twice.
    pub(super) fn settle(&self, new: Record, now: u32) -> Learned {
        let hash = self.hash(Key(new.key));
        let Some(mut home) = self.bucket(self.home(hash)).claim() else {
            return Learned::Busy;
        };
        if let Some((slot, old)) = home.find(new.key) {
            return self.update(&mut home, slot, old, new);
        }
        if home.spilled() == 0
            && let Some(slot) = home.free()
            && self.admit()
        {
            home.put(slot, new);
            self.welcome(&new);
            return Learned::New;
        }
        let Some(mut away) = self.bucket(self.away(hash)).claim() else {
            return Learned::Busy;
        };
        if let Some((slot, old)) = away.find(new.key) {
            return self.update(&mut away, slot, old, new);
        }
        self.squeeze_in([home, away], new, now)
    }

    /// The station is here already: elsewhere, or learnt and now static.
    fn update(&self, claim: &mut Claim<'_>, slot: usize, old: Record, new: Record) -> Learned {
        if old.is_static && !new.is_static {
            return if old.station == new.station {
                Learned::Known
            } else {
                Learned::Static
            };
        }
        claim.relocate(slot, new.station, new.stamp);
        if new.is_static {
            claim.pin(slot);
        }
        self.leave(&old);
        self.join(&new);
        if old.station == new.station {
            Learned::Refreshed
        } else if old.port() == new.port() {
            count(&self.load.learned);
            Learned::New
        } else {
            count(&self.load.moved);
            Learned::Moved
        }
    }

    /// Places a newcomer where nothing is simple: `pair` is its home and its second bucket.
    fn squeeze_in(&self, mut pair: [Claim<'_>; 2], new: Record, now: u32) -> Learned {
        if !pair[0].can_spill() {
            return self.refuse();
        }
        // 1. In a full table somebody must go: from here, or from where the hand points.
        let mut admitted = self.admit();
        if !admitted {
            if let Some(spot) = self.victim(&held(&pair), &new, RICHER, now) {
                return self.replace(&mut pair, spot, new);
            }
            admitted = self.evict_elsewhere(&new, now) || self.admit_reserved(&new);
        }
        if !admitted {
            return self.refuse();
        }
        // 2. A slot: free, or left by a neighbour who can go to its second bucket, or taken from somebody.
        if let Some(spot) = free(&pair).or_else(|| self.push_on(&pair)) {
            write(&mut pair, spot, new);
            self.welcome(&new);
            return Learned::New;
        }
        self.load.len.fetch_sub(1, Relaxed);
        if let Some(spot) = self.victim(&held(&pair), &new, LAST_RESORT, now) {
            return self.replace(&mut pair, spot, new);
        }
        self.refuse()
    }

    /// Whom the newcomer may evict from those held by its own two buckets, of class `least` and above.
    fn victim(&self, held: &Held, new: &Record, least: u8, now: u32) -> Option<Spot> {
        let crowd = |port| {
            let learnt = held
                .iter()
                .flatten()
                .flatten()
                .filter(|record| !record.is_static);
            learnt.filter(|record| record.port() == port).count()
        };
        let spots = (0..2 * SLOTS).map(|i| Spot {
            side: i / SLOTS,
            slot: i % SLOTS,
        });
        spots
            .filter_map(|spot| {
                let record = held[spot.side % 2][spot.slot % SLOTS]?;
                let crowds_us = || crowd(record.port()) > crowd(new.port()) + 1;
                Some((self.rank(&record, new, crowds_us, now)?, spot))
            })
            .filter(|(rank, _)| rank.0 >= least)
            .max_by_key(|(rank, _)| *rank)
            .map(|(_, spot)| spot)
    }

    /// How readily `record` makes place for `new`; `None`: never.
    fn rank(
        &self,
        record: &Record,
        new: &Record,
        crowds_us: impl FnOnce() -> bool,
        now: u32,
    ) -> Option<Rank> {
        if record.is_static {
            return None;
        }
        let age = age_of(record.stamp, now);
        if self.has_expired(record, now) {
            return Some((EXPIRED, 0, age));
        }
        let (theirs, ours) = (self.share(record), self.share(new));
        if record.port() == new.port() && !new.is_static {
            if ours < self.reserved() {
                Some((OWN_BELOW_RESERVE, 0, age))
            } else {
                (age > 0).then_some((OWN, 0, age))
            }
        } else if theirs > self.reserved() && (theirs > ours || crowds_us()) {
            Some((RICHER, theirs, age))
        } else if new.is_static {
            Some((FOR_THE_OPERATOR, theirs, age))
        } else {
            None
        }
    }

    /// Sends a neighbour that is at home in one of the two buckets to its second bucket, so that its slot can be written over.
    fn push_on(&self, pair: &[Claim<'_>; 2]) -> Option<Spot> {
        for (side, claim) in pair.iter().enumerate() {
            for slot in 0..SLOTS {
                let Some(neighbour) = claim.record(slot) else {
                    continue;
                };
                let hash = self.hash(Key(neighbour.key));
                if !claim.is_of(self.bucket(self.home(hash))) || !claim.can_spill() {
                    continue;
                }
                if claim.push_on(slot, self.bucket(self.away(hash))).is_none() {
                    continue;
                }
                self.load.pushed.fetch_add(1, Relaxed);
                return Some(Spot { side, slot });
            }
        }
        None
    }

    /// Evicts a station from the next buckets in turn that hold one which may go; its place in the count is the newcomer's.
    fn evict_elsewhere(&self, new: &Record, now: u32) -> bool {
        let least = if new.is_static { LAST_RESORT } else { RICHER };
        let pick = |records: [Option<Record>; SLOTS]| {
            let ranked = records
                .into_iter()
                .enumerate()
                .filter_map(|(slot, record)| {
                    let record = record?;
                    Some((self.rank(&record, new, || false, now)?, slot, record))
                });
            ranked
                .filter(|(rank, _, _)| rank.0 >= least)
                .max_by_key(|(rank, _, _)| *rank)
        };
        for _ in 0..HAND_STEPS {
            let index = self.load.hand.fetch_add(1, Relaxed) & (self.buckets.len() - 1);
            if pick(self.bucket(index).glance()).is_none() {
                continue;
            }
            let Some(mut claim) = self.bucket(index).claim() else {
                continue;
            };
            if let Some((_, slot, record)) = pick(claim.records()) {
                claim.clear(slot);
                self.has_left(&claim, &record);
                count(&self.load.evicted);
                return true;
            }
        }
        false
    }

    fn replace(&self, pair: &mut [Claim<'_>; 2], spot: Spot, new: Record) -> Learned {
        if let Some(old) = pair[spot.side % 2].record(spot.slot) {
            self.has_left(&pair[spot.side % 2], &old);
            count(&self.load.evicted);
        }
        write(pair, spot, new);
        self.welcome(&new);
        Learned::New
    }

    pub(super) fn refuse(&self) -> Learned {
        count(&self.load.refused);
        Learned::Full
    }

    /// Takes a place in the count, if there is one.
    fn admit(&self) -> bool {
        let full = |len| len >= self.capacity;
        if full(self.len()) {
            return false;
        }
        let admitted = !full(self.load.len.fetch_add(1, Relaxed));
        if !admitted {
            self.load.len.fetch_sub(1, Relaxed);
        }
        admitted
    }

    /// Lets a port below its reserved share in, over capacity: the buckets have slots to spare.
    fn admit_reserved(&self, new: &Record) -> bool {
        let admitted = !new.is_static && self.share(new) < self.reserved();
        if admitted {
            self.load.len.fetch_add(1, Relaxed);
        }
        admitted
    }

    fn welcome(&self, new: &Record) {
        self.join(new);
        count(&self.load.learned);
    }

    /// Accounts for a station that is cleared or written over in a bucket we have claimed.
    pub(super) fn has_left(&self, claim: &Claim<'_>, record: &Record) {
        self.leave(record);
        let home = self.bucket(self.home(self.hash(Key(record.key))));
        if !claim.is_of(home) {
            home.unspill();
        }
    }

    /// Stations learnt from the port of `record`.
    fn share(&self, record: &Record) -> u32 {
        let share = self.shares.get(usize::from(record.port()));
        share.map_or(0, |share| share.stations.load(Relaxed))
    }

    fn reserved(&self) -> u32 {
        self.reserved_per_port.load(Relaxed)
    }

    fn join(&self, record: &Record) {
        if record.is_static {
            self.load.fixed.fetch_add(1, Relaxed);
        } else if let Some(share) = self.shares.get(usize::from(record.port())) {
            share.stations.fetch_add(1, Relaxed);
        }
    }

    fn leave(&self, record: &Record) {
        if record.is_static {
            self.load.fixed.fetch_sub(1, Relaxed);
        } else if let Some(share) = self.shares.get(usize::from(record.port())) {
            share.stations.fetch_sub(1, Relaxed);
        }
    }
}

/// A slot of the newcomer's home (side 0) or its second bucket (side 1).
#[derive(Clone, Copy)]
struct Spot {
    side: usize,
    slot: usize,
}

/// What the two hold.
type Held = [[Option<Record>; SLOTS]; 2];

fn held(pair: &[Claim<'_>; 2]) -> Held {
    [pair[0].records(), pair[1].records()]
}

fn free(pair: &[Claim<'_>; 2]) -> Option<Spot> {
    pair.iter().enumerate().find_map(|(side, claim)| {
        Some(Spot {
            side,
            slot: claim.free()?,
        })
    })
}

fn write(pair: &mut [Claim<'_>; 2], spot: Spot, new: Record) {
    if spot.side == 1 {
        pair[0].spill();
    }
    pair[spot.side % 2].put(spot.slot, new);
}
