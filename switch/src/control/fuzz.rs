//! What fuzzing reaches that is private to control: the conversation with a guest. Compiled for `tests/fuzz` alone.

use std::io::{IoSlice, Read as _};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};

use rustix::cmsg_space;
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{FallocateFlags, MemfdFlags, fallocate, ftruncate, memfd_create};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

use super::port_handle::{PortHandle, Rings, SessionReport};
use super::state::PortSpec;
use super::vhost_device::Device;
use super::vhost_filter::{Filter, Heard};
use crate::dataplane::frame::Slots;
use crate::dataplane::queue::RxQueue as _;
use crate::port::shared::Sender as _;

/// Where the guest's memory is for its descriptors and for itself, and how long it is.
const GPA: u64 = 0x4000_0000;
const UVA: u64 = 0x7000_0000_0000;
const LEN: u64 = 256 << 10;

/// The workers: what they were given, polled when the script says so.
#[derive(Default)]
struct Workers(Mutex<Rings>);

impl PortHandle for Workers {
    fn attach(&self, rings: Rings) -> anyhow::Result<()> {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = rings;
        Ok(())
    }

    fn detach(&self) -> Rings {
        std::mem::take(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn report(&self, _: SessionReport) {}
}

impl Workers {
    /// One turn of every ring: what the guest sends it also gets.
    fn turn(&self) {
        let mut rings = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // A guest has no rings of a wire.
        let Rings {
            from_guest,
            to_guest,
            ..
        } = &mut *rings;
        let mut slots = Slots::new();
        for (_, queue) in from_guest {
            let burst = queue.lend(&mut slots);
            let count = burst.count();
            let sound = (0..count).filter(|index| burst.fault(*index).is_none());
            let picks = sound.fold(0, |picks, index| picks | 1u64 << index);
            for (_, receiver) in to_guest.iter_mut().filter(|_| picks != 0) {
                let sent = receiver.send(&burst, picks);
                assert!(sent.frames + sent.small <= picks.count_ones());
            }
            queue.give_back(count);
        }
    }
}

/// The fuzzer's bytes, one after the other.
struct Script<'a>(&'a [u8]);

impl Script<'_> {
    fn byte(&mut self) -> Option<u8> {
        let (first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(*first)
    }

    fn small(&mut self, limit: u64) -> Option<u64> {
        let two = [self.byte()?, self.byte()?];
        Some(u64::from(u16::from_le_bytes(two)) % limit)
    }

    fn some(&mut self, most: usize) -> Vec<u8> {
        let (these, rest) = self.0.split_at(most.min(self.0.len()));
        self.0 = rest;
        these.to_vec()
    }
}

/// What an attacker has at hand.
struct Things {
    memory: OwnedFd,
    event: OwnedFd,
    stream: UnixStream,
}

impl Things {
    fn send(&self, request: u32, flags: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) {
        let words = [request, flags, payload.len() as u32];
        let mut bytes: Vec<u8> = words.into_iter().flat_map(u32::to_ne_bytes).collect();
        bytes.extend(payload);
        self.write(&bytes, fds);
    }

    fn write(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
        let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(64))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            control.push(SendAncillaryMessage::ScmRights(fds));
        }
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        let _ = sendmsg(&self.stream, &[IoSlice::new(bytes)], &mut control, flags);
    }

    fn fds(&self, choice: u8) -> Vec<BorrowedFd<'_>> {
        match choice % 8 {
            0..=3 => vec![],
            4 => vec![self.event.as_fd()],
            5 => vec![self.memory.as_fd()],
            6 => vec![self.memory.as_fd(); 1 + usize::from(choice) / 8],
            _ => vec![self.stream.as_fd()],
        }
    }
}

