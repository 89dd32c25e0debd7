//! The systemd units under a real systemd, which is process 1 of namespaces of its own: each starts, serves two guests, and gives up what
//! it should. Needs root for the namespaces; nothing of the host's own systemd is touched.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use ringway::guest::{Guest, Options};
use testkit::process::{Launch, Process, run, wait_until};
use testkit::require;
use testkit::ringway::binary;
use testkit::skip::{Missing, file, record, root, tool};
use testkit::topology::frame;

/// A busy machine boots slowly.
const BOOT: Duration = Duration::from_secs(40);
/// One boot at a time: what control groups it leaves is seen by comparison.
static ALONE: Mutex<()> = Mutex::new(());

/// Arguments: the program, the unit, and [`SYSTEM`] or [`USER`], which puts the unit in its place and says how `systemctl` reaches its
/// manager. The units that there are give way to the few that this boot needs, `/run` is fresh, and
/// the user is one that every Debian has.
const BOOT_SCRIPT: &str = r#"
set -e
mount --make-rprivate /
mount -t tmpfs tmpfs /run
mkdir -p /run/systemd/system /run/units
for unit in basic sysinit shutdown umount final multi-user sockets timers paths slices local-fs local-fs-pre swap; do
  cp /usr/lib/systemd/system/$unit.target /run/units/
done
cp "$1" /run/program
config() {
  printf 'workers = 1\nidle = "adaptive"\n'
  for port in blue red; do
    printf '[[port]]\nname = "%s"\ntype = "vhost-user"\nsocket = "%s/%s.sock"\n' $port $1 $port
  done
}
eval "$3"
mount --bind /run/units /usr/lib/systemd/system
for dir in /etc/systemd/system /usr/local/lib/systemd/system; do
  if [ -d $dir ]; then mount -t tmpfs tmpfs $dir; fi
done
(
  set +e
  while [ ! -S /run/systemd/private ]; do sleep 0.1; done
  reach
  ctl start ringway; echo $? >/run/started
  ctl status ringway --no-pager >/run/status 2>&1
  while [ ! -e /run/stop ]; do sleep 0.1; done
  ctl stop ringway; echo $? >/run/stopped
) &
export container=ringway-test
exec /usr/lib/systemd/systemd --system --unit=multi-user.target --show-status=no
"#;

/// `ringway.service`.
const SYSTEM: &str = r#"
sed "s|/usr/bin/ringway|/run/program|; s|^User=.*|User=daemon|; s|^Group=.*|Group=daemon|; s|/etc/ringway/|/run/|" "$2" >/run/units/ringway.service
config /run/ringway >/run/ringway.toml
chmod 644 /run/ringway.toml
reach() { :; }
ctl() { systemctl "$@"; }
"#;

/// `ringway-user.service`, where its first lines say it goes, under the manager of an ordinary user. That manager is started as systemd
/// does it, but for PAM and logind, which would want the host's.
const USER: &str = r#"
home=/run/home uid=$(id -u daemon)
mkdir -p /run/user/$uid $home/.config/systemd/user $home/.config/ringway /run/user-units
sed "s|/usr/bin/ringway|/run/program|" "$2" >$home/.config/systemd/user/ringway.service
config /run/user/$uid/ringway >$home/.config/ringway/ringway.toml
chown -R daemon /run/user/$uid $home
chmod 700 /run/user/$uid
for unit in basic default exit shutdown sockets timers paths; do cp /usr/lib/systemd/user/$unit.target /run/user-units/; done
cp /usr/lib/systemd/user/systemd-exit.service /usr/lib/systemd/user/*.slice /run/user-units/
mount --bind /run/user-units /usr/lib/systemd/user
if [ -d /etc/systemd/user ]; then mount -t tmpfs tmpfs /etc/systemd/user; fi
cat >/run/units/user@.service <<UNIT
[Service]
User=%i
Type=notify
ExecStart=/usr/lib/systemd/systemd --user
Environment=XDG_RUNTIME_DIR=/run/user/%i HOME=$home
Delegate=yes
KillMode=mixed
UNIT
reach() { systemctl start user@$uid; }
ctl() {
  setpriv --reuid=$uid --regid=$uid --clear-groups env XDG_RUNTIME_DIR=/run/user/$uid HOME=$home systemctl --user "$@"
}
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

fn talk(dir: &Path) -> Result<()> {
    let mut guests = Vec::new();
    for port in ["blue", "red"] {
        let mut guest = Guest::new(Options::new(dir.join(format!("{port}.sock"))))?;
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

/// Boots, and lets the unit be started.
fn boot(unit: &str, place: &str) -> Result<Option<Process>> {
    let unit = std::path::absolute(Path::new("../configs").join(unit))?;
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
        BOOT_SCRIPT,
        "sh",
    ];
    let command = unshare.iter().map(OsString::from);
    let command = command.chain([binary()?.into(), unit.into(), place.into()]);
    let boot = Launch::new("systemd", command).start()?;
    if wait_until("the unit has started", BOOT, || {
        says(&boot, "started").is_some()
    })
    .is_err()
    {
        record(&Missing::unobtainable(
            format!(
                "systemd does not boot in namespaces here: {}",
                boot.output()
            ),
            "run the test where control groups can be written to",
        ));
        return Ok(None);
    }
    let (started, status) = (
        says(&boot, "started").unwrap_or_default(),
        says(&boot, "status"),
    );
    ensure!(started.trim() == "0", "the unit does not start: {status:?}");
    Ok(Some(boot))
}

/// A file in the fresh `/run`.
fn says(boot: &Process, name: &str) -> Option<String> {
    std::fs::read_to_string(inside(boot.pid())?.join("run").join(name)).ok()
}

/// A unit that has started serves guests from `dir` below `/run`, says how it is guarded, and stops when told.
fn serves_and_stops(mut boot: Process, dir: &str) -> Result<String> {
    let run_dir = inside(boot.pid()).context("systemd has gone")?.join("run");
    talk(&run_dir.join(dir))?;
    let (program, api) = (binary()?, run_dir.join(dir).join("api.sock"));
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
    wait_until("the unit has stopped", BOOT, || {
        says(&boot, "stopped").is_some()
    })?;
    ensure!(
        says(&boot, "stopped").unwrap_or_default().trim() == "0",
        "it does not stop"
    );
    boot.kill();
    Ok(found)
}

#[test]
fn the_unit_starts_serves_guests_and_gives_up_what_it_should_under_a_real_systemd() -> Result<()> {
    require!(
        root(),
        file("/usr/lib/systemd/systemd", "systemd"),
        tool("unshare", "util-linux")
    );
    let _alone = ALONE.lock();
    let _groups = Groups(Groups::now());
    match boot("ringway.service", SYSTEM)? {
        Some(boot) => serves_and_stops(boot, "ringway").map(drop),
        None => Ok(()),
    }
}

#[test]
fn the_rootless_unit_does_the_same_under_the_manager_of_an_ordinary_user() -> Result<()> {
    require!(
        root(),
        file("/usr/lib/systemd/systemd", "systemd"),
        tool("unshare", "util-linux"),
        tool("setpriv", "util-linux")
    );
    let _alone = ALONE.lock();
    let _groups = Groups(Groups::now());
    let Some(boot) = boot("ringway-user.service", USER)? else {
        return Ok(());
    };
    let uid = run(["id", "-u", "daemon"], BOOT)?.trim().to_owned();
    let found = serves_and_stops(boot, &format!("user/{uid}/ringway"))?;
    let user = format!("{uid}, no capability");
    ensure!(found.contains(&user), "{user} is not in {found}");
    Ok(())
}
