//! Tests that cannot run here say so, loudly, and never pass in silence.
//!
//! A skipped test writes a line to the file named by `RINGWAY_SKIP_LOG` (`tests/run` collects it, and `--strict` makes a
//! failure of it); without that variable it prints past the test harness's capture.

use std::io::Write;

use crate::process::run;
use std::time::Duration;

/// The file that collects skips.
pub const LOG: &str = "RINGWAY_SKIP_LOG";

/// Why a test cannot run on this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Missing {
    /// What is not there.
    pub reason: String,
    /// What to do about it.
    pub remedy: String,
    /// Real hardware, or software in no Debian release: nothing a script can install, so `--strict` lets it pass.
    pub unobtainable: bool,
}

impl Missing {
    /// Something that can be had.
    pub fn new(reason: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self {
            reason: reason.into(),
            remedy: remedy.into(),
            unobtainable: false,
        }
    }

    /// Something only some machines have.
    pub fn unobtainable(reason: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self {
            unobtainable: true,
            ..Self::new(reason, remedy)
        }
    }
}

/// What a test function returns when it did not run.
pub trait Outcome {
    /// The value that ends the test without failing it.
    fn skipped() -> Self;
}

impl Outcome for () {
    fn skipped() -> Self {}
}

impl<E> Outcome for Result<(), E> {
    fn skipped() -> Self {
        Ok(())
    }
}

/// Ends the test as skipped: `skip!("reason", "remedy")`.
#[macro_export]
macro_rules! skip {
    ($reason:expr, $remedy:expr $(,)?) => {{
        $crate::skip::record(&$crate::skip::Missing::new($reason, $remedy));
        return $crate::skip::Outcome::skipped();
    }};
}

/// Ends the test as skipped unless everything named is there: `require!(tool("dpdk-testpmd"), root())`.
#[macro_export]
macro_rules! require {
    ($($need:expr),+ $(,)?) => {$(
        if let Err(missing) = $need {
            $crate::skip::record(&missing);
            return $crate::skip::Outcome::skipped();
        }
    )+};
}

/// Notes that the running test was skipped.
pub fn record(missing: &Missing) {
    let test = std::thread::current().name().unwrap_or("main").to_owned();
    let kind = if missing.unobtainable {
        "unobtainable"
    } else {
        "missing"
    };
    let line = format!("{test}\t{kind}\t{}\t{}\n", missing.reason, missing.remedy);
    if let Some(log) = std::env::var_os(LOG) {
        let file = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(&log);
        // A skip nobody hears of would count as passed: rather fail.
        file.and_then(|mut f| f.write_all(line.as_bytes()))
            .expect("RINGWAY_SKIP_LOG names a writable file");
    } else {
        // Not eprintln!: the harness captures that of a test that passes.
        let _ = writeln!(
            std::io::stderr(),
            "SKIPPED {test}: {}; {}",
            missing.reason,
            missing.remedy
        );
    }
}

/// A program in the path, in Debian's `package`.
pub fn tool(name: &str, package: &str) -> Result<(), Missing> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let sbin = ["/usr/sbin".into(), "/sbin".into()];
    if std::env::split_paths(&path)
        .chain(sbin)
        .any(|dir| dir.join(name).is_file())
    {
        return Ok(());
    }
    Err(Missing::new(
        format!("{name} is not installed"),
        format!("apt-get install {package}"),
    ))
}

/// A file, with what brings it.
pub fn file(path: &str, package: &str) -> Result<(), Missing> {
    if std::path::Path::new(path).exists() {
        return Ok(());
    }
    Err(Missing::new(
        format!("{path} does not exist"),
        format!("apt-get install {package}"),
    ))
}

/// The user is root.
pub fn root() -> Result<(), Missing> {
    if rustix::process::geteuid().is_root() {
        return Ok(());
    }
    Err(Missing::new("needs root", "run tests/run as root"))
}

/// That many free hugepages of 2 MB, and a place where they are mounted.
pub fn hugepages(pages: u64) -> Result<(), Missing> {
    let free = std::fs::read_to_string("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages");
    let free: u64 = free.ok().and_then(|s| s.trim().parse().ok()).unwrap_or(0);
    let mounted = std::fs::read_to_string("/proc/mounts").is_ok_and(|s| s.contains(" hugetlbfs "));
    if free >= pages && mounted {
        return Ok(());
    }
    Err(Missing::new(
        format!(
            "needs {pages} free hugepages of 2 MB; there are {free}, hugetlbfs mounted: {mounted}"
        ),
        "run tests/run as root, or: mount -t hugetlbfs none /dev/hugepages; echo 1100 > /proc/sys/vm/nr_hugepages",
    ))
}

/// At least that many CPUs.
pub fn cpus(count: usize) -> Result<(), Missing> {
    let have = std::thread::available_parallelism().map_or(1, usize::from);
    if have >= count {
        return Ok(());
    }
    Err(Missing::unobtainable(
        format!("needs {count} CPUs, there are {have}"),
        "a machine with more CPUs",
    ))
}

/// The package mirrors answer (assets are fetched from there once).
pub fn apt_candidate(package: &str) -> Result<(), Missing> {
    match run(
        ["apt-cache", "show", "--no-all-versions", package],
        Duration::from_secs(20),
    ) {
        Ok(_) => Ok(()),
        Err(_) => Err(Missing::new(
            format!("apt knows no package {package}"),
            "apt-get update",
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn needs_a_tool_nobody_has() -> anyhow::Result<()> {
        require!(tool("no-such-tool-anywhere", "no-such-package"));
        anyhow::bail!("a test that lacks its tool must not run on")
    }

    #[test]
    fn what_is_missing_is_named_with_its_remedy() {
        let missing = tool("no-such-tool-anywhere", "no-such-package").unwrap_err();
        assert_eq!(missing.reason, "no-such-tool-anywhere is not installed");
        assert_eq!(missing.remedy, "apt-get install no-such-package");
        assert_eq!(tool("sh", "dash"), Ok(()));
    }

    #[test]
    fn a_missing_tool_ends_the_test_before_its_first_line() {
        // In a process of its own: a skip recorded here would count for this test.
        if std::env::var_os("RINGWAY_TEST_OF_SKIP").is_some() {
            assert!(needs_a_tool_nobody_has().is_ok());
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("skips");
        let status = std::process::Command::new(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "skip::tests::a_missing_tool_ends_the_test_before_its_first_line",
            ])
            .env("RINGWAY_TEST_OF_SKIP", "1")
            .env(LOG, &log)
            .output()
            .unwrap();
        assert!(status.status.success());
        let line = std::fs::read_to_string(log).unwrap();
        let fields: Vec<&str> = line.trim_end().split('\t').collect();
        assert_eq!(
            fields[1..],
            [
                "missing",
                "no-such-tool-anywhere is not installed",
                "apt-get install no-such-package"
            ]
        );
        assert!(fields[0].ends_with("a_missing_tool_ends_the_test_before_its_first_line"));
    }
}
