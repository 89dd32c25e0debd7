//! H21 to H30: file descriptors.

use std::io::Write as _;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use ringway::guest::messages::mem_table;
use ringway::virtio::own_mem::OwnMem;
use rustix::fs::{MemfdFlags, OFlags, memfd_create};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, PidfdFlags, Resource, Rlimit, getpid, getrlimit, pidfd_open, prlimit};

use super::case::Case;
use super::sockets::is_refused;
use super::talk::{PLAIN, event, message, pair, req, times, whole};
use super::usage::Usage;

#[test]
pub(super) fn h21_any_message_may_bring_any_number_of_descriptors_and_none_stays() -> Result<()> {
    Case::of("H21").run(|x| {
        for round in 0..3 {
            x.port_again("")?;
            let (talk, fd) = (x.connect()?, event()?);
            let request = 1 + (x.seed.wrapping_mul(3).wrapping_add(round) % 46) as u32;
            let count = x.one_of(&[1, 2, 8, 9, 32, 33, 253]);
            let size = x.one_of(&[0, 8, 40]);
            talk.bytes(&message(request, PLAIN, &vec![0; size]), &times(&fd, count))?;
            if count > 32 {
                x.is_put_out(&["descriptors"])?;
            } else if talk.say(req::GET_FEATURES, &[])? {
                // Whatever the message was: the next one is answered, or the visit is over.
                let _ = talk.hear()?;
            }
        }
        Ok(())
    })
}

#[test]
fn h22_a_switch_that_may_open_no_more_refuses_and_leaks_nothing() -> Result<()> {
    Case::of("H22").at_once(1).seeds(5).run(|x| {
        let (talk, fd) = (x.connect()?, event()?);
        talk.shake(false, 0)?;
        talk.say(req::GET_FEATURES, &[])?;
        talk.hear()?;
        let pid = Pid::from_raw(x.rig.pid as i32).context("a pid")?;
        let few = Rlimit {
            current: Some(Usage::of(x.rig.pid)?.fds as u64 + 1 + x.below(3)),
            // As the switch has it, which was started from here.
            maximum: getrlimit(Resource::Nofile).maximum,
        };
        let before = prlimit(Some(pid), Resource::Nofile, few)?;
        talk.say_with(req::SET_MEM_TABLE, &[0; 264], &times(&fd, 8))?;
        talk.wait_closed()?;
        prlimit(Some(pid), Resource::Nofile, before)?;
        x.is_put_out(&["we may open no more"])
    })
}

#[test]
pub(super) fn h23_h29_memory_that_is_no_memfd_is_refused_before_anything_touches_it() -> Result<()>
{
    Case::of("H23 H29").run(|x| {
        let talk = x.connect()?;
        talk.shake(true, 0)?;
        let memory = OwnMem::new(1 << 20, 0x1000_0000, false)?;
        let (pipe, _end) = pipe_with(PipeFlags::CLOEXEC)?;
        let on_disk = std::fs::File::options()
            .read(true)
            .write(true)
            .open("/proc/self/mem")?;
        let file = tempfile::tempfile_in(env!("CARGO_TARGET_TMPDIR"))?;
        file.set_len(1 << 20)?;
        let zero = std::fs::File::options()
            .read(true)
            .write(true)
            .open("/dev/zero")?;
        let folder = std::fs::File::open("/tmp")?;
        let event = event()?;
        let path = format!(
            "/proc/self/fd/{}",
            std::os::fd::AsRawFd::as_raw_fd(&memory.fd())
        );
        let read_only = rustix::fs::open(path, OFlags::RDONLY, rustix::fs::Mode::empty())?;
        let choices: [BorrowedFd<'_>; 8] = [
            pipe.as_fd(),
            on_disk.as_fd(),
            file.as_fd(),
            zero.as_fd(),
            folder.as_fd(),
            event.as_fd(),
            talk.stream().as_fd(),
            read_only.as_fd(),
        ];
        let fd = x.one_of(&choices);
        let table = mem_table(&[whole(&memory)]);
        let words = ["no shared memory", "not open for writing"];
        is_refused(x, &talk, (req::SET_MEM_TABLE, &table), &[fd], &words)
    })
}

