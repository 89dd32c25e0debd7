//! A child process whose output is watched, with a deadline on every wait.
//!
//! Nothing here waits for ever and nothing outlives its test: a `Process` dies when it is dropped, and with the test
//! program should that be killed (`PR_SET_PDEATHSIG`). An error carries the last lines the child wrote.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, mpsc};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use rustix::process::{Pid, Signal, kill_process};

/// Lines of a child's output that an error carries.
const TAIL_LINES: usize = 25;

/// How often an exit is looked for: fast enough for a 100 ms deadline.
const EXIT_POLL: Duration = Duration::from_millis(5);

/// How long the rest of an ended child's output may take on a busy machine.
const LAST_OUTPUT: Duration = Duration::from_secs(2);

/// A running child; killed and reaped on drop.
///
/// One thread per output stream appends to the shared text; everything else happens on the caller's thread.
pub struct Process {
    what: String,
    child: Child,
    stdin: Option<ChildStdin>,
    output: Arc<Output>,
    log: PathBuf,
}

/// What the child has written so far.
struct Output {
    text: Mutex<Text>,
    grew: Condvar,
}

#[derive(Default)]
struct Text {
    /// stdout alone: what stderr says in between must not split a prompt or a JSON text.
    out: String,
    /// Both, in order of arrival.
    all: String,
    /// Streams that have ended; the text is whole at two.
    ended: u8,
}

/// How to start a child.
pub struct Launch {
    /// Name in error messages and of the log file.
    pub what: String,
    /// The command and its arguments.
    pub command: Vec<String>,
    /// The child runs as this user, with no capability and no way to gain one.
    pub uid: Option<u32>,
    /// Variables added to the environment.
    pub env: Vec<(String, String)>,
    /// Line-buffer stdout: without it a C program writes to a pipe in blocks of 4 KiB.
    pub line_buffered: bool,
}

impl Launch {
    /// A command under the caller's user.
    pub fn new<S: AsRef<OsStr>>(what: &str, command: impl IntoIterator<Item = S>) -> Self {
        let command = command
            .into_iter()
            .map(|s| s.as_ref().to_string_lossy().into_owned())
            .collect();
        Self {
            what: what.to_owned(),
            command,
            uid: None,
            env: Vec::new(),
            line_buffered: false,
        }
    }

    /// Starts the child.
    pub fn start(self) -> Result<Process> {
        // setpriv and stdbuf exec the next command, so the pid is the child's own.
        let mut line: Vec<String> = ["setpriv", "--pdeathsig", "KILL"].map(str::to_owned).into();
        if let Some(uid) = self.uid {
            line.extend([
                format!("--reuid={uid}"),
                format!("--regid={uid}"),
                "--clear-groups".to_owned(),
            ]);
            line.extend(
                ["--bounding-set=-all", "--inh-caps=-all", "--no-new-privs"].map(str::to_owned),
            );
        }
        line.push("--".to_owned());
        if self.line_buffered {
            line.extend(["stdbuf", "-oL"].map(str::to_owned));
        }
        line.extend(self.command);
        let mut command = Command::new(&line[0]);
        command.args(&line[1..]).envs(self.env);
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = spawn(command)
            .with_context(|| format!("{}: cannot start {}", self.what, line.join(" ")))?;
        let log = log_path(&self.what);
        let mut file = File::create(&log).with_context(|| format!("log file {}", log.display()))?;
        writeln!(file, "$ {}", line.join(" "))?;
        let output = Arc::new(Output {
            text: Mutex::new(Text::default()),
            grew: Condvar::new(),
        });
        let reads = "both streams are pipes";
        let (out, err) = (
            child.stdout.take().context(reads)?,
            child.stderr.take().context(reads)?,
        );
        collect(out, Arc::clone(&output), file.try_clone()?, true);
        collect(err, Arc::clone(&output), file, false);
        Ok(Process {
            what: self.what,
            stdin: child.stdin.take(),
            child,
            output,
            log,
        })
    }
}

impl Process {
    /// The child's process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Everything written so far, stdout and stderr.
    pub fn output(&self) -> String {
        self.output.lock().all.clone()
    }

    /// Bytes written to stdout so far: a mark for [`Process::wait_for`].
    pub fn mark(&self) -> usize {
        self.output.lock().out.len()
    }

