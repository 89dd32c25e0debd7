//! Scenarios of the field: what a container host meets and no RFC asks for.

pub(crate) mod attach;
pub(crate) mod chain;
pub(crate) mod footprint;
pub(crate) mod idle;
pub(crate) mod neighbour;
pub(crate) mod outage;

use anyhow::{Context, Result, bail};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::interrupt;
use crate::load::session::Session;
use crate::load::target::Target;
use crate::process::pin;
use crate::results::Saved;

/// A port of ours takes a socket, a memory file and four event descriptors.
const DESCRIPTORS_PER_PORT: u64 = 6;

/// Makes room for so many ports, as far as the host allows; switches that are started inherit it.
pub(crate) fn room_for(ports: usize) {
    let now = getrlimit(Resource::Nofile);
    let wanted = ports as u64 * DESCRIPTORS_PER_PORT + 512;
    if now.current.is_some_and(|current| current < wanted) {
        // Refused: attaching will say so in its own words.
        let _ = setrlimit(
            Resource::Nofile,
            Rlimit {
                current: now.maximum,
                maximum: now.maximum,
            },
        );
    }
}

/// The target with a switch of so many ports; sockets that somebody else serves are as many as they are.
pub(crate) fn with_ports(target: &Target, ports: usize) -> Target {
    Target {
        ports: ports as u32,
        ..target.clone()
    }
}

/// Measures one thing after the other. If one fails, or somebody asks to stop, what was measured before counts, marked as partial.
pub(crate) fn gather<T>(
    things: impl IntoIterator<Item = T>,
    mut one: impl FnMut(T) -> Result<(Saved, String)>,
) -> Result<(Saved, String)> {
    let (mut all, mut text): (Option<Saved>, _) = (None, String::new());
    for thing in things {
        let done = interrupt::check().and_then(|()| one(thing));
        match (done, all.as_mut()) {
            (Ok((saved, lines)), known) => {
                text += &lines;
                match known {
                    Some(all) => all.add(saved),
                    None => all = Some(saved),
                }
            }
            (Err(error), Some(all)) => {
                text += &format!("  PARTIAL: {error:#}\n");
                all.complete = false;
                all.caveats
                    .push(format!("ended early or left out: {error:#}"));
                if interrupt::check().is_err() {
                    break;
                }
            }
            (Err(error), None) => return Err(error),
        }
    }
    all.map(|saved| (saved, text)).context("nothing to measure")
}

/// Goes to the generator's CPU: where the harness itself plays the containers, it must not wait for the switch's.
pub(crate) fn settle(session: &Session) -> Result<()> {
    session
        .started
        .as_ref()
        .map_or(Ok(()), |started| pin(&[started.cpus.client]))
}

/// Only a switch that the harness starts can be asked for this.
pub(crate) fn own_switch(target: &Target, what: &str) -> Result<()> {
    if target.name().is_none() {
        bail!("{what}: needs a switch that is started here: --switch NAME");
    }
    Ok(())
}
