//! A saved run: what `--json` writes and `ringway-bench report` reads. This module is the format; nothing else defines it.
//!
//! One file is one [`Saved`]: where and how was measured, what limits the figures, and a list of measurements, each of one
//! kind. A reader skips kinds and fields it does not know; fields are added, never renamed, and [`FORMAT`] grows when one
//! has to go.

use std::path::Path;

use anyhow::{Context, Result, anyhow, ensure};
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use hdrhistogram::Histogram;
use hdrhistogram::serialization::{Deserializer, Serializer, V2DeflateSerializer};
use serde::{Deserialize, Serialize};

use crate::host::Host;
use crate::sentinel::Placement;

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

/// A distribution of times.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Distribution {
    /// `port 0 → 1`, `all`.
    pub(crate) name: String,
    pub(crate) count: u64,
    /// Nanoseconds.
    pub(crate) min: f64,
    pub(crate) mean: f64,
    pub(crate) stdev: f64,
    pub(crate) p50: f64,
    pub(crate) p90: f64,
    pub(crate) p99: f64,
    pub(crate) p999: f64,
    pub(crate) p9999: f64,
    pub(crate) max: f64,
    /// The cumulative distribution: nanoseconds, and the share of all that took no longer.
    pub(crate) cdf: Vec<[f64; 2]>,
    /// All of it.
    #[serde(default)]
    pub(crate) histogram: Option<Serialized>,
}

/// A whole histogram, as the HdrHistogram libraries of all languages read it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Serialized {
    /// Nanoseconds per unit of its values.
    pub(crate) ns_per_unit: f64,
    /// HdrHistogram's V2 encoding, deflated, in base64.
    pub(crate) v2_deflate: String,
}

impl Serialized {
    /// Packs a histogram.
    pub(crate) fn new(histogram: &Histogram<u64>, ns_per_unit: f64) -> Option<Self> {
        let mut bytes = Vec::new();
        V2DeflateSerializer::new()
            .serialize(histogram, &mut bytes)
            .ok()?;
        Some(Self {
            ns_per_unit,
            v2_deflate: BASE64.encode(bytes),
        })
    }

    /// Unpacks it; none if it is damaged.
    pub(crate) fn histogram(&self) -> Option<Histogram<u64>> {
        let bytes = BASE64.decode(&self.v2_deflate).ok()?;
        Deserializer::new().deserialize(&mut bytes.as_slice()).ok()
    }
}

/// How long frames took at one rate.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Latency {
    pub(crate) peer: String,
    pub(crate) work: Work,
    /// Per cent of the rate found by the search before; none with one frame in flight.
    pub(crate) percent: Option<f64>,
    /// Million frames per second offered in all; none with one frame in flight.
    pub(crate) offered_mpps: Option<f64>,
    pub(crate) count: Count,
    pub(crate) placement: Option<Placement>,
    /// All directions first, then each.
    pub(crate) latencies: Vec<Distribution>,
    /// Why it ended early.
    #[serde(default)]
    pub(crate) partial: Option<String>,
}

/// One offered rate, and what came of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Step {
    /// Million frames per second.
    pub(crate) offered_mpps: f64,
    pub(crate) received_mpps: f64,
    /// Share of the offered frames that was not received.
    pub(crate) loss: f64,
    /// Of the loss: frames that the switch did not take from the ring in time.
    pub(crate) refused: f64,
    pub(crate) passed: bool,
    pub(crate) placement: Option<Placement>,
}

/// A search for the highest rate.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Search {
    pub(crate) peer: String,
    pub(crate) work: Work,
    /// The share of frames that may be lost.
    pub(crate) threshold: f64,
    /// Seconds per step.
    pub(crate) seconds: f64,
    pub(crate) steps: Vec<Step>,
    /// The highest rate that passed; none if none did.
    pub(crate) found_mpps: Option<f64>,
    /// Why it ended early.
    pub(crate) partial: Option<String>,
}

/// Loss over offered rate.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct LossCurve {
    pub(crate) peer: String,
    pub(crate) work: Work,
    pub(crate) steps: Vec<Step>,
    pub(crate) partial: Option<String>,
}

/// The longest burst without loss.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct BackToBack {
    pub(crate) peer: String,
    pub(crate) work: Work,
    /// The longest burst of each repetition.
    pub(crate) frames: Vec<u64>,
    /// The longest burst that was tried: the switch may take more.
    pub(crate) limit: u64,
}

/// How long overload is felt.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Recovery {
    pub(crate) peer: String,
    pub(crate) work: Work,
    /// Share of the frames lost at 110 % of the throughput.
    pub(crate) overload_loss: f64,
    /// Milliseconds after it until the last loss at 50 %; 0: none.
    pub(crate) last_loss_ms: f64,
}

/// How many stations a switch keeps, or how fast it learns them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Addresses {
    pub(crate) peer: String,
    /// `caching capacity (RFC 2889 §5.7)` or `learning rate (RFC 2889 §5.8)`.
    pub(crate) test: String,
    /// Stations announced, stations per second they were announced at, frames to them that were flooded.
    pub(crate) steps: Vec<AddressStep>,
    /// The most stations without flooding, or the highest rate.
    pub(crate) found: Option<f64>,
}

/// One number of stations, or one rate.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct AddressStep {
    pub(crate) stations: u64,
    pub(crate) rate: f64,
    pub(crate) flooded: u64,
    pub(crate) lost: u64,
}

/// A port that gets more than it can take, and a stream to another port from the same sender.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct HeadOfLine {
    pub(crate) peer: String,
    pub(crate) work: Work,
    /// The stream to the free port: what was offered and lost with the other port congested.
    pub(crate) free: Count,
    pub(crate) congested: Count,
    /// True if frames to the free port were held back or lost.
    pub(crate) blocked: bool,
}

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
