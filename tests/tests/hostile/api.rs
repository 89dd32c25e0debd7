//! The switch's API as a client in a hurry uses it: one request, one connection, no process started.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use ringway::control::state::{PortState, PortStatus, StatsReport};

/// How long anything may take on a machine that is busy with other tests, or hardly lets this one run.
pub(super) const PATIENCE: Duration = Duration::from_secs(60);

/// Sends one request and returns the body of its answer; an error if the answer is one.
pub(super) fn ask(socket: &Path, method: &str, path: &str, body: &str) -> Result<String> {
    let mut stream = UnixStream::connect(socket).context("the API's socket")?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let length = body.len();
    write!(
        stream,
        "{method} {path} HTTP/1.1\r\nHost: ringway\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n{body}"
    )?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, body) = answer
        .split_once("\r\n\r\n")
        .context("an answer without end of headers")?;
    let status: u16 = head.split(' ').nth(1).unwrap_or("").parse()?;
    ensure!(status < 300, "{method} {path}: {status}: {body}");
    Ok(body.to_owned())
}

/// `ringway port show NAME`.
pub(super) fn port(socket: &Path, name: &str) -> Result<PortStatus> {
    Ok(serde_json::from_str(&ask(
        socket,
        "GET",
        &format!("/v1/ports/{name}"),
        "",
    )?)?)
}

/// `ringway port add SPEC`.
pub(super) fn add_port(socket: &Path, spec: &str) -> Result<()> {
    ask(socket, "POST", "/v1/ports", &serde_json::to_string(spec)?).map(drop)
}

/// `ringway port del NAME`.
pub(super) fn del_port(socket: &Path, name: &str) -> Result<()> {
    ask(socket, "DELETE", &format!("/v1/ports/{name}"), "").map(drop)
}

/// `ringway stats`.
pub(super) fn stats(socket: &Path) -> Result<StatsReport> {
    Ok(serde_json::from_str(&ask(socket, "GET", "/v1/stats", "")?)?)
}

/// Waits until a port is as `wanted` says.
pub(super) fn wait_port(
    socket: &Path,
    name: &str,
    what: &str,
    wanted: impl Fn(&PortStatus) -> bool,
) -> Result<PortStatus> {
    let end = Instant::now() + PATIENCE;
    loop {
        let status = port(socket, name)?;
        if wanted(&status) {
            return Ok(status);
        }
        if Instant::now() > end {
            bail!(
                "port {name:?} is not {what}: it is {}, {:?}",
                status.state,
                status.reason
            );
        }
        std::thread::sleep(Duration::from_millis(3));
    }
}

/// Waits until a port has put its guest out, and returns why.
pub(super) fn wait_put_out(socket: &Path, name: &str) -> Result<String> {
    let out = |port: &PortStatus| {
        !matches!(port.state, PortState::Forwarding | PortState::Connected) && port.reason.is_some()
    };
    let status = wait_port(socket, name, "quarantined with a reason", out)?;
    Ok(status.reason.unwrap_or_default())
}

/// Waits until traffic has come to rest and every frame is accounted for.
pub(super) fn balanced(socket: &Path) -> Result<StatsReport> {
    let end = Instant::now() + PATIENCE;
    let mut last = stats(socket)?;
    loop {
        std::thread::sleep(Duration::from_millis(10));
        let now = stats(socket)?;
        if now.total == last.total && now.total.balanced() && now.ports_total() == now.total {
            return Ok(now);
        }
        ensure!(
            Instant::now() < end,
            "the books do not balance: {:?}",
            now.total
        );
        last = now;
    }
}
