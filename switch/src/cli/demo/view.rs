//! What the demo shows: a line per second, and the summary.

use std::collections::BTreeMap;
use std::io::{IsTerminal as _, Write as _};
use std::time::Duration;

use hdrhistogram::Histogram;
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

use super::containers::Sample;
use super::{DemoArgs, Places, Stage};
use crate::cli::table::{Output, count};
use crate::control::state::StatsReport;

/// With less of their CPUs than this, switch and containers were disturbed.
const QUIET_PERCENT: f64 = 95.0;

/// About a second of it.
#[derive(Clone, Debug)]
pub(super) struct Second {
    seconds: f64,
    frames: u64,
    bytes: u64,
    /// Of the switch's workers.
    switched: u64,
    busy_cycles: u64,
    cycles: u64,
    latency: Histogram<u64>,
    tsc_hz: u64,
}

impl Second {
    pub(super) fn new(samples: &[Sample], before: &StatsReport, after: &StatsReport) -> Second {
        let workers =
            |stats: &StatsReport, what: fn(&crate::control::state::WorkerStatus) -> u64| {
                stats.workers.iter().map(what).sum::<u64>()
            };
        let grown = |what| workers(after, what).saturating_sub(workers(before, what));
        Second {
            seconds: samples
                .iter()
                .map(|sample| sample.time)
                .sum::<Duration>()
                .as_secs_f64(),
            frames: samples.iter().map(|sample| sample.received).sum(),
            bytes: samples.iter().map(|sample| sample.bytes).sum(),
            switched: grown(|worker| worker.counters.received),
            busy_cycles: grown(|worker| worker.busy_cycles),
            cycles: grown(|worker| worker.cycles),
            latency: sum(samples.iter().map(|sample| &sample.latency)),
            tsc_hz: after.tsc_hz,
        }
    }

    /// All of them as one; nothing if no frame came in any.
    pub(super) fn whole(seconds: &[Second]) -> Option<Rate> {
        let last = seconds.last()?;
        seconds.iter().find(|second| second.frames > 0)?;
        let total = |what: fn(&Second) -> u64| seconds.iter().map(what).sum();
        let whole = Second {
            seconds: seconds.iter().map(|second| second.seconds).sum(),
            frames: total(|second| second.frames),
            bytes: total(|second| second.bytes),
            switched: total(|second| second.switched),
            busy_cycles: total(|second| second.busy_cycles),
            cycles: total(|second| second.cycles),
            latency: sum(seconds.iter().map(|second| &second.latency)),
            tsc_hz: last.tsc_hz,
        };
        Some(whole.rate())
    }

    fn rate(&self) -> Rate {
        let micros = |quantile| {
            self.latency.value_at_quantile(quantile) as f64 * 1e6 / self.tsc_hz.max(1) as f64
        };
        let per = |part: u64, whole: u64| {
            if whole == 0 {
                0.0
            } else {
                part as f64 / whole as f64
            }
        };
        let seconds = self.seconds.max(1e-9);
        Rate {
            seconds: self.seconds,
            frames: self.frames,
            mpps: self.frames as f64 / seconds / 1e6,
            gbit_per_second: self.bytes as f64 * 8.0 / seconds / 1e9,
            cycles_per_frame: per(self.busy_cycles, self.switched),
            busy_percent: 100.0 * per(self.busy_cycles, self.cycles),
            latency_us: Percentiles {
                p50: micros(0.5),
                p99: micros(0.99),
                p99_9: micros(0.999),
            },
        }
    }
}

fn sum<'a>(parts: impl Iterator<Item = &'a Histogram<u64>>) -> Histogram<u64> {
    let mut whole: Option<Histogram<u64>> = None;
    for part in parts {
        match &mut whole {
            None => whole = Some(part.clone()),
            Some(whole) => whole.add(part).expect("all have the same bounds"),
        }
    }
    whole.unwrap_or_else(|| Histogram::new(2).expect("two digits are allowed"))
}

/// How fast.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Rate {
    seconds: f64,
    frames: u64,
    mpps: f64,
    gbit_per_second: f64,
    /// TSC cycles of the switch per frame, while it has any.
    cycles_per_frame: f64,
    /// Of the switch's CPU.
    busy_percent: f64,
    latency_us: Percentiles,
}

