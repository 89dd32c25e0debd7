//! Frames of this generator: addresses, EtherType, sequence number, stamp.

use super::mac;
use super::socket::ETHERTYPE;

/// Bytes of all that has a meaning.
pub(crate) const HEAD: usize = 30;

/// Makes this a frame from one container to another.
pub(crate) fn write(frame: &mut [u8], from: usize, to: usize) {
    frame[..6].copy_from_slice(&mac(to));
    frame[6..12].copy_from_slice(&mac(from));
    frame[12..14].copy_from_slice(&ETHERTYPE.to_be_bytes());
}

/// Makes this a frame from one container to all.
pub(crate) fn write_to_all(frame: &mut [u8], from: usize) {
    write(frame, from, from);
    frame[..6].fill(0xff);
}

/// Whether it is addressed to this container alone.
pub(crate) fn is_to(frame: &[u8], container: usize) -> bool {
    frame.starts_with(&mac(container))
}

/// Sends it back.
pub(crate) fn turn_round(frame: &mut [u8]) {
    if let Some((to, rest)) = frame.split_first_chunk_mut::<6>()
        && let Some((from, _)) = rest.split_first_chunk_mut::<6>()
    {
        std::mem::swap(to, from);
    }
}

/// Another station behind the same container.
pub(crate) fn set_station(frame: &mut [u8], station: u32) {
    frame[6..8].copy_from_slice(&[2, 1]);
    frame[8..12].copy_from_slice(&station.to_be_bytes());
}

/// Numbers and stamps it.
pub(crate) fn stamp(frame: &mut [u8], sequence: u64, tsc: u64) {
    frame[14..22].copy_from_slice(&sequence.to_le_bytes());
    frame[22..HEAD].copy_from_slice(&tsc.to_le_bytes());
}

/// Number and stamp; none in a frame that is too short.
pub(crate) fn read(frame: &[u8]) -> Option<(u64, u64)> {
    let word = |at| Some(u64::from_le_bytes(*frame.get(at..)?.first_chunk()?));
    Some((word(14)?, word(22)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_that_turns_round_goes_back_with_its_number_and_stamp() {
        let mut frame = [0; 64];
        write(&mut frame, 0, 1);
        stamp(&mut frame, 7, 99);
        let there = frame;
        turn_round(&mut frame);
        assert_eq!((&frame[..6], &frame[6..12]), (&there[6..12], &there[..6]));
        assert_eq!(read(&frame), Some((7, 99)));
        turn_round(&mut frame);
        assert_eq!(frame, there);
        assert_eq!(read(&frame[..29]), None);
    }
}
