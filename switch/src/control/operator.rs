//! What may be asked of a running switch: the [`Operator`] who answers, and what questions and refusals look like.

use std::path::{Path, PathBuf};

use axum::Json;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::config::{Config, ConfigError};
use super::cpu::HostCpus;
use super::keys::did_you_mean;
use super::plan::plan;
use super::state::{
    Applied, FdbAdd, FdbFilter, FdbPage, PortSpec, PortStatus, QueueMove, StatsReport, WorkerStatus,
};
use crate::dataplane::eth::Mac;

/// Who answers: the engine. Calls may block for a while; they come from two threads at most.
pub trait Operator: Send + Sync {
    /// What is wanted now: the configuration it started with and all changes since.
    fn config(&self) -> Config;
    /// Goes to another configuration, doing only the difference, or changes nothing.
    fn apply(&self, wanted: Config) -> Result<Applied, Refusal>;
    /// Every port, in the order they were added.
    fn ports(&self) -> Vec<PortStatus>;
    /// One port.
    fn port(&self, name: &str) -> Result<PortStatus, Refusal>;
    /// Brings a port.
    fn add_port(&self, spec: PortSpec) -> Result<PortStatus, Refusal>;
    /// Takes a port away.
    fn del_port(&self, name: &str) -> Result<(), Refusal>;
    /// Gives a queue pair to another worker.
    fn move_queue(&self, port: &str, to: &QueueMove) -> Result<PortStatus, Refusal>;
    /// Stations that match, at most `limit` of them.
    fn fdb(&self, filter: &FdbFilter, limit: usize) -> Result<FdbPage, Refusal>;
    /// Forgets learned stations that match; says how many.
    fn fdb_flush(&self, filter: &FdbFilter) -> Result<u64, Refusal>;
    /// Adds a static station.
    fn fdb_add(&self, station: &FdbAdd) -> Result<(), Refusal>;
    /// Removes stations with this address, static ones too, in the bridge and VLAN of the filter; says how many.
    fn fdb_del(&self, mac: Mac, filter: &FdbFilter) -> Result<u64, Refusal>;
    /// All counters at one moment.
    fn stats(&self) -> StatsReport;
    /// Every worker.
    fn workers(&self) -> Vec<WorkerStatus>;
}

/// Why something was not done: one sentence with the remedy, for a person.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The thing meant does not exist.
    #[error("{0}")]
    NotFound(String),
    /// It clashes with what is there.
    #[error("{0}")]
    Conflict(String),
    /// It makes no sense.
    #[error("{0}")]
    Invalid(String),
    /// It made sense and went wrong.
    #[error("{0}")]
    Failed(String),
}

impl Refusal {
    /// For a port nobody has heard of; `names` are those there are.
    pub fn no_port(name: &str, names: &[&str]) -> Refusal {
        let remedy = did_you_mean(name, names)
            .unwrap_or_else(|| "ringway port list shows those there are".to_owned());
        Refusal::NotFound(format!("there is no port {name:?}: {remedy}"))
    }
}

impl From<ConfigError> for Refusal {
    fn from(error: ConfigError) -> Self {
        Refusal::Invalid(error.0)
    }
}

/// The body of every error.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct ErrorBody {
    /// What is wrong and what to do.
    pub error: String,
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let status = match &self {
            Refusal::NotFound(_) => StatusCode::NOT_FOUND,
            Refusal::Conflict(_) => StatusCode::CONFLICT,
            Refusal::Invalid(_) => StatusCode::BAD_REQUEST,
            Refusal::Failed(_) => StatusCode::INTERNAL_SERVER_ERROR,
        };
        (
            status,
            Json(ErrorBody {
                error: self.to_string(),
            }),
        )
            .into_response()
    }
}

/// How many stations went.
#[derive(Clone, Copy, Debug, Serialize, Deserialize, ToSchema)]
pub struct Removed {
    /// That many.
    pub removed: u64,
}

/// What to load again.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Reload {
    /// The text of a configuration file; none: the file the switch was started with.
    pub toml: Option<String>,
    /// What to call that text in refusals.
    pub name: Option<String>,
    /// Only say what would be done.
    pub dry_run: bool,
}

/// What a switch was started with.
#[derive(Clone, Debug, Default)]
pub struct Origin {
    /// Its configuration file.
    pub file: Option<PathBuf>,
    /// Whether the command line named the control socket: that outranks the file, at the start and later.
    pub api_given: bool,
}

/// Goes to the configuration in the text given, or else in the file the switch was started with.
pub fn reload(
    operator: &dyn Operator,
    origin: &Origin,
    wanted: &Reload,
) -> Result<Applied, Refusal> {
    let host = HostCpus::read(Path::new("/"));
    let mut new = match (&wanted.toml, &origin.file) {
        (Some(text), _) => Config::parse(
            text,
            wanted.name.as_deref().unwrap_or("the configuration"),
            &host,
        )?,
        (None, Some(file)) => Config::load(file, &host)?,
        (None, None) => {
            return Err(Refusal::Invalid(
                "this ringway was started without a configuration file: name one with ringway reload --config FILE".to_owned(),
            ));
        }
    };
    let old = operator.config();
    if let (Some(api), true) = (&old.api, origin.api_given || new.api.is_none()) {
        new.listen_at(api.clone())?;
    }
    let actions = plan(&old, &new)?;
    if !wanted.dry_run {
        return operator.apply(new);
    }
    let unchanged = new
        .ports
        .iter()
        .filter(|port| old.ports.contains(port))
        .count();
    Ok(Applied {
        actions: actions.iter().map(ToString::to_string).collect(),
        unchanged,
    })
}
