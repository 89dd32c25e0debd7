//! `ringway demo` as a newcomer types it: real sockets, real memory, books that balance, nothing left behind.

use std::io::{BufRead as _, BufReader, Read as _};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

/// The command, with a temporary directory of its own.
fn ringway(line: &str) -> (Command, tempfile::TempDir) {
    let dir = tempfile::tempdir().expect("a directory");
    let mut command = Command::new(env!("CARGO_BIN_EXE_ringway"));
    command
        .args(line.split_whitespace())
        .env("TMPDIR", dir.path());
    (command, dir)
}

fn run(line: &str) -> Output {
    let (mut command, dir) = ringway(line);
    let output = command.output().expect("ran");
    let left: Vec<_> = dir.path().read_dir().expect("there").collect();
    assert!(left.is_empty(), "{line} left {left:?}");
    output
}

fn summary(line: &str) -> Value {
    let output = run(&format!("demo --json {line}"));
    assert!(output.status.success(), "{line}: {output:?}");
    serde_json::from_slice(&output.stdout).expect("JSON")
}

fn number(value: &Value) -> u64 {
    value
        .as_u64()
        .unwrap_or_else(|| panic!("{value} is no number"))
}

/// A demo with more than a thousand frames in all its parts: for 0.6 s, or longer if this machine has no time for it.
fn busy(line: &str) -> Value {
    for seconds in ["0.6", "4", "20"] {
        let said = summary(&format!("--seconds {seconds} {line}"));
        let all = !said["load"].is_null() && !said["one_at_a_time"].is_null();
        if all && number(&said["received"]) > 1000 {
            return said;
        }
    }
    panic!("{line}: no thousand frames in 20 s");
}

#[test]
fn every_frame_comes_unchanged_or_is_counted() {
    for line in [
        "",
        "--packed",
        "--ports 5 --frame-size 1518",
        "--ports 64",
        "--frame-size 9000 --packed",
        "--frame-size 65535",
    ] {
        let said = busy(line);
        for nothing in ["corrupted", "duplicated", "reordered", "foreign"] {
            assert_eq!(number(&said[nothing]), 0, "{line}: {nothing} in {said}");
        }
        let books = &said["books"];
        let [received, replicated, sent, dropped] =
            ["received", "replicated", "sent", "dropped"].map(|part| number(&books[part]));
        assert_eq!(received + replicated, sent + dropped, "{line}: {said}");
        assert_eq!(
            received,
            number(&books["containers_sent"]),
            "{line}: {said}"
        );
        assert_eq!(
            sent,
            number(&books["containers_received"]),
            "{line}: {said}"
        );
        assert!(
            said["load"]["cycles_per_frame"].as_f64() > Some(0.0),
            "{line}: {said}"
        );
        assert!(
            said["one_at_a_time"]["latency_us"]["p50"].as_f64() > Some(0.0),
            "{line}: {said}"
        );
    }
}

#[test]
fn one_cpu_is_enough_and_the_demo_says_so() {
    let (command, _dir) = ringway("demo --seconds 0.6");
    let output = Command::new("taskset")
        .args(["-c", "0"])
        .arg(command.get_program())
        .args(command.get_args())
        .output()
        .expect("taskset is in util-linux");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{output:?}");
    assert!(text.contains("There is one CPU only"), "{text}");
    assert!(text.contains("they balance"), "{text}");
}

#[test]
fn ctrl_c_ends_it_early_with_the_summary() {
    let (mut command, dir) = ringway("demo --seconds 600");
    let mut child = command.stdout(Stdio::piped()).spawn().expect("started");
    let mut lines = BufReader::new(child.stdout.take().expect("piped"));
    let mut line = String::new();
    let mut read_line = || {
        line.clear();
        assert!(lines.read_line(&mut line).expect("text") > 0, "it ended");
        line.clone()
    };
    while !read_line().contains("cycles/frame") {}
    read_line();
    let began = Instant::now();
    let id = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(id, rustix::process::Signal::INT).expect("ours");
    let mut rest = String::new();
    lines.read_to_string(&mut rest).expect("text");
    assert!(child.wait().expect("ours").success(), "{rest}");
    assert!(
        began.elapsed() < Duration::from_secs(20),
        "took {:?}",
        began.elapsed()
    );
    assert!(
        rest.contains("Ended early") && rest.contains("they balance"),
        "{rest}"
    );
    assert_eq!(dir.path().read_dir().expect("there").count(), 0);
}

#[test]
fn nonsense_is_refused_before_anything_starts() {
    for line in [
        "--ports 1",
        "--ports 65",
        "--frame-size 63",
        "--frame-size 65536",
        "--seconds 0",
        "--seconds soon",
    ] {
        let output = run(&format!("demo {line}"));
        assert_eq!(output.status.code(), Some(2), "{line}: {output:?}");
        assert!(output.stdout.is_empty(), "{line}: {output:?}");
    }
}
