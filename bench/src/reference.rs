//! `ringway-bench reference`: a plain learning switch on `vhost-user-backend`, `virtio-queue` and `vm-memory`.
//!
//! Each frame is copied into private memory and out of it again, every descriptor goes through the crates' checks, a kick wakes a
//! thread per port, one lock guards the table. It is what these crates give without further thought: a bar in comparisons, and the
//! oracle of tests: where it and a fast switch disagree about where a frame goes, one of them is wrong.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vhost_user_backend::{VhostUserBackendMut, VhostUserDaemon, VringMutex, VringT};
use virtio_queue::QueueT;
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{
    EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier,
};

use crate::interrupt;
use ringway::virtio::net::HEADER_LEN;
use ringway::virtio::ring::feature;

type Memory = GuestMemoryAtomic<GuestMemoryMmap>;
type Vring = VringMutex<Memory>;
type Mac = [u8; 6];

/// Longest frame that is taken.
const FRAME_MAX: usize = 65_535;
/// The guest's receive ring and its transmit ring.
const TO_GUEST: usize = 0;
const FROM_GUEST: u16 = 1;

/// Serves vhost-user sockets with a plain learning switch made of vhost-user-backend, virtio-queue and vm-memory.
///
/// Something to compare with, and to test others against; not something to use.
#[derive(Debug, clap::Args)]
pub(crate) struct Reference {
    /// A socket to serve; again for each port
    #[arg(long = "socket", value_name = "PATH", required = true)]
    sockets: Vec<PathBuf>,
}

/// Runs the subcommand until somebody ends it.
pub(crate) fn run(options: &Reference) -> Result<()> {
    let bridge = Arc::new(Bridge::new(options.sockets.len()));
    for (port, socket) in options.sockets.iter().enumerate() {
        let (bridge, socket) = (bridge.clone(), socket.clone());
        std::thread::Builder::new()
            .name(format!("port-{port}"))
            .spawn(move || serve(&bridge, port, &socket))
            .context("a thread")?;
    }
    while interrupt::sleep(Duration::from_secs(3600)).is_ok() {}
    for socket in &options.sockets {
        let _ = std::fs::remove_file(socket);
    }
    Ok(())
}

