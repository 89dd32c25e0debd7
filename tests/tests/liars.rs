//! A lie costs the liar's port, and nobody else a frame: in every test an innocent pair streams frames meanwhile.

use std::io::Write as _;
use std::os::fd::AsFd as _;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use ringway::control::state::PortState;
use ringway::guest::Options;
use ringway::virtio::driver::Raw;
use ringway::virtio::ring::flag;
use rustix::fs::{FallocateFlags, fallocate, ftruncate};
use testkit::topology::{BROADCAST, Net, Station, Stream, frame};

/// Four ports: an innocent pair, already streaming, a liar, and somebody who sends to the liar.
struct Scene {
    net: Net,
    innocents: Stream,
    liar: Station,
    friend: Station,
}

fn scene(kind: impl FnOnce(Options) -> Options) -> Result<Scene> {
    let net = Net::with_ports(&["a", "b", "liar", "friend"])?;
    let [a, mut b, mut friend] = net.attach(["a", "b", "friend"])?;
    let mut liar = net.attach_as("liar", kind)?;
    b.send(&frame(BROADCAST, b.mac(), b"b is here"))?;
    let hello = frame(BROADCAST, liar.mac(), b"a liar is here");
    liar.send(&hello)?;
    friend.receive()?;
    friend.expect(&hello)?;
    liar.receive()?;
    net.settle()?;
    let innocents = net.stream(a, b);
    innocents.wait_more()?;
    Ok(Scene {
        net,
        innocents,
        liar,
        friend,
    })
}

impl Scene {
    /// The liar's port is down, for a reason that names the lie; the innocents lose nothing; an honest guest gets the port afterwards.
    fn costs_the_liar_its_port(self, word: &str) -> Result<()> {
        let Scene {
            net,
            innocents,
            mut liar,
            mut friend,
        } = self;
        let reason = net.wait_put_out("liar")?;
        ensure!(
            reason.contains(word),
            "the reason is {reason:?}, {word:?} was expected in it"
        );
        innocents.wait_more()?;
        liar.guest.vanish();
        drop(liar);
        let mut honest = net.attach_as("liar", |options| options)?;
        let hello = frame(BROADCAST, honest.mac(), b"an honest guest");
        honest.send(&hello)?;
        while friend.receive()? != hello {}
        innocents.finish()
    }
}

#[test]
fn memory_that_is_truncated_under_the_switch() -> Result<()> {
    for packed in [false, true] {
        let mut scene = scene(|options| if packed { options.packed() } else { options })?;
        let memory = scene.liar.guest.memory().context("attached")?.clone();
        ftruncate(memory.fd(), 0)?;
        // The rings are gone for the switch; the next look at them, or the next frame for the liar, shows it.
        let sent = frame(scene.liar.mac(), scene.friend.mac(), b"are you there?");
        scene.friend.send(&sent)?;
        scene.costs_the_liar_its_port("memory")?;
    }
    Ok(())
}

#[test]
fn a_hole_punched_into_memory_costs_nobody_else_a_frame() -> Result<()> {
    let mut scene = scene(|options| options)?;
    let memory = scene.liar.guest.memory().context("attached")?.clone();
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    fallocate(memory.fd(), flags, 0, memory.len())?;
    for _ in 0..32 {
        let sent = frame(scene.liar.mac(), scene.friend.mac(), b"are you there?");
        scene.friend.send(&sent)?;
    }
    scene.innocents.wait_more()?;
    scene.innocents.finish()?;
    scene.net.settle()
}

#[test]
fn a_call_descriptor_filled_to_the_brim_blocks_nobody() -> Result<()> {
    let mut scene = scene(|options| options)?;
    let rx = &mut scene.liar.pairs[0].rx;
    rx.arm();
    let call = rx.call().as_fd();
    // A write to a full eventfd blocks for ever, unless it is non-blocking: and that flag is the liar's to clear.
    let flags = rustix::fs::fcntl_getfl(call)?;
    rustix::fs::fcntl_setfl(call, flags - rustix::fs::OFlags::NONBLOCK)?;
    rustix::io::write(call, &(u64::MAX - 1).to_ne_bytes())?;
    for _ in 0..32 {
        let sent = frame(scene.liar.mac(), scene.friend.mac(), b"ring ring");
        scene.friend.send(&sent)?;
        scene.innocents.wait_more()?;
    }
    scene.net.switch().del_port("liar")?;
    scene.innocents.finish()?;
    scene.net.settle()
}

#[test]
fn half_a_message_is_waited_for_by_its_own_port_alone() -> Result<()> {
    for bytes in [
        &[1u8, 0, 0][..],
        &[1, 0, 0, 0, 1, 0, 0, 0, 8, 0, 0, 0],
        &[5, 0, 0, 0, 1, 0, 0, 0, 0xff, 0xff, 0xff, 0xff],
    ] {
        let scene = scene(|options| options)?;
        let link = scene.liar.guest.link().context("attached")?;
        let mut stream = link.stream();
        stream.write_all(bytes)?;
        scene.costs_the_liar_its_port("message")?;
    }
    Ok(())
}

/// A lie told in the liar's transmit ring, while the switch polls it.
type Lie = (&'static str, fn(&Raw<'_>), &'static str);

