//! What an uplink tells of itself; plain data, used through [`super::state`].

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::dataplane::eth::Mac;

/// What an uplink has agreed on with the PF of its VF, and what the PF refused.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct UplinkStatus {
    /// The VF's own address; none: it was never reached.
    #[schema(value_type = Option<String>)]
    pub mac: Option<Mac>,
    /// Version of the mailbox protocol, like `1.4`.
    pub api: String,
    /// Speed of the link in Mbit/s; 0: no link.
    pub link_mbit: u32,
    /// Longest frame without tag and checksum that the PF lets through.
    pub frame_max: u32,
    /// Stations behind the other ports whose frames the PF delivers.
    pub registered: u64,
    /// Those whose addresses it refused.
    pub refused: Vec<RefusedAddress>,
    /// How often it has refused one since the port was added.
    pub refusals: u64,
    /// How often the VF had to start over since: the PF was reset, or took its leave to send.
    pub restarts: u64,
}

/// An address that the PF does not deliver.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct RefusedAddress {
    /// The address.
    #[schema(value_type = String)]
    pub mac: Mac,
    /// What to do about it.
    pub remedy: String,
}