/// One guest after the other.
fn serve(bridge: &Arc<Bridge>, port: usize, socket: &Path) {
    loop {
        let memory = Memory::new(GuestMemoryMmap::new());
        let backend = Arc::new(Mutex::new(Port {
            number: port,
            bridge: bridge.clone(),
            memory: memory.clone(),
        }));
        let served = VhostUserDaemon::new(format!("vhost-{port}"), backend, memory)
            .and_then(|mut daemon| daemon.serve(socket));
        bridge.leave(port);
        if let Err(error) = served {
            eprintln!("port {port}: {error}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// Where stations live, and the receive ring of every port that has one.
struct Bridge {
    stations: Mutex<HashMap<Mac, usize>>,
    rings: Vec<Mutex<Option<(Vring, Memory)>>>,
}

impl Bridge {
    fn new(ports: usize) -> Self {
        Self {
            stations: Mutex::default(),
            rings: (0..ports).map(|_| Mutex::default()).collect(),
        }
    }

    fn arrive(&self, port: usize, ring: &Vring, memory: &Memory) {
        let mut known = lock(&self.rings[port]);
        if known.is_none() {
            *known = Some((ring.clone(), memory.clone()));
        }
    }

    fn leave(&self, port: usize) {
        *lock(&self.rings[port]) = None;
        lock(&self.stations).retain(|_, at| *at != port);
    }

    /// Learns where a frame came from; returns the one port it goes to, none for all others.
    fn decide(&self, from: usize, frame: &[u8]) -> Option<usize> {
        let (to, source) = (mac(frame, 0), mac(frame, 6));
        let mut stations = lock(&self.stations);
        if source[0] & 1 == 0 {
            stations.insert(source, from);
        }
        stations.get(&to).copied()
    }

    /// Forwards a frame; `told` collects the ports that got something.
    fn forward(&self, from: usize, frame: &[u8], told: &mut [bool]) {
        if frame.len() < 14 {
            return;
        }
        match self.decide(from, frame) {
            Some(to) if to == from => {}
            Some(to) => told[to] |= self.deliver(to, frame),
            None => {
                for to in (0..self.rings.len()).filter(|to| *to != from) {
                    told[to] |= self.deliver(to, frame);
                }
            }
        }
    }

    /// Writes a frame to the next buffer of a port's guest; false if it has none, or none that is large enough.
    fn deliver(&self, to: usize, frame: &[u8]) -> bool {
        let ring = lock(&self.rings[to]);
        let Some((vring, memory)) = ring.as_ref() else {
            return false;
        };
        let memory = memory.memory();
        let mut state = vring.get_mut();
        let Some(chain) = state.get_queue_mut().pop_descriptor_chain(memory.clone()) else {
            return false;
        };
        let head = chain.head_index();
        let mut header = [0u8; HEADER_LEN];
        header[10] = 1; // num_buffers
        let written = chain.writer(&memory).ok().and_then(|mut writer| {
            if writer.available_bytes() < HEADER_LEN + frame.len() {
                return None;
            }
            writer.write_all(&header).ok()?;
            writer.write_all(frame).ok()?;
            Some(writer.bytes_written() as u32)
        });
        state.add_used(head, written.unwrap_or(0)).is_ok() && written.is_some()
    }

    fn signal(&self, told: &[bool]) {
        for (port, _) in told.iter().enumerate().filter(|(_, told)| **told) {
            if let Some((vring, _)) = lock(&self.rings[port]).as_ref()
                && vring.needs_notification().unwrap_or(true)
            {
                let _ = vring.signal_used_queue();
            }
        }
    }
}

fn mac(frame: &[u8], at: usize) -> Mac {
    let mut mac = [0; 6];
    mac.copy_from_slice(&frame[at..at + 6]);
    mac
}

/// The device a guest sees.
struct Port {
    number: usize,
    bridge: Arc<Bridge>,
    memory: Memory,
}

impl Port {
    /// Takes every frame there is; true if there was one.
    fn drain(&self, vring: &Vring) -> bool {
        let (memory, mut any) = (self.memory.memory(), false);
        let mut told = vec![false; self.bridge.rings.len()];
        let mut frame = Vec::new();
        loop {
            let chain = vring
                .get_mut()
                .get_queue_mut()
                .pop_descriptor_chain(memory.clone());
            let Some(chain) = chain else { break };
            any = true;
            let head = chain.head_index();
            frame.clear();
            if let Ok(reader) = chain.reader(&memory) {
                // A frame that cannot be read whole is dropped.
                let most = (FRAME_MAX + HEADER_LEN) as u64;
                if reader.take(most).read_to_end(&mut frame).is_err() {
                    frame.clear();
                }
            }
            if frame.len() > HEADER_LEN {
                self.bridge
                    .forward(self.number, &frame[HEADER_LEN..], &mut told);
            }
            let _ = vring.add_used(head, 0);
        }
        self.bridge.signal(&told);
        if any && vring.needs_notification().unwrap_or(true) {
            let _ = vring.signal_used_queue();
        }
        any
    }
}

impl VhostUserBackendMut for Port {
    type Bitmap = ();
    type Vring = Vring;

    fn num_queues(&self) -> usize {
        2
    }

    fn max_queue_size(&self) -> usize {
        32_768
    }

    fn features(&self) -> u64 {
        feature::VERSION_1 | feature::INDIRECT_DESC | feature::PROTOCOL_FEATURES
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::REPLY_ACK | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
    }

    fn set_event_idx(&mut self, _: bool) {}

    fn update_memory(&mut self, memory: Memory) -> std::io::Result<()> {
        self.memory = memory;
        Ok(())
    }

    fn exit_event(&self, _: usize) -> Option<(EventConsumer, EventNotifier)> {
        new_event_consumer_and_notifier(EventFlag::NONBLOCK).ok()
    }

    fn handle_event(
        &mut self,
        event: u16,
        _: EventSet,
        vrings: &[Vring],
        _: usize,
    ) -> std::io::Result<()> {
        self.bridge
            .arrive(self.number, &vrings[TO_GUEST], &self.memory);
        if event != FROM_GUEST {
            return Ok(());
        }
        let vring = &vrings[usize::from(FROM_GUEST)];
        loop {
            vring
                .disable_notification()
                .map_err(std::io::Error::other)?;
            self.drain(vring);
            if !vring.enable_notification().map_err(std::io::Error::other)? {
                return Ok(());
            }
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(to: u8, from: u8) -> Vec<u8> {
        [[2, 0, 0, 0, 0, to], [2, 0, 0, 0, 0, from]].concat()
    }

    #[test]
    fn the_bridge_learns_and_forgets_those_who_leave() {
        let bridge = Bridge::new(3);
        assert_eq!(bridge.decide(0, &frame(2, 1)), None, "not known yet");
        assert_eq!(bridge.decide(1, &frame(1, 2)), Some(0));
        assert_eq!(bridge.decide(2, &frame(2, 1)), Some(1));
        assert_eq!(bridge.decide(1, &frame(1, 2)), Some(2), "moved");
        bridge.leave(2);
        assert_eq!(bridge.decide(1, &frame(1, 2)), None);
    }
}
