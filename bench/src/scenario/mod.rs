//! Scenarios of the field: what a container host meets and no RFC asks for.

pub(crate) mod attach;
pub(crate) mod chain;
pub(crate) mod footprint;
pub(crate) mod idle;
pub(crate) mod neighbour;
pub(crate) mod outage;

use anyhow::{Result, bail};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::load::target::{Session, Target};
use crate::process::pin;

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
