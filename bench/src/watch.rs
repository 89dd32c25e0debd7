//! `ringway-bench sentinel`: shows the placement of two CPUs over time.

use std::time::{Duration, Instant};

use anyhow::Result;

use crate::interrupt;
use crate::sentinel::{Placement, look, median};

/// Shows how far apart two CPUs are, again and again: whether now is a good time to measure.
///
/// "near" (below 140 ns per round trip of a cache line) means that they share a cache, "far" (above 300 ns) that they
/// do not. On a virtual machine this changes within seconds. A core clock below its usual value means a throttled core
/// or a busy sibling. Both CPUs should be idle: whatever runs there disturbs, and is disturbed.
#[derive(Debug, clap::Args)]
pub(crate) struct Watch {
    /// How long
    #[arg(long, default_value_t = 10.0)]
    seconds: f64,
    /// Time between two looks
    #[arg(long, value_name = "SECONDS", default_value_t = 0.5)]
    every: f64,
    /// The two CPUs
    #[arg(long, value_name = "CPU,CPU", value_delimiter = ',', num_args = 2, default_values_t = [0, 1])]
    cpus: Vec<usize>,
    /// One JSON object per look
    #[arg(long)]
    json: bool,
}

/// Runs the subcommand.
pub(crate) fn run(options: &Watch) -> Result<()> {
    let &[first, second] = options.cpus.as_slice() else {
        anyhow::bail!("--cpus: takes two CPUs, like 0,1");
    };
    let (time, every) = (
        duration(options.seconds, "--seconds")?,
        duration(options.every, "--every")?,
    );
    let begin = Instant::now();
    let mut seen: Vec<(Placement, f64)> = Vec::new();
    loop {
        let reading = look([first, second], Duration::from_millis(20))?;
        let placement = Placement::of(reading.round_trip_ns);
        let at = begin.elapsed().as_secs_f64();
        let [one, other] = reading.clock_ghz;
        if options.json {
            println!(
                "{}",
                serde_json::json!({"seconds": at, "placement": placement, "reading": reading})
            );
        } else {
            println!(
                "{at:7.2} s  {:<5}  {:6.1} ns  {one:.2} GHz  {other:.2} GHz",
                placement.name(),
                reading.round_trip_ns
            );
        }
        seen.push((placement, reading.round_trip_ns));
        if begin.elapsed() + every > time || interrupt::sleep(every).is_err() {
            break;
        }
    }
    if !options.json {
        println!("{}", summary(&seen));
    }
    Ok(())
}

fn duration(seconds: f64, option: &str) -> Result<Duration> {
    Duration::try_from_secs_f64(seconds)
        .map_err(|_| anyhow::anyhow!("{option}: {seconds} is not a time"))
}

/// How much of the time was what, and how often it changed.
fn summary(seen: &[(Placement, f64)]) -> String {
    let parts = [Placement::Near, Placement::Far, Placement::Mixed].map(|placement| {
        let mut times: Vec<f64> = seen
            .iter()
            .filter(|look| look.0 == placement)
            .map(|look| look.1)
            .collect();
        let share = 100 * times.len() / seen.len().max(1);
        let middle = median(&mut times).map(|ns| format!(" (median {ns:.0} ns)"));
        format!(
            "{} {share} %{}",
            placement.name(),
            middle.unwrap_or_default()
        )
    });
    let changes = seen
        .windows(2)
        .filter(|pair| pair[0].0 != pair[1].0)
        .count();
    format!(
        "{} looks: {}; it changed {changes} times",
        seen.len(),
        parts.join(", ")
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_summary_tells_shares_medians_and_changes() {
        let seen = [
            (Placement::Near, 80.0),
            (Placement::Near, 90.0),
            (Placement::Far, 400.0),
            (Placement::Near, 85.0),
        ];
        let expected = "4 looks: near 75 % (median 85 ns), far 25 % (median 400 ns), mixed 0 %; it changed 2 times";
        assert_eq!(summary(&seen), expected);
    }
}
