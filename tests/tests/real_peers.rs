//! The rig itself: every real peer works against another one before Ringway is measured with it.

use std::path::Path;
use std::time::Duration;

use anyhow::{Result, ensure};
use testkit::docker::{self, Docker};
use testkit::ovs::{self, Ovs, PortOptions};
use testkit::qemu::{self, Guest};
use testkit::require;
use testkit::skip::{hugepages, root, tool};
use testkit::testpmd::{Config, Memory, Testpmd, Variant, VirtioUser};

const PATIENCE: Duration = Duration::from_secs(30);

/// Frames circulate through `backend`'s two sockets in both directions, and the client agrees with itself.
fn exchange(client: &mut Testpmd) -> Result<()> {
    client.wait_links_up(PATIENCE)?;
    // OVS loses the very first burst of a port to its upcall, and a closed loop never replaces a lost frame.
    let mut bursts = 4;
    for _ in 0..10 {
        client.command("start tx_first 1")?;
        bursts += 1;
        std::thread::sleep(Duration::from_millis(500));
        client.command("stop")?;
        if client.stats()?.iter().all(|port| port.rx_packets > 0) {
            break;
        }
    }
    client.command("start tx_first 4")?;
    client.wait_received(10_000, PATIENCE)?;
    client.command("stop")?;
    let ports = client.stats()?;
    // What one port received the other sent on, and so many bursts of 32 began it.
    ensure!(
        ports[0].tx_packets <= ports[1].rx_packets + 32 * bursts,
        "{ports:?}"
    );
    ensure!(
        ports[1].tx_packets <= ports[0].rx_packets + 32 * bursts,
        "{ports:?}"
    );
    Ok(())
}

/// A client in ordinary memory exchanges frames through a backend; `confine` says who it is, given the sockets' folder.
fn without_hugepages(confine: impl FnOnce(&mut Config, &Path)) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let sockets = [dir.path().join("a"), dir.path().join("b")];
    let backend = Config::vhost_io([&sockets[0], &sockets[1]], 1).start()?;
    testkit::open_to_all(dir.path())?;
    let mut client = Config {
        memory: Memory::NoHuge(256),
        ..Config::pair([
            VirtioUser::new(&sockets[0], 1),
            VirtioUser::new(&sockets[1], 2),
        ])
    };
    confine(&mut client, dir.path());
    let mut client = client.start()?;
    exchange(&mut client)?;
    client.quit()?;
    backend.quit()
}

#[test]
#[ignore = "real peer: run by tests/run"]
fn testpmd_exchanges_frames_with_testpmd_over_hugepages() -> Result<()> {
    require!(tool("dpdk-testpmd", "dpdk-dev"), root(), hugepages(256));
    let dir = tempfile::tempdir()?;
    let sockets = [dir.path().join("a"), dir.path().join("b")];
    let mut backend = Config::vhost_io([&sockets[0], &sockets[1]], 1).start()?;
    for variant in [Variant::Split, Variant::PackedVec] {
        let port = |i: usize| VirtioUser {
            variant,
            ..VirtioUser::new(&sockets[i], i as u8 + 1)
        };
        let mut client = Config::pair([port(0), port(1)]).start()?;
        exchange(&mut client)?;
        client.quit()?;
    }
    ensure!(backend.process().alive(), "the backend died");
    backend.quit()
}

#[test]
#[ignore = "real peer: run by tests/run"]
fn testpmd_exchanges_frames_unprivileged_and_without_hugepages() -> Result<()> {
    require!(tool("dpdk-testpmd", "dpdk-dev"), root(), hugepages(128));
    without_hugepages(|client, _| client.uid = Some(65534))
}

#[test]
#[ignore = "real peer: run by tests/run"]
fn testpmd_exchanges_frames_through_ovs_dpdk() -> Result<()> {
    require!(
        tool("dpdk-testpmd", "dpdk-dev"),
        ovs::available(),
        hugepages(580)
    );
    let dir = tempfile::tempdir()?;
    let mut switch = Ovs::start(dir.path(), 0)?;
    let sockets = [
        switch.add_port("vhu0", PortOptions::default())?,
        switch.add_port("vhu1", PortOptions::default())?,
    ];
    let mut client = Config::pair([
        VirtioUser::new(&sockets[0], 1),
        VirtioUser::new(&sockets[1], 2),
    ])
    .start()?;
    exchange(&mut client)?;
    let busy = switch.appctl(&["dpif-netdev/pmd-stats-show"])?;
    ensure!(busy.contains("packets received"), "{busy}");
    client.quit()?;
    ensure!(switch.vswitchd().alive(), "OVS died");
    Ok(())
}

#[test]
#[ignore = "real peer: run by tests/run"]
fn two_guests_ping_each_other_through_testpmd() -> Result<()> {
    require!(
        tool("dpdk-testpmd", "dpdk-dev"),
        root(),
        hugepages(128),
        qemu::available()
    );
    let dir = tempfile::tempdir()?;
    let sockets = [dir.path().join("a"), dir.path().join("b")];
    let backend = Config::vhost_io([&sockets[0], &sockets[1]], 1)
        .jumbo()
        .start()?;
    let guests = [
        Guest {
            mtu: 9000,
            ..Guest::new(&sockets[0], 1)
        },
        Guest {
            mtu: 9000,
            ..Guest::new(&sockets[1], 2)
        },
    ];
    let mut running = [guests[0].launch()?, guests[1].launch()?];
    for guest in &mut running {
        guest.wait_booted()?;
    }
    running[0].ping(&guests[1].address(), 56, 5)?;
    running[1].ping(&guests[0].address(), 8900, 5)?;
    backend.quit()
}

#[test]
#[ignore = "real peer: run by tests/run"]
fn testpmd_exchanges_frames_from_within_a_container_without_rights() -> Result<()> {
    require!(
        tool("dpdk-testpmd", "dpdk-dev"),
        docker::available(),
        hugepages(128)
    );
    let docker = Docker::start()?;
    without_hugepages(|client, folder| {
        client.inside = docker.run_line("client", folder, docker::TESTPMD);
    })
}
