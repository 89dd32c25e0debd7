//! What can go wrong on the control side, each a sentence that names the device.

use std::io;

use crate::mailbox::MailboxError;

/// Why a device cannot be used (any more).
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The way to the device failed.
    #[error("{device}: {what}: {source}")]
    Io {
        /// Address or socket of the device.
        device: String,
        /// What was tried.
        what: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// Another kind of device.
    #[error(
        "{device}: a device {vendor:04x}:{id:04x}, not a VF of the 82599 family (8086:10ed, 1515, 1565, 15a8, 15c5)"
    )]
    NotAVf {
        /// Address or socket of the device.
        device: String,
        /// PCI vendor.
        vendor: u16,
        /// PCI device.
        id: u16,
    },
    /// What was asked for cannot be had on any such device.
    #[error("{device}: {what}")]
    Setup {
        /// Address or socket of the device.
        device: String,
        /// What does not fit, and what would.
        what: String,
    },
    /// The conversation with the PF failed.
    #[error("{device}: {what}: {source}")]
    Pf {
        /// Address or socket of the device.
        device: String,
        /// What was asked.
        what: &'static str,
        /// What came of it.
        source: MailboxError,
    },
    /// The device does not do what its datasheet says.
    #[error("{device}: {what}")]
    Stuck {
        /// Address or socket of the device.
        device: String,
        /// What did not happen.
        what: &'static str,
    },
}

/// Results of this crate.
pub type Result<T> = std::result::Result<T, Error>;
