//! `vf-responder`: answers ARP and ping on a VF with `vfio-pmd`; the driver's side of tests in a guest or across processes.

use std::io::BufRead;
use std::net::Ipv4Addr;
use std::ops::RangeInclusive;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::Parser;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vfio_pmd::mmio::Bar;
use vfio_pmd::transport::{DmaRange, Transport};
use vfio_pmd::{Health, Options, QueuePair, Vf};

/// How often the link and the PF are looked at.
const LOOK: Duration = Duration::from_millis(50);
/// How long to wait for an interrupt.
const PATIENCE: Timespec = Timespec {
    tv_sec: 20,
    tv_nsec: 0,
};
/// Rest of a loop that found nothing.
const IDLE: Duration = Duration::from_micros(200);

/// Answers ARP and ping on a VF until standard input ends.
///
/// Commands on standard input: show (frames received and sent, interrupts of the mailbox), arm (sleep until a frame's interrupt),
/// reset (start the VF over), unmap (take all memory from the device while its queues run), quit.
#[derive(Parser)]
struct Arguments {
    /// A PCI address bound to vfio-pci, or the path of a vfio-user socket
    device: String,
    /// The address to answer for
    ip: Ipv4Addr,
}

/// A transport that remembers what is mapped.
struct Recording {
    inner: Arc<dyn Transport>,
    mapped: Mutex<Vec<(u64, u64)>>,
}

