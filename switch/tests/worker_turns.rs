//! A worker with ports of memory: what one turn does with frames, without rings, sockets or guests.

use std::collections::VecDeque;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use ringway::dataplane::counters::{QueueCounters, Reason, WorkerCounters};
use ringway::dataplane::eth::Mac;
use ringway::dataplane::fdb::{Fdb, FdbSettings, Flush, Key};
use ringway::dataplane::mailbox::{Mailbox, QueueId, mailbox};
use ringway::dataplane::port_set::{Domain, Exit, PortId, Topology};
use ringway::dataplane::queue::TxQueue;
use ringway::dataplane::worker::{BYTE_BUDGET, FLOOD_BUDGET, Idle, RxSlot, Shared, Source, Worker};
use ringway::port::doze::Bed;
use ringway::port::mem::{FromVec, ToVec, Wire};
use ringway::port::shared;

const BROADCAST: [u8; 6] = [0xff; 6];

struct TestPort {
    into: Wire,
    out: Wire,
    rx: Arc<QueueCounters>,
    tx: Arc<QueueCounters>,
}

/// A worker on a thread of its own, with ports that are pairs of `Vec`s.
struct Rig {
    ports: Vec<TestPort>,
    mail: Mailbox,
    counters: Arc<WorkerCounters>,
    shared: Arc<Shared>,
    thread: Option<std::thread::JoinHandle<Vec<RxSlot>>>,
}

fn mac(station: u8) -> [u8; 6] {
    [2, 0, 0, 0, 0, station]
}

fn frame(to: [u8; 6], from: [u8; 6], payload: &[u8]) -> Vec<u8> {
    [&to[..], &from[..], &[0x08, 0x00], payload].concat()
}

impl Rig {
    /// One port per entry of `domains`; each takes at most `room` frames.
    fn new(domains: &[u16], room: usize) -> Rig {
        let shared = Arc::new(Shared {
            fdb: Fdb::new(FdbSettings::default()),
            seconds: 1.into(),
        });
        let (bed, bell) = Bed::new().unwrap();
        let (mail, slot) = mailbox(bell);
        let counters = Arc::<WorkerCounters>::default();
        let worker = Worker::new(
            0,
            shared.clone(),
            counters.clone(),
            slot,
            Idle::Poll,
            Box::new(bed),
        );
        let thread = std::thread::spawn(move || worker.run());
        let ports: Vec<TestPort> = domains
            .iter()
            .map(|_| TestPort {
                into: wire(),
                out: wire(),
                rx: Arc::default(),
                tx: Arc::default(),
            })
            .collect();
        drop(mail.show(topology(&ports, domains, room, 1)).unwrap());
        for (number, (port, domain)) in ports.iter().zip(domains).enumerate() {
            let source = Source {
                id: QueueId {
                    port: PortId(number as u16),
                    pair: 0,
                },
                domain: Domain(*domain),
                generation: 1,
                counters: port.rx.clone(),
                guard: None,
            };
            let queue = Box::new(FromVec::new(port.into.clone()));
            mail.attach(Box::new(RxSlot::new(source, queue))).unwrap();
        }
        Rig {
            ports,
            mail,
            counters,
            shared,
            thread: Some(thread),
        }
    }

    fn send(&self, port: usize, frames: impl IntoIterator<Item = Vec<u8>>) {
        self.ports[port].into.lock().unwrap().extend(frames);
    }

    /// Waits until the workers have taken every frame and are between two turns.
    fn settle(&self) {
        let until = Instant::now() + Duration::from_secs(20);
        while self
            .ports
            .iter()
            .any(|port| !port.into.lock().unwrap().is_empty())
        {
            assert!(
                Instant::now() < until,
                "the worker does not take its frames"
            );
            std::thread::yield_now();
        }
        let queue = QueueId {
            port: PortId(u16::MAX),
            pair: 0,
        };
        assert!(self.mail.detach(queue).unwrap().is_none()); // answered between two passes
    }

    fn received(&self, port: usize) -> Vec<Vec<u8>> {
        self.settle();
        self.ports[port].out.lock().unwrap().drain(..).collect()
    }

    fn dropped(&self, port: usize, reason: Reason) -> u64 {
        self.ports[port].rx.dropped(reason) + self.ports[port].tx.dropped(reason)
    }
}

