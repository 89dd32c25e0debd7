//! Frames lent by a queue: whose bytes they are, which of them were copied, and how they are copied out.
//!
//! The first [`HEAD_LEN`] bytes of each frame are read once, when it is lent, into a private [`Head`]. Verdicts rest on that
//! head, and the head is what the receiver gets in front of the sender's remaining bytes: what was checked is what is
//! delivered, however the sender rewrites its buffer meanwhile.
//!
//! An island of `unsafe`: frames point into memory that belongs to somebody else and may change at any time, so they are
//! raw pointers, never references.
#![allow(unsafe_code)]

use std::marker::PhantomData;
use std::ptr;
use std::sync::atomic::{
    AtomicBool,
    Ordering::{Acquire, SeqCst},
    compiler_fence,
};

use super::counters::Reason;

/// Frames per burst: a burst is a 64-bit set. More measured no gain (47, 48, 48 cycles per frame at 64, 128, 256).
pub const BURST_MAX: usize = 64;
/// Bytes of a frame that are copied before anything is decided: one cache line, a whole minimum frame.
pub const HEAD_LEN: usize = 64;
/// Bytes behind the head from which a frame is long (see [`copy_long`]); more than three lines.
const LONG: usize = 1024;
/// Lines at each end of a long frame that are not copied one after the other; even.
const OUTER: usize = 12;
/// Longest frame in bytes without FCS: a 65,535-byte packet behind an Ethernet header and two VLAN tags.
pub const FRAME_MAX: u32 = 65_535 + 14 + 8;
/// Pieces of the sender's memory that one frame may consist of: 64 KiB in 2 KiB buffers, and its header.
pub const SEGMENTS_MAX: usize = 40;
/// Further pieces a whole burst may hold; a burst ends early at a frame that does not fit any more.
pub const SPILL_MAX: usize = 16 * SEGMENTS_MAX;

/// A frame's first bytes, private; zero beyond the frame's length.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub struct Head(pub [u8; HEAD_LEN]);

/// One piece of a sender's memory.
#[derive(Clone, Copy)]
pub struct Segment {
    /// Its first byte.
    pub at: *const u8,
    /// Its length in bytes.
    pub len: u32,
}

/// Where the bytes of one lent frame are.
#[derive(Clone, Copy)]
struct Frame {
    /// First byte of the frame in the sender's memory.
    at: *const u8,
    /// Bytes of the whole frame; 0 for a frame that carries a fault instead.
    len: u32,
    /// Bytes at `at`; less than `len` if the frame has further pieces: see [`Odd`].
    first: u32,
}

const NOTHING: Frame = Frame {
    at: ptr::null(),
    len: 0,
    first: 0,
};

/// What there is to a frame with a fault, or with further pieces.
#[derive(Clone, Copy)]
struct Odd {
    /// The further pieces: `spill[from..from + pieces]`.
    from: u16,
    pieces: u16,
    /// Why the queue says that this frame must be dropped.
    fault: Option<Reason>,
}

/// The storage of a burst: one per worker, used again by every turn.
pub struct Slots {
    heads: [Head; BURST_MAX],
    frames: [Frame; BURST_MAX],
    /// Means something for frames with a fault or with further pieces.
    odd: [Odd; BURST_MAX],
    spill: [Segment; SPILL_MAX],
    count: usize,
    spilled: usize,
    /// The processor moves a whole line at once.
    lines: bool,
}

// SAFETY: the pointers are valid only while a `Burst` lives, which borrows the `Slots`; between bursts they are never followed.
unsafe impl Send for Slots {}

impl Slots {
    /// Empty slots, on the heap: they take some 20 KiB.
    pub fn new() -> Box<Slots> {
        Box::new(Slots {
            heads: [Head([0; HEAD_LEN]); BURST_MAX],
            frames: [NOTHING; BURST_MAX],
            odd: [Odd {
                from: 0,
                pieces: 0,
                fault: None,
            }; BURST_MAX],
            spill: [Segment {
                at: ptr::null(),
                len: 0,
            }; SPILL_MAX],
            count: 0,
            spilled: 0,
            lines: moves_lines(),
        })
    }

