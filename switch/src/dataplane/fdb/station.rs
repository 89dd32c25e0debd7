//! The words of the forwarding database: what it is asked, told, and answers.

use crate::dataplane::eth::Mac;
use crate::dataplane::port_set::{Domain, PortId};

/// A station's name: its domain and its MAC address.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Key(pub(super) u64);

impl Key {
    /// The name of `mac` in `domain`.
    #[inline]
    pub const fn new(domain: Domain, mac: Mac) -> Key {
        Key((domain.0 as u64) << 48 | mac.bits())
    }

    /// The domain.
    #[inline]
    pub const fn domain(self) -> Domain {
        Domain((self.0 >> 48) as u16)
    }

    /// The address.
    #[inline]
    pub const fn mac(self) -> Mac {
        Mac::from_bits(self.0)
    }
}

/// Where a station is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Station {
    /// Behind this port,
    pub port: PortId,
    /// if the port's owner is still this one.
    pub generation: u16,
    /// Set by the operator. While a known station is being made static, old and new may be mixed in this flag alone.
    pub is_static: bool,
}

/// What became of a source address.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Learned {
    /// Nothing new.
    Known,
    /// Known; heard for the first time in this second.
    Refreshed,
    /// A new station, or one that was known from an earlier owner of a port number.
    New,
    /// It was behind another port until now.
    Moved,
    /// It is static, and not here.
    Static,
    /// No place that this port may take; or not the address of a station.
    Full,
    /// Another worker is changing the bucket: not learnt this time.
    Busy,
}

/// Why a static station was refused.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum StaticError {
    /// Zero or a group address.
    #[error("no station has a zero or multicast address")]
    NotAStation,
    /// Beyond `ports_max`.
    #[error("no such port number")]
    NoSuchPort,
    /// Only static and reserved stations where it belongs.
    #[error("the forwarding database is full of static stations; raise its capacity")]
    Full,
}

/// Which stations to forget. Static ones stay, unless their port is gone.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Flush {
    /// All that were learnt.
    All,
    /// Those learnt from a port.
    Port(PortId),
    /// Those learnt in a domain.
    Domain(Domain),
    /// All of a port that is gone, static ones too.
    Gone(PortId),
}

/// How often what has happened since the start, and what is fixed now.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct FdbStats {
    /// New stations.
    pub learned: u64,
    /// Stations that changed their port.
    pub moved: u64,
    /// Stations that made place for others.
    pub evicted: u64,
    /// Stations that found no place.
    pub refused: u64,
    /// Stations not heard for too long.
    pub aged: u64,
    /// Static stations in the table now.
    pub fixed: u64,
}
