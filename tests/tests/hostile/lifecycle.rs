//! H85 to H96: coming, going, and those who ask the API.

use std::io::{Read as _, Write as _};
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use ringway::guest::Guest;
use ringway::guest::messages::addresses;
use ringway::virtio::own_mem::OwnMem;
use rustix::fs::{Mode, OFlags};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, Signal};
use testkit::process::wait_until;
use testkit::ringway::{Ringway, binary, server_port};
use testkit::topology::frame;

use super::api::{self, PATIENCE};
use super::case::{Case, alone};
use super::innocents::address;
use super::rig::reach;
use super::talk::{PLAIN, Talk, event, message, pair, req};
use super::x::X;

/// A handshake that ends after so many messages.
fn handshake(x: &X<'_>, steps: u64) -> Result<Talk> {
    let memory = OwnMem::new(1 << 20, 0x1000_0000, false)?;
    let (talk, fd, at) = (x.connect()?, event()?, memory.uva());
    let ring = |n: u32| {
        let at = at + u64::from(n) * 65_536;
        vec![
            (req::SET_VRING_CALL, pair(n, 0).to_vec()),
            (req::SET_VRING_NUM, pair(n, 256).to_vec()),
            (req::SET_VRING_BASE, pair(n, 0).to_vec()),
            (
                req::SET_VRING_ADDR,
                addresses(n, at, at + 16_384, at + 8192),
            ),
            (req::SET_VRING_KICK, pair(n, 0).to_vec()),
            (req::SET_VRING_ENABLE, pair(n, 1).to_vec()),
        ]
    };
    let all = ring(0).into_iter().chain(ring(1));
    if steps > 0 {
        talk.shake(false, 0)?;
    }
    if steps > 1 {
        talk.share(&memory)?;
    }
    for (request, payload) in all.take(steps.saturating_sub(2) as usize) {
        let with_fd = matches!(request, req::SET_VRING_CALL | req::SET_VRING_KICK);
        let fds = if with_fd { vec![fd.as_fd()] } else { vec![] };
        talk.say_with(request, &payload, &fds)?;
    }
    Ok(talk)
}

#[test]
pub(super) fn h85_a_guest_that_dies_at_any_step_leaves_a_free_port() -> Result<()> {
    Case::of("H85").run(|x| {
        for _ in 0..5 {
            let steps = x.below(16);
            let talk = handshake(x, steps)?;
            if x.below(2) == 0 {
                std::thread::sleep(Duration::from_micros(x.below(3000)));
            }
            drop(talk);
        }
        let mut wild = x.attach(x.options())?;
        wild.announce(x)?;
        wild.guest.vanish();
        Ok(())
    })
}

#[test]
pub(super) fn h86_a_port_deleted_under_a_guest_at_any_step() -> Result<()> {
    Case::of("H86").run(|x| {
        let steps = x.below(16);
        let talk = handshake(x, steps)?;
        if x.below(3) == 0 {
            // In quarantine.
            talk.bytes(&message(0, 0, &[]), &[])?;
        }
        x.port_again("")?;
        talk.wait_closed()
    })
}

#[test]
fn h88_with_peers_stuck_at_every_step_the_switch_still_leaves_when_told() -> Result<()> {
    let names: Vec<String> = (0..6).map(|n| format!("x{n}")).collect();
    let switch = Ringway::start(names.iter().map(|name| server_port(name)).collect())?;
    // Half a message; no answer read; all said and nothing more; connected and silent; memory taken away.
    let half = Talk::to(&switch.socket("x0"))?;
    half.bytes(&message(req::SET_FEATURES, PLAIN, &[0; 8])[..13], &[])?;
    let deaf = Talk::to(&switch.socket("x1"))?;
    deaf.stream()
        .set_write_timeout(Some(Duration::from_millis(50)))?;
    while deaf.say(req::GET_FEATURES, &[])? {}
    let _silent = Talk::to(&switch.socket("x2"))?;
    let mut guests = Vec::new();
    for name in ["x3", "x4", "x5"] {
        let mut guest = Guest::new(ringway::guest::Options::new(switch.socket(name)))?;
        guests.push((guest.attach()?, guest));
    }
    let memory = guests[0].1.memory().context("attached")?.clone();
    rustix::fs::ftruncate(memory.fd(), 0)?;
    // Within one second, with success, and without its sockets: `stop` asks all that.
    let took = switch.stop()?;
    println!("left after {took:?}");
    Ok(())
}

/// A switch that is ended whatever comes of the test.
struct Started(Child);

