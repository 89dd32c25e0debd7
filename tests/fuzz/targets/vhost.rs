//! A guest's whole visit: messages, descriptors, memory that changes and goes, turns of its rings in between.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| ringway::control::fuzz::visit(data));
