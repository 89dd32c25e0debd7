//! `ringway stats`.

use std::thread::sleep;
use std::time::Duration;

use clap::Args;

use super::client::Client;
use super::table::{Output, count, duration, table};
use crate::control::state::{Counters, StatsReport, WorkerStatus};

/// How to show counters.
#[derive(Debug, Args)]
#[command(after_help = "\
Over all ports, and over each worker: received + replicated = sent + dropped. `replicated` are the extra copies of flooded frames.

Examples:
  ringway stats
  ringway stats --watch
  ringway stats --json | jq .total")]
pub(super) struct StatsArgs {
    /// Show rates, again and again, every so many seconds.
    #[arg(long, value_name = "SECONDS", num_args = 0..=1, default_missing_value = "1",
        value_parser = clap::value_parser!(u32).range(1..=3600))]
    watch: Option<u32>,
}

pub(super) fn run(args: &StatsArgs, client: &Client, output: Output) -> anyhow::Result<()> {
    let mut now: StatsReport = client.get("/v1/stats")?;
    let Some(seconds) = args.watch else {
        return output.show(&now, show);
    };
    loop {
        sleep(Duration::from_secs(seconds.into()));
        let before = std::mem::replace(&mut now, client.get("/v1/stats")?);
        output.refresh(&now, |now| rates(&before, now))?;
    }
}

fn show(report: &StatsReport) -> String {
    let row = |name: &str, counters: &Counters| {
        let Counters {
            received,
            received_bytes,
            replicated,
            sent,
            sent_bytes,
            ..
        } = counters;
        let dropped = counters.dropped_total();
        let numbers = [
            *received,
            *received_bytes,
            *replicated,
            *sent,
            *sent_bytes,
            dropped,
        ];
        [name.to_owned()]
            .into_iter()
            .chain(numbers.map(count))
            .collect()
    };
    let mut rows: Vec<Vec<String>> = report
        .ports
        .iter()
        .map(|(name, counters)| row(name, counters))
        .collect();
    if report.departed != Counters::default() {
        rows.push(row("(departed)", &report.departed));
    }
    rows.push(row("total", &report.total));
    let head = [
        "PORT",
        "RECEIVED",
        "BYTES",
        "REPLICATED",
        "SENT",
        "BYTES",
        "DROPPED",
    ];
    let mut text = table(&head, rows);
    text += &drops(report);
    text += "\n";
    text += &workers(
        report
            .workers
            .iter()
            .map(|worker| (worker, worker.load(), worker.cycles_per_frame())),
    );
    let fdb = &report.fdb;
    text + &format!(
        "\nup {}, {} of {} stations in use\n",
        duration(report.uptime_seconds as u64),
        count(fdb.used),
        count(fdb.capacity)
    )
}

fn drops(report: &StatsReport) -> String {
    let ports = report
        .ports
        .iter()
        .map(|(name, counters)| (name.as_str(), counters));
    let rows: Vec<Vec<String>> = ports
        .chain([("(departed)", &report.departed)])
        .flat_map(|(name, counters)| {
            counters
                .dropped
                .iter()
                .map(move |(reason, frames)| (name, reason, *frames))
        })
        .filter(|(_, _, frames)| *frames > 0)
        .map(|(name, reason, frames)| vec![name.to_owned(), reason.clone(), count(frames)])
        .collect();
    if rows.is_empty() {
        String::new()
    } else {
        format!("\n{}", table(&["PORT", "DROPPED BECAUSE", "FRAMES"], rows))
    }
}

fn workers<'a>(workers: impl Iterator<Item = (&'a WorkerStatus, f64, f64)>) -> String {
    table(
        &[
            "WORKER ON CPU",
            "NODE",
            "LOAD",
            "CYCLES/FRAME",
            "QUEUES",
            "SLEEPS",
            "RECEIVED",
        ],
        workers.map(|(worker, load, cycles_per_frame)| {
            vec![
                worker.cpu.to_string(),
                worker
                    .numa_node
                    .map_or("-".to_owned(), |node| node.to_string()),
                format!("{:.1}%", 100.0 * load),
                format!("{cycles_per_frame:.1}"),
                worker.queues.len().to_string(),
                count(worker.sleeps),
                count(worker.counters.received),
            ]
        }),
    )
}

fn rates(before: &StatsReport, now: &StatsReport) -> String {
    // The switch's own clock: ours has the time of two answers in it.
    let seconds = (now.uptime_seconds - before.uptime_seconds).max(1e-9);
    let nothing = Counters::default();
    let per_second = |now: u64, before: u64| now.saturating_sub(before) as f64 / seconds;
    let row = |name: &str, now: &Counters, before: &Counters| {
        vec![
            name.to_owned(),
            format!("{:.3}", per_second(now.received, before.received) / 1e6),
            format!(
                "{:.3}",
                per_second(now.received_bytes, before.received_bytes) * 8.0 / 1e9
            ),
            format!("{:.3}", per_second(now.sent, before.sent) / 1e6),
            format!(
                "{:.3}",
                per_second(now.sent_bytes, before.sent_bytes) * 8.0 / 1e9
            ),
            count(per_second(now.dropped_total(), before.dropped_total()) as u64),
        ]
    };
    let ports = now
        .ports
        .iter()
        .map(|(name, now)| row(name, now, before.ports.get(name).unwrap_or(&nothing)));
    let rows: Vec<Vec<String>> = ports
        .chain([row("total", &now.total, &before.total)])
        .collect();
    let head = [
        "PORT",
        "RECEIVED Mpps",
        "Gbit/s",
        "SENT Mpps",
        "Gbit/s",
        "DROPPED/s",
    ];
    let lately = now.workers.iter().map(|worker| {
        let before = before
            .workers
            .iter()
            .find(|before| before.cpu == worker.cpu);
        let was = |read: fn(&WorkerStatus) -> u64| {
            read(worker).saturating_sub(before.map_or(0, read)) as f64
        };
        let busy = was(|worker| worker.busy_cycles);
        let share = |whole: f64| if whole > 0.0 { busy / whole } else { 0.0 };
        (
            worker,
            share(was(|worker| worker.cycles)),
            share(was(|worker| worker.counters.received)),
        )
    });
    table(&head, rows) + "\n" + &workers(lately)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(uptime_seconds: f64, received: u64) -> StatsReport {
        let counters = Counters {
            received,
            received_bytes: received * 64,
            ..Counters::default()
        };
        StatsReport {
            uptime_seconds,
            total: counters.clone(),
            ports: [("blue".to_owned(), counters)].into(),
            ..StatsReport::default()
        }
    }

    #[test]
    fn divides_by_the_time_of_the_switch() {
        let text = rates(&report(10.0, 0), &report(12.0, 3_000_000));
        let blue = text
            .lines()
            .find(|line| line.contains("blue"))
            .expect("a line for the port");
        assert_eq!(
            blue.split_whitespace().collect::<Vec<_>>(),
            ["blue", "1.500", "0.768", "0.000", "0.000", "0"]
        );
    }

    #[test]
    fn survives_a_switch_that_was_restarted_meanwhile() {
        let text = rates(&report(10.0, 500), &report(1.0, 3));
        assert!(text.contains("blue"));
    }
}
