//! Guests that are killed and come back, switches that are restarted: in both socket roles, and nobody else loses a frame.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use ringway::control::config::Config;
use ringway::control::state::{PortState, SocketMode};
use ringway::guest::{Guest, Options};
use testkit::topology::{BROADCAST, Net, Station, Stream, frame};

/// Ports in client mode: the guest listens, the switch connects, and connects again.
fn guests_listen(config: &mut Config) {
    for port in &mut config.ports {
        port.mode = SocketMode::Client;
    }
}

/// Each kind of ring.
const KINDS: [(&str, fn(Options) -> Options); 2] = [("split", |o| o), ("packed", Options::packed)];

/// Two innocents streaming, one that comes and goes, and a friend of it.
fn scene(listen: bool, kind: fn(Options) -> Options) -> Result<(Net, Stream, Station, Station)> {
    let kind = |options: Options| kind(if listen { options.listen() } else { options });
    let net = Net::start(&["a", "b", "guest", "friend"], |config| {
        if listen {
            guests_listen(config);
        }
    })?;
    let mut b = net.attach_as("b", kind)?;
    let a = net.attach_as("a", kind)?;
    b.send(&frame(BROADCAST, b.mac(), b"b is here"))?;
    net.settle()?;
    let [guest, friend] = ["guest", "friend"].map(|name| net.attach_as(name, kind));
    let stream = net.stream(a, b);
    stream.wait_more()?;
    Ok((net, stream, guest?, friend?))
}

/// A frame each way; the first one is flooded and teaches the switch where the sender is.
fn greet(one: &mut Station, other: &mut Station) -> Result<()> {
    for (from, to) in [(0, 1), (1, 0)] {
        let pair = [&mut *one, &mut *other];
        let sent = frame(pair[to].mac(), pair[from].mac(), b"hello again");
        pair[from].send(&sent)?;
        while pair[to].receive()? != sent {}
    }
    Ok(())
}

#[test]
fn a_killed_guest_comes_back_and_its_neighbours_lose_nothing() -> Result<()> {
    for listen in [false, true] {
        for (name, kind) in KINDS {
            let run = || -> Result<()> {
                let (net, stream, mut guest, mut friend) = scene(listen, kind)?;
                for _ in 0..5 {
                    greet(&mut guest, &mut friend)?;
                    guest.guest.vanish();
                    if !listen {
                        // One that listens may have the switch's next connection in its backlog at once.
                        net.wait_state("guest", PortState::Listening)?;
                    }
                    stream.wait_more()?;
                    guest.attach_again()?;
                    net.wait_state("guest", PortState::Forwarding)?;
                }
                greet(&mut guest, &mut friend)?;
                stream.finish()?;
                net.settle()
            };
            run().with_context(|| format!("guest listens: {listen}, {name}"))?;
        }
    }
    Ok(())
}

#[test]
fn a_guest_that_leaves_in_order_can_come_back_as_another_kind() -> Result<()> {
    let (net, stream, mut guest, mut friend) = scene(false, |options| options)?;
    for options in [
        Options::new(net.socket("guest")).packed(),
        Options::new(net.socket("guest")).ring_size(64),
        Options {
            mergeable: false,
            in_order: false,
            ..Options::new(net.socket("guest"))
        },
    ] {
        greet(&mut guest, &mut friend)?;
        guest.guest.detach()?;
        net.wait_state("guest", PortState::Listening)?;
        guest.guest = Guest::new(options)?;
        guest.attach_again()?;
        net.wait_state("guest", PortState::Forwarding)?;
    }
    greet(&mut guest, &mut friend)?;
    stream.finish()?;
    net.settle()
}

#[test]
fn frames_for_a_guest_that_is_away_are_dropped_under_a_name_and_its_station_is_forgotten()
-> Result<()> {
    let (net, stream, mut guest, mut friend) = scene(false, |options| options)?;
    greet(&mut guest, &mut friend)?;
    guest.guest.vanish();
    net.wait_state("guest", PortState::Listening)?;
    let sent = frame(guest.mac(), friend.mac(), b"where are you?");
    friend.send(&sent)?;
    stream.wait_more()?;
    guest.attach_again()?;
    net.wait_state("guest", PortState::Forwarding)?;
    greet(&mut friend, &mut guest)?;
    stream.finish()?;
    net.settle()
}

#[test]
fn a_switch_that_is_restarted_goes_on_with_the_rings_of_a_listening_guest() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let socket = |name: &str| dir.path().join(name);
    let config = |config: &mut Config| {
        guests_listen(config);
        config.ports[0].socket = socket("one");
        config.ports[1].socket = socket("two");
    };
    let mut net = Net::start(&["one", "two"], config)?;
    let [mut one, mut two] =
        ["one", "two"].map(|name| net.attach_at(name, Options::new(socket(name)).listen()));
    let (one, two) = (
        one.as_mut().map_err(|e| anyhow::anyhow!("{e:#}"))?,
        two.as_mut().map_err(|e| anyhow::anyhow!("{e:#}"))?,
    );
    for round in 0..3 {
        // Far enough that no ring stands where it began.
        for _ in 0..300 {
            greet(one, two)?;
        }
        net.settle()?;
        drop(net);
        ensure!(
            !one.guest.connected() && !two.guest.connected(),
            "a switch that ended holds on to its guests"
        );
        net = Net::start(&["one", "two"], config)?;
        for station in [&mut *one, &mut *two] {
            station
                .guest
                .resume()
                .with_context(|| format!("round {round}"))?;
            net.adopt(station);
        }
        net.wait_state("one", PortState::Forwarding)?;
        net.wait_state("two", PortState::Forwarding)?;
    }
    greet(one, two)?;
    net.settle()
}

#[test]
fn memory_that_is_shared_again_and_rings_that_pause_lose_only_their_own_frames() -> Result<()> {
    for (name, kind) in KINDS {
        let (net, stream, mut guest, mut friend) = scene(false, kind)?;
        for _ in 0..20 {
            // DPDK, taking further hugepages: stop, share, go on, at the same places in the rings.
            guest.guest.enable(0, false)?;
            guest.guest.share_again()?;
            guest.guest.enable(0, true)?;
            greet(&mut guest, &mut friend).context(name)?;
            guest.guest.share_again()?;
            greet(&mut guest, &mut friend).context(name)?;
        }
        stream.finish()?;
        net.settle()?;
    }
    Ok(())
}

#[test]
fn a_switch_appears_long_after_the_guest_that_listens_for_it() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let socket = dir.path().join("late");
    let mut guest = Guest::new(Options::new(&socket).listen())?;
    let waiting = std::thread::spawn(move || guest.attach().map(|_| guest));
    std::thread::sleep(Duration::from_millis(300));
    let net = Net::start(&["late"], |config| {
        guests_listen(config);
        config.ports[0].socket = socket.clone();
    })?;
    let guest = waiting
        .join()
        .map_err(|_| anyhow::anyhow!("it panicked"))??;
    net.wait_state("late", PortState::Forwarding)?;
    ensure!(guest.connected(), "attached, but not connected");
    Ok(())
}
