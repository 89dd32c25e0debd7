//! The generator of `ringway-bench` against every switch it can start: frames go through, all of them, and the books are right.

use std::path::PathBuf;
use std::process::Command;
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

/// Runs `ringway-bench` with `--json -`, at most two minutes, and returns what it saved.
fn saved(arguments: &str) -> Result<Value> {
    let binary = bench();
    let output = Command::new("timeout")
        .args(["-k", "2", "120"])
        .arg(&binary)
        .args(arguments.split(' '))
        .args(["--json", "-"])
        .output()
        .with_context(|| binary.display().to_string())?;
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
        ("neighbour --seconds 0.3", "neighbour", 4),
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
        ("chain --switch ringway --lengths 0", "0 is not in"),
    ] {
        let began = Instant::now();
        let output = Command::new("timeout")
            .args(["-k", "2", "60"])
            .arg(bench())
            .args(arguments.split(' '))
            .output()?;
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(!output.status.success(), "{arguments}: it went well");
        ensure!(errors.contains(said), "{arguments}: {errors}");
        ensure!(began.elapsed() < Duration::from_secs(40), "{arguments}");
    }
    Ok(())
}