    /// Forgets the last burst's frames.
    #[inline]
    pub fn clear(&mut self) {
        self.count = 0;
        self.spilled = 0;
    }

    /// Frames pushed so far.
    #[inline]
    pub fn count(&self) -> usize {
        self.count
    }

    /// Lends a frame that lies in one piece. `readable` bytes at `at` can be read; no less than `len`.
    ///
    /// # Safety
    /// `readable >= len > 0` bytes at `at` stay mapped until the burst's borrow ends, and fewer than [`BURST_MAX`] frames were pushed.
    #[inline]
    pub unsafe fn push(&mut self, at: *const u8, len: u32, readable: u32) {
        // SAFETY: passed on; the frames before were pushed.
        unsafe {
            self.put(self.count, at, len, readable);
            self.set_count(self.count + 1);
        }
    }

    /// Says how many frames are lent.
    ///
    /// # Safety
    /// Each of them was pushed, or put, since [`Slots::clear`].
    #[inline]
    pub unsafe fn set_count(&mut self, count: usize) {
        debug_assert!(count <= BURST_MAX);
        self.count = count;
    }

    /// Writes frame number `index`, for [`Slots::set_count`] to lend with those before it: a queue that keeps the count in a register
    /// saves two moves a frame.
    ///
    /// # Safety
    /// As for [`Slots::push`], and `index` is below [`BURST_MAX`].
    #[inline]
    pub unsafe fn put(&mut self, index: usize, at: *const u8, len: u32, readable: u32) {
        debug_assert!(index < BURST_MAX && readable >= len && len > 0);
        // SAFETY: `index < BURST_MAX` is the caller's promise.
        let (head, frame) = unsafe {
            (
                self.heads.get_unchecked_mut(index),
                self.frames.get_unchecked_mut(index),
            )
        };
        if readable >= HEAD_LEN as u32 {
            // SAFETY: HEAD_LEN bytes can be read at `at` (just checked against the caller's promise); `lines` says that AVX-512 is there.
            unsafe {
                if self.lines {
                    move_line(at, head.0.as_mut_ptr());
                } else {
                    head.fill_once(at);
                }
            }
        } else {
            head.0 = [0; HEAD_LEN];
            // SAFETY: `len <= readable < HEAD_LEN`, and the caller promised `len` readable bytes.
            unsafe { copy_once(at, head.0.as_mut_ptr(), len as usize) };
        }
        *frame = Frame {
            at,
            len,
            first: len,
        };
    }

    /// Lends a frame in several pieces; false (and nothing is lent) if the burst has no room for the pieces any more.
    ///
    /// # Safety
    /// Every piece stays mapped until the burst's borrow ends, and fewer than [`BURST_MAX`] frames were pushed.
    #[cold]
    pub unsafe fn push_pieces(&mut self, pieces: &[Segment]) -> bool {
        debug_assert!(self.count < BURST_MAX && pieces.len() <= SEGMENTS_MAX);
        let Some((first, further)) = pieces.split_first() else {
            debug_assert!(false, "a frame has at least one piece");
            return false;
        };
        let spill = self.spill.get_mut(self.spilled..);
        let Some(spill) = spill.and_then(|spill| spill.get_mut(..further.len())) else {
            return false;
        };
        for (place, piece) in spill.iter_mut().zip(further) {
            *place = *piece;
        }
        let len = pieces
            .iter()
            .fold(0u32, |sum, piece| sum.saturating_add(piece.len));
        let head = &mut self.heads[self.count % BURST_MAX];
        head.0 = [0; HEAD_LEN];
        let mut have = 0;
        for piece in pieces {
            let take = (piece.len as usize).min(HEAD_LEN - have);
            // SAFETY: `take` bytes fit behind `have` in the head, and the caller promised `piece.len` readable bytes.
            unsafe { copy_once(piece.at, head.0.as_mut_ptr().add(have), take) };
            have += take;
        }
        self.frames[self.count % BURST_MAX] = Frame {
            at: first.at,
            len,
            first: first.len,
        };
        self.odd[self.count % BURST_MAX] = Odd {
            from: self.spilled as u16,
            pieces: further.len() as u16,
            fault: None,
        };
        self.spilled += further.len();
        self.count += 1;
        true
    }

