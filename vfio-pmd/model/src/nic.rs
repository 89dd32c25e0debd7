//! The device as a whole: VFs, their PF, the switch between them, and the wire.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use crate::inject::Inject;
use crate::mailbox::Raised;
use crate::pf::{Pf, PfPolicy, VfPolicy, VfState};
use crate::port::{State, soil};
use crate::regs::*;
use crate::report::{Drops, Exchange, Misuse, Report};
use crate::vf::{Asked, Bells, Counters, Vf};
use crate::wire::Wire;

/// When descriptors are looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pace {
    /// At once, in the driver's own register write.
    AtOnce,
    /// In [`Nic::step`]: a test's, or a thread's that does nothing else.
    Stepped,
}

/// How a device begins.
#[derive(Clone, Debug)]
pub struct Config {
    /// The port.
    pub pf: PfPolicy,
    /// One entry per VF.
    pub vfs: Vec<VfPolicy>,
    /// When descriptors are looked at.
    pub pace: Pace,
    /// The clock stands still until [`Nic::advance`]; otherwise it is the machine's.
    pub manual_clock: bool,
    /// Registers that survive a reset begin with a predecessor's values instead of zero.
    pub dirty: bool,
}

impl Config {
    /// A device whose VFs all have this policy; stepped, with a clock of its own, and as a careless predecessor left it.
    pub fn for_tests(vfs: Vec<VfPolicy>) -> Self {
        Self {
            pf: PfPolicy::default(),
            vfs,
            pace: Pace::Stepped,
            manual_clock: true,
            dirty: true,
        }
    }
}

/// The device. All of it sits behind one lock, except the tail registers, which a driver writes without waiting for anyone.
///
/// Threads: everything may be called from any thread.
pub struct Nic {
    state: Mutex<State>,
    bells: Vec<Arc<Bells>>,
    pace: Pace,
    started: Instant,
}

impl Nic {
    /// A device with a cable, no wire, and VFs that nobody has reset yet.
    pub fn new(config: Config) -> Arc<Nic> {
        let mut vfs: Vec<Vf> = config.vfs.iter().map(|_| Vf::new()).collect();
        if config.dirty {
            vfs.iter_mut().for_each(soil);
        }
        let bells = vfs.iter().map(|vf| Arc::clone(&vf.bells)).collect();
        let state = State {
            vfs,
            pf: Pf::new(config.pf, config.vfs),
            wire: None,
            cable: true,
            reset_until: None,
            answers: Vec::new(),
            clock: config.manual_clock.then_some(Duration::ZERO),
            unwanted: 0,
        };
        Arc::new(Nic {
            state: Mutex::new(state),
            bells,
            pace: config.pace,
            started: Instant::now(),
        })
    }

