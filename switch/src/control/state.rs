//! What control and the outside world tell each other: plain data, the same in Rust, in JSON and in the OpenAPI description.
//!
//! Nothing here acts. The engine fills these in, [`super::api`] sends them, `cli` prints them.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::AddAssign;
use std::path::PathBuf;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use utoipa::{IntoParams, ToSchema};

pub use super::uplink_status::*;
pub use super::wanted::*;
use crate::dataplane::eth::Mac;

/// Frames and bytes in one place of the switch.
///
/// Over all ports together, over each worker, and over the whole switch: `received + replicated = sent + dropped`, always.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Counters {
    /// Frames taken from guests.
    pub received: u64,
    /// Bytes of those.
    pub received_bytes: u64,
    /// Extra copies of flooded frames: a flood to n ports counts n - 1.
    pub replicated: u64,
    /// Frames given to guests.
    pub sent: u64,
    /// Bytes of those.
    pub sent_bytes: u64,
    /// Frames that went nowhere, by reason.
    pub dropped: BTreeMap<String, u64>,
}

impl Counters {
    /// All drops together.
    pub fn dropped_total(&self) -> u64 {
        self.dropped.values().sum()
    }

    /// Whether every frame is accounted for. True of the sum over all ports, of each worker and of the whole, not of one port.
    pub fn balanced(&self) -> bool {
        self.received + self.replicated == self.sent + self.dropped_total()
    }
}

impl AddAssign<&Counters> for Counters {
    fn add_assign(&mut self, other: &Counters) {
        self.received += other.received;
        self.received_bytes += other.received_bytes;
        self.replicated += other.replicated;
        self.sent += other.sent;
        self.sent_bytes += other.sent_bytes;
        for (reason, frames) in &other.dropped {
            *self.dropped.entry(reason.clone()).or_default() += frames;
        }
    }
}

/// How far a port has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum PortState {
    /// Waits for a guest to connect.
    Listening,
    /// Tries to reach the guest's socket.
    Connecting,
    /// A guest is there, its rings do not run yet.
    Connected,
    /// Frames may flow.
    Forwarding,
    /// The guest lied or took its memory away; it may come back after a pause.
    Quarantined,
    /// The port cannot work until somebody changes something: see the reason.
    Error,
}

impl fmt::Display for PortState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            PortState::Listening => "listening",
            PortState::Connecting => "connecting",
            PortState::Connected => "connected",
            PortState::Forwarding => "forwarding",
            PortState::Quarantined => "quarantined",
            PortState::Error => "error",
        })
    }
}

/// A port as it is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct PortStatus {
    /// As the operator wanted it.
    pub spec: PortSpec,
    /// How far it has come.
    pub state: PortState,
    /// Why it is not forwarding: one sentence with the remedy.
    pub reason: Option<String>,
    /// Seconds in this state.
    pub since_seconds: u64,
    /// How often a guest has connected.
    pub connects: u64,
    /// Guests that broke the rules.
    #[serde(default)]
    pub put_out: PutOut,
    /// Who connected, where the kernel says.
    pub peer: Option<Peer>,
    /// Virtio features negotiated, by name.
    pub features: Vec<String>,
    /// vhost-user protocol features negotiated, by name.
    pub protocol_features: Vec<String>,
    /// Memory of the guest that is mapped.
    pub memory: Vec<MemoryRegion>,
    /// Rings in use.
    pub queues: Vec<QueueStatus>,
    /// Frames of all its queues together.
    pub counters: Counters,
    /// How it stands with the PF, for an uplink.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uplink: Option<UplinkStatus>,
}

/// Guests that a port has put out. The next one may be there at once, so this is told besides the port's state.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PutOut {
    /// How many.
    pub guests: u64,
    /// Why the last one.
    pub last: Option<String>,
}

/// The process at the other end of a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Peer {
    /// Process id, as seen from Ringway's pid namespace.
    pub pid: i32,
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
}

/// One region of a guest's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct MemoryRegion {
    /// Where the guest sees it (guest physical address).
    pub guest_address: u64,
    /// Length in bytes.
    pub size: u64,
    /// Size of its pages in bytes.
    pub page_size: u64,
    /// Whether holes and vanished pages are caught by userfaultfd.
    pub armed: bool,
}

/// Which way a ring carries frames, seen from the switch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Direction {
    /// The guest's transmit ring.
    FromGuest,
    /// The guest's receive ring.
    ToGuest,
    /// A receive queue of an uplink's VF.
    FromWire,
    /// A transmit queue of an uplink's VF.
    ToWire,
}

impl Direction {
    /// Whether it brings frames to the switch: such a ring belongs to one worker.
    pub fn inward(self) -> bool {
        matches!(self, Direction::FromGuest | Direction::FromWire)
    }
}

/// Format of a ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum RingKind {
    /// virtio 1.2 section 2.7.
    Split,
    /// virtio 1.2 section 2.8.
    Packed,
    /// Descriptors of an 82599.
    Nic,
}

/// One ring of a port.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct QueueStatus {
    /// Queue pair, from 0.
    pub pair: u16,
    /// Which of the pair's two rings.
    pub direction: Direction,
    /// Its format.
    pub ring: RingKind,
    /// Descriptors.
    pub size: u16,
    /// Whether the guest has enabled it.
    pub enabled: bool,
    /// CPU of the worker that owns it; none for a ring that every worker may feed.
    pub worker: Option<usize>,
    /// Its frames.
    pub counters: Counters,
}

