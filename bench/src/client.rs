//! The client: one testpmd with two virtio_user ports, the same for every switch.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use ringway::dataplane::eth::Mac;

use crate::console::{Console, Forwarded, PortStats};
use crate::host::hugepages_hint;
use crate::process::Proc;
use crate::rows::{Row, Traffic};

/// The station that everything is sent to in the rows with many source stations; it lives on the second port.
pub(crate) const DESTINATION: Mac = Mac::from_bytes([2, 0, 0, 0, 0, 2]);
/// Idle ports per process: DPDK has room for 32 devices.
const IDLE_PER_PROCESS: usize = 30;

/// The CPUs of a measurement.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cpus {
    /// The switch with all its threads.
    pub(crate) switch: usize,
    /// The client's forwarding core.
    pub(crate) client: usize,
    /// The client's terminal and the harness: the switch's CPU on a machine of two.
    pub(crate) control: usize,
}

impl Cpus {
    /// The two that matter for the sentinel.
    pub(crate) fn pair(self) -> [usize; 2] {
        [self.switch, self.client]
    }
}

/// What plays the containers of a comparison: testpmd, or for the kernel's own ways a generator of ours.
pub(crate) trait Generator {
    /// Sends the first frames.
    fn begin(&mut self) -> Result<()>;

    /// The ports whose received frames count.
    fn received(&mut self) -> Result<Vec<PortStats>>;

    /// What its forwarding cores did so far.
    fn forwarded(&mut self) -> Result<Forwarded>;

    fn proc(&self) -> &Proc;

    /// What the binary says that it is; empty where the switch's version tells.
    fn version(&self) -> &str;

    /// Disconnects; the switch must be running.
    fn leave(self: Box<Self>);
}

/// A testpmd that is connected and, after [`Generator::begin`], sends.
pub(crate) struct Client {
    console: Console,
    row: Row,
    // The first of the ports whose received frames count.
    counted_from: usize,
}

impl Client {
    /// Connects to the switch's first two sockets. `directory` takes the file of frames that many stations need.
    pub(crate) fn connect(
        row: Row,
        sockets: &[PathBuf],
        cpus: Cpus,
        directory: &Path,
    ) -> Result<Self> {
        let [first, second, ..] = sockets else {
            bail!("a switch with two ports is needed")
        };
        let arguments = match row.traffic {
            Traffic::Circle { .. } => circle_arguments(&row, first, second, cpus),
            Traffic::Stations(count) => {
                stations_arguments(&row, first, second, cpus, &frames(count, directory)?, count)
            }
        };
        let console = Console::start(
            "the client (testpmd)",
            &[cpus.control, cpus.client],
            &arguments,
            directory,
        )
        .with_context(|| format!("the client cannot be started{}", hugepages_hint()))?;
        let counted_from = if matches!(row.traffic, Traffic::Stations(_)) {
            2
        } else {
            0
        };
        Ok(Self {
            console,
            row,
            counted_from,
        })
    }
}

impl Generator for Client {
    fn begin(&mut self) -> Result<()> {
        // Reading the clock around every burst would be a good part of a burst of one.
        let record = if self.row.traffic.is_hop() {
            "off"
        } else {
            "on"
        };
        self.console
            .tell(&format!("set record-core-cycles {record}"))?;
        match self.row.traffic {
            Traffic::Circle { burst, bursts } => {
                self.console.tell(&format!("set burst {burst}"))?;
                self.console
                    .tell(&format!("set txpkts {}", self.row.frame))?;
                self.console.tell(&format!("start tx_first {bursts}"))
            }
            Traffic::Stations(_) => {
                self.console.tell("set portlist 0,1,2,3")?;
                self.console.tell("start")
            }
        }
    }

    fn received(&mut self) -> Result<Vec<PortStats>> {
        let mut ports = self.console.ports()?;
        match self.row.traffic {
            Traffic::Circle { .. } => {}
            // pcap, sender, receiver, null: the receiver alone.
            Traffic::Stations(_) => {
                ports = ports.into_iter().skip(self.counted_from).take(1).collect()
            }
        }
        Ok(ports)
    }

