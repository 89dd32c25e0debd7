//! Samples become cells: the median of one row on one switch in one placement, with its spread.

use crate::results::{Sample, Saved, Throughput};
use crate::sentinel::Placement;
use crate::summary::Spread;

/// All that is known of a row on a switch in a placement.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cell<'s> {
    /// What was measured.
    pub(crate) of: &'s Throughput,
    pub(crate) placement: Placement,
    pub(crate) mpps: Spread,
    /// Time of one hop, where one frame per port is in flight.
    pub(crate) hop_us: Option<Spread>,
    pub(crate) switch_cycles: Option<Spread>,
    pub(crate) switch_busy: Option<Spread>,
    pub(crate) client_cycles: Option<Spread>,
    pub(crate) client_busy: Option<Spread>,
}

/// The rates of a run.
pub(crate) fn throughputs(saved: &Saved) -> Vec<&Throughput> {
    all!(saved, Throughput)
}

/// Every row on every switch in every placement that has a usable sample. Mixed placements have none.
pub(crate) fn cells(saved: &Saved) -> Vec<Cell<'_>> {
    let all = throughputs(saved);
    let rows = each(all.iter().map(|one| one.row.as_str()));
    let peers = peers(saved);
    let mut cells = Vec::new();
    for placement in [Placement::Near, Placement::Far] {
        for row in &rows {
            for peer in &peers {
                let these = || {
                    all.iter()
                        .filter(|one| one.row == *row && one.peer == *peer)
                };
                let usable: Vec<&Sample> = these()
                    .flat_map(|one| &one.samples)
                    .filter(|sample| sample.placement == placement && sample.discarded.is_none())
                    .collect();
                if let Some(of) = these().next() {
                    cells.extend(cell(of, placement, &usable));
                }
            }
        }
    }
    cells
}

fn cell<'s>(of: &'s Throughput, placement: Placement, samples: &[&Sample]) -> Option<Cell<'s>> {
    let spread = |value: fn(&Sample) -> Option<f64>| {
        Spread::of(samples.iter().filter_map(|sample| value(sample)))
    };
    Some(Cell {
        of,
        placement,
        mpps: spread(|sample| Some(sample.mpps))?,
        // Two frames circulate, so a frame takes 2 / rate from one client port to the other.
        hop_us: of
            .hop
            .then(|| spread(|sample| Some(2.0 / sample.mpps)))
            .flatten(),
        switch_cycles: spread(|sample| sample.switch_cycles),
        switch_busy: spread(|sample| sample.switch_busy),
        client_cycles: spread(|sample| sample.client_cycles),
        client_busy: spread(|sample| sample.client_busy),
    })
}

/// The switches in the order of their first sample; the one that the others are compared with stands first.
pub(crate) fn peers(saved: &Saved) -> Vec<&str> {
    let mut peers = each(throughputs(saved).iter().map(|one| one.peer.as_str()));
    peers.sort_by_key(|&peer| peer != "ringway");
    peers
}

/// Each of them once, in the order of the first.
pub(crate) fn each<T: PartialEq>(all: impl IntoIterator<Item = T>) -> Vec<T> {
    let mut found = Vec::new();
    for one in all {
        if !found.contains(&one) {
            found.push(one);
        }
    }
    found
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::report::tests::{sample, saved};

    #[test]
    fn a_cell_is_the_median_with_its_spread_and_count() {
        let saved =
            saved([15.6, 16.0, 15.8].map(|mpps| sample("split64", "ovs", mpps, Placement::Near)));
        assert_eq!(cells(&saved)[0].mpps.show(""), "15.8 [15.6–16.0] n=3");
    }

    #[test]
    fn near_and_far_are_never_mixed_and_discarded_samples_do_not_count() {
        let saved = saved([
            sample("split64", "ovs", 16.0, Placement::Near),
            sample("split64", "ovs", 11.0, Placement::Far),
            sample("split64", "ovs", 13.0, Placement::Mixed),
        ]);
        let cells = cells(&saved);
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
        let saved = saved([sample("hop", "ovs", 3.6, Placement::Near)]);
        let cells = cells(&saved);
        assert_eq!(
            cells[0].hop_us.unwrap().show(" µs"),
            "0.56 µs [0.56–0.56] n=1"
        );
    }
}
