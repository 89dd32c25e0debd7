//! Ten thousand visits leave no descriptor behind. Alone in its process: it counts.

mod frontend;

use std::os::fd::AsFd;
use std::time::Duration;

use frontend::*;
use ringway::control::state::PortState;

#[test]
fn descriptors_are_flat_after_ten_thousand_visits() {
    let visit = |port: &Port, number: u32| {
        let mut guest = port.connect();
        match number % 100 {
            0 => {
                let memory = Memory::dpdk();
                dpdk_start(&mut guest, &memory, 1, DPDK_SPLIT);
            }
            1 => {
                let (fd, message) = (event(), Frontend::message(req::SET_VRING_KICK, 0, &[0; 8]));
                let _ = guest.raw(&message, &[fd.as_fd(); 32]);
            }
            2 => drop(guest.raw(&[1, 2, 3], &[event().as_fd()])),
            _ => {}
        }
    };
    let port = Port::server();
    visit(&port, 0);
    port.switch.wait_state(PortState::Listening);
    let before = open_fds();
    let threads = threads();
    for number in 0..10_000 {
        // Offences make the next ones wait longer and longer: they go to ports of their own.
        match number % 100 {
            1 | 2 => visit(&Port::server(), number),
            _ => visit(&port, number),
        }
    }
    port.connect().sync();
    drop(port.connect());
    for _ in 0..100 {
        if open_fds() == before && self::threads() == threads {
            return;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    assert_eq!((open_fds(), self::threads()), (before, threads));
}

fn threads() -> usize {
    std::fs::read_dir("/proc/self/task").unwrap().count()
}
