//! The generator of `ringway-bench` against every switch it can start: frames go through, all of them, and the books are right.

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use testkit::require;
use testkit::skip::{cpus, hugepages, root, tool};

/// The binary: `tests/run` has built it.
fn bench() -> PathBuf {
    std::env::var_os("RINGWAY_BENCH_BIN").map_or_else(
        || {
            let own = std::env::current_exe().unwrap_or_default();
            let target = own.ancestors().nth(3).map(PathBuf::from);
            target.unwrap_or_default().join("release/ringway-bench")
        },
        PathBuf::from,
    )
}

/// `ringway-bench` with these arguments, for so many seconds at most.
fn bounded(seconds: u32, arguments: &str) -> Command {
    let mut command = Command::new("timeout");
    command
        .args(["-k", "2", &seconds.to_string()])
        .arg(bench())
        .args(arguments.split(' '));
    command
}

/// Runs it with `--json -` and returns what it saved.
fn saved(arguments: &str) -> Result<Value> {
    let output = bounded(120, arguments)
        .args(["--json", "-"])
        .output()
        .with_context(|| bench().display().to_string())?;
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{arguments}: {errors}");
    serde_json::from_slice(&output.stdout).with_context(|| format!("{arguments}: {errors}"))
}

fn measurements(run: &Value) -> Result<&Vec<Value>> {
    run["measurements"].as_array().context("no measurements")
}

/// A closed loop and an open one through a switch: nothing may be lost, doubled, changed, or come from nowhere.
fn every_frame_comes_back(switch: &str, rings: &[&str]) -> Result<()> {
    require!(cpus(2));
    for rings in rings {
        for pace in ["--window 64", "--rate 20000"] {
            let run = saved(&format!(
                "load --switch {switch} --nice 0 {rings} {pace} --seconds 1 --verify --size imix"
            ))?;
            let load = &measurements(&run)?[0];
            let count = |name: &str| load["count"][name].as_u64();
            ensure!(
                count("received") > Some(5000) && count("received") == count("sent"),
                "{load}"
            );
            for wrong in ["lost", "duplicated", "reordered", "corrupted", "foreign"] {
                ensure!(count(wrong) == Some(0), "{wrong}: {load}");
            }
            ensure!(load["partial"].is_null(), "{load}");
            ensure!(load["latencies"][0]["p50"].as_f64() > Some(100.0), "{load}");
        }
    }
    Ok(())
}

const ALL: [&str; 4] = [
    "--rings split",
    "--rings split --no-in-order --no-mergeable",
    "--rings packed",
    "--rings packed --no-mergeable",
];

#[test]
#[ignore = "real peer: run by tests/run"]
fn every_frame_comes_back_from_ringway() -> Result<()> {
    every_frame_comes_back("ringway", &ALL)
}

#[test]
#[ignore = "real peer: run by tests/run"]
fn every_frame_comes_back_from_the_reference() -> Result<()> {
    every_frame_comes_back("reference", &ALL[..2])
}

#[test]
#[ignore = "real peer: run by tests/run"]
fn every_frame_comes_back_from_testpmd() -> Result<()> {
    require!(tool("dpdk-testpmd", "dpdk-dev"), root(), hugepages(256));
    every_frame_comes_back("testpmd", &ALL)
}

#[test]
#[ignore = "real peer: run by tests/run"]
fn every_frame_comes_back_from_ovs() -> Result<()> {
    require!(
        tool("ovs-vswitchd", "openvswitch-switch-dpdk"),
        root(),
        hugepages(600)
    );
    every_frame_comes_back("ovs", &ALL)
}

#[test]
#[ignore = "real peer: run by tests/run"]
fn every_scenario_ends_with_figures() -> Result<()> {
    require!(cpus(2));
    for (scenario, kind, count) in [
        ("chain --lengths 1,3 --seconds 0.3", "chain", 2),
        ("idle-ports --counts 0,40 --seconds 0.3", "idle-ports", 2),
        ("attach --counts 1,20", "attach", 2),
        ("outage --times 1", "outage", 1),
        ("outage --times 2 --listen --ports 4", "outage", 2),
        ("neighbour --seconds 0.3", "neighbour", 5),
        ("footprint --seconds 0.3", "footprint", 1),
        (
            "rfc2889 --tests caching --stations 100,2000",
            "addresses",
            1,
        ),
        ("latency --throughput 20k --seconds 0.3", "latency", 4),
        (
            "rfc2544 --tests throughput --threshold 0.2 --seconds 0.3 --resolution 0.3",
            "search",
            1,
        ),
    ] {
        let run = saved(&format!("{scenario} --switch ringway"))?;
        let found = measurements(&run)?;
        ensure!(found.len() == count, "{scenario}: {run}");
        ensure!(
            found.iter().all(|one| one["kind"] == kind),
            "{scenario}: {run}"
        );
    }
    Ok(())
}

