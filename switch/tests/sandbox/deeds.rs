//! Everything a switch does: frames between guests, faults in their memory, all commands, an uplink.

use std::fs;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use ringway::control::state::PortState;
use ringway::guest::{Guest, Options, QueuePair};
use rustix::fs::{FallocateFlags, fallocate, ftruncate};
use rustix::process::Signal;
use vf_model::{Nic, Pace, VfPolicy, Wire, serve};

use super::switch::Switch;
use super::{PATIENCE, port, uid};

/// Frames between two guests, a guest that sleeps and is called, workers that sleep and are kicked.
pub(super) fn traffic(switch: &mut Switch, packed: bool) {
    let layout = |options: Options| if packed { options.packed() } else { options };
    let (blue, red) = (switch.dir.join("blue"), switch.dir.join("red"));
    let (_blue, mut a) = attach(switch, "blue", layout(Options::new(blue)).queue_pairs(2));
    let (_red, mut b) = attach(switch, "red", layout(Options::new(red)));
    for _ in 0..3 {
        std::thread::sleep(Duration::from_millis(20)); // the workers sleep by now
        b[0].rx.forget_calls();
        let waiting = b[0].rx.arm();
        send(&mut a[0], 2, 1);
        assert!(waiting || b[0].rx.sleep(PATIENCE), "called");
        b[0].rx.disarm();
        receive(&mut b[0]);
        send(&mut b[0], 1, 2);
        receive(&mut a[0]);
    }
}

/// Memory that is not there yet, and memory that is taken away: the handler fills the one and patches the other.
pub(super) fn vanishing_memory(switch: &mut Switch) {
    for truncate in [false, true] {
        let (blue, red) = (switch.dir.join("blue"), switch.dir.join("red"));
        let (a, mut pairs) = attach(switch, "blue", Options::new(blue));
        let (_b, mut others) = attach(switch, "red", Options::new(red));
        let memory = a.memory().expect("attached").clone();
        if truncate {
            ftruncate(memory.fd(), 0).expect("truncated");
        } else {
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            fallocate(memory.fd(), flags, 0, memory.len()).expect("punched");
        }
        for _ in 0..4 {
            send(&mut others[0], 0xff, 3);
        }
        if truncate {
            drop(pairs);
            switch.wait("put out", |switch| {
                switch
                    .port("blue")
                    .is_some_and(|port| port.state != PortState::Forwarding)
            });
        } else {
            while pairs[0].rx.receive(|_| ()) > 0 {}
        }
        drop(a);
        switch.wait_state("blue", PortState::Listening);
    }
}

pub(super) fn operate(switch: &mut Switch) {
    let dir = switch.dir.display().to_string();
    switch.command(&format!(
        "port add vhost-user:green,socket={dir}/new/green,socket-mode=0600,socket-owner={}:{}",
        uid(),
        gid()
    ));
    let added = switch.command(&format!(
        "port add vhost-user:theirs,socket={dir}/theirs,mode=client"
    ));
    let connecting = format!("added port \"theirs\": connecting to {dir}/theirs\n");
    assert_eq!(added, connecting);
    // The container listens: found by inotify, connected to by descriptor.
    let theirs = Options::new(switch.dir.join("theirs")).listen();
    let (guest, pairs) = attach(switch, "theirs", theirs);
    for line in [
        "port list",
        "port list --json",
        "port show theirs",
        "port move theirs --worker 0",
        "fdb add 02:00:00:00:00:09 blue",
        "fdb show",
        "fdb del 02:00:00:00:00:09",
        "fdb flush",
        "stats",
        "stats --json",
        "port del green",
        "reload --dry-run",
        "reload",
        "version",
        "doctor --security",
        "doctor",
    ] {
        switch.command(line);
    }
    drop((guest, pairs));
    for path in [
        "/metrics",
        "/healthz",
        "/openapi.json",
        "/v1/config",
        "/v1/workers",
    ] {
        switch
            .client()
            .ask(hyper::Method::GET, path, Default::default())
            .expect(path);
    }
    // A socket that somebody removed is made anew; SIGHUP loads the file again.
    fs::remove_file(switch.dir.join("red")).expect("there");
    switch.wait("the socket is back", |switch| {
        switch.dir.join("red").exists()
    });
    let file = fs::read_to_string(switch.dir.join("r.toml")).expect("there");
    fs::write(
        switch.dir.join("r.toml"),
        file + &port(&switch.dir, "late", ""),
    )
    .expect("written");
    switch.signal(Signal::HUP);
    switch.wait_state("late", PortState::Listening);
    // Clients that make no sense.
    use std::io::Write;
    let mut rude = UnixStream::connect(switch.dir.join("api.sock")).expect("listens");
    let _ = rude.write_all(b"\0\0\0garbage\r\n\r\n");
}

