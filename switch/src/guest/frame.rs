//! Frames as a guest sees them: a [`Slot`] to fill before sending, a [`Frame`] lent by the receive ring.
//!
//! An island of `unsafe`: bytes in memory shared with the switch, through raw pointers only.
#![allow(unsafe_code)]

use std::ffi::c_void;
use std::marker::PhantomData;
use std::ptr;

/// A part of a frame in shared memory.
#[derive(Clone, Copy, Debug)]
pub(super) struct Part {
    pub(super) at: *const u8,
    pub(super) len: usize,
}

// SAFETY: a plain address; whoever reads there has shown that it may (`Frame::new`).
unsafe impl Send for Part {}

/// A transmit buffer of the guest's own: what was written to it stays there, so a frame can be sent again as it is.
pub struct Slot<'a> {
    at: *mut u8,
    room: usize,
    index: u16,
    len: usize,
    life: PhantomData<&'a mut u8>,
}

impl Slot<'_> {
    /// # Safety
    /// `room` bytes at `at`, which is 8-aligned, can be written while the slot lives, and nobody else writes them.
    pub(super) unsafe fn new(at: *mut u8, room: usize, index: u16, len: usize) -> Self {
        Slot {
            at,
            room,
            index,
            len,
            life: PhantomData,
        }
    }

    /// Which buffer of the ring this is.
    pub fn index(&self) -> u16 {
        self.index
    }

    /// Length of the frame last sent from here; 0 for none yet.
    pub fn sent_len(&self) -> usize {
        self.len
    }

    /// Bytes a frame may have.
    pub fn room(&self) -> usize {
        self.room
    }

    /// Writes bytes.
    ///
    /// # Panics
    /// If they do not fit.
    pub fn write(&mut self, offset: usize, bytes: &[u8]) {
        assert!(
            offset <= self.room && bytes.len() <= self.room - offset,
            "beyond the buffer"
        );
        // SAFETY: inside the `room` bytes promised to `new`, just checked.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), self.at.add(offset), bytes.len()) };
    }

    /// Writes a word, little end first.
    ///
    /// # Panics
    /// If it does not fit.
    #[inline]
    pub fn put(&mut self, offset: usize, word: u64) {
        assert!(offset + 8 <= self.room, "beyond the buffer");
        // SAFETY: inside the `room` bytes promised to `new`, just checked.
        unsafe {
            self.at
                .add(offset)
                .cast::<u64>()
                .write_unaligned(word.to_le())
        };
    }
}

/// A received frame: lent until the burst it came in is over.
pub struct Frame<'a> {
    first: Part,
    more: &'a [Part],
    len: usize,
}

impl<'a> Frame<'a> {
    /// # Safety
    /// All parts can be read during `'a`.
    #[inline]
    pub(super) unsafe fn new(first: Part, more: &'a [Part]) -> Frame<'a> {
        let len = first.len + more.iter().map(|part| part.len).sum::<usize>();
        Frame { first, more, len }
    }

    /// Bytes.
    #[inline]
    pub fn len(&self) -> usize {
        self.len
    }

    /// True for a frame of no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Buffers it came in.
    pub fn parts(&self) -> usize {
        1 + self.more.len()
    }

    /// Its first `N` words, little end first; each byte is read once.
    #[inline]
    pub fn words<const N: usize>(&self) -> Option<[u64; N]> {
        let mut words = [0; N];
        if self.first.len >= 8 * N {
            for (index, word) in words.iter_mut().enumerate() {
                // SAFETY: 8·N bytes of the first part can be read (`new`).
                let at = unsafe { self.first.at.add(8 * index) }.cast::<Word>();
                // SAFETY: as above; volatile: the switch may write here, so read once.
                *word = u64::from_le_bytes(unsafe { at.read_volatile() }.0);
            }
            return Some(words);
        }
        self.words_in_parts()
    }

    #[cold]
    fn words_in_parts<const N: usize>(&self) -> Option<[u64; N]> {
        let mut words = [0; N];
        for (index, word) in words.iter_mut().enumerate() {
            let mut bytes = [0; 8];
            if self.copy(8 * index, &mut bytes) < 8 {
                return None;
            }
            *word = u64::from_le_bytes(bytes);
        }
        Some(words)
    }

    /// Copies bytes from `offset` on; returns how many there were.
    pub fn copy(&self, offset: usize, into: &mut [u8]) -> usize {
        let mut done = 0;
        for part in self.parts_from(offset) {
            let len = part.len.min(into.len() - done);
            // SAFETY: `len` bytes of the part can be read (`new`), and so many are left in `into`.
            unsafe { ptr::copy_nonoverlapping(part.at, into[done..].as_mut_ptr(), len) };
            done += len;
        }
        done
    }

    /// True if the bytes from `offset` on are these, and there are no more.
    pub fn matches(&self, offset: usize, bytes: &[u8]) -> bool {
        if offset + bytes.len() != self.len {
            return false;
        }
        let mut left = bytes;
        self.parts_from(offset).all(|part| {
            let (these, rest) = left.split_at(part.len);
            left = rest;
            // SAFETY: `len` bytes of the part can be read (`new`), and `these` has as many; memcmp forms no reference.
            unsafe { libc::memcmp(part.at.cast::<c_void>(), these.as_ptr().cast(), part.len) == 0 }
        })
    }

    /// The frame's bytes in a vector: for tests, not for speed.
    pub fn to_vec(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.len];
        self.copy(0, &mut bytes);
        bytes
    }

