//! What the frames are, and who sends to whom.

use anyhow::{Result, ensure};

use super::frontends::Frontends;
use super::sender::Lengths;
use super::stream::FLOWS_MAX;
use super::wiring::Wire;
use crate::results::Work;

/// The longest frame: what the 16 bits of its length hold.
const FRAME_MAX: u16 = 65_000;
/// The shortest: sequence and stamp have to fit.
const FRAME_MIN: u16 = 40;

/// Who sends to whom.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Pattern {
    /// Port 0 and port 1, port 2 and port 3, … (RFC 2889 §5.1.3.1: partially meshed in pairs)
    #[default]
    Pairs,
    /// Each to the next, the last to the first
    Circle,
    /// Each to all others, in turn (RFC 2889 §5.1: fully meshed)
    Mesh,
    /// All to port 0
    FanIn,
}

/// What the frames are.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Frames")]
pub(crate) struct Frames {
    /// Bytes of a frame on the ring, without CRC: 40 to 65000, or imix (7 × 64, 4 × 594, 1 × 1518)
    #[arg(long, default_value = "64", value_parser = lengths)]
    pub(crate) size: Lengths,
    /// Stations (MAC addresses) at each port, up to 1,000,000: every frame is from and to the next one
    #[arg(long, value_name = "NUMBER", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=i64::from(FLOWS_MAX)))]
    pub(crate) stations: u32,
    /// Per cent of the frames that are broadcast
    #[arg(long, value_name = "PERCENT", default_value_t = 0, value_parser = clap::value_parser!(u32).range(0..=100))]
    pub(crate) broadcast: u32,
    /// Who sends to whom
    #[arg(long, value_enum, default_value = "pairs")]
    pub(crate) pattern: Pattern,
    /// Only the first of each pair sends
    #[arg(long)]
    pub(crate) one_way: bool,
    /// Compare the whole payload of every frame; otherwise of every 64th, and the first 40 bytes of all
    #[arg(long)]
    pub(crate) verify: bool,
}

fn lengths(text: &str) -> Result<Lengths, String> {
    if text == "imix" {
        return Ok(Lengths::imix());
    }
    match text.parse() {
        Ok(len) if (FRAME_MIN..=FRAME_MAX).contains(&len) => Ok(Lengths::one(len)),
        _ => Err(format!("must be {FRAME_MIN} to {FRAME_MAX}, or imix")),
    }
}

impl Frames {
    /// Frames of one length, both ways, one station a port.
    pub(crate) fn plain(len: u16) -> Self {
        Self {
            size: Lengths::one(len),
            stations: 1,
            broadcast: 0,
            pattern: Pattern::Pairs,
            one_way: false,
            verify: false,
        }
    }

    pub(crate) fn lengths(&self) -> Lengths {
        self.size.clone()
    }

    pub(crate) fn verify_every(&self) -> u64 {
        if self.verify { 1 } else { 64 }
    }

    /// The wires among so many ports.
    pub(crate) fn wires(&self, ports: usize) -> Result<Vec<Wire>> {
        ensure!(ports >= 2, "{ports} port: frames need two");
        let all = 0..ports;
        let wires: Vec<Wire> = match self.pattern {
            Pattern::Pairs => {
                ensure!(
                    ports.is_multiple_of(2),
                    "{ports} ports cannot be paired: take one more, or another --pattern"
                );
                all.filter(|port| !self.one_way || port % 2 == 0)
                    .map(|from| Wire { from, to: from ^ 1 })
                    .collect()
            }
            Pattern::Circle => all
                .map(|from| Wire {
                    from,
                    to: (from + 1) % ports,
                })
                .collect(),
            Pattern::Mesh => all
                .clone()
                .flat_map(|from| {
                    let others = (1..ports).map(move |by| (from + by) % ports);
                    others.map(move |to| Wire { from, to })
                })
                .collect(),
            Pattern::FanIn => (1..ports).map(|from| Wire { from, to: 0 }).collect(),
        };
        Ok(wires)
    }

    /// For tables and files.
    pub(crate) fn work(&self, frontends: &Frontends, ports: usize) -> Work {
        let len = match self.size.only() {
            Some(len) => format!("{len} B"),
            None => "IMIX".to_owned(),
        };
        let rings = frontends.name();
        let mut title = format!("{len} {rings}");
        if ports > 2 {
            title += &format!(", {ports} ports");
        }
        if self.stations > 1 {
            title += &format!(", {} stations per port", self.stations);
        }
        if self.broadcast > 0 {
            title += &format!(", {} % broadcast", self.broadcast);
        }
        if self.one_way {
            title += ", one way";
        }
        Work {
            title,
            frame: self.size.only().map(u32::from),
            rings,
            ports: ports as u32,
            stations: self.stations,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wires(pattern: Pattern, ports: usize) -> Vec<(usize, usize)> {
        let frames = Frames {
            pattern,
            ..Frames::plain(64)
        };
        let wires = frames.wires(ports).unwrap();
        wires.iter().map(|wire| (wire.from, wire.to)).collect()
    }

    #[test]
    fn patterns_say_who_sends_to_whom() {
        assert_eq!(wires(Pattern::Pairs, 4), [(0, 1), (1, 0), (2, 3), (3, 2)]);
        assert_eq!(wires(Pattern::Circle, 3), [(0, 1), (1, 2), (2, 0)]);
        assert_eq!(wires(Pattern::Mesh, 3).len(), 6);
        assert_eq!(wires(Pattern::FanIn, 3), [(1, 0), (2, 0)]);
        assert!(Frames::plain(64).wires(3).is_err());
        assert!(Frames::plain(64).wires(1).is_err());
    }

    #[test]
    fn sizes_are_lengths_or_a_mix() {
        assert_eq!(lengths("imix").unwrap().longest(), 1518);
        assert_eq!(lengths("9000").unwrap().only(), Some(9000));
        for bad in ["39", "65001", "big", ""] {
            assert!(lengths(bad).is_err(), "{bad}");
        }
    }
}
