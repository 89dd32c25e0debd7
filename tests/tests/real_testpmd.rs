//! Unmodified DPDK containers: every kind of ring, both socket roles, memory of both kinds, and coming back after a crash.
//!
//! Topology: one testpmd with two ports, or two with one each; frames circulate through the switch in both directions and the
//! books of the switch and the counters of the client must agree to the frame.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use ringway::control::state::{Counters, PortState, RingKind};
use testkit::require;
use testkit::ringway::{Ringway, client_port, server_port};
use testkit::skip::{hugepages, root, tool};
use testkit::testpmd::{Config, Memory, PortStats, Testpmd, Variant, VirtioUser};

const PATIENCE: Duration = Duration::from_secs(30);
/// Frames that `start tx_first 4` sets off per queue pair: four bursts of 32 at each of two ports.
const CIRCULATING: u64 = 2 * 4 * 32;
/// More than the rings hold: frames have gone round many times.
const FRAMES: u64 = 50_000;

fn ports(switch: &Ringway) -> [VirtioUser; 2] {
    [
        VirtioUser::new(switch.socket("blue"), 1),
        VirtioUser::new(switch.socket("red"), 2),
    ]
}

/// Lets frames circulate between the two ports of `client`, stops, and compares the client's counters with the switch's.
fn exchange(switch: &Ringway, client: &mut Testpmd) -> Result<Counters> {
    client.wait_links_up(PATIENCE)?;
    let before = client.stats()?;
    let booked = switch.balanced_books()?;
    client.command("start tx_first 4")?;
    client.wait_received(FRAMES, PATIENCE)?;
    client.command("stop")?;
    let books = switch.balanced_books()?;
    let after = client.stats()?;
    let sum =
        |of: fn(&PortStats) -> u64, ports: &[PortStats]| -> u64 { ports.iter().map(of).sum() };
    let sent = sum(|p| p.tx_packets, &after) - sum(|p| p.tx_packets, &before);
    let received = sum(|p| p.rx_packets, &after) - sum(|p| p.rx_packets, &before);
    let taken = books.received - booked.received;
    ensure!(
        sent == taken,
        "the client sent {sent} frames, the switch took {taken}"
    );
    // Frames given to the client's rings after it stopped reading are still there.
    let given = books.sent - booked.sent;
    let queues = u64::from(switch.port("blue")?.spec.queues);
    ensure!(
        received <= given,
        "the client received {received} frames, the switch gave {given}"
    );
    ensure!(
        given - received <= CIRCULATING * queues,
        "{} frames are left in the client's rings, more than circulated",
        given - received
    );
    Ok(books)
}

fn nothing_dropped(books: &Counters) -> Result<()> {
    ensure!(
        books.dropped_total() == 0,
        "nothing had to be dropped: {:?}",
        books.dropped
    );
    Ok(())
}

fn exchanges(variant: Variant, config: impl Fn(Config) -> Config) -> Result<()> {
    let switch = Ringway::with_ports(&["blue", "red"])?;
    let ports = ports(&switch).map(|port| VirtioUser { variant, ..port });
    let mut client = config(Config::pair(ports)).start()?;
    nothing_dropped(&exchange(&switch, &mut client)?)?;
    let packed = variant.options().contains("packed_vq=1");
    for port in ["blue", "red"] {
        let port = switch.wait_port(port, PortState::Forwarding, PATIENCE)?;
        let expected = if packed {
            RingKind::Packed
        } else {
            RingKind::Split
        };
        ensure!(
            port.queues.iter().all(|queue| queue.ring == expected),
            "{variant:?}: {:?}",
            port.queues
        );
    }
    client.quit()?;
    for port in ["blue", "red"] {
        switch.wait_port(port, PortState::Listening, PATIENCE)?;
    }
    switch.stop().map(drop)
}

#[test]
#[ignore = "real peer: run by tests/run"]
fn exchanges_frames_over_every_kind_of_ring() -> Result<()> {
    require!(tool("dpdk-testpmd", "dpdk-dev"), root(), hugepages(128));
    for variant in Variant::ALL {
        exchanges(variant, |config| config).with_context(|| format!("{variant:?}"))?;
    }
    Ok(())
}