/// Microseconds from one container's send call to another's receive call.
#[derive(Clone, Debug, Serialize)]
struct Percentiles {
    p50: f64,
    p99: f64,
    #[serde(rename = "p99.9")]
    p99_9: f64,
}

/// What went in must have come out, or be counted under a reason.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Books {
    pub(super) received: u64,
    pub(super) replicated: u64,
    pub(super) sent: u64,
    pub(super) dropped: u64,
    pub(super) reasons: BTreeMap<String, u64>,
    /// The same, counted by the containers.
    pub(super) containers_sent: u64,
    pub(super) containers_received: u64,
}

impl Books {
    fn balance(&self) -> bool {
        self.received + self.replicated == self.sent + self.dropped
            && self.received == self.containers_sent
            && self.sent == self.containers_received
    }
}

/// How it went.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Summary {
    pub(super) containers: u16,
    pub(super) frame_size: u32,
    pub(super) rings: &'static str,
    pub(super) switch_cpu: usize,
    pub(super) containers_cpu: usize,
    pub(super) interrupted: bool,
    /// Of the CPUs of switch and containers: less than all means that other programs slowed them down.
    pub(super) cpu_percent: f64,
    pub(super) load: Option<Rate>,
    pub(super) one_at_a_time: Option<Rate>,
    pub(super) sent: u64,
    pub(super) received: u64,
    pub(super) verified: u64,
    pub(super) lost: u64,
    pub(super) corrupted: u64,
    pub(super) duplicated: u64,
    pub(super) reordered: u64,
    pub(super) foreign: u64,
    pub(super) books: Books,
}

impl Summary {
    /// True if every frame came unchanged, once, or was counted as dropped.
    pub(super) fn fine(&self) -> bool {
        self.books.balance() && self.corrupted + self.duplicated + self.foreign == 0
    }

    pub(super) fn text(&self) -> String {
        let mut lines = vec![String::new()];
        if self.interrupted {
            lines.push("Ended early.".to_owned());
        }
        if let Some(load) = &self.load {
            lines.push(format!(
                "Under load     {:.1} Mpps, {:.1} Gbit/s; the switch spent {:.0} TSC cycles per frame and was {:.0} % busy",
                load.mpps, load.gbit_per_second, load.cycles_per_frame, load.busy_percent
            ));
            lines.push(format!(
                "               latency {}, queueing included",
                load.latency_us.text()
            ));
        }
        if let Some(quiet) = &self.one_at_a_time {
            lines.push(format!(
                "One at a time  latency {}, container to container",
                quiet.latency_us.text()
            ));
        }
        lines.push(format!(
            "Frames         {} sent, {} received; {} lost, {} corrupted, {} duplicated, {} reordered; content of {} compared",
            count(self.sent),
            count(self.received),
            count(self.lost),
            count(self.corrupted),
            count(self.duplicated),
            count(self.reordered),
            if self.verified == self.received { "all".to_owned() } else { count(self.verified) }
        ));
        lines.push(self.books_text());
        if self.cpu_percent < QUIET_PERCENT {
            lines.push(format!(
                "Caution        other programs took {:.0} % of the CPUs meanwhile: rates are lower and latencies higher than on a quiet machine",
                100.0 - self.cpu_percent
            ));
        }
        lines.push(String::new());
        if self.fine() {
            // As it was typed: `cargo run` names the binary below `target`.
            let program = std::env::args()
                .next()
                .unwrap_or_else(|| "ringway".to_owned());
            lines.push("Next, a switch for containers of your own (README.md has the docker and testpmd lines):".to_owned());
            lines.push(format!(
                "  {program} --api /tmp/ringway.sock run --port vhost-user:blue,socket=/tmp/blue.sock --port vhost-user:red,socket=/tmp/red.sock"
            ));
            lines.push(format!(
                "And what this host could do better for it: {program} doctor"
            ));
        } else {
            lines.push("THIS IS A BUG: frames came changed, or went without being counted. Please report it with these lines.".to_owned());
        }
        lines.join("\n") + "\n"
    }

