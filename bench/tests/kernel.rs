//! The kernel's own ways, measured as a user does: what comes out, and that nothing is left behind.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::process::CommandExt;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use testkit::require;
use testkit::skip::{cpus, root, tool};

fn bench(arguments: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ringway-bench"));
    command.args(arguments.split_whitespace());
    command
}

fn links() -> Result<BTreeSet<String>> {
    let names = fs::read_dir("/sys/class/net")?;
    Ok(names
        .flatten()
        .map(|link| link.file_name().to_string_lossy().into_owned())
        .collect())
}

/// Processes of this program that play a part in it, started by `parent`'s run.
fn helpers(directory: &str) -> usize {
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let lines = processes.filter_map(|process| fs::read(process.path().join("environ")).ok());
    lines
        .filter(|line| String::from_utf8_lossy(line).contains(directory))
        .count()
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

#[test]
fn frames_circulate_through_bridge_and_macvlan_and_the_hosts_links_stay_as_they_were() -> Result<()>
{
    require!(root(), tool("ip", "iproute2"), cpus(2));
    let before = links()?;
    let directory = tempfile::tempdir()?;
    let json = directory.path().join("run.json");
    let output = bench(
        "compare --only bridge,macvlan --rows split64,split9000,stations1 --rounds 1 --attempts 1 --seconds 0.4 --patience 0.2 \
         --placement any --nice 0",
    )
    .arg("--json")
    .arg(&json)
    .output()?;
    let text = said(&output);
    ensure!(output.status.success(), "{text}");
    ensure!(text.contains("own generator (AF_PACKET"), "{text}");
    let saved: Value = serde_json::from_slice(&fs::read(&json)?)?;
    let measured = saved["measurements"].as_array().context("measurements")?;
    ensure!(measured.len() == 6, "{text}");
    for one in measured {
        // A busy machine may make a sample useless; that frames moved it cannot deny.
        let mpps = one["samples"][0]["mpps"].as_f64();
        ensure!(mpps.is_some_and(|mpps| mpps > 0.001), "{one}\n{text}");
    }
    ensure!(!text.contains("lost frames"), "{text}");
    ensure!(links()? == before, "links changed: {:?}", links()?);
    Ok(())
}

#[test]
fn every_frame_of_a_chain_through_the_kernel_arrives_once() -> Result<()> {
    require!(root(), tool("ip", "iproute2"), cpus(2));
    let output =
        bench("chain --switch bridge,macvlan --lengths 1,3 --seconds 0.3 --nice 0 --json -")
            .output()?;
    ensure!(output.status.success(), "{}", said(&output));
    let saved: Value = serde_json::from_slice(&output.stdout)?;
    let measured = saved["measurements"].as_array().context("measurements")?;
    ensure!(measured.len() == 4, "{}", said(&output));
    for one in measured {
        let count = |name: &str| one["count"][name].as_u64().unwrap_or(u64::MAX);
        ensure!(count("received") > 100, "{one}");
        ensure!(
            count("lost") + count("duplicated") + count("reordered") + count("foreign") == 0,
            "{one}"
        );
        ensure!(
            one["latency"]["p50"].as_f64().is_some_and(|ns| ns > 500.0),
            "{one}"
        );
    }
    Ok(())
}

#[test]
fn an_interrupted_run_says_what_it_has_and_leaves_no_helper_behind() -> Result<()> {
    require!(root(), tool("ip", "iproute2"), cpus(2));
    let before = links()?;
    let directory = tempfile::tempdir()?;
    let mark = directory.path().display().to_string();
    // Its helpers inherit the mark.
    let run = bench(
        "compare --only bridge --rows split64 --rounds 500 --seconds 0.3 --placement any --nice 0",
    )
    .env("TMPDIR", &mark)
    .stdout(Stdio::piped())
    .stderr(Stdio::piped())
    .spawn()?;
    let began = Instant::now();
    while helpers(&mark) < 3 {
        ensure!(began.elapsed() < Duration::from_secs(30), "no helpers");
        std::thread::sleep(Duration::from_millis(20));
    }
    std::thread::sleep(Duration::from_secs(3));
    let pid = rustix::process::Pid::from_child(&run);
    rustix::process::kill_process(pid, rustix::process::Signal::INT)?;
    let output = run.wait_with_output()?;
    let text = said(&output);
    ensure!(
        text.contains("PARTIAL") || text.contains("nothing was measured"),
        "{text}"
    );
    let began = Instant::now();
    while helpers(&mark) > 0 {
        ensure!(
            began.elapsed() < Duration::from_secs(10),
            "helpers stay: {text}"
        );
        std::thread::sleep(Duration::from_millis(20));
    }
    ensure!(links()? == before, "links changed");
    Ok(())
}

#[test]
fn without_root_one_sentence_says_what_to_do() -> Result<()> {
    require!(root(), tool("ip", "iproute2"));
    for arguments in [
        "compare --only bridge --rows split64",
        "chain --switch macvlan",
    ] {
        let mut command = bench(arguments);
        // A user's own binary directory may be closed to others.
        let copy = tempfile::Builder::new().prefix("rwb").tempdir_in("/tmp")?;
        fs::set_permissions(
            copy.path(),
            std::os::unix::fs::PermissionsExt::from_mode(0o755),
        )?;
        let program = copy.path().join("ringway-bench");
        fs::copy(command.get_program(), &program)?;
        let arguments: Vec<_> = command.get_args().map(ToOwned::to_owned).collect();
        command = Command::new(&program);
        let output = command.args(arguments).uid(65534).gid(65534).output()?;
        let text = said(&output);
        ensure!(!output.status.success(), "{text}");
        ensure!(text.contains("run with sudo"), "{text}");
    }
    Ok(())
}

#[test]
fn load_says_that_the_kernel_has_no_vhost_user_sockets() -> Result<()> {
    let output = bench("load --switch bridge").output()?;
    let text = said(&output);
    ensure!(
        !output.status.success() && text.contains("compare and chain measure it"),
        "{text}"
    );
    Ok(())
}
