//! Ctrl-C: the measurement stops at the next step, and what was measured so far is printed.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use anyhow::{Context, Result};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

static ASKED: LazyLock<Arc<AtomicBool>> = LazyLock::new(Arc::default);

/// The error of everything that was under way.
#[derive(Debug)]
pub(crate) struct Interrupted;

impl fmt::Display for Interrupted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("interrupted")
    }
}

impl std::error::Error for Interrupted {}

/// From now on Ctrl-C asks only. A second one does not end the harness at once: `timeout` and terminals send two, and
/// every wait is short.
pub(crate) fn listen() -> Result<()> {
    for signal in [SIGINT, SIGTERM, SIGHUP] {
        signal_hook::flag::register(signal, Arc::clone(&ASKED)).context("listening to signals")?;
    }
    Ok(())
}

/// Fails once somebody asked to stop.
pub(crate) fn check() -> Result<()> {
    // Relaxed: a flag alone, nothing is published with it.
    if ASKED.load(Ordering::Relaxed) {
        Err(Interrupted.into())
    } else {
        Ok(())
    }
}

/// Sleeps, and fails at once (long sleeps: within half a second) when somebody asked to stop. Long steps on purpose:
/// every wake-up may preempt the switch that is being measured.
pub(crate) fn sleep(time: Duration) -> Result<()> {
    let mut left = time;
    while !left.is_zero() {
        check()?;
        let step = left.min(Duration::from_millis(500));
        std::thread::sleep(step);
        left -= step;
    }
    check()
}