impl Transport for Recording {
    fn name(&self) -> String {
        self.inner.name()
    }
    fn read_config(&self, offset: u32, bytes: &mut [u8]) -> std::io::Result<()> {
        self.inner.read_config(offset, bytes)
    }
    fn write_config(&self, offset: u32, bytes: &[u8]) -> std::io::Result<()> {
        self.inner.write_config(offset, bytes)
    }
    fn registers(self: Arc<Self>) -> std::io::Result<Bar> {
        Arc::clone(&self.inner).registers()
    }
    fn iova_ranges(&self) -> Vec<RangeInclusive<u64>> {
        self.inner.iova_ranges()
    }
    fn map_dma(&self, range: &DmaRange<'_>) -> std::io::Result<()> {
        self.inner.map_dma(range)?;
        let mut mapped = self.mapped.lock().unwrap_or_else(|e| e.into_inner());
        mapped.push((range.iova, range.len));
        Ok(())
    }
    fn unmap_dma(&self, iova: u64, len: u64) -> std::io::Result<()> {
        let mut mapped = self.mapped.lock().unwrap_or_else(|e| e.into_inner());
        mapped.retain(|range| *range != (iova, len));
        self.inner.unmap_dma(iova, len)
    }
    fn vectors(&self) -> u32 {
        self.inner.vectors()
    }
    fn set_interrupts(&self, signals: &[Option<BorrowedFd<'_>>]) -> std::io::Result<()> {
        self.inner.set_interrupts(signals)
    }
    fn reset(&self) -> std::io::Result<()> {
        self.inner.reset()
    }
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let inner: Arc<dyn Transport> = if arguments.device.contains('/') {
        vfio_pmd::vfio_user::VfioUser::open(Path::new(&arguments.device))?
    } else {
        vfio_pmd::vfio::VfioPci::open(&arguments.device)?
    };
    let transport = Arc::new(Recording {
        inner,
        mapped: Mutex::default(),
    });
    let mut vf = Vf::open(
        Arc::clone(&transport) as Arc<dyn Transport>,
        &Options::default(),
    )?;
    let mac = vf.mac();
    let (tell, commands) = channel();
    std::thread::spawn(move || {
        for line in std::io::stdin().lock().lines().map_while(Result::ok) {
            if tell.send(line).is_err() {
                return;
            }
        }
    });
    let mut queues = vf.start()?;
    println!(
        "ready {mac:02x?} api {:?} queues {}",
        vf.api(),
        queues.len()
    );
    let mut looked = Instant::now();
    loop {
        let moved: usize = queues
            .iter_mut()
            .map(|pair| answer(pair, mac, arguments.ip))
            .sum();
        if moved == 0 {
            std::thread::sleep(IDLE);
        }
        match next(&commands) {
            Command::None => {}
            Command::Quit => return Ok(()),
            Command::Show => {
                let seen = vf.statistics();
                println!("received {} sent {}", seen.rx_frames, seen.tx_frames);
                println!("signals {}", vf.mailbox_signal().map_or(0, |fd| count(&fd)));
            }
            Command::Arm => arm(&mut queues)?,
            Command::Unmap => take_memory(&transport)?,
            Command::Reset => queues = start_over(&mut vf, queues)?,
        }
        if looked.elapsed() >= LOOK {
            looked = Instant::now();
            if let Health::Lost(why) = vf.health() {
                println!("lost: {why}");
                queues = start_over(&mut vf, queues)?;
            }
        }
    }
}

fn start_over(vf: &mut Vf, queues: Vec<QueuePair>) -> Result<Vec<QueuePair>> {
    drop(queues);
    vf.reset()?;
    let queues = vf.start()?;
    println!("restarted");
    Ok(queues)
}

/// Takes all memory from the device behind the driver's back.
fn take_memory(transport: &Recording) -> Result<()> {
    let ranges = transport
        .mapped
        .lock()
        .unwrap_or_else(|e| e.into_inner())
        .clone();
    for (iova, len) in &ranges {
        transport
            .inner
            .unmap_dma(*iova, *len)
            .context("unmapping")?;
    }
    println!("unmapped {}", ranges.len());
    Ok(())
}

/// What an eventfd counted; it starts over.
fn count(signal: &OwnedFd) -> u64 {
    let mut bytes = [0; 8];
    rustix::io::read(signal, &mut bytes).map_or(0, |_| u64::from_ne_bytes(bytes))
}

/// Sleeps until a frame arrives on the first queue and its interrupt says so.
fn arm(queues: &mut [QueuePair]) -> Result<()> {
    let pair = queues.first_mut().context("no queue")?;
    let there = pair.rx.arm();
    println!("armed");
    let signal = pair.rx.wake_signal().context("no interrupts")?;
    let mut fds = [PollFd::new(&signal, PollFlags::IN)];
    let woken = poll(&mut fds, Some(&PATIENCE))? == 1;
    println!("{}", if woken || there { "woken" } else { "not woken" });
    count(&signal);
    Ok(())
}

enum Command {
    None,
    Show,
    Arm,
    Reset,
    Unmap,
    Quit,
}

fn next(commands: &Receiver<String>) -> Command {
    use std::sync::mpsc::TryRecvError::{Disconnected, Empty};
    match commands.try_recv().as_deref() {
        Ok("show") => Command::Show,
        Ok("arm") => Command::Arm,
        Ok("reset") => Command::Reset,
        Ok("unmap") => Command::Unmap,
        Ok("quit") | Err(Disconnected) => Command::Quit,
        Ok(_) | Err(Empty) => Command::None,
    }
}

/// Answers what waits in a queue; how many frames that were.
fn answer(pair: &mut QueuePair, mac: [u8; 6], ip: Ipv4Addr) -> usize {
    let frames = pair.rx.lend(32);
    let count = frames.count();
    for frame in frames.iter() {
        let mut bytes = Vec::with_capacity(frame.len() as usize);
        for piece in frame.pieces() {
            let start = bytes.len();
            bytes.resize(start + piece.len() as usize, 0);
            piece.copy_to(&mut bytes[start..]);
        }
        if let Some(reply) = reply(&bytes, mac, ip) {
            // A full ring loses the answer: the asker asks again.
            let _ = pair.tx.push_bytes(&reply);
        }
    }
    pair.tx.publish();
    pair.rx.give_back(count);
    count
}

/// The answer to an ARP request for `ip` or to a ping.
fn reply(frame: &[u8], mac: [u8; 6], ip: Ipv4Addr) -> Option<Vec<u8>> {
    let mut reply = frame.to_vec();
    reply.get_mut(..6)?.copy_from_slice(frame.get(6..12)?);
    reply.get_mut(6..12)?.copy_from_slice(&mac);
    match frame.get(12..14)? {
        [0x08, 0x06] if frame.get(20..22)? == [0, 1] && frame.get(38..42)? == ip.octets() => {
            reply[21] = 2;
            reply.copy_within(22..32, 32);
            reply[22..28].copy_from_slice(&mac);
            reply[28..32].copy_from_slice(&ip.octets());
            Some(reply)
        }
        [0x08, 0x00]
            if frame.get(14)? == &0x45
                && frame.get(23)? == &1
                && frame.get(30..34)? == ip.octets()
                && frame.get(34)? == &8 =>
        {
            reply.copy_within(26..30, 30);
            reply[26..30].copy_from_slice(&ip.octets());
            // Type 8 becomes 0: the checksum grows by what the sum loses.
            reply[34] = 0;
            let sum = u32::from(u16::from_be_bytes([*frame.get(36)?, *frame.get(37)?])) + 0x0800;
            let folded = (sum & 0xffff) + (sum >> 16);
            reply[36..38].copy_from_slice(&(folded as u16).to_be_bytes());
            Some(reply)
        }
        _ => None,
    }
}
