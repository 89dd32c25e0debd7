//! `ringway version`.

use serde::Serialize;

use super::client::Client;
use super::table::Output;
use crate::control::state::Version;

#[derive(Serialize)]
struct Versions {
    program: &'static str,
    running: Option<Version>,
}

pub(super) fn run(client: &Client, output: Output) -> anyhow::Result<()> {
    // No switch, no version of it: that is no error here.
    let running = client.get("/v1/version").ok();
    let versions = Versions {
        program: env!("CARGO_PKG_VERSION"),
        running,
    };
    output.show(&versions, |versions| {
        let mut text = format!("ringway {}\n", versions.program);
        if let Some(running) = &versions.running {
            text += &format!("running: {} (pid {})\n", running.version, running.pid);
        }
        text
    })
}
