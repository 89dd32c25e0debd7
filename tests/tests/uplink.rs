//! Containers on the wire: a guest, the switch, our driver, a model of the NIC behind a vfio-user socket, and what is beyond it.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use ringway::control::config::Workers;
use ringway::control::metrics;
use ringway::control::spec::parse_port;
use ringway::control::state::{Direction, PortState, PortStatus, RingKind, WorkerStatus};
use testkit::topology::{BROADCAST, Net, PATIENCE, Station, frame, last_cpu};
use vf_model::{Config, InProcess, Nic, Pace, VfPolicy, Wire, serve};
use vfio_pmd::{Options, QueuePair, Vf};

/// Somebody beyond the wire.
const ELSEWHERE: [u8; 6] = [2, 0xEE, 0, 0, 0, 1];
/// The second VF of the port, which another driver has.
const PEER: [u8; 6] = [2, 0xBB, 0, 0, 0, 2];

/// A NIC of two VFs: the first is served for the switch, the wire's end is ours.
struct Lab {
    nic: Arc<Nic>,
    wire: Wire,
    dir: tempfile::TempDir,
}

fn trusted(mac: Option<[u8; 6]>) -> VfPolicy {
    VfPolicy {
        mac,
        trusted: true,
        spoof_check: false,
        ..VfPolicy::default()
    }
}

impl Lab {
    fn new(uplink: VfPolicy) -> Result<Lab> {
        let nic = Nic::new(Config {
            pace: Pace::AtOnce,
            manual_clock: false,
            ..Config::for_tests(vec![uplink, trusted(Some(PEER))])
        });
        let (inner, wire) = Wire::pair()?;
        serve::tend(nic.clone(), Some(inner))?;
        let dir = tempfile::tempdir()?;
        Ok(Lab { nic, wire, dir })
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("vf0.sock")
    }

    /// A switch with these guests' ports and the uplink.
    fn net(&self, names: &[&str], options: &str) -> Result<Net> {
        let text = format!(
            "ixgbevf:uplink,vfio-user={}{options}",
            self.socket().display()
        );
        let uplink = parse_port(&text, "test")?;
        Net::start(names, |config| config.ports.push(uplink))
    }

    /// The same, with the device there.
    fn up(&self, names: &[&str], options: &str) -> Result<Net> {
        serve::serve_vf(self.nic.clone(), 0, &self.socket())?;
        let net = self.net(names, options)?;
        net.wait_state("uplink", PortState::Forwarding)?;
        Ok(net)
    }

    /// The next frame on the wire that `wanted` likes.
    fn on_the_wire(&self, wanted: impl Fn(&[u8]) -> bool) -> Result<Vec<u8>> {
        let mut buffer = [0; 16 << 10];
        let mut found = None;
        until("a frame on the wire", || {
            found = self.wire.receive(&mut buffer).map(<[u8]>::to_vec);
            found.as_deref().is_some_and(&wanted)
        })?;
        found.context("just found")
    }

    /// Waits until the PF delivers a station's frames to the switch.
    fn registered(&self, mac: [u8; 6]) -> Result<()> {
        until("the station's registration", || {
            self.nic.vf_state(0).macvlans.contains(&mac)
        })
    }
}

fn until(what: &str, mut done: impl FnMut() -> bool) -> Result<()> {
    let end = Instant::now() + PATIENCE;
    while !done() {
        ensure!(Instant::now() < end, "{what}: waited in vain");
        std::thread::sleep(Duration::from_millis(2));
    }
    Ok(())
}

fn wait_status(net: &Net, what: &str, like: impl Fn(&PortStatus) -> bool) -> Result<PortStatus> {
    let mut status = net.port("uplink")?;
    until(what, || {
        status = net.port("uplink").expect("it is there");
        like(&status)
    })
    .with_context(|| format!("{status:?}"))?;
    Ok(status)
}

/// A broadcast out, an answer back.
fn greet(lab: &Lab, guest: &mut Station) -> Result<()> {
    let hello = frame(BROADCAST, guest.mac(), b"who is there?");
    guest.send(&hello)?;
    lab.on_the_wire(|frame| *frame == hello)?;
    lab.registered(guest.mac())?;
    let answer = frame(guest.mac(), ELSEWHERE, b"I am");
    ensure!(lab.wire.send(&answer), "the wire took it");
    while guest.receive()? != answer {}
    let thanks = frame(ELSEWHERE, guest.mac(), b"thanks");
    guest.send(&thanks)?;
    lab.on_the_wire(|frame| *frame == thanks)?;
    Ok(())
}