    fn forwarded(&mut self) -> Result<Forwarded> {
        self.console.forwarded()
    }

    fn proc(&self) -> &Proc {
        self.console.proc()
    }

    fn version(&self) -> &str {
        self.console.version()
    }

    fn leave(mut self: Box<Self>) {
        self.console.quit();
    }
}

/// Connects silent clients to these sockets. They use no CPU: their forwarding cores never start.
pub(crate) fn connect_idle(
    sockets: &[PathBuf],
    cpus: Cpus,
    directory: &Path,
) -> Result<Vec<Console>> {
    sockets
        .chunks(IDLE_PER_PROCESS)
        .enumerate()
        .map(|(number, sockets)| {
            // Ordinary memory: hundreds of idle ports shall not take the hugepages of those that work.
            let mut arguments = words(&format!(
                "--lcores 0@{},1@{} --main-lcore 0 --no-pci --no-huge -m 128 --no-shconf --file-prefix=rwbi{number} \
                 --no-telemetry",
                cpus.control, cpus.client
            ));
            for (port, socket) in sockets.iter().enumerate() {
                let mac = format!("02:00:00:01:{number:02x}:{port:02x}");
                arguments.push(format!("--vdev=net_virtio_user{port},path={},mac={mac},queue_size=256", socket.display()));
            }
            arguments.extend(words("-- -i --nb-cores=1 --txd=256 --rxd=256 --total-num-mbufs=20480 --mbuf-size=2176"));
            Console::start("an idle client (testpmd)", &[cpus.control, cpus.client], &arguments, directory)
                .with_context(|| format!("{} idle ports", sockets.len()))
        })
        .collect()
}

/// What every client of a measurement says to its EAL.
fn eal_arguments(cpus: Cpus, megabytes: u32) -> Vec<String> {
    words(&format!(
        "--lcores 0@{},1@{} --main-lcore 0 --no-pci --in-memory --single-file-segments --socket-mem {megabytes} \
         --file-prefix=rwbc --no-telemetry --force-max-simd-bitwidth=512",
        cpus.control, cpus.client
    ))
}

fn vdev(number: usize, socket: &Path, row: &Row) -> String {
    let variant = row.variant.arguments();
    let socket = socket.display();
    format!(
        "--vdev=net_virtio_user{number},path={socket},mac=02:00:00:00:00:0{},queue_size=1024{variant}",
        number + 1
    )
}

fn circle_arguments(row: &Row, first: &Path, second: &Path, cpus: Cpus) -> Vec<String> {
    let mut arguments = eal_arguments(cpus, 256);
    arguments.extend([vdev(0, first, row), vdev(1, second, row)]);
    let mbufs = if row.jumbo() {
        "--mbuf-size=9728 --max-pkt-len=9018 --total-num-mbufs=10240"
    } else {
        "--total-num-mbufs=16384"
    };
    arguments.extend(words(&format!(
        "-- -i --nb-cores=1 --txd=1024 --rxd=1024 {mbufs} --port-topology=paired --forward-mode=io \
         --eth-peer=0,02:00:00:00:00:02 --eth-peer=1,02:00:00:00:00:01"
    )));
    arguments
}

/// A file of frames → first port → switch → second port → nothing.
fn stations_arguments(
    row: &Row,
    first: &Path,
    second: &Path,
    cpus: Cpus,
    file: &Path,
    count: u32,
) -> Vec<String> {
    let mbufs = count.max(FILE_FRAMES) + 32_768;
    // A million stations would take 2.3 GB of buffers of the usual size: theirs hold 256 bytes.
    let (size, bytes) = if count > 200_000 {
        (384, 512)
    } else {
        (2176, 2432)
    };
    let megabytes = (u64::from(mbufs) * bytes).div_ceil(1 << 20).max(192) + 64;
    let mut arguments = eal_arguments(cpus, u32::try_from(megabytes).unwrap_or(u32::MAX));
    arguments.push(format!(
        "--vdev=net_pcap0,rx_pcap={},infinite_rx=1",
        file.display()
    ));
    arguments.extend([vdev(0, first, row), vdev(1, second, row)]);
    arguments.push("--vdev=net_null0,no-rx=1".to_owned());
    arguments.extend(words(&format!(
        "-- -i --nb-cores=1 --txd=1024 --rxd=1024 --mbuf-size={size} --total-num-mbufs={mbufs} --port-topology=paired \
         --forward-mode=io --no-flush-rx"
    )));
    arguments
}