    /// VFs there are.
    pub fn vfs(&self) -> usize {
        self.bells.len()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn now(&self, state: &State) -> Duration {
        state.clock.unwrap_or_else(|| self.started.elapsed())
    }

    /// Reads a register of BAR0.
    pub fn read(&self, vf: usize, offset: u32) -> u32 {
        let mut state = self.lock();
        let now = self.now(&state);
        state.timers(now);
        let link = state.link(vf);
        state.vfs[vf].read(offset, now, link)
    }

    /// Writes a register of BAR0.
    pub fn write(&self, vf: usize, offset: u32, value: u32) {
        if self.pace == Pace::Stepped && self.ring_bell(vf, offset, value) {
            return;
        }
        let mut state = self.lock();
        let now = self.now(&state);
        match state.vfs[vf].write(offset, value) {
            Asked::Nothing | Asked::Mailbox(Raised::Nothing) => {}
            Asked::Reset => state.reset_vf(vf),
            Asked::Mailbox(Raised::Request) => state.request(vf, now),
            Asked::Mailbox(Raised::Acknowledgement) => state.acknowledged(vf),
            Asked::Transmit(queue) => {
                if self.pace == Pace::AtOnce {
                    while state.transmit(vf, queue) > 0 {}
                }
            }
        }
        state.timers(now);
    }

    /// The tail of a queue that is on goes straight to its bell; any other takes the long way, which notes the mistake.
    fn ring_bell(&self, vf: usize, offset: u32, value: u32) -> bool {
        use std::sync::atomic::Ordering::{Relaxed, Release};
        let Some((transmits, queue, TAIL)) = queue_register(offset) else {
            return false;
        };
        let bells = &self.bells[vf];
        let on = bells.enabled(transmits, queue).load(Relaxed);
        if on {
            bells.tail(transmits, queue).store(value, Release);
        }
        on
    }

    /// Function-level reset, as configuration space or the host asks for it.
    pub fn reset(&self, vf: usize) {
        self.lock().reset_vf(vf);
    }

    /// Shows memory to a VF.
    pub fn map(
        &self,
        vf: usize,
        fd: impl AsFd,
        offset: u64,
        len: u64,
        iova: u64,
        writable: bool,
    ) -> std::io::Result<()> {
        let mut state = self.lock();
        let done = state.vfs[vf].dma.map(fd, offset, len, iova, writable);
        if done.is_err() {
            state.vfs[vf].report.misuse(Misuse::Map { iova, len });
        }
        done
    }

    /// Notes memory of the VF's owner that no file leads to.
    pub fn map_out_of_reach(&self, vf: usize, iova: u64, len: u64) {
        self.lock().vfs[vf].dma.map_out_of_reach(iova, len);
    }

    /// Takes memory back; false if it was not mapped like that.
    pub fn unmap(&self, vf: usize, iova: u64, len: u64) -> bool {
        let mut state = self.lock();
        let done = state.vfs[vf].dma.unmap(iova, len);
        if !done {
            state.vfs[vf].report.misuse(Misuse::Unmap { iova, len });
        }
        done
    }

    /// Takes back whatever is mapped in a range. A hypervisor whose guest changes IOMMU domains does that with the whole address
    /// space, piece by piece, whether anything is there or not; only cutting a mapping in two is wrong.
    pub fn unmap_range(&self, vf: usize, iova: u64, len: u64) {
        let mut state = self.lock();
        if state.vfs[vf].dma.cuts(iova, len) {
            state.vfs[vf].report.misuse(Misuse::Unmap { iova, len });
        } else {
            state.vfs[vf].dma.unmap(iova, len);
        }
    }

    /// Takes all memory of a VF back.
    pub fn unmap_all(&self, vf: usize) {
        self.lock().vfs[vf].dma.clear();
    }

    /// Mappings of a VF.
    pub fn mappings(&self, vf: usize) -> usize {
        self.lock().vfs[vf].dma.len()
    }

    /// Vector `vector` signals this eventfd, or nothing.
    pub fn connect_interrupt(&self, vf: usize, vector: usize, signal: Option<OwnedFd>) {
        self.lock().vfs[vf].interrupts.connect(vector, signal);
    }

    /// Interrupts sent per vector.
    pub fn interrupts(&self, vf: usize) -> [u64; VECTORS] {
        self.lock().vfs[vf].interrupts.sent
    }

    /// Moves frames: a turn of every transmit queue, and what the wire holds. Returns how many moved.
    pub fn step(&self) -> usize {
        let mut state = self.lock();
        let now = self.now(&state);
        state.timers(now);
        let mut moved = state.take_from_wire();
        for vf in 0..state.vfs.len() {
            for queue in 0..QUEUES {
                if state.vfs[vf].wants_transmit(queue) {
                    moved += state.transmit(vf, queue);
                }
            }
        }
        moved
    }

    /// Moves frames until nothing is left to do.
    pub fn settle(&self) -> usize {
        let mut moved = 0;
        loop {
            match self.step() {
                0 => return moved,
                n => moved += n,
            }
        }
    }

    /// Lets the model's own clock run; with the machine's clock, sleeps.
    pub fn advance(&self, time: Duration) {
        let own = {
            let mut state = self.lock();
            if let Some(clock) = &mut state.clock {
                *clock += time;
            }
            state.clock.is_some()
        };
        if !own {
            std::thread::sleep(time);
        }
        if self.pace == Pace::Stepped {
            self.step();
        }
        self.tick();
    }

    /// Connects the port's other end; the earlier one is unplugged.
    pub fn attach_wire(&self, wire: Wire) {
        self.lock().wire = Some(wire);
    }

    /// Takes from the wire what is there.
    pub fn poll_wire(&self) -> usize {
        self.lock().take_from_wire()
    }

    /// Looks at the clock: what waited for it happens now.
    pub fn tick(&self) {
        let mut state = self.lock();
        let now = self.now(&state);
        state.timers(now);
    }

    /// Plugs the cable in or out; every VF hears of it.
    pub fn set_cable(&self, plugged: bool) {
        let mut state = self.lock();
        state.cable = plugged;
        state.ping_all();
    }

    /// The PF's port is reset: all VFs lose their leave to send until they have reset themselves.
    pub fn reset_pf(&self, lasts: Duration) {
        let mut state = self.lock();
        let now = self.now(&state);
        state.pf.reset();
        for vf in &mut state.vfs {
            vf.mailbox.in_reset = true;
        }
        state.reset_until = Some(now + lasts);
        state.ping_all();
    }

    /// Changes what the administrator has set for a VF. Like Linux's PF, that takes the VF's leave to send where the change concerns it.
    pub fn set_policy(&self, vf: usize, change: impl FnOnce(&mut VfPolicy)) {
        let mut state = self.lock();
        change(&mut state.pf.grants[vf]);
        let spoof_check = state.pf.grants[vf].spoof_check;
        state.pf.vfs[vf].spoof_check = spoof_check;
        state.pf.forget(vf);
        state.ping(vf);
    }

    /// Changes the port's settings (what VFs have negotiated stays until they reset).
    pub fn set_port_policy(&self, change: impl FnOnce(&mut PfPolicy)) {
        change(&mut self.lock().pf.policy);
    }

    /// Makes something go wrong.
    pub fn inject(&self, vf: usize, what: Inject) {
        let mut state = self.lock();
        let entry = &mut state.vfs[vf];
        match what {
            Inject::LoseAnswers(n) => entry.injected.lose_answers = n,
            Inject::Refuse(n) => entry.injected.refuse = n,
            Inject::Delay(time) => entry.injected.delay = time,
            Inject::BusyMailbox(n) => entry.mailbox.busy = n,
            Inject::Queues(n) => entry.injected.queues = Some(n),
            Inject::NoDone(on) => entry.injected.no_done = on,
            Inject::ReceiveLength(frames, length) => entry.injected.length = (frames, length),
            Inject::NoEnd(frames) => entry.injected.no_end = frames,
            Inject::Removed(gone) => entry.injected.removed = gone,
            Inject::CountersNearWrap => {
                let near = u64::from(u32::MAX) - 1;
                entry.counters = Counters {
                    rx_frames: near,
                    rx_multicast: near,
                    tx_frames: near,
                    rx_bytes: (1 << 36) - 100,
                    tx_bytes: (1 << 36) - 100,
                };
            }
            Inject::LoseCts => {
                state.pf.forget(vf);
                state.ping(vf);
            }
        }
    }

    /// What the device counted for a VF.
    pub fn counters(&self, vf: usize) -> Counters {
        self.lock().vfs[vf].counters
    }

    /// Frames that did not make it, by reason.
    pub fn drops(&self, vf: usize) -> Drops {
        self.lock().vfs[vf].drops
    }

    /// Frames from the wire that were for no VF.
    pub fn unwanted(&self) -> u64 {
        self.lock().unwanted
    }

    /// What was seen of a VF.
    pub fn report(&self, vf: usize) -> Report {
        self.lock().vfs[vf].report.clone()
    }

    /// The mailbox's conversation since the last call.
    pub fn take_conversation(&self, vf: usize) -> Vec<Exchange> {
        std::mem::take(&mut self.lock().vfs[vf].report.conversation)
    }

    /// The PF's books about a VF.
    pub fn vf_state(&self, vf: usize) -> VfState {
        self.lock().pf.vfs[vf].clone()
    }

    pub(crate) fn note(&self, vf: usize, misuse: Misuse) {
        self.lock().vfs[vf].report.misuse(misuse);
    }
}
