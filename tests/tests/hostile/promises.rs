//! Figures for the promises of `tests/README.md` that are times: how soon a liar's port ends (P3), how soon others attach meanwhile
//! (P4), how soon a container that was killed forwards again (P8).
//!
//! No time is asserted. `target/promises.tsv` gets a line per figure; with `HOSTILE_LATENCY` set there are many rounds, and the worker
//! has a processor for itself.

use std::path::{Path, PathBuf};
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, ensure};
use ringway::control::config::{Config, Workers};
use ringway::control::state::{PortSpec, PortState, PortStatus, SocketMode};
use ringway::dataplane::clock::tsc;
use ringway::guest::traffic::station;
use ringway::guest::{Guest, Layout, MemoryKind, Options, QueuePair};
use testkit::process::Launch;
use testkit::ringway::{Ringway, client_port, server_port};
use testkit::topology::{BROADCAST, frame};

use super::api::{self, PATIENCE};
use super::case::{alone, report};
use super::innocents::{Innocent, ticks_per_microsecond};
use super::quiet;
use super::rig::{attach, reach, send};
use super::talk::{PLAIN, Talk, message, req};

/// A switch, and somebody honest in it.
struct Scene {
    switch: Ringway,
    friend: QueuePair,
    _guest: Guest,
}

impl Scene {
    fn start(ports: Vec<PortSpec>) -> Result<Scene> {
        let switch = Ringway::start_with(Config {
            workers: Workers::Cpus(vec![quiet::worker_cpu()]),
            idle: quiet::idle(),
            ports: [vec![server_port("friend")], ports].concat(),
            ..Config::default()
        })?;
        quiet::leave_the_worker_alone()?;
        let Innocent { guest, queues } =
            attach(&switch.api(), switch.dir(), "friend", Layout::Split)?;
        Ok(Scene {
            switch,
            friend: queues,
            _guest: guest,
        })
    }

    /// Waits until nobody is at the port any more.
    fn wait_free(&self, port: &str) -> Result<()> {
        let free = |port: &PortStatus| port.state == PortState::Listening;
        api::wait_port(&self.switch.api(), port, "free", free).map(drop)
    }

    fn end(self) -> Result<()> {
        api::balanced(&self.switch.api())?;
        self.switch.stop().map(drop)
    }
}

/// Few rounds but where figures are wanted.
fn rounds(many: usize) -> usize {
    if std::env::var_os(quiet::LATENCY).is_some() {
        many
    } else {
        3
    }
}

/// A line: what, how often, median, nine of ten, and longest in milliseconds.
fn figures(what: &str, mut times: Vec<Duration>) -> Result<()> {
    ensure!(!times.is_empty(), "{what}: nothing was timed");
    times.sort_unstable();
    let at = |share: f64| times[((times.len() - 1) as f64 * share) as usize].as_secs_f64() * 1e3;
    let (median, nine, most) = (at(0.5), at(0.9), at(1.0));
    let count = times.len();
    let line = format!("{what}\t{count}\t{median:.3}\t{nine:.3}\t{most:.3}\n");
    print!("{line}");
    report("promises.tsv", &line)
}

/// What a guest in [`p3`] does of a sudden.
#[derive(Clone, Copy)]
enum Lie {
    TransmitIndex,
    ReceiveIndex,
    Truncated,
}

/// From the lie to the end of the connection.
fn until_put_out(scene: &mut Scene, port: &str, lie: Lie, memory: MemoryKind) -> Result<Duration> {
    let (api, dir) = (scene.switch.api(), scene.switch.dir().to_owned());
    let socket = dir.join(format!("{port}.sock"));
    let spec = format!("vhost-user:{port},socket={}", socket.display());
    api::add_port(&api, &spec)?;
    let mut guest = Guest::new(Options {
        memory,
        ring_size: 256,
        in_order: false,
        patience: PATIENCE,
        ..Options::new(&socket)
    })?;
    let mut queues = guest.attach()?.remove(0);
    let mac = station(0x3000);
    reach(
        &mut queues,
        &mut scene.friend,
        &frame(BROADCAST, mac, port.as_bytes()),
    )?;
    let talk = Talk::over(guest.link().context("attached")?.stream())?;
    let mem = guest.memory().context("attached")?.clone();
    let since = Instant::now();
    match lie {
        Lie::TransmitIndex => {
            let raw = queues.tx.raw();
            raw.set_avail_idx(raw.avail_idx().wrapping_add(1000));
            queues.tx.kick_anyway();
        }
        Lie::ReceiveIndex => {
            let raw = queues.rx.raw();
            raw.set_avail_idx(raw.avail_idx().wrapping_add(1000));
            for _ in 0..300 {
                send(&mut scene.friend, &frame(mac, station(9), b"for you"))?;
            }
        }
        Lie::Truncated => {
            rustix::fs::ftruncate(mem.fd(), 0)?;
            queues.tx.kick_anyway();
        }
    }
    talk.wait_closed()?;
    let took = since.elapsed();
    let put_out = |port: &PortStatus| port.put_out.guests == 1;
    api::wait_port(&api, port, "put out", put_out)?;
    api::del_port(&api, port)?;
    Ok(took)
}