    fn books_text(&self) -> String {
        let books = &self.books;
        let [received, replicated, sent, dropped] =
            [books.received, books.replicated, books.sent, books.dropped].map(count);
        let mut text = format!(
            "Books          {received} received + {replicated} replicated = {sent} sent + {dropped} dropped: "
        );
        for (reason, frames) in &books.reasons {
            text += &format!("{} {reason}, ", count(*frames));
        }
        text += if books.balance() {
            "they balance"
        } else {
            "THEY DO NOT BALANCE"
        };
        if !books.balance() {
            text += &format!(
                " (the containers sent {} and received {})",
                count(books.containers_sent),
                count(books.containers_received)
            );
        }
        text
    }
}

impl Percentiles {
    fn text(&self) -> String {
        format!(
            "p50 {} µs, p99 {} µs, p99.9 {} µs",
            short(self.p50),
            short(self.p99),
            short(self.p99_9)
        )
    }
}

/// Three digits or so.
fn short(number: f64) -> String {
    let digits = if number < 10.0 {
        2
    } else {
        usize::from(number < 100.0)
    };
    format!("{number:.digits$}")
}

/// The demo while it runs.
pub(super) struct Live {
    bar: Option<ProgressBar>,
    silent: bool,
}

impl Live {
    /// Says what will be shown.
    pub(super) fn new(args: &DemoArgs, places: Places, output: Output) -> Live {
        let silent = output.is_json();
        let terminal = std::io::stdout().is_terminal() && !silent;
        let bar = terminal.then(|| {
            let style = ProgressStyle::with_template("{bar:30} {msg}")
                .unwrap_or(ProgressStyle::default_bar());
            let millis = (args.seconds * 1000.0) as u64;
            ProgressBar::with_draw_target(Some(millis), indicatif::ProgressDrawTarget::stdout())
                .with_style(style)
        });
        let live = Live { bar, silent };
        live.line(&format!(
            "{} containers in this process exchange {}-byte frames through the switch, each with its neighbour: real vhost-user sockets,\n\
             {} rings in plain memory; no root, no hugepages. Sequence and content of the frames are checked.",
            args.ports,
            args.frame_size,
            if args.packed { "packed" } else { "split" },
        ));
        live.line(&match places.containers {
            Some(cpu) => format!(
                "The switch polls on CPU {}, all containers share CPU {cpu}: the rate is as much theirs as the switch's.\n",
                places.switch
            ),
            None => format!(
                "There is one CPU only ({}): switch and containers take turns on it, so rate and latency are the scheduler's.\n",
                places.switch
            ),
        });
        live.line("  time     Mpps   Gbit/s   cycles/frame   busy     p50 µs   p99 µs   p99.9 µs");
        live
    }

    fn line(&self, text: &str) {
        if self.silent {
            return;
        }
        match &self.bar {
            Some(bar) => bar.println(text),
            // A reader that has gone away is no reason to stop.
            None => drop(writeln!(std::io::stdout(), "{text}")),
        }
    }

    /// Between the lines.
    pub(super) fn tick(&self, elapsed: Duration, sample: &Sample) {
        if let Some(bar) = &self.bar {
            bar.set_position(elapsed.as_millis() as u64);
            let mpps = sample.received as f64 / sample.time.as_secs_f64().max(1e-9) / 1e6;
            bar.set_message(format!("{mpps:.1} Mpps"));
        }
    }

    /// A line.
    pub(super) fn second(&mut self, elapsed: Duration, stage: Stage, second: &Second) {
        let rate = second.rate();
        let latency = &rate.latency_us;
        self.line(&format!(
            "{:>4.1} s  {:>7.2}  {:>7.2}  {:>13.0}  {:>3.0} %  {:>9}{:>9}{:>11}{}",
            elapsed.as_secs_f64(),
            rate.mpps,
            rate.gbit_per_second,
            rate.cycles_per_frame,
            rate.busy_percent,
            short(latency.p50),
            short(latency.p99),
            short(latency.p99_9),
            if stage == Stage::Quiet {
                "   one frame at a time"
            } else {
                ""
            }
        ));
    }

    /// The lines stay, the bar goes.
    pub(super) fn end(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