    /// Stands in for a frame that must be dropped: its buffer is given back, its bytes are never read.
    #[cold]
    pub fn push_fault(&mut self, reason: Reason) {
        debug_assert!(self.count < BURST_MAX);
        self.heads[self.count % BURST_MAX].0 = [0; HEAD_LEN];
        self.frames[self.count % BURST_MAX] = NOTHING;
        self.odd[self.count % BURST_MAX] = Odd {
            from: 0,
            pieces: 0,
            fault: Some(reason),
        };
        self.count += 1;
    }

    /// Closes the burst. `gone` is the sender's flag that its memory vanished.
    #[inline]
    pub fn lend<'a>(&'a mut self, gone: &'a AtomicBool) -> Burst<'a> {
        Burst {
            slots: self,
            gone,
            queue: PhantomData,
        }
    }
}

/// Frames lent by one queue, until this is dropped.
pub struct Burst<'a> {
    slots: &'a Slots,
    gone: &'a AtomicBool,
    queue: PhantomData<&'a mut ()>,
}

impl Burst<'_> {
    /// Frames in the burst.
    #[inline]
    pub fn count(&self) -> usize {
        self.slots.count
    }

    /// The private heads, one per frame.
    #[inline]
    pub fn heads(&self) -> &[Head] {
        self.slots.heads.get(..self.slots.count).unwrap_or(&[])
    }

    /// The private head of frame `index`.
    #[inline]
    pub fn head(&self, index: usize) -> &Head {
        &self.slots.heads[index % BURST_MAX]
    }

    /// Length in bytes of frame `index`; 0 if it carries a fault.
    #[inline]
    pub fn frame_len(&self, index: usize) -> u32 {
        self.slots.frames[index % BURST_MAX].len
    }

    /// Why frame `index` has to be dropped, if its queue says so.
    #[inline]
    pub fn fault(&self, index: usize) -> Option<Reason> {
        if self.frame_len(index) > 0 {
            return None;
        }
        self.slots.odd[index % BURST_MAX].fault
    }

    /// True if the sender's memory vanished: bytes copied from it may be zeros.
    #[inline]
    pub fn sender_gone(&self) -> bool {
        // The flag is set by a signal handler that interrupts this very thread in the middle of a copy: the compiler must
        // not move the copy behind this load. Acquire for handlers on other threads.
        compiler_fence(SeqCst);
        self.gone.load(Acquire)
    }

    /// Copies the whole frame to `to`: the checked head, then the sender's remaining bytes.
    ///
    /// # Safety
    /// `to` is valid for writes of `frame_len(index)` bytes.
    #[inline]
    pub unsafe fn copy(&self, index: usize, to: *mut u8) {
        let frame = &self.slots.frames[index % BURST_MAX];
        let head = self.head(index);
        let len = frame.len as usize;
        if len == HEAD_LEN && self.slots.lines {
            // SAFETY: HEAD_LEN bytes of the head are ours to read, and `to` is the caller's promise; `lines` says that AVX-512 is there.
            unsafe { move_line(head.0.as_ptr(), to) };
        } else if len <= HEAD_LEN {
            // SAFETY: `len <= HEAD_LEN` bytes of the head are ours to read; `to` is the caller's promise.
            unsafe { copy_short(head.0.as_ptr(), to, len) };
        } else if frame.first == frame.len {
            // SAFETY: the frame is longer than the head, so `to` takes the head and the rest; `at` has `len` readable
            // bytes (promised to `push`) while the burst lives.
            unsafe {
                ptr::copy_nonoverlapping(head.0.as_ptr(), to, HEAD_LEN);
                let (from, to, len) = (frame.at.add(HEAD_LEN), to.add(HEAD_LEN), len - HEAD_LEN);
                if len >= LONG && self.slots.lines {
                    copy_long(from, to, len);
                } else {
                    ptr::copy_nonoverlapping(from, to, len);
                }
            }
        } else {
            // SAFETY: passed on.
            unsafe { self.copy_part(index, 0, len, to) };
        }
    }

    /// Copies bytes `from..from + len` of the frame to `to`.
    ///
    /// # Safety
    /// `from + len` does not exceed the frame's length, and `to` is valid for writes of `len` bytes.
    #[cold]
    pub unsafe fn copy_part(&self, index: usize, from: usize, len: usize, to: *mut u8) {
        let frame = &self.slots.frames[index % BURST_MAX];
        debug_assert!(from + len <= frame.len as usize);
        let (mut skip, mut left, mut to) = (from, len, to);
        if skip < HEAD_LEN {
            let take = left.min(HEAD_LEN - skip);
            // SAFETY: `skip + take <= HEAD_LEN`; `take <= left`, the room at `to`.
            unsafe {
                ptr::copy_nonoverlapping(self.head(index).0.as_ptr().add(skip), to, take);
                to = to.add(take);
            }
            skip += take;
            left -= take;
        }
        let first = Segment {
            at: frame.at,
            len: frame.first,
        };
        let further = if frame.first < frame.len {
            let odd = &self.slots.odd[index % BURST_MAX];
            let from_here = self.slots.spill.get(usize::from(odd.from)..);
            let further = from_here.and_then(|spill| spill.get(..usize::from(odd.pieces)));
            further.unwrap_or(&[]) // `push_pieces` put them there
        } else {
            &[]
        };
        for piece in std::iter::once(&first).chain(further) {
            let size = piece.len as usize;
            if skip >= size {
                skip -= size;
                continue;
            }
            let take = left.min(size - skip);
            // SAFETY: `skip + take <= size`, readable by the promise to `push`/`push_pieces`; `take <= left`, the room at `to`.
            unsafe {
                ptr::copy_nonoverlapping(piece.at.add(skip), to, take);
                to = to.add(take);
            }
            skip = 0;
            left -= take;
            if left == 0 {
                break;
            }
        }
    }
}

