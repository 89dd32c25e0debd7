//! The other side of a vhost-user socket: a container without the container. Demo, benchmark and tests are its users.
//!
//! A [`Guest`] owns memory of its own (a memfd, or hugepages), a connection to a switch in either role, and driver-side rings
//! in that memory. [`Guest::attach`] gives one [`Tx`] and one [`Rx`] per queue pair, to be moved to the threads that use them;
//! the guest itself stays with whoever controls it. [`traffic`] makes frames that can be checked, and checks them.
//!
//! ```no_run
//! use ringway::guest::{Guest, Options};
//! # fn main() -> Result<(), ringway::guest::GuestError> {
//! let mut guest = Guest::new(Options::new("/run/ringway/ports/blue/vhost.sock").packed())?;
//! let mut pair = guest.attach()?.remove(0);
//! pair.tx.send(1, |slot| {
//!     slot.write(0, &[0xff; 60]);
//!     60
//! });
//! pair.rx.receive(|frame| println!("{} bytes", frame.len()));
//! # Ok(()) }
//! ```

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crate::virtio::own_mem::OwnMem;
use crate::virtio::ring::feature;

pub mod frame;
mod layout;
pub mod messages;
pub mod queue;
mod session;
pub mod traffic;

pub use frame::{Frame, Slot};
pub use messages::{Link, LinkError};
pub use queue::{QueuePair, Rx, Tx};

use session::{RingPlace, Session, Source};

/// Who creates the socket.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Role {
    /// The switch listens, the guest connects.
    #[default]
    Client,
    /// The guest listens (virtio_user's `server=1`), the switch connects.
    Server,
}

/// Layout of the rings.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Layout {
    /// virtio 1.2 §2.7.
    #[default]
    Split,
    /// virtio 1.2 §2.8.
    Packed,
}

/// What a guest's memory is made of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MemoryKind {
    /// Ordinary pages: needs no preparation of the host.
    #[default]
    Memfd,
    /// Hugepages of 2 MiB, as the host has reserved them.
    Hugepages,
}

/// What kind of guest.
#[derive(Clone, Debug)]
pub struct Options {
    /// The vhost-user socket.
    pub socket: PathBuf,
    /// Who creates it.
    pub role: Role,
    /// Layout of the rings: refused if the switch does not offer it.
    pub layout: Layout,
    /// IN_ORDER, if offered.
    pub in_order: bool,
    /// MRG_RXBUF, if offered.
    pub mergeable: bool,
    /// EVENT_IDX, if offered.
    pub event_idx: bool,
    /// INDIRECT_DESC, if offered: frames in pieces take one slot of the ring.
    pub indirect: bool,
    /// Queue pairs, 1 to 16.
    pub queue_pairs: u16,
    /// Descriptors per ring.
    pub ring_size: u16,
    /// Longest frame that can be sent, in bytes.
    pub frame_max: u32,
    /// Bytes of a receive buffer, the virtio-net header included.
    pub receive_buffer: u32,
    /// Buffers longer than this are given to the switch as chains of pieces; 0: in one piece, whatever their length.
    pub piece: u32,
    /// What the memory is made of.
    pub memory: MemoryKind,
    /// How long one step of the handshake may take.
    pub patience: Duration,
    /// How long to wait for the switch to appear.
    pub wait: Duration,
}

impl Options {
    /// A client with one pair of split rings of 1024, mergeable and in order, for frames of up to 2 KiB.
    pub fn new(socket: impl Into<PathBuf>) -> Options {
        Options {
            socket: socket.into(),
            role: Role::Client,
            layout: Layout::Split,
            in_order: true,
            mergeable: true,
            event_idx: false,
            indirect: true,
            queue_pairs: 1,
            ring_size: 1024,
            frame_max: 2048,
            receive_buffer: 2048,
            piece: 0,
            memory: MemoryKind::Memfd,
            patience: Duration::from_secs(2),
            wait: Duration::from_secs(5),
        }
    }

    /// The guest listens.
    pub fn listen(mut self) -> Options {
        self.role = Role::Server;
        self
    }

    /// Packed rings.
    pub fn packed(mut self) -> Options {
        self.layout = Layout::Packed;
        self
    }

    /// So many queue pairs.
    pub fn queue_pairs(mut self, pairs: u16) -> Options {
        self.queue_pairs = pairs;
        self
    }

    /// So many descriptors per ring.
    pub fn ring_size(mut self, size: u16) -> Options {
        self.ring_size = size;
        self
    }

    /// Frames of up to `bytes` bytes, each in one buffer on both sides.
    pub fn frame_max(mut self, bytes: u32) -> Options {
        self.frame_max = bytes;
        self.receive_buffer = self.receive_buffer.max(bytes + 12);
        self
    }

    /// Features the guest cannot do without.
    fn required(&self) -> u64 {
        let layout = match self.layout {
            Layout::Split => 0,
            Layout::Packed => feature::RING_PACKED,
        };
        let pairs = if self.queue_pairs > 1 { feature::MQ } else { 0 };
        feature::VERSION_1 | layout | pairs
    }