/// An uplink behind a vfio-user socket, with a worker that sleeps and is woken by the device; its PF forgets it, its cable is pulled.
pub(super) fn uplink(switch: &mut Switch) {
    let policy = VfPolicy {
        trusted: true,
        spoof_check: false,
        ..VfPolicy::default()
    };
    let nic = Nic::new(vf_model::Config {
        pace: Pace::AtOnce,
        manual_clock: false,
        ..vf_model::Config::for_tests(vec![policy])
    });
    let (inner, wire) = Wire::pair().expect("a wire");
    serve::tend(nic.clone(), Some(inner)).expect("a thread");
    let path = switch.dir.join("vf0.sock");
    serve::serve_vf(nic.clone(), 0, &path).expect("served");
    switch.command(&format!(
        "port add ixgbevf:uplink,vfio-user={}",
        path.display()
    ));
    switch.wait_state("uplink", PortState::Forwarding);
    let (_blue, mut pairs) = attach(switch, "blue", Options::new(switch.dir.join("blue")));
    let mut greet = |switch: &mut Switch| {
        std::thread::sleep(Duration::from_millis(20)); // the worker sleeps by now
        send(&mut pairs[0], 0xff, 1);
        let mut buffer = [0; 2048];
        switch.wait("a frame on the wire", |_| {
            wire.receive(&mut buffer).is_some()
        });
        let own = [2, 0, 0, 0, 0, 1];
        switch.wait("registered", |_| nic.vf_state(0).macvlans.contains(&own));
        let frame = [&own[..], &[2, 0, 0, 0, 0, 9], &[0x88, 0xb5], &[7; 60]].concat();
        assert!(wire.send(&frame), "the wire took it");
        receive(&mut pairs[0]);
    };
    greet(switch);
    greet(switch);
    nic.reset_pf(Duration::from_millis(50));
    switch.wait("it started over", |switch| {
        let port = switch.port("uplink").expect("there");
        port.state == PortState::Forwarding
            && port.uplink.is_some_and(|uplink| uplink.restarts == 1)
    });
    greet(switch);
    nic.set_cable(false);
    switch.wait_state("uplink", PortState::Connected);
    nic.set_cable(true);
    switch.wait_state("uplink", PortState::Forwarding);
    greet(switch);
    for line in [
        "port show uplink",
        "port move uplink --worker 0",
        "port del uplink",
    ] {
        switch.command(line);
    }
    switch.wait("nothing mapped", |_| nic.mappings(0) == 0);
    let report = nic.report(0);
    assert!(
        report.faults.is_empty() && report.misuses.is_empty(),
        "{report:?}"
    );
}

/// To a port that nobody has any more. A program that a test beside this one starts holds copies of our descriptors until it is executed: the
/// last guest's connection may stay open for a moment after we closed it, and whoever comes meanwhile is sent away.
fn attach(switch: &mut Switch, name: &str, options: Options) -> (Guest, Vec<QueuePair>) {
    switch.wait("the port is free", |switch| {
        let free = [PortState::Listening, PortState::Connecting];
        switch
            .port(name)
            .is_some_and(|port| free.contains(&port.state))
    });
    let mut guest = Guest::new(options).expect("a guest");
    let pairs = guest.attach().expect("attached");
    switch.wait_state(name, PortState::Forwarding);
    (guest, pairs)
}

fn send(pair: &mut QueuePair, to: u8, from: u8) {
    let frame = [[2, 0, 0, 0, 0, to], [2, 0, 0, 0, 0, from]].concat();
    let frame: Vec<u8> = frame
        .into_iter()
        .chain([0x88, 0xb5])
        .chain([7; 60])
        .collect();
    let end = Instant::now() + PATIENCE;
    while pair.tx.send(1, |slot| {
        slot.write(0, &frame);
        frame.len()
    }) == 0
    {
        assert!(Instant::now() < end, "no room to send");
        std::thread::yield_now();
    }
}

fn receive(pair: &mut QueuePair) {
    let end = Instant::now() + PATIENCE;
    while pair.rx.receive(|_| ()) == 0 {
        assert!(Instant::now() < end, "nothing came");
        std::thread::yield_now();
    }
}

fn gid() -> u32 {
    rustix::process::getgid().as_raw()
}