/// What one load takes. A volatile read of a larger type would become a load per byte.
#[cfg(target_arch = "x86_64")]
type Wide = core::arch::x86_64::__m128i;
#[cfg(not(target_arch = "x86_64"))]
type Wide = u64;

/// A [`Wide`] at any address.
#[derive(Clone, Copy)]
#[repr(C, packed)]
struct Unaligned(Wide);

impl Head {
    /// Reads a whole head from foreign memory, each byte exactly once.
    ///
    /// # Safety
    /// [`HEAD_LEN`] bytes can be read at `from`.
    #[inline]
    unsafe fn fill_once(&mut self, from: *const u8) {
        const WIDE: usize = size_of::<Wide>();
        for at in (0..HEAD_LEN).step_by(WIDE) {
            // SAFETY: `at + WIDE <= HEAD_LEN`, the bytes readable at `from` and writable here; `Unaligned` may lie anywhere.
            // Volatile: exactly one load each.
            unsafe {
                let wide = ptr::read_volatile(from.add(at).cast::<Unaligned>());
                self.0.as_mut_ptr().add(at).cast::<Unaligned>().write(wide);
            }
        }
    }
}

/// Copies foreign bytes, each read exactly once.
///
/// # Safety
/// `len` bytes can be read at `from` and written at `to`.
unsafe fn copy_once(from: *const u8, to: *mut u8, len: usize) {
    for i in 0..len {
        // SAFETY: `i < len`.
        unsafe { to.add(i).write(ptr::read_volatile(from.add(i))) };
    }
}

/// True if [`move_line`] can be used: the processor has AVX-512F, and the compiler was not told so and uses none of its registers.
fn moves_lines() -> bool {
    #[cfg(all(target_arch = "x86_64", not(target_feature = "avx512f")))]
    return std::arch::is_x86_feature_detected!("avx512f");
    #[cfg(not(all(target_arch = "x86_64", not(target_feature = "avx512f"))))]
    return false;
}

