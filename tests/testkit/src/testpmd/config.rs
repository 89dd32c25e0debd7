//! What a testpmd shall be: its ports, its memory, its command line.

use std::path::{Path, PathBuf};

/// Which rings and which burst functions the frontend uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Variant {
    /// Split, mergeable, in order: what virtio_user takes when everything is offered.
    Split,
    /// Split, vectorized: neither mergeable nor in order. Its receiver needs bursts of 4 frames.
    SplitVec,
    /// Split, in order, not mergeable.
    SplitOrd,
    /// Split, mergeable, not in order.
    SplitMergeable,
    /// Split, neither mergeable nor in order, scalar.
    SplitPlain,
    /// Packed, mergeable, in order.
    Packed,
    /// Packed, vectorized (needs AVX-512, else falls back to scalar): in order, not mergeable.
    PackedVec,
    /// Packed, in order, not mergeable.
    PackedOrd,
    /// Packed, mergeable, not in order.
    PackedMergeable,
    /// Packed, neither mergeable nor in order.
    PackedPlain,
}

impl Variant {
    /// Every path through DPDK's virtio driver.
    pub const ALL: [Self; 10] = [
        Self::Split,
        Self::SplitVec,
        Self::SplitOrd,
        Self::SplitMergeable,
        Self::SplitPlain,
        Self::Packed,
        Self::PackedVec,
        Self::PackedOrd,
        Self::PackedMergeable,
        Self::PackedPlain,
    ];

    /// Options appended to the vdev.
    pub fn options(self) -> &'static str {
        match self {
            Self::Split => "",
            Self::SplitVec => ",mrg_rxbuf=0,in_order=0,vectorized=1",
            Self::SplitOrd => ",mrg_rxbuf=0,in_order=1",
            Self::SplitMergeable => ",mrg_rxbuf=1,in_order=0",
            Self::SplitPlain => ",mrg_rxbuf=0,in_order=0",
            Self::Packed => ",packed_vq=1",
            Self::PackedVec => ",packed_vq=1,mrg_rxbuf=0,in_order=1,vectorized=1",
            Self::PackedOrd => ",packed_vq=1,mrg_rxbuf=0,in_order=1",
            Self::PackedMergeable => ",packed_vq=1,mrg_rxbuf=1,in_order=0",
            Self::PackedPlain => ",packed_vq=1,mrg_rxbuf=0,in_order=0",
        }
    }
}

/// A `net_virtio_user` port.
#[derive(Debug, Clone)]
pub struct VirtioUser {
    /// The vhost-user socket.
    pub socket: PathBuf,
    /// The port listens (`server=1`) and the switch connects.
    pub server: bool,
    /// Last byte of the MAC address 02:00:00:00:00:xx.
    pub station: u8,
    /// Entries per ring.
    pub queue_size: u16,
    /// Queue pairs.
    pub queues: u16,
    /// Rings and burst functions.
    pub variant: Variant,
}

impl VirtioUser {
    /// A client-mode port with one pair of split rings of 1024.
    pub fn new(socket: impl AsRef<Path>, station: u8) -> Self {
        let socket = socket.as_ref().to_path_buf();
        Self {
            socket,
            server: false,
            station,
            queue_size: 1024,
            queues: 1,
            variant: Variant::Split,
        }
    }

    /// The port's MAC address.
    pub fn mac(&self) -> String {
        format!("02:00:00:00:00:{:02x}", self.station)
    }

    /// The `--vdev` argument of port `index`.
    pub fn vdev(&self, index: usize) -> String {
        let server = if self.server { ",server=1" } else { "" };
        let (path, mac, size) = (self.socket.display(), self.mac(), self.queue_size);
        let (queues, options) = (self.queues, self.variant.options());
        format!(
            "net_virtio_user{index},path={path}{server},mac={mac},queue_size={size},queues={queues}{options}"
        )
    }
}

/// Where DPDK takes its memory from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Memory {
    /// So many MB of 2 MB hugepages in one file (`--single-file-segments`): within the limit of 8 regions.
    Hugepages(u32),
    /// So many MB of hugepages, a file per page: fails in the frontend on the limit of 8 regions.
    HugepageFiles(u32),
    /// So many MB of ordinary pages (`--no-huge`): needs no preparation of the host.
    NoHuge(u32),
}

/// How to start a testpmd.
#[derive(Debug, Clone)]
pub struct Config {
    /// `--vdev` arguments; see [`VirtioUser::vdev`].
    pub vdevs: Vec<String>,
    /// Memory.
    pub memory: Memory,
    /// The command line runs on the first of these CPUs, forwarding on the second.
    pub cpus: (usize, usize),
    /// EAL arguments, before the `--`.
    pub eal: Vec<String>,
    /// testpmd arguments, after the `--`.
    pub args: Vec<String>,
    /// Run as this user, without any capability.
    pub uid: Option<u32>,
    /// What starts the command line elsewhere: `docker run ... IMAGE`. Empty: it starts here.
    pub inside: Vec<String>,
}

