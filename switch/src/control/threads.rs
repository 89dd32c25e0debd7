//! The engine's threads: a worker on each of its processors, and the watch.

use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

use super::cpu;
use super::sandbox;
use super::state;
use super::switch::Switch;
use crate::dataplane::clock::tsc;
use crate::dataplane::counters::WorkerCounters;
use crate::dataplane::mailbox::{self, Mailbox};
use crate::dataplane::worker::{Idle, RxSlot, Shared, Worker};
use crate::port::call::Call;
use crate::port::doze::Bed;

/// How often broken attachments are looked for that no worker has told of, and the coarse clock is moved.
const WATCH: Duration = Duration::from_millis(20);
/// How long a worker that may sleep goes on polling after the last frame.
const IDLE_AFTER: Duration = Duration::from_millis(1);

/// A worker as control sees it.
pub(super) struct WorkerHandle {
    pub(super) cpu: usize,
    /// NUMA node of that CPU, where known.
    pub(super) node: Option<usize>,
    pub(super) mailbox: Mailbox,
    pub(super) counters: Arc<WorkerCounters>,
    pub(super) thread: Mutex<Option<JoinHandle<Vec<RxSlot>>>>,
}

/// When workers may sleep, in their own unit.
pub(super) fn when_idle(idle: state::Idle) -> Idle {
    match idle {
        state::Idle::Poll => Idle::Poll,
        state::Idle::Adaptive => {
            let (start, at) = (tsc(), Instant::now());
            std::thread::sleep(Duration::from_millis(5));
            let hz = tsc().wrapping_sub(start) as f64 / at.elapsed().as_secs_f64();
            Idle::Adaptive {
                after: (hz * IDLE_AFTER.as_secs_f64()) as u64,
            }
        }
    }
}

/// Starts a worker and waits until it is on its processor and has given up its system calls.
pub(super) fn spawn_worker(
    number: usize,
    cpu: usize,
    node: Option<usize>,
    shared: &Arc<Shared>,
    idle: Idle,
) -> Result<WorkerHandle> {
    let (bed, bell) = Bed::new().context("a worker cannot sleep: epoll or eventfd failed")?;
    let (mailbox, slot) = mailbox::mailbox(bell);
    let counters = Arc::<WorkerCounters>::default();
    let worker = (shared.clone(), counters.clone(), idle);
    let (told, pinned) = crossbeam::channel::bounded(1);
    let thread = std::thread::Builder::new()
        .name(format!("worker-{cpu}"))
        .spawn(move || {
            let here = cpu::pin(cpu).map_err(anyhow::Error::from);
            // On its processor, whose memory is near, and before it may ask for none.
            let worker = Worker::new(number, worker.0, worker.1, slot, worker.2, Box::new(bed));
            let here = here.and_then(|()| {
                sandbox::restrict_worker().context("a worker cannot give up its system calls")
            });
            let ready = here.is_ok();
            let _ = told.send(here);
            if !ready {
                return Vec::new();
            }
            worker.run()
        })?;
    pinned.recv().context("a worker ended at once")??;
    Ok(WorkerHandle {
        cpu,
        node,
        mailbox,
        counters,
        thread: Mutex::new(Some(thread)),
    })
}

/// What workers call the watch with. Without AIO it finds out by itself.
pub(super) fn alarm() -> Option<Arc<Call>> {
    let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
    Some(Arc::new(Call::new(event.ok()?).ok()?))
}

/// Until the alarm is raised, or for as long as the watch may sleep.
fn pause(alarm: &Call) {
    let mut polled = [PollFd::new(alarm, PollFlags::IN)];
    let _ = poll(&mut polled, Timespec::try_from(WATCH).ok().as_ref());
    let _ = rustix::io::read(alarm, &mut [0; 8]);
}

/// Starts the thread that calls [`Switch::look_after`], until the switch has stopped.
pub(super) fn spawn_watch(switch: &Arc<Switch>) -> Result<JoinHandle<()>> {
    let alarm = switch.alarm.clone();
    let switch = Arc::downgrade(switch);
    let watch = move || {
        while switch.upgrade().is_some_and(|switch| switch.look_after()) {
            match &alarm {
                Some(alarm) => pause(alarm),
                None => std::thread::sleep(WATCH),
            }
        }
    };
    Ok(std::thread::Builder::new()
        .name("watch".into())
        .spawn(watch)?)
}
