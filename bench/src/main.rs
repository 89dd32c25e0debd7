//! `ringway-bench`: measures vhost-user switches side by side.

mod backend;
mod client;
mod compare;
mod console;
mod host;
mod interrupt;
mod kernel;
mod load;
mod output;
mod peers;
mod process;
mod reference;
mod report;
mod results;
mod rfc2544;
mod rfc2889;
mod rows;
mod sample;
mod scenario;
mod sentinel;
mod summary;
mod visits;
mod watch;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Measures vhost-user switches side by side, and says how far its numbers can be trusted.
#[derive(Debug, Parser)]
#[command(name = "ringway-bench", version)]
struct Arguments {
    #[command(subcommand)]
    mode: Mode,
}

#[derive(Debug, Subcommand)]
enum Mode {
    Compare(Box<compare::Compare>),
    Load(Box<load::LoadArgs>),
    Latency(Box<rfc2544::LatencyArgs>),
    Rfc2544(Box<rfc2544::Rfc2544>),
    Rfc2889(Box<rfc2889::Rfc2889>),
    Chain(Box<scenario::chain::ChainArgs>),
    IdlePorts(Box<scenario::idle::IdleArgs>),
    Neighbour(Box<scenario::neighbour::NeighbourArgs>),
    Attach(Box<scenario::attach::AttachArgs>),
    Outage(Box<scenario::outage::OutageArgs>),
    Footprint(Box<scenario::footprint::FootprintArgs>),
    Report(report::ReportArgs),
    Reference(reference::Reference),
    #[command(hide = true)]
    Backend(backend::Serve),
    #[command(hide = true)]
    Namespaces(kernel::namespaces::Namespaces),
    #[command(hide = true)]
    Packets(kernel::circle::Circle),
    Sentinel(watch::Watch),
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    process::cpus();
    let result = interrupt::listen().and_then(|()| match &arguments.mode {
        Mode::Compare(options) => compare::run(options),
        Mode::Load(options) => load::run(options),
        Mode::Latency(options) => rfc2544::run_latency(options),
        Mode::Rfc2544(options) => rfc2544::run(options),
        Mode::Rfc2889(options) => rfc2889::run(options),
        Mode::Chain(options) => scenario::chain::run(options),
        Mode::IdlePorts(options) => scenario::idle::run(options),
        Mode::Neighbour(options) => scenario::neighbour::run(options),
        Mode::Attach(options) => scenario::attach::run(options),
        Mode::Outage(options) => scenario::outage::run(options),
        Mode::Footprint(options) => scenario::footprint::run(options),
        Mode::Report(options) => report::run(options),
        Mode::Reference(options) => reference::run(options),
        Mode::Backend(options) => backend::run(options),
        Mode::Namespaces(options) => kernel::namespaces::run(options),
        Mode::Packets(options) => kernel::circle::run(options),
        Mode::Sentinel(options) => watch::run(options),
    });
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("ringway-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}
