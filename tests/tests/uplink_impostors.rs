//! What an uplink may find in place of its VF: one sentence says so, nothing is left mapped, and containers do not notice.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use ringway::control::spec::parse_port;
use ringway::control::state::PortState;
use testkit::topology::{Net, frame};
use vf_model::{Config, Inject, Nic, Pace, VfPolicy, serve};

/// More than every deadline of the driver.
const PATIENCE: Duration = Duration::from_secs(30);

/// A vfio-user server that is no VF.
#[derive(Clone, Copy)]
struct Impostor {
    /// Bytes of BAR0.
    bar: u64,
    /// PCI device.
    id: u16,
    /// Answers to anything but the greeting.
    talks: bool,
}

impl Impostor {
    /// Serves whoever connects; counts what is mapped.
    fn serve(self, path: &Path) -> Result<Arc<AtomicU32>> {
        let (listener, mapped) = (UnixListener::bind(path)?, Arc::new(AtomicU32::new(0)));
        let counted = mapped.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                while self.answer(&stream, &counted).is_ok() {}
            }
        });
        Ok(mapped)
    }

    fn answer(self, mut stream: &UnixStream, mapped: &AtomicU32) -> std::io::Result<()> {
        let mut header = [0; 16];
        stream.read_exact(&mut header)?;
        let size = u32::from_le_bytes([header[4], header[5], header[6], header[7]]);
        let mut body = vec![0; (size as usize).saturating_sub(16)];
        stream.read_exact(&mut body)?;
        let command = header[2];
        match command {
            1 => body = b"\0\0\0\0{}\0".to_vec(),
            _ if !self.talks => return Ok(()),
            2 => drop(mapped.fetch_add(1, Relaxed)),
            5 => body[16..24].copy_from_slice(&self.bar.to_le_bytes()),
            7 => body[12..16].copy_from_slice(&3u32.to_le_bytes()),
            9 => {
                let mut space = [0; 256];
                space[..2].copy_from_slice(&0x8086u16.to_le_bytes());
                space[2..4].copy_from_slice(&self.id.to_le_bytes());
                let (at, count) = (usize::from(body[0]), usize::from(body[12]));
                body.extend_from_slice(&space[at..at + count]);
            }
            10 => body.truncate(16),
            _ => {}
        }
        if header[8] & 1 << 4 != 0 {
            return Ok(()); // a posted write
        }
        let mut reply = header.to_vec();
        reply[4..8].copy_from_slice(&(16 + body.len() as u32).to_le_bytes());
        reply[8..12].copy_from_slice(&1u32.to_le_bytes());
        reply.extend(body);
        stream.write_all(&reply)
    }
}

/// The switch with an uplink at `path` says why it has none, switches on, and lets go of the port when it is told.
fn refused(path: &Path, why: &str) -> Result<()> {
    let uplink = parse_port(
        &format!("ixgbevf:uplink,vfio-user={}", path.display()),
        "test",
    )?;
    let net = Net::start(&["blue", "red"], |config| config.ports.push(uplink))?;
    let [mut blue, mut red] = net.attach(["blue", "red"])?;
    let end = Instant::now() + PATIENCE;
    let mut said = false;
    while !said {
        let hello = frame(red.mac(), blue.mac(), b"meanwhile");
        blue.send(&hello)?;
        while red.receive()? != hello {}
        let status = net.port("uplink")?;
        ensure!(status.state == PortState::Connecting || status.reason.is_none());
        let reason = status.reason.unwrap_or_default();
        said = reason.contains(why);
        ensure!(
            !reason.contains('\n') && Instant::now() < end,
            "{why}: {reason}"
        );
        std::thread::sleep(Duration::from_millis(10));
    }
    let asked = Instant::now();
    net.switch().del_port("uplink")?;
    ensure!(asked.elapsed() < PATIENCE);
    Ok(())
}

#[test]
fn what_is_no_vf_or_has_a_wrong_bar_or_is_silent_is_a_sentence() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let vf = Impostor {
        bar: 16384,
        id: 0x10ed,
        talks: true,
    };
    let cases = [
        (
            Impostor { bar: 4096, ..vf },
            "BAR0 has 4096 bytes, a VF has 16384",
        ),
        (Impostor { bar: 0, ..vf }, "BAR0 has 0 bytes"),
        (
            Impostor { id: 0x10fb, ..vf },
            "8086:10fb, not a VF of the 82599 family",
        ),
        (Impostor { talks: false, ..vf }, "did not answer within 5 s"),
    ];
    for (number, (impostor, why)) in cases.into_iter().enumerate() {
        let path = dir.path().join(format!("{number}.sock"));
        let mapped = impostor.serve(&path)?;
        refused(&path, why)?;
        ensure!(mapped.load(Relaxed) == 0, "{why}: mapped all the same");
    }
    Ok(())
}

#[test]
fn a_pf_that_never_answers_is_a_sentence_and_leaves_nothing_mapped() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("vf0.sock");
    let nic = Nic::new(Config {
        pace: Pace::AtOnce,
        manual_clock: false,
        ..Config::for_tests(vec![VfPolicy::default()])
    });
    nic.inject(0, Inject::LoseAnswers(u32::MAX));
    serve::serve_vf(nic.clone(), 0, &path)?;
    refused(&path, "did not answer")?;
    ensure!(nic.mappings(0) == 0, "{} mappings", nic.mappings(0));
    Ok(())
}