/// Copies 64 bytes with one load and one store.
///
/// A line that the other side has in its cache is taken over by the first store to it; further stores to the same line wait
/// behind it. Four 16-byte stores took 14 to 25 cycles of the time stamp counter per line, one of 64 bytes 10 to 12; a frame of
/// 64 bytes takes 9 cycles less where caches are near, 45 where they are far.
///
/// # Safety
/// 64 bytes can be read at `from` and written at `to`; the processor has AVX-512F (see [`moves_lines`]).
#[inline]
unsafe fn move_line(from: *const u8, to: *mut u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: the caller's promises. The upper sixteen registers are not the compiler's here (`moves_lines`), and they leave
    // no state behind that would slow older instructions down.
    unsafe {
        core::arch::asm!(
            "vmovdqu64 zmm16, [{from}]",
            "vmovdqu64 [{to}], zmm16",
            from = in(reg) from,
            to = in(reg) to,
            options(nostack, preserves_flags)
        );
    }
    #[cfg(not(target_arch = "x86_64"))]
    // SAFETY: the caller's promise.
    unsafe {
        copy_once(from, to, HEAD_LEN);
    }
}

/// Copies a long frame from both ends to the middle: of the twelve lines at each end every other one, then those between, then the rest.
///
/// A processor that sees lines used one after the other, upwards or downwards, asks for some twenty that follow, also beyond either end
/// of the frame. In a pool that is where other buffers begin, and their first lines are their owner's: with frames of 1518 bytes DPDK's
/// `mbuf`, 500 bytes behind the end or 200 before the start. A client far away spent 620 cycles a frame when they were copied upwards,
/// 480 line by line from both ends, 320 like this, and 255 when only heads were (`bench/README.md`). Shorter frames than `LONG` end too
/// early to matter. Never in line: there it takes registers from the loop over short ones (64 bytes: 54 → 60 cycles near, 164 → 189 far).
///
/// # Safety
/// `len >= LONG`; `len` bytes can be read at `from` and written at `to`; the processor has AVX-512F (see [`moves_lines`]).
#[inline(never)]
unsafe fn copy_long(from: *const u8, to: *mut u8, len: usize) {
    debug_assert!(len >= LONG);
    // SAFETY: `at + 64 <= len` wherever it is called, see there; the processor is the caller's promise.
    let line = |at: usize| unsafe { move_line(from.add(at), to.add(at)) };
    // The receiver's whole lines, 15 at least, all of them before `first + 64 * lines <= len`.
    let first = to.addr().wrapping_neg() % 64;
    let lines = (len - first) / 64;
    let whole = |number: usize| line(first + 64 * number);
    for odd in 0..2 {
        // The last of its kind is `lines - 1` or the one before. One instruction for both ways: with one for each, processors see the steps.
        let count = (lines + 1 - odd) / 2;
        let (mut at, mut other, mut step) = (odd, odd + 2 * (count - 1), 2usize);
        for _ in 0..count.min(OUTER) {
            whole(at);
            (at, other) = (other, at.wrapping_add(step));
            step = step.wrapping_neg();
        }
    }
    let (mut start, mut end) = (OUTER, lines.saturating_sub(OUTER));
    while start < end {
        whole(start);
        whole(end - 1);
        start += 1;
        end -= 1;
    }
    // The ends' bytes in no whole line. Not before the others: that would look like the first step of a way.
    if first > 0 {
        line(0);
    }
    line(len - 64);
}

