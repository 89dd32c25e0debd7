//! `ringway fdb`.

use clap::{Args, Subcommand};

use super::client::{Client, escape, query};
use super::table::{Output, count, table};
use crate::control::api::Removed;
use crate::control::state::{FdbAdd, FdbFilter, FdbKind, FdbPage};
use crate::dataplane::eth::Mac;

/// What to do with the forwarding table.
#[derive(Debug, Subcommand)]
pub(super) enum FdbCommand {
    /// Show stations.
    #[command(
        after_help = "Examples:\n  ringway fdb show --port blue\n  ringway fdb show --limit 1000000 --json"
    )]
    Show {
        #[command(flatten)]
        which: Which,
        /// Only this address.
        #[arg(long)]
        mac: Option<Mac>,
        /// Most stations to show.
        #[arg(long, default_value_t = 1000)]
        limit: usize,
    },
    /// Forget learned stations: all of them, or those that match.
    Flush {
        #[command(flatten)]
        which: Which,
    },
    /// Add a static station: it never ages and never moves.
    #[command(after_help = "Example:\n  ringway fdb add 02:00:00:00:00:01 blue")]
    Add {
        /// Its address.
        mac: Mac,
        /// Its port.
        port: String,
        /// Its VLAN; 0: untagged.
        #[arg(long, default_value_t = 0)]
        vlan: u16,
    },
    /// Remove a station, static or learned.
    Del {
        /// Its address.
        mac: Mac,
        #[command(flatten)]
        which: Which,
    },
}

/// Which stations are meant.
#[derive(Clone, Debug, Args)]
pub(super) struct Which {
    /// Only this bridge.
    #[arg(long)]
    bridge: Option<String>,
    /// Only this port.
    #[arg(long)]
    port: Option<String>,
    /// Only this VLAN.
    #[arg(long)]
    vlan: Option<u16>,
}

impl Which {
    fn pairs(&self) -> [(&'static str, Option<String>); 3] {
        let vlan = self.vlan.map(|vlan| vlan.to_string());
        [
            ("bridge", self.bridge.clone()),
            ("port", self.port.clone()),
            ("vlan", vlan),
        ]
    }
}

pub(super) fn run(command: &FdbCommand, client: &Client, output: Output) -> anyhow::Result<()> {
    let removed = |removed: &Removed| format!("{} stations removed\n", count(removed.removed));
    match command {
        FdbCommand::Show { which, mac, limit } => {
            let more = [
                ("mac", mac.map(|mac| mac.to_string())),
                ("limit", Some(limit.to_string())),
            ];
            let pairs: Vec<_> = which.pairs().into_iter().chain(more).collect();
            output.show(
                &client.get::<FdbPage>(&format!("/v1/fdb{}", query(&pairs)))?,
                show,
            )
        }
        FdbCommand::Flush { which } => {
            let Which { bridge, port, vlan } = which.clone();
            let filter = FdbFilter {
                bridge,
                port,
                vlan,
                mac: None,
            };
            output.show(&client.post::<Removed>("/v1/fdb/flush", &filter)?, removed)
        }
        FdbCommand::Add { mac, port, vlan } => {
            let station = FdbAdd {
                mac: *mac,
                port: port.clone(),
                vlan: *vlan,
            };
            client.post::<()>("/v1/fdb", &station)?;
            output.show(&station, |station| {
                format!("added {} at port {:?}\n", station.mac, station.port)
            })
        }
        FdbCommand::Del { mac, which } => {
            let what = format!(
                "/v1/fdb/{}{}",
                escape(&mac.to_string()),
                query(&which.pairs())
            );
            output.show(&client.delete::<Removed>(&what)?, removed)
        }
    }
}

fn show(page: &FdbPage) -> String {
    let rows = page.entries.iter().map(|station| {
        let kind = match station.kind {
            FdbKind::Learned => "learned",
            FdbKind::Static => "static",
        };
        vec![
            station.bridge.clone(),
            station.vlan.to_string(),
            station.mac.to_string(),
            station.port.clone(),
            station
                .age_seconds
                .map_or("-".to_owned(), |age| age.to_string()),
            kind.to_owned(),
        ]
    });
    let mut text = table(&["BRIDGE", "VLAN", "MAC", "PORT", "AGE", "KIND"], rows);
    if (page.entries.len() as u64) < page.matching {
        text += &format!(
            "{} of {} shown: raise --limit\n",
            count(page.entries.len() as u64),
            count(page.matching)
        );
    }
    text + &format!(
        "{} of {} stations in use\n",
        count(page.table.used),
        count(page.table.capacity)
    )
}