#[test]
#[ignore = "real peer: run by tests/run"]
fn every_test_of_the_rfcs_ends_with_its_own_figures() -> Result<()> {
    require!(cpus(2));
    let kinds = |run: &Value| -> Result<Vec<String>> {
        let kinds = measurements(run)?.iter().map(|one| &one["kind"]);
        Ok(kinds
            .filter_map(|kind| Some(kind.as_str()?.to_owned()))
            .collect())
    };

    let run = saved(
        "rfc2544 --tests loss,back-to-back,recovery --throughput 20k --seconds 0.2 --switch ringway",
    )?;
    ensure!(
        kinds(&run)? == ["loss-curve", "back-to-back", "recovery"],
        "{run}"
    );
    let found = measurements(&run)?;
    let offered: Vec<f64> = found[0]["steps"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|step| step["offered_mpps"].as_f64())
        .collect();
    // §26.3: from above the throughput down to a tenth of it.
    ensure!(
        offered.len() == 12 && offered.is_sorted_by(|a, b| a > b),
        "{offered:?}"
    );
    ensure!((offered[0] - 0.024).abs() < 1e-9, "{offered:?}");
    let bursts = found[1]["frames"].as_array().map(Vec::len);
    ensure!(bursts.is_some_and(|bursts| bursts > 1), "{run}");

    let run = saved(
        "rfc2889 --tests head-of-line,learning,broadcast --rates 10000,20000 --seconds 0.3 --switch ringway",
    )?;
    ensure!(
        kinds(&run)? == ["head-of-line", "addresses", "load"],
        "{run}"
    );
    let found = measurements(&run)?;
    // The full port takes nothing, the free one what it was offered, but for what a busy machine held back.
    let received = |stream: &str| found[0][stream]["received"].as_u64();
    ensure!(received("congested") == Some(0), "{run}");
    ensure!(received("free").is_some_and(|frames| frames > 0), "{run}");
    let rates = found[1]["steps"].as_array().map(Vec::len);
    ensure!(rates == Some(2), "{run}");
    // Each broadcast frame comes to three of four ports.
    let (sent, lost) = (&found[2]["count"]["sent"], &found[2]["count"]["lost"]);
    let received = found[2]["count"]["received"].as_u64();
    let (sent, lost) = (sent.as_u64().unwrap_or(0), lost.as_u64().unwrap_or(0));
    ensure!(
        sent > 0 && received.map(|received| received + lost) == Some(3 * sent),
        "{run}"
    );
    Ok(())
}

#[test]
#[ignore = "real peer: run by tests/run"]
fn what_cannot_be_measured_is_a_sentence_in_time() -> Result<()> {
    for (arguments, said) in [
        (
            "load --socket /nonexistent/a --socket /nonexistent/b --patience 0.2",
            "/nonexistent/a",
        ),
        ("load --switch ringway --rate 99999G", "impossible"),
        ("load --switch ringway --ports 3", "cannot be paired"),
        ("load --switch nothing", "there is no switch"),
        ("load --switch ringway --ring-size 3", "power of two"),
        ("load --switch reference --listen", "it only listens"),
        ("load --switch ovs-root --ovs-root /proc", "apt-get install"),
        (
            "load --switch ovs-root --ovs-root /nonexistent",
            "No such file",
        ),
        (
            "outage --switch ringway --listen --rings packed",
            "takes split rings",
        ),
        ("chain --switch ringway --lengths 0", "0 is not in"),
    ] {
        let began = Instant::now();
        let output = bounded(60, arguments).output()?;
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(!output.status.success(), "{arguments}: it went well");
        ensure!(errors.contains(said), "{arguments}: {errors}");
        ensure!(began.elapsed() < Duration::from_secs(40), "{arguments}");
    }
    Ok(())
}

/// Rings, memory, roles, sizes, stations and patterns: whatever a container may be, every frame is accounted for.
#[test]
#[ignore = "real peer: run by tests/run"]
fn every_kind_of_container_and_traffic_goes_through_ringway() -> Result<()> {
    require!(cpus(2));
    for options in [
        "--ring-size 64 --window 32",
        "--ring-size 4096 --rings packed",
        "--queues 4",
        "--memory memfd --size 9000 --window 32",
        "--receive-buffer 512 --size 9000 --window 8",
        "--stations 1000000 --window 64",
        "--broadcast 20 --ports 4 --window 16",
        "--broadcast 100 --window 16",
        "--one-way",
        "--pattern mesh --ports 3 --window 16",
        "--listen",
        "--listen --rings packed --size imix",
    ] {
        let run = saved(&format!(
            "load --switch ringway --nice 0 --seconds 0.5 --verify {options}"
        ))?;
        let load = &measurements(&run)?[0];
        let count = |name: &str| load["count"][name].as_u64();
        ensure!(count("received") > Some(500), "{options}: {load}");
        for wrong in ["lost", "duplicated", "reordered", "corrupted"] {
            ensure!(count(wrong) == Some(0), "{options}: {wrong}: {load}");
        }
        ensure!(load["partial"].is_null(), "{options}: {load}");
    }
    Ok(())
}

