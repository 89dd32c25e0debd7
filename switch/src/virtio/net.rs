//! The header in front of every frame (virtio 1.2 §5.1.6), as far as it is used without offloads: eleven zero bytes and
//! the number of buffers.

use super::own_mem::OwnMem;

/// Bytes of `struct virtio_net_hdr_v1`.
pub const HEADER_LEN: usize = 12;
const _: () = assert!(HEADER_LEN == super::buffers::NET_HEADER as usize);

/// Where num_buffers is.
pub const NUM_BUFFERS: usize = 10;

/// The header of a frame that spreads over `buffers` receive buffers. Nothing else is ever set: no offload is
/// negotiated, and what a sender put there is not passed on.
#[inline]
pub const fn header(buffers: u16) -> [u8; HEADER_LEN] {
    let count = buffers.to_le_bytes();
    [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, count[0], count[1]]
}

/// num_buffers of the frame whose header is at guest address `at`; 0 if that is outside `mem`.
#[inline]
pub fn num_buffers(mem: &OwnMem, at: u64) -> u16 {
    let mut count = [0; 2];
    mem.read(at.wrapping_add(NUM_BUFFERS as u64), &mut count);
    u16::from_le_bytes(count)
}
