//! The helper that holds the namespaces: one for the host's side, one per container, linked the way a container host links them.

use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use super::{Way, mac, socket};

/// Holds network namespaces until its standard input ends.
#[derive(Debug, clap::Args)]
pub(crate) struct Namespaces {
    /// How they are linked
    #[arg(long, value_enum)]
    way: Way,
    /// Containers
    #[arg(long, value_parser = clap::value_parser!(u16).range(2..=1024))]
    containers: u16,
    /// Bytes of a frame without its header
    #[arg(long)]
    mtu: u32,
}

/// What it says once everything is up.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Ready {
    /// Path of each container's namespace; its interface is [`INTERFACE`].
    pub(crate) containers: Vec<String>,
}

/// A container's interface, as Docker names it.
pub(crate) const INTERFACE: &str = "eth0";

/// Runs the subcommand.
pub(crate) fn run(options: &Namespaces) -> Result<()> {
    let made = (0..options.containers).map(|_| socket::new_namespace().context("a namespace"));
    let containers = made.collect::<Result<Vec<OwnedFd>>>()?;
    let host = socket::new_namespace().context("a namespace")?;
    socket::enter(host.as_fd()).context("the host's side")?;
    match options.way {
        Way::Bridge => bridge(options.mtu, &containers)?,
        Way::Macvlan => macvlan(options.mtu, &containers)?,
    }
    for (number, container) in containers.iter().enumerate() {
        socket::enter(container.as_fd())?;
        ip(&format!("link set {INTERFACE} address {}", address(number)))?;
        ip(&format!(
            "link set {INTERFACE} mtu {} addrgenmode none",
            options.mtu
        ))?;
        ip(&format!("link set {INTERFACE} up"))?;
    }
    let ready = Ready {
        containers: containers.iter().map(path).collect(),
    };
    println!("{}", serde_json::to_string(&ready)?);
    std::io::stdout().flush()?;
    // The harness closes its end when it is done, or when it ends without a word.
    let _ = std::io::stdin().read(&mut [0]);
    Ok(())
}

fn address(container: usize) -> String {
    mac(container).map(|byte| format!("{byte:02x}")).join(":")
}

fn path(namespace: &OwnedFd) -> String {
    format!("/proc/{}/fd/{}", std::process::id(), namespace.as_raw_fd())
}

/// `docker network create` makes a bridge; `docker run` a veth pair with one end in it.
fn bridge(mtu: u32, containers: &[OwnedFd]) -> Result<()> {
    ip(&format!("link add bridge0 mtu {mtu} type bridge"))?;
    ip("link set bridge0 addrgenmode none up")?;
    for (number, container) in containers.iter().enumerate() {
        let near = format!("veth{number}");
        ip(&format!(
            "link add {near} mtu {mtu} type veth peer name {INTERFACE} mtu {mtu} netns {}",
            path(container)
        ))?;
        ip(&format!(
            "link set {near} master bridge0 addrgenmode none up"
        ))?;
    }
    Ok(())
}

/// `docker network create --driver macvlan`: an interface on top of the host's NIC for each container. The NIC is one end of a veth
/// pair: frames between containers do not reach it.
fn macvlan(mtu: u32, containers: &[OwnedFd]) -> Result<()> {
    ip(&format!(
        "link add nic0 mtu {mtu} type veth peer name wire0 mtu {mtu}"
    ))?;
    ip("link set wire0 addrgenmode none up")?;
    ip("link set nic0 addrgenmode none up")?;
    for (number, container) in containers.iter().enumerate() {
        let here = format!("mv{number}");
        ip(&format!(
            "link add {here} link nic0 type macvlan mode bridge"
        ))?;
        ip(&format!(
            "link set {here} netns {} name {INTERFACE}",
            path(container)
        ))?;
    }
    Ok(())
}

/// Runs `ip` in the namespace that this thread is in.
fn ip(arguments: &str) -> Result<()> {
    let output = Command::new("ip")
        .args(arguments.split_whitespace())
        .stdin(Stdio::null())
        .output()
        .context("ip (package iproute2)")?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        let hint = if said.contains("Unknown device type") || said.contains("not supported") {
            " (the kernel lacks this kind of link: modprobe bridge veth macvlan)"
        } else {
            ""
        };
        bail!("ip {arguments}: {}{hint}", said.trim());
    }
    Ok(())
}
