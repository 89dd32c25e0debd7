//! Names of ports and bridges, and the list of ports a frame is flooded to.

use std::fmt;
use std::sync::Arc;

use super::queue::TxQueue;

/// Ports a switch can hold; a port number is an index below this.
pub const PORTS_MAX: usize = 4096;

/// A port's number in this switch: an index that is used again after the port is gone.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct PortId(pub u16);

impl fmt::Display for PortId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// The broadcast domain a MAC address belongs to: one per bridge (and later per bridge and VLAN).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Domain(pub u16);

impl fmt::Display for Domain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// Where a worker finds the way out of a port.
pub struct Exit {
    /// Counts the owners this port number has had: a station learnt from an earlier owner is no longer valid.
    pub generation: u16,
    /// The port's broadcast domain.
    pub domain: Domain,
    /// The queues towards the port's owner, never empty; see [`Exit::queue`].
    pub queues: Vec<Arc<dyn TxQueue>>,
}

impl Exit {
    /// The queue that worker number `worker` sends to: each its own, if the owner has enough.
    #[inline]
    pub fn queue(&self, worker: usize) -> Option<&dyn TxQueue> {
        let number = if self.queues.len() > worker {
            worker
        } else {
            worker.checked_rem(self.queues.len())?
        };
        self.queues.get(number).map(|queue| &**queue)
    }
}

/// Which ports can be sent to: an immutable picture, replaced as a whole by the control plane.
///
/// Threads: built by control, read by workers; the last `Arc` is dropped by control (a worker hands its old picture back).
#[derive(Default)]
pub struct Topology {
    exits: Vec<Option<Exit>>,
    floods: Vec<Vec<PortId>>,
}

impl Topology {
    /// Builds the picture from the exits, indexed by port number.
    pub fn new(exits: Vec<Option<Exit>>) -> Topology {
        assert!(
            exits.len() <= PORTS_MAX,
            "control hands out port numbers below PORTS_MAX"
        );
        let mut floods: Vec<Vec<PortId>> = Vec::new();
        for (port, exit) in exits.iter().enumerate() {
            let Some(exit) = exit else { continue };
            let domain = usize::from(exit.domain.0);
            if floods.len() <= domain {
                floods.resize_with(domain + 1, Vec::new);
            }
            floods[domain].push(PortId(port as u16));
        }
        Topology { exits, floods }
    }

    /// The way out of `port`, if its owner is attached.
    #[inline]
    pub fn exit(&self, port: PortId) -> Option<&Exit> {
        self.exits.get(usize::from(port.0))?.as_ref()
    }

    /// All ports of `domain` that can be sent to, in order of their numbers.
    #[inline]
    pub fn flood(&self, domain: Domain) -> &[PortId] {
        self.floods
            .get(usize::from(domain.0))
            .map_or(&[], Vec::as_slice)
    }
}