#[test]
fn a_container_talks_to_the_wire_and_is_registered_with_the_pf() -> Result<()> {
    let lab = Lab::new(trusted(None))?;
    let net = lab.up(&["blue", "red"], "")?;
    let [mut blue, mut red] = net.attach(["blue", "red"])?;
    greet(&lab, &mut blue)?;
    greet(&lab, &mut red)?;
    // Between containers nothing leaves.
    let inside = frame(red.mac(), blue.mac(), b"between us");
    blue.send(&inside)?;
    while red.receive()? != inside {}
    let uplink = net.port("uplink")?;
    ensure!(uplink.reason.is_none(), "{uplink:?}");
    ensure!(uplink.counters.received >= 2 && uplink.counters.sent >= 4);
    let report = lab.nic.report(0);
    ensure!(
        report.faults.is_empty() && report.misuses.is_empty(),
        "{report:?}"
    );
    Ok(())
}

#[test]
fn own_broadcasts_that_the_nic_sends_back_move_no_station() -> Result<()> {
    let lab = Lab::new(trusted(None))?;
    let net = lab.up(&["blue", "red"], "")?;
    let [mut blue, mut red] = net.attach(["blue", "red"])?;
    greet(&lab, &mut blue)?;
    for number in 0..20u8 {
        blue.send(&frame(BROADCAST, blue.mac(), &[number]))?;
    }
    until("echoes", || net.dropped("echo") >= 20)?;
    let to_blue = frame(blue.mac(), red.mac(), b"still there?");
    red.send(&to_blue)?;
    while blue.receive()? != to_blue {}
    let mut seen = 0;
    red.look();
    while let Ok(got) = red.receive() {
        ensure!(got[..6] == BROADCAST);
        seen += 1;
        if seen == 21 {
            break;
        }
    }
    red.expect_nothing()?;
    Ok(())
}

#[test]
fn a_driver_on_the_other_vf_is_reached_inside_the_nic() -> Result<()> {
    let lab = Lab::new(trusted(None))?;
    let net = lab.up(&["blue"], "")?;
    let [mut blue] = net.attach(["blue"])?;
    let mut vf = Vf::open(InProcess::open(&lab.nic, 1)?, &Options::default())?;
    let QueuePair { mut rx, mut tx } = vf.start()?.remove(0);
    blue.send(&frame(BROADCAST, blue.mac(), b"I am blue"))?;
    lab.registered(blue.mac())?;
    for number in 0..100u8 {
        blue.send(&frame(PEER, blue.mac(), &[number]))?;
        // The peer answers whatever is for it.
        let mut answered = false;
        until("the question at the peer", || {
            let frames = rx.lend(64);
            let count = frames.count();
            for got in frames.iter() {
                let mut bytes = vec![0; got.len() as usize];
                got.pieces()
                    .fold(0, |at, piece| at + piece.copy_to(&mut bytes[at..]));
                if bytes[..6] == PEER {
                    let answer = frame(blue.mac(), PEER, &bytes[14..]);
                    answered |= tx.push_bytes(&answer).is_ok();
                }
            }
            rx.give_back(count);
            tx.publish();
            answered
        })?;
        let answer = frame(blue.mac(), PEER, &[number]);
        while blue.receive()? != answer {}
    }
    Ok(())
}

#[test]
fn frames_the_pf_would_swallow_are_counted_and_short_ones_are_padded() -> Result<()> {
    let lab = Lab::new(trusted(None))?;
    let net = lab.up(&["blue"], "")?;
    let [mut blue] = net.attach(["blue"])?;
    let mut short = frame(ELSEWHERE, blue.mac(), b"");
    short.truncate(20);
    blue.send(&short)?;
    let got = lab.on_the_wire(|frame| frame[..14] == short[..14])?;
    ensure!(got.len() == 60 && got[20..].iter().all(|byte| *byte == 0));
    let before = net.dropped("tx_buffer_small");
    blue.send(&frame(ELSEWHERE, blue.mac(), &[1; 1501]))?;
    until("the drop", || net.dropped("tx_buffer_small") == before + 1)?;
    let longest = frame(ELSEWHERE, blue.mac(), &[2; 1500]);
    blue.send(&longest)?;
    lab.on_the_wire(|frame| *frame == longest)?;
    Ok(())
}

#[test]
fn long_frames_cross_in_several_buffers_where_the_pf_allows_them() -> Result<()> {
    let lab = Lab::new(trusted(None))?;
    lab.nic.set_port_policy(|port| port.mtu = 9000);
    let net = lab.up(&["blue"], ",mtu=9000")?;
    let mut blue = net.attach_as("blue", |options| options.frame_max(9014))?;
    greet(&lab, &mut blue)?;
    for len in [1500, 2034, 2035, 5000, 9000] {
        let out = frame(ELSEWHERE, blue.mac(), &vec![3; len]);
        blue.send(&out)?;
        lab.on_the_wire(|frame| *frame == out)?;
        let back = frame(blue.mac(), ELSEWHERE, &vec![4; len]);
        ensure!(lab.wire.send(&back));
        while blue.receive()? != back {}
    }
    Ok(())
}

