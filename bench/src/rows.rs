//! What is measured: the rows of the table.

use anyhow::{Result, bail};

use crate::results::Work;

/// One line of the table: a kind of work that every switch gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Row {
    /// What stands in `--rows`.
    pub(crate) name: &'static str,
    /// What stands in the table.
    pub(crate) title: &'static str,
    /// The client's kind of ring.
    pub(crate) variant: Variant,
    /// Bytes of a frame on the ring, without CRC.
    pub(crate) frame: u32,
    /// What the client does.
    pub(crate) traffic: Traffic,
    /// Ports of the switch with a client on them: two work, the rest is connected and silent.
    pub(crate) ports: usize,
    /// The row this one is a share of.
    pub(crate) base: Option<&'static str>,
    /// Rows of one group are measured in turn, on the same instances of the switches.
    pub(crate) group: Group,
}

/// What is started together and measured in the same minutes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Group {
    /// Two ports, frames up to 1518 bytes.
    Plain,
    /// Two ports with room for 9000 bytes.
    Jumbo,
    /// Two busy ports among idle ones.
    Idle,
    /// Many source stations: it leaves tables and limits behind that other rows would suffer from.
    Stations,
}

impl Group {
    /// In the order of measurement.
    pub(crate) const ALL: [Self; 4] = [Self::Plain, Self::Jumbo, Self::Idle, Self::Stations];
}

/// The rings that testpmd's virtio_user offers to use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Variant {
    /// Split, in order, mergeable: virtio_user's default.
    Split,
    /// Split with the vector code paths: neither in order nor mergeable.
    SplitVec,
    /// Packed, in order, mergeable.
    Packed,
    /// Packed with the vector code paths, in order, not mergeable.
    PackedVec,
}

impl Variant {
    /// For people and files.
    fn name(self) -> &'static str {
        match self {
            Self::Split => "split",
            Self::SplitVec => "split, vectorized",
            Self::Packed => "packed",
            Self::PackedVec => "packed, vectorized",
        }
    }

    /// What the vdev's argument list says for it.
    pub(crate) fn arguments(self) -> &'static str {
        match self {
            Self::Split => "",
            Self::SplitVec => ",mrg_rxbuf=0,in_order=0,vectorized=1",
            Self::Packed => ",packed_vq=1",
            Self::PackedVec => ",packed_vq=1,mrg_rxbuf=0,in_order=1,vectorized=1",
        }
    }
}

/// What the client does with its two ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Traffic {
    /// A fixed number of frames circulates: what arrives on one port leaves on the other.
    Circle {
        /// Frames per burst of the client.
        burst: u32,
        /// Bursts per port that begin the circle.
        bursts: u32,
    },
    /// As many frames as the client can send, from this many source addresses in random order, one way.
    Stations(u32),
}

/// 16 bursts of 32 per port: 1024 frames circulate.
const FULL: Traffic = Traffic::Circle {
    burst: 32,
    bursts: 16,
};
/// 256 frames of 9000 bytes circulate: what the client's buffers allow.
const JUMBO: Traffic = Traffic::Circle {
    burst: 32,
    bursts: 4,
};
/// One frame per port: the rate is the inverse of the way through the switch.
const ONE: Traffic = Traffic::Circle {
    burst: 1,
    bursts: 1,
};

impl Traffic {
    /// Frames under way in a circle.
    pub(crate) fn in_flight(self) -> Option<u64> {
        match self {
            Self::Circle { burst, bursts } => Some(2 * u64::from(burst) * u64::from(bursts)),
            Self::Stations(_) => None,
        }
    }

    /// Whether the figure of interest is the time of one hop.
    pub(crate) fn is_hop(self) -> bool {
        self == ONE
    }
}

impl Row {
    /// What the frames are, as runs are saved.
    pub(crate) fn work(&self) -> Work {
        let stations = match self.traffic {
            Traffic::Stations(count) => count,
            Traffic::Circle { .. } => 1,
        };
        Work {
            title: self.title.to_owned(),
            frame: Some(self.frame),
            rings: self.variant.name().to_owned(),
            ports: self.ports as u32,
            stations,
        }
    }

    /// Whether ports and client need room for frames beyond 1518 bytes.
    pub(crate) fn jumbo(&self) -> bool {
        self.frame > 1518
    }
}

const fn row(
    name: &'static str,
    title: &'static str,
    variant: Variant,
    frame: u32,
    traffic: Traffic,
) -> Row {
    Row {
        name,
        title,
        variant,
        frame,
        traffic,
        ports: 2,
        base: None,
        group: Group::Plain,
    }
}

const fn idle(name: &'static str, title: &'static str, ports: usize) -> Row {
    Row {
        ports,
        base: Some("idle2"),
        group: Group::Idle,
        ..row(name, title, Variant::Split, 64, FULL)
    }
}

