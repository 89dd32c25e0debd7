//! A port as the operator wants it; plain data, used through [`super::state`].

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::dataplane::eth::Mac;

/// The bridge of a port that names none.
pub const DEFAULT_BRIDGE: &str = "default";
/// Largest `mtu` a port may have: what a 16-bit length can say.
pub const MTU_MAX: u32 = 65_535;
/// Queue pairs a port may offer.
pub const QUEUES_MAX: u16 = 16;
/// An Ethernet header with one 802.1Q tag: what a frame has on top of the MTU.
const HEADER_MAX: u32 = 18;

/// A port as the operator wants it: the keys of a `[[port]]` table, of a `type:name,key=value` text and of the API.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct PortSpec {
    /// Unique in the switch: 1 to 32 letters, digits, `.`, `_` or `-`.
    pub name: String,
    /// What is behind the port.
    #[serde(rename = "type")]
    pub kind: PortKind,
    /// The vhost-user socket: absolute, at most 107 bytes. Empty for an uplink.
    #[serde(default, skip_serializing_if = "is_empty")]
    #[schema(value_type = String)]
    pub socket: PathBuf,
    /// PCI address of the VF of an uplink, bound to `vfio-pci`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
    /// Socket of a process that serves a VF, in place of `device`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub vfio_user: Option<PathBuf>,
    /// Who creates the socket.
    #[serde(default)]
    pub mode: SocketMode,
    /// Queue pairs offered, 1 to 16.
    #[serde(default = "one")]
    pub queues: u16,
    /// Ports of one bridge see each other, ports of different bridges never do.
    #[serde(default = "default_bridge")]
    pub bridge: String,
    /// Largest payload of a frame, Ethernet header not counted.
    #[serde(default = "default_mtu")]
    pub mtu: u32,
    /// Whether the guest's memory must be hugepages.
    #[serde(default)]
    pub hugepages: Hugepages,
    /// Permission bits of the socket (`mode = "server"` only), `"0660"` unless told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub socket_mode: Option<Permissions>,
    /// Owner of the socket (`mode = "server"` only).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub socket_owner: Option<Owner>,
    /// The only user whose processes may have the port; none: whoever can reach the socket.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peer_uid: Option<u32>,
    /// The only addresses that may be behind the port, and nowhere else in its bridge; empty: any.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schema(value_type = Vec<String>)]
    pub mac: Vec<Mac>,
    /// Stations that may be learnt at the port at one time; 0: any number.
    #[serde(default, skip_serializing_if = "none")]
    pub stations: u32,
    /// Stations of other ports that may move to this one, per second; 0: any number.
    #[serde(default, skip_serializing_if = "none")]
    pub moves: u32,
    /// Frames per second that the port may flood (broadcast, multicast, unknown destination); 0: any number.
    #[serde(default, skip_serializing_if = "none")]
    pub floods: u32,
    /// CPUs of the workers that poll this port, queue pair by queue pair, in turn; empty: Ringway chooses.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub workers: Vec<usize>,
}

impl PortSpec {
    /// A vhost-user port with every default.
    pub fn vhost_user(name: impl Into<String>, socket: impl Into<PathBuf>) -> Self {
        PortSpec {
            name: name.into(),
            kind: PortKind::VhostUser,
            socket: socket.into(),
            device: None,
            vfio_user: None,
            mode: SocketMode::default(),
            queues: 1,
            bridge: default_bridge(),
            mtu: MTU_MAX,
            hugepages: Hugepages::default(),
            socket_mode: None,
            socket_owner: None,
            peer_uid: None,
            mac: Vec::new(),
            stations: 0,
            moves: 0,
            floods: 0,
            workers: Vec::new(),
        }
    }

    /// Where the port's other end is: a socket, or a PCI address. No two ports may have the same.
    pub fn place(&self) -> String {
        match (&self.device, &self.vfio_user) {
            (Some(device), _) => device.clone(),
            (None, Some(path)) => path.display().to_string(),
            (None, None) => self.socket.display().to_string(),
        }
    }

    /// The longest frame the port takes, in bytes: MTU, Ethernet header and one VLAN tag, but never more than 65,535.
    pub fn frame_max(&self) -> usize {
        (self.mtu + HEADER_MAX).min(MTU_MAX) as usize
    }
}

fn is_empty(path: &Path) -> bool {
    path.as_os_str().is_empty()
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes references")]
fn none(limit: &u32) -> bool {
    *limit == 0
}

fn one() -> u16 {
    1
}

fn default_bridge() -> String {
    DEFAULT_BRIDGE.to_owned()
}

fn default_mtu() -> u32 {
    MTU_MAX
}

/// Types of ports this build has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum PortKind {
    /// A container with DPDK's virtio_user, or a VM with virtio-net.
    VhostUser,
    /// A VF of an 82599 NIC: the way to the wire.
    Ixgbevf,
}

/// Who creates the socket of a vhost-user port.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum SocketMode {
    /// Ringway listens, the guest connects.
    #[default]
    Server,
    /// The guest listens (`server=1` of virtio_user); Ringway connects, and reconnects for ever.
    Client,
}

/// What a port asks of its guest's memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Hugepages {
    /// Any shared memory will do.
    #[default]
    Any,
    /// 4 KiB pages are refused: a hostile guest then costs its neighbours far shorter stalls.
    Required,
}

/// User and group ids, `"1000:104"` in text, TOML and JSON; what is absent stays as it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Owner {
    /// User id.
    pub uid: Option<u32>,
    /// Group id.
    pub gid: Option<u32>,
}

impl TryFrom<String> for Owner {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let (user, group) = text.split_once(':').unwrap_or((&text, ""));
        let id = |text: &str| match text {
            "" => Ok(None),
            text => text
                .parse()
                .map(Some)
                .map_err(|_| format!("{text:?} is not an id")),
        };
        Ok(Owner {
            uid: id(user)?,
            gid: id(group)?,
        })
    }
}

impl From<Owner> for String {
    fn from(owner: Owner) -> String {
        let id = |id: Option<u32>| id.map(|id| id.to_string()).unwrap_or_default();
        format!("{}:{}", id(owner.uid), id(owner.gid))
    }
}

/// Permission bits of a file, `"0660"` in text, TOML and JSON.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Permissions(pub u32);

impl TryFrom<String> for Permissions {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        u32::from_str_radix(&text, 8)
            .map(Permissions)
            .map_err(|_| format!("{text:?} is not octal"))
    }
}

impl From<Permissions> for String {
    fn from(bits: Permissions) -> String {
        format!("{:04o}", bits.0)
    }
}

/// What workers do when there is nothing to do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Idle {
    /// Poll on: lowest latency, a whole CPU per worker.
    #[default]
    Poll,
    /// Sleep after a while without frames, wake on a kick or a timer.
    Adaptive,
}