impl Drop for Rig {
    /// Every test ends with balanced books.
    fn drop(&mut self) {
        if std::thread::panicking() {
            return;
        }
        self.settle();
        self.mail.stop();
        self.thread.take().unwrap().join().unwrap();
        let sum = |count: fn(&TestPort) -> u64| self.ports.iter().map(count).sum::<u64>();
        let dropped: u64 = Reason::ALL
            .iter()
            .map(|reason| {
                (0..self.ports.len())
                    .map(|port| self.dropped(port, *reason))
                    .sum::<u64>()
            })
            .sum();
        let (received, replicated) = (sum(|p| p.rx.frames()), sum(|p| p.rx.replicated()));
        let sent = sum(|p| p.tx.frames());
        assert_eq!(received + replicated, sent + dropped, "the ports' books");
        let mine = &self.counters;
        let dropped: u64 = Reason::ALL
            .iter()
            .map(|reason| mine.received.dropped(*reason))
            .sum();
        let (received, replicated) = (mine.received.frames(), mine.received.replicated());
        assert_eq!(
            received + replicated,
            mine.sent.load(Relaxed) + dropped,
            "the worker's books"
        );
    }
}

/// A picture of the ports, all in the hands of their `generation`-th owner.
fn topology(ports: &[TestPort], domains: &[u16], room: usize, generation: u16) -> Arc<Topology> {
    let exits = ports.iter().zip(domains).map(|(port, domain)| {
        let queue = shared::Shared::new(ToVec::new(port.out.clone(), room), port.tx.clone());
        let queues: Vec<Arc<dyn TxQueue>> = vec![Arc::new(queue)];
        Some(Exit {
            generation,
            domain: Domain(*domain),
            queues,
        })
    });
    Arc::new(Topology::new(exits.collect()))
}

fn wire() -> Wire {
    Arc::new(Mutex::new(VecDeque::new()))
}

#[test]
fn floods_unknown_unicast_to_all_but_ingress() {
    let rig = Rig::new(&[0, 0, 0], 1000);
    rig.send(0, [frame(mac(9), mac(1), b"hello")]);
    for port in [1, 2] {
        assert_eq!(rig.received(port), [frame(mac(9), mac(1), b"hello")]);
    }
    assert!(rig.received(0).is_empty());
    assert_eq!(rig.ports[0].rx.replicated(), 1);
}

#[test]
fn a_learnt_station_gets_its_frames_alone_and_in_order() {
    let rig = Rig::new(&[0, 0, 0], 1000);
    rig.send(1, [frame(BROADCAST, mac(1), b"here")]);
    rig.settle();
    let frames: Vec<_> = (0..500u16)
        .map(|i| frame(mac(1), mac(2), &i.to_be_bytes()))
        .collect();
    rig.send(0, frames.clone());
    assert_eq!(rig.received(1), frames);
    assert_eq!(rig.received(2).len(), 1, "only the broadcast");
}

#[test]
fn a_station_that_moves_is_found_at_its_new_port() {
    let rig = Rig::new(&[0, 0, 0], 1000);
    rig.send(1, [frame(BROADCAST, mac(1), b"")]);
    rig.settle();
    rig.send(2, [frame(BROADCAST, mac(1), b"")]);
    rig.settle();
    rig.received(1);
    rig.received(2);
    rig.send(0, [frame(mac(1), mac(2), b"to you")]);
    assert_eq!(rig.received(2), [frame(mac(1), mac(2), b"to you")]);
    assert!(rig.received(1).is_empty());
}

#[test]
fn bridges_never_see_each_other() {
    let rig = Rig::new(&[0, 0, 1, 1], 1000);
    rig.send(2, [frame(BROADCAST, mac(7), b"red")]);
    rig.settle();
    rig.send(
        0,
        [
            frame(mac(7), mac(1), b"blue"),
            frame(BROADCAST, mac(1), b"blue"),
        ],
    );
    assert_eq!(rig.received(1).len(), 2, "flooded in its own bridge");
    assert!(rig.received(2).is_empty());
    assert_eq!(rig.received(3), [frame(BROADCAST, mac(7), b"red")]);
}