    /// Features the guest takes if it can.
    fn wanted(&self) -> u64 {
        let optional = [
            (self.in_order, feature::IN_ORDER),
            (self.mergeable, feature::MRG_RXBUF),
            (self.event_idx, feature::EVENT_IDX),
            (self.indirect, feature::INDIRECT_DESC),
            (true, feature::PROTOCOL_FEATURES),
        ];
        let taken = optional.iter().filter(|(wanted, _)| *wanted);
        taken.fold(self.required(), |bits, (_, bit)| bits | bit)
    }

    fn check(&self) -> Result<(), GuestError> {
        let bad = |what: String| Err(GuestError::Options(what));
        let size = self.ring_size;
        if size == 0 || size > 32_768 {
            return bad(format!("a ring of {size}: it has 1 to 32768 descriptors"));
        }
        if self.layout == Layout::Split && !size.is_power_of_two() {
            return bad(format!(
                "a split ring of {size}: its size is a power of two"
            ));
        }
        if !(1..=16).contains(&self.queue_pairs) {
            return bad(format!(
                "{} queue pairs: there are 1 to 16",
                self.queue_pairs
            ));
        }
        if self.receive_buffer <= 12 || self.frame_max == 0 || self.frame_max > 65_535 {
            return bad(format!(
                "frames of {} bytes in receive buffers of {}: a frame has 1 to 65535, a buffer more than the 12 of its header",
                self.frame_max, self.receive_buffer
            ));
        }
        let buffer = u64::from(self.receive_buffer.max(self.frame_max) + 128);
        if buffer * u64::from(size) > u64::from(u32::MAX) {
            return bad(format!(
                "a ring of {size} with buffers of {buffer} bytes: 4 GiB per ring are the most"
            ));
        }
        Ok(())
    }
}

/// Why there is no guest.
#[derive(Debug, thiserror::Error)]
pub enum GuestError {
    /// The options contradict themselves.
    #[error("{0}")]
    Options(String),
    /// No switch at the socket.
    #[error("{}: {cause}: is the switch running, and is this its socket?", .path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What the kernel said.
        cause: io::Error,
    },
    /// The socket cannot be created.
    #[error("{}: {cause}", .path.display())]
    Listen {
        /// The socket.
        path: PathBuf,
        /// What the kernel said.
        cause: io::Error,
    },
    /// The switch did not connect.
    #[error("{}: no switch connected within {after:?}", .path.display())]
    NobodyCame {
        /// The socket.
        path: PathBuf,
        /// How long the guest waited.
        after: Duration,
    },
    /// The socket failed.
    #[error("vhost-user socket: {0}")]
    Socket(io::Error),
    /// The conversation failed.
    #[error("handshake: {0}")]
    Link(#[from] LinkError),
    /// The switch lacks something.
    #[error("the switch does not offer {}", feature_names(*.0))]
    NotOffered(u64),
    /// The switch has fewer queues.
    #[error("{wanted} queue pairs wanted, but the switch has {offered}")]
    FewQueues {
        /// Queue pairs wanted.
        wanted: u16,
        /// Queue pairs there are.
        offered: u64,
    },
    /// The host has too few hugepages.
    #[error(
        "{mib} MiB of hugepages are not free: reserve some (`echo {} > /proc/sys/vm/nr_hugepages`) or use ordinary memory",
        .mib.div_ceil(2)
    )]
    Hugepages {
        /// MiB wanted.
        mib: u64,
    },
    /// No memory.
    #[error("{mib} MiB of shared memory: {cause}")]
    Memory {
        /// MiB wanted.
        mib: u64,
        /// What the kernel said.
        cause: io::Error,
    },
    /// No event descriptors.
    #[error("eventfd: {0}")]
    Eventfd(io::Error),
}

impl GuestError {
    fn memory(bytes: u64, hugepages: bool, cause: io::Error) -> GuestError {
        let mib = bytes.div_ceil(1 << 20);
        match hugepages {
            true => GuestError::Hugepages { mib },
            false => GuestError::Memory { mib, cause },
        }
    }
}

/// Feature bits as the specification calls them.
pub fn feature_names(bits: u64) -> String {
    let known = [
        (feature::MRG_RXBUF, "MRG_RXBUF"),
        (feature::CTRL_VQ, "CTRL_VQ"),
        (feature::GUEST_ANNOUNCE, "GUEST_ANNOUNCE"),
        (feature::MQ, "MQ"),
        (feature::INDIRECT_DESC, "INDIRECT_DESC"),
        (feature::EVENT_IDX, "EVENT_IDX"),
        (feature::PROTOCOL_FEATURES, "PROTOCOL_FEATURES"),
        (feature::VERSION_1, "VERSION_1"),
        (feature::RING_PACKED, "RING_PACKED"),
        (feature::IN_ORDER, "IN_ORDER"),
    ];
    let names: Vec<&str> = known
        .iter()
        .filter(|(bit, _)| bits & bit != 0)
        .map(|(_, name)| *name)
        .collect();
    match names.is_empty() {
        true => format!("{bits:#x}"),
        false => names.join(", "),
    }
}