impl Default for Config {
    fn default() -> Self {
        let last = std::thread::available_parallelism().map_or(1, usize::from) - 1;
        Self {
            vdevs: Vec::new(),
            memory: Memory::Hugepages(192),
            cpus: (0, last.min(1)),
            eal: vec!["--force-max-simd-bitwidth=512".to_owned()],
            args: [
                "--nb-cores=1",
                "--txd=1024",
                "--rxd=1024",
                "--total-num-mbufs=16384",
            ]
            .map(str::to_owned)
            .into(),
            uid: None,
            inside: Vec::new(),
        }
    }
}

impl Config {
    /// Two ports that send each other's frames through the switch.
    pub fn pair(ports: [VirtioUser; 2]) -> Self {
        let vdevs = ports.iter().enumerate();
        let vdevs = vdevs.map(|(i, port)| port.vdev(i)).collect();
        let mut config = Self {
            vdevs,
            ..Self::default()
        };
        let queues = ports[0].queues.min(ports[1].queues);
        config
            .args
            .extend(["--port-topology=paired", "--forward-mode=io"].map(str::to_owned));
        config.args.extend([
            format!("--eth-peer=0,{}", ports[1].mac()),
            format!("--eth-peer=1,{}", ports[0].mac()),
        ]);
        if queues > 1 {
            config
                .args
                .extend([format!("--rxq={queues}"), format!("--txq={queues}")]);
        }
        config
    }

    /// One port that returns each frame to its sender: of two such containers one starts with `start tx_first`.
    pub fn single(port: &VirtioUser, peer: &VirtioUser) -> Self {
        let mut config = Self {
            vdevs: vec![port.vdev(0)],
            memory: Memory::Hugepages(128),
            ..Self::default()
        };
        config
            .args
            .extend(["--port-topology=loop", "--forward-mode=macswap"].map(str::to_owned));
        config.args.push(format!("--eth-peer=0,{}", peer.mac()));
        config
    }

    /// The switch that does not switch: two `net_vhost` ports, frames handed over unseen (`io`). Both threads share a CPU.
    pub fn vhost_io(sockets: [&Path; 2], queues: u16) -> Self {
        let vdev = |(i, path): (usize, &&Path)| {
            format!("net_vhost{i},iface={},queues={queues}", path.display())
        };
        let mut config = Self {
            vdevs: sockets.iter().enumerate().map(vdev).collect(),
            cpus: (0, 0),
            ..Self::default()
        };
        config
            .args
            .extend(["--forward-mode=io".to_owned(), "--auto-start".to_owned()]);
        if queues > 1 {
            config
                .args
                .extend([format!("--rxq={queues}"), format!("--txq={queues}")]);
        }
        config
    }

    /// Frames of up to 9000 bytes in buffers that hold one (`mergeable` rings also manage with small ones).
    pub fn jumbo(mut self) -> Self {
        self.args.retain(|a| !a.starts_with("--total-num-mbufs"));
        self.args.extend(
            [
                "--mbuf-size=9728",
                "--max-pkt-len=9018",
                "--total-num-mbufs=10240",
            ]
            .map(str::to_owned),
        );
        self.memory = match self.memory {
            Memory::NoHuge(mb) => Memory::NoHuge(mb.max(256)),
            Memory::Hugepages(mb) | Memory::HugepageFiles(mb) => Memory::Hugepages(mb.max(256)),
        };
        self
    }

    /// The command line, as a person would type it.
    pub fn command_line(&self, prefix: &str) -> Vec<String> {
        let (main, forward) = self.cpus;
        let mut line = vec![
            "dpdk-testpmd".to_owned(),
            "--lcores".to_owned(),
            format!("0@{main},1@{forward}"),
        ];
        line.extend(["--main-lcore", "0", "--no-pci", "--no-telemetry"].map(str::to_owned));
        line.push(format!("--file-prefix={prefix}"));
        match self.memory {
            Memory::Hugepages(mb) => {
                line.extend(
                    ["--in-memory", "--single-file-segments", "--socket-mem"].map(str::to_owned),
                );
                line.push(mb.to_string());
            }
            Memory::HugepageFiles(mb) => {
                line.extend([
                    "--in-memory".to_owned(),
                    "--socket-mem".to_owned(),
                    mb.to_string(),
                ]);
            }
            Memory::NoHuge(mb) => {
                line.extend(["--no-huge".to_owned(), "-m".to_owned(), mb.to_string()])
            }
        }
        line.extend(self.eal.iter().cloned());
        line.extend(self.vdevs.iter().map(|vdev| format!("--vdev={vdev}")));
        line.extend(["--", "-i"].map(str::to_owned));
        line.extend(self.args.iter().cloned());
        line
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vdev_names_what_the_frontend_needs() {
        let port = VirtioUser {
            queues: 4,
            variant: Variant::PackedVec,
            ..VirtioUser::new("/s", 0x1f)
        };
        assert_eq!(
            port.vdev(1),
            "net_virtio_user1,path=/s,mac=02:00:00:00:00:1f,queue_size=1024,queues=4,packed_vq=1,mrg_rxbuf=0,in_order=1,vectorized=1"
        );
    }
}