fn words(text: &str) -> Vec<String> {
    text.split_whitespace().map(str::to_owned).collect()
}

/// Frames in the file at least: with one station alone it would be a ring of one frame.
const FILE_FRAMES: u32 = 1024;

/// Writes a pcap file of 64-byte frames from `count` stations in random order to [`DESTINATION`], unless it is there.
fn frames(count: u32, directory: &Path) -> Result<PathBuf> {
    let path = directory.join(format!("{count}.pcap"));
    if !path.exists() {
        let file = File::create(&path).with_context(|| path.display().to_string())?;
        write_frames(count, &mut BufWriter::new(file))
            .with_context(|| path.display().to_string())?;
    }
    Ok(path)
}

fn write_frames(count: u32, file: &mut impl Write) -> std::io::Result<()> {
    // The file's header: magic, version 2.4, zone, accuracy, longest frame, Ethernet.
    for word in [0xa1b2_c3d4_u32, 0x0004_0002, 0, 0, 65_535, 1] {
        file.write_all(&word.to_le_bytes())?;
    }
    let mut order: Vec<u32> = (0..count.max(FILE_FRAMES)).map(|at| at % count).collect();
    shuffle(&mut order);
    for station in order {
        for word in [0u32, 0, 64, 64] {
            file.write_all(&word.to_le_bytes())?;
        }
        let mut frame = [0u8; 64];
        frame[..6].copy_from_slice(&DESTINATION.to_bytes());
        frame[6..12].copy_from_slice(&[2, 1, 0, 0, 0, 0]);
        frame[8..12].copy_from_slice(&station.to_be_bytes());
        frame[12..14].copy_from_slice(&[0x88, 0xb5]); // IEEE local experimental
        file.write_all(&frame)?;
    }
    file.flush()
}

/// Fisher and Yates with a fixed seed: every run gets the same order.
fn shuffle(values: &mut [u32]) {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    for at in (1..values.len()).rev() {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let other = usize::try_from(state % (at as u64 + 1)).expect("at most `at`");
        values.swap(at, other);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn the_file_of_frames_holds_every_station_once_in_no_order() {
        let mut file = Vec::new();
        write_frames(5000, &mut file).unwrap();
        assert_eq!(file.len(), 24 + 5000 * (16 + 64));
        let stations: Vec<_> = file[24..]
            .chunks(80)
            .map(|frame| frame[22..28].to_vec())
            .collect();
        assert_eq!(stations.iter().collect::<HashSet<_>>().len(), 5000);
        assert!(
            stations.iter().all(|mac| mac[0] & 1 == 0),
            "no group address as a source"
        );
        assert!(!stations.is_sorted());
    }

    #[test]
    fn one_station_still_fills_a_ring() {
        let mut file = Vec::new();
        write_frames(1, &mut file).unwrap();
        assert_eq!((file.len() - 24) / 80, 1024);
    }

    #[test]
    fn a_client_says_which_rings_it_wants() {
        let row = crate::rows::parse("packedvec64").unwrap()[0];
        let cpus = Cpus {
            switch: 0,
            client: 1,
            control: 0,
        };
        let arguments = circle_arguments(&row, Path::new("/a"), Path::new("/b"), cpus).join(" ");
        assert!(arguments.contains(
            "net_virtio_user1,path=/b,mac=02:00:00:00:00:02,queue_size=1024,packed_vq=1,mrg_rxbuf=0"
        ));
        assert!(arguments.contains("--lcores 0@0,1@1"));
    }
}
