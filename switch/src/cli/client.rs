//! Asks a running ringway over its control socket.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, anyhow, bail};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::Bytes;
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;

use crate::control::api::ErrorBody;

/// An answer that takes longer does not come.
const PATIENCE: Duration = Duration::from_secs(15);
/// Four thousand ports with all their counters have some ten megabytes.
const ANSWER_MAX: usize = 256 << 20;

/// One control socket; a connection per question.
#[derive(Clone, Debug)]
pub struct Client {
    path: PathBuf,
}

impl Client {
    /// Asks at this socket.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Client { path: path.into() }
    }

    /// The socket.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// `GET`.
    pub fn get<T: DeserializeOwned>(&self, what: &str) -> anyhow::Result<T> {
        self.json(Method::GET, what, Bytes::new())
    }

    /// `POST` with a JSON body.
    pub fn post<T: DeserializeOwned>(
        &self,
        what: &str,
        body: &impl Serialize,
    ) -> anyhow::Result<T> {
        self.json(Method::POST, what, serde_json::to_vec(body)?.into())
    }

    /// `DELETE`.
    pub fn delete<T: DeserializeOwned>(&self, what: &str) -> anyhow::Result<T> {
        self.json(Method::DELETE, what, Bytes::new())
    }

    /// Any request; the status and the body as they come.
    pub fn ask(
        &self,
        method: Method,
        what: &str,
        body: Bytes,
    ) -> anyhow::Result<(StatusCode, Bytes)> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        runtime.block_on(async {
            tokio::time::timeout(PATIENCE, self.exchange(method, what, body))
                .await
                .map_err(|_| {
                    let (path, seconds) = (self.path.display(), PATIENCE.as_secs());
                    anyhow!("ringway at {path} did not answer within {seconds} s: see its log")
                })?
        })
    }

    fn json<T: DeserializeOwned>(
        &self,
        method: Method,
        what: &str,
        body: Bytes,
    ) -> anyhow::Result<T> {
        let (status, body) = self.ask(method, what, body)?;
        if !status.is_success() {
            match serde_json::from_slice::<ErrorBody>(&body) {
                Ok(refusal) => bail!("{}", refusal.error),
                Err(_) => bail!(
                    "{} answered {status} to {what}: is it a ringway?",
                    self.path.display()
                ),
            }
        }
        // "No content" is JSON's null.
        let body: &[u8] = if body.is_empty() { b"null" } else { &body };
        serde_json::from_slice(body).with_context(|| {
            format!(
                "{} answered {what} in a form this version does not know: is it another version?",
                self.path.display()
            )
        })
    }

    async fn exchange(
        &self,
        method: Method,
        what: &str,
        body: Bytes,
    ) -> anyhow::Result<(StatusCode, Bytes)> {
        let stream = UnixStream::connect(&self.path)
            .await
            .map_err(|error| self.unreachable(&error))?;
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        tokio::spawn(connection);
        let request = Request::builder()
            .method(method)
            .uri(what)
            .header("host", "ringway")
            .header("content-type", "application/json")
            .header("connection", "close")
            .body(Full::new(body))?;
        let broken = || format!("{} broke off: did ringway stop?", self.path.display());
        let answer = sender.send_request(request).await.with_context(broken)?;
        let status = answer.status();
        let body = Limited::new(answer.into_body(), ANSWER_MAX)
            .collect()
            .await
            .map_err(|error| anyhow!("{}: {error}", broken()))?;
        Ok((status, body.to_bytes()))
    }

    fn unreachable(&self, error: &io::Error) -> anyhow::Error {
        let path = self.path.display();
        let start =
            "start one with `ringway run --config FILE`, or name its socket with --api PATH";
        match error.kind() {
            io::ErrorKind::NotFound => anyhow!("no ringway runs at {path}: {start}"),
            io::ErrorKind::ConnectionRefused => {
                anyhow!("the ringway that was at {path} is dead: {start}")
            }
            io::ErrorKind::PermissionDenied => {
                anyhow!(
                    "{path} may not be opened by this user: run as the user of the switch, or set api-mode and api-owner"
                )
            }
            _ => anyhow!("{path} cannot be reached: {error}: {start}"),
        }
    }
}

/// A part of a path or query, with everything but the plainest letters escaped.
pub(super) fn escape(text: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~".contains(&byte);
    text.bytes()
        .map(|byte| {
            if plain(byte) {
                char::from(byte).to_string()
            } else {
                format!("%{byte:02X}")
            }
        })
        .collect()
}

/// `?a=1&b=2` of those that are given.
pub(super) fn query(pairs: &[(&str, Option<String>)]) -> String {
    let given = pairs
        .iter()
        .filter_map(|(key, value)| Some(format!("{key}={}", escape(value.as_ref()?))));
    let given: Vec<String> = given.collect();
    if given.is_empty() {
        String::new()
    } else {
        format!("?{}", given.join("&"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tells_how_to_start_a_switch_when_none_runs() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("api.sock");
        let why = || {
            Client::new(&path)
                .get::<()>("/healthz")
                .expect_err("nobody there")
                .to_string()
        };
        let start =
            "start one with `ringway run --config FILE`, or name its socket with --api PATH";
        assert_eq!(
            why(),
            format!("no ringway runs at {}: {start}", path.display())
        );
        drop(std::os::unix::net::UnixListener::bind(&path).expect("bound"));
        assert_eq!(
            why(),
            format!(
                "the ringway that was at {} is dead: {start}",
                path.display()
            )
        );
    }

    #[test]
    fn escapes_what_would_break_a_path() {
        assert_eq!(escape("blue-1.a"), "blue-1.a");
        assert_eq!(escape("a/b c?"), "a%2Fb%20c%3F");
        assert_eq!(
            query(&[("a", None), ("mac", Some("02:00".into()))]),
            "?mac=02%3A00"
        );
        assert_eq!(query(&[("a", None)]), "");
    }
}