#[test]
fn what_must_not_be_forwarded_is_dropped_under_its_name() {
    let rig = Rig::new(&[0, 0], 1000);
    rig.send(
        0,
        [
            frame(mac(2), [3, 0, 0, 0, 0, 1], b"group source"),
            frame(mac(2), [0; 6], b"no source"),
            frame([1, 0x80, 0xc2, 0, 0, 0x0e], mac(1), b"lldp"),
            vec![1; 13],
            Vec::new(),
            frame(mac(1), mac(1), b"to myself"),
        ],
    );
    assert!(rig.received(1).is_empty());
    assert_eq!(rig.dropped(0, Reason::SourceMulticast), 2);
    assert_eq!(rig.dropped(0, Reason::ReservedMac), 1);
    assert_eq!(rig.dropped(0, Reason::Runt), 2);
    assert_eq!(rig.dropped(0, Reason::Hairpin), 1);
}

#[test]
fn a_runt_teaches_nothing() {
    let rig = Rig::new(&[0, 0, 0], 1000);
    let station = [2, 0, 0, 0, 0, 0];
    rig.send(1, [frame(BROADCAST, station, b"")]);
    rig.settle();
    // Cut within its source, whose missing end would be zeros.
    let runt = frame(BROADCAST, [2, 0, 0, 0, 0, 9], b"")[..11].to_vec();
    rig.send(2, [runt, frame(BROADCAST, mac(3), b"")]);
    rig.settle();
    rig.received(1);
    rig.send(0, [frame(station, mac(1), b"to you")]);
    assert_eq!(rig.received(1), [frame(station, mac(1), b"to you")]);
    assert_eq!(rig.dropped(2, Reason::Runt), 1);
}

#[test]
fn a_flood_without_receivers_and_a_full_receiver_are_counted() {
    let alone = Rig::new(&[0], 10);
    alone.send(0, [frame(BROADCAST, mac(1), b"")]);
    alone.settle();
    assert_eq!(alone.dropped(0, Reason::NoDestination), 1);
    let small = Rig::new(&[0, 0], 10);
    small.send(0, (0..25).map(|_| frame(BROADCAST, mac(1), b"")));
    assert_eq!(small.received(1).len(), 10);
    assert_eq!(small.dropped(1, Reason::TxFull), 15);
}

#[test]
fn a_port_number_with_a_new_owner_gets_nothing_that_was_learnt_of_the_old_one() {
    let rig = Rig::new(&[0, 0, 0], 1000);
    let fdb = &rig.shared.fdb;
    let key = Key::new(Domain(0), Mac::from_bytes(mac(5)));
    fdb.learn(key, fdb.hash(key), PortId(1), 99, 1);
    rig.send(0, [frame(mac(5), mac(1), b"secret")]);
    assert_eq!(rig.received(2).len(), 1, "flooded like any unknown station");
    let key = Key::new(Domain(0), Mac::from_bytes(mac(6)));
    fdb.add_static(key, PortId(1), 99).unwrap();
    rig.send(0, [frame(mac(6), mac(1), b"secret")]);
    assert!(rig.received(2).is_empty());
    assert_eq!(rig.dropped(0, Reason::PortDown), 1);
}

