//! `ringway-bench compare`: what it is told, what it finds on this machine, and what it hands back.

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

use crate::client::Cpus;
use crate::console::{TESTPMD, TESTPMD_MISSING};
use crate::host::Host;
use crate::interrupt::Interrupted;
use crate::output;
use crate::peers::{self, Binaries, Peer};
use crate::process::{Priority, find, pin};
use crate::report::{self, Output};
use crate::rows;
use crate::sample::{Rig, Sample, Wanted};
use crate::sentinel::tsc_hz;
use crate::visits::Run;

/// Compares switches side by side: the same client, the same two cores, the same minutes.
///
/// Starts Ringway, OVS-DPDK and testpmd (vhost ports, `io` forwarding: no switching at all) on one core, stops all but
/// one, and measures each in turn with the same testpmd client on another core. Before and after every sample a
/// sentinel measures how far apart the two cores are right now; samples during which that changed, or for which a
/// process did not get its core, are named and left out. Near and far samples are never mixed.
///
/// The Linux bridge with veth pairs, and macvlan, are what plain Docker does. They have no vhost-user sockets and hence another
/// generator, packet sockets in the containers' network namespaces; both CPUs share their work. As root; everything is made in
/// network namespaces that end with the run.
///
/// What is measured is what the client received per second, both ports added. It is a closed loop: the client may be
/// the limit. Look at the cycles per frame of switch and client too.
#[derive(Debug, clap::Args)]
pub(crate) struct Compare {
    /// What to measure: names separated by commas, or "all". See --list-rows
    #[arg(long, value_name = "NAMES", default_value = rows::DEFAULT)]
    rows: String,
    /// Print the names of all rows, and end
    #[arg(long)]
    list_rows: bool,
    /// Only these switches: ringway, ovs, testpmd, vpp, reference (a plain switch on vhost-user-backend and virtio-queue), bridge,
    /// macvlan [default: all but the reference]
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    only: Vec<String>,
    /// How often every switch is visited for every row
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
    /// Length of a sample; short ones have better chances to see one placement only
    #[arg(long, default_value_t = 2.0, value_parser = seconds)]
    seconds: f64,
    /// The placement of the two cores to wait for
    #[arg(long, value_enum, default_value = "near")]
    placement: Wanted,
    /// Attempts until a clean sample in that placement
    #[arg(long, value_name = "NUMBER", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    attempts: u32,
    /// How many seconds to wait for that placement before each attempt
    #[arg(long, value_name = "SECONDS", default_value_t = 2.5, value_parser = seconds)]
    patience: f64,
    /// Discard a sample whose switch or client was preempted more often per second [default: 500 with raised priority,
    /// otherwise 60]
    #[arg(long, value_name = "NUMBER")]
    preemptions_max: Option<f64>,
    /// The priority of switches, client and sentinel (as root): other tasks of the machine take about 1 % of a core from
    /// them at -20, half of it at 0
    #[arg(long, default_value_t = -20, allow_negative_numbers = true, value_parser = clap::value_parser!(i32).range(-20..=0))]
    nice: i32,
    /// The CPU of the switch
    #[arg(long, value_name = "CPU", default_value_t = 0)]
    switch_cpu: usize,
    /// The CPU of the client's forwarding core
    #[arg(long, value_name = "CPU", default_value_t = 1)]
    client_cpu: usize,
    /// The CPU of all else [default: a third one if there is one, otherwise the switch's]
    #[arg(long, value_name = "CPU")]
    control_cpu: Option<usize>,
    #[command(flatten)]
    binaries: Binaries,
    #[command(flatten)]
    output: Output,
    /// Write the tables as Markdown
    #[arg(long, value_name = "FILE")]
    markdown: Option<PathBuf>,
}

fn seconds(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(seconds) if (0.2..=60.0).contains(&seconds) => Ok(seconds),
        _ => Err("must be between 0.2 and 60".to_owned()),
    }
}

/// Everything that a run found out.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    pub(crate) version: &'static str,
    pub(crate) command: Vec<String>,
    /// Seconds since 1970.
    pub(crate) started: u64,
    pub(crate) host: Host,
    pub(crate) cpus: [usize; 3],
    /// The priority of switches and client.
    pub(crate) nice: i32,
    pub(crate) rounds: u32,
    pub(crate) seconds: f64,
    /// Whether all rounds were measured.
    pub(crate) complete: bool,
    pub(crate) peers: Vec<Version>,
    /// What was left out, and why.
    pub(crate) left_out: Vec<String>,
    /// What went wrong on the way.
    pub(crate) failures: Vec<String>,
    pub(crate) samples: Vec<Sample>,
}

/// A switch (or the client) and what its binary calls itself.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Version {
    pub(crate) name: &'static str,
    pub(crate) version: String,
}