#[test]
fn a_pulled_cable_and_a_reset_pf_pass_while_containers_go_on() -> Result<()> {
    let lab = Lab::new(trusted(None))?;
    let net = lab.up(&["blue", "a", "b"], "")?;
    let [mut blue, a, mut b] = net.attach(["blue", "a", "b"])?;
    b.send(&frame(BROADCAST, b.mac(), b"b is here"))?;
    let stream = net.stream(a, b);
    greet(&lab, &mut blue)?;
    for _ in 0..2 {
        lab.nic.set_cable(false);
        let down = wait_status(&net, "no link", |port| port.state == PortState::Connected)?;
        ensure!(down.reason.is_some_and(|why| why.contains("no link")));
        lab.nic.set_cable(true);
        net.wait_state("uplink", PortState::Forwarding)?;
        greet(&lab, &mut blue)?;
        lab.nic.reset_pf(Duration::from_millis(200));
        wait_status(&net, "the loss noticed", |port| {
            port.state == PortState::Connecting
        })?;
        net.wait_state("uplink", PortState::Forwarding)?;
        greet(&lab, &mut blue)?;
        stream.wait_more()?;
    }
    stream.finish()
}

#[test]
fn refused_addresses_are_named_with_the_remedy() -> Result<()> {
    let lab = Lab::new(VfPolicy {
        mac: Some([2, 0xAA, 0, 0, 0, 9]),
        ..VfPolicy::default()
    })?;
    let net = lab.up(&["blue"], "")?;
    let [mut blue] = net.attach(["blue"])?;
    blue.send(&frame(BROADCAST, blue.mac(), b"hello"))?;
    let status = wait_status(&net, "the refusal", |port| {
        port.reason
            .as_ref()
            .is_some_and(|why| why.contains("refused"))
    })?;
    let why = status.reason.context("just seen")?;
    let mac = blue.mac().map(|byte| format!("{byte:02x}")).join(":");
    ensure!(
        why.contains(&mac) && why.contains("trust on and spoofchk off"),
        "{why}"
    );
    ensure!(status.state == PortState::Forwarding);
    let uplink = status.uplink.context("an uplink")?;
    let refused = uplink.refused.first().context("named alone too")?;
    ensure!(refused.mac.to_bytes() == blue.mac() && refused.remedy.contains("trust on"));
    ensure!(uplink.refusals >= 1 && uplink.registered == 0, "{uplink:?}");
    let text = metrics::encode(net.switch().stats(), &[net.port("uplink")?]);
    let line = r#"ringway_uplink_addresses_refused{port="uplink"} 1"#;
    ensure!(text.contains(line), "{text}");
    // The administrator does so, which costs the VF its leave to send; it comes back and is not refused any more.
    lab.nic.set_policy(0, |policy| {
        policy.trusted = true;
        policy.spoof_check = false;
    });
    lab.registered(blue.mac())?;
    let status = wait_status(&net, "no complaint", |port| {
        let registered = port.uplink.as_ref().map(|uplink| uplink.registered);
        port.state == PortState::Forwarding && port.reason.is_none() && registered == Some(1)
    })?;
    let now = status.uplink.context("an uplink")?;
    ensure!(now.refused.is_empty() && now.restarts == 1, "{now:?}");
    ensure!(now.refusals >= uplink.refusals, "what was counted stays");
    Ok(())
}

#[test]
fn stations_beyond_the_pool_of_addresses_are_refused_until_others_leave() -> Result<()> {
    let lab = Lab::new(trusted(None))?;
    let net = lab.up(&["blue", "red"], "")?;
    let [mut blue, mut red] = net.attach(["blue", "red"])?;
    // 128 addresses, of which the PF keeps 16 and one for each VF.
    for number in 0..120u8 {
        blue.send(&frame(BROADCAST, [2, 0, 0, 0, 7, number], b"one of many"))?;
    }
    let full = |port: &PortStatus| {
        let uplink = port.uplink.as_ref();
        uplink.is_some_and(|uplink| uplink.registered + uplink.refused.len() as u64 == 120)
    };
    let status = wait_status(&net, "a full pool", full)?;
    let uplink = status.uplink.context("an uplink")?;
    ensure!(
        uplink.registered == 110 && uplink.refused.len() == 10,
        "{uplink:?}"
    );
    ensure!(uplink.refused[0].remedy.contains("used up"), "{uplink:?}");
    ensure!(uplink.refusals >= 10);
    // The container leaves with its stations: there is room for another's.
    drop(blue);
    net.wait_state("blue", PortState::Listening)?;
    red.send(&frame(BROADCAST, [2, 0, 0, 0, 8, 1], b"a newcomer"))?;
    lab.registered([2, 0, 0, 0, 8, 1])?;
    wait_status(&net, "nobody refused", |port| {
        port.reason.is_none()
            && port
                .uplink
                .as_ref()
                .is_some_and(|uplink| uplink.refused.is_empty())
    })?;
    Ok(())
}

