//! Ringway: a poll-mode vhost-user L2 switch for containers.
//!
//! # Three nouns
//!
//! - A **frame** is *lent* by the queue that received it: some pieces of somebody else's memory and a length
//!   ([`dataplane::frame`]). When its burst is given back, its buffers return to their owner: no packet pool, no
//!   reference counts.
//! - A **queue** lends a burst and takes it back ([`dataplane::queue::RxQueue`]), or copies picked frames of a burst out
//!   ([`dataplane::queue::TxQueue`]). A port is one or more of each.
//! - A **worker** is a thread pinned to a core that takes its queues in turns ([`dataplane::worker`], start there): no
//!   allocation, no logs, no locks that wait, no system calls except the call of a guest that asked for one.
//!
//! # The map
//!
//! | module | what it is | may name |
//! |---|---|---|
//! | [`dataplane`] | the fast half: worker, forwarding database, counters | – |
//! | [`virtio`] | rings in foreign memory, and that memory; knows no frames | – |
//! | [`port`] | where frames enter and leave: rings as queues | `dataplane`, `virtio` |
//! | [`control`] | the slow half: configuration, sessions, API; never touches a frame | `port`, `dataplane`, `virtio` |
//! | [`guest`] | the other side: a vhost-user frontend, for the demo, tests and benchmarks | `virtio` |
//! | [`cli`] | the subcommands | all |
//!
//! The planes meet in [`dataplane::mailbox`]: control builds complete queues and pictures of the topology and moves them to
//! the workers; a worker looks for mail between passes; what it gives up moves back and is unmapped, closed and freed by
//! control. `tests/tests/tidy.rs` keeps these directions.
//!
//! A packet's way: `port/vhost.rs` lends it, `dataplane/worker.rs` decides, `port/vhost.rs` copies it out; one level deeper,
//! `virtio/`. To add a port type: (1) `port/<type>.rs` implements [`dataplane::queue::RxQueue`] and
//! [`port::shared::Sender`]; (2) its keys in `control/spec.rs` and `configs/all-options.toml`; (3) a handshake, if any, in
//! `control/<type>.rs`; (4) a test like `switch/tests/worker_turns.rs`. `dataplane/` does not change.
//!
//! # Decisions, and the measurements they rest on
//!
//! Cycles are TSC cycles (2.6 GHz) per frame of the switch on a two-core AMD virtual machine; single levers were measured on a
//! prototype of this fast path with an in-process guest, repeats within ±4 %. Figures of the whole: `bench/README.md`.
//!
//! 1. **Own ring code**, raw pointers behind a small checked core ([`virtio::ring`]), not the `virtio-queue` crate: 6.6–7.4 ns
//!    per forwarded 64-byte frame against 50–115 ns with `virtio-queue` and `vm-memory`, with the same checks. That crate is
//!    the oracle of the property tests.
//! 2. **The `vhost` crate for messages**, one thread per port, with a thin filter in front for what it drops although real
//!    frontends send it: QEMU's early SET_VRING_ENABLE, SET/GET_STATUS, SEND_RARP, NET_SET_MTU ([`control::vhost_filter`]).
//! 3. **Every address is checked** against the port's memory before use, always: with a last-region cache 52 against 46–49
//!    cycles, inside the noise.
//! 4. **Prefetch in two stages**, the descriptors of a whole burst, then the buffers: 69 → 47 cycles, the largest single lever.
//!    Each buffer as soon as its descriptor is read, not after all of them: 61 → 54 on another machine. Packed descriptors are
//!    never prefetched beyond the one known to be available: it steals the line that the driver is writing (168 against 102 cycles).
//! 5. **The sender's virtio-net header is not read** while no offload is negotiated: one more line is 11 cycles.
//! 6. **Bursts of 64**, one index store per burst, IN_ORDER offered: a transmit burst completes with one used element (−5
//!    cycles). Batches of 16 / 32 / 64 / 128 took 71 / 59 / 47 / 48 cycles.
//! 7. **A driver that polls misses some used buffers** of a split ring of 512 and more while it sends, 32 to 127 of them
//!    ([`virtio::ring::Ring::complete_lazily`]). DPDK's takes them back only when it has no others, or when all but 32 are used:
//!    then a thousand at once, which its pool gives out again when they lie in nobody's cache. Now it takes one for each that it
//!    sends: 64 B, near, 19.2 → 24.3 Mpps, 133 → 104 cycles of the client's; far 8.3 → 10.0. Frames of 1518 bytes, far: 5.0 → 4.3; see 8.
//! 8. **What was checked is what is delivered**: the first 64 bytes of a frame are read once into private memory; verdicts rest
//!    on the copy, and the copy is what the receiver gets, whatever the sender does to its buffer meanwhile.
//!    A long frame's lines are copied in an order that no prefetcher takes for a way: they run on beyond its ends, into other
//!    buffers of the pool, which are their owner's. 1518 bytes, far, the same client: 4.1 → 7.1 Mpps.
//! 9. **Idle queues are polled every 64th pass**: 256 idle ports polled always cost −70 %. **A packed ring rests for 0.6 µs** after part
//!    of a burst, for its driver is writing the rest: far, 12 → 14 Mpps.
//! 10. **Ownership is the lock**: a guest's transmit ring is moved to one worker and moved back. Its receive ring is fed by every
//!     worker, under a try-lock per burst ([`port::shared`]); nobody waits through somebody else's page fault.
//! 11. **One forwarding database** for all workers, read without locks, learnt from the packet path ([`dataplane::fdb`]). An
//!     entry carries its port's generation: a port number that has a new owner never gets frames for the old one.
//! 12. **A gate for every descriptor** a peer sends before anything touches it, own mappings armed with userfaultfd where the
//!     kernel has it, and a SIGBUS handler that puts zero pages under what a peer took away: a container that truncates its
//!     memory loses its own port and nobody else notices ([`virtio::guest_mem`], [`virtio::guest_fault`]).
//! 13. **A worker never writes to a peer's descriptor in a way that can block**: a full eventfd stops others ([`port::call`]).
//! 14. **The books balance**: over all ports, and for each worker, Σ received + Σ replicated = Σ sent + Σ dropped by named
//!     reason ([`dataplane::counters`]); every test checks it.
//! 15. **No host preparation**: memfd memory, no hugepages, no root; those only make it faster. `ringway doctor` says what would.
//! 16. **Everything a port needs to go on is plain data** ([`control::port_state`]), so that ports can later outlive the process.
//! 17. **The process gives up what it does not need** before its first thread starts: capabilities, files, system calls
//!     ([`control::sandbox`]). The one call of a worker under load, io_submit, is allowed whatever its arguments, so that the
//!     kernel answers from a bitmap and runs no filter.
//!
//! # Deliberately absent
//!
//! OpenFlow, OVSDB, conntrack, L3 routing, a packet pool, plugins, cargo features for options, async in the data plane,
//! vIOMMU, post-copy, dirty logging and live migration.

pub mod cli;
pub mod control;
pub mod dataplane;
pub mod guest;
pub mod port;
pub mod virtio;