    /// Where the output is kept after the test.
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// Writes to the child's stdin.
    pub fn write(&mut self, text: &str) -> Result<()> {
        let stdin = self
            .stdin
            .as_mut()
            .ok_or_else(|| anyhow!("{}: stdin is closed", self.what))?;
        stdin
            .write_all(text.as_bytes())
            .and_then(|()| stdin.flush())
            .map_err(|e| anyhow!("{e}"))
            .with_context(|| {
                format!(
                    "{}: cannot write {text:?} to its stdin\n{}",
                    self.what,
                    tail(&self.output.lock().all)
                )
            })
    }

    /// Waits until `found` accepts what was written to stdout since `mark`, and returns it.
    pub fn wait_for(
        &mut self,
        mark: usize,
        within: Duration,
        found: impl Fn(&str) -> bool,
    ) -> Result<String> {
        let end = Instant::now() + within;
        let output = Arc::clone(&self.output);
        let mut text = output.lock();
        loop {
            if found(&text.out[mark..]) {
                return Ok(text.out[mark..].to_owned());
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                bail!(
                    "{}: not seen within {within:?}\n{}",
                    self.what,
                    tail(&text.all)
                );
            }
            if let Some(status) = self.child.try_wait()? {
                drop(text);
                text = output.last();
                if found(&text.out[mark..]) {
                    continue;
                }
                bail!("{}: ended with {status}\n{}", self.what, tail(&text.all));
            }
            let nap = left.min(Duration::from_millis(100));
            text = output
                .grew
                .wait_timeout(text, nap)
                .unwrap_or_else(|e| e.into_inner())
                .0;
        }
    }

    /// Waits for `text` to appear after `mark`.
    pub fn wait_for_text(&mut self, mark: usize, within: Duration, text: &str) -> Result<String> {
        self.wait_for(mark, within, |seen| seen.contains(text))
            .with_context(|| format!("waiting for {text:?}"))
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let pid = i32::try_from(self.child.id())
            .ok()
            .and_then(Pid::from_raw)
            .context("a child has a pid")?;
        kill_process(pid, signal).with_context(|| format!("{}: cannot send {signal:?}", self.what))
    }

    /// Whether the child still runs.
    pub fn alive(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Waits for the child to end by itself.
    pub fn wait_exit(&mut self, within: Duration) -> Result<ExitStatus> {
        let end = Instant::now() + within;
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            if Instant::now() >= end {
                bail!(
                    "{}: still running after {within:?}\n{}",
                    self.what,
                    tail(&self.output.lock().all)
                );
            }
            std::thread::sleep(EXIT_POLL);
        }
    }

    /// SIGTERM, then waits; says how long the child took.
    pub fn terminate(&mut self, within: Duration) -> Result<(ExitStatus, Duration)> {
        let start = Instant::now();
        self.signal(Signal::TERM)?;
        self.wait_exit(within)
            .map(|status| (status, start.elapsed()))
    }

    /// SIGKILL, and reaped.
    pub fn kill(&mut self) {
        // Both fail only when the child has ended and was reaped: what is wanted.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

impl Output {
    /// The text after the child has ended: waits a moment for the reader threads to fetch the rest. Streams that a
    /// grandchild holds open do not end.
    fn last(&self) -> MutexGuard<'_, Text> {
        let whole = self
            .grew
            .wait_timeout_while(self.lock(), LAST_OUTPUT, |text| text.ended < 2);
        whole.unwrap_or_else(|e| e.into_inner()).0
    }

    fn lock(&self) -> MutexGuard<'_, Text> {
        self.text.lock().unwrap_or_else(|e| e.into_inner())
    }
}

/// Runs a command to its end and returns its stdout; an error carries its output.
pub fn run<S: AsRef<OsStr>>(
    command: impl IntoIterator<Item = S>,
    within: Duration,
) -> Result<String> {
    let line: Vec<String> = command
        .into_iter()
        .map(|s| s.as_ref().to_string_lossy().into_owned())
        .collect();
    let mut child = Launch::new(line.first().context("a command has a name")?, &line).start()?;
    child.stdin = None;
    let status = child.wait_exit(within)?;
    let text = child.output.last();
    if !status.success() {
        bail!(
            "`{}` ended with {status}\n{}",
            line.join(" "),
            tail(&text.all)
        );
    }
    let _ = std::fs::remove_file(&child.log); // a command that worked leaves no log worth reading
    Ok(text.out.clone())
}

/// Calls `ready` until it holds, or fails naming `what`.
pub fn wait_until(what: &str, within: Duration, mut ready: impl FnMut() -> bool) -> Result<()> {
    let end = Instant::now() + within;
    while !ready() {
        if Instant::now() >= end {
            bail!("{what}: not within {within:?}");
        }
        std::thread::sleep(EXIT_POLL);
    }
    Ok(())
}

