//! Docker containers under a daemon of their own: nothing of an installed Docker is touched, no registry is asked, no
//! network or firewall rule is made.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::assets;
use crate::process::{Launch, Process, run, wait_until};
use crate::skip::{Missing, root, tool};

const START: Duration = Duration::from_secs(60);
/// An import copies the image, a container start copies it again: the `vfs` storage works on every file system.
const COMMAND: Duration = Duration::from_secs(180);
const IMAGE_MAKING: Duration = Duration::from_secs(900);
/// A user without any right, as in the facts a container host wants: `nobody`.
pub const NOBODY: u32 = 65534;
/// The image with `dpdk-testpmd`.
pub const TESTPMD: &str = "testpmd";
/// The image of the switch.
pub const RINGWAY: &str = "ringway";

/// A running daemon; its containers are removed and it ends on drop.
pub struct Docker {
    daemon: Process,
    dir: tempfile::TempDir,
}

/// All that Docker needs of the machine.
pub fn available() -> Result<(), Missing> {
    root()?;
    tool("dockerd", "docker.io")?;
    tool("debootstrap", "debootstrap")?;
    tool("dpdk-testpmd", "dpdk-dev")
}

impl Docker {
    /// Starts a daemon and imports the image [`TESTPMD`], made on first use.
    pub fn start() -> Result<Self> {
        let image = assets::cached("testpmd-image.tar", |tar| {
            run(
                [recipe("testpmd-image").as_os_str(), tar.as_os_str()],
                IMAGE_MAKING,
            )
            .map(drop)
        })?;
        let dir = tempfile::Builder::new().prefix("docker-").tempdir()?;
        let at = |name: &str| dir.path().join(name).display().to_string();
        let command = [
            "dockerd".to_owned(),
            "--storage-driver=vfs".to_owned(),
            format!("--data-root={}", at("data")),
            format!("--exec-root={}", at("exec")),
            format!("--pidfile={}", at("pid")),
            format!("--host=unix://{}", at("sock")),
            "--iptables=false".to_owned(),
            "--ip6tables=false".to_owned(),
            "--ip-forward=false".to_owned(),
            "--bridge=none".to_owned(),
        ];
        let daemon = Launch::new("dockerd", command).start()?;
        let mut docker = Self { daemon, dir };
        let ready = wait_until("dockerd answers", START, || {
            docker.command(&["version"]).is_ok() || !docker.daemon.alive()
        });
        ready.with_context(|| docker.daemon.output())?;
        ensure!(
            docker.daemon.alive(),
            "dockerd did not start:\n{}",
            docker.daemon.output()
        );
        docker.command(&["import", &image.display().to_string(), TESTPMD])?;
        Ok(docker)
    }

    /// Builds the image [`RINGWAY`] from `configs/Dockerfile` and the given binary, on top of the imported Debian.
    pub fn build_ringway(&self, binary: &Path) -> Result<()> {
        let context = tempfile::tempdir()?;
        std::fs::copy(recipe("Dockerfile"), context.path().join("Dockerfile"))?;
        std::fs::copy(binary, context.path().join("ringway"))?;
        let base = format!("BASE={TESTPMD}");
        self.command(&[
            "build",
            "-t",
            RINGWAY,
            "--build-arg",
            &base,
            &context.path().display().to_string(),
        ])
        .map(drop)
    }

    /// The command line that runs a container in the foreground as [`NOBODY`], without network or capabilities, with
    /// `shared` mounted at the same path. The image's arguments follow.
    pub fn run_line(&self, name: &str, shared: &Path, image: &str) -> Vec<String> {
        let shared = format!("{0}:{0}", shared.display());
        let mut line = vec!["docker".to_owned(), "-H".to_owned(), self.host()];
        line.extend(
            [
                "run",
                "--rm",
                "-i",
                "--network",
                "none",
                "--cap-drop",
                "ALL",
            ]
            .map(str::to_owned),
        );
        line.extend([
            "--user".to_owned(),
            NOBODY.to_string(),
            "--name".to_owned(),
            name.to_owned(),
        ]);
        line.extend(["-v".to_owned(), shared, image.to_owned()]);
        line
    }

    /// The same under the profile of system calls that `configs/` has for the switch, with a root that cannot be written to.
    pub fn run_line_profiled(&self, name: &str, shared: &Path, image: &str) -> Vec<String> {
        let mut line = self.run_line(name, shared, image);
        let run = line
            .iter()
            .position(|word| word == "run")
            .map_or(line.len(), |at| at + 1);
        let profile = format!("seccomp={}", recipe("docker-seccomp.json").display());
        let options = [
            "--read-only",
            "--security-opt",
            "no-new-privileges",
            "--security-opt",
            &profile,
        ];
        line.splice(run..run, options.map(str::to_owned));
        line
    }

    /// Runs a `docker` command against this daemon and returns what it printed.
    pub fn command(&self, arguments: &[&str]) -> Result<String> {
        // The classic builder: buildx is a package of its own.
        let fixed = [
            "env".to_owned(),
            "DOCKER_BUILDKIT=0".to_owned(),
            "docker".to_owned(),
            "-H".to_owned(),
            self.host(),
        ];
        run(
            fixed
                .into_iter()
                .chain(arguments.iter().map(|&a| a.to_owned())),
            COMMAND,
        )
    }

    /// Ends a container like a crash: SIGKILL.
    pub fn kill(&self, name: &str) -> Result<()> {
        self.command(&["kill", "-s", "KILL", name]).map(drop)
    }

    fn host(&self) -> String {
        format!("unix://{}", self.dir.path().join("sock").display())
    }
}

impl Drop for Docker {
    fn drop(&mut self) {
        let containers = self.command(&["ps", "-aq"]).unwrap_or_default();
        let ids: Vec<&str> = containers.split_whitespace().collect();
        if !ids.is_empty() {
            let _ = self.command(&[["rm", "-f"].as_slice(), &ids].concat());
        }
        // An orderly end unmounts what the daemon mounted and ends its containerd.
        let _ = self.daemon.terminate(START);
    }
}

/// A file of the repository's `configs/`.
fn recipe(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../configs")
        .join(name)
}