/// A guest, attached to a switch or not.
#[derive(Debug)]
pub struct Guest {
    options: Options,
    source: Source,
    attached: Option<Attachment>,
}

#[derive(Debug)]
struct Attachment {
    session: Session,
    memory: Arc<OwnMem>,
    rings: Vec<RingPlace>,
}

impl Guest {
    /// A guest that is not attached yet; one that listens has its socket now.
    pub fn new(options: Options) -> Result<Guest, GuestError> {
        options.check()?;
        let source = Source::new(&options)?;
        Ok(Guest {
            options,
            source,
            attached: None,
        })
    }

    /// Connects (or waits for the switch to), negotiates, and starts fresh rings in fresh memory. Ends an attachment there was, without a
    /// word; its queues are dead.
    pub fn attach(&mut self) -> Result<Vec<QueuePair>, GuestError> {
        self.attached = None;
        let stream = self.source.connection(&self.options)?;
        let link = Link::new(stream, self.options.patience);
        let session = Session::negotiate(&self.options, link)?;
        let (memory, rings, pairs) = layout::build(&self.options, session.features)?;
        session.start(&memory, &rings)?;
        self.attached = Some(Attachment {
            session,
            memory,
            rings,
        });
        Ok(pairs)
    }

    /// Connects again after the switch has gone, with the rings and the memory there are: the queues live on, wherever they are. As
    /// virtio_user does it for split rings in server mode: it says nothing of where the rings stand.
    pub fn resume(&mut self) -> Result<(), GuestError> {
        if self.options.layout == Layout::Packed {
            return Err(GuestError::Options(
                "packed rings are not resumed: attach again".to_owned(),
            ));
        }
        let Some(before) = self.attached.take() else {
            return Err(GuestError::Options(
                "nothing to resume: the guest was never attached".to_owned(),
            ));
        };
        let Attachment {
            session: old,
            memory,
            rings,
        } = before;
        let features = old.features;
        drop(old);
        let stream = self.source.connection(&self.options)?;
        let link = Link::new(stream, self.options.patience);
        let session = Session::renegotiate(&self.options, link, rings.len())?;
        if session.features != features {
            return Err(GuestError::NotOffered(features & !session.features));
        }
        session.start(&memory, &rings)?;
        self.attached = Some(Attachment {
            session,
            memory,
            rings,
        });
        Ok(())
    }

    /// Stops the rings and closes the connection, as an orderly exit does.
    pub fn detach(&mut self) -> Result<(), GuestError> {
        match self.attached.take() {
            Some(attached) => Ok(attached.session.stop(attached.rings.len())?),
            None => Ok(()),
        }
    }

    /// Closes the connection without a word, as `kill -9` does. The queues write on to memory nobody reads any more.
    pub fn vanish(&mut self) {
        self.attached = None;
    }

    /// True while the switch keeps the connection open.
    pub fn connected(&self) -> bool {
        self.attached
            .as_ref()
            .is_some_and(|attached| attached.session.alive())
    }

    /// Features agreed upon; 0 if not attached.
    pub fn features(&self) -> u64 {
        self.attached
            .as_ref()
            .map_or(0, |attached| attached.session.features)
    }

    /// Features the switch offered; 0 if not attached.
    pub fn offered(&self) -> u64 {
        self.attached
            .as_ref()
            .map_or(0, |attached| attached.session.offered)
    }

    /// The guest's options.
    pub fn options(&self) -> &Options {
        &self.options
    }

    /// The connection itself: for guests that lie, or fall silent in the middle of a message.
    pub fn link(&self) -> Option<&Link> {
        self.attached
            .as_ref()
            .map(|attached| &attached.session.link)
    }

    /// The shared memory: for guests that lie about it, or take it away.
    pub fn memory(&self) -> Option<&Arc<OwnMem>> {
        self.attached.as_ref().map(|attached| &attached.memory)
    }

    /// Says SET_MEM_TABLE again, as a DPDK container does when it takes further hugepages.
    pub fn share_again(&self) -> Result<(), GuestError> {
        match &self.attached {
            Some(attached) => Ok(attached.session.share(&attached.memory)?),
            None => Ok(()),
        }
    }

    /// SET_VRING_ENABLE of a queue pair.
    pub fn enable(&self, pair: u16, on: bool) -> Result<(), GuestError> {
        let Some(attached) = &self.attached else {
            return Ok(());
        };
        let link = &attached.session.link;
        for ring in [2 * pair, 2 * pair + 1] {
            let payload = messages::state(u32::from(ring), u32::from(on));
            link.tell(messages::Request::SetVringEnable, &payload, &[])?;
        }
        link.ask(messages::Request::GetFeatures)?;
        Ok(())
    }
}
