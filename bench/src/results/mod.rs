//! A saved run: what `--json` writes and `ringway-bench report` reads. This module is the format; nothing else defines it.
//!
//! One file is one [`Saved`]: where and how was measured, what limits the figures, and a list of measurements, each of one
//! kind. A reader skips kinds and fields it does not know; fields are added, never renamed, and [`FORMAT`] grows when one
//! has to go.

mod distribution;
mod rfc;
mod scenarios;

use std::path::Path;

use anyhow::{Context, Result, anyhow, ensure};
use serde::{Deserialize, Serialize};

use crate::host::Host;
use crate::sentinel::Placement;

pub(crate) use distribution::{Distribution, Serialized};
pub(crate) use rfc::{
    AddressStep, Addresses, BackToBack, HeadOfLine, Latency, LossCurve, Recovery, Search, Step,
};
pub(crate) use scenarios::{Attach, Chain, Footprint, IdlePorts, Neighbour, Outage};

/// The version of the format.
pub(crate) const FORMAT: u32 = 1;

/// Everything that a run found out.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Saved {
    pub(crate) format: u32,
    /// Version of `ringway-bench`.
    pub(crate) version: String,
    pub(crate) command: Vec<String>,
    /// Seconds since 1970.
    pub(crate) started: u64,
    pub(crate) host: Host,
    /// The switch's CPU, the generator's, that of all else.
    pub(crate) cpus: [usize; 3],
    pub(crate) nice: i32,
    /// False: the run ended early, this is what was measured so far.
    pub(crate) complete: bool,
    /// Everything measured, the generator (`client`) included, and what its binary calls itself.
    pub(crate) versions: Vec<Version>,
    /// What limits these figures: few samples, no hugepages, things left out and why, failures.
    pub(crate) caveats: Vec<String>,
    pub(crate) measurements: Vec<Measurement>,
}

/// A switch, and what its binary calls itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Version {
    pub(crate) name: String,
    pub(crate) version: String,
}

/// One thing that was measured.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
#[allow(
    clippy::large_enum_variant,
    reason = "a handful per run, built once and written"
)]
pub(crate) enum Measurement {
    /// Frames per second of one switch at one kind of work.
    Throughput(Throughput),
    /// One run of the generator: what was sent, received, lost.
    Load(Load),
    /// How long frames took (RFC 2544 §26.2).
    Latency(Latency),
    /// A search for the highest rate that loses no more than allowed (RFC 2544 §26.1).
    Search(Search),
    /// Loss over offered rate (RFC 2544 §26.3).
    LossCurve(LossCurve),
    /// The longest burst at full speed without loss (RFC 2544 §26.4).
    BackToBack(BackToBack),
    /// How long overload is felt (RFC 2544 §26.5).
    Recovery(Recovery),
    /// Stations a switch keeps (RFC 2889 §5.7), or learns per second (§5.8).
    Addresses(Addresses),
    /// Whether a congested port costs others (RFC 2889 §5.5).
    HeadOfLine(HeadOfLine),
    /// Frames through several containers one after the other.
    Chain(Chain),
    /// Two busy ports among many connected, silent ones.
    IdlePorts(IdlePorts),
    /// What others lose by one container's behaviour.
    Neighbour(Neighbour),
    /// From connecting a container to its first frame.
    Attach(Attach),
    /// The switch is killed and started again (RFC 2544 §26.6).
    Outage(Outage),
    /// Memory and CPU of a switch with nothing to do.
    Footprint(Footprint),
    /// A kind that this version does not know: skipped.
    #[serde(other)]
    Unknown,
}

/// What the frames were.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Work {
    /// For people: `64 B split`.
    pub(crate) title: String,
    /// Bytes of a frame on the ring, without CRC; none for a mix of lengths.
    pub(crate) frame: Option<u32>,
    /// `split` or `packed`, with what differs from virtio_user's default.
    pub(crate) rings: String,
    /// Ports that carried traffic.
    pub(crate) ports: u32,
    /// Stations (source addresses) per direction.
    pub(crate) stations: u32,
}

/// Frames per second of one switch at one kind of work, as received by the client.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Throughput {
    pub(crate) peer: String,
    /// Row name, as in `compare --rows`.
    pub(crate) row: String,
    pub(crate) work: Work,
    /// The row this one is a share of.
    pub(crate) base: Option<String>,
    /// The rate means the time of one hop: 2 / rate.
    pub(crate) hop: bool,
    pub(crate) samples: Vec<Sample>,
}

