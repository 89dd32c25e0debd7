//! H71 to H84: what an attacker sends.

use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use ringway::guest::traffic::Mac;
use testkit::topology::frame;

use super::api::{self, PATIENCE};
use super::case::Case;
use super::innocents::address;
use super::rig::friend_mac;
use super::x::{Wild, X};

/// Sends many frames; `each` writes one and says how long it is.
fn pour(wild: &mut Wild, frames: usize, mut each: impl FnMut() -> Vec<u8>) -> Result<()> {
    let (mut left, mut end) = (frames, Instant::now() + PATIENCE);
    while left > 0 {
        let taken = wild.queues.tx.send(left.min(64), |slot| {
            let bytes = each();
            slot.write(0, &bytes);
            bytes.len()
        });
        left -= taken;
        if taken > 0 {
            end = Instant::now() + PATIENCE;
        }
        ensure!(Instant::now() < end, "the switch takes no more frames");
    }
    Ok(())
}

fn knows(x: &X<'_>, number: u32, port: &str) -> Result<bool> {
    let mac: Vec<String> = address(number).iter().map(|b| format!("{b:02x}")).collect();
    let path = format!("/v1/fdb?mac={}&port={port}", mac.join(":"));
    let page = api::ask(&x.rig.api, "GET", &path, "")?;
    let page: serde_json::Value = serde_json::from_str(&page)?;
    Ok(page["matching"].as_u64().context("a number of stations")? > 0)
}

#[test]
pub(super) fn h71_a_flood_of_stations_evicts_nobody_but_their_own() -> Result<()> {
    Case::of("H71")
        .beside()
        .config(|config| config.fdb.capacity = 2048)
        .run(|x| {
            let mut wild = x.attach(x.options())?;
            wild.announce(x)?;
            let to = friend_mac();
            pour(&mut wild, 10_000, || {
                let number = x.any().to_le_bytes();
                let from: Mac = [2, number[0], number[1], number[2], number[3], number[4]];
                frame(to, from, b"")
            })?;
            for (number, port) in [(0, "a"), (1, "b"), (2, "c"), (3, "d")] {
                ensure!(knows(x, number, port)?, "port {port}'s station was evicted");
            }
            x.innocents_go_on()?;
            x.is_kept()
        })
}

#[test]
pub(super) fn h73_sources_that_nobody_may_have_are_dropped() -> Result<()> {
    Case::of("H73").beside().run(|x| {
        let mut wild = x.attach(x.options())?;
        let froms = [[0; 6], [0xff; 6], [1, 0, 0x5e, 0, 0, 1], [3, 2, 2, 2, 2, 2]];
        for from in froms {
            pour(&mut wild, 16, || frame(friend_mac(), from, b""))?;
        }
        x.wait_dropped("source_multicast", 64)?;
        x.is_kept()
    })
}

#[test]
pub(super) fn h77_runts_are_dropped_and_short_frames_go_through_as_they_are() -> Result<()> {
    Case::of("H77").beside().run(|x| {
        let mut wild = x.attach(x.options())?;
        wild.announce(x)?;
        let before = x.dropped("runt")?;
        let whole = frame(friend_mac(), x.mac(), &x.any().to_le_bytes());
        for len in 1..14 {
            pour(&mut wild, 1, || whole[..len].to_vec())?;
        }
        x.wait_dropped("runt", before + 13)?;
        for len in [14, 15, 18, 40, 59] {
            let short = &whole[..len];
            x.friend_gets(short, || pour(&mut wild, 1, || short.to_vec()))?;
        }
        x.is_kept()
    })
}

#[test]
pub(super) fn h77_h78_tags_are_read_by_nobody_and_change_nothing() -> Result<()> {
    Case::of("H77 H78").beside().run(|x| {
        let mut wild = x.attach(x.options())?;
        let tags = x.below(17) as usize;
        let mut bytes = [&friend_mac()[..], &x.mac()].concat();
        for _ in 0..tags {
            bytes.extend([0x81, 0, x.any() as u8, x.any() as u8]);
        }
        // And cut in the middle of one.
        bytes.extend([0x81, 0]);
        bytes.extend(x.any().to_le_bytes());
        x.friend_gets(&bytes, || pour(&mut wild, 1, || bytes.clone()))?;
        x.is_kept()
    })
}

#[test]
pub(super) fn h79_h97_link_local_protocols_are_never_forwarded() -> Result<()> {
    Case::of("H79 H97").beside().run(|x| {
        let mut wild = x.attach(x.options())?;
        wild.announce(x)?;
        let before = x.dropped("reserved_mac")?;
        for last in 0..16 {
            let to = [1, 0x80, 0xc2, 0, 0, last];
            let from = x.mac();
            pour(&mut wild, 1, || frame(to, from, b"pause"))?;
        }
        x.wait_dropped("reserved_mac", before + 16)?;
        x.is_kept()
    })
}

#[test]
pub(super) fn h80_h81_who_sends_without_end_to_everybody_in_its_bridge_costs_the_others_no_frame()
-> Result<()> {
    Case::of("H75 H80 H81").run(|x| {
        let mut wild = x.attach(x.options())?;
        let len = x.one_of(&[60, 200, 1514]);
        let to = x.one_of(&[[0xff; 6], [2; 6], friend_mac()]);
        let mut bytes = frame(to, x.mac(), b"a storm");
        bytes.resize(len, 0);
        pour(&mut wild, 5000, || bytes.clone())?;
        x.innocents_go_on()?;
        x.is_kept()
    })
}

