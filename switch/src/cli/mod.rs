//! The subcommands: arguments in, one function each. `ringway run` is the switch itself; the rest ask a running one over its control
//! socket and print a table for people, or the same data with `--json`.

mod client;
mod demo;
mod doctor;
mod fdb;
mod lines;
mod nic;
mod port;
mod reload;
mod run;
mod stats;
mod table;
mod version;

use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

pub use client::Client;
pub use table::Output;

use crate::control::config::default_api_path;

const EXAMPLES: &str = "\
Examples:
  ringway demo
  ringway run --config configs/two-containers.toml
  ringway run --port vhost-user:blue,socket=/run/r/blue.sock --port vhost-user:red,socket=/run/r/red.sock
  ringway port add vhost-user:green,socket=/run/r/green.sock,mode=client,queues=2
  ringway port list
  ringway stats --watch
  ringway doctor";

/// A poll-mode vhost-user switch for containers.
#[derive(Debug, Parser)]
#[command(name = "ringway", version, after_help = EXAMPLES)]
struct Cli {
    #[command(flatten)]
    common: Common,
    #[command(subcommand)]
    command: Command,
}

/// What every subcommand takes.
#[derive(Debug, Args)]
struct Common {
    /// Control socket of the switch; unless told, $XDG_RUNTIME_DIR/ringway/api.sock, or /run/ringway/api.sock for root.
    #[arg(long, global = true, env = "RINGWAY_API", value_name = "PATH")]
    api: Option<PathBuf>,
    /// Print JSON instead of tables.
    #[arg(long, global = true)]
    json: bool,
}

impl Common {
    fn client(&self) -> Client {
        Client::new(self.api.clone().unwrap_or_else(default_api_path))
    }

    fn output(&self) -> Output {
        Output::new(self.json)
    }
}

/// To add a subcommand: a file with `Args` and `run`, an arm here, an arm in [`dispatch`].
#[derive(Debug, Subcommand)]
enum Command {
    /// Show the switch at work: containers in this process exchange frames over real vhost-user sockets.
    Demo(demo::DemoArgs),
    /// Run the switch until Ctrl-C or SIGTERM.
    Run(run::RunArgs),
    /// Add, delete, list, show and move ports.
    #[command(subcommand)]
    Port(port::PortCommand),
    /// Show, flush, add and delete stations of the forwarding table.
    #[command(subcommand)]
    Fdb(fdb::FdbCommand),
    /// Show frames, bytes, drops by reason, and what workers do.
    Stats(stats::StatsArgs),
    /// Load the configuration file again and do only the difference.
    Reload(reload::ReloadArgs),
    /// Network cards: make VFs, hand them to VFIO, give them back.
    #[command(subcommand)]
    Nic(nic::NicCommand),
    /// Check this host and say what could be better, and how.
    Doctor(doctor::DoctorArgs),
    /// Show versions of this program and of the running switch.
    Version,
}

/// Runs the program.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(help_or_error) => {
            let code = help_or_error.exit_code();
            let _ = help_or_error.print();
            return ExitCode::from(u8::try_from(code).unwrap_or(2));
        }
    };
    match dispatch(&cli) {
        Ok(code) => code,
        Err(error) => {
            // `{:#}`: the whole sentence, causes included. A closed stderr is no reason to panic.
            let _ = writeln!(std::io::stderr(), "ringway: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn dispatch(cli: &Cli) -> anyhow::Result<ExitCode> {
    let common = &cli.common;
    let output = common.output();
    match &cli.command {
        Command::Demo(args) => return demo::run(args, output),
        Command::Run(args) => run::run(args, common.api.as_deref())?,
        Command::Port(command) => port::run(command, &common.client(), output)?,
        Command::Fdb(command) => fdb::run(command, &common.client(), output)?,
        Command::Stats(args) => stats::run(args, &common.client(), output)?,
        Command::Reload(args) => reload::run(args, &common.client(), output)?,
        Command::Nic(command) => nic::run(command, output)?,
        Command::Doctor(args) => return doctor::run(args, &common.client(), output),
        Command::Version => version::run(&common.client(), output)?,
    }
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_arguments_make_sense_to_clap() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_example_of_the_help_parses() {
        for line in EXAMPLES.lines().filter(|line| line.starts_with("  ")) {
            Cli::try_parse_from(line.split_whitespace()).expect(line);
        }
    }
}
