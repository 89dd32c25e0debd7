//! Nanoseconds to call a guest, against the `write(2)` that could block: `cargo bench --bench call`.

use std::time::Instant;

use ringway::port::call::Call;
use rustix::event::{EventfdFlags, eventfd};

const CALLS: u32 = 200_000;

fn main() {
    let event = eventfd(0, EventfdFlags::CLOEXEC).expect("an eventfd");
    let same = event.try_clone().expect("a second descriptor");
    let call = Call::new(event).expect("kernel AIO");
    for _ in 0..3 {
        let time = |what: &str, act: &dyn Fn()| {
            let start = Instant::now();
            (0..CALLS).for_each(|_| act());
            let each = start.elapsed().as_nanos() / u128::from(CALLS);
            println!("{what:<14} {each:>5} ns");
        };
        time("write(2)", &|| {
            assert_eq!(rustix::io::write(&same, &1u64.to_ne_bytes()), Ok(8));
        });
        time("Call::signal", &|| call.signal());
    }
}
