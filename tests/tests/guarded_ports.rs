//! Ports with limits: what a guest may not do to others beyond sending them frames, each drop under its name.

use anyhow::{Result, ensure};
use ringway::control::config::Config;
use ringway::control::state::PortSpec;
use ringway::dataplane::eth::Mac;
use testkit::topology::{BROADCAST, Net, frame};

const GATEWAY: [u8; 6] = [2, 0, 0, 0, 0, 0xfe];

fn mac(number: u16) -> [u8; 6] {
    let [high, low] = number.to_be_bytes();
    [2, 0, 0, 1, high, low]
}

fn limit(config: &mut Config, name: &str, change: impl FnOnce(&mut PortSpec)) {
    let port = config.ports.iter_mut().find(|port| port.name == name);
    change(port.expect("a port of this net"));
}

#[test]
fn a_port_with_a_lock_sends_from_its_own_addresses_alone() -> Result<()> {
    let net = Net::start(&["a", "b", "x"], |config| {
        limit(config, "x", |x| {
            x.mac = [mac(1), mac(2)].map(Mac::from_bytes).to_vec()
        })
    })?;
    let [mut a, mut b, mut x] = net.attach(["a", "b", "x"])?;
    let hello = frame(BROADCAST, a.mac(), b"a is here");
    a.send(&hello)?;
    b.expect(&hello)?;
    x.expect(&hello)?;
    // As a, as the gateway, as somebody new: each is dropped, and nobody is learnt at x.
    for posing in [a.mac(), GATEWAY, mac(3)] {
        x.send(&frame(b.mac(), posing, b"I am somebody else"))?;
    }
    for own in [mac(1), mac(2)] {
        let honest = frame(BROADCAST, own, b"I am me");
        x.send(&honest)?;
        a.expect(&honest)?;
        b.expect(&honest)?;
    }
    let to_a = frame(a.mac(), b.mac(), b"still there?");
    b.send(&to_a)?;
    a.expect(&to_a)?;
    net.settle()?;
    a.expect_nothing()?;
    b.expect_nothing()?;
    x.expect_nothing()?;
    ensure!(
        net.dropped("spoofed") == 3,
        "{} dropped as spoofed",
        net.dropped("spoofed")
    );
    Ok(())
}

#[test]
fn nobody_else_may_pose_as_the_guest_of_a_locked_port() -> Result<()> {
    let net = Net::start(&["a", "b", "x"], |config| {
        limit(config, "a", |a| a.mac = vec![Mac::from_bytes(mac(1))])
    })?;
    let [mut a, mut b, mut x] = net.attach(["a", "b", "x"])?;
    // Before its guest has said a word.
    x.send(&frame(b.mac(), mac(1), b"I am a"))?;
    let to_a = frame(mac(1), b.mac(), b"for a");
    b.send(&to_a)?;
    a.expect(&to_a)?;
    net.settle()?;
    x.expect_nothing()?;
    b.expect_nothing()?;
    ensure!(
        net.dropped("spoofed") == 1,
        "{} dropped as spoofed",
        net.dropped("spoofed")
    );
    Ok(())
}

#[test]
fn a_port_has_no_more_stations_than_it_may() -> Result<()> {
    let net = Net::start(&["a", "x"], |config| limit(config, "x", |x| x.stations = 4))?;
    let [mut a, mut x] = net.attach(["a", "x"])?;
    for number in 0..20 {
        x.send(&frame(a.mac(), mac(number), b"one more"))?;
        x.send(&frame(a.mac(), mac(0), b"the first one is heard on"))?;
    }
    for _ in 0..24 {
        a.receive()?;
    }
    net.settle()?;
    a.expect_nothing()?;
    ensure!(
        net.dropped("station_limit") == 16,
        "{}",
        net.dropped("station_limit")
    );
    Ok(())
}

#[test]
fn stations_of_others_move_no_faster_than_they_may() -> Result<()> {
    let net = Net::start(&["a", "b", "x"], |config| {
        limit(config, "x", |x| x.moves = 2)
    })?;
    let [mut a, mut b, mut x] = net.attach(["a", "b", "x"])?;
    for number in 0..40 {
        a.send(&frame(b.mac(), mac(number), b"mine"))?;
    }
    net.settle()?;
    for number in 0..40 {
        x.send(&frame(b.mac(), mac(number), b"no, mine"))?;
    }
    net.settle()?;
    // The clock may have moved on once or twice meanwhile.
    let refused = net.dropped("move_limit");
    ensure!((30..=38).contains(&refused), "{refused}");
    drop(b.receive()?);
    Ok(())
}

#[test]
fn a_port_floods_no_more_than_it_may_and_what_it_sends_to_one_is_not_counted() -> Result<()> {
    let net = Net::start(&["a", "b", "x"], |config| {
        limit(config, "x", |x| x.floods = 10)
    })?;
    let [mut a, mut b, mut x] = net.attach(["a", "b", "x"])?;
    a.send(&frame(BROADCAST, a.mac(), b"a is here"))?;
    x.receive()?;
    b.receive()?;
    for number in 0..100 {
        let to = if number % 2 == 0 { BROADCAST } else { GATEWAY };
        x.send(&frame(to, x.mac(), b"to all"))?;
        x.send(&frame(a.mac(), x.mac(), b"to a"))?;
    }
    net.settle()?;
    let refused = net.dropped("flood_limit");
    ensure!((70..=90).contains(&refused), "{refused}");
    let mut to_b = 0;
    b.look();
    while b.expect_nothing().is_err() {
        b.receive()?;
        to_b += 1;
    }
    ensure!(to_b == 100 - refused, "{to_b} came, {refused} were dropped");
    for _ in 0..100 + to_b {
        a.receive()?;
    }
    a.expect_nothing()
}
