//! All that a run has to tell, in the order in which it is read.

use super::{Section, compared, latency, life, scenarios, throughput};
use crate::results::Saved;

/// The sections that have something to show.
pub(super) fn sections(saved: &Saved) -> Vec<Section> {
    let all = [
        throughput::section(saved),
        compared::cycles(saved),
        latency::section(saved),
        latency::loss(saved),
        life::bursts(saved),
        scenarios::chain(saved),
        scenarios::idle(saved),
        scenarios::stations(saved),
        life::neighbour(saved),
        life::life(saved),
    ];
    let full = |section: &Section| !section.plots.is_empty() || !section.grids.is_empty();
    all.into_iter().filter(full).collect()
}
