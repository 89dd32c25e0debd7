//! `ringway doctor`.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;

use super::table::{Output, table};
use crate::control::doctor::{Check, Verdict, examine};

/// What to examine.
#[derive(Debug, Args)]
#[command(after_help = "\
The exit code is 0 unless something prevents Ringway from running: advice is only that.

Examples:
  ringway doctor
  ringway doctor --cpus 2,3
  ringway doctor --json | jq -r '.[] | select(.verdict != \"ok\") | .repair'")]
pub(super) struct DoctorArgs {
    /// CPUs of the workers; unless told, the one a single worker would be given.
    #[arg(long, value_name = "CPU,CPU,...", value_delimiter = ',')]
    cpus: Vec<usize>,
    /// Examine the proc, sys and etc of another root.
    #[arg(long, default_value = "/", hide = true)]
    root: PathBuf,
}

pub(super) fn run(args: &DoctorArgs, output: Output) -> anyhow::Result<ExitCode> {
    let checks = examine(&args.root, &args.cpus);
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
