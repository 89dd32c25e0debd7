//! What the tests of RFC 2544 and RFC 2889 find out.

use serde::{Deserialize, Serialize};

use super::{Count, Distribution, Work};
use crate::sentinel::Placement;

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
