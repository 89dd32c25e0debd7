//! A transmit queue: frames are copied into its buffers, one tail write per burst (82599 §7.2).
//!
//! Positions run free: `head..tail` are with the device, `tail` is where the next frame goes. Only about every 32nd descriptor
//! asks for a report (RS); when its DD shows, everything before it is free again.

use std::sync::Arc;
use std::sync::atomic::{Ordering::Acquire, fence};
use std::time::Duration;

use crate::desc::{self, TX_DONE, TxOffload};
use crate::dma::{Ring, Room};
use crate::mmio::Bar;
use crate::regs;
use crate::rx::RxFrame;
use crate::transport::Transport;

/// Descriptors from one report to the next.
const REPORT: u32 = 32;
/// Shortest frame without FCS; shorter ones are padded with zeros.
pub const FRAME_MIN: u32 = 60;
/// Descriptors of one frame, with its context: the vendor's limit of 40 segments.
const DESCS_MAX: u32 = 40;

/// Frames go here. One thread at a time; dropping it stops the queue and takes its memory from the device.
pub struct TxQueue {
    ring: Ring,
    bar: Bar,
    queue: u32,
    /// First descriptor that is not known to be free.
    head: u32,
    tail: u32,
    /// The tail that the device knows.
    published: u32,
    /// Descriptors since the last one that asked for a report.
    silent: u32,
    /// Positions behind descriptors that asked for a report, oldest first; a free-running queue.
    marks: Box<[u32]>,
    first_mark: u32,
    end_mark: u32,
    /// What the device's context was last set to: equal offloads share it.
    context: TxOffload,
    /// Longest frame without FCS.
    max_frame: u32,
    transport: Arc<dyn Transport>,
    _lease: Arc<()>,
}

/// Why a frame was not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TxError {
    /// No free descriptors.
    #[error("no free descriptor")]
    Full,
    /// Longer than the PF lets through, or empty.
    #[error("a frame of a length that the PF does not let through")]
    Length,
    /// The device cannot do the work asked for.
    #[error("{0}")]
    Offload(&'static str),
}

impl TxQueue {
    pub(crate) fn new(
        ring: Ring,
        bar: Bar,
        queue: u32,
        max_frame: u32,
        transport: Arc<dyn Transport>,
        lease: Arc<()>,
    ) -> TxQueue {
        assert!(ring.size() >= 128, "DESCS_MAX + REPORT must fit");
        // Marks are at least REPORT descriptors apart.
        let marks = (ring.size() / REPORT).next_power_of_two() * 2;
        TxQueue {
            ring,
            bar,
            queue,
            head: 0,
            tail: 0,
            published: 0,
            silent: 0,
            marks: vec![0; marks as usize].into_boxed_slice(),
            first_mark: 0,
            end_mark: 0,
            context: TxOffload::default(),
            max_frame,
            transport,
            _lease: lease,
        }
    }

