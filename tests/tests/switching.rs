//! Learn, flood, move, age, hairpin: guests of our own on real sockets, the real engine, and books that balance in every test.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use ringway::control::config::Workers;
use ringway::control::state::PortSpec;
use ringway::guest::Options;
use ringway::guest::traffic::{Checker, Flow, station};
use testkit::require;
use testkit::skip::cpus;
use testkit::topology::{BROADCAST, Net, PATIENCE, Station, exchange, frame};

/// A group address that bridges forward.
const GROUP: [u8; 6] = [0x01, 0x00, 0x5e, 0, 0, 1];

/// A kind of guest, with its name.
type Kind = (&'static str, fn(Options) -> Options);

/// Lets the switch learn where everybody is.
fn announce<const N: usize>(net: &Net, stations: &mut [Station; N]) -> Result<()> {
    for number in 0..N {
        let hello = frame(BROADCAST, stations[number].mac(), b"hello");
        stations[number].send(&hello)?;
        for (other, station) in stations.iter_mut().enumerate() {
            if other != number {
                station.expect(&hello)?;
            }
        }
    }
    net.settle()
}

/// Two guests of a kind, on a switch of their own.
fn two_of(kind: impl FnOnce(Options) -> Options + Copy) -> Result<(Net, [Station; 2])> {
    let net = Net::with_ports(&["a", "b"])?;
    let two = [net.attach_as("a", kind)?, net.attach_as("b", kind)?];
    Ok((net, two))
}

/// A frame of each length goes from one guest of each kind to another.
fn arrive_whole(kinds: &[Kind], lengths: &[usize]) -> Result<()> {
    for (name, kind) in kinds {
        let (net, [mut a, mut b]) = two_of(kind)?;
        for len in lengths {
            let payload: Vec<u8> = (0..len - 14).map(|byte| (byte * 7 + len) as u8).collect();
            let sent = frame(b.mac(), a.mac(), &payload);
            a.send(&sent)?;
            b.expect(&sent)
                .map_err(|error| error.context(format!("{name}, {len} bytes")))?;
        }
        net.settle()?;
    }
    Ok(())
}

#[test]
fn floods_unknown_unicast_broadcast_and_multicast_to_all_but_ingress() -> Result<()> {
    let net = Net::with_ports(&["a", "b", "c"])?;
    let [mut a, mut b, mut c] = net.attach(["a", "b", "c"])?;
    for to in [station(99), BROADCAST, GROUP] {
        let sent = frame(to, a.mac(), b"to whom it may concern");
        a.send(&sent)?;
        b.expect(&sent)?;
        c.expect(&sent)?;
        net.settle()?;
        a.expect_nothing()?;
    }
    Ok(())
}

#[test]
fn a_learned_station_gets_its_frames_alone() -> Result<()> {
    let net = Net::with_ports(&["a", "b", "c"])?;
    let mut all = net.attach(["a", "b", "c"])?;
    announce(&net, &mut all)?;
    let [mut a, mut b, mut c] = all;
    let sent = frame(b.mac(), a.mac(), b"for b");
    a.send(&sent)?;
    b.expect(&sent)?;
    net.settle()?;
    a.expect_nothing()?;
    c.expect_nothing()
}

#[test]
fn a_station_that_moves_takes_its_frames_along() -> Result<()> {
    let net = Net::with_ports(&["a", "b", "c"])?;
    let mut all = net.attach(["a", "b", "c"])?;
    announce(&net, &mut all)?;
    let [mut a, mut b, mut c] = all;
    let moved = frame(BROADCAST, b.mac(), b"now at c");
    c.send(&moved)?;
    a.expect(&moved)?;
    b.expect(&moved)?;
    let sent = frame(b.mac(), a.mac(), b"for b at c");
    a.send(&sent)?;
    c.expect(&sent)?;
    net.settle()?;
    b.expect_nothing()
}

#[test]
fn a_silent_station_is_forgotten_and_flooded_again() -> Result<()> {
    let net = Net::start(&["a", "b", "c"], |config| config.fdb.age = 1)?;
    let mut all = net.attach(["a", "b", "c"])?;
    announce(&net, &mut all)?;
    let [mut a, mut b, mut c] = all;
    let end = Instant::now() + PATIENCE;
    while net.switch().stats().fdb.used > 0 {
        ensure!(
            Instant::now() < end,
            "a station outlived its age of 1 s by {PATIENCE:?}"
        );
        std::thread::sleep(Duration::from_millis(20));
    }
    let sent = frame(b.mac(), a.mac(), b"where is b?");
    a.send(&sent)?;
    b.expect(&sent)?;
    c.expect(&sent)?;
    net.settle()
}

#[test]
fn a_frame_for_a_station_behind_its_own_port_is_not_sent_back() -> Result<()> {
    let net = Net::with_ports(&["a", "b"])?;
    let mut all = net.attach(["a", "b"])?;
    announce(&net, &mut all)?;
    let [mut a, mut b] = all;
    let neighbour = station(77);
    let hello = frame(BROADCAST, neighbour, b"also behind a");
    a.send(&hello)?;
    b.expect(&hello)?;
    a.send(&frame(neighbour, a.mac(), b"we are neighbours"))?;
    net.settle()?;
    a.expect_nothing()?;
    b.expect_nothing()?;
    ensure!(net.dropped("hairpin") == 1, "not counted as hairpin");
    Ok(())
}

#[test]
fn a_group_address_as_source_is_dropped_and_never_learned() -> Result<()> {
    let net = Net::with_ports(&["a", "b"])?;
    let [mut a, mut b] = net.attach(["a", "b"])?;
    a.send(&frame(b.mac(), GROUP, b"from everybody"))?;
    a.send(&frame(b.mac(), BROADCAST, b"from everybody"))?;
    net.settle()?;
    b.expect_nothing()?;
    ensure!(
        net.dropped("source_multicast") == 2,
        "not counted as source_multicast"
    );
    ensure!(
        net.switch().stats().fdb.used == 0,
        "a group address was learned"
    );
    Ok(())
}

#[test]
fn a_frame_shorter_than_its_header_is_dropped_and_the_next_one_passes() -> Result<()> {
    let net = Net::with_ports(&["a", "b"])?;
    let [mut a, mut b] = net.attach(["a", "b"])?;
    let whole = frame(BROADCAST, a.mac(), b"whole");
    for len in [1, 6, 13] {
        a.send(&whole[..len])?;
    }
    a.send(&whole)?;
    b.expect(&whole)?;
    net.settle()?;
    ensure!(net.dropped("runt") == 3, "not counted as runts");
    Ok(())
}

#[test]
fn frames_for_the_bridge_itself_are_not_forwarded() -> Result<()> {
    let net = Net::with_ports(&["a", "b"])?;
    let [mut a, mut b] = net.attach(["a", "b"])?;
    a.send(&frame(
        [0x01, 0x80, 0xc2, 0, 0, 0],
        a.mac(),
        b"spanning tree",
    ))?;
    a.send(&frame([0x01, 0x80, 0xc2, 0, 0, 0x0e], a.mac(), b"lldp"))?;
    net.settle()?;
    b.expect_nothing()?;
    ensure!(
        net.dropped("reserved_mac") == 2,
        "not counted as reserved_mac"
    );
    Ok(())
}

#[test]
fn bridges_do_not_leak_even_for_the_same_address() -> Result<()> {
    let net = Net::start(&["a", "b", "x", "y"], |config| {
        for port in &mut config.ports[2..] {
            port.bridge = "other".to_owned();
        }
    })?;
    let [mut a, mut b, mut x, mut y] = net.attach(["a", "b", "x", "y"])?;
    let twin = station(5);
    let (hello_b, hello_y) = (
        frame(BROADCAST, twin, b"at b"),
        frame(BROADCAST, twin, b"at y"),
    );
    b.send(&hello_b)?;
    a.expect(&hello_b)?;
    y.send(&hello_y)?;
    x.expect(&hello_y)?;
    let (to_b, to_y) = (
        frame(twin, a.mac(), b"in default"),
        frame(twin, x.mac(), b"in other"),
    );
    a.send(&to_b)?;
    x.send(&to_y)?;
    b.expect(&to_b)?;
    y.expect(&to_y)?;
    net.settle()?;
    for station in [&mut a, &mut b, &mut x, &mut y] {
        station.expect_nothing()?;
    }
    Ok(())
}

#[test]
fn a_port_alone_on_its_bridge_has_nobody_to_flood_to() -> Result<()> {
    let net = Net::with_ports(&["a"])?;
    let [mut a] = net.attach(["a"])?;
    a.send(&frame(BROADCAST, a.mac(), b"anybody?"))?;
    net.settle()?;
    ensure!(
        net.dropped("no_destination") == 1,
        "not counted as no_destination"
    );
    a.expect_nothing()
}

#[test]
fn a_port_added_under_traffic_is_reached_and_one_deleted_is_not() -> Result<()> {
    let net = Net::with_ports(&["a", "b"])?;
    let [mut a, mut b] = net.attach(["a", "b"])?;
    net.switch()
        .add_port(PortSpec::vhost_user("c", net.socket("c")))?;
    let [mut c] = net.attach(["c"])?;
    let hello = frame(BROADCAST, c.mac(), b"new here");
    c.send(&hello)?;
    a.expect(&hello)?;
    b.expect(&hello)?;
    net.switch().del_port("b")?;
    ensure!(!b.guest.connected(), "a deleted port keeps its guest");
    let sent = frame(BROADCAST, a.mac(), b"who is left?");
    a.send(&sent)?;
    c.expect(&sent)?;
    net.settle()?;
    b.expect_nothing()
}

#[test]
fn frames_of_every_length_arrive_whole_through_every_kind_of_ring() -> Result<()> {
    let kinds: [Kind; 6] = [
        ("split", |o| o),
        ("packed", Options::packed),
        ("split, not in order, not mergeable", |o| Options {
            in_order: false,
            mergeable: false,
            ..o
        }),
        ("packed, not in order, not mergeable", |o| Options {
            in_order: false,
            mergeable: false,
            ..o.packed()
        }),
        ("split chains", |o| Options {
            piece: 100,
            indirect: false,
            ..o
        }),
        ("packed chains", |o| Options {
            piece: 100,
            indirect: false,
            ..o.packed()
        }),
    ];
    let lengths = (14..200).chain([1000, 1499, 1500, 1514, 2000]);
    arrive_whole(&kinds, &lengths.collect::<Vec<_>>())
}

#[test]
fn jumbo_and_64_kib_frames_arrive_whole_in_one_buffer_or_in_many() -> Result<()> {
    let kinds: [Kind; 4] = [
        ("large buffers", |o| o.frame_max(65_000).ring_size(64)),
        ("large buffers, packed", |o| {
            o.packed().frame_max(65_000).ring_size(64)
        }),
        ("mergeable", |o| Options {
            frame_max: 65_000,
            receive_buffer: 2048,
            piece: 2048,
            ..o.ring_size(256)
        }),
        ("mergeable, packed", |o| Options {
            frame_max: 65_000,
            receive_buffer: 2048,
            piece: 2048,
            ..o.packed().ring_size(256)
        }),
    ];
    let lengths = [
        2034, 2036, 2037, 4096, 8999, 9000, 9018, 30_000, 64_000, 65_000,
    ];
    arrive_whole(&kinds, &lengths)
}

#[test]
fn a_frame_that_no_buffer_can_hold_is_dropped_and_the_next_one_passes() -> Result<()> {
    let net = Net::with_ports(&["a", "b"])?;
    let mut a = net.attach_as("a", |options| options.frame_max(9000))?;
    let mut b = net.attach_as("b", |options| Options {
        mergeable: false,
        ..options
    })?;
    let (long, short) = (
        frame(b.mac(), a.mac(), &[1; 5000]),
        frame(b.mac(), a.mac(), &[2; 500]),
    );
    a.send(&long)?;
    a.send(&short)?;
    b.expect(&short)?;
    net.settle()?;
    ensure!(
        net.dropped("tx_buffer_small") == 1,
        "not counted as tx_buffer_small"
    );
    Ok(())
}

#[test]
fn a_guest_that_sleeps_is_woken_by_a_call_and_a_polling_one_is_left_alone() -> Result<()> {
    for event_idx in [false, true] {
        for packed in [false, true] {
            let kind = |options: Options| {
                let options = if packed { options.packed() } else { options };
                Options {
                    event_idx,
                    ..options
                }
            };
            let (net, [mut a, mut b]) = two_of(kind)?;
            for round in 0..20u8 {
                let rx = &mut b.pairs[0].rx;
                ensure!(!rx.arm(), "a frame too many");
                let sent = frame(b.mac(), a.mac(), &[round; 50]);
                a.send(&sent)?;
                ensure!(
                    b.pairs[0].rx.sleep(PATIENCE),
                    "event_idx {event_idx}, packed {packed}: nobody called in round {round}"
                );
                b.expect(&sent)?;
            }
            b.pairs[0].rx.disarm();
            b.pairs[0].rx.forget_calls();
            for _ in 0..20 {
                let sent = frame(b.mac(), a.mac(), b"no need to call");
                a.send(&sent)?;
                b.expect(&sent)?;
            }
            net.settle()?;
            ensure!(
                !b.pairs[0].rx.sleep(Duration::ZERO),
                "event_idx {event_idx}, packed {packed}: a polling guest was called"
            );
        }
    }
    Ok(())
}

#[test]
fn a_hundred_thousand_frames_keep_order_and_content_around_rings_of_every_size() -> Result<()> {
    for (size, packed) in [
        (2, false),
        (8, false),
        (256, false),
        (32_768, false),
        (2, true),
        (7, true),
        (300, true),
        (32_768, true),
    ] {
        let kind = |options: Options| {
            let options = if packed { options.packed() } else { options };
            Options {
                frame_max: 128,
                receive_buffer: 256,
                ..options.ring_size(size)
            }
        };
        let (net, [mut a, mut b]) = two_of(kind)?;
        let frames = if size < 64 { 2_000 } else { 100_000 };
        let window = u64::from(size).min(256);
        exchange(&mut a.pairs[0], &mut b.pairs[0], frames, 100, window)
            .map_err(|error| error.context(format!("ring of {size}, packed {packed}")))?;
        net.count_sent(frames);
        net.settle()?;
    }
    Ok(())
}

#[test]
fn every_queue_pair_carries_frames() -> Result<()> {
    let net = Net::start(&["a", "b"], |config| {
        config.ports.iter_mut().for_each(|port| port.queues = 4)
    })?;
    let mut a = net.attach_as("a", |options| options.queue_pairs(4))?;
    let mut b = net.attach_as("b", |options| options.queue_pairs(4).packed())?;
    for pair in 0..4 {
        let sent = frame(b.mac(), a.mac(), &[pair as u8; 64]);
        a.send_through(pair, &sent)?;
        b.expect(&sent)?;
        let back = frame(a.mac(), b.mac(), &[pair as u8; 64]);
        b.send_through(pair, &back)?;
        a.expect(&back)?;
    }
    net.settle()
}

#[test]
fn two_workers_on_two_cpus_send_to_one_port() -> Result<()> {
    require!(cpus(2));
    let net = Net::start(&["sink", "left", "right"], |config| {
        config.workers = Workers::Cpus(vec![0, 1]);
        config.ports[1].workers = vec![0];
        config.ports[2].workers = vec![1];
    })?;
    let [mut sink, left, right] = net.attach(["sink", "left", "right"])?;
    let hello = frame(BROADCAST, sink.mac(), b"here");
    sink.send(&hello)?;
    net.settle()?;
    let mut checker = Checker::new(0, 2, 1);
    let mut flows = [(left, 0), (right, 1)].map(|(station, id)| {
        let flow = Flow::new(id, station.mac(), sink.mac(), 64);
        (station, flow)
    });
    let frames = 50_000u64;
    let end = Instant::now() + 3 * PATIENCE;
    let accounted = |checker: &Checker| {
        checker.tally().received + net.dropped("tx_contended") + net.dropped("tx_full")
    };
    let mut known = 0;
    while known < 2 * frames {
        for (station, flow) in &mut flows {
            let room = (frames - flow.sent()).min(64);
            station.pairs[0]
                .tx
                .send(room as usize, |slot| flow.write(slot, 1));
        }
        while sink.pairs[0].rx.receive(|frame| checker.check(frame, 2)) > 0 {}
        known = accounted(&checker);
        ensure!(
            Instant::now() < end,
            "{known} of {} accounted for: {:?}",
            2 * frames,
            checker.tally()
        );
    }
    net.count_sent(2 * frames);
    net.settle()?;
    let tally = checker.tally();
    ensure!(
        tally.corrupted + tally.duplicated + tally.reordered + tally.foreign == 0,
        "{tally:?}"
    );
    let workers = net.switch().stats().workers;
    ensure!(
        workers
            .iter()
            .all(|worker| worker.counters.received >= frames),
        "one worker did it all: {workers:?}"
    );
    Ok(())
}

#[test]
fn a_thousand_ports_are_flooded_while_others_frames_still_pass() -> Result<()> {
    const PORTS: usize = 1024;
    let names: Vec<String> = (0..PORTS).map(|number| format!("p{number}")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let net = Net::with_ports(&names)?;
    let small = |options: Options| Options {
        frame_max: 128,
        receive_buffer: 140,
        ..options.ring_size(64)
    };
    let mut all: Vec<Station> = names
        .iter()
        .map(|name| net.attach_as(name, small))
        .collect::<Result<_>>()?;
    let hello = frame(BROADCAST, all[0].mac(), b"hello, everybody");
    all[0].send(&hello)?;
    for station in &mut all[1..] {
        station.expect(&hello)?;
    }
    net.settle()?;
    // Port 0 floods without end; 1 and 2 know each other and exchange frames one at a time.
    let [flooder, one, two, ..] = &mut all[..] else {
        unreachable!("there are 1024")
    };
    let learn = frame(one.mac(), two.mac(), b"here I am");
    two.send(&learn)?;
    one.expect(&learn)?;
    let (mut slowest, mut flooded) = (Duration::ZERO, 0);
    for round in 0..50u8 {
        flooded += flooder.pairs[0].tx.send(64, |slot| {
            slot.write(0, &hello);
            hello.len()
        }) as u64;
        let sent = frame(two.mac(), one.mac(), &[round; 40]);
        let began = Instant::now();
        one.send(&sent)?;
        loop {
            let got = two.receive()?;
            if got == sent {
                break;
            }
            ensure!(got == hello, "a frame from nowhere");
        }
        slowest = slowest.max(began.elapsed());
    }
    net.count_sent(flooded);
    net.settle()?;
    ensure!(flooded > 64, "the flood was no flood: {flooded} frames");
    ensure!(
        slowest < Duration::from_secs(5),
        "a frame between two others took {slowest:?} during the flood"
    );
    Ok(())
}