/// The folder of the build: `target/` above the running test program.
pub fn target_dir() -> PathBuf {
    // target/<profile>/deps/<test> or target/<profile>/<binary>
    let exe = std::env::current_exe().unwrap_or_default();
    let found = exe
        .ancestors()
        .find(|dir| dir.join(".rustc_info.json").exists() || dir.join("CACHEDIR.TAG").exists());
    found.map_or_else(|| PathBuf::from("target"), Path::to_path_buf)
}

fn log_path(what: &str) -> PathBuf {
    static SERIAL: AtomicU32 = AtomicU32::new(0);
    let dir = target_dir().join("test-logs");
    let _ = std::fs::create_dir_all(&dir);
    let test = std::thread::current()
        .name()
        .unwrap_or("main")
        .replace("::", "-");
    let serial = SERIAL.fetch_add(1, Ordering::Relaxed); // Relaxed: only uniqueness is wanted
    let name: String = what
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() { c } else { '_' })
        .collect();
    dir.join(format!("{test}.{serial:03}.{name}.log"))
}

fn collect(
    mut stream: impl Read + Send + 'static,
    output: Arc<Output>,
    mut log: File,
    is_out: bool,
) {
    std::thread::spawn(move || {
        let mut block = [0; 4096];
        while let Ok(n @ 1..) = stream.read(&mut block) {
            let _ = log.write_all(&block[..n]);
            let part = String::from_utf8_lossy(&block[..n]);
            let mut text = output.lock();
            text.all.push_str(&part);
            if is_out {
                text.out.push_str(&part);
            }
            output.grew.notify_all();
        }
        output.lock().ended += 1;
        output.grew.notify_all();
    });
}

/// Starts a child from a thread that lives as long as the program: the death signal set by `setpriv` fires when the
/// *thread* that started the child ends, which for a test's own thread may be too early.
fn spawn(command: Command) -> std::io::Result<Child> {
    type Job = (Command, mpsc::Sender<std::io::Result<Child>>);
    static JOBS: OnceLock<Mutex<mpsc::Sender<Job>>> = OnceLock::new();
    let jobs = JOBS.get_or_init(|| {
        let (jobs, todo) = mpsc::channel::<Job>();
        std::thread::spawn(move || {
            for (mut command, answer) in todo {
                let _ = answer.send(command.spawn());
            }
        });
        Mutex::new(jobs)
    });
    let (answer, child) = mpsc::channel();
    let gone = |_| std::io::Error::other("the starting thread ended");
    jobs.lock()
        .unwrap_or_else(|e| e.into_inner())
        .send((command, answer))
        .map_err(|_| gone(()))?;
    child.recv().map_err(|_| gone(()))?
}

fn tail(text: &str) -> String {
    let lines: Vec<&str> = text.lines().collect();
    let from = lines.len().saturating_sub(TAIL_LINES);
    format!("  its last lines:\n    {}", lines[from..].join("\n    "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_carries_the_last_lines_of_both_streams_and_only_stdout_is_searched() {
        let mut child = Launch::new("sh", ["sh", "-c", "echo one; echo two three >&2; sleep 60"])
            .start()
            .unwrap();
        let error = child
            .wait_for_text(0, Duration::from_millis(300), "three")
            .unwrap_err();
        let text = format!("{error:#}");
        assert!(text.contains("one") && text.contains("two three"), "{text}");
    }

    #[test]
    fn a_child_that_ends_does_not_make_its_waiter_wait() {
        let start = Instant::now();
        let mut child = Launch::new("sh", ["sh", "-c", "exit 3"]).start().unwrap();
        let error = child
            .wait_for_text(0, Duration::from_secs(60), "never")
            .unwrap_err();
        assert!(format!("{error:#}").contains("exit status: 3"));
        assert!(start.elapsed() < Duration::from_secs(10));
    }

    #[test]
    fn a_dropped_child_is_dead_and_reaped() {
        let child = Launch::new("sleep", ["sleep", "60"]).start().unwrap();
        let pid = child.pid();
        drop(child);
        assert!(!Path::new(&format!("/proc/{pid}")).exists());
    }

    #[test]
    fn a_child_outlives_the_thread_that_asked_for_it() {
        let launch = || Launch::new("sleep", ["sleep", "60"]).start().unwrap();
        let mut child = std::thread::spawn(launch).join().unwrap();
        std::thread::sleep(Duration::from_millis(50));
        assert!(child.alive());
    }
}
