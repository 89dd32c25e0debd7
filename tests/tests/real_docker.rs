//! Docker containers without rights: user 65534, no capability, no network, no hugepages, only the socket's folder mounted.

use std::path::Path;
use std::time::Duration;

use anyhow::{Result, ensure};
use ringway::control::doctor::{Check, Verdict};
use ringway::control::state::StatsReport;
use testkit::docker::{self, Docker};
use testkit::process::{Launch, wait_until};
use testkit::require;
use testkit::ringway::{self as switch, Ringway};
use testkit::testpmd::{Config, Memory, Testpmd, VirtioUser};
use vf_model::{Nic, Pace, VfPolicy, serve};

const PATIENCE: Duration = Duration::from_secs(60);
const FRAMES: u64 = 20_000;

/// Two containers, each with one port, return each other's frames. Says how many frames they sent.
fn containers_exchange_frames(docker: &Docker, folder: &Path) -> Result<u64> {
    let blue = VirtioUser::new(folder.join("blue.sock"), 1);
    let red = VirtioUser::new(folder.join("red.sock"), 2);
    let start = |name: &str, port: &VirtioUser, peer: &VirtioUser| -> Result<Testpmd> {
        let inside = docker.run_line(name, folder, docker::TESTPMD);
        Config {
            memory: Memory::NoHuge(256),
            inside,
            ..Config::single(port, peer)
        }
        .start()
    };
    let mut first = start("blue", &blue, &red)?;
    let mut second = start("red", &red, &blue)?;
    first.exchange(&mut second, FRAMES, PATIENCE)?;
    let sent = first.stats()?[0].tx_packets + second.stats()?[0].tx_packets;
    first.quit()?;
    second.quit()?;
    Ok(sent)
}

#[test]
#[ignore = "real peer: run by tests/run"]
fn two_containers_without_rights_exchange_frames() -> Result<()> {
    require!(docker::available());
    let docker = Docker::start()?;
    let switch = Ringway::with_ports(&["blue", "red"])?;
    let sent = containers_exchange_frames(&docker, switch.dir())?;
    let books = switch.balanced_books()?;
    ensure!(
        books.received == sent,
        "the containers sent {sent} frames, the switch took {}",
        books.received
    );
    switch.stop().map(drop)
}

/// The profile of `configs/` refuses the switch nothing that it can use.
fn is_guarded(docker: &Docker, api: &str) -> Result<()> {
    let security = docker.command(&[
        "exec",
        "switch",
        "/usr/bin/ringway",
        "--api",
        api,
        "doctor",
        "--security",
        "--json",
    ])?;
    let checks: Vec<Check> = serde_json::from_str(&security)?;
    let verdict = |name: &str| {
        checks
            .iter()
            .find(|check| check.name == name)
            .map(|check| check.verdict)
    };
    for name in [
        "switch: user",
        "switch: new privileges",
        "switch: seccomp",
        "switch: userfaultfd",
        "switch: calls",
    ] {
        ensure!(verdict(name) == Some(Verdict::Ok), "{name}: {checks:?}");
    }
    Ok(())
}

/// An uplink of the model, in a bridge of its own.
fn uplink(folder: &Path) -> Result<String> {
    let nic = Nic::new(vf_model::Config {
        manual_clock: false,
        pace: Pace::AtOnce,
        ..vf_model::Config::for_tests(vec![VfPolicy::default()])
    });
    let path = folder.join("vf0.sock");
    serve::serve_vf(nic, 0, &path)?;
    testkit::open_to_all(folder)?;
    let path = path.display();
    Ok(format!("ixgbevf:uplink,bridge=wire,vfio-user={path}"))
}

fn uplink_forwards(docker: &Docker, api: &str) -> Result<()> {
    let show = [
        "exec",
        "switch",
        "/usr/bin/ringway",
        "--api",
        api,
        "port",
        "list",
    ];
    wait_until("the uplink forwards", PATIENCE, || {
        let list = docker.command(&show).unwrap_or_default();
        list.lines()
            .any(|line| line.contains("uplink") && line.contains("forwarding"))
    })
}

#[test]
#[ignore = "real peer: run by tests/run"]
fn the_switch_itself_runs_in_a_container_without_rights() -> Result<()> {
    require!(docker::available());
    let docker = Docker::start()?;
    docker.build_ringway(&switch::binary()?)?;
    let folder = tempfile::tempdir()?;
    testkit::open_to_all(folder.path())?;
    let path = |name: &str| folder.path().join(name).display().to_string();
    let mut line = docker.run_line_profiled("switch", folder.path(), docker::RINGWAY);
    line.extend(["run".to_owned(), "--api".to_owned(), path("api.sock")]);
    for port in ["blue", "red"] {
        line.extend([
            "--port".to_owned(),
            format!("vhost-user:{port},socket={}", path(&format!("{port}.sock"))),
        ]);
    }
    line.extend(["--port".to_owned(), uplink(folder.path())?]);
    let mut container = Launch::new("docker-ringway", line).start()?;
    let all = || {
        ["blue.sock", "red.sock", "api.sock"]
            .iter()
            .all(|name| folder.path().join(name).exists())
    };
    wait_until("the switch listens", PATIENCE, || {
        !container.alive() || all()
    })?;
    ensure!(
        container.alive(),
        "the switch ended:\n{}",
        container.output()
    );
    let sent = containers_exchange_frames(&docker, folder.path())?;
    let stats = docker.command(&[
        "exec",
        "switch",
        "/usr/bin/ringway",
        "--api",
        &path("api.sock"),
        "stats",
        "--json",
    ])?;
    let books = serde_json::from_str::<StatsReport>(&stats)?.total;
    ensure!(
        books.balanced() && books.received == sent,
        "the containers sent {sent} frames: {books:?}"
    );
    is_guarded(&docker, &path("api.sock"))?;
    uplink_forwards(&docker, &path("api.sock"))?;
    docker.command(&["stop", "switch"])?;
    let status = container.wait_exit(PATIENCE)?;
    ensure!(
        status.success(),
        "the switch ended with {status}:\n{}",
        container.output()
    );
    Ok(())
}