/// OVS-DPDK of another system: this one's, mounted below a directory, in a mount namespace that ends with the test.
#[test]
#[ignore = "real peer: run by tests/run"]
fn ovs_of_another_system_runs_in_its_chroot() -> Result<()> {
    require!(
        tool("ovs-vswitchd", "openvswitch-switch-dpdk"),
        root(),
        hugepages(600),
        cpus(2)
    );
    let root = tempfile::tempdir()?;
    for (link, to) in [
        ("bin", "usr/bin"),
        ("sbin", "usr/sbin"),
        ("lib", "usr/lib"),
        ("lib64", "usr/lib64"),
    ] {
        std::os::unix::fs::symlink(to, root.path().join(link))?;
    }
    for directory in ["usr", "etc", "run", "var"] {
        std::fs::create_dir(root.path().join(directory))?;
    }
    let binary = bench();
    let output = Command::new("timeout")
        .args(["-k", "2", "120", "unshare", "--mount", "sh", "-c"])
        .arg(r#"set -e; root=$1; shift; for d in usr etc; do mount --bind /$d "$root/$d"; done; exec "$@""#)
        .arg("sh")
        .arg(root.path())
        .arg(&binary)
        .args("load --switch ovs-root --nice 0 --window 64 --seconds 1 --verify --json - --ovs-root".split(' '))
        .arg(root.path())
        .output()?;
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{errors}");
    let run: Value = serde_json::from_slice(&output.stdout)?;
    let load = &measurements(&run)?[0];
    let count = |name: &str| load["count"][name].as_u64();
    ensure!(
        count("received") > Some(5000) && count("lost") == Some(0),
        "{load}"
    );
    let versions = run["versions"].as_array().context("versions")?;
    let version = versions.iter().find(|one| one["name"] == "ovs-root");
    let version = version
        .and_then(|one| one["version"].as_str())
        .context("its version")?;
    ensure!(version.starts_with("Open vSwitch"), "{version}");
    // Nothing is mounted any more, and nobody looks at it.
    ensure!(
        std::fs::read_dir(root.path().join("usr"))?.next().is_none(),
        "still mounted"
    );
    Ok(())
}

/// Starts a program that is to be cut short, and hears what it prints.
fn listened_to(program: &mut Command) -> Result<Child> {
    Ok(program
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?)
}

/// Its run was cut short just now.
fn ends_soon_and_says(program: Child, words: [&str; 2]) -> Result<()> {
    let began = Instant::now();
    let output = program.wait_with_output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    ensure!(words.iter().all(|word| text.contains(word)), "{output:?}");
    ensure!(
        began.elapsed() < Duration::from_secs(15),
        "it took {:?}",
        began.elapsed()
    );
    Ok(())
}

/// A switch that dies in the middle of a run costs the rest of the run, not what was measured.
#[test]
#[ignore = "real peer: run by tests/run"]
fn a_switch_that_dies_in_the_middle_leaves_a_partial_result() -> Result<()> {
    require!(cpus(2));
    let directory = tempfile::tempdir()?;
    let sockets = ["a", "b"].map(|name| directory.path().join(name).display().to_string());
    let mut reference = Command::new(bench())
        .arg("reference")
        .args(["--socket", &sockets[0], "--socket", &sockets[1]])
        .spawn()?;
    let load = listened_to(bounded(60, "load --seconds 30").args([
        "--socket",
        &sockets[0],
        "--socket",
        &sockets[1],
    ]))?;
    std::thread::sleep(Duration::from_secs(4));
    reference.kill()?;
    reference.wait()?;
    ends_soon_and_says(load, ["PARTIAL", "closed the connection"])
}

/// What was measured until Ctrl-C is printed, and marked.
#[test]
#[ignore = "real peer: run by tests/run"]
fn ctrl_c_prints_what_was_measured_so_far() -> Result<()> {
    require!(cpus(2));
    let load = listened_to(
        Command::new(bench()).args("load --switch ringway --nice 0 --seconds 60".split(' ')),
    )?;
    std::thread::sleep(Duration::from_secs(6));
    rustix::process::kill_process(
        rustix::process::Pid::from_child(&load),
        rustix::process::Signal::INT,
    )?;
    ends_soon_and_says(load, ["PARTIAL: interrupted", "received"])
}
