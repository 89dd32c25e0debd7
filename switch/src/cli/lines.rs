//! Where lines of the log go: to standard error, by a thread of its own, so that nobody waits for whoever reads them.
//!
//! A pipe that nobody empties, a full disk or a terminal that was stopped holds that thread and no other. Up to [`LINES`] lines wait for it;
//! what comes beyond is dropped and counted, and told with the next line that gets through.

use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, Sender, bounded};

/// Lines that may wait.
const LINES: usize = 1024;
/// How long the end of the process waits for lines that were not written yet.
const LAST_WORDS: Duration = Duration::from_millis(50);

/// The writing end. Before [`Lines::start`] lines are written by whoever logs: there is one thread yet.
///
/// Threads: any may write and ask.
#[derive(Clone)]
pub(super) struct Lines {
    shared: Arc<Shared>,
    sender: Sender<Vec<u8>>,
}

struct Shared {
    receiver: Receiver<Vec<u8>>,
    started: AtomicBool,
    /// Lines taken in and not written yet.
    open: AtomicU64,
    dropped: AtomicU64,
}

impl Lines {
    pub(super) fn new() -> Lines {
        let (sender, receiver) = bounded(LINES);
        Lines {
            shared: Arc::new(Shared {
                receiver,
                started: AtomicBool::new(false),
                open: AtomicU64::new(0),
                dropped: AtomicU64::new(0),
            }),
            sender,
        }
    }

    /// Starts the thread that writes to `out`.
    pub(super) fn start(&self, mut out: impl Write + Send + 'static) -> io::Result<()> {
        let shared = self.shared.clone();
        let writes = move || {
            while let Ok(line) = shared.receiver.recv() {
                let dropped = shared.dropped.swap(0, Ordering::Relaxed);
                if dropped > 0 {
                    let _ = writeln!(
                        out,
                        "{dropped} lines of the log were dropped: nobody read them"
                    );
                }
                let _ = out.write_all(&line).and_then(|()| out.flush());
                shared.open.fetch_sub(1, Ordering::Release);
            }
        };
        std::thread::Builder::new()
            .name("log".to_owned())
            .stack_size(64 << 10)
            .spawn(writes)?;
        self.shared.started.store(true, Ordering::Release);
        Ok(())
    }

    /// Waits a moment for what was not written yet.
    pub(super) fn finish(&self) {
        let end = Instant::now() + LAST_WORDS;
        // Acquire: pairs with the Release after each write.
        while self.shared.open.load(Ordering::Acquire) > 0 && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

impl Write for Lines {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        if !self.shared.started.load(Ordering::Acquire) {
            return io::stderr().write(line);
        }
        self.shared.open.fetch_add(1, Ordering::Relaxed);
        if self.sender.try_send(line.to_vec()).is_err() {
            self.shared.open.fetch_sub(1, Ordering::Relaxed);
            self.shared.dropped.fetch_add(1, Ordering::Relaxed);
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use super::*;

    #[test]
    fn nobody_waits_for_a_reader_and_the_reader_learns_what_it_missed() {
        let (mut there, here) = std::os::unix::net::UnixStream::pair().expect("a pair");
        let mut lines = Lines::new();
        lines.start(here).expect("a thread");
        let line = [b"x".repeat(999), b"\n".to_vec()].concat();
        // Far more than the socket and the queue hold; would stand still here otherwise.
        for _ in 0..20 * LINES {
            lines.write_all(&line).expect("always");
        }
        // Short: the last line is asked for when the thread has counted the one before, which may be after we read that.
        there
            .set_read_timeout(Some(Duration::from_millis(20)))
            .expect("a timeout");
        let (mut text, mut some, mut said) = (Vec::new(), vec![0; 1 << 16], false);
        let end = Instant::now() + Duration::from_secs(60);
        while !text.ends_with(b"the last one\n") {
            assert!(Instant::now() < end, "the last line does not come");
            match there.read(&mut some) {
                Ok(read) => text.extend_from_slice(&some[..read]),
                Err(error) => assert_eq!(error.kind(), io::ErrorKind::WouldBlock),
            }
            if !said && lines.shared.open.load(Ordering::Acquire) == 0 {
                lines.write_all(b"the last one\n").expect("always");
                said = true;
            }
        }
        let text = String::from_utf8(text).expect("text");
        assert!(text.contains("lines of the log were dropped"));
        lines.finish();
        assert_eq!(lines.shared.open.load(Ordering::Acquire), 0);
    }
}
