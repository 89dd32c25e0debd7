//! The harness's end of a helper: a line asks, a line answers, and every wait has a deadline.

use std::fs::File;
use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::interrupt;
use crate::process::{Proc, command};

/// A helper that runs; dropping it ends it.
pub(crate) struct Remote {
    name: &'static str,
    proc: Proc,
    lines: BufReader<UnixStream>,
    errors: PathBuf,
}

impl Remote {
    /// Starts this program with these arguments. `directory` takes what it says of errors.
    pub(crate) fn start(
        name: &'static str,
        arguments: &[String],
        cpus: &[usize],
        directory: &Path,
    ) -> Result<Self> {
        let (ours, theirs) = UnixStream::pair().context("a pair of sockets")?;
        ours.set_read_timeout(Some(Duration::from_millis(100)))?;
        let errors = directory.join(format!(
            "{}.log",
            arguments.first().map_or("", String::as_str)
        ));
        let own = std::env::current_exe().context("the path of this program")?;
        let mut helper = command(own);
        helper
            .args(arguments)
            .stdin(Stdio::from(OwnedFd::from(theirs.try_clone()?)))
            .stdout(Stdio::from(OwnedFd::from(theirs)))
            .stderr(File::create(&errors).with_context(|| errors.display().to_string())?);
        let proc = Proc::start(name, cpus, &mut helper)?;
        Ok(Self {
            name,
            proc,
            lines: BufReader::new(ours),
            errors,
        })
    }

    pub(crate) fn proc(&self) -> &Proc {
        &self.proc
    }

    /// Says a line and returns the answer.
    pub(crate) fn ask(&mut self, line: &str, patience: Duration) -> Result<String> {
        writeln!(self.lines.get_mut(), "{line}").with_context(|| self.reason("it ended"))?;
        self.hear(patience)
    }

    /// The next line it says.
    pub(crate) fn hear(&mut self, patience: Duration) -> Result<String> {
        let (began, mut line) = (Instant::now(), String::new());
        loop {
            match self.lines.read_line(&mut line) {
                Ok(0) => bail!("{}", self.reason("it ended")),
                Ok(_) if line.ends_with('\n') => return Ok(line.trim_end().to_owned()),
                Ok(_) => {}
                Err(error)
                    if [ErrorKind::WouldBlock, ErrorKind::TimedOut].contains(&error.kind()) => {}
                Err(error) => return Err(error).with_context(|| self.reason("no answer")),
            }
            interrupt::check()?;
            if began.elapsed() > patience {
                bail!("{}", self.reason(&format!("no answer within {patience:?}")));
            }
        }
    }

    fn reason(&self, what: &str) -> String {
        let said = std::fs::read_to_string(&self.errors).unwrap_or_default();
        let said = said.trim().replace('\n', " / ");
        let said = said.strip_prefix("ringway-bench: ").unwrap_or(&said);
        if said.is_empty() {
            format!("{}: {what}", self.name)
        } else {
            format!("{}: {said}", self.name)
        }
    }
}
