//! Receive side scaling: the Toeplitz hash with the PF's key.

/// The PF's key, as words of the mailbox (little endian).
pub(crate) const KEY_WORDS: [u32; 10] = {
    let mut words = [0; 10];
    let mut at = 0;
    while at < 10 {
        words[at] = u32::from_le_bytes([
            KEY[4 * at],
            KEY[4 * at + 1],
            KEY[4 * at + 2],
            KEY[4 * at + 3],
        ]);
        at += 1;
    }
    words
};

/// The key of Microsoft's verification suite, so that its published hashes check the code.
const KEY: [u8; 40] = [
    0x6d, 0x5a, 0x56, 0xda, 0x25, 0x5b, 0x0e, 0xc2, 0x41, 0x67, 0x25, 0x3d, 0x43, 0xa3, 0x8f, 0xb0,
    0xd0, 0xca, 0x2b, 0xcb, 0xae, 0x7b, 0x30, 0xb4, 0x77, 0xcb, 0x2d, 0xa3, 0x80, 0x30, 0xf2, 0x0c,
    0x6a, 0x42, 0xb7, 0x3b, 0xbe, 0xac, 0x01, 0xfa,
];

/// The hash of addresses and ports as they stand in the packet.
pub(crate) fn toeplitz(input: &[u8]) -> u32 {
    let mut hash = 0;
    let mut window = u32::from_be_bytes([KEY[0], KEY[1], KEY[2], KEY[3]]);
    for (at, byte) in input.iter().enumerate() {
        let next = KEY.get(at + 4).copied().unwrap_or(0);
        for bit in (0..8).rev() {
            if byte >> bit & 1 == 1 {
                hash ^= window;
            }
            window = window << 1 | u32::from(next >> bit & 1);
        }
    }
    hash
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn agrees_with_the_published_vectors() {
        // Source 66.9.149.187:2794, destination 161.142.100.80:1766.
        let input = [66, 9, 149, 187, 161, 142, 100, 80, 0x0a, 0xea, 0x06, 0xe6];
        assert_eq!(toeplitz(&input[..8]), 0x323e_8fc2);
        assert_eq!(toeplitz(&input), 0x51cc_c178);
    }
}