#[test]
pub(super) fn h25_a_call_descriptor_filled_to_the_brim_blocks_nobody() -> Result<()> {
    Case::of("H25").run(|x| {
        let mut wild = x.attach(x.options())?;
        wild.announce(x)?;
        wild.queues.rx.arm();
        let call = wild.queues.rx.call().as_fd().try_clone_to_owned()?;
        let block = |on: bool| -> Result<()> {
            let flags = rustix::fs::fcntl_getfl(&call)?;
            let flags = if on {
                flags - OFlags::NONBLOCK
            } else {
                flags | OFlags::NONBLOCK
            };
            Ok(rustix::fs::fcntl_setfl(&call, flags)?)
        };
        rustix::io::write(&call, &(u64::MAX - 1).to_ne_bytes())?;
        for round in 0..30 {
            block(round % 2 == 0)?;
            x.gets_frames(8, 60)?;
        }
        x.innocents_go_on()?;
        x.is_kept()?;
        // Full as it is: reading it once must find what was written, and not hang the honest.
        rustix::io::read(&call, &mut [0; 8])?;
        Ok(())
    })
}

/// A descriptor that is no eventfd; the others keep it as it must be.
fn no_eventfd(choice: u64) -> Result<(OwnedFd, Vec<OwnedFd>)> {
    let flags = PipeFlags::CLOEXEC | PipeFlags::NONBLOCK;
    Ok(match choice {
        0 => {
            let (out, into) = pipe_with(flags)?;
            while rustix::io::write(&into, &[0; 4096]).is_ok() {}
            (into, vec![out])
        }
        1 => {
            let (ours, theirs) = UnixStream::pair()?;
            ours.set_nonblocking(true)?;
            while (&ours).write(&[0; 4096]).is_ok() {}
            (ours.into(), vec![theirs.into()])
        }
        2 => (tempfile::tempfile()?.into(), vec![]),
        3 => {
            let epoll = rustix::event::epoll::create(rustix::event::epoll::CreateFlags::CLOEXEC)?;
            (epoll, vec![])
        }
        4 => (
            std::fs::File::options()
                .write(true)
                .open("/dev/zero")?
                .into(),
            vec![],
        ),
        5 => (pidfd_open(getpid(), PidfdFlags::empty())?, vec![]),
        6 => (memfd_create("ring", MemfdFlags::CLOEXEC)?, vec![]),
        _ => (std::fs::File::open("/proc/self/status")?.into(), vec![]),
    })
}

#[test]
pub(super) fn h26_what_is_no_eventfd_is_refused_as_kick_and_as_call() -> Result<()> {
    Case::of("H26").run(|x| {
        let wild = x.attach(x.options())?;
        let talk = wild.talk()?;
        let (fd, _rest) = no_eventfd(x.below(8))?;
        let request = x.one_of(&[req::SET_VRING_CALL, req::SET_VRING_KICK]);
        let payload = pair(x.below(2) as u32, 0);
        is_refused(
            x,
            &talk,
            (request, &payload),
            &[fd.as_fd()],
            &["no eventfd"],
        )
    })
}

#[test]
pub(super) fn h27_kicks_without_end_cost_the_others_nothing() -> Result<()> {
    Case::of("H27").run(|x| {
        let mut wild = x.attach(x.options())?;
        wild.announce(x)?;
        let end = Instant::now() + Duration::from_millis(30);
        while Instant::now() < end {
            wild.queues.tx.kick_anyway();
        }
        x.innocents_go_on()?;
        x.is_kept()
    })
}

#[test]
pub(super) fn h28_kick_and_call_may_be_missing_or_replaced_at_any_time() -> Result<()> {
    Case::of("H28").run(|x| {
        let mut wild = x.attach(x.options())?;
        let talk = wild.talk()?;
        for _ in 0..20 {
            let request = x.one_of(&[req::SET_VRING_CALL, req::SET_VRING_KICK]);
            let ring = x.below(2) as u32;
            if x.below(2) == 0 {
                // Bit 8: there is none.
                talk.say(request, &pair(ring | 0x100, 0))?;
            } else {
                talk.say_with(request, &pair(ring, 0), &[event()?.as_fd()])?;
            }
        }
        talk.say(req::GET_FEATURES, &[])?;
        ensure!(talk.hear()?.is_some(), "put out");
        wild.announce(x)?;
        x.is_kept()
    })
}

#[test]
pub(super) fn h30_nested_graphs_of_sockets_are_closed_by_nobody_but_the_ports_own_thread()
-> Result<()> {
    Case::of("H30").run(|x| {
        let talk = x.connect()?;
        talk.shake(false, 0)?;
        // Each pair carries the one before, unread: a chain that the kernel takes apart when the last one is closed.
        let mut carried: OwnedFd = event()?;
        for _ in 0..4 + x.below(20) {
            let (keep, into) = UnixStream::pair()?;
            let carrier = super::talk::Talk::over(&into)?;
            carrier.bytes(&[0], &[carried.as_fd(), keep.as_fd()])?;
            carried = keep.into();
        }
        talk.say_with(req::SET_VRING_CALL, &pair(0, 0), &[carried.as_fd()])?;
        drop(carried);
        x.is_put_out(&["no eventfd"])?;
        x.innocents_go_on()
    })
}