#[test]
pub(super) fn h83_a_frame_for_its_own_port_is_not_reflected() -> Result<()> {
    Case::of("H83").beside().run(|x| {
        let mut wild = x.attach(x.options())?;
        wild.announce(x)?;
        let me = x.mac();
        let before = x.dropped("hairpin")?;
        pour(&mut wild, 32, || frame(me, me, b"to myself"))?;
        x.wait_dropped("hairpin", before + 32)?;
        x.is_kept()
    })
}

#[test]
pub(super) fn h84_stations_that_differ_in_few_bits_do_not_pile_up() -> Result<()> {
    Case::of("H84")
        .beside()
        .config(|config| config.fdb.capacity = 2048)
        .run(|x| {
            let mut wild = x.attach(x.options())?;
            wild.announce(x)?;
            // Neighbours, and numbers that differ only where a weak hash does not look.
            let (step, to) = (1u64 << x.below(40), friend_mac());
            let mut number = 0u64;
            pour(&mut wild, 5000, || {
                number = number.wrapping_add(step);
                let b = number.to_le_bytes();
                frame(to, [b[0] & 0xfc | 2, b[1], b[2], b[3], b[4], b[5]], b"")
            })?;
            ensure!(
                knows(x, 0, "a")? && knows(x, 3, "d")?,
                "an innocent was evicted"
            );
            x.is_kept()
        })
}

#[test]
pub(super) fn h72_who_poses_as_another_station_is_dropped_where_the_port_names_its_own()
-> Result<()> {
    Case::of("H72").beside().run(|x| {
        let mac: Vec<String> = x.mac().iter().map(|b| format!("{b:02x}")).collect();
        x.port_again(&format!(",mac={}", mac.join(":")))?;
        let mut wild = x.attach(x.options())?;
        wild.announce(x)?;
        let before = x.dropped("spoofed")?;
        // Two innocents, and the friend.
        for from in [address(0), address(2), friend_mac()] {
            pour(&mut wild, 100, || frame([0xff; 6], from, b"I am you"))?;
        }
        x.wait_dropped("spoofed", before + 300)?;
        ensure!(
            knows(x, 0, "a")? && knows(x, 2, "c")? && knows(x, 9, "friend")?,
            "a station has moved"
        );
        x.innocents_go_on()?;
        x.is_kept()
    })
}

#[test]
pub(super) fn h74_a_station_that_flaps_between_two_ports_moves_no_faster_than_it_may() -> Result<()>
{
    Case::of("H74").at_once(1).run(|x| {
        x.port_again(",moves=10")?;
        let mut wild = x.attach(x.options())?;
        wild.announce(x)?;
        // Each time the friend takes its address back, until the limit has met the attacker. How often the worker sees both in
        // turns is the scheduler's affair: it may take up many rounds as one, and then the address has moved only once.
        let end = Instant::now() + PATIENCE;
        while x.dropped("move_limit")? < 16 {
            ensure!(Instant::now() < end, "the address moves as it likes");
            x.gets_frames(1, 60)?;
            pour(&mut wild, 16, || frame(x.mac(), friend_mac(), b"mine"))?;
        }
        x.is_kept()?;
        // Until it is the friend's again.
        let end = Instant::now() + PATIENCE;
        while !knows(x, 9, "friend")? {
            ensure!(Instant::now() < end, "the friend's address is lost");
            x.gets_frames(1, 60)?;
        }
        Ok(())
    })
}

#[test]
pub(super) fn h75_a_storm_of_broadcasts_is_cut_at_the_ports_limit() -> Result<()> {
    Case::of("H75").beside().run(|x| {
        x.port_again(",floods=100")?;
        let mut wild = x.attach(x.options())?;
        let to = x.one_of(&[[0xff; 6], [1, 0, 0x5e, 0, 0, 1], [2; 6]]);
        let from = x.mac();
        pour(&mut wild, 5000, || frame(to, from, b"a storm"))?;
        x.wait_dropped("flood_limit", 1000)?;
        x.innocents_go_on()?;
        x.is_kept()
    })
}

#[test]
pub(super) fn h76_a_bridge_behind_two_ports_floods_no_more_than_they_may() -> Result<()> {
    Case::of("H76").run(|x| {
        let limits = ",floods=200,moves=10";
        x.port_again(limits)?;
        let mut one = x.attach(x.options())?;
        let other = X::new(x.rig, x.port.replace('x', "y"), "wild", x.seed);
        other.add_port(limits)?;
        let mut two = other.attach(other.options())?;
        // Whatever comes out of one goes into the other, and round again: one broadcast is enough.
        let from = x.mac();
        let mut on_the_way = vec![frame([0xff; 6], from, b"round and round")];
        let end = Instant::now() + std::time::Duration::from_millis(60);
        while Instant::now() < end {
            for (from, to) in [(0, 1), (1, 0)] {
                let pair = [&mut one, &mut two];
                let bytes: Vec<Vec<u8>> = std::mem::take(&mut on_the_way);
                for bytes in bytes {
                    pour(pair[to], 1, || bytes.clone())?;
                }
                pair[from]
                    .queues
                    .rx
                    .receive(|frame| on_the_way.push(frame.to_vec()));
                on_the_way.truncate(64);
            }
            if on_the_way.is_empty() {
                on_the_way.push(frame([0xff; 6], from, b"once more"));
            }
        }
        x.is_kept()?;
        other.is_kept()?;
        let dropped = |x: &X<'_>| {
            Ok::<_, anyhow::Error>(x.dropped("flood_limit")? + x.dropped("move_limit")?)
        };
        ensure!(dropped(x)? + dropped(&other)? > 0, "nothing cut the loop");
        drop((one, two));
        api::del_port(&x.rig.api, &other.port)
    })
}
