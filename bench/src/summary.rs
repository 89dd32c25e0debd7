//! Samples become cells: the median of one row on one switch in one placement, with its spread.

use serde::Serialize;

use crate::rows::ROWS;
use crate::sample::Sample;
use crate::sentinel::{Placement, median};

/// Several samples of one thing.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(crate) struct Spread {
    pub(crate) median: f64,
    pub(crate) min: f64,
    pub(crate) max: f64,
    pub(crate) n: usize,
}

impl Spread {
    pub(crate) fn of(values: impl Iterator<Item = f64>) -> Option<Self> {
        let mut values: Vec<_> = values.collect();
        let median = median(&mut values)?;
        Some(Self {
            median,
            min: values[0],
            max: values[values.len() - 1],
            n: values.len(),
        })
    }

    /// `15.8 [15.6–16.0] n=2`
    pub(crate) fn show(&self, unit: &str) -> String {
        format!(
            "{}{unit} [{}–{}] n={}",
            digits(self.median),
            digits(self.min),
            digits(self.max),
            self.n
        )
    }
}

/// Three digits, as many as these measurements carry.
pub(crate) fn digits(value: f64) -> String {
    match value.abs() {
        large if large >= 99.95 => format!("{value:.0}"),
        middle if middle >= 9.995 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

/// All that is known of a row on a switch in a placement.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Cell {
    pub(crate) row: &'static str,
    pub(crate) peer: &'static str,
    pub(crate) placement: Placement,
    pub(crate) mpps: Spread,
    /// Time of one hop, where one frame per port is in flight.
    pub(crate) hop_us: Option<Spread>,
    pub(crate) switch_cycles: Option<Spread>,
    pub(crate) switch_busy: Option<Spread>,
    pub(crate) client_cycles: Option<Spread>,
    pub(crate) client_busy: Option<Spread>,
}

/// Every row on every switch in every placement that has a usable sample.
pub(crate) fn cells(samples: &[Sample]) -> Vec<Cell> {
    let mut cells = Vec::new();
    for placement in [Placement::Near, Placement::Far] {
        for row in &ROWS {
            for peer in peers(samples) {
                let usable = |sample: &&Sample| {
                    (sample.row, sample.peer, sample.placement) == (row.name, peer, placement)
                        && sample.discarded.is_none()
                };
                let samples: Vec<_> = samples.iter().filter(usable).collect();
                let spread = |value: fn(&Sample) -> Option<f64>| {
                    Spread::of(samples.iter().filter_map(|sample| value(sample)))
                };
                let Some(mpps) = spread(|sample| Some(sample.seen.mpps)) else {
                    continue;
                };
                cells.push(Cell {
                    row: row.name,
                    peer,
                    placement,
                    mpps,
                    // Two frames circulate, so a frame takes 2 / rate from one client port to the other.
                    hop_us: row
                        .traffic
                        .is_hop()
                        .then(|| spread(|sample| Some(2.0 / sample.seen.mpps)))
                        .flatten(),
                    switch_cycles: spread(|sample| sample.seen.switch_cycles),
                    switch_busy: spread(|sample| sample.seen.switch_busy),
                    client_cycles: spread(|sample| sample.seen.client_cycles),
                    client_busy: spread(|sample| sample.seen.client_busy),
                });
            }
        }
    }
    cells
}

/// The switches in the order of their first sample.
pub(crate) fn peers(samples: &[Sample]) -> Vec<&'static str> {
    let mut peers = Vec::new();
    for sample in samples {
        if !peers.contains(&sample.peer) {
            peers.push(sample.peer);
        }
    }
    // The one that the others are compared with stands first, whatever round it came in.
    peers.sort_by_key(|&peer| peer != "ringway");
    peers
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::sample::Seen;

    pub(crate) fn sample(
        row: &'static str,
        peer: &'static str,
        mpps: f64,
        placement: Placement,
    ) -> Sample {
        Sample {
            row,
            peer,
            round: 1,
            attempt: 1,
            placement,
            discarded: (placement == Placement::Mixed)
                .then(|| "the placement changed or is unclear".to_owned()),
            before_ns: 80.0,
            after_ns: 81.0,
            clock_ghz: [4.3, 4.3],
            seen: Seen {
                mpps,
                switch_cycles: Some(40.0),
                switch_busy: Some(0.5),
                client_cycles: Some(57.0),
                client_busy: Some(0.98),
                in_flight: Some(1024),
                ..Seen::default()
            },
        }
    }

    #[test]
    fn a_cell_is_the_median_with_its_spread_and_count() {
        let rates = [15.6, 16.0, 15.8].map(|mpps| sample("split64", "ovs", mpps, Placement::Near));
        assert_eq!(cells(&rates)[0].mpps.show(""), "15.8 [15.6–16.0] n=3");
    }

    #[test]
    fn near_and_far_are_never_mixed_and_discarded_samples_do_not_count() {
        let samples = [
            sample("split64", "ovs", 16.0, Placement::Near),
            sample("split64", "ovs", 11.0, Placement::Far),
            sample("split64", "ovs", 13.0, Placement::Mixed),
        ];
        let cells = cells(&samples);
        let rates: Vec<_> = cells
            .iter()
            .map(|cell| (cell.placement, cell.mpps.median, cell.mpps.n))
            .collect();
        assert_eq!(
            rates,
            [(Placement::Near, 16.0, 1), (Placement::Far, 11.0, 1)]
        );
    }

    #[test]
    fn one_frame_in_flight_is_shown_as_the_time_of_a_hop() {
        let cells = cells(&[sample("hop", "ovs", 3.6, Placement::Near)]);
        assert_eq!(
            cells[0].hop_us.unwrap().show(" µs"),
            "0.56 µs [0.56–0.56] n=1"
        );
    }

    #[test]
    fn numbers_carry_three_digits() {
        assert_eq!(
            ["0.78", "9.99", "10.0", "99.9", "100"],
            [0.78, 9.99, 9.996, 99.91, 99.96].map(digits)[..]
        );
    }
}
