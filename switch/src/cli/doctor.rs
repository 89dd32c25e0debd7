//! `ringway doctor`.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;

use super::client::Client;
use super::table::{Output, table};
use crate::control::doctor::{Check, Verdict, examine};
use crate::control::security::{SecurityReport, nobody, offers};

/// What to examine.
#[derive(Debug, Args)]
#[command(after_help = "\
The exit code is 0 unless something prevents Ringway from running: advice is only that.

Examples:
  ringway doctor
  ringway doctor --cpus 2,3
  ringway doctor --security
  ringway doctor --json | jq -r '.[] | select(.verdict != \"ok\") | .repair'")]
pub(super) struct DoctorArgs {
    /// CPUs of the workers; unless told, the one a single worker would be given.
    #[arg(long, value_name = "CPU,CPU,...", value_delimiter = ',')]
    cpus: Vec<usize>,
    /// What guards the switch: what this host offers, and what is in force in the running one.
    #[arg(long, conflicts_with = "cpus")]
    security: bool,
    /// Examine the proc, sys and etc of another root.
    #[arg(long, default_value = "/", hide = true)]
    root: PathBuf,
}

pub(super) fn run(args: &DoctorArgs, client: &Client, output: Output) -> anyhow::Result<ExitCode> {
    let checks = if args.security {
        let mut checks = offers(&args.root);
        match client.get::<SecurityReport>("/v1/security") {
            Ok(report) => checks.extend(report.checks()),
            Err(error) => checks.push(nobody(&format!("{error:#}"))),
        }
        checks
    } else {
        examine(&args.root, &args.cpus)
    };
    let blocked = checks.iter().any(|check| check.verdict == Verdict::Blocks);
    output.show(&checks, |checks| show(checks))?;
    Ok(if blocked {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    })
}

fn show(checks: &[Check]) -> String {
    let word = |verdict| match verdict {
        Verdict::Ok => "ok",
        Verdict::Advice => "advice",
        Verdict::Blocks => "BLOCKS",
    };
    let rows = checks.iter().map(|check| {
        vec![
            check.name.clone(),
            word(check.verdict).to_owned(),
            check.found.clone(),
        ]
    });
    let mut text = table(&["CHECK", "VERDICT", "FOUND"], rows);
    for check in checks.iter().filter(|check| check.verdict != Verdict::Ok) {
        text += &format!("\n{}: {}\n", check.name, check.found);
        if let Some(gain) = &check.gain {
            text += &format!("  gain:   {gain}\n");
        }
        if let Some(repair) = &check.repair {
            text += &format!("  repair: {repair}\n");
        }
    }
    text
}
