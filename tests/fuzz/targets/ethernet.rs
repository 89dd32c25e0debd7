//! Heads of frames, read as the standard says it byte by byte; and MAC addresses as text.
#![no_main]

use ringway::dataplane::eth::{Mac, destination, is_reserved, same_stations, source};
use ringway::dataplane::frame::Head;

fn head(data: &[u8]) -> Head {
    let mut bytes = [0; 64];
    let len = data.len().min(64);
    bytes[..len].copy_from_slice(&data[..len]);
    Head(bytes)
}

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let (one, two) = data.split_at(data.len() / 2);
    let (one, two) = (head(one), head(two));
    for head in [&one, &two] {
        let (to, from) = (destination(head), source(head));
        assert_eq!(to.to_bytes(), head.0[..6]);
        assert_eq!(from.to_bytes(), head.0[6..12]);
        assert_eq!(from.is_multicast(), head.0[6] & 1 == 1);
        assert_eq!(from.is_zero(), head.0[6..12] == [0; 6]);
        let reserved = head.0[..5] == [1, 0x80, 0xc2, 0, 0] && head.0[5] < 16;
        assert_eq!(is_reserved(to), reserved);
        assert_eq!(to.to_string().parse::<Mac>(), Ok(to));
        assert_eq!(Mac::from_bytes(to.to_bytes()), to);
    }
    assert_eq!(same_stations(&one, &two), one.0[..12] == two.0[..12]);
    if let Ok(text) = std::str::from_utf8(data)
        && let Ok(mac) = text.parse::<Mac>()
    {
        assert_eq!(mac.to_string(), text.to_lowercase());
    }
});
