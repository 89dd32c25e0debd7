//! One VF: opened, reset, agreed upon with its PF, started; its addresses, its link.
//!
//! The order of every step is that of the vendor's drivers (82599 §4.6): what a reset leaves alone is written, RESET comes before
//! any other message, the longest frame is always told, and a receive tail is written only once its queue runs.

mod bring_up;
mod granted;
mod options;

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rustix::event::{EventfdFlags, eventfd};

use crate::error::{Error, Result};
use crate::iova::IovaSpace;
use crate::mailbox::{Api, Cast, Mac, Mailbox, MailboxError, QueueGrant};
use crate::mmio::{Bar, GONE};
use crate::regs;
use crate::rx::RxQueue;
use crate::stats::{Counters, Statistics};
use crate::transport::Transport;
use crate::tx::TxQueue;

pub use options::Options;

/// VFs that have this register map: 82599, the same under Hyper-V, X540, X550, X550EM.
const DEVICES: [u16; 6] = [0x10ED, 0x152E, 0x1515, 0x1565, 0x15A8, 0x15C5];
/// FCS, which the PF counts and this crate does not.
const FCS: u32 = 4;
/// Longest frame without a VLAN tag at an MTU of 1500.
pub const FRAME_STANDARD: u32 = 1514;
/// Longest frame of any PF: 9728 with FCS.
pub const FRAME_JUMBO: u32 = 9728 - FCS;
/// Bytes by which a tagged frame may be longer.
pub const TAG: u32 = 4;
/// Further addresses that one message can number.
const ADDRESSES_MAX: usize = 255;
/// The vector of the mailbox; queues share 0 and 1.
const MAILBOX_VECTOR: u32 = 2;

/// A pair of queues.
pub struct QueuePair {
    /// Receive.
    pub rx: RxQueue,
    /// Transmit.
    pub tx: TxQueue,
}

/// How the VF is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Health {
    /// The link is up, at this many Mbit/s.
    Up(u32),
    /// No link; nothing to do but wait.
    Down,
    /// The PF forgot this VF, or the device is gone: drop the queues and [`Vf::reset`].
    Lost(MailboxError),
}

/// A Virtual Function. One control thread; its queues go to workers.
///
/// Dropping it resets the device. Queues that outlive it see no more frames.
pub struct Vf {
    transport: Arc<dyn Transport>,
    bar: Bar,
    mailbox: Mailbox,
    options: Options,
    space: Arc<Mutex<IovaSpace>>,
    /// One eventfd per vector.
    signals: Vec<Arc<OwnedFd>>,
    /// Alive in every queue that was handed out.
    lease: Arc<()>,
    counters: Counters,
    filter_type: u32,
    grant: QueueGrant,
    mac: Mac,
    mac_from_pf: bool,
    max_frame: u32,
    lost: Option<MailboxError>,
    interrupts_on: bool,
    addresses: Vec<Mac>,
    multicast: Vec<Mac>,
    vlans: BTreeSet<u16>,
    cast: Cast,
}

