//! `ringway-bench attach`: from connecting a container to its first frame.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use hdrhistogram::Histogram;

use super::{gather, own_switch, room_for, settle, with_ports};
use crate::interrupt;
use crate::load::fleet::Fleet;
use crate::load::frames::Frames;
use crate::load::frontends::{Frontends, Memory};
use crate::load::outcome::distribution;
use crate::load::session::Session;
use crate::load::sink::ANNOUNCEMENTS;
use crate::load::stream::{Stream, Target as To};
use crate::load::target::{self, Target};
use crate::load::times;
use crate::report::Output;
use crate::results::{Attach, Measurement, Saved};

/// Measures how long a container takes from connecting to its first frame, for the first of many and for the last.
///
/// The containers come one after the other; one that was there before sends broadcast frames all the time.
#[derive(Debug, clap::Args)]
pub(crate) struct AttachArgs {
    #[command(flatten)]
    target: Target,
    #[command(flatten)]
    frontends: Frontends,
    /// Numbers of containers
    #[arg(long, value_name = "NUMBER,...", value_delimiter = ',', default_value = "1,64,256", value_parser = clap::value_parser!(u16).range(1..=4000))]
    counts: Vec<u16>,
    #[command(flatten)]
    output: Output,
}

/// A container that has no frame after this has not attached.
const PATIENCE: Duration = Duration::from_secs(10);

/// Runs the subcommand.
pub(crate) fn run(options: &AttachArgs) -> Result<()> {
    target::for_each(&options.target, &options.output, |target| {
        own_switch(target, "attach")?;
        gather(&options.counts, |&count| {
            one(options, target, usize::from(count))
        })
    })
}

fn one(options: &AttachArgs, target: &Target, count: usize) -> Result<(Saved, String)> {
    room_for(count + 1);
    let target = with_ports(target, count + 1);
    let frames = Frames::plain(64);
    let small = Frontends {
        ring_size: options.frontends.ring_size.min(256),
        memory: Memory::Memfd,
        ..options.frontends.clone()
    };
    let mut session = Session::attached(&target, &small, &frames, Some(1))?;
    let sockets = match &session.started {
        Some(started) => started.switch.sockets()[1..].to_vec(),
        None => Vec::new(),
    };
    settle(&session)?;
    let mut hello = Stream::new(ANNOUNCEMENTS, 1, To::All, 1);
    let mut nanoseconds =
        Histogram::<u64>::new_with_bounds(1, 1 << 42, 3).context("a histogram")?;
    let (began, mut fleets, mut failed) = (Instant::now(), Vec::new(), 0);
    let mut ended = None;
    for (number, socket) in sockets.into_iter().enumerate() {
        session.progress(
            number as f64 / count as f64,
            &format!("container {number} of {count}"),
        );
        if let Err(why) = interrupt::check() {
            ended = Some(why);
            break;
        }
        let began = Instant::now();
        let mut fleet = Fleet::attach(&small, &[socket], &frames.lengths(), 64)?;
        match first_frame(&mut session, &mut hello, &mut fleet, began) {
            Some(time) => nanoseconds.saturating_record(time.as_nanos() as u64),
            None => failed += 1,
        }
        // Those that are there take their frames, as containers do.
        fleets.push(fleet);
        fleets
            .iter_mut()
            .for_each(|fleet| while fleet.look() > 0 {});
    }
    ensure!(!nanoseconds.is_empty(), "no container got a frame");
    let first_frame = distribution("attach", &nanoseconds, 1e9);
    let total_ms = began.elapsed().as_secs_f64() * 1e3;
    let mut text = format!(
        "{}: {} of {count} containers, {failed} failed, all in {total_ms:.1} ms\n{}\n",
        session.peer,
        fleets.len(),
        times(&first_frame)
    );
    if let Some(why) = &ended {
        text += &format!("  PARTIAL: {why:#}\n");
        let caveats = &mut session.saved.caveats;
        caveats.push(format!(
            "attach: {} of {count} containers: {why:#}",
            fleets.len()
        ));
    }
    session.saved.measurements.push(Measurement::Attach(Attach {
        peer: session.peer.clone(),
        ports: fleets.len() as u32,
        first_frame,
        total_ms,
        failed,
    }));
    fleets.into_iter().for_each(Fleet::detach);
    Ok((session.close(failed == 0 && ended.is_none()), text))
}

/// Broadcasts until the newcomer has a frame; says how long after `began` that was, unless it took too long.
fn first_frame(
    session: &mut Session,
    hello: &mut Stream,
    newcomer: &mut Fleet,
    began: Instant,
) -> Option<Duration> {
    loop {
        let tx = &mut session.fleet.lanes[0].queues[0].pair.tx;
        tx.send(1, |slot| hello.fill(slot, 64, 0, 0));
        if newcomer.look() > 0 {
            return Some(began.elapsed());
        }
        if began.elapsed() > PATIENCE {
            return None;
        }
        std::thread::sleep(Duration::from_micros(20));
    }
}
