//! What the scenarios find out: chains, crowds, neighbours, comings and goings.

use serde::{Deserialize, Serialize};

use super::{Count, Distribution, Work};
use crate::sentinel::Placement;

/// Frames through a chain of containers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Chain {
    pub(crate) peer: String,
    pub(crate) work: Work,
    /// Containers between the first and the last.
    pub(crate) length: u32,
    /// Million frames per second through the whole chain.
    pub(crate) mpps: f64,
    /// One frame in flight.
    pub(crate) latency: Distribution,
    /// Mean difference between the latencies of consecutive frames, nanoseconds (RFC 3393 in spirit).
    pub(crate) jitter_ns: f64,
    pub(crate) count: Count,
    pub(crate) placement: Option<Placement>,
}

/// Two busy ports among silent ones.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct IdlePorts {
    pub(crate) peer: String,
    pub(crate) work: Work,
    /// Connected and silent ports besides the two.
    pub(crate) idle: u32,
    pub(crate) mpps: f64,
    pub(crate) switch_cycles: Option<f64>,
    pub(crate) placement: Option<Placement>,
}

/// What others lose by one container's behaviour.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Neighbour {
    pub(crate) peer: String,
    pub(crate) work: Work,
    /// What the container does: `floods`, `never refills its ring`, …
    pub(crate) behaviour: String,
    /// The innocent pair alone, and beside the neighbour.
    pub(crate) alone: Count,
    pub(crate) beside: Count,
    pub(crate) alone_latency: Distribution,
    pub(crate) beside_latency: Distribution,
}

/// From connecting a container to its first frame.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Attach {
    pub(crate) peer: String,
    /// Containers that attached one after the other.
    pub(crate) ports: u32,
    /// Of each: the socket connected to the first frame received.
    pub(crate) first_frame: Distribution,
    /// All of them, milliseconds.
    pub(crate) total_ms: f64,
    pub(crate) failed: u32,
}

/// The switch is killed and started again.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Outage {
    pub(crate) peer: String,
    /// `killed and started again`.
    pub(crate) event: String,
    /// Of each port: milliseconds without frames; none if it never came back.
    pub(crate) gaps_ms: Vec<Option<f64>>,
    /// How the containers came back: `by themselves (they listen)`, …
    pub(crate) reconnect: String,
}

/// A switch with nothing to do.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Footprint {
    pub(crate) peer: String,
    pub(crate) ports: u32,
    /// Resident memory, and hugepages, MiB.
    pub(crate) resident_mib: f64,
    pub(crate) hugepages_mib: f64,
    /// CPUs' worth of time: 1.0 is one CPU all the time.
    pub(crate) cpu: f64,
    pub(crate) threads: u32,
}