#[test]
#[ignore = "real peer: run by tests/run"]
fn exchanges_frames_with_an_unprivileged_container_without_hugepages() -> Result<()> {
    require!(tool("dpdk-testpmd", "dpdk-dev"), root());
    for variant in [Variant::Split, Variant::PackedVec] {
        exchanges(variant, |config| Config {
            memory: Memory::NoHuge(256),
            uid: Some(65534),
            ..config
        })?;
    }
    Ok(())
}

#[test]
#[ignore = "real peer: run by tests/run"]
fn exchanges_frames_over_four_queue_pairs() -> Result<()> {
    require!(tool("dpdk-testpmd", "dpdk-dev"), root(), hugepages(128));
    for variant in [Variant::Split, Variant::Packed] {
        let ports = ["blue", "red"].map(|name| ringway::control::state::PortSpec {
            queues: 4,
            ..server_port(name)
        });
        let switch = Ringway::start(ports.into())?;
        let four = self::ports(&switch).map(|port| VirtioUser {
            queues: 4,
            variant,
            ..port
        });
        let mut client = Config::pair(four).start()?;
        exchange(&switch, &mut client).with_context(|| format!("{variant:?}"))?;
        for port in ["blue", "red"] {
            let port = switch.port(port)?;
            let enabled = port.queues.iter().filter(|queue| queue.enabled).count();
            ensure!(
                enabled == 8,
                "{variant:?}: {enabled} rings enabled, 8 expected: {:?}",
                port.queues
            );
        }
        client.quit()?;
        switch.stop()?;
    }
    Ok(())
}

#[test]
#[ignore = "real peer: run by tests/run"]
fn carries_9000_byte_frames() -> Result<()> {
    require!(tool("dpdk-testpmd", "dpdk-dev"), root(), hugepages(128));
    // With big buffers any ring does; with small ones the frame is a chain on the way in and several buffers on the way out.
    for (variant, big_buffers) in [
        (Variant::Split, true),
        (Variant::Packed, true),
        (Variant::SplitPlain, true),
        (Variant::Split, false),
        (Variant::Packed, false),
    ] {
        let switch = Ringway::with_ports(&["blue", "red"])?;
        let pair = Config::pair(ports(&switch).map(|port| VirtioUser { variant, ..port }));
        let config = if big_buffers {
            pair.jumbo()
        } else {
            small_buffers(pair)
        };
        let mut client = config.start()?;
        let text = client.command(if big_buffers {
            "set txpkts 9000"
        } else {
            "set txpkts 1500,1500,1500,1500,1500,1500"
        })?;
        ensure!(!text.contains("Invalid"), "{text}");
        let books = exchange(&switch, &mut client)
            .with_context(|| format!("{variant:?}, big buffers: {big_buffers}"))?;
        nothing_dropped(&books)?;
        ensure!(
            books.received_bytes == books.received * 9000,
            "not all frames are 9000 bytes: {books:?}"
        );
        client.quit()?;
        switch.stop()?;
    }
    Ok(())
}

/// Frames of 9000 bytes in buffers of 2 KB.
fn small_buffers(mut config: Config) -> Config {
    let scattered = [
        "--max-pkt-len=9018",
        "--enable-scatter",
        "--tx-offloads=0x8000",
    ];
    config.args.extend(scattered.map(str::to_owned));
    config.memory = Memory::Hugepages(256);
    config
}

#[test]
#[ignore = "real peer: run by tests/run"]
fn connects_to_a_container_that_listens() -> Result<()> {
    require!(tool("dpdk-testpmd", "dpdk-dev"), root(), hugepages(128));
    for variant in [Variant::Split, Variant::Packed] {
        let switch = Ringway::start(vec![client_port("blue"), client_port("red")])?;
        let listening = ports(&switch).map(|port| VirtioUser {
            server: true,
            variant,
            ..port
        });
        let mut client = Config::pair(listening).start()?;
        nothing_dropped(&exchange(&switch, &mut client)?)?;
        client.quit()?;
        switch.stop()?;
    }
    Ok(())
}

