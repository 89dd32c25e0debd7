//! What can be asked of a running switch over HTTP: the routes, their JSON, and the [`Operator`] who answers.
//!
//! ```text
//! curl --unix-socket /run/ringway/api.sock http://ringway/v1/ports
//! ```
//!
//! [`super::serve`] carries it; every error is `{"error": "one sentence"}`.

use std::path::PathBuf;
use std::sync::Arc;

use axum::body::Bytes;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Path, Query, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, post};
use axum::{Json, Router};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, OpenApi, ToSchema};

use super::config::{Config, ConfigError};
use super::cpu::HostCpus;
use super::spec::{parse_port, port_from_json};
use super::state::{
    Applied, FdbAdd, FdbFilter, FdbPage, PortSpec, PortStatus, QueueMove, StatsReport, Version,
    WorkerStatus,
};
use super::{metrics, plan};
use crate::dataplane::eth::Mac;

/// Stations in one answer unless more are asked for.
const FDB_LIMIT: usize = 1000;

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
        let remedy = super::keys::did_you_mean(name, names)
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

#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(default)]
#[into_params(parameter_in = Query)]
struct Limit {
    /// Most stations to answer with; 1000 unless told.
    limit: Option<usize>,
}

/// What the routes share.
#[derive(Clone)]
pub(crate) struct Desk {
    pub(crate) operator: Arc<dyn Operator>,
    pub(crate) config_file: Option<PathBuf>,
}

impl Desk {
    /// Goes to the configuration in the file, or in the text given.
    pub(crate) fn reload(&self, wanted: &Reload) -> Result<Applied, Refusal> {
        let host = HostCpus::read(std::path::Path::new("/"));
        let new = match (&wanted.toml, &self.config_file) {
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
        if !wanted.dry_run {
            return self.operator.apply(new);
        }
        let old = self.operator.config();
        let actions = plan::plan(&old, &new)?;
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
}

#[derive(OpenApi)]
#[openapi(
    info(
        title = "Ringway",
        description = "The control socket of a Ringway switch."
    ),
    paths(
        version,
        config,
        reload,
        ports,
        port,
        add_port,
        del_port,
        move_queue,
        fdb,
        fdb_flush,
        fdb_add,
        fdb_del,
        stats,
        workers,
        metrics_text,
        healthz,
        openapi
    )
)]
struct Description;

/// The OpenAPI description of the API.
pub fn description() -> utoipa::openapi::OpenApi {
    Description::openapi()
}

pub(crate) fn router(desk: Desk) -> Router {
    Router::new()
        .route("/v1/version", get(version))
        .route("/v1/config", get(config))
        .route("/v1/reload", post(reload))
        .route("/v1/ports", get(ports).post(add_port))
        .route("/v1/ports/{name}", get(port).delete(del_port))
        .route("/v1/ports/{name}/move", post(move_queue))
        .route("/v1/fdb", get(fdb).post(fdb_add))
        .route("/v1/fdb/flush", post(fdb_flush))
        .route("/v1/fdb/{mac}", delete(fdb_del))
        .route("/v1/stats", get(stats))
        .route("/v1/workers", get(workers))
        .route("/metrics", get(metrics_text))
        .route("/healthz", get(healthz))
        .route("/openapi.json", get(openapi))
        .fallback(async || {
            Refusal::NotFound(
                "there is no such path: GET /openapi.json lists those there are".to_owned(),
            )
        })
        .method_not_allowed_fallback(async || {
            let error =
                "this path has no such method: GET /openapi.json lists those there are".to_owned();
            (StatusCode::METHOD_NOT_ALLOWED, Json(ErrorBody { error }))
        })
        .with_state(desk)
}

/// Asks the operator from a thread that may block.
async fn ask<T: Send + 'static>(
    desk: Desk,
    question: impl FnOnce(&Desk) -> Result<T, Refusal> + Send + 'static,
) -> Result<Json<T>, Refusal> {
    match tokio::task::spawn_blocking(move || question(&desk)).await {
        Ok(answer) => answer.map(Json),
        Err(_) => Err(Refusal::Failed(
            "the switch is stopping: ask again when it runs".to_owned(),
        )),
    }
}

fn body<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Refusal> {
    serde_json::from_slice(bytes).map_err(|error| {
        Refusal::Invalid(format!(
            "the body is not as /openapi.json describes it: {error}"
        ))
    })
}

