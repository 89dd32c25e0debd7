//! `ringway nic`: VFs for uplinks. Works on this host's sysfs, needs no running switch.

use std::path::PathBuf;

use anyhow::anyhow;
use clap::{Args, Subcommand};

use super::table::{Output, table};
use crate::control::nic::{Nic, Step, bind, bound, create_vfs, list, perform, unbind};

/// Where, and whether only to tell.
#[derive(Debug, Args)]
pub(super) struct How {
    /// Only print what would be written where.
    #[arg(long)]
    dry_run: bool,
    /// Work on the sys of another root.
    #[arg(long, default_value = "/", hide = true)]
    root: PathBuf,
}

/// What to do with network cards.
#[derive(Debug, Subcommand)]
pub(super) enum NicCommand {
    /// Show network cards and VFs: driver, IOMMU group, NUMA node, link.
    List(How),
    /// Make VFs.
    #[command(subcommand)]
    Vf(VfCommand),
    /// Hand a VF to VFIO, so that `ringway port add ixgbevf:NAME,device=ADDR` can have it.
    Bind {
        /// PCI address of the VF, like 0000:81:10.0.
        address: String,
        #[command(flatten)]
        how: How,
    },
    /// Give a VF back to the kernel's driver.
    Unbind {
        /// PCI address of the VF.
        address: String,
        #[command(flatten)]
        how: How,
    },
}

/// What to do with VFs.
#[derive(Debug, Subcommand)]
pub(super) enum VfCommand {
    /// Make VFs of a network card; 0 takes them away.
    Create {
        /// Its interface or PCI address.
        pf: String,
        /// How many.
        count: u32,
        #[command(flatten)]
        how: How,
    },
}

pub(super) fn run(command: &NicCommand, output: Output) -> anyhow::Result<()> {
    let (steps, how) = match command {
        NicCommand::List(how) => {
            return output.show(&list(&how.root), |nics: &Vec<Nic>| show(nics));
        }
        NicCommand::Vf(VfCommand::Create { pf, count, how }) => {
            (create_vfs(&how.root, pf, *count), how)
        }
        NicCommand::Bind { address, how } => (bind(&how.root, address), how),
        NicCommand::Unbind { address, how } => (unbind(&how.root, address), how),
    };
    let steps = steps.map_err(|why| anyhow!(why))?;
    if !how.dry_run {
        perform(&steps).map_err(|why| anyhow!(why))?;
        if let NicCommand::Bind { address, how } = command {
            bound(&how.root, address).map_err(|why| anyhow!(why))?;
        }
    }
    output.show(&steps, |steps| told(steps))
}

fn told(steps: &[Step]) -> String {
    if steps.is_empty() {
        return "nothing to do: it is so already\n".to_owned();
    }
    steps.iter().map(|step| format!("{step}\n")).collect()
}

fn show(nics: &[Nic]) -> String {
    if nics.is_empty() {
        return "no network card on a PCI bus\n".to_owned();
    }
    let dash = |text: &Option<String>| text.clone().unwrap_or_else(|| "-".to_owned());
    let rows = nics.iter().map(|nic| {
        let kind = match (&nic.pf, nic.vfs) {
            (Some(pf), _) => format!("VF of {pf}"),
            (None, _) if nic.is_vf() => "VF".to_owned(),
            (None, Some((now, most))) => format!("PF, {now} of {most} VFs"),
            (None, None) => "-".to_owned(),
        };
        let links: Vec<String> = nic
            .interfaces
            .iter()
            .map(|(name, state)| format!("{name} {state}"))
            .collect();
        vec![
            nic.address.clone(),
            nic.id.clone(),
            kind,
            dash(&nic.driver),
            dash(&nic.group),
            nic.node.map_or("-".to_owned(), |node| node.to_string()),
            links.join(", "),
        ]
    });
    table(
        &["ADDRESS", "ID", "KIND", "DRIVER", "GROUP", "NODE", "LINK"],
        rows,
    )
}
