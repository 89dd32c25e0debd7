//! The kernel's own ways from container to container, as plain Docker has them: a bridge with veth pairs, and macvlan.
//!
//! They have no vhost-user sockets, so they get a generator of their own: packet sockets (`AF_PACKET`) in the containers'
//! network namespaces, one polling thread per container. A helper process holds the namespaces, another one the generator; both are
//! this program. The namespaces have no names: they end with the process that holds them, however that ends, and with
//! them every link. Nothing is ever made in the namespace of the harness.

pub(crate) mod chain;
pub(crate) mod circle;
pub(crate) mod namespaces;
pub(crate) mod remote;
pub(crate) mod socket;
pub(crate) mod wire;

use crate::process::find;

/// What stands beside the figures of these peers.
pub(crate) const GENERATOR: &str =
    "own generator (AF_PACKET sockets, sendmmsg and recvmmsg), on both CPUs";

/// A way through the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Way {
    /// A bridge, and a veth pair for each container: Docker's default network.
    Bridge,
    /// A macvlan interface in bridge mode for each container.
    Macvlan,
}

impl Way {
    /// Both.
    pub(crate) const ALL: [Self; 2] = [Self::Bridge, Self::Macvlan];

    /// As in `--only` and in the tables.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Bridge => "bridge",
            Self::Macvlan => "macvlan",
        }
    }

    /// The way of this name.
    pub(crate) fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|way| way.name() == name)
    }

    /// Why it cannot be measured here, with the remedy; none if it can.
    pub(crate) fn missing(self) -> Option<String> {
        let name = self.name();
        if find("ip").is_none() {
            return Some(format!(
                "{name}: its links are made by ip, which is not installed: apt-get install iproute2"
            ));
        }
        if let Err(error) = socket::may_make_namespaces() {
            return Some(format!(
                "{name}: network namespaces and packet sockets are for root ({error}): run with sudo (in a container: with --cap-add \
                 SYS_ADMIN,NET_ADMIN,NET_RAW)"
            ));
        }
        None
    }
}

/// The station of a container.
pub(crate) fn mac(container: usize) -> [u8; 6] {
    let [high, low] = (container as u16 + 1).to_be_bytes();
    [2, 0, 0, 0, high, low]
}