/// One worker: named by its CPU, as there is never more than one per CPU.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct WorkerStatus {
    /// The CPU it is pinned to.
    pub cpu: usize,
    /// NUMA node of that CPU, where known.
    pub numa_node: Option<usize>,
    /// Rings it polls.
    pub queues: Vec<QueueRef>,
    /// Turns taken.
    pub turns: u64,
    /// Turns that moved at least one frame.
    pub busy_turns: u64,
    /// TSC cycles since it started.
    pub cycles: u64,
    /// TSC cycles of busy turns.
    pub busy_cycles: u64,
    /// Times it slept (`idle = "adaptive"`).
    pub sleeps: u64,
    /// Passes over all its queues by their length: entry `n` counts those of 2^n to 2^(n+1) - 1 TSC cycles. For so long nobody else's
    /// frames were looked at.
    #[serde(default)]
    pub passes: Vec<u64>,
    /// Its frames: balanced.
    pub counters: Counters,
}

impl WorkerStatus {
    /// Share of its cycles in turns that moved frames, 0 to 1.
    pub fn load(&self) -> f64 {
        ratio(self.busy_cycles, self.cycles)
    }

    /// Busy cycles per frame received.
    pub fn cycles_per_frame(&self) -> f64 {
        ratio(self.busy_cycles, self.counters.received)
    }
}

fn ratio(part: u64, whole: u64) -> f64 {
    if whole == 0 {
        0.0
    } else {
        part as f64 / whole as f64
    }
}

/// Names one ring of one port.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct QueueRef {
    /// The port.
    pub port: String,
    /// Queue pair, from 0.
    pub pair: u16,
}

/// All counters at one moment.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct StatsReport {
    /// Seconds since the switch started.
    pub uptime_seconds: f64,
    /// TSC cycles per second, to turn cycles into time.
    pub tsc_hz: u64,
    /// The whole switch since it started, ports that have left included: balanced.
    pub total: Counters,
    /// What ports that have left had counted. `total` is this and the sum over `ports`.
    pub departed: Counters,
    /// Every port by name.
    pub ports: BTreeMap<String, Counters>,
    /// Every worker.
    pub workers: Vec<WorkerStatus>,
    /// The forwarding table.
    pub fdb: FdbUse,
}

impl StatsReport {
    /// `departed` and all ports added up; equals `total` when nothing is running or the report was taken at one moment.
    pub fn ports_total(&self) -> Counters {
        let mut sum = self.departed.clone();
        self.ports.values().for_each(|port| sum += port);
        sum
    }
}

/// How full the forwarding table is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct FdbUse {
    /// Stations it can hold.
    pub capacity: u64,
    /// Stations it holds.
    pub used: u64,
    /// Of those, static ones.
    pub fixed: u64,
    /// Seconds without a frame until a station is forgotten; 0: never.
    pub age: u32,
}

impl Serialize for Mac {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Mac {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// How a station came into the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum FdbKind {
    /// From a frame it sent; ages.
    Learned,
    /// By an operator; never ages, never moves.
    Static,
}

/// One station.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct FdbEntry {
    /// The bridge it lives in.
    pub bridge: String,
    /// Its VLAN; 0: untagged.
    pub vlan: u16,
    /// Its address.
    #[schema(value_type = String)]
    pub mac: Mac,
    /// Where it was seen.
    pub port: String,
    /// Seconds since its last frame; none for static ones.
    pub age_seconds: Option<u32>,
    /// How it came here.
    pub kind: FdbKind,
}

/// Which stations are meant: all whose given fields match.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(default, deny_unknown_fields)]
pub struct FdbFilter {
    /// Only this bridge.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bridge: Option<String>,
    /// Only this port.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub port: Option<String>,
    /// Only this VLAN.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vlan: Option<u16>,
    /// Only this address.
    #[schema(value_type = Option<String>)]
    #[param(value_type = Option<String>)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mac: Option<Mac>,
}

/// A static station to add.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct FdbAdd {
    /// Its address.
    #[schema(value_type = String)]
    pub mac: Mac,
    /// Its port; the bridge is the port's.
    pub port: String,
    /// Its VLAN; 0: untagged.
    #[serde(default)]
    pub vlan: u16,
}

/// A part of the forwarding table.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct FdbPage {
    /// The table as a whole.
    pub table: FdbUse,
    /// How many stations match the filter.
    pub matching: u64,
    /// The first of those.
    pub entries: Vec<FdbEntry>,
}

/// A queue pair and the worker that shall poll it from now on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct QueueMove {
    /// Queue pair, from 0.
    pub pair: u16,
    /// CPU of the worker.
    pub worker: usize,
}

/// What a reload did, or would do.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Applied {
    /// One sentence per action, in order.
    pub actions: Vec<String>,
    /// Ports that were not touched.
    pub unchanged: usize,
}

/// The program at the other end of the API.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Version {
    /// Always `ringway`.
    pub name: String,
    /// Its version.
    pub version: String,
    /// Its process id.
    pub pid: u32,
    /// The configuration file it was started with.
    #[schema(value_type = Option<String>)]
    pub config: Option<PathBuf>,
}