#[test]
fn news_between_two_bursts_of_the_same_two_stations_counts_for_the_second() {
    let domains = [0; 4];
    let rig = Rig::new(&domains, 1000);
    let fdb = &rig.shared.fdb;
    let [here, there] = [2, 1].map(|station| Key::new(Domain(0), Mac::from_bytes(mac(station))));
    let announce = |port, station| {
        rig.send(port, [frame(BROADCAST, mac(station), b"")]);
        (0..4).for_each(|port| drop(rig.received(port)));
    };
    // Frames that ports 1 to 3 get of a burst from port 0.
    let burst = || {
        rig.send(0, (0..3u8).map(|n| frame(mac(1), mac(2), &[n])));
        [1, 2, 3].map(|port| rig.received(port).len())
    };
    announce(1, 1);
    assert_eq!([burst(), burst(), burst()], [[3, 0, 0]; 3]);
    announce(2, 1);
    assert_eq!([burst(), burst()], [[0, 3, 0]; 2], "moved");
    fdb.flush(Flush::All);
    assert_eq!([burst(), burst()], [[3, 3, 3]; 2], "flushed");
    fdb.add_static(there, PortId(3), 1).unwrap();
    assert_eq!([burst(), burst()], [[0, 0, 3]; 2], "static");
    fdb.remove(there);
    assert_eq!([burst(), burst()], [[3, 3, 3]; 2], "removed");
    announce(1, 1);
    assert_eq!([burst(), burst()], [[3, 0, 0]; 2], "back again");
    // The sender is heard elsewhere, and then here.
    announce(3, 2);
    assert_eq!([burst(), burst()], [[3, 0, 0]; 2]);
    let port = |key| fdb.lookup(key, fdb.hash(key)).unwrap().port;
    assert_eq!(port(here), PortId(0), "it has moved back");
    // A new second: the sender is heard once more, the receiver is not.
    rig.shared.seconds.store(20, Relaxed);
    assert_eq!([burst(), burst()], [[3, 0, 0]; 2]);
    assert_eq!(fdb.age(25, 10), 1);
    assert_eq!([burst(), burst()], [[3, 3, 3]; 2], "the receiver has aged");
    announce(1, 1);
    assert_eq!([burst(), burst()], [[3, 0, 0]; 2]);
    // The sender belongs to another port for good.
    fdb.add_static(here, PortId(3), 1).unwrap();
    assert_eq!([burst(), burst()], [[0, 0, 0]; 2]);
    assert_eq!(rig.dropped(0, Reason::Spoofed), 6);
    fdb.remove(here);
    assert_eq!([burst(), burst()], [[3, 0, 0]; 2]);
    // All ports have new owners.
    drop(
        rig.mail
            .show(topology(&rig.ports, &domains, 1000, 2))
            .unwrap(),
    );
    assert_eq!([burst(), burst()], [[3, 3, 3]; 2], "nothing is inherited");
}

#[test]
fn a_flood_to_a_thousand_ports_takes_several_turns_and_loses_nothing() {
    let rig = Rig::new(&[0; 1024], 1000);
    let frames = 200;
    rig.send(0, (0..frames).map(|i| frame(BROADCAST, mac(1), &[i as u8])));
    assert_eq!(rig.received(1).len(), frames);
    assert_eq!(rig.received(1023).len(), frames);
    let bursts = rig.counters.bursts.load(Relaxed);
    assert!(
        bursts as usize >= frames * 1023 / FLOOD_BUDGET,
        "{bursts} bursts: no turn may copy more than its budget"
    );
}

#[test]
fn long_frames_take_several_turns_flooded_or_not_and_none_is_lost() {
    let rig = Rig::new(&[0; 9], 1000);
    let (frames, len) = (64, 60_000);
    rig.send(1, [frame(BROADCAST, mac(2), b"here")]);
    rig.settle();
    for (to, copies) in [(mac(2), 1), (BROADCAST, 8)] {
        let before = rig.counters.bursts.load(Relaxed);
        rig.send(
            0,
            (0..frames).map(|i| frame(to, mac(1), &vec![i as u8; len])),
        );
        assert_eq!(rig.received(1).len(), frames);
        let bursts = rig.counters.bursts.load(Relaxed) - before;
        let least = (frames * len * copies) as u64 / BYTE_BUDGET;
        assert!(
            bursts >= least.min(frames as u64 / 2),
            "{bursts} bursts for {copies} copies each: no turn may copy more than its budget"
        );
    }
}

#[test]
fn an_idle_queue_wakes_up_and_a_detached_one_keeps_its_frames() {
    let rig = Rig::new(&[0, 0, 0], 1000);
    std::thread::sleep(Duration::from_millis(20)); // all queues are on the wheel
    rig.send(1, [frame(BROADCAST, mac(1), b"1")]);
    assert_eq!(rig.received(0).len(), 1);
    let queue = QueueId {
        port: PortId(1),
        pair: 0,
    };
    let slot = rig.mail.detach(queue).unwrap().expect("the worker has it");
    assert!(rig.mail.detach(queue).unwrap().is_none());
    rig.ports[1]
        .into
        .lock()
        .unwrap()
        .push_back(frame(BROADCAST, mac(1), b"2"));
    std::thread::sleep(Duration::from_millis(5));
    assert_eq!(
        rig.ports[1].into.lock().unwrap().len(),
        1,
        "nobody polls a detached queue"
    );
    rig.mail.attach(slot).unwrap();
    assert_eq!(rig.received(0).len(), 1);
}
