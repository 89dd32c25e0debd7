//! A distribution of times: its percentiles for people, the whole of it for others' tools.

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use hdrhistogram::Histogram;
use hdrhistogram::serialization::{Deserializer, Serializer, V2DeflateSerializer};
use serde::{Deserialize, Serialize};

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