fn query<T>(query: Result<Query<T>, QueryRejection>) -> Result<T, Refusal> {
    query.map(|Query(query)| query).map_err(|error| {
        Refusal::Invalid(format!(
            "the query is not as /openapi.json describes it: {}",
            error.body_text()
        ))
    })
}

/// Which program answers.
#[utoipa::path(get, path = "/v1/version", responses((status = 200, body = Version)))]
async fn version(State(desk): State<Desk>) -> Json<Version> {
    Json(Version {
        name: "ringway".to_owned(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        pid: std::process::id(),
        config: desk.config_file,
    })
}

/// The wanted state.
#[utoipa::path(get, path = "/v1/config", responses((status = 200, body = Config)))]
async fn config(State(desk): State<Desk>) -> Result<Json<Config>, Refusal> {
    ask(desk, |desk| Ok(desk.operator.config())).await
}

/// Goes to another wanted state; ports that are equal in both are not touched.
#[utoipa::path(post, path = "/v1/reload", request_body = Reload,
    responses((status = 200, body = Applied), (status = 400, body = ErrorBody)))]
async fn reload(State(desk): State<Desk>, bytes: Bytes) -> Result<Json<Applied>, Refusal> {
    let wanted: Reload = if bytes.is_empty() {
        Reload::default()
    } else {
        body(&bytes)?
    };
    ask(desk, move |desk| desk.reload(&wanted)).await
}

/// Every port.
#[utoipa::path(get, path = "/v1/ports", responses((status = 200, body = [PortStatus])))]
async fn ports(State(desk): State<Desk>) -> Result<Json<Vec<PortStatus>>, Refusal> {
    ask(desk, |desk| Ok(desk.operator.ports())).await
}

/// One port.
#[utoipa::path(get, path = "/v1/ports/{name}", params(("name" = String, Path, description = "The port")),
    responses((status = 200, body = PortStatus), (status = 404, body = ErrorBody)))]
async fn port(
    State(desk): State<Desk>,
    Path(name): Path<String>,
) -> Result<Json<PortStatus>, Refusal> {
    ask(desk, move |desk| desk.operator.port(&name)).await
}

/// Brings a port: its keys as a JSON object, or one JSON string `"vhost-user:blue,socket=..."`.
#[utoipa::path(post, path = "/v1/ports", request_body = PortSpec,
    responses((status = 201, body = PortStatus), (status = 400, body = ErrorBody), (status = 409, body = ErrorBody)))]
async fn add_port(
    State(desk): State<Desk>,
    bytes: Bytes,
) -> Result<(StatusCode, Json<PortStatus>), Refusal> {
    let value: serde_json::Value = body(&bytes)?;
    let spec = match &value {
        serde_json::Value::String(text) => parse_port(text, "port add")?,
        object => port_from_json(object, "port add")?,
    };
    Ok((
        StatusCode::CREATED,
        ask(desk, move |desk| desk.operator.add_port(spec)).await?,
    ))
}

/// Takes a port away.
#[utoipa::path(delete, path = "/v1/ports/{name}", params(("name" = String, Path, description = "The port")),
    responses((status = 204), (status = 404, body = ErrorBody)))]
async fn del_port(
    State(desk): State<Desk>,
    Path(name): Path<String>,
) -> Result<StatusCode, Refusal> {
    ask(desk, move |desk| desk.operator.del_port(&name))
        .await
        .map(|_| StatusCode::NO_CONTENT)
}

/// Gives a queue pair to another worker.
#[utoipa::path(post, path = "/v1/ports/{name}/move", params(("name" = String, Path, description = "The port")),
    request_body = QueueMove, responses((status = 200, body = PortStatus), (status = 400, body = ErrorBody), (status = 404, body = ErrorBody)))]
async fn move_queue(
    State(desk): State<Desk>,
    Path(name): Path<String>,
    bytes: Bytes,
) -> Result<Json<PortStatus>, Refusal> {
    let to: QueueMove = body(&bytes)?;
    ask(desk, move |desk| desk.operator.move_queue(&name, &to)).await
}