/// One sample of a rate.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Sample {
    /// In which round of visits.
    #[serde(default)]
    pub(crate) round: u32,
    /// Million frames per second.
    pub(crate) mpps: f64,
    pub(crate) placement: Placement,
    /// Why it must not be used.
    pub(crate) discarded: Option<String>,
    /// TSC cycles per frame of the switch's busy turns, and its busy share.
    pub(crate) switch_cycles: Option<f64>,
    pub(crate) switch_busy: Option<f64>,
    pub(crate) client_cycles: Option<f64>,
    pub(crate) client_busy: Option<f64>,
    /// The sentinel's nanoseconds per round trip before and after.
    pub(crate) sentinel_ns: [f64; 2],
    /// The rate in the steps of the sample.
    pub(crate) steps: Vec<f64>,
}

/// What the generator sent and received.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Count {
    pub(crate) seconds: f64,
    /// Frames that were due: more than `sent` where the switch took them too slowly.
    pub(crate) offered: u64,
    pub(crate) sent: u64,
    /// Frames received at least once and unchanged.
    pub(crate) received: u64,
    /// Their bytes.
    pub(crate) bytes: u64,
    /// Sent (times receivers, for broadcast) and never received.
    pub(crate) lost: u64,
    pub(crate) duplicated: u64,
    pub(crate) reordered: u64,
    pub(crate) corrupted: u64,
    /// Frames the generator did not send, or sent to others.
    pub(crate) foreign: u64,
    /// Frames whose whole payload was compared; of all others the first 40 bytes.
    pub(crate) verified: u64,
}

/// One run of the generator.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Load {
    pub(crate) peer: String,
    pub(crate) work: Work,
    /// `window of 512` or `1000000 frames/s`.
    pub(crate) pace: String,
    pub(crate) count: Count,
    /// Million frames per second received, for each second or so.
    pub(crate) steps: Vec<f64>,
    /// TSC cycles per frame of the generator, its idle turns not counted, and its busy share.
    pub(crate) generator_cycles: f64,
    pub(crate) generator_busy: f64,
    /// Of each port: the longest time without a frame between two frames, nanoseconds.
    #[serde(default)]
    pub(crate) gaps_ns: Vec<f64>,
    pub(crate) placement: Option<Placement>,
    /// Why it ended early.
    pub(crate) partial: Option<String>,
    pub(crate) latencies: Vec<Distribution>,
}

impl Saved {
    /// Writes it.
    pub(crate) fn write(&self, path: &Path) -> Result<()> {
        let mut text = serde_json::to_string_pretty(self)?;
        text.push('\n');
        std::fs::write(path, text).with_context(|| path.display().to_string())
    }

    /// Adds what the same run found out about another switch.
    pub(crate) fn add(&mut self, other: Self) {
        self.complete &= other.complete;
        for version in other.versions {
            if !self.versions.contains(&version) {
                self.versions.push(version);
            }
        }
        for caveat in other.caveats {
            if !self.caveats.contains(&caveat) {
                self.caveats.push(caveat);
            }
        }
        self.measurements.extend(other.measurements);
    }

    /// Reads one back; `-` is standard input.
    pub(crate) fn read(path: &Path) -> Result<Self> {
        let name = path.display();
        let text = if path.as_os_str() == "-" {
            std::io::read_to_string(std::io::stdin())
        } else {
            std::fs::read_to_string(path)
        };
        let text = text.map_err(|error| {
            anyhow!("{name}: cannot be read ({error}): name a file that --json FILE wrote")
        })?;
        let head: Head = serde_json::from_str(&text).map_err(|error| {
            anyhow!("{name}: not a saved run of ringway-bench ({error}): save one with --json FILE")
        })?;
        ensure!(
            head.format <= FORMAT,
            "{name}: saved by a newer ringway-bench ({}, format {}; this one is {} and reads {FORMAT}): use that one, or measure again",
            head.version,
            head.format,
            env!("CARGO_PKG_VERSION"),
        );
        serde_json::from_str(&text).map_err(|error| {
            anyhow!(
                "{name}: a damaged run of ringway-bench ({error}): measure again, with --json FILE"
            )
        })
    }
}

/// What every format has.
#[derive(Deserialize)]
struct Head {
    format: u32,
    version: String,
}