#[test]
#[ignore = "real peer: run by tests/run"]
fn serves_a_container_again_after_it_was_killed() -> Result<()> {
    require!(tool("dpdk-testpmd", "dpdk-dev"), root(), hugepages(256));
    for server in [false, true] {
        let port = if server { client_port } else { server_port };
        let switch = Ringway::start(vec![port("blue"), port("red")])?;
        for round in 0..3 {
            let ports = ports(&switch).map(|port| VirtioUser { server, ..port });
            let mut client = Config::pair(ports).start()?;
            exchange(&switch, &mut client)
                .with_context(|| format!("server={server}, round {round}"))?;
            // In the middle of traffic.
            client.command("start tx_first 4")?;
            client.kill();
            let state = if server {
                PortState::Connecting
            } else {
                PortState::Listening
            };
            for port in ["blue", "red"] {
                switch.wait_port(port, state, PATIENCE)?;
            }
            // What a killed container leaves: its sockets.
            if server {
                for port in ["blue", "red"] {
                    let _ = std::fs::remove_file(switch.socket(port));
                }
            }
            switch.balanced_books()?;
        }
        switch.stop()?;
    }
    Ok(())
}

#[test]
#[ignore = "real peer: run by tests/run"]
fn a_listening_container_lives_through_a_crash_of_the_switch() -> Result<()> {
    require!(tool("dpdk-testpmd", "dpdk-dev"), root(), hugepages(128));
    for variant in [Variant::Split, Variant::Packed] {
        let mut switch = Ringway::start(vec![client_port("blue"), client_port("red")])?;
        let listening = ports(&switch).map(|port| VirtioUser {
            server: true,
            variant,
            ..port
        });
        let mut client = Config::pair(listening).start()?;
        exchange(&switch, &mut client)?;
        for round in 0..3 {
            // Under traffic; the container is left alone.
            client.command("start tx_first 4")?;
            std::thread::sleep(Duration::from_millis(200));
            switch.crash_and_restart()?;
            client.wait_links_up(PATIENCE)?;
            client.command("stop")?;
            for port in ["blue", "red"] {
                switch.wait_port(port, PortState::Forwarding, PATIENCE)?;
            }
            client.command("start tx_first 4")?;
            client
                .wait_received(FRAMES, PATIENCE)
                .with_context(|| format!("{variant:?}, round {round}"))?;
            client.command("stop")?;
            switch.balanced_books()?;
        }
        ensure!(client.process().alive(), "the container died");
        client.quit()?;
        switch.stop()?;
    }
    Ok(())
}

#[test]
#[ignore = "real peer: run by tests/run"]
fn two_containers_exchange_frames() -> Result<()> {
    require!(tool("dpdk-testpmd", "dpdk-dev"), root(), hugepages(192));
    let switch = Ringway::with_ports(&["blue", "red"])?;
    let [blue, red] = ports(&switch);
    let mut first = Config::single(&blue, &red).start()?;
    let mut second = Config::single(&red, &blue).start()?;
    first.exchange(&mut second, FRAMES, PATIENCE)?;
    let books = switch.balanced_books()?;
    let sent: u64 = [first.stats()?, second.stats()?]
        .iter()
        .map(|ports| ports[0].tx_packets)
        .sum();
    ensure!(
        books.received == sent,
        "the containers sent {sent} frames, the switch took {}",
        books.received
    );
    first.quit()?;
    second.quit()?;
    switch.stop().map(drop)
}

#[test]
#[ignore = "real peer: run by tests/run"]
fn names_single_file_segments_to_a_container_with_too_many_regions() -> Result<()> {
    require!(tool("dpdk-testpmd", "dpdk-dev"), root(), hugepages(128));
    let switch = Ringway::with_ports(&["blue", "red"])?;
    // A file per 2 MB page: more than 8 regions, refused inside DPDK before any table is sent.
    let config = Config {
        memory: Memory::HugepageFiles(128),
        ..Config::pair(ports(&switch))
    };
    let _client = config.launch()?;
    let end = std::time::Instant::now() + PATIENCE;
    loop {
        let reason = switch.port("blue")?.reason.unwrap_or_default();
        if reason.contains("--single-file-segments") {
            break;
        }
        ensure!(
            std::time::Instant::now() < end,
            "the port says only {reason:?}"
        );
        std::thread::sleep(Duration::from_millis(100));
    }
    switch.stop().map(drop)
}
