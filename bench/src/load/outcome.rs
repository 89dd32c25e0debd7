//! What came of a trial, and the distributions of its latencies.

use hdrhistogram::Histogram;
use ringway::guest::traffic::Tally;

use super::sink::Found;
use crate::results::{Count, Distribution, Serialized};

/// What receivers found, of so many frames that were to arrive.
pub(crate) fn counted(tally: &Tally, expected: u64) -> Count {
    Count {
        received: tally.received,
        bytes: tally.bytes,
        lost: expected.saturating_sub(tally.received + tally.corrupted),
        duplicated: tally.duplicated,
        reordered: tally.reordered,
        corrupted: tally.corrupted,
        foreign: tally.foreign,
        verified: tally.verified,
        ..Count::default()
    }
}

/// What came of it.
pub(crate) struct Outcome {
    pub(crate) count: Count,
    /// Received within the time, million frames per second.
    pub(crate) mpps: f64,
    pub(crate) steps: Vec<f64>,
    /// By port: latencies in TSC cycles.
    pub(crate) latencies: Vec<Histogram<u64>>,
    /// By port: what it sent and received.
    pub(crate) offered: Vec<u64>,
    pub(crate) sent: Vec<u64>,
    pub(crate) found: Vec<Found>,
    /// By port: the longest time without a frame between two frames, nanoseconds.
    pub(crate) gaps_ns: Vec<f64>,
    pub(crate) jitter_ns: f64,
    /// TSC cycles of the generator per frame received, without idle turns, and the share of its time.
    pub(crate) cycles: f64,
    pub(crate) busy: f64,
    /// Why it ended early.
    pub(crate) partial: Option<String>,
    pub(crate) tsc_hz: f64,
}

impl Outcome {
    /// Frames that were due and that the switch did not take.
    pub(crate) fn refused(&self) -> u64 {
        self.count.offered - self.count.sent
    }

    /// The share of the offered frames that was not received.
    pub(crate) fn loss(&self) -> f64 {
        let lost = self.refused() + self.count.lost + self.count.corrupted;
        lost as f64 / self.count.offered.max(1) as f64
    }

    /// Latencies of all ports.
    pub(crate) fn latency(&self, name: &str) -> Distribution {
        let mut all = self.latencies[0].clone();
        for one in &self.latencies[1..] {
            all.add(one).expect("all have the same bounds");
        }
        distribution(name, &all, self.tsc_hz)
    }

    /// Latencies of some ports.
    pub(crate) fn latency_of(&self, name: &str, ports: &[usize]) -> Distribution {
        let mut some = Histogram::new_from(&self.latencies[0]);
        for &port in ports {
            some.add(&self.latencies[port])
                .expect("all have the same bounds");
        }
        distribution(name, &some, self.tsc_hz)
    }

    /// Latencies of each port that received something.
    pub(crate) fn by_port(&self) -> Vec<Distribution> {
        let ports = self.latencies.iter().enumerate();
        ports
            .filter(|(_, latencies)| !latencies.is_empty())
            .map(|(port, latencies)| {
                distribution(&format!("to port {port}"), latencies, self.tsc_hz)
            })
            .collect()
    }
}

/// A histogram of TSC cycles in nanoseconds.
pub(crate) fn distribution(name: &str, cycles: &Histogram<u64>, tsc_hz: f64) -> Distribution {
    let ns = |cycles: f64| round(cycles * 1e9 / tsc_hz);
    let quantile = |quantile| ns(cycles.value_at_quantile(quantile) as f64);
    let count = cycles.len();
    let mut cdf: Vec<[f64; 2]> = Vec::new();
    if count > 0 {
        // A point per bucket of the logarithmic axis, finer towards the tail.
        for value in cycles.iter_quantiles(12) {
            let point = [ns(value.value_iterated_to() as f64), value.quantile()];
            if cdf.last().is_none_or(|last| last[0] < point[0]) {
                cdf.push(point);
            } else if let Some(last) = cdf.last_mut() {
                last[1] = point[1];
            }
        }
    }
    Distribution {
        name: name.to_owned(),
        count,
        min: if count > 0 {
            ns(cycles.min() as f64)
        } else {
            0.0
        },
        mean: ns(cycles.mean()),
        stdev: ns(cycles.stdev()),
        p50: quantile(0.5),
        p90: quantile(0.9),
        p99: quantile(0.99),
        p999: quantile(0.999),
        p9999: quantile(0.9999),
        max: ns(cycles.max() as f64),
        cdf,
        histogram: if count > 0 {
            Serialized::new(cycles, 1e9 / tsc_hz)
        } else {
            None
        },
    }
}

/// A tenth of a nanosecond is more than any clock here has.
fn round(ns: f64) -> f64 {
    (ns * 10.0).round() / 10.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_distribution_is_in_nanoseconds_and_its_curve_ends_at_one() {
        let mut cycles = Histogram::new_with_bounds(1, 1 << 42, 2).unwrap();
        for value in 1..=10_000 {
            cycles.record(value).unwrap();
        }
        let found = distribution("all", &cycles, 2e9);
        assert_eq!(found.count, 10_000);
        assert!((found.p50 - 2500.0).abs() < 30.0, "{found:?}");
        assert!((found.p99 - 4950.0).abs() < 60.0, "{found:?}");
        assert_eq!(found.cdf.last().unwrap()[1], 1.0);
        assert!(found.cdf.is_sorted_by(|a, b| a[0] < b[0] && a[1] <= b[1]));
        assert!(
            distribution("none", &Histogram::new_from(&cycles), 2e9)
                .cdf
                .is_empty()
        );
    }
}