const fn stations(name: &'static str, title: &'static str, count: u32) -> Row {
    Row {
        base: Some("stations1"),
        group: Group::Stations,
        ..row(name, title, Variant::Split, 64, Traffic::Stations(count))
    }
}

/// Every row there is, in the order of the table.
pub(crate) const ROWS: [Row; 17] = [
    row("split64", "64 B split", Variant::Split, 64, FULL),
    row(
        "splitvec64",
        "64 B split vectorized",
        Variant::SplitVec,
        64,
        FULL,
    ),
    row("packed64", "64 B packed", Variant::Packed, 64, FULL),
    row(
        "packedvec64",
        "64 B packed in-order vectorized",
        Variant::PackedVec,
        64,
        FULL,
    ),
    row("split1518", "1518 B split", Variant::Split, 1518, FULL),
    row(
        "packedvec1518",
        "1518 B packed in-order vectorized",
        Variant::PackedVec,
        1518,
        FULL,
    ),
    row("hop", "one frame in flight, split", Variant::Split, 64, ONE),
    row(
        "hop-packed",
        "one frame in flight, packed in-order vectorized",
        Variant::PackedVec,
        64,
        ONE,
    ),
    Row {
        group: Group::Jumbo,
        ..row("split9000", "9000 B split", Variant::Split, 9000, JUMBO)
    },
    Row {
        base: None,
        ..idle("idle2", "2 ports connected, both busy", 2)
    },
    idle("idle64", "64 ports connected, two of them busy", 64),
    idle("idle256", "256 ports connected, two of them busy", 256),
    Row {
        base: None,
        ..stations("stations1", "1 source station, open loop", 1)
    },
    stations("stations1k", "1,000 source stations", 1000),
    stations("stations10k", "10,000 source stations", 10_000),
    stations("stations100k", "100,000 source stations", 100_000),
    stations("stations1m", "1,000,000 source stations", 1_000_000),
];

/// What `--rows` means without a value: the table but for its slowest rows.
pub(crate) const DEFAULT: &str =
    "split64,splitvec64,packed64,packedvec64,split1518,hop,hop-packed,split9000";

/// Finds rows by a comma-separated list of names (`all` is one) and adds the rows that they are a share of.
pub(crate) fn parse(list: &str) -> Result<Vec<Row>> {
    let mut chosen = [false; ROWS.len()];
    for name in list
        .split(',')
        .map(str::trim)
        .filter(|name| !name.is_empty())
    {
        if name == "all" {
            chosen.fill(true);
            continue;
        }
        let Some(at) = position(name) else {
            let names = ROWS.map(|row| row.name).join(", ");
            bail!("--rows: there is no row {name:?}; there are: {names}, all");
        };
        chosen[at] = true;
        if let Some(base) = ROWS[at].base.and_then(position) {
            chosen[base] = true;
        }
    }
    let rows: Vec<_> = ROWS
        .into_iter()
        .zip(chosen)
        .filter_map(|(row, chosen)| chosen.then_some(row))
        .collect();
    if rows.is_empty() {
        bail!("--rows: names no row");
    }
    Ok(rows)
}

fn position(name: &str) -> Option<usize> {
    ROWS.iter().position(|row| row.name == name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(list: &str) -> Vec<&'static str> {
        parse(list).unwrap().iter().map(|row| row.name).collect()
    }

    #[test]
    fn rows_come_in_table_order_once_each() {
        assert_eq!(
            names("packedvec64, split64,packedvec64"),
            ["split64", "packedvec64"]
        );
    }

    #[test]
    fn a_share_brings_the_row_it_is_a_share_of() {
        assert_eq!(names("idle256"), ["idle2", "idle256"]);
        assert_eq!(names("stations10k"), ["stations1", "stations10k"]);
    }

    #[test]
    fn a_wrong_name_is_refused_with_the_right_ones() {
        let error = parse("split64,splitt").unwrap_err().to_string();
        assert!(
            error.contains("\"splitt\"") && error.contains("packedvec64"),
            "{error}"
        );
        assert!(parse(" ,").is_err());
    }

    #[test]
    fn every_base_and_default_exists() {
        assert_eq!(names("all").len(), ROWS.len());
        assert!(
            ROWS.iter()
                .filter_map(|row| row.base)
                .all(|base| position(base).is_some())
        );
        assert_eq!(names(DEFAULT).len(), DEFAULT.split(',').count());
    }

    #[test]
    fn a_row_and_its_base_are_measured_in_the_same_minutes() {
        for row in ROWS {
            let base = row.base.and_then(position).map(|at| ROWS[at].group);
            assert!(base.is_none_or(|group| group == row.group), "{}", row.name);
        }
    }

    #[test]
    fn a_circle_knows_how_many_frames_it_holds() {
        assert_eq!(FULL.in_flight(), Some(1024));
        assert_eq!(ONE.in_flight(), Some(2));
    }
}
