//! What kind of container the generator plays.

use std::path::PathBuf;
use std::time::Duration;

use ringway::guest::{MemoryKind, Options, Role};

/// Which memory the frontends have.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Memory {
    /// Hugepages if enough are free, ordinary pages otherwise.
    #[default]
    Auto,
    /// Ordinary pages: nothing has to be prepared.
    Memfd,
    /// Hugepages of 2 MiB.
    Hugepages,
}

/// Which layout the rings have.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Rings {
    #[default]
    Split,
    Packed,
}

/// What kind of container the generator plays.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Frontends")]
pub(crate) struct Frontends {
    /// The layout of the rings
    #[arg(long, value_enum, default_value = "split")]
    pub(crate) rings: Rings,
    /// Do not negotiate IN_ORDER
    #[arg(long)]
    pub(crate) no_in_order: bool,
    /// Do not negotiate MRG_RXBUF
    #[arg(long)]
    pub(crate) no_mergeable: bool,
    /// Descriptors per ring
    #[arg(long, value_name = "NUMBER", default_value_t = 1024)]
    pub(crate) ring_size: u16,
    /// Queue pairs per port
    #[arg(long, value_name = "NUMBER", default_value_t = 1)]
    pub(crate) queues: u16,
    /// What the ports' memory is made of
    #[arg(long, value_enum, default_value = "auto")]
    pub(crate) memory: Memory,
    /// Bytes of a receive buffer, the 12 of its header included [default: 2048, or what the longest frame takes; with
    /// mergeable buffers a longer frame spreads over several]
    #[arg(long, value_name = "BYTES")]
    pub(crate) receive_buffer: Option<u32>,
    /// The generator listens on the sockets, and the switch connects (virtio_user's server mode)
    #[arg(long)]
    pub(crate) listen: bool,
    /// How long the switch may take to appear, and for each step of the handshake
    #[arg(long, value_name = "SECONDS", default_value_t = 5.0, value_parser = patience)]
    pub(crate) patience: f64,
    /// The CPUs of the generator's threads, one each [default: the --client-cpu]
    #[arg(long, value_name = "CPU,...", value_delimiter = ',')]
    pub(crate) cpus: Vec<usize>,
}

fn patience(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(seconds) if (0.01..=3600.0).contains(&seconds) => Ok(seconds),
        _ => Err("must be between 0.01 and 3600".to_owned()),
    }
}

impl Frontends {
    /// Small split rings of ordinary memory.
    pub(crate) fn plain() -> Self {
        Self {
            rings: Rings::Split,
            no_in_order: false,
            no_mergeable: false,
            ring_size: 256,
            queues: 1,
            memory: Memory::Memfd,
            receive_buffer: None,
            listen: false,
            patience: 10.0,
            cpus: Vec::new(),
        }
    }

    /// `split`, or what differs: `packed, not in order`.
    pub(crate) fn name(&self) -> String {
        let mut name = match self.rings {
            Rings::Split => "split",
            Rings::Packed => "packed",
        }
        .to_owned();
        for (differs, what) in [
            (self.no_in_order, ", not in order"),
            (self.no_mergeable, ", not mergeable"),
        ] {
            if differs {
                name += what;
            }
        }
        if self.queues > 1 {
            name += &format!(", {} queue pairs", self.queues);
        }
        name
    }

    pub(super) fn options(&self, socket: PathBuf, longest: u32, hugepages: bool) -> Options {
        let mut options = Options::new(socket).frame_max(longest);
        options.role = if self.listen {
            Role::Server
        } else {
            Role::Client
        };
        if self.rings == Rings::Packed {
            options = options.packed();
        }
        options.in_order = !self.no_in_order;
        options.mergeable = !self.no_mergeable;
        options.ring_size = self.ring_size;
        options.queue_pairs = self.queues;
        if let Some(bytes) = self.receive_buffer {
            options.receive_buffer = bytes;
        }
        options.memory = if hugepages {
            MemoryKind::Hugepages
        } else {
            MemoryKind::Memfd
        };
        options.patience = Duration::from_secs_f64(self.patience);
        options.wait = options.patience;
        options
    }

    /// Bytes of memory that `ports` ports take, about.
    pub(super) fn bytes(&self, ports: usize, longest: u32) -> u64 {
        let buffer = u64::from(longest.max(2048)) + 192;
        let pair = u64::from(self.ring_size) * (2 * buffer + 64);
        ports as u64 * (u64::from(self.queues) * pair + (2 << 20))
    }
}