/// Copies up to 64 private bytes with at most eight moves: two overlapping halves instead of a loop.
///
/// # Safety
/// `len <= 64`; `len` bytes can be read at `from` and written at `to`.
#[inline]
unsafe fn copy_short(from: *const u8, to: *mut u8, len: usize) {
    #[inline]
    unsafe fn both_ends<const SIZE: usize>(from: *const u8, to: *mut u8, len: usize) {
        // SAFETY: the callers below have checked `SIZE <= len <= 2 * SIZE`.
        unsafe {
            ptr::copy_nonoverlapping(from, to, SIZE);
            ptr::copy_nonoverlapping(from.add(len - SIZE), to.add(len - SIZE), SIZE);
        }
    }
    // SAFETY: each arm has checked what `both_ends` needs.
    unsafe {
        match len {
            32.. => both_ends::<32>(from, to, len),
            16.. => both_ends::<16>(from, to, len),
            8.. => both_ends::<8>(from, to, len),
            4.. => both_ends::<4>(from, to, len),
            _ => ptr::copy_nonoverlapping(from, to, len),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(len: usize) -> Vec<u8> {
        (0..len).map(|i| (i * 7 + 1) as u8).collect()
    }

    fn copied(burst: &Burst<'_>, index: usize) -> Vec<u8> {
        let len = burst.frame_len(index) as usize;
        let mut out = vec![0xee; len + 8];
        // SAFETY: `out` has room for the frame.
        unsafe { burst.copy(index, out.as_mut_ptr()) };
        assert!(
            out[len..].iter().all(|b| *b == 0xee),
            "wrote beyond the frame"
        );
        out.truncate(len);
        out
    }

    #[test]
    fn a_frame_of_any_length_is_delivered_whole_and_nothing_beyond() {
        let here = AtomicBool::new(false);
        let mut slots = Slots::new();
        for len in 1..=300usize {
            let data = bytes(len + 64);
            for readable in [len, len + 64] {
                slots.clear();
                // SAFETY: `data` outlives the burst.
                unsafe { slots.push(data.as_ptr(), len as u32, readable as u32) };
                assert_eq!(copied(&slots.lend(&here), 0), &data[..len]);
            }
        }
    }

    #[test]
    fn a_long_frame_is_delivered_whole_wherever_it_lies_and_whatever_the_processor_has() {
        let here = AtomicBool::new(false);
        let mut slots = Slots::new();
        let lengths = (LONG..LONG + 200)
            .chain(1500..1800)
            .chain([2048, 9000, FRAME_MAX as usize]);
        for (index, len) in lengths.enumerate() {
            // Every distance of both ends from a line's start comes up.
            let (source, target) = (index % 64, index * 5 % 64);
            let data = bytes(source + len);
            for lines in [moves_lines(), false] {
                slots.lines = lines;
                slots.clear();
                // SAFETY: `data` outlives the burst.
                unsafe { slots.push(data[source..].as_ptr(), len as u32, len as u32) };
                let mut out = vec![0xee; target + len + 64];
                // SAFETY: `out` has room for the frame behind `target`.
                unsafe { slots.lend(&here).copy(0, out[target..].as_mut_ptr()) };
                let (before, rest) = out.split_at(target);
                let (frame, behind) = rest.split_at(len);
                assert_eq!(frame, &data[source..], "{len} bytes");
                assert!(before.iter().chain(behind).all(|b| *b == 0xee));
            }
        }
    }

    #[test]
    fn a_frame_in_pieces_is_delivered_whole_however_it_is_cut() {
        let here = AtomicBool::new(false);
        let mut slots = Slots::new();
        let data = bytes(1000);
        for cut in [1usize, 13, 63, 64, 65, 100, 999] {
            for second in [1usize, 50, 200] {
                let second = (cut + second).min(1000);
                let pieces: Vec<Segment> = [(0, cut), (cut, second), (second, 1000)]
                    .iter()
                    .map(|&(a, b)| Segment {
                        at: data[a..].as_ptr(),
                        len: (b - a) as u32,
                    })
                    .collect();
                slots.clear();
                // SAFETY: `data` outlives the burst.
                assert!(unsafe { slots.push_pieces(&pieces) });
                let burst = slots.lend(&here);
                assert_eq!(copied(&burst, 0), data);
                let mut part = vec![0; 500];
                // SAFETY: 30 + 500 <= 1000.
                unsafe { burst.copy_part(0, 30, 500, part.as_mut_ptr()) };
                assert_eq!(part, &data[30..530]);
            }
        }
    }

    #[test]
    fn the_checked_head_is_delivered_even_if_the_sender_rewrites_its_buffer() {
        let here = AtomicBool::new(false);
        let mut slots = Slots::new();
        let mut data = bytes(200);
        let before = data.clone();
        slots.clear();
        let at = data.as_mut_ptr();
        // SAFETY: `data` outlives the burst and is touched through `at` alone meanwhile.
        unsafe {
            slots.push(at, 200, 200);
            for i in 0..200 {
                at.add(i).write(0xff);
            }
        }
        let out = copied(&slots.lend(&here), 0);
        assert_eq!(&out[..HEAD_LEN], &before[..HEAD_LEN]);
        assert!(out[HEAD_LEN..].iter().all(|b| *b == 0xff));
    }
}
