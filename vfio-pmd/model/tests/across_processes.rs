//! The driver in this process, the model in another: registers by messages, memory by file descriptors, interrupts by eventfds.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use vfio_pmd::vfio_user::VfioUser;
use vfio_pmd::{Health, Options, QueuePair, Vf};

/// Nothing waits longer for the other process.
const PATIENCE: Duration = Duration::from_secs(60);

struct Model {
    child: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
    dir: tempfile::TempDir,
}

impl Model {
    fn start() -> Model {
        let dir = tempfile::tempdir().unwrap();
        let vf = |n: u8| {
            format!(
                "{},mac=02:00:00:00:00:0{n},trust,spoofchk=off",
                dir.path().join(n.to_string()).display()
            )
        };
        let mut child = Command::new(env!("CARGO_BIN_EXE_vf-model"))
            .args(["serve", "--vf", &vf(1), "--vf", &vf(2)])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let stdin = child.stdin.take().unwrap();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        let mut model = Model {
            child,
            stdin,
            stdout,
            dir,
        };
        assert_eq!(model.line(), "serving 2 VFs");
        model
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        assert_ne!(
            self.stdout.read_line(&mut line).unwrap(),
            0,
            "the model has ended"
        );
        line.trim_end().to_owned()
    }

    fn command(&mut self, text: &str) -> Vec<String> {
        writeln!(self.stdin, "{text}").unwrap();
        let mut lines = Vec::new();
        loop {
            match self.line() {
                end if end == "ok" => return lines,
                line => {
                    assert!(!line.starts_with("error"), "{text}: {line}");
                    lines.push(line);
                }
            }
        }
    }

    fn socket(&self, n: u8) -> PathBuf {
        self.dir.path().join(n.to_string())
    }

    fn open(&self, n: u8) -> (Vf, QueuePair) {
        let mut vf = open(&self.socket(n));
        let pair = vf.start().unwrap().remove(0);
        (vf, pair)
    }

    /// Mappings, faults and misuses of a VF.
    fn seen(&mut self, vf: usize) -> [u64; 3] {
        let lines = self.command("show");
        let line = lines
            .iter()
            .find(|line| line.starts_with(&format!("vf={vf} rx_frames")))
            .unwrap();
        ["mappings=", "faults=", "misuses="].map(|key| {
            let word = line
                .split_whitespace()
                .find_map(|word| word.strip_prefix(key))
                .unwrap();
            word.parse().unwrap()
        })
    }
}

impl Drop for Model {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn open(path: &Path) -> Vf {
    Vf::open(VfioUser::open(path).unwrap(), &Options::default()).unwrap()
}

fn frame(to: u8, from: u8, number: u32) -> Vec<u8> {
    let mut frame = vec![2, 0, 0, 0, 0, to, 2, 0, 0, 0, 0, from, 0x88, 0xb5];
    frame.extend(number.to_be_bytes());
    frame.resize(60 + number as usize % 1400, number as u8);
    frame
}

/// Frames received by then, at least one unless the patience ends.
fn receive(pair: &mut QueuePair) -> Vec<Vec<u8>> {
    let end = Instant::now() + PATIENCE;
    loop {
        let frames = pair.rx.lend(64);
        let count = frames.count();
        let got: Vec<Vec<u8>> = frames
            .iter()
            .map(|frame| {
                let mut bytes = vec![0; frame.len() as usize];
                let mut done = 0;
                frame
                    .pieces()
                    .for_each(|piece| done += piece.copy_to(&mut bytes[done..]));
                bytes
            })
            .collect();
        pair.rx.give_back(count);
        if count > 0 || Instant::now() > end {
            return got;
        }
        std::thread::yield_now();
    }
}

#[test]
fn frames_cross_in_order_and_nothing_is_left_behind() {
    let mut model = Model::start();
    let (mut a, mut from) = model.open(1);
    let (mut b, mut to) = model.open(2);
    let (mut sent, mut seen) = (0, 0);
    let end = Instant::now() + PATIENCE;
    while seen < 4000 {
        assert!(
            Instant::now() < end,
            "{seen} of {sent}: {:?}",
            model.command("show")
        );
        while sent < 4000 && sent - seen < 200 {
            from.tx.push_bytes(&frame(2, 1, sent)).unwrap();
            sent += 1;
        }
        from.tx.publish();
        let got = receive(&mut to);
        // Reading waits until the model has seen the tail before it: on a busy machine it may be a whole ring behind.
        let counted = b.statistics().rx_frames;
        for bytes in got {
            let number = u32::from_be_bytes(bytes[14..18].try_into().unwrap());
            assert_eq!(
                number,
                seen,
                "of {sent}, {counted} counted: {:?}",
                model.command("show")
            );
            assert!(bytes == frame(2, 1, seen), "frame {seen} is damaged");
            seen += 1;
        }
    }
    assert_eq!(
        (a.statistics().tx_frames, b.statistics().rx_frames),
        (4000, 4000)
    );
    for vf in 0..2 {
        let [mappings, faults, misuses] = model.seen(vf);
        assert!(
            mappings > 0 && faults == 0 && misuses == 0,
            "{:?}",
            model.command("show")
        );
    }
    drop((from, to, a, b));
    let end = Instant::now() + PATIENCE;
    while (0..2).any(|vf| model.seen(vf)[0] > 0) {
        assert!(
            Instant::now() < end,
            "memory is still mapped: {:?}",
            model.command("show")
        );
    }
    // The next one finds a device as good as new.
    let (_vf, mut pair) = model.open(1);
    pair.tx.push_bytes(&frame(9, 1, 1)).unwrap();
    pair.tx.publish();
    assert_eq!(model.seen(0)[1..], [0, 0]);
}

#[test]
fn a_pf_that_is_reset_is_noticed_and_overcome() {
    let mut model = Model::start();
    let (mut a, mut from) = model.open(1);
    let (mut b, pair) = model.open(2);
    model.command("reset-pf 50");
    let end = Instant::now() + PATIENCE;
    while !matches!(b.health(), Health::Lost(_)) {
        assert!(Instant::now() < end, "nobody noticed");
        std::thread::sleep(Duration::from_millis(5));
    }
    drop(pair);
    b.reset().unwrap();
    let mut to = b.start().unwrap().remove(0);
    assert!(matches!(a.health(), Health::Lost(_)));
    drop(from);
    a.reset().unwrap();
    from = a.start().unwrap().remove(0);
    from.tx.push_bytes(&frame(2, 1, 7)).unwrap();
    from.tx.publish();
    assert_eq!(receive(&mut to), [frame(2, 1, 7)]);
}

#[test]
fn a_model_that_dies_leaves_a_device_that_is_gone_and_no_panic() {
    let mut model = Model::start();
    let (mut vf, mut pair) = model.open(1);
    model.child.kill().unwrap();
    model.child.wait().unwrap();
    for number in 0..10 {
        let _ = pair.tx.push_bytes(&frame(2, 1, number));
        pair.tx.publish();
    }
    let end = Instant::now() + PATIENCE;
    while !matches!(vf.health(), Health::Lost(_)) {
        assert!(Instant::now() < end, "a dead device looks well");
    }
    assert!(vf.reset().is_err());
}