impl Drop for Started {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn h95_a_log_that_nobody_reads_and_a_closed_standard_output_hold_nobody_up() -> Result<()> {
    let _alone = alone();
    let dir = tempfile::tempdir()?;
    let [api, socket] = ["api.sock", "x.sock"].map(|name| dir.path().join(name));
    let (_nobody_reads, log) = pipe_with(PipeFlags::CLOEXEC)?;
    let port = format!("vhost-user:x,socket={}", socket.display());
    let mut command = Command::new("sh");
    command.args(["-c", "exec \"$@\" >&-", "sh"]).arg(binary()?);
    command
        .arg("--api")
        .arg(&api)
        .args(["run", "--cpus", "0", "--idle", "adaptive", "--port", &port]);
    let child = command
        .env("RUST_LOG", "debug")
        .stderr(log.try_clone()?)
        .spawn()?;
    let mut switch = Started(child);
    wait_until("the switch listens", PATIENCE, || {
        api.exists() && socket.exists()
    })?;
    // The same pipe by another description: ours alone does not wait.
    let again = format!("/proc/self/fd/{}", log.as_raw_fd());
    let full = rustix::fs::open(again, OFlags::WRONLY | OFlags::NONBLOCK, Mode::empty())?;
    while rustix::io::write(&full, &[b'\n'; 4096]).is_ok() {}
    while rustix::io::write(&full, b"\n").is_ok() {}
    // Each of these has something to say.
    for _ in 0..50 {
        drop(Talk::to(&socket)?);
        api::port(&api, "x")?;
    }
    api::add_port(
        &api,
        &format!("vhost-user:y,socket={}/y.sock", dir.path().display()),
    )?;
    let mut guests = [&socket, &dir.path().join("y.sock")].map(|at| {
        let mut guest = Guest::new(ringway::guest::Options::new(at))?;
        let queues = guest.attach()?.remove(0);
        Ok::<_, anyhow::Error>((guest, queues))
    });
    let [Ok((_, from)), Ok((_, to))] = &mut guests else {
        anyhow::bail!("no guest is served: {:?}", guests.map(Result::err));
    };
    reach(from, to, &frame(address(1), address(0), b"all is well"))?;
    let pid = Pid::from_raw(switch.0.id() as i32).context("a pid")?;
    rustix::process::kill_process(pid, Signal::TERM)?;
    wait_until("the switch ends", PATIENCE, || {
        matches!(switch.0.try_wait(), Ok(Some(_)))
    })?;
    ensure!(switch.0.wait()?.success(), "it ended badly");
    Ok(())
}

#[test]
pub(super) fn h91_the_newest_wins_only_if_the_one_that_is_there_is_dead() -> Result<()> {
    Case::of("H91").run(|x| {
        let mut first = x.attach(x.options())?;
        first.announce(x)?;
        for _ in 0..5 {
            Talk::to(&x.socket())?.wait_closed()?;
        }
        ensure!(first.guest.connected(), "the first was sent away");
        x.is_kept()?;
        first.guest.vanish();
        x.attach(x.options())?.announce(x)
    })
}

#[test]
pub(super) fn h92_sixty_four_come_at_once_and_go_at_once() -> Result<()> {
    Case::of("H92").at_once(64).seeds(64).run(|x| {
        let mut wild = x.attach(x.options())?;
        wild.announce(x)?;
        wild.guest.vanish();
        Ok(())
    })
}

/// Timers must not follow the wall clock: somebody may set it. Where the time of day is needed it is for people to read.
#[test]
fn h94_no_timer_follows_the_wall_clock() -> Result<()> {
    let mut folders = vec![std::path::PathBuf::from("../switch/src")];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder)? {
            let path = entry?.path();
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            let text = std::fs::read_to_string(&path)?;
            let at = text.find("SystemTime").or(text.find("CLOCK_REALTIME"));
            ensure!(at.is_none(), "{} follows the wall clock", path.display());
        }
    }
    Ok(())
}

#[test]
fn h96_clients_of_the_api_that_hang_or_talk_nonsense() -> Result<()> {
    Case::of("H96").seeds(8).run(|x| {
        let nonsense = x.any().to_le_bytes().repeat(1000);
        let begun = b"POST /v1/reload HTTP/1.1\r\nHost: r\r\nContent-Length: 1000000\r\n\r\n";
        let mut crowd = Vec::new();
        for n in 0..10 {
            let mut stream = UnixStream::connect(&x.rig.api)?;
            stream.set_write_timeout(Some(Duration::from_millis(100)))?;
            let _ = match n % 4 {
                0 => Ok(()),
                1 => stream.write_all(&nonsense),
                2 => stream.write_all(begun),
                _ => stream.write_all(b"GET /metrics HTTP/1.1\r\nHost:"),
            };
            crowd.push(stream);
        }
        // Who asks properly is answered meanwhile.
        let since = Instant::now();
        api::port(&x.rig.api, &x.port)?;
        ensure!(since.elapsed() < PATIENCE, "an honest client waited");
        x.innocents_go_on()?;
        for mut stream in crowd.drain(..).skip(1).step_by(4) {
            stream.set_read_timeout(Some(PATIENCE))?;
            let _ = stream.read_to_end(&mut Vec::new());
        }
        Ok(())
    })
}
