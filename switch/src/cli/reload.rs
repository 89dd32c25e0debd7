//! `ringway reload`.

use std::path::PathBuf;

use anyhow::Context as _;
use clap::Args;

use super::client::Client;
use super::table::Output;
use crate::control::api::Reload;
use crate::control::state::Applied;

/// What to load.
#[derive(Debug, Args)]
#[command(after_help = "\
The file is the whole truth: ports that are not in it go, those added by `ringway port add` too. Ports that did not change are not
touched and lose no frame. What needs a restart is refused, and then nothing changes.

Examples:
  ringway reload --dry-run
  ringway reload
  ringway reload --config /etc/ringway/other.toml")]
pub(super) struct ReloadArgs {
    /// The configuration file; unless told, the one the switch was started with.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Only say what would be done.
    #[arg(long)]
    dry_run: bool,
}

pub(super) fn run(args: &ReloadArgs, client: &Client, output: Output) -> anyhow::Result<()> {
    let mut wanted = Reload {
        dry_run: args.dry_run,
        ..Reload::default()
    };
    if let Some(file) = &args.config {
        let text = std::fs::read_to_string(file)
            .with_context(|| format!("{} cannot be read", file.display()))?;
        (wanted.toml, wanted.name) = (Some(text), Some(file.display().to_string()));
    }
    output.show(&client.post::<Applied>("/v1/reload", &wanted)?, |applied| {
        let mut text: String = applied
            .actions
            .iter()
            .map(|action| format!("{action}\n"))
            .collect();
        if text.is_empty() {
            text = "nothing to do\n".to_owned();
        }
        text + &format!("{} ports unchanged\n", applied.unchanged)
    })
}