#[test]
fn p3_how_soon_a_liar_is_out() -> Result<()> {
    let _alone = alone();
    let mut scene = Scene::start(vec![])?;
    let huge = MemoryKind::Hugepages;
    let kinds = [
        (
            "transmit index (H42)",
            Lie::TransmitIndex,
            MemoryKind::Memfd,
        ),
        ("receive index (H42)", Lie::ReceiveIndex, MemoryKind::Memfd),
        (
            "truncated, 4 KiB pages (H31)",
            Lie::Truncated,
            MemoryKind::Memfd,
        ),
        ("truncated, hugepages (H31)", Lie::Truncated, huge),
    ];
    for (what, lie, memory) in kinds {
        if memory == huge && ringway::virtio::own_mem::OwnMem::new(2 << 20, 0, true).is_err() {
            println!("no hugepages are reserved here: {what} is left out");
            continue;
        }
        let times = (0..rounds(200)).map(|_| until_put_out(&mut scene, "x", lie, memory));
        figures(&format!("P3 {what}"), times.collect::<Result<_>>()?)?;
    }
    scene.end()
}

/// From the connection to the first frame that came through, and the port is free again.
fn until_forwarded(scene: &mut Scene, port: &str) -> Result<Duration> {
    let socket = scene.switch.socket(port);
    let mut guest = Guest::new(Options {
        ring_size: 256,
        patience: PATIENCE,
        ..Options::new(&socket)
    })?;
    let hello = frame(BROADCAST, station(0x3001), port.as_bytes());
    while scene.friend.rx.receive(|_| ()) > 0 {}
    let since = Instant::now();
    let mut queues = guest.attach()?.remove(0);
    send(&mut queues, &hello)?;
    let mut came = false;
    while !came {
        let rx = &mut scene.friend.rx;
        rx.receive(|frame| came |= frame.matches(0, &hello));
        ensure!(since.elapsed() < PATIENCE, "its frame does not come");
    }
    let took = since.elapsed();
    guest.detach()?;
    std::thread::sleep(Duration::from_millis(30)); // a port's rings change hands 100 times a second, not more
    scene.wait_free(port)?;
    Ok(took)
}

/// Attacks a port as long as `active` is set, until `over` is. Attackers get the processor time that nobody else wants, as
/// containers have processors of their own.
fn attack(number: usize, socket: &Path, active: &AtomicBool, over: &AtomicBool) -> Result<()> {
    rustix::process::setpriority_process(Some(rustix::thread::gettid()), 19)?;
    let mut tables: Option<Guest> = None;
    while !over.load(Ordering::Relaxed) {
        if !active.load(Ordering::Relaxed) {
            tables = None;
            std::thread::sleep(Duration::from_millis(1));
            continue;
        }
        match number {
            0 => drop(std::os::unix::net::UnixStream::connect(socket)),
            1 => {
                let talk = Talk::to(socket)?;
                talk.bytes(&message(req::SET_FEATURES, PLAIN, &[0; 8])[..13], &[])?;
                let wait = Some(Duration::from_millis(20));
                talk.stream().set_read_timeout(wait)?;
                let _ = talk.hear();
            }
            // As fast as a port deals with messages, and no faster: who floods is put out.
            _ => match &tables {
                Some(guest) if guest.connected() => {
                    let _ = match number {
                        2 => guest.share_again(),
                        _ => guest.enable(0, false).and_then(|()| guest.enable(0, true)),
                    };
                    std::thread::sleep(Duration::from_millis(if number == 2 { 2 } else { 7 }));
                }
                _ => {
                    let mut guest = Guest::new(Options::new(socket))?;
                    tables = guest.attach().is_ok().then_some(guest);
                }
            },
        }
    }
    Ok(())
}

#[test]
fn p4_how_soon_others_attach_while_attackers_are_at_their_ports() -> Result<()> {
    let _alone = alone();
    let names = ["storm", "half", "tables", "toggles"];
    let wild = |name: &&str| PortSpec {
        bridge: "wild".to_owned(),
        ..server_port(name)
    };
    let ports = names.iter().map(wild).chain([server_port("y")]);
    let mut scene = Scene::start(ports.collect())?;
    let (active, over) = (AtomicBool::new(false), AtomicBool::new(false));
    let (mut alone, mut beside) = (Vec::new(), Vec::new());
    std::thread::scope(|scope| -> Result<()> {
        let sockets = names.map(|name| scene.switch.socket(name));
        for (number, socket) in sockets.into_iter().enumerate() {
            let (active, over) = (&active, &over);
            scope.spawn(move || attack(number, &socket, active, over));
        }
        let mut turns = || -> Result<()> {
            for turn in 0..2 * rounds(10) {
                let attacked = turn % 2 == 1;
                active.store(attacked, Ordering::Relaxed);
                std::thread::sleep(Duration::from_millis(50));
                let times = if attacked { &mut beside } else { &mut alone };
                for _ in 0..10 {
                    times.push(until_forwarded(&mut scene, "y")?);
                }
            }
            Ok(())
        };
        let done = turns();
        over.store(true, Ordering::Relaxed);
        done
    })?;
    figures("P4 attach, nobody else", alone)?;
    figures("P4 attach, four attackers", beside)?;
    scene.end()
}

