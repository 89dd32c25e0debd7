//! Hostile peers: whatever a container does to its socket, its descriptors, its memory and its rings costs its own port alone.
//!
//! One test per case of the catalogue in `tests/README.md`, named after its number. Each starts a switch of its own (the real
//! program) with two innocent pairs under load, lets an attacker loose on a fresh port for each of 20 seeds, and then asks:
//! did the innocents lose a frame, does the attacker's port say what was wrong, does an honest guest get it afterwards, do the
//! books balance, and has the switch the descriptors, mappings, threads and memory it had before?
//!
//! `HOSTILE_SEEDS` and `HOSTILE_FIRST_SEED` choose other seeds; a failure names the one it needs.

mod hostile {
    mod api;
    mod case;
    mod descriptors;
    mod frames;
    mod headers;
    mod innocents;
    mod lifecycle;
    mod memory;
    mod promises;
    mod quiet;
    mod restart;
    mod rig;
    mod rings;
    mod soak;
    mod sockets;
    mod talk;
    mod usage;
    mod x;
}
