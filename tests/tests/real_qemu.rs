//! QEMU guests with Linux's virtio-net driver: interrupts, event index, addresses that differ from the host's.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use ringway::control::state::{PortSpec, PortState, RingKind};
use testkit::qemu::{self, Guest, RunningGuest};
use testkit::require;
use testkit::ringway::{Ringway, client_port, server_port};

const PATIENCE: Duration = Duration::from_secs(60);

fn boot(guests: &[Guest; 2]) -> Result<[RunningGuest; 2]> {
    let mut running = [guests[0].launch()?, guests[1].launch()?];
    for guest in &mut running {
        guest.wait_booted()?;
    }
    Ok(running)
}

/// Small and jumbo pings in both directions, every one answered, and every frame accounted for.
fn ping_each_other(
    switch: &Ringway,
    guests: &[Guest; 2],
    running: &mut [RunningGuest; 2],
) -> Result<()> {
    for size in [56, 1400, 8900] {
        for (from, to) in [(0, 1), (1, 0)] {
            running[from]
                .ping(&guests[to].address(), size, 10)
                .with_context(|| {
                    format!(
                        "blue: {:?}\nred: {:?}",
                        switch.port("blue").ok(),
                        switch.port("red").ok()
                    )
                })?;
        }
    }
    let books = switch.balanced_books()?;
    ensure!(books.received >= 6 * 20, "{books:?}");
    Ok(())
}

#[test]
#[ignore = "real peer: run by tests/run"]
fn two_guests_ping_each_other_with_small_and_jumbo_packets() -> Result<()> {
    require!(qemu::available());
    let switch = Ringway::with_ports(&["blue", "red"])?;
    let guests = [("blue", 1), ("red", 2)].map(|(name, station)| Guest {
        mtu: 9000,
        ..Guest::new(switch.socket(name), station)
    });
    let mut running = boot(&guests)?;
    ping_each_other(&switch, &guests, &mut running)?;
    drop(running);
    for port in ["blue", "red"] {
        switch.wait_port(port, PortState::Listening, PATIENCE)?;
    }
    switch.stop().map(drop)
}

#[test]
#[ignore = "real peer: run by tests/run"]
fn a_guest_with_packed_rings_pings_one_with_two_queue_pairs() -> Result<()> {
    require!(qemu::available());
    let switch = Ringway::start(vec![
        server_port("blue"),
        PortSpec {
            queues: 2,
            ..server_port("red")
        },
    ])?;
    let guests = [
        Guest {
            mtu: 9000,
            device: ",packed=on".to_owned(),
            ..Guest::new(switch.socket("blue"), 1)
        },
        Guest {
            mtu: 9000,
            queues: 2,
            ..Guest::new(switch.socket("red"), 2)
        },
    ];
    let mut running = boot(&guests)?;
    ping_each_other(&switch, &guests, &mut running)?;
    let blue = switch.port("blue")?;
    ensure!(
        blue.queues
            .iter()
            .all(|queue| queue.ring == RingKind::Packed),
        "{:?}",
        blue.queues
    );
    let red = switch.port("red")?;
    ensure!(
        red.queues.iter().filter(|queue| queue.enabled).count() == 4,
        "{:?}",
        red.queues
    );
    drop(running);
    switch.stop().map(drop)
}

#[test]
#[ignore = "real peer: run by tests/run"]
fn guests_reconnect_to_a_switch_that_was_killed() -> Result<()> {
    require!(qemu::available());
    // Blue's QEMU connects and tries again by itself; red's listens.
    let mut switch = Ringway::start(vec![server_port("blue"), client_port("red")])?;
    let guests = [
        Guest::new(switch.socket("blue"), 1),
        Guest {
            server: true,
            ..Guest::new(switch.socket("red"), 2)
        },
    ];
    let mut running = boot(&guests)?;
    running[0].ping(&guests[1].address(), 56, 5)?;
    switch.crash_and_restart()?;
    for port in ["blue", "red"] {
        switch.wait_port(port, PortState::Forwarding, PATIENCE)?;
    }
    running[0].ping(&guests[1].address(), 56, 5)?;
    running[1].ping(&guests[0].address(), 1400, 5)?;
    switch.balanced_books()?;
    drop(running);
    switch.stop().map(drop)
}
