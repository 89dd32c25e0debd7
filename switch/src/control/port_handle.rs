//! What a port's session and the switch ask of each other.

use super::state::{Direction, MemoryRegion, Peer, PortState, RingKind, UplinkStatus};
use crate::dataplane::eth::Mac;
use crate::port::ixgbevf::{FromWire, ToWire};
use crate::port::vhost::{FromGuest, ToGuest};

/// Everything a port's session may ask of the switch. The engine implements it.
pub trait PortHandle: Send + Sync {
    /// Hands rings to the workers: frames flow. Replaces nothing: `detach` first.
    fn attach(&self, rings: Rings) -> anyhow::Result<()>;

    /// Takes all rings of the port back. When it returns no worker touches them: this is the quiesce of vhost-user.
    fn detach(&self) -> Rings;

    /// Says whose files the guest's memory is made of, in the place of what was said before; none: it has gone. Refused, with
    /// the reason, if a guest that is another process has one of them: each would read the other's frames.
    ///
    /// Asked before rings in that memory are attached. Without a switch behind the handle there is nobody else.
    fn claim(&self, peer: Option<PeerId>, files: &[FileId]) -> Result<(), String> {
        let _ = (peer, files);
        Ok(())
    }

    /// The stations behind the other ports of this port's bridge: whose frames an uplink has to be given.
    fn stations(&self) -> Vec<Mac> {
        Vec::new()
    }

    /// Says how the port is, for `ringway port show`. A report of a state other than `Connected` and `Forwarding` after one
    /// of these makes the switch forget the stations behind the port.
    fn report(&self, report: SessionReport);
}

/// Device and inode of a file.
pub type FileId = (u64, u64);

/// Which process a guest is, for comparison. One process with two devices is one guest with two ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PeerId {
    /// Its number in the file system of pidfds.
    Pidfd(u64),
    /// Its process id.
    Process(i32),
}

/// The rings of a port that are ready and enabled, by queue pair.
#[derive(Default)]
pub struct Rings {
    /// Guest's transmit rings.
    pub from_guest: Vec<(u16, FromGuest)>,
    /// Guest's receive rings.
    pub to_guest: Vec<(u16, ToGuest)>,
    /// An uplink's receive queues.
    pub from_wire: Vec<(u16, FromWire)>,
    /// An uplink's transmit queues.
    pub to_wire: Vec<(u16, ToWire)>,
}

/// How a port is.
#[derive(Clone, Debug, PartialEq)]
pub struct SessionReport {
    /// In one word.
    pub state: PortState,
    /// In one sentence, with the remedy, if something is wrong.
    pub reason: Option<String>,
    /// The process at the other end.
    pub peer: Option<Peer>,
    /// Names of the negotiated virtio features.
    pub features: Vec<String>,
    /// Names of the negotiated vhost-user protocol features.
    pub protocol_features: Vec<String>,
    /// The shared memory.
    pub memory: Vec<MemoryRegion>,
    /// The rings the guest has set up.
    pub rings: Vec<RingReport>,
    /// How it stands with the PF, for an uplink.
    pub uplink: Option<UplinkStatus>,
}

impl Default for SessionReport {
    fn default() -> SessionReport {
        SessionReport {
            state: PortState::Listening,
            reason: None,
            peer: None,
            features: Vec::new(),
            protocol_features: Vec::new(),
            memory: Vec::new(),
            rings: Vec::new(),
            uplink: None,
        }
    }
}

/// One ring a guest has set up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingReport {
    /// Queue pair, from 0.
    pub pair: u16,
    /// Which of the pair's two rings.
    pub direction: Direction,
    /// Its format.
    pub kind: RingKind,
    /// Descriptors.
    pub size: u16,
    /// Whether the guest has enabled it.
    pub enabled: bool,
}