/// Stations of the forwarding table.
#[utoipa::path(get, path = "/v1/fdb", params(FdbFilter, Limit), responses((status = 200, body = FdbPage), (status = 400, body = ErrorBody)))]
async fn fdb(
    State(desk): State<Desk>,
    filter: Result<Query<FdbQuery>, QueryRejection>,
) -> Result<Json<FdbPage>, Refusal> {
    let FdbQuery {
        limit,
        bridge,
        port,
        vlan,
        mac,
    } = query(filter)?;
    let filter = FdbFilter {
        bridge,
        port,
        vlan,
        mac,
    };
    ask(desk, move |desk| {
        desk.operator.fdb(&filter, limit.unwrap_or(FDB_LIMIT))
    })
    .await
}

/// [`FdbFilter`] and [`Limit`] in one: a query string is flat, and serde cannot be strict about flattened structs.
#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct FdbQuery {
    limit: Option<usize>,
    bridge: Option<String>,
    port: Option<String>,
    vlan: Option<u16>,
    mac: Option<Mac>,
}

/// Forgets learned stations; static ones stay.
#[utoipa::path(post, path = "/v1/fdb/flush", request_body = FdbFilter,
    responses((status = 200, body = Removed), (status = 400, body = ErrorBody)))]
async fn fdb_flush(State(desk): State<Desk>, bytes: Bytes) -> Result<Json<Removed>, Refusal> {
    let filter: FdbFilter = if bytes.is_empty() {
        FdbFilter::default()
    } else {
        body(&bytes)?
    };
    ask(desk, move |desk| {
        desk.operator
            .fdb_flush(&filter)
            .map(|removed| Removed { removed })
    })
    .await
}

/// Adds a static station: it never ages and never moves.
#[utoipa::path(post, path = "/v1/fdb", request_body = FdbAdd,
    responses((status = 204), (status = 400, body = ErrorBody), (status = 404, body = ErrorBody)))]
async fn fdb_add(State(desk): State<Desk>, bytes: Bytes) -> Result<StatusCode, Refusal> {
    let station: FdbAdd = body(&bytes)?;
    ask(desk, move |desk| desk.operator.fdb_add(&station))
        .await
        .map(|_| StatusCode::NO_CONTENT)
}

/// Removes a station, static or learned.
#[utoipa::path(delete, path = "/v1/fdb/{mac}", params(("mac" = String, Path, description = "Its address"), FdbFilter),
    responses((status = 200, body = Removed), (status = 400, body = ErrorBody), (status = 404, body = ErrorBody)))]
async fn fdb_del(
    State(desk): State<Desk>,
    Path(mac): Path<String>,
    filter: Result<Query<FdbFilter>, QueryRejection>,
) -> Result<Json<Removed>, Refusal> {
    let mac: Mac = mac
        .parse()
        .map_err(|error| Refusal::Invalid(format!("{error}")))?;
    let filter = query(filter)?;
    ask(desk, move |desk| {
        desk.operator
            .fdb_del(mac, &filter)
            .map(|removed| Removed { removed })
    })
    .await
}

/// All counters at one moment.
#[utoipa::path(get, path = "/v1/stats", responses((status = 200, body = StatsReport)))]
async fn stats(State(desk): State<Desk>) -> Result<Json<StatsReport>, Refusal> {
    ask(desk, |desk| Ok(desk.operator.stats())).await
}

/// Every worker.
#[utoipa::path(get, path = "/v1/workers", responses((status = 200, body = [WorkerStatus])))]
async fn workers(State(desk): State<Desk>) -> Result<Json<Vec<WorkerStatus>>, Refusal> {
    ask(desk, |desk| Ok(desk.operator.workers())).await
}

/// Counters for Prometheus.
#[utoipa::path(get, path = "/metrics", responses((status = 200, body = String, content_type = "application/openmetrics-text")))]
async fn metrics_text(State(desk): State<Desk>) -> Result<Response, Refusal> {
    let Json(text) = ask(desk, |desk| {
        let states = desk
            .operator
            .ports()
            .into_iter()
            .map(|port| (port.spec.name, port.state))
            .collect();
        Ok(metrics::encode(desk.operator.stats(), states))
    })
    .await?;
    Ok(([(header::CONTENT_TYPE, metrics::CONTENT_TYPE)], text).into_response())
}

/// Answers while the API lives.
#[utoipa::path(get, path = "/healthz", responses((status = 200, body = String)))]
async fn healthz() -> &'static str {
    "ok\n"
}

/// This description.
#[utoipa::path(get, path = "/openapi.json", responses((status = 200, description = "OpenAPI 3.1")))]
async fn openapi() -> Json<utoipa::openapi::OpenApi> {
    Json(description())
}