impl Vf {
    /// Takes a device over: checks what it is, resets it, and agrees with its PF. It passes no frames yet.
    pub fn open(transport: Arc<dyn Transport>, options: &Options) -> Result<Vf> {
        let device = transport.name();
        options.check().map_err(|what| Error::Setup {
            device: device.clone(),
            what,
        })?;
        identify(&*transport)?;
        let io = |what| {
            let device = device.clone();
            move |source| Error::Io {
                device,
                what,
                source,
            }
        };
        let bar = transport
            .clone()
            .registers()
            .map_err(io("mapping the registers (BAR0)"))?;
        // What a killed process left behind ends here: rings, interrupts, the PF's opinion of us.
        match transport.reset() {
            Err(error) if error.kind() != io::ErrorKind::Unsupported => {
                return Err(io("function-level reset")(error));
            }
            _ => {}
        }
        let signals = (0..transport.vectors().min(MAILBOX_VECTOR + 1))
            .map(|_| {
                eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
                    .map(Arc::new)
                    .map_err(|errno| io("eventfd")(errno.into()))
            })
            .collect::<Result<Vec<_>>>()?;
        let mut vf = Vf {
            mailbox: Mailbox::new(bar.clone(), transport.clone()),
            space: Arc::new(Mutex::new(IovaSpace::new(&transport.iova_ranges()))),
            transport,
            bar,
            options: options.clone(),
            signals,
            lease: Arc::new(()),
            counters: Counters::new(),
            filter_type: 0,
            grant: QueueGrant { tx: 1, rx: 1 },
            mac: [0; 6],
            mac_from_pf: false,
            max_frame: FRAME_STANDARD,
            lost: None,
            interrupts_on: false,
            addresses: Vec::new(),
            multicast: Vec::new(),
            vlans: BTreeSet::new(),
            cast: Cast::Multi,
        };
        vf.counters.rebase(&vf.bar);
        vf.reset()?;
        let signals: Vec<_> = vf.signals.iter().map(|fd| Some(fd.as_fd())).collect();
        vf.transport
            .set_interrupts(&signals)
            .map_err(io("setting up MSI-X"))?;
        vf.interrupts_on = true;
        Ok(vf)
    }

    /// Resets the VF and agrees with its PF anew; registers all addresses again. Every queue must have been dropped.
    pub fn reset(&mut self) -> Result<()> {
        self.no_queues()?;
        // 1. Silence: no queue runs, no interrupt fires.
        self.quiesce();
        if self.bar.read(regs::VFSTATUS) == GONE {
            return Err(self.pf("reset", MailboxError::Gone));
        }
        self.counters.update(&self.bar);
        // 2. Reset.
        self.mailbox.forget();
        self.bar.write(regs::VFCTRL, regs::CTRL_RST);
        let _ = self.bar.read(regs::VFSTATUS);
        self.transport.pause(Duration::from_millis(50));
        self.wait_for_pf()?;
        self.counters.rebase(&self.bar);
        // 3. What a reset leaves alone.
        self.write_defaults();
        // 4. Agree with the PF.
        let reply = self
            .mailbox
            .reset()
            .map_err(|error| self.pf("RESET", error))?;
        self.filter_type = reply.filter_type;
        self.lost = None;
        self.mailbox
            .negotiate()
            .map_err(|error| self.pf("agreeing on an API version", error))?;
        let grant = self
            .mailbox
            .queues()
            .map_err(|error| self.pf("asking for queues", error))?;
        self.grant = grant.unwrap_or(QueueGrant { tx: 1, rx: 1 });
        self.settle_mac(reply.mac)?;
        self.settle_max_frame()?;
        // 5. All that the PF forgot.
        self.register_again()
    }

    /// Starts queues: as many pairs as wanted and granted, a power of two.
    pub fn start(&mut self) -> Result<Vec<QueuePair>> {
        self.no_queues()?;
        let most = self.options.queues.min(self.grant.rx).min(self.grant.tx);
        let count = 1 << most.max(1).ilog2();
        self.bar
            .write(regs::VFPSRTYPE, (count >> 1) << regs::PSRTYPE_RQPL_SHIFT);
        let pairs = (0..count)
            .map(|queue| self.start_pair(queue))
            .collect::<Result<Vec<_>>>()?;
        self.route_interrupts(count);
        Ok(pairs)
    }

