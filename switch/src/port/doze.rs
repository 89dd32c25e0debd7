//! How a worker sleeps: on the kick descriptors of its guests and on its mailbox.
//!
//! A kick descriptor is watched edge-triggered and never read: a guest that kicks without end, or fills its eventfd, wakes
//! the worker once per sleep at most.
#![allow(unsafe_code)]

use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use rustix::event::{EventfdFlags, Timespec, epoll, eventfd};

use crate::dataplane::mailbox::Wake;
use crate::dataplane::queue::RxQueue;
use crate::dataplane::worker::Doze;

/// How long a processor is left asleep in one piece. One that sleeps long sleeps deep, that of a virtual machine above all: by turning
/// over like this it is awake some 30 µs sooner, for 1 % of its time (`bench/README.md`).
const NAP: Duration = Duration::from_millis(3);

/// A worker's bed.
pub struct Bed {
    epoll: Arc<OwnedFd>,
    bell: Arc<Bell>,
}

/// Wakes the worker that sleeps in a [`Bed`]. Outlives it: a worker that ends closes nothing.
pub struct Bell {
    event: OwnedFd,
    _epoll: Arc<OwnedFd>,
}

impl Bed {
    /// A bed, and the bell that wakes whoever sleeps in it.
    pub fn new() -> std::io::Result<(Bed, Arc<Bell>)> {
        let epoll = Arc::new(epoll::create(epoll::CreateFlags::CLOEXEC)?);
        let bell = Arc::new(Bell {
            event: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            _epoll: epoll.clone(),
        });
        epoll::add(
            &epoll,
            &bell.event,
            epoll::EventData::new_u64(1),
            epoll::EventFlags::IN,
        )?;
        Ok((
            Bed {
                epoll,
                bell: bell.clone(),
            },
            bell,
        ))
    }
}

impl Wake for Bell {
    fn wake(&self) {
        let _ = rustix::io::write(&self.event, &1u64.to_ne_bytes());
    }
}

fn wake_fd(queue: &dyn RxQueue) -> Option<BorrowedFd<'_>> {
    let fd = queue.wake_fd().filter(|fd| *fd >= 0)?;
    // SAFETY: the queue owns the descriptor and is borrowed for as long as the result lives; it is not -1.
    Some(unsafe { BorrowedFd::borrow_raw(fd) })
}

impl Doze for Bed {
    fn watch(&mut self, queue: &dyn RxQueue) {
        if let Some(fd) = wake_fd(queue) {
            // One process may use the same eventfd for two rings: watched once is enough.
            let _ = epoll::add(
                &self.epoll,
                fd,
                epoll::EventData::new_u64(0),
                epoll::EventFlags::IN | epoll::EventFlags::ET,
            );
        }
    }

    fn unwatch(&mut self, queue: &dyn RxQueue) {
        if let Some(fd) = wake_fd(queue) {
            let _ = epoll::delete(&self.epoll, fd);
        }
    }

    fn sleep(&mut self, most: Duration) {
        let timeout = Timespec {
            tv_sec: 0,
            tv_nsec: i64::from(NAP.subsec_nanos()),
        };
        let nothing = epoll::Event {
            flags: epoll::EventFlags::empty(),
            data: epoll::EventData::new_u64(0),
        };
        let mut events = [nothing; 4];
        for _ in 0..most.as_nanos().div_ceil(NAP.as_nanos()) {
            if epoll::wait(&self.epoll, &mut events, Some(&timeout)) != Ok(0) {
                break;
            }
        }
        let _ = rustix::io::read(&self.bell.event, &mut [0u8; 8]);
    }
}
