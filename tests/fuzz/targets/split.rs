//! A split ring with a driver that lies.
#![no_main]

mod ring;

libfuzzer_sys::fuzz_target!(|data: &[u8]| ring::lie(data, 0));
