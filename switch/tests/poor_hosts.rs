//! Hosts that refuse what Ringway would like to have: what then works, what does not, and who is told.

mod frontend;

use std::process::Command;

use frontend::*;
use ringway::control::state::PortState;
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter};

/// Makes these calls fail with `errno`, from here on, in this thread and all that it starts.
fn refuse(calls: &[i64], errno: i32) {
    let rules = calls.iter().map(|call| (*call, Vec::new())).collect();
    let arch = std::env::consts::ARCH.try_into().expect("known");
    let filter = SeccompFilter::new(
        rules,
        SeccompAction::Allow,
        SeccompAction::Errno(errno as u32),
        arch,
    )
    .expect("a filter");
    let program: BpfProgram = filter.try_into().expect("a program");
    seccompiler::apply_filter(&program).expect("granted");
}

/// Runs a test of this file again, alone in a process of its own.
fn on_its_own(test: &str) {
    let status = Command::new(std::env::current_exe().expect("known"))
        .args(["--exact", test, "--nocapture", "--test-threads=1"])
        .env("RINGWAY_TEST_CHILD", test)
        .status()
        .expect("ran");
    assert!(status.success(), "{status}");
}

fn is_child(test: &str) -> bool {
    std::env::var("RINGWAY_TEST_CHILD").is_ok_and(|child| child == test)
}

#[test]
fn without_kernel_aio_polling_guests_are_served_and_the_rest_is_told() {
    let test = "without_kernel_aio_polling_guests_are_served_and_the_rest_is_told";
    if !is_child(test) {
        return on_its_own(test);
    }
    refuse(&[libc::SYS_io_setup], libc::EAGAIN); // as with fs.aio-max-nr used up
    let port = Port::server();
    let (mut guest, memory) = (port.connect(), Memory::dpdk());
    dpdk_start(&mut guest, &memory, 1, DPDK_SPLIT);
    let report = port.switch.wait_state(PortState::Forwarding);
    let why = report.reason.expect("told");
    assert!(
        why.contains("guests that poll are served") && why.contains("fs.aio-max-nr"),
        "{why}"
    );
    let calls = port.switch.look(|seen| {
        let rings = seen.rings.take().expect("attached");
        rings
            .to_guest
            .into_iter()
            .filter_map(|(_, queue)| queue.into_parts().1)
            .count()
    });
    assert_eq!(calls, 0, "no descriptor is kept that nobody could signal");
    // The gate stands: what is no eventfd is refused as ever, by name.
    let port = Port::server();
    let mut guest = port.connect();
    let file = std::fs::File::open("/dev/zero").expect("a device");
    guest.ring_fd(req::SET_VRING_KICK, 0, &file.into());
    assert!(guest.hung_up_within(std::time::Duration::from_secs(5)));
    let why = port
        .switch
        .wait("a reason", |report| report.reason.is_some())
        .reason
        .expect("told");
    assert!(why.contains("no eventfd"), "{why}");
}

#[test]
fn without_userfaultfd_guests_are_served_and_shown_unarmed_and_liars_still_put_out() {
    let test = "without_userfaultfd_guests_are_served_and_shown_unarmed_and_liars_still_put_out";
    if !is_child(test) {
        return on_its_own(test);
    }
    refuse(&[libc::SYS_userfaultfd], libc::EPERM); // as Docker's default profile does
    let port = Port::server();
    let (mut guest, memory) = (port.connect(), Memory::dpdk());
    dpdk_start(&mut guest, &memory, 1, DPDK_SPLIT);
    let report = port.switch.wait_state(PortState::Forwarding);
    assert!(
        report.memory.iter().all(|region| !region.armed),
        "told by port show"
    );
    // What was shared vanishes: the handler needs no userfaultfd for that.
    memory.file.set_len(0).expect("truncated");
    let poisoned = port.switch.look(|seen| {
        let rings = seen.rings.as_mut().expect("attached");
        let (_, queue) = &mut rings.from_guest[0];
        let mut slots = ringway::dataplane::frame::Slots::new();
        let burst = ringway::dataplane::queue::RxQueue::lend(queue, &mut slots);
        assert_eq!(burst.count(), 0, "nothing was sent");
        queue.poison().is_set()
    });
    assert!(poisoned, "the ring's memory has gone");
    port.session.poisoned();
    assert!(guest.hung_up_within(std::time::Duration::from_secs(5)));
}