/// The uplink's queues are with the worker on this CPU, by its rows and by the worker's own list.
fn all_with(net: &Net, cpu: usize) -> Result<()> {
    let status = net.port("uplink")?;
    let inward = status
        .queues
        .iter()
        .filter(|queue| queue.direction.inward());
    ensure!(
        inward.map(|queue| queue.worker).eq([Some(cpu); 2]),
        "{status:?}"
    );
    let workers = net.switch().stats().workers;
    let polls = |worker: &WorkerStatus| {
        let queues = worker.queues.iter();
        queues.filter(|queue| queue.port == "uplink").count()
    };
    let polled: Vec<_> = workers
        .iter()
        .filter(|worker| polls(worker) > 0)
        .map(|worker| (worker.cpu, polls(worker)))
        .collect();
    ensure!(polled == [(cpu, 2)], "{workers:?}");
    Ok(())
}

#[test]
fn queues_are_shown_and_move_from_worker_to_worker() -> Result<()> {
    if last_cpu() == 0 {
        eprintln!("SKIPPED: one CPU has one worker");
        return Ok(());
    }
    let lab = Lab::new(trusted(None))?;
    serve::serve_vf(lab.nic.clone(), 0, &lab.socket())?;
    let text = format!(
        "ixgbevf:uplink,vfio-user={},queues=2",
        lab.socket().display()
    );
    let uplink = parse_port(&text, "test")?;
    let net = Net::start(&["blue"], |config| {
        config.ports.push(uplink);
        config.workers = Workers::Cpus(vec![0, last_cpu()]);
    })?;
    let status = net.wait_state("uplink", PortState::Forwarding)?;
    let rows = status.queues.iter();
    let rows = rows.map(|queue| (queue.pair, queue.direction, queue.worker.is_some()));
    ensure!(
        rows.eq([
            (0, Direction::ToWire, false),
            (0, Direction::FromWire, true),
            (1, Direction::ToWire, false),
            (1, Direction::FromWire, true)
        ]),
        "{status:?}"
    );
    let mut rows = status.queues.iter();
    ensure!(rows.all(|queue| queue.ring == RingKind::Nic && queue.size == 512 && queue.enabled));
    let [mut blue] = net.attach(["blue"])?;
    greet(&lab, &mut blue)?;
    for _ in 0..2 {
        for cpu in [0, last_cpu()] {
            for pair in 0..2 {
                net.switch().move_queue("uplink", pair, cpu)?;
            }
            greet(&lab, &mut blue)?;
            all_with(&net, cpu)?;
        }
        // Whoever starts over stays where he was put.
        lab.nic.reset_pf(Duration::from_millis(50));
        wait_status(&net, "the loss noticed", |port| {
            port.state == PortState::Connecting
        })?;
        net.wait_state("uplink", PortState::Forwarding)?;
        all_with(&net, last_cpu())?;
    }
    let rows = net.port("uplink")?.queues;
    let received: u64 = rows.iter().map(|queue| queue.counters.received).sum();
    ensure!(received >= 4, "rows count: {rows:?}");
    Ok(())
}

#[test]
fn a_device_that_is_not_there_is_a_sentence_and_is_found_when_it_comes() -> Result<()> {
    let lab = Lab::new(trusted(None))?;
    let net = lab.net(&["blue"], "")?;
    let [mut blue] = net.attach(["blue"])?;
    let status = wait_status(&net, "the sentence", |port| port.reason.is_some())?;
    ensure!(status.state == PortState::Connecting);
    ensure!(status.reason.is_some_and(|why| why.contains("vf0.sock")));
    serve::serve_vf(lab.nic.clone(), 0, &lab.socket())?;
    net.wait_state("uplink", PortState::Forwarding)?;
    greet(&lab, &mut blue)?;
    // The port goes and leaves nothing behind, and can come again.
    net.switch().del_port("uplink")?;
    until("nothing mapped", || lab.nic.mappings(0) == 0)?;
    let text = format!("ixgbevf:uplink,vfio-user={}", lab.socket().display());
    net.switch().add_port(parse_port(&text, "test")?)?;
    net.wait_state("uplink", PortState::Forwarding)?;
    greet(&lab, &mut blue)
}
