//! The processor's time-stamp counter.
//!
//! An island of `unsafe`: one instruction.
#![allow(unsafe_code)]

/// Cycles of the time-stamp counter: constant rate, not the core's real clock. About 14 ns in a virtual machine.
#[inline]
pub fn tsc() -> u64 {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: RDTSC exists on every x86-64 and reads nothing but the counter.
    unsafe {
        core::arch::x86_64::_rdtsc()
    }
    #[cfg(target_arch = "aarch64")]
    {
        let ticks: u64;
        // SAFETY: CNTVCT_EL0 is readable from user space on Linux.
        unsafe { core::arch::asm!("mrs {}, cntvct_el0", out(reg) ticks, options(nomem, nostack)) };
        ticks
    }
}
