//! What the table said last, to be said again without looking: bursts come from the same station to the same station.

use super::bucket::{Head, Probe};
use super::{Fdb, Key, Station, station};
use crate::dataplane::port_set::PortId;

/// From one station to another, and what shows that the table would still say the same. A cache line at most.
#[derive(Clone, Copy)]
pub struct Path {
    from: Key,
    to: Key,
    /// The buckets that both were found in, and what their heads were.
    homes: [u32; 2],
    heads: [Head; 2],
    /// The second in which `from` was heard: in the next its stamp is due.
    second: u32,
    /// Where `to` is.
    station: Station,
}

const _: () = assert!(size_of::<Option<Path>>() <= 64);

impl Path {
    /// Where the frame's receiver is.
    pub fn station(&self) -> Station {
        self.station
    }
}

impl Fdb {
    /// `from` is heard again, behind `port`, with a frame for `to`: does what `learn` and `lookup` do for the two, if that needs
    /// no more than one look each. `None` if it does (one of them is news, or lives in its second bucket): nothing is done then
    /// but that `from` may have been heard.
    pub fn path(
        &self,
        from: Key,
        to: Key,
        port: PortId,
        generation: u16,
        now: u32,
    ) -> Option<Path> {
        let hashes = [from, to].map(|key| self.hash(key));
        let homes = hashes.map(|hash| self.home(hash));
        // Before the looks: what they find is at least as new as these heads.
        let heads = homes.map(|home| self.bucket(home).head());
        if !self.heard_again(from, hashes[0], port, generation, now) {
            return None;
        }
        let Probe::Hit(seen) = self.bucket(homes[1]).probe(to.0) else {
            return None;
        };
        Some(Path {
            from,
            to,
            homes: homes.map(|home| home as u32),
            heads,
            second: now,
            station: station(seen),
        })
    }

    /// Where `to` is, if this is the path from `from` to it, nobody has written to the buckets of the two since, and the second is
    /// the same: then [`Fdb::path`] would give the same path and write nothing.
    #[inline]
    pub fn recall(&self, path: &Path, from: Key, to: Key, now: u32) -> Option<Station> {
        let [sender, receiver] = path.homes.map(|home| self.bucket(home as usize));
        let holds = path.from == from
            && path.to == to
            && path.second == now
            && sender.head() == path.heads[0]
            && receiver.head() == path.heads[1];
        holds.then_some(path.station)
    }
}
