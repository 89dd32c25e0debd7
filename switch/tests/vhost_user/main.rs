//! Sessions against frontends: the traces of real ones byte by byte, the `vhost` crate's own, and hostile ones.

mod admission;
mod chaos;
mod client_mode;
#[path = "../frontend/mod.rs"]
mod frontend;
mod honest;
mod hostile;
mod real;

use std::time::Duration;

const SOON: Duration = Duration::from_millis(500);
