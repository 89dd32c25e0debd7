//! Carries the API: HTTP/1.1 on a unix socket, on one thread of its own. No client can hold it up: headers, requests and connections
//! have deadlines, bodies a size, connections a number.

use std::convert::Infallible;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use axum::Json;
use axum::Router;
use axum::extract::{DefaultBodyLimit, Request};
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::middleware::{Next, from_fn};
use axum::response::{IntoResponse, Response};
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, watch};

use super::api::{Desk, ErrorBody, Operator, Origin, router};
use super::keys::ConfigError;
use super::socket::OwnedSocket;
use super::state::{Owner, Permissions};

/// A file of 4096 ports with every key has half a megabyte.
const BODY_MAX: usize = 2 << 20;
/// Clients at one time; the next one waits in the kernel's queue until one of them is done or out of time.
const CONNECTIONS_MAX: usize = 32;
/// Threads on which the operator may block.
const BLOCKING_MAX: usize = 2;
/// What a client may take for its headers.
const HEADER_TIME: Duration = Duration::from_secs(2);
/// What a request may take, its body included.
const REQUEST_TIME: Duration = Duration::from_secs(10);
/// What a connection may take, reading our answer included.
const CONNECTION_TIME: Duration = Duration::from_secs(20);
/// What running requests may still take when the switch stops: all of that has to fit into 100 ms.
const STOP_TIME: Duration = Duration::from_millis(50);

/// A running API; it ends when dropped.
#[derive(Debug)]
pub struct Api {
    path: PathBuf,
    stop: watch::Sender<bool>,
    thread: Option<JoinHandle<()>>,
}

/// Where and for whom to listen.
#[derive(Clone, Debug)]
pub struct ApiSettings {
    /// The socket.
    pub path: PathBuf,
    /// Its permissions.
    pub mode: Permissions,
    /// Its owner, if not the process's.
    pub owner: Option<Owner>,
    /// What `reload` starts from.
    pub origin: Origin,
}

impl ApiSettings {
    /// For its owner alone, unless told.
    pub const MODE: Permissions = Permissions(0o600);

    /// A socket for its owner alone.
    pub fn private(path: impl Into<PathBuf>) -> Self {
        ApiSettings {
            path: path.into(),
            mode: Self::MODE,
            owner: None,
            origin: Origin::default(),
        }
    }
}

/// A control socket that is taken but not answered yet: clients wait.
#[derive(Debug)]
pub struct Waiting {
    settings: ApiSettings,
    socket: OwnedSocket,
}

impl Waiting {
    /// Answers from a thread of its own until dropped.
    pub fn serve(self, operator: Arc<dyn Operator>) -> Result<Api, ConfigError> {
        let Waiting { settings, socket } = self;
        let path = settings.path;
        let failed = |error: std::io::Error| {
            ConfigError(format!("{}: cannot be served: {error}", path.display()))
        };
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .max_blocking_threads(BLOCKING_MAX)
            .thread_name("api-ask")
            .build()
            .map_err(failed)?;
        let (stop, stopped) = watch::channel(false);
        let desk = Desk {
            operator,
            origin: settings.origin,
        };
        let thread = std::thread::Builder::new()
            .name("api".to_owned())
            .spawn(move || {
                runtime.block_on(serve(&socket, router(desk), stopped));
                runtime.shutdown_timeout(STOP_TIME);
            })
            .map_err(failed)?;
        Ok(Api {
            path,
            stop,
            thread: Some(thread),
        })
    }
}

impl Api {
    /// Takes the socket.
    pub fn listen(settings: ApiSettings) -> Result<Waiting, ConfigError> {
        let socket = OwnedSocket::listen(&settings.path, settings.mode, settings.owner)?;
        Ok(Waiting { settings, socket })
    }

    /// The socket.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Api {
    fn drop(&mut self) {
        self.stop.send_replace(true);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

async fn serve(socket: &OwnedSocket, router: Router, stopped: watch::Receiver<bool>) {
    let listener = socket.listener.try_clone().and_then(|listener| {
        listener.set_nonblocking(true)?;
        UnixListener::from_std(listener)
    });
    let listener = match listener {
        Ok(listener) => listener,
        Err(error) => {
            return log::error!(
                "the API cannot listen: {error}: nobody can ask this switch until it restarts"
            );
        }
    };
    let router = router
        .layer(from_fn(in_time))
        .layer(DefaultBodyLimit::max(BODY_MAX));
    let slots = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let mut stop = stopped.clone();
    let accept = async {
        loop {
            let Ok(slot) = slots.clone().acquire_owned().await else {
                return;
            };
            match listener.accept().await {
                Ok((stream, _)) => {
                    let connection = connection(stream, router.clone(), stopped.clone());
                    tokio::spawn(async move {
                        connection.await;
                        drop(slot);
                    });
                }
                // Out of file descriptors, mostly: others may free some.
                Err(error) => {
                    log::warn!("the API cannot accept a client: {error}");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    };
    tokio::select! {
        () = accept => {}
        _ = stop.wait_for(|stop| *stop) => {}
    }
    // All slots back: every connection has ended.
    let _ = tokio::time::timeout(STOP_TIME, slots.acquire_many(CONNECTIONS_MAX as u32)).await;
}

async fn connection(stream: UnixStream, router: Router, mut stopped: watch::Receiver<bool>) {
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIME)
        .max_buf_size(64 << 10)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router));
    let mut served = pin!(served);
    let end = tokio::time::sleep(CONNECTION_TIME);
    // A client that breaks off or sends garbage is its own business: hyper has answered 400 where it could.
    tokio::select! {
        _ = served.as_mut() => return,
        () = end => return,
        _ = stopped.wait_for(|stop| *stop) => served.as_mut().graceful_shutdown(),
    }
    let _ = served.await;
}

async fn in_time(request: Request, next: Next) -> Result<Response, Infallible> {
    let refuse =
        |status: StatusCode, error: String| (status, Json(ErrorBody { error })).into_response();
    let Ok(answer) = tokio::time::timeout(REQUEST_TIME, next.run(request)).await else {
        let error = format!(
            "this took longer than {} s: send the whole request, or ask again",
            REQUEST_TIME.as_secs()
        );
        return Ok(refuse(StatusCode::REQUEST_TIMEOUT, error));
    };
    // What axum refuses by itself is plain text.
    let status = answer.status();
    let is_json = answer
        .headers()
        .get(CONTENT_TYPE)
        .is_some_and(|kind| kind == "application/json");
    if is_json || status.is_success() {
        return Ok(answer);
    }
    Ok(refuse(
        status,
        match status {
            StatusCode::PAYLOAD_TOO_LARGE => {
                format!("the body is larger than {BODY_MAX} bytes: send less")
            }
            _ => format!(
                "the request was not understood ({status}): GET /openapi.json describes what is"
            ),
        },
    ))
}
