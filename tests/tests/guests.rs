//! Our own guests against a backend that is not ours: DPDK's vhost library, as `dpdk-testpmd` hands frames over with it.

use std::io::Read as _;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use ringway::guest::{Guest, Options};
use testkit::require;
use testkit::skip::{hugepages, tool};
use testkit::testpmd::Config;
use testkit::topology::exchange;

fn kinds() -> Vec<(String, impl Fn(&Path) -> Options)> {
    let mut kinds = Vec::new();
    for bits in 0..16u32 {
        let [packed, in_order, mergeable, event_idx] = [0, 1, 2, 3].map(|bit| bits >> bit & 1 == 1);
        let kind = move |socket: &Path| {
            let options = Options {
                in_order,
                mergeable,
                event_idx,
                ..Options::new(socket)
            };
            if packed { options.packed() } else { options }
        };
        let name = format!(
            "packed {packed}, in_order {in_order}, mergeable {mergeable}, event_idx {event_idx}"
        );
        kinds.push((name, kind));
    }
    kinds
}

#[test]
fn guests_of_every_kind_exchange_frames_through_dpdks_vhost_library() -> Result<()> {
    require!(tool("dpdk-testpmd", "dpdk-dev"), hugepages(192));
    let dir = tempfile::tempdir()?;
    let [a, b] = ["a", "b"].map(|name| dir.path().join(name));
    let _backend = Config::vhost_io([&a, &b], 1).start()?;
    for (name, kind) in kinds() {
        let run = || -> Result<()> {
            let (mut one, mut two) = (Guest::new(kind(&a))?, Guest::new(kind(&b))?);
            let (mut ones, mut twos) = (one.attach()?.remove(0), two.attach()?.remove(0));
            exchange(&mut ones, &mut twos, 50_000, 64, 256)?;
            exchange(&mut twos, &mut ones, 5_000, 1514, 64)?;
            one.detach()?;
            two.detach()?;
            Ok(())
        };
        run().map_err(|error| error.context(name))?;
    }
    Ok(())
}

#[test]
fn nobody_there_nobody_coming_and_silence_are_sentences_within_their_deadlines() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let socket = dir.path().join("s");
    let hasty = |options: Options| Options {
        wait: Duration::from_millis(50),
        patience: Duration::from_millis(50),
        ..options
    };
    let began = Instant::now();
    let said = |options: Options| -> Result<String> {
        Ok(Guest::new(options)?
            .attach()
            .expect_err("there is no switch")
            .to_string())
    };
    let text = said(hasty(Options::new(&socket)))?;
    ensure!(text.contains("is the switch running"), "{text}");
    let text = said(hasty(Options::new(&socket).listen()))?;
    ensure!(text.contains("no switch connected within 50ms"), "{text}");
    ensure!(!socket.exists(), "a guest that left its socket behind");
    let listener = UnixListener::bind(&socket)?;
    let text = said(hasty(Options::new(&socket)))?;
    ensure!(text.contains("GET_FEATURES was not answered"), "{text}");
    let (mut stream, _) = listener.accept()?;
    let mut sent = Vec::new();
    stream.read_to_end(&mut sent)?;
    ensure!(
        sent.len() == 24,
        "SET_OWNER and GET_FEATURES are 24 bytes, not {}",
        sent.len()
    );
    ensure!(
        began.elapsed() < Duration::from_secs(2),
        "that took {:?}",
        began.elapsed()
    );
    Ok(())
}

#[test]
fn options_that_contradict_themselves_are_refused() {
    let with = |change: fn(Options) -> Options| change(Options::new("/nowhere"));
    let bad = [
        with(|o| o.ring_size(0)),
        with(|o| o.ring_size(300)),
        with(|o| o.packed().ring_size(32_769)),
        with(|o| o.queue_pairs(0)),
        with(|o| o.queue_pairs(17)),
        with(|o| Options {
            receive_buffer: 12,
            ..o
        }),
        with(|o| Options { frame_max: 0, ..o }),
        with(|o| {
            o.frame_max(65_535)
                .packed()
                .ring_size(32_768)
                .frame_max(65_536)
        }),
    ];
    for options in bad {
        assert!(Guest::new(options.clone()).is_err(), "{options:?}");
    }
}