    /// A look at link and mailbox; a few register reads. Call it some ten times a second, or when [`Vf::mailbox_signal`] fires.
    pub fn health(&mut self) -> Health {
        if let Some(error) = self.lost {
            return Health::Lost(error);
        }
        let links = self.bar.read(regs::VFLINKS);
        if links == GONE {
            return self.lose(MailboxError::Gone);
        }
        // The mailbox interrupt masked itself.
        self.bar.write(regs::VTEIMS, 1 << MAILBOX_VECTOR);
        if let Err(error) = self.mailbox.listen() {
            return self.lose(error);
        }
        if links & regs::LINKS_UP == 0 {
            return Health::Down;
        }
        // SFP+ and direct-attach cables flicker: up is what stays up.
        for _ in 0..5 {
            self.transport.pause(Duration::from_micros(100));
            if self.bar.read(regs::VFLINKS) & regs::LINKS_UP == 0 {
                return Health::Down;
            }
        }
        Health::Up(match links >> 28 & 3 {
            3 => 10_000,
            2 => 1000,
            1 => 100,
            _ => 0,
        })
    }

    fn lose(&mut self, error: MailboxError) -> Health {
        self.lost = Some(error);
        Health::Lost(error)
    }

    /// The device's counters since it was opened.
    pub fn statistics(&mut self) -> Statistics {
        if self.bar.read(regs::VFSTATUS) == GONE {
            return self.counters.last_known();
        }
        self.counters.update(&self.bar)
    }

    /// The VF's own address.
    pub fn mac(&self) -> Mac {
        self.mac
    }

    /// True if the PF's administrator set the address: an untrusted VF may then register no others.
    pub fn mac_from_pf(&self) -> bool {
        self.mac_from_pf
    }

    /// The version of the mailbox protocol that was agreed on.
    pub fn api(&self) -> Api {
        self.mailbox.api()
    }

    /// Queue pairs the PF grants.
    pub fn queues_granted(&self) -> u32 {
        self.grant.rx.min(self.grant.tx)
    }

    /// Longest untagged frame without FCS that the PF lets through.
    pub fn max_frame(&self) -> u32 {
        self.max_frame
    }

    /// Readable when the PF has something to say: time for [`Vf::health`].
    pub fn mailbox_signal(&self) -> Option<Arc<OwnedFd>> {
        self.signals.get(MAILBOX_VECTOR as usize).cloned()
    }

    /// Where the device is.
    pub fn name(&self) -> String {
        self.transport.name()
    }

    fn no_queues(&self) -> Result<()> {
        if Arc::strong_count(&self.lease) == 1 {
            return Ok(());
        }
        Err(Error::Setup {
            device: self.transport.name(),
            what: "its queues are still in use: drop them first".into(),
        })
    }

    fn pf(&self, what: &'static str, source: MailboxError) -> Error {
        Error::Pf {
            device: self.transport.name(),
            what,
            source,
        }
    }

    /// Talks to the PF and remembers if it turned out to have forgotten us.
    fn note<T>(
        &mut self,
        talk: impl FnOnce(&mut Mailbox) -> std::result::Result<T, MailboxError>,
    ) -> std::result::Result<T, MailboxError> {
        let result = talk(&mut self.mailbox);
        if let Err(error) = &result
            && *error != MailboxError::Refused
        {
            self.lost = Some(*error);
        }
        result
    }
}

impl Drop for Vf {
    fn drop(&mut self) {
        self.quiesce();
        self.bar.write(regs::VFCTRL, regs::CTRL_RST);
        let _ = self.bar.read(regs::VFSTATUS);
        if self.interrupts_on
            && let Err(error) = self.transport.set_interrupts(&[])
        {
            log::warn!("{}: interrupts stay on: {error}", self.transport.name());
        }
    }
}

fn identify(transport: &dyn Transport) -> Result<()> {
    let mut ids = [0; 4];
    transport
        .read_config(0, &mut ids)
        .map_err(|source| Error::Io {
            device: transport.name(),
            what: "reading configuration space",
            source,
        })?;
    let vendor = u16::from_le_bytes([ids[0], ids[1]]);
    let id = u16::from_le_bytes([ids[2], ids[3]]);
    if vendor == 0x8086 && DEVICES.contains(&id) {
        return Ok(());
    }
    Err(Error::NotAVf {
        device: transport.name(),
        vendor,
        id,
    })
}
