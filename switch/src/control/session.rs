//! What serves a port: a guest's session or an uplink's, by the port's type.

use std::sync::Arc;

use super::keys::ConfigError;
use super::port_handle::PortHandle;
use super::state::{PortKind, PortSpec};
use super::uplink::Uplink;
use super::vhost_user;

/// A port's session. Threads: any thread may call any method.
pub(super) enum Session {
    Guest(vhost_user::Session),
    Uplink(Uplink),
}

impl Session {
    pub(super) fn start(
        spec: &PortSpec,
        handle: Arc<dyn PortHandle>,
    ) -> Result<Session, ConfigError> {
        match spec.kind {
            PortKind::VhostUser => vhost_user::Session::start(spec, handle).map(Session::Guest),
            PortKind::Ixgbevf => Uplink::start(spec, handle).map(Session::Uplink),
        }
    }

    /// Asks the session to end; does not wait.
    pub(super) fn ask_to_stop(&self) {
        match self {
            Session::Guest(session) => session.ask_to_stop(),
            Session::Uplink(uplink) => uplink.ask_to_stop(),
        }
    }

    /// Ends it: its rings are detached.
    pub(super) fn stop(&self) {
        match self {
            Session::Guest(session) => session.stop(),
            Session::Uplink(uplink) => uplink.stop(),
        }
    }

    /// A guest's memory is not to be trusted any more.
    pub(super) fn poisoned(&self) {
        if let Session::Guest(session) = self {
            session.poisoned();
        }
    }
}
