//! Any bytes to the control socket, answered by an operator who agrees to everything.
#![no_main]

use std::io::{Read as _, Write as _};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use ringway::control::api::{Operator, Refusal};
use ringway::control::config::Config;
use ringway::control::serve::{Api, ApiSettings};
use ringway::control::state::*;
use ringway::dataplane::eth::Mac;

struct Yes;

impl Operator for Yes {
    fn config(&self) -> Config {
        Config::default()
    }
    fn apply(&self, _: Config) -> Result<Applied, Refusal> {
        Ok(Applied::default())
    }
    fn ports(&self) -> Vec<PortStatus> {
        Vec::new()
    }
    fn port(&self, name: &str) -> Result<PortStatus, Refusal> {
        Err(Refusal::no_port(name, &["blue"]))
    }
    fn add_port(&self, spec: PortSpec) -> Result<PortStatus, Refusal> {
        Err(Refusal::Conflict(spec.name))
    }
    fn del_port(&self, _: &str) -> Result<(), Refusal> {
        Ok(())
    }
    fn move_queue(&self, port: &str, _: &QueueMove) -> Result<PortStatus, Refusal> {
        self.port(port)
    }
    fn fdb(&self, _: &FdbFilter, _: usize) -> Result<FdbPage, Refusal> {
        Ok(FdbPage::default())
    }
    fn fdb_flush(&self, _: &FdbFilter) -> Result<u64, Refusal> {
        Ok(1)
    }
    fn fdb_add(&self, _: &FdbAdd) -> Result<(), Refusal> {
        Ok(())
    }
    fn fdb_del(&self, _: Mac, _: &FdbFilter) -> Result<u64, Refusal> {
        Ok(1)
    }
    fn stats(&self) -> StatsReport {
        StatsReport::default()
    }
    fn workers(&self) -> Vec<WorkerStatus> {
        Vec::new()
    }
}

fn api() -> &'static std::path::Path {
    static API: OnceLock<(Api, tempfile::TempDir)> = OnceLock::new();
    let (api, _) = API.get_or_init(|| {
        let dir = tempfile::tempdir().expect("a folder");
        let settings = ApiSettings::private(dir.path().join("api.sock"));
        let waiting = Api::listen(settings).expect("a socket");
        (waiting.serve(Arc::new(Yes)).expect("a thread"), dir)
    });
    api.path()
}

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let mut stream = UnixStream::connect(api()).expect("it listens");
    stream
        .set_read_timeout(Some(Duration::from_secs(25)))
        .expect("a socket");
    // What it will not hear it need not.
    let _ = stream.write_all(data);
    let _ = stream.shutdown(Shutdown::Write);
    let mut answer = Vec::new();
    match stream.read_to_end(&mut answer) {
        Ok(_) => {}
        Err(error) => assert!(
            error.kind() != std::io::ErrorKind::WouldBlock,
            "no end to the answer"
        ),
    }
    assert!(
        !answer.starts_with(b"HTTP/1.1 500"),
        "{}",
        String::from_utf8_lossy(&answer)
    );
});