/// Puts a descriptor into the available ring.
fn offer(raw: &Raw<'_>, head: u16) {
    raw.set_avail(raw.avail_idx(), head);
    raw.set_avail_idx(raw.avail_idx().wrapping_add(1));
}

/// A split ring whose buffers come back in any order.
fn any_order(options: Options) -> Options {
    Options {
        in_order: false,
        ..options
    }
}

fn each_costs_its_port(lies: &[Lie], kind: fn(Options) -> Options) -> Result<()> {
    for (name, lie, word) in lies {
        let mut scene = scene(kind)?;
        let tx = &mut scene.liar.pairs[0].tx;
        lie(&tx.raw());
        tx.kick_anyway();
        scene.costs_the_liar_its_port(word).context(*name)?;
    }
    Ok(())
}

#[test]
fn lies_in_a_split_ring() -> Result<()> {
    let lies: [Lie; 5] = [
        (
            "an index far ahead",
            |raw| raw.set_avail_idx(raw.avail_idx().wrapping_add(5000)),
            "available index",
        ),
        (
            "a descriptor beyond the table",
            |raw| {
                offer(raw, 40_000);
            },
            "descriptor",
        ),
        (
            "a chain that bites its tail",
            |raw| {
                raw.set_desc(9, (raw.desc(0).0, 64, flag::NEXT, 9));
                offer(raw, 9);
            },
            "chain",
        ),
        (
            "a buffer to be written where one is to be read",
            |raw| {
                raw.set_desc(9, (raw.desc(0).0, 64, flag::WRITE, 0));
                offer(raw, 9);
            },
            "direction",
        ),
        (
            "an indirect table of a length that is none",
            |raw| {
                raw.set_desc(9, (raw.desc(0).0, 17, flag::INDIRECT, 0));
                offer(raw, 9);
            },
            "indirect",
        ),
    ];
    each_costs_its_port(&lies, any_order)
}

#[test]
fn lies_in_a_packed_ring() -> Result<()> {
    /// Available in the first lap.
    const AVAILABLE: u16 = flag::AVAIL;
    let lies: [Lie; 3] = [
        (
            "a chain around the whole ring",
            |raw| {
                // The first one last: the switch looks there.
                (2..1024)
                    .chain([0, 1])
                    .for_each(|n| raw.set_desc(n, (raw.desc(0).0, 64, n, AVAILABLE | flag::NEXT)))
            },
            "chain",
        ),
        (
            "a buffer to be written where one is to be read",
            |raw| raw.set_desc(1, (raw.desc(0).0, 64, 1, AVAILABLE | flag::WRITE)),
            "direction",
        ),
        (
            "an indirect table of a length that is none",
            |raw| raw.set_desc(1, (raw.desc(0).0, 17, 1, AVAILABLE | flag::INDIRECT)),
            "indirect",
        ),
    ];
    each_costs_its_port(&lies, Options::packed)
}

#[test]
fn lies_in_a_receive_ring_are_found_when_somebody_sends_to_it() -> Result<()> {
    let mut scene = scene(any_order)?;
    let raw = scene.liar.pairs[0].rx.raw();
    raw.set_avail_idx(raw.avail_idx().wrapping_add(9999));
    let sent = frame(scene.liar.mac(), scene.friend.mac(), b"for a broken ring");
    // The switch need not look at the index again before it has used the buffers it knows of.
    for _ in 0..1100 {
        scene.friend.send(&sent)?;
    }
    scene.costs_the_liar_its_port("available index")
}

#[test]
fn a_buffer_outside_the_memory_costs_that_frame_alone() -> Result<()> {
    let mut scene = scene(any_order)?;
    let raw = scene.liar.pairs[0].tx.raw();
    for (slot, address) in (0..).zip([0, 0x7fff_ffff_f000, u64::MAX - 10]) {
        raw.set_desc(100 + slot, (address, 100, 0, 0));
        offer(&raw, 100 + slot);
    }
    scene.liar.pairs[0].tx.kick_anyway();
    scene.net.count_sent(3);
    scene.innocents.finish()?;
    scene.net.settle()?;
    ensure!(
        scene.net.dropped("bad_address") == 3,
        "not counted as bad_address"
    );
    ensure!(
        scene.net.port("liar")?.state == PortState::Forwarding,
        "the port went down"
    );
    Ok(())
}

#[test]
fn a_guest_is_called_about_buffers_that_were_good_for_nothing() -> Result<()> {
    let mut scene = scene(any_order)?;
    let rx = &mut scene.liar.pairs[0].rx;
    let raw = rx.raw();
    // Every receive buffer is too small for a header even; only a guest that hears of them can bring better ones.
    for index in 0..1024 {
        let (at, _, flags, next) = raw.desc(index);
        raw.set_desc(index, (at, 4, flags, next));
    }
    rx.forget_calls();
    rx.arm();
    let sent = frame(scene.liar.mac(), scene.friend.mac(), b"anybody there?");
    scene.friend.send(&sent)?;
    ensure!(
        scene.liar.pairs[0].rx.sleep(Duration::from_secs(10)),
        "the guest sleeps for ever on a ring that holds nothing the switch can use"
    );
    scene.innocents.finish()?;
    scene.net.settle()
}
