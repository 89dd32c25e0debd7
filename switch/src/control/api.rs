//! What can be asked of a running switch over HTTP: the routes, their JSON, and the [`Operator`] who answers.
//!
//! ```text
//! curl --unix-socket /run/ringway/api.sock http://ringway/v1/ports
//! ```
//!
//! [`super::serve`] carries it; every error is `{"error": "one sentence"}`.

use std::sync::Arc;

use axum::body::Bytes;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Path, Query, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, post};
use axum::{Json, Router};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use utoipa::{IntoParams, OpenApi};

use super::config::Config;
use super::metrics;
pub use super::operator::{ErrorBody, Operator, Origin, Refusal, Reload, Removed, reload};
use super::security::SecurityReport;
use super::spec::{parse_port, port_from_json};
use super::state::{
    Applied, FdbAdd, FdbFilter, FdbPage, PortSpec, PortStatus, QueueMove, StatsReport, Version,
    WorkerStatus,
};
use crate::dataplane::eth::Mac;

/// Stations in one answer unless more are asked for.
const FDB_LIMIT: usize = 1000;

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
    pub(crate) origin: Origin,
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
        reload_config,
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
        security,
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
        .route("/v1/reload", post(reload_config))
        .route("/v1/ports", get(ports).post(add_port))
        .route("/v1/ports/{name}", get(port).delete(del_port))
        .route("/v1/ports/{name}/move", post(move_queue))
        .route("/v1/fdb", get(fdb).post(fdb_add))
        .route("/v1/fdb/flush", post(fdb_flush))
        .route("/v1/fdb/{mac}", delete(fdb_del))
        .route("/v1/stats", get(stats))
        .route("/v1/workers", get(workers))
        .route("/v1/security", get(security))
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
        config: desk.origin.file,
    })
}

/// How the switch is guarded against whoever breaks into it.
#[utoipa::path(get, path = "/v1/security", responses((status = 200, body = SecurityReport)))]
async fn security(State(desk): State<Desk>) -> Result<Json<SecurityReport>, Refusal> {
    ask(desk, |_| Ok(SecurityReport::here())).await
}

/// The wanted state.
#[utoipa::path(get, path = "/v1/config", responses((status = 200, body = Config)))]
async fn config(State(desk): State<Desk>) -> Result<Json<Config>, Refusal> {
    ask(desk, |desk| Ok(desk.operator.config())).await
}

/// Goes to another wanted state; ports that are equal in both are not touched.
#[utoipa::path(post, path = "/v1/reload", request_body = Reload,
    responses((status = 200, body = Applied), (status = 400, body = ErrorBody)))]
async fn reload_config(State(desk): State<Desk>, bytes: Bytes) -> Result<Json<Applied>, Refusal> {
    let wanted: Reload = if bytes.is_empty() {
        Reload::default()
    } else {
        body(&bytes)?
    };
    ask(desk, move |desk| {
        reload(&*desk.operator, &desk.origin, &wanted)
    })
    .await
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
        let ports = desk.operator.ports();
        Ok(metrics::encode(desk.operator.stats(), &ports))
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