/// The numbers of a message that mean something, with a little of the fuzzer's in them.
fn payload(request: u32, script: &mut Script<'_>) -> Option<Vec<u8>> {
    let pair = |low: u64, high: u64| (high << 32 | low).to_le_bytes().to_vec();
    let words = |words: &[u64]| words.iter().flat_map(|word| word.to_le_bytes()).collect();
    Some(match request {
        2 => (1u64 << 32 | 1 << 30 | script.small(1 << 16)? << 26 | script.small(256)? << 15)
            .to_le_bytes()
            .to_vec(),
        16 => script.small(1 << 16)?.to_le_bytes().to_vec(),
        5 => {
            let count = script.small(4)?;
            let mut table = vec![count];
            for n in 0..count {
                let from = script.small(LEN / 4096)? * 4096;
                let len = script.small(LEN / 4096)? * 4096;
                table.extend([
                    GPA + from + (n << 40) * script.small(2)?,
                    len,
                    UVA + from,
                    from,
                ]);
            }
            words(&table)
        }
        37 | 38 => {
            let from = script.small(LEN / 4096)? * 4096;
            words(&[0, GPA + from, script.small(64)? * 4096, UVA + from, from])
        }
        9 => {
            let ring = script.small(5)?;
            let mut at = || Some(UVA + script.small(LEN / 4)? * 4);
            words(&[ring, at()?, at()?, at()?, 0])
        }
        8 | 10 | 11 | 18 => pair(script.small(5)?, script.small(1 << 16)?),
        12..=14 => script.small(1 << 9)?.to_le_bytes().to_vec(),
        _ => {
            let most = script.small(64)? as usize;
            script.some(most)
        }
    })
}

/// One step of the script; `None` at its end.
fn step(things: &Things, script: &mut Script<'_>, workers: &Workers) -> Option<()> {
    match script.byte()? {
        // A message that means something.
        0..=159 => {
            let request = u32::from(script.byte()? % 46);
            let payload = payload(request, script)?;
            let fds = match (request, script.byte()?) {
                (5, choice) if choice < 200 => {
                    vec![things.memory.as_fd(); (payload.len() - 8) / 32]
                }
                (37, choice) if choice < 200 => vec![things.memory.as_fd()],
                (12 | 13, choice) if choice < 200 => vec![things.event.as_fd()],
                (_, choice) => things.fds(choice),
            };
            let flags = if script.byte()? & 1 == 0 { 1 } else { 9 };
            things.send(request, flags, &payload, &fds);
        }
        // Any bytes.
        160..=179 => {
            let most = script.small(100)? as usize;
            let (bytes, choice) = (script.some(most), script.byte()?);
            things.write(&bytes, &things.fds(choice));
        }
        // Memory written, punched, truncated.
        180..=229 => {
            let (at, most) = (script.small(LEN / 2)? * 2, script.small(64)? as usize);
            let _ = rustix::io::pwrite(&things.memory, &script.some(most), at);
        }
        230..=234 => {
            let at = script.small(LEN / 4096)? * 4096;
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            let _ = fallocate(&things.memory, flags, at, 4096);
        }
        235..=236 => {
            let _ = ftruncate(&things.memory, script.small(LEN / 4096)? * 4096);
        }
        _ => workers.turn(),
    }
    Some(())
}

/// A guest's whole visit, as the fuzzer writes it.
pub fn visit(data: &[u8]) {
    let spec = PortSpec {
        queues: 2,
        ..PortSpec::vhost_user("fuzz", "/nowhere")
    };
    let workers = Arc::new(Workers::default());
    let options = Device::map_options(&spec);
    let device = Device::new(&spec, workers.clone(), Arc::default(), None, &options);
    let (ours, theirs) = UnixStream::pair().expect("a pair");
    theirs.set_nonblocking(true).expect("a socket");
    let mut filter = Filter::new(ours, device).expect("a pair");
    let memory = memfd_create("fuzz", MemfdFlags::CLOEXEC).expect("a memfd");
    ftruncate(&memory, LEN).expect("a file");
    let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
    let things = Things {
        memory,
        event: eventfd(0, flags).expect("an eventfd"),
        stream: theirs,
    };
    let mut script = Script(data);
    'visit: while step(&things, &mut script, &workers).is_some() {
        loop {
            match filter.listen() {
                Ok(Heard::Message) => {}
                Ok(Heard::Nothing) => break,
                Ok(Heard::End) | Err(_) => break 'visit,
            }
            let _ = (&things.stream).read(&mut [0; 4096]);
        }
        if filter.device().broken().is_some() {
            break;
        }
    }
    filter.device().leave();
}