/// Runs the subcommand.
pub(crate) fn run(options: &Compare) -> Result<()> {
    if options.list_rows {
        for row in rows::ROWS {
            println!("{:<14} {}", row.name, row.title);
        }
        return Ok(());
    }
    options.output.check()?;
    if let Some(path) = &options.markdown {
        report::check_place(path)?;
    }
    let rows = rows::parse(&options.rows)?;
    let rig_directory = tempfile::Builder::new()
        .prefix("rwb")
        .tempdir()
        .context("a directory for sockets")?;
    let priority = Priority::raise(options.nice);
    let rig = rig(options, &priority, rig_directory.path())?;
    let (peers, left_out) = available(options)?;
    let mut report = Report {
        version: env!("CARGO_PKG_VERSION"),
        command: std::env::args().collect(),
        started: SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default()
            .as_secs(),
        host: Host::look(rig.tsc_hz),
        cpus: [rig.cpus.switch, rig.cpus.client, rig.cpus.control],
        nice: priority.nice(),
        rounds: options.rounds,
        seconds: options.seconds,
        complete: true,
        peers: Vec::new(),
        left_out,
        failures: Vec::new(),
        samples: Vec::new(),
    };
    for line in &report.left_out {
        eprintln!("left out: {line}");
    }
    let visits = options.rounds as usize * rows.len() * peers.len();
    let mut run = Run {
        rig,
        peers,
        report: &mut report,
        bar: progress(visits),
    };
    let result = run.all_groups(&rows, options.rounds);
    run.bar.finish_and_clear();
    if let Err(error) = result {
        report.complete = false;
        if !error.is::<Interrupted>() {
            report.failures.push(format!("{error:#}"));
        }
    }
    finish(options, &report)
}

/// Prints and writes what there is; a run that measured nothing at all is an error.
fn finish(options: &Compare, report: &Report) -> Result<()> {
    let saved = output::saved(report);
    if !options.output.quiet() {
        print!("{}", report::text(&saved));
    }
    options.output.write(&saved)?;
    if let Some(path) = &options.markdown {
        std::fs::write(path, report::markdown(&saved))
            .with_context(|| path.display().to_string())?;
    }
    if report.samples.is_empty() {
        bail!("nothing was measured");
    }
    Ok(())
}

fn rig(options: &Compare, priority: &Priority, directory: &Path) -> Result<Rig> {
    let (switch, client) = (options.switch_cpu, options.client_cpu);
    if switch == client {
        bail!("--switch-cpu and --client-cpu: both are CPU {switch}; a measurement takes two");
    }
    let third = (0..)
        .take(std::thread::available_parallelism()?.get())
        .find(|cpu| ![switch, client].contains(cpu));
    let control = options.control_cpu.or(third).unwrap_or(switch);
    if control == client {
        bail!("--control-cpu: CPU {client} is the client's");
    }
    for cpu in [switch, client, control] {
        pin(&[cpu]).with_context(|| format!("CPU {cpu}: cannot be used"))?;
    }
    Ok(Rig {
        cpus: Cpus {
            switch,
            client,
            control,
        },
        time: Duration::from_secs_f64(options.seconds),
        wanted: options.placement,
        directory: directory.to_owned(),
        tsc_hz: tsc_hz(),
        attempts: options.attempts,
        patience: Duration::from_secs_f64(options.patience),
        preempted_max: options
            .preemptions_max
            .unwrap_or_else(|| preemptions_max(priority)),
    })
}

/// With raised priority a preemption is a matter of microseconds: samples with 120 to 380 of them a second agreed
/// within 4 %. Otherwise each may last a scheduling slice.
fn preemptions_max(priority: &Priority) -> f64 {
    if priority.nice() < 0 { 500.0 } else { 60.0 }
}

/// The switches that can be started, and a sentence for each that cannot.
fn available(options: &Compare) -> Result<(Vec<Box<dyn Peer>>, Vec<String>)> {
    let mut peers = peers::all(&options.binaries);
    for name in &options.only {
        if name == "vpp" && options.binaries.vpp.is_none() {
            bail!("--only vpp: --vpp PATH must name its binary");
        }
        if !peers.iter().any(|peer| peer.name() == name) {
            let names: Vec<_> = peers.iter().map(|peer| peer.name()).collect();
            bail!(
                "--only: there is no switch {name:?}; there are: {}",
                names.join(", ")
            );
        }
    }
    peers.retain(|peer| {
        if options.only.is_empty() {
            return peer.by_default();
        }
        options.only.iter().any(|name| name == peer.name())
    });
    let left_out: Vec<_> = peers.iter().filter_map(|peer| peer.missing()).collect();
    peers.retain(|peer| peer.missing().is_none());
    if peers.is_empty() {
        bail!("no switch to measure: {}", left_out.join("; "));
    }
    if peers.iter().any(|peer| peer.vhost_user()) && find(TESTPMD).is_none() {
        bail!("the client: {TESTPMD_MISSING}");
    }
    Ok((peers, left_out))
}

fn progress(visits: usize) -> ProgressBar {
    let style = ProgressStyle::with_template("{bar:30} {pos}/{len} {elapsed} (left {eta})  {msg}");
    let bar = ProgressBar::new(visits as u64);
    style
        .map(|style| bar.clone().with_style(style))
        .unwrap_or(bar)
}
