//! The systemd unit under a real systemd, which is process 1 of namespaces of its own: it starts, serves two guests, and gives up what it
//! should. Needs root for the namespaces; nothing of the host's own systemd is touched.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use ringway::guest::{Guest, Options};
use testkit::process::{Launch, run, wait_until};
use testkit::require;
use testkit::ringway::binary;
use testkit::skip::{Missing, file, record, root, tool};
use testkit::topology::frame;

/// A busy machine boots slowly.
const BOOT: Duration = Duration::from_secs(40);

/// Arguments: the program, the unit. The units that there are give way to the few that this boot needs, `/run` is fresh, and the unit's
/// user is one that every Debian has.
const SCRIPT: &str = r#"
set -e
mount --make-rprivate /
mount -t tmpfs tmpfs /run
mkdir -p /run/systemd/system /run/units
for unit in basic sysinit shutdown umount final multi-user sockets timers paths slices local-fs local-fs-pre swap; do
  cp /usr/lib/systemd/system/$unit.target /run/units/
done
cp "$1" /run/program
sed "s|/usr/bin/ringway|/run/program|; s|^User=.*|User=daemon|; s|^Group=.*|Group=daemon|; s|/etc/ringway/|/run/|" "$2" >/run/units/ringway.service
cat >/run/ringway.toml <<'END'
workers = 1
idle = "adaptive"
[[port]]
name = "blue"
type = "vhost-user"
socket = "/run/ringway/blue.sock"
[[port]]
name = "red"
type = "vhost-user"
socket = "/run/ringway/red.sock"
END
chmod 644 /run/ringway.toml
mount --bind /run/units /usr/lib/systemd/system
for dir in /etc/systemd/system /usr/local/lib/systemd/system; do
  if [ -d $dir ]; then mount -t tmpfs tmpfs $dir; fi
done
(
  set +e
  while [ ! -S /run/systemd/private ]; do sleep 0.1; done
  systemctl start ringway; echo $? >/run/started
  systemctl status ringway --no-pager >/run/status 2>&1
  while [ ! -e /run/stop ]; do sleep 0.1; done
  systemctl stop ringway; echo $? >/run/stopped
) &
export container=ringway-test
exec /usr/lib/systemd/systemd --system --unit=multi-user.target --show-status=no
"#;

/// Control groups that a systemd which was ended by force leaves behind.
struct Groups(BTreeSet<PathBuf>);

impl Groups {
    fn now() -> BTreeSet<PathBuf> {
        let mut found = BTreeSet::new();
        let mut look = vec![PathBuf::from("/sys/fs/cgroup")];
        while let Some(dir) = look.pop() {
            let entries = std::fs::read_dir(&dir).into_iter().flatten().flatten();
            let dirs = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
            look.extend(dirs.map(|entry| entry.path()));
            found.insert(dir);
        }
        found
    }
}

impl Drop for Groups {
    fn drop(&mut self) {
        for _ in 0..20 {
            let new: Vec<PathBuf> = Groups::now().difference(&self.0).cloned().collect();
            // The deepest first. One that is not empty stays.
            let left = new
                .iter()
                .rev()
                .filter(|dir| std::fs::remove_dir(dir).is_err());
            if left.count() == 0 {
                return;
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }
}

/// The root directory of the first process in the namespaces.
fn inside(unshare: u32) -> Option<PathBuf> {
    let children = std::fs::read_to_string(format!("/proc/{unshare}/task/{unshare}/children"));
    let first = children.ok()?.split_whitespace().next()?.to_owned();
    Some(Path::new("/proc").join(first).join("root"))
}

fn talk(run: &Path) -> Result<()> {
    let mut guests = Vec::new();
    for port in ["blue", "red"] {
        let mut guest = Guest::new(Options::new(run.join(format!("ringway/{port}.sock"))))?;
        let queues = guest.attach().with_context(|| port.to_owned())?.remove(0);
        guests.push((guest, queues));
    }
    let [(_, blue), (_, red)] = &mut guests[..] else {
        anyhow::bail!("two guests");
    };
    let bytes = frame([2, 0, 0, 0, 0, 2], [2, 0, 0, 0, 0, 1], b"under systemd");
    let (end, mut came) = (Instant::now() + BOOT, 0);
    while came == 0 {
        ensure!(Instant::now() < end, "no frame comes");
        blue.tx.send(1, |slot| {
            slot.write(0, &bytes);
            bytes.len()
        });
        std::thread::sleep(Duration::from_millis(10));
        red.rx
            .receive(|frame| came += usize::from(frame.matches(0, &bytes)));
    }
    Ok(())
}

#[test]
fn the_unit_starts_serves_guests_and_gives_up_what_it_should_under_a_real_systemd() -> Result<()> {
    require!(
        root(),
        file("/usr/lib/systemd/systemd", "systemd"),
        tool("unshare", "util-linux")
    );
    let _groups = Groups(Groups::now());
    let unit = std::path::absolute("../configs/ringway.service")?;
    let unshare = [
        "unshare",
        "--mount",
        "--pid",
        "--fork",
        "--uts",
        "--ipc",
        "--mount-proc",
        "--kill-child",
        "sh",
        "-c",
        SCRIPT,
        "sh",
    ];
    let command = unshare.iter().map(std::ffi::OsString::from);
    let command = command.chain([binary()?.into_os_string(), unit.into_os_string()]);
    let mut boot = Launch::new("systemd", command).start()?;
    let at = |name: &str| inside(boot.pid()).map(|root| root.join("run").join(name));
    let says = |name: &str| at(name).and_then(|path| std::fs::read_to_string(path).ok());
    if wait_until("the unit has started", BOOT, || says("started").is_some()).is_err() {
        record(&Missing::unobtainable(
            format!(
                "systemd does not boot in namespaces here: {}",
                boot.output()
            ),
            "run the test where control groups can be written to",
        ));
        return Ok(());
    }
    let (started, status) = (says("started").unwrap_or_default(), says("status"));
    ensure!(started.trim() == "0", "the unit does not start: {status:?}");
    let run_dir = at("").context("systemd has gone")?;
    talk(&run_dir)?;
    let (program, api) = (binary()?, run_dir.join("ringway/api.sock"));
    let fixed = [program.as_os_str(), "--api".as_ref(), api.as_os_str()];
    let ask = fixed
        .into_iter()
        .chain(["doctor".as_ref(), "--security".as_ref()]);
    let found = run(ask, BOOT)?;
    for check in ["user", "new privileges", "seccomp", "Landlock"] {
        let line = found
            .lines()
            .find(|line| line.trim_start().starts_with(&format!("switch: {check}")));
        let line = line.with_context(|| format!("nothing is said of {check}: {found}"))?;
        ensure!(line.contains(" ok "), "{line}");
    }
    ensure!(found.contains("no capability"), "{found}");
    std::fs::write(run_dir.join("stop"), "")?;
    wait_until("the unit has stopped", BOOT, || says("stopped").is_some())?;
    ensure!(
        says("stopped").unwrap_or_default().trim() == "0",
        "it does not stop"
    );
    boot.kill();
    Ok(())
}