    /// Programs the queue (§4.6.8). The device must have been reset.
    pub(crate) fn start(&mut self) -> Result<(), &'static str> {
        let (bar, q) = (&self.bar, self.queue);
        bar.write(regs::vftxdctl(q), regs::TXDCTL_SWFLSH);
        let table = self.ring.table_iova();
        bar.write(regs::vftdbal(q), table as u32);
        bar.write(regs::vftdbah(q), (table >> 32) as u32);
        bar.write(regs::vftdlen(q), self.ring.table_len());
        bar.write(regs::vftdh(q), 0);
        bar.write(regs::vftdt(q), 0);
        bar.write(regs::vftdwbal(q), 0);
        bar.write(regs::vftdwbah(q), 0);
        bar.write(
            regs::vftxdctl(q),
            regs::DCTL_ENABLE | regs::TXDCTL_THRESHOLDS,
        );
        for _ in 0..10 {
            if bar.read(regs::vftxdctl(q)) & regs::DCTL_ENABLE != 0 {
                return Ok(());
            }
            self.transport.pause(Duration::from_millis(1));
        }
        Err("a transmit queue did not start within 10 ms")
    }

    /// Descriptors that can be used. One slot stays free: a tail equal to the head would mean an empty ring.
    #[inline]
    fn room(&self) -> u32 {
        self.ring.size() - 1 - self.tail.wrapping_sub(self.head)
    }

    /// Where the mark of this number is: there are a power of two.
    fn mark_place(&self, number: u32) -> usize {
        number as usize & self.marks.len().wrapping_sub(1)
    }

    fn mark(&self, number: u32) -> u32 {
        let place = self.mark_place(number);
        self.marks.get(place).copied().unwrap_or(self.head)
    }

    /// Finds out what the device has sent.
    fn reclaim(&mut self) {
        while self.first_mark != self.end_mark {
            let mark = self.mark(self.first_mark);
            if self.ring.high(mark.wrapping_sub(1)) & TX_DONE == 0 {
                break;
            }
            self.head = mark;
            self.first_mark = self.first_mark.wrapping_add(1);
        }
        // Acquire: the device has read the buffers before it said so; what we write into them now comes after.
        fence(Acquire);
    }

    /// Takes a frame of `len` bytes; `fill(from, room)` copies it from byte `from` on to `room`, once for each buffer. Short frames are padded with zeros. The device sees it after [`TxQueue::publish`].
    #[inline]
    pub fn push(
        &mut self,
        len: u32,
        mut fill: impl FnMut(u32, &mut Room<'_>),
    ) -> Result<(), TxError> {
        if len == 0 || len > self.max_frame {
            return Err(TxError::Length);
        }
        if len > Ring::BUFFER {
            return self.push_long(len, TxOffload::default().data(len), FRAME_MIN, &mut fill);
        }
        if self.room() == 0 {
            self.reclaim();
            if self.room() == 0 {
                return Err(TxError::Full);
            }
        }
        let sent = self.fill(self.tail, 0, len, FRAME_MIN, &mut fill);
        let report = self.silent + 1 >= REPORT;
        self.ring.set(
            self.tail,
            self.ring.buffer_iova(self.tail),
            desc::tx_data(sent, true, report, TxOffload::default().data(sent)),
        );
        self.advance(1, report);
        Ok(())
    }

    /// Takes a frame and lets the device work on it. A frame to be cut into segments may be longer than the PF's maximum.
    pub fn push_with(
        &mut self,
        len: u32,
        offload: &TxOffload,
        mut fill: impl FnMut(u32, &mut Room<'_>),
    ) -> Result<(), TxError> {
        offload.check(len).map_err(TxError::Offload)?;
        if len == 0 || offload.mss.is_none() && len > self.max_frame {
            return Err(TxError::Length);
        }
        if offload.is_none() {
            return self.push(len, fill);
        }
        let fresh = *offload != self.context;
        let need = len.div_ceil(Ring::BUFFER) + u32::from(fresh);
        if need > DESCS_MAX {
            return Err(TxError::Length);
        }
        if !self.makes_room(need) {
            return Err(TxError::Full);
        }
        if fresh {
            let [low, high] = offload.context();
            self.ring.set(self.tail, low, high);
            self.advance(1, false);
            self.context = *offload;
        }
        // Padding would become payload of the last segment; the device pads segments itself.
        let least = if offload.mss.is_some() { 0 } else { FRAME_MIN };
        self.push_long(len, offload.data(len.max(least)), least, &mut fill)
    }

    fn makes_room(&mut self, need: u32) -> bool {
        if self.room() < need {
            self.reclaim();
        }
        self.room() >= need
    }

    /// A frame in as many buffers as it takes.
    #[cold]
    fn push_long(
        &mut self,
        len: u32,
        offload: u64,
        least: u32,
        fill: &mut dyn FnMut(u32, &mut Room<'_>),
    ) -> Result<(), TxError> {
        let count = len.div_ceil(Ring::BUFFER);
        if count > DESCS_MAX {
            return Err(TxError::Length);
        }
        if !self.makes_room(count) {
            return Err(TxError::Full);
        }
        let report = self.silent + count >= REPORT;
        for index in 0..count {
            let (position, from) = (self.tail.wrapping_add(index), index * Ring::BUFFER);
            let bytes = (len - from).min(Ring::BUFFER);
            let sent = self.fill(position, from, bytes, least, fill);
            let end = index + 1 == count;
            self.ring.set(
                position,
                self.ring.buffer_iova(position),
                desc::tx_data(sent, end, end && report, offload),
            );
        }
        self.advance(count, report);
        Ok(())
    }

    /// Fills the buffer at `position` with `bytes` bytes of a frame from `from` on; pads a frame shorter than `least`. Says how many to send.
    #[inline]
    fn fill(
        &self,
        position: u32,
        from: u32,
        bytes: u32,
        least: u32,
        fill: &mut (impl FnMut(u32, &mut Room<'_>) + ?Sized),
    ) -> u32 {
        fill(from, &mut self.ring.space(position, bytes));
        if from > 0 || bytes >= least {
            return bytes;
        }
        self.ring.space(position, least).clear_from(bytes);
        least
    }

    /// `count` descriptors were written; the last of them asked for a report, or not.
    #[inline]
    fn advance(&mut self, count: u32, report: bool) {
        self.tail = self.tail.wrapping_add(count);
        if report {
            self.silent = 0;
            let place = self.mark_place(self.end_mark);
            if let Some(mark) = self.marks.get_mut(place) {
                *mark = self.tail;
            }
            self.end_mark = self.end_mark.wrapping_add(1);
        } else {
            self.silent += count;
        }
    }

    /// Takes a copy of `frame`.
    pub fn push_bytes(&mut self, frame: &[u8]) -> Result<(), TxError> {
        let len = u32::try_from(frame.len()).map_err(|_| TxError::Length)?;
        self.push(len, |from, room| room.write(0, &frame[from as usize..]))
    }

    /// Takes a copy of a received frame.
    #[inline]
    pub fn push_frame(&mut self, frame: &RxFrame<'_>) -> Result<(), TxError> {
        self.push(frame.len(), |from, room| frame.copy_part(from, room))
    }

    /// Shows the device all frames pushed since the last time: one register write.
    #[inline]
    pub fn publish(&mut self) {
        if self.tail != self.published {
            self.published = self.tail;
            self.bar
                .write(regs::vftdt(self.queue), self.ring.slot(self.tail));
        }
    }

    /// Takes back all frames pushed since the last [`TxQueue::publish`]: the device never sees them.
    #[cold]
    pub fn take_back(&mut self) {
        let beyond = |position: u32| {
            let back = self.tail.wrapping_sub(position);
            back < self.tail.wrapping_sub(self.published)
        };
        while self.first_mark != self.end_mark {
            let newest = self.end_mark.wrapping_sub(1);
            if !beyond(self.mark(newest)) {
                break;
            }
            self.end_mark = newest;
        }
        self.tail = self.published;
        let last = match self.first_mark == self.end_mark {
            true => self.head,
            false => self.mark(self.end_mark.wrapping_sub(1)),
        };
        self.silent = self.tail.wrapping_sub(last);
        // The device may not have seen the last context.
        self.context = TxOffload::default();
    }

    /// Number of this queue in its device.
    pub fn index(&self) -> u32 {
        self.queue
    }

    /// Longest frame without FCS that this queue takes.
    pub fn max_frame(&self) -> u32 {
        self.max_frame
    }
}

impl Drop for TxQueue {
    fn drop(&mut self) {
        self.bar
            .write(regs::vftxdctl(self.queue), regs::TXDCTL_SWFLSH);
        // Pushes the write to the device before the ring's memory goes.
        let _ = self.bar.read(regs::VFSTATUS);
    }
}
