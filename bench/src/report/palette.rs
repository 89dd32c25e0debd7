//! Colours of switches, the same on every page; dates.

use super::plot::{Key, Look};

/// Switches, with their colours on light and on dark ground. Told apart by people who see few colours, too.
const COLOURS: [(&str, u32, u32); 8] = [
    ("ringway", 0x0B_62C4, 0x5A_A9F8),
    ("ovs", 0xD4_5D00, 0xFF_9A4C),
    ("testpmd", 0x00_8F68, 0x30_D0A0),
    ("reference", 0x80_50C8, 0xB8_9CF0),
    ("vpp", 0xC0_3C88, 0xF4_8AC4),
    ("bridge", 0x8C_6C1C, 0xD8_B858),
    ("macvlan", 0x30_84A0, 0x7C_C8DC),
    ("", 0x58_5C64, 0xB8_BCC4),
];

fn entry(peer: &str) -> usize {
    let known = COLOURS.iter().position(|(name, ..)| *name == peer);
    let like = || {
        let known = &COLOURS[..COLOURS.len() - 1];
        known
            .iter()
            .position(|(name, ..)| peer.starts_with(name) || peer.ends_with(name))
    };
    known.or_else(like).unwrap_or(COLOURS.len() - 1)
}

/// The colour of a curve. Its two lowest bits carry the look, by which the page's style sheet tells dashes from lines.
pub(crate) fn colour(key: &Key) -> u32 {
    COLOURS[entry(&key.peer)].1 | mark(key.look)
}

/// The colour as it stands in an attribute.
pub(crate) fn hex(colour: u32) -> String {
    format!("#{colour:06X}")
}

fn mark(look: Look) -> u32 {
    match look {
        Look::Unknown | Look::Solid => 0,
        Look::Dashed => 1,
        Look::Dotted => 2,
    }
}

/// The page's rules for all colours: variables for light and dark ground, and dashes.
pub(crate) fn rules() -> String {
    let variables = |pick: fn(&(&str, u32, u32)) -> u32| -> String {
        let each = COLOURS.iter().enumerate();
        each.map(|(number, entry)| format!("--c{number}:{};", hex(pick(entry))))
            .collect()
    };
    let mut text = format!(
        ":root{{{}}}\n@media screen and (prefers-color-scheme:dark){{:root{{{}}}}}\n",
        variables(|entry| entry.1),
        variables(|entry| entry.2)
    );
    for (number, (_, colour, _)) in COLOURS.iter().enumerate() {
        for look in [Look::Solid, Look::Dashed, Look::Dotted] {
            let hex = hex(colour | mark(look));
            text += &format!(
                "svg [stroke=\"{hex}\"]{{stroke:var(--c{number})}}svg [fill=\"{hex}\"]{{fill:var(--c{number})}}\n"
            );
            let dashes = match look {
                Look::Unknown | Look::Solid => continue,
                Look::Dashed => "21 12",
                Look::Dotted => "4 10",
            };
            text += &format!("svg polyline[stroke=\"{hex}\"]{{stroke-dasharray:{dashes}}}\n");
        }
    }
    text
}

/// Seconds since 1970 as a date in UTC (H. Hinnant's algorithm of civil dates).
pub(crate) fn date(seconds: u64) -> String {
    let (days, rest) = (seconds / 86_400, seconds % 86_400);
    let shifted = days + 719_468;
    let era = shifted / 146_097;
    let day_of_era = shifted % 146_097;
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    format!(
        "{year}-{month:02}-{day:02} {:02}:{:02} UTC",
        rest / 3600,
        rest / 60 % 60
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_colour_leaves_room_for_the_look() {
        for (name, light, _) in COLOURS {
            assert_eq!(light & 3, 0, "{name}");
        }
    }

    #[test]
    fn names_like_a_known_one_share_its_colour_and_others_are_grey() {
        assert_eq!(entry("ovs"), entry("ovs-4.0"));
        assert_eq!(entry("linux bridge"), entry("bridge"));
        assert_eq!(entry("snabb"), COLOURS.len() - 1);
    }

    #[test]
    fn dates_are_those_of_the_calendar() {
        assert_eq!(date(0), "1970-01-01 00:00 UTC");
        assert_eq!(date(951_827_696), "2000-02-29 12:34 UTC");
        assert_eq!(date(1_795_237_200), "2026-11-21 05:00 UTC");
    }
}