#[test]
fn p4_how_soon_sixty_four_attach_at_once() -> Result<()> {
    let _alone = alone();
    let names: Vec<String> = (0..64).map(|n| format!("y{n}")).collect();
    let scene = Scene::start(names.iter().map(|name| server_port(name)).collect())?;
    let mut times = Vec::new();
    for _ in 0..rounds(10) {
        let (start, forwarding) = (Barrier::new(64), Barrier::new(64));
        let all = |name: &String| -> Result<Duration> {
            let socket = scene.switch.socket(name);
            let mut guest = Guest::new(Options {
                ring_size: 256,
                patience: PATIENCE,
                ..Options::new(socket)
            })?;
            start.wait();
            let since = Instant::now();
            let attached = guest.attach();
            let took = since.elapsed();
            forwarding.wait();
            attached?;
            guest.detach()?;
            Ok(took)
        };
        let last = std::thread::scope(|scope| -> Result<Duration> {
            let all = &all;
            let guests: Vec<_> = names
                .iter()
                .map(|name| scope.spawn(move || all(name)))
                .collect();
            let ended = guests.into_iter().map(|guest| {
                let ended = guest.join();
                ended.map_err(|_| anyhow!("a guest panicked"))?
            });
            let times: Vec<Duration> = ended.collect::<Result<_>>()?;
            times.into_iter().max().context("64 of them")
        })?;
        times.push(last);
        for name in &names {
            scene.wait_free(name)?;
        }
    }
    figures("P4 the last of 64", times)?;
    scene.end()
}

/// Not a test by itself: a container that says when its socket answered, in each of its frames, until it is killed.
#[test]
fn p8_helper_contains() {
    let Some(socket) = std::env::var_os("PROMISE_SOCKET") else {
        return;
    };
    let listens = std::env::var_os("PROMISE_LISTENS").is_some();
    let options = Options {
        ring_size: 256,
        wait: PATIENCE,
        patience: PATIENCE,
        ..Options::new(PathBuf::from(socket))
    };
    let options = if listens { options.listen() } else { options };
    let mut guest = Guest::new(options).expect("a socket");
    let answers = tsc();
    let mut queues = guest.attach().expect("attached").remove(0);
    let said = frame(BROADCAST, station(0x3002), &answers.to_le_bytes());
    loop {
        send(&mut queues, &said).expect("sent");
        std::thread::sleep(Duration::from_micros(200));
    }
}

/// Kills the container at a port and starts it again; from its socket's answer to its first frame.
fn restarted(scene: &mut Scene, port: &str, listens: bool) -> Result<Duration> {
    let mut launch = Launch::new(
        "container",
        [
            std::env::current_exe()?.as_os_str(),
            "hostile::promises::p8_helper_contains".as_ref(),
            "--exact".as_ref(),
            "--nocapture".as_ref(),
        ],
    );
    let socket = scene.switch.socket(port).display().to_string();
    launch.env = vec![("PROMISE_SOCKET".into(), socket)];
    if listens {
        launch.env.push(("PROMISE_LISTENS".into(), "1".into()));
    }
    let (started, end) = (tsc(), Instant::now() + PATIENCE);
    let mut container = launch.start()?;
    let mut took = None;
    while took.is_none() {
        std::thread::sleep(Duration::from_micros(20)); // the container and the switch need the processor
        ensure!(Instant::now() < end, "no frame: {}", container.output());
        scene.friend.rx.receive(|frame| {
            let bytes = frame.to_vec();
            let stamp = bytes.get(14..22).and_then(|bytes| bytes.try_into().ok());
            let answered = stamp.map(u64::from_le_bytes).filter(|at| *at > started);
            took = took.or(answered.map(|at| tsc().saturating_sub(at)));
        });
    }
    container.kill();
    std::thread::sleep(Duration::from_millis(50)); // messages of a port are counted, whoever sends them
    let microseconds = took.unwrap_or_default() as f64 / ticks_per_microsecond();
    Ok(Duration::from_secs_f64(microseconds / 1e6))
}

#[test]
fn p8_how_soon_a_container_that_was_killed_forwards_again() -> Result<()> {
    let _alone = alone();
    for (what, mode) in [
        ("that connects", SocketMode::Server),
        ("that listens", SocketMode::Client),
    ] {
        let listens = mode == SocketMode::Client;
        let port = if listens {
            client_port("y")
        } else {
            server_port("y")
        };
        let mut scene = Scene::start(vec![port])?;
        restarted(&mut scene, "y", listens)?;
        let times = (0..rounds(100)).map(|_| restarted(&mut scene, "y", listens));
        figures(
            &format!("P8 a container {what}"),
            times.collect::<Result<_>>()?,
        )?;
        scene.end()?;
    }
    Ok(())
}