    fn parts_from(&self, offset: usize) -> impl Iterator<Item = Part> {
        let mut skip = offset;
        std::iter::once(self.first)
            .chain(self.more.iter().copied())
            .filter_map(move |part| {
                let step = skip.min(part.len);
                skip -= step;
                let rest = Part {
                    at: part.at.wrapping_add(step),
                    len: part.len - step,
                };
                (rest.len > 0).then_some(rest)
            })
    }
}

/// Eight bytes at any address.
#[derive(Clone, Copy)]
#[repr(C, packed)]
struct Word([u8; 8]);

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use std::cell::UnsafeCell;

    /// A frame in ordinary memory, for tests of what is done with frames.
    pub(crate) struct Bytes {
        memory: Box<[UnsafeCell<u8>]>,
        parts: Vec<Part>,
    }

    impl Bytes {
        pub(crate) fn new(len: usize) -> Bytes {
            Bytes {
                memory: (0..len).map(|_| UnsafeCell::new(0)).collect(),
                parts: Vec::new(),
            }
        }

        fn at(&self, offset: usize) -> *mut u8 {
            self.memory
                .as_ptr()
                .wrapping_add(offset)
                .cast::<u8>()
                .cast_mut()
        }

        pub(crate) fn slot(&mut self) -> Slot<'_> {
            // SAFETY: the slot borrows the memory mutably.
            unsafe { Slot::new(self.at(0), self.memory.len(), 0, 0) }
        }

        pub(crate) fn frame(&self) -> Frame<'_> {
            // SAFETY: the frame borrows the memory.
            unsafe {
                Frame::new(
                    Part {
                        at: self.at(0),
                        len: self.memory.len(),
                    },
                    &[],
                )
            }
        }

        pub(crate) fn short(&self, len: usize) -> Frame<'_> {
            // SAFETY: the frame borrows the memory, which has more than `len` bytes.
            unsafe {
                Frame::new(
                    Part {
                        at: self.at(0),
                        len,
                    },
                    &[],
                )
            }
        }

        pub(crate) fn cut(&mut self, cuts: &[usize]) -> Frame<'_> {
            let ends: Vec<usize> = cuts.iter().copied().chain([self.memory.len()]).collect();
            self.parts = std::iter::once(0)
                .chain(cuts.iter().copied())
                .zip(ends)
                .map(|(from, to)| Part {
                    at: self.at(from),
                    len: to - from,
                })
                .collect();
            // SAFETY: the frame borrows the memory.
            unsafe { Frame::new(self.parts[0], &self.parts[1..]) }
        }

        pub(crate) fn flip(&self, at: usize) {
            // SAFETY: one thread, and no reference to the byte.
            unsafe { *self.at(at) ^= 0x10 };
        }
    }

    #[test]
    fn a_frame_reads_the_same_however_it_is_cut() {
        let mut bytes = Bytes::new(50);
        let data: Vec<u8> = (0..50).map(|i| i * 5 + 1).collect();
        bytes.slot().write(0, &data);
        let words = bytes.frame().words::<4>();
        for cuts in [&[1][..], &[7, 8, 31], &[40], &[10, 20, 30, 40]] {
            let frame = bytes.cut(cuts);
            assert_eq!(frame.to_vec(), data);
            assert_eq!(frame.words::<4>(), words);
            assert!(frame.matches(13, &data[13..]));
            assert!(!frame.matches(13, &data[13..49]));
            assert!(!frame.matches(12, &data[13..]));
            assert_eq!(frame.words::<7>(), None);
        }
    }

    #[test]
    #[should_panic(expected = "beyond the buffer")]
    fn a_slot_is_never_written_beyond_its_end() {
        Bytes::new(50).slot().put(43, 0);
    }
}
